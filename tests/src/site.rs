//! One site as the end-to-end tests need it: a primary, a tap before it, two regions, and the
//! programs configured for them.
//!
//! Owns: the configuration text and the order of starting things. The parts stay visible: a test
//! reaches into them to break them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::archive;
use crate::clock::eventually;
use crate::dir::TestDir;
use crate::lsn;
use crate::postgres::{PgBuilder, PgCluster, PgVersion};
use crate::program::{Finished, Program, Running};
use crate::s3::{S3Server, S3Snapshot};
use crate::tap::FeedbackTap;

/// The bucket of every region.
pub const BUCKET: &str = "archive";
/// The names of the two regions.
pub const REGIONS: [&str; 2] = ["north", "south"];

/// Long enough for anything the programs do in tests, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A primary with an archive in two regions.
#[derive(Debug)]
pub struct Site {
    /// The primary.
    pub primary: PgCluster,
    /// Between the agent and the primary.
    pub tap: FeedbackTap,
    /// The regions, in the order of [`REGIONS`].
    pub regions: [Arc<S3Server>; 2],
    /// More lines of the agent's configuration, for instance `[durability]`.
    pub settings: String,
    /// The agent's user.
    pub user: String,
    segment_size: u64,
}

impl Site {
    /// A site whose primary is made by `builder`, with segments of `segment_mb`.
    ///
    /// # Errors
    /// When the primary or an endpoint does not start.
    pub async fn start(builder: PgBuilder, segment_mb: u32) -> Result<Self> {
        let primary = builder.segment_mb(segment_mb).start().await?;
        let tap = FeedbackTap::start(&primary).await?;
        let regions = [region().await?, region().await?];
        Ok(Self {
            primary,
            tap,
            regions,
            settings: "[wal]\nflush_interval = \"200ms\"\n[pulse]\ninterval = \"1s\"\n".to_owned(),
            user: "postgres".to_owned(),
            segment_size: u64::from(segment_mb) << 20,
        })
    }

    /// The configuration file of the agent.
    #[must_use]
    pub fn config(&self) -> String {
        let regions: Vec<_> = REGIONS
            .iter()
            .zip(&self.regions)
            .map(|(name, server)| (*name, server.as_ref()))
            .collect();
        let connection = self.tap.connection_string_as(&self.user);
        format!(
            "{}[admin]\nlisten = \"off\"\n{}",
            config(Some(&connection), &regions),
            self.settings
        )
    }

    /// The agent with this site's configuration, to be given a command.
    ///
    /// # Errors
    /// When it was not built.
    pub fn agent(&self) -> Result<Program> {
        Program::agent()?.config(&self.config())
    }

    /// An agent beside another server of the same cluster, for the same regions; it streams from a standby too.
    ///
    /// # Errors
    /// When it was not built.
    pub fn agent_at(&self, connection: &str) -> Result<Program> {
        let regions: Vec<_> = REGIONS
            .iter()
            .zip(&self.regions)
            .map(|(name, server)| (*name, server.as_ref()))
            .collect();
        let toml = format!(
            "{}[admin]\nlisten = \"off\"\n{}",
            config(Some(connection), &regions),
            self.settings
        );
        Ok(Program::agent()?
            .config(&toml)?
            .args(["--set", "cluster.standby=stream"]))
    }

    /// Waits until both regions hold the WAL of `timeline` up to `position`, from the names of their objects.
    ///
    /// # Errors
    /// When they do not in time.
    pub async fn archived(&self, timeline: u32, position: u64) -> Result<()> {
        let held = || async {
            let ends = self
                .snapshots()
                .map(|snapshot| archive::wal_end(&snapshot, BUCKET, timeline, self.segment_size));
            ends.iter().all(|end| *end >= position).then_some(())
        };
        let what = format!(
            "timeline {timeline} up to {} in both regions",
            lsn::show(position)
        );
        eventually(&what, PATIENCE, held).await
    }

    /// Starts the agent and waits until it has reported a flush position on a new connection.
    ///
    /// # Errors
    /// When it ends or does not get that far.
    pub async fn start_agent(&self) -> Result<Running> {
        let before = self.tap.connections();
        let mut agent = self.agent()?.arg("run").start()?;
        let started = std::time::Instant::now();
        let heard = || {
            let feedback = self.tap.feedback();
            feedback
                .iter()
                .any(|feedback| feedback.connection > before && feedback.flush > 0)
        };
        while !heard() {
            if !agent.is_running() || started.elapsed() > PATIENCE {
                anyhow::bail!("the agent does not stream; it said:\n{}", agent.stderr());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(agent)
    }

    /// Takes a base backup with the agent's command and returns its id.
    ///
    /// # Errors
    /// When the command fails.
    pub async fn backup(&self) -> Result<String> {
        let said = self.agent()?.arg("backup").output().await?.expect_code(0)?;
        let id = said
            .stdout
            .split_whitespace()
            .find(|word| word.matches('-').count() == 2 && word.ends_with('Z'));
        id.map(str::to_owned)
            .with_context(|| format!("no backup id in: {}", said.said()))
    }

    /// The primary's WAL position now.
    ///
    /// # Errors
    /// When the primary does not answer.
    pub async fn position(&self) -> Result<u64> {
        lsn::parse(&self.primary.value("SELECT pg_current_wal_insert_lsn()").await?)
    }

    /// Waits until the agent has reported that everything up to `position` is safe.
    ///
    /// # Errors
    /// When it does not in time.
    pub async fn durable(&self, position: u64) -> Result<()> {
        let reached = || async { (self.tap.highest_flush() >= position).then_some(()) };
        let waited = eventually("the flush position to get there", PATIENCE, reached).await;
        waited.with_context(|| {
            format!(
                "{} of {} reported",
                lsn::show(self.tap.highest_flush()),
                lsn::show(position)
            )
        })
    }

    /// Waits until everything that was written so far is reported to be safe, and returns that position.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn all_durable(&self) -> Result<u64> {
        // The reported position moves only when WAL is flushed; this makes the primary flush all of it.
        self.primary.sql("SELECT txid_current()").await?;
        let end = lsn::parse(&self.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
        self.durable(end).await?;
        Ok(end)
    }

    /// A frozen copy of both regions.
    #[must_use]
    pub fn snapshots(&self) -> [S3Snapshot; 2] {
        [self.regions[0].snapshot(), self.regions[1].snapshot()]
    }

    /// Checks that nothing that was in `before` has changed since, except what is no part of the archive: pulse and probes.
    ///
    /// # Errors
    /// What was replaced or is gone.
    pub fn nothing_was_replaced(&self, before: &[S3Snapshot; 2]) -> Result<()> {
        for (before, after) in before.iter().zip(self.snapshots()) {
            for key in before.keys(BUCKET) {
                let (old, new) = (before.get(BUCKET, &key), after.get(BUCKET, &key));
                let same = old.map(|old| old.bytes.clone()) == new.map(|new| new.bytes.clone());
                let sign = key.ends_with("pulse.json") || key.contains("/probe/");
                ensure!(same || sign, "{key} was replaced");
            }
        }
        Ok(())
    }

    /// The end of the contiguous WAL of timeline 1 in each region, from the names of its objects.
    #[must_use]
    pub fn stored_ends(&self) -> [u64; 2] {
        self.snapshots()
            .map(|snapshot| archive::wal_end(&snapshot, BUCKET, 1, self.segment_size))
    }

    /// Checks that neither region has a gap on record, or a hole in the WAL of a timeline.
    ///
    /// # Errors
    /// What is missing, and where.
    pub fn has_no_gap(&self) -> Result<()> {
        for (name, snapshot) in REGIONS.iter().zip(self.snapshots()) {
            let records = archive::keys_with(&snapshot, BUCKET, "/gap/");
            ensure!(records.is_empty(), "gaps on record in {name}: {records:?}");
            for (timeline, wal) in archive::wal(&snapshot, BUCKET, self.segment_size) {
                let runs = wal.runs();
                ensure!(
                    runs.len() == 1,
                    "{name} has holes in timeline {timeline}: {runs:x?}"
                );
            }
        }
        Ok(())
    }

    /// The size of a WAL segment in bytes.
    #[must_use]
    pub fn segment_size(&self) -> u64 {
        self.segment_size
    }
}

async fn region() -> Result<Arc<S3Server>> {
    let server = S3Server::start().await?;
    server.create_bucket(BUCKET);
    Ok(Arc::new(server))
}

/// A configuration file for both programs.
#[must_use]
pub fn config(connection: Option<&str>, regions: &[(&str, &S3Server)]) -> String {
    config_named("orders", connection, regions)
}

/// The same for a cluster of another name.
#[must_use]
pub fn config_named(cluster: &str, connection: Option<&str>, regions: &[(&str, &S3Server)]) -> String {
    let mut text = format!("[cluster]\nname = \"{cluster}\"\n");
    if let Some(connection) = connection {
        text += &format!("connection = \"{connection}\"\n");
    }
    for (name, server) in regions {
        text += &region_config(
            name,
            BUCKET,
            &server.endpoint(),
            server.access_key(),
            server.secret_key(),
        );
    }
    text
}

/// One `[[region]]`.
#[must_use]
pub fn region_config(name: &str, bucket: &str, endpoint: &str, access_key: &str, secret_key: &str) -> String {
    format!(
        "[[region]]\nname = \"{name}\"\nurl = \"s3://{bucket}/prod\"\nendpoint = \"{endpoint}\"\n\
         region = \"us-east-1\"\naccess_key_id = \"{access_key}\"\nsecret_access_key = \"{secret_key}\"\n"
    )
}

/// Where a restore goes, with the configuration it is done by.
#[derive(Debug)]
pub struct RestoreSite {
    version: PgVersion,
    dir: TestDir,
    config: PathBuf,
}

impl RestoreSite {
    /// An empty place for clusters of `version`, reading the given regions.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(version: PgVersion, regions: &[(&str, &S3Server)]) -> Result<Self> {
        Self::with_config(version, &config(None, regions))
    }

    /// The same with a configuration file of the test's own.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn with_config(version: PgVersion, toml: &str) -> Result<Self> {
        let dir = TestDir::new()?;
        let config = dir.write("restore.toml", toml)?;
        Ok(Self { version, dir, config })
    }

    /// `highwater-restore` with the configuration, to be given a command.
    ///
    /// # Errors
    /// When it was not built.
    pub fn program(&self) -> Result<Program> {
        Ok(Program::restore()?.arg("--config").arg(&self.config))
    }

    /// The configuration file.
    #[must_use]
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// The data directory that `name` is restored into.
    #[must_use]
    pub fn data(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The directory that everything is in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Runs `run --into <name>` with `target`, without starting the server.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub async fn run(&self, name: &str, target: &[&str]) -> Result<Finished> {
        self.program()?
            .args(["run", "--into"])
            .arg(self.data(name))
            .args(target)
            .output()
            .await
    }

    /// Restores into `name`, starts the server and waits until it has left recovery.
    ///
    /// # Errors
    /// When the restore fails or the server does not get that far.
    pub async fn recovered(&self, name: &str, target: &[&str]) -> Result<PgCluster> {
        self.run(name, target).await?.expect_code(0)?;
        let mut cluster = PgCluster::adopt(self.version, &self.data(name))?;
        cluster.start_again().await?;
        self.until_writable(&cluster).await?;
        Ok(cluster)
    }

    /// Waits until a restored server has left recovery, and looks through what it holds.
    ///
    /// # Errors
    /// When it does not; the message holds its log. When something is damaged.
    pub async fn until_writable(&self, cluster: &PgCluster) -> Result<()> {
        let writable = || async {
            let recovering = cluster.value("SELECT pg_is_in_recovery()").await.ok()?;
            (recovering == "f").then_some(())
        };
        let waited = eventually("the end of recovery", PATIENCE, writable).await;
        waited.with_context(|| cluster.log())?;
        cluster.is_sound().await
    }
}
