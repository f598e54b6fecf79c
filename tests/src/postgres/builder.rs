//! How a cluster comes to be: from `initdb`, as a standby of another one, or from a data directory
//! that something else (a restore) has made.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use super::cluster::{PgCluster, Place};
use super::version::PgVersion;
use crate::clock::eventually;
use crate::dir::{TestDir, reachable};
use crate::process::{self, RunAs};

/// What every test cluster runs with. No socket paths or ports: those are given on the command
/// line, so that a copy of the data directory does not carry them.
const BASE_CONF: &str = "\
listen_addresses = ''
fsync = off
shared_buffers = 32MB
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] %a '
log_replication_commands = on
restart_after_crash = off
";

/// The settings of a cluster to be started. Made by [`PgCluster::builder`].
#[derive(Clone, Debug)]
pub struct PgBuilder {
    version: PgVersion,
    segment_mb: u32,
    conf: String,
    hba: String,
    checksums: bool,
    tcp: bool,
    initdb: Vec<String>,
}

impl PgBuilder {
    pub(super) fn new(version: PgVersion) -> Self {
        Self {
            version,
            segment_mb: 16,
            conf: BASE_CONF.to_owned(),
            hba: String::new(),
            checksums: false,
            tcp: false,
            initdb: Vec::new(),
        }
    }

    /// `wal_segment_size` in MiB: a power of two from 1 to 1024.
    #[must_use]
    pub fn segment_mb(mut self, mb: u32) -> Self {
        self.segment_mb = mb;
        self
    }

    /// One line of `postgresql.conf`.
    #[must_use]
    pub fn conf(mut self, name: &str, value: &str) -> Self {
        let _ = writeln!(self.conf, "{name} = '{}'", value.replace('\'', "''"));
        self
    }

    /// Lines of `pg_hba.conf`, before the ones that let everybody in through the socket.
    #[must_use]
    pub fn hba(mut self, lines: &str) -> Self {
        let _ = writeln!(self.hba, "{lines}");
        self
    }

    /// Data checksums; off unless asked for, in every major.
    #[must_use]
    pub fn checksums(mut self, on: bool) -> Self {
        self.checksums = on;
        self
    }

    /// Listen on a free TCP port of the loopback interface as well.
    #[must_use]
    pub fn tcp(mut self, on: bool) -> Self {
        self.tcp = on;
        self
    }

    /// One more argument of `initdb`, for instance `--auth-host=scram-sha-256`.
    #[must_use]
    pub fn initdb(mut self, argument: &str) -> Self {
        self.initdb.push(argument.to_owned());
        self
    }

    /// Runs `initdb` and starts the server, in a directory of its own.
    ///
    /// # Errors
    /// When the major is not installed, or initdb or the server fails; the message holds its log.
    pub async fn start(self) -> anyhow::Result<PgCluster> {
        let dir = Arc::new(TestDir::new()?);
        let place = Place::make(self.version, self.tcp, dir, "data")?;
        self.run_initdb(&place)?;
        append(&place.data.join("postgresql.conf"), &self.conf)?;
        let hba = place.data.join("pg_hba.conf");
        let shipped = std::fs::read_to_string(&hba)?;
        std::fs::write(&hba, format!("{}{shipped}", self.hba))?;
        let mut cluster = PgCluster::at(place);
        cluster.start_again().await?;
        Ok(cluster)
    }

    fn run_initdb(&self, place: &Place) -> anyhow::Result<()> {
        let mut arguments = vec![
            format!("--pgdata={}", place.data.display()),
            format!("--wal-segsize={}", self.segment_mb),
            "--username=postgres".to_owned(),
            "--auth=trust".to_owned(),
            "--encoding=UTF8".to_owned(),
            "--locale=C".to_owned(),
            "--no-sync".to_owned(),
        ];
        match (self.checksums, self.version >= PgVersion::V18) {
            (true, _) => arguments.push("--data-checksums".to_owned()),
            (false, true) => arguments.push("--no-data-checksums".to_owned()),
            (false, false) => {}
        }
        arguments.extend(self.initdb.iter().cloned());
        process::run(&place.bin.join("initdb"), &arguments, place.dir.path()).map(drop)
    }

    /// Starts a streaming standby of `primary` in a directory of its own, with this builder's settings
    /// added to the primary's.
    ///
    /// # Errors
    /// When the copy or the start fails.
    pub async fn standby_of(self, primary: &PgCluster) -> anyhow::Result<PgCluster> {
        let dir = Arc::new(TestDir::new()?);
        let place = Place::make(primary.version(), self.tcp, dir, "data")?;
        copy_online(primary, &place.data).await?;
        let source = format!(
            "primary_conninfo = '{} application_name=standby'\n",
            primary.connection_string()
        );
        append(&place.data.join("postgresql.conf"), &(self.conf + &source))?;
        std::fs::write(place.data.join("standby.signal"), "")?;
        RunAs::own_tree(&place.data)?;
        let mut cluster = PgCluster::at(place);
        cluster.start_again().await?;
        // Only then does a primary that is stopped wait until the standby has everything.
        let streams = || async {
            let query = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'standby' AND state = 'streaming'";
            (primary.value(query).await.ok()? == "1").then_some(())
        };
        eventually("the standby to stream", STREAMS_WITHIN, streams).await?;
        Ok(cluster)
    }
}

/// How long a new standby may take to stream.
const STREAMS_WITHIN: Duration = Duration::from_secs(60);

/// Copies a running cluster with PostgreSQL's own backup functions; there is no `pg_basebackup` for
/// every major here.
async fn copy_online(primary: &PgCluster, into: &Path) -> anyhow::Result<()> {
    let (start, stop) = match primary.version() {
        PgVersion::V14 => (
            "pg_start_backup('copy', true, false)",
            "pg_stop_backup(false, false)",
        ),
        _ => ("pg_backup_start('copy', true)", "pg_backup_stop(false)"),
    };
    let client = primary.client().await?;
    client.simple_query(&format!("SELECT {start}")).await?;
    process::copy_tree(primary.data_dir(), into).or_else(|error| {
        if into.join("global/pg_control").exists() {
            Ok(())
        } else {
            Err(error)
        }
    })?;
    let label = client
        .query_one(&format!("SELECT labelfile FROM {stop}"), &[])
        .await?;
    std::fs::write(into.join("backup_label"), label.get::<_, String>(0))?;
    for leftover in ["postmaster.pid", "postmaster.opts"] {
        drop(std::fs::remove_file(into.join(leftover)));
    }
    drop(std::fs::remove_dir_all(into.join("pg_replslot")));
    std::fs::create_dir_all(into.join("pg_replslot"))?;
    Ok(())
}

fn append(path: &Path, lines: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .open(path)
        .context(path.display().to_string())?;
    file.write_all(lines.as_bytes())?;
    Ok(())
}

impl Place {
    /// Prepares everything around a data directory, which need not exist yet.
    pub(super) fn make(version: PgVersion, tcp: bool, dir: Arc<TestDir>, data: &str) -> anyhow::Result<Self> {
        let data = dir.join(data);
        Self::around(version, tcp, dir, data)
    }

    pub(super) fn around(
        version: PgVersion,
        tcp: bool,
        dir: Arc<TestDir>,
        data: PathBuf,
    ) -> anyhow::Result<Self> {
        let bin = usable_bin(version, &dir)?;
        let sockets = dir.create_dir("socket")?;
        let log = dir.join("postgresql.log");
        Ok(Self {
            version,
            bin,
            dir,
            data,
            sockets,
            log,
            tcp,
        })
    }
}

/// The programs, or a copy of them where the unprivileged user can get at it.
fn usable_bin(version: PgVersion, dir: &TestDir) -> anyhow::Result<PathBuf> {
    let bin = version.bin()?;
    if reachable(&bin) {
        return Ok(bin);
    }
    let tree = bin.parent().context("a bin directory has a parent")?;
    let copy = dir.join("programs");
    let status = std::process::Command::new("cp")
        .arg("-a")
        .arg(tree)
        .arg(&copy)
        .status()?;
    anyhow::ensure!(
        status.success(),
        "cannot copy {} to {}",
        tree.display(),
        copy.display()
    );
    RunAs::own_tree(&copy)?;
    Ok(copy.join("bin"))
}
