//! A cluster that runs, is stopped, killed and started again.
//!
//! Owns: the server process and its socket directory. It works in a [`TestDir`], which kills
//! whatever is left when it goes.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sys::signal::Signal;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::builder::PgBuilder;
use super::version::PgVersion;
use crate::dir::TestDir;
use crate::process::{self, Process};

/// Longer than any recovery in the tests takes, even on a busy machine with two cores.
const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// How to shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Disconnect everybody, write the shutdown checkpoint.
    Fast,
    /// Stop without a checkpoint: the next start recovers.
    Immediate,
}

/// Where a cluster lives.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) version: PgVersion,
    pub(super) bin: PathBuf,
    pub(super) dir: Arc<TestDir>,
    pub(super) data: PathBuf,
    pub(super) sockets: PathBuf,
    pub(super) log: PathBuf,
    pub(super) tcp: bool,
}

/// One row of a simple query, as text.
pub type Row = Vec<Option<String>>;

/// A PostgreSQL cluster. Dropping it stops the server and removes its directory.
#[derive(Debug)]
pub struct PgCluster {
    place: Place,
    port: u16,
    server: Option<Process>,
}

impl PgCluster {
    /// A cluster to be made by `initdb`.
    #[must_use]
    pub fn builder(version: PgVersion) -> PgBuilder {
        PgBuilder::new(version)
    }

    pub(super) fn at(place: Place) -> Self {
        Self {
            place,
            port: 5432,
            server: None,
        }
    }

    /// A cluster over a data directory that something else made; it is not started. The data
    /// directory stays where it is and is not removed.
    ///
    /// # Errors
    /// When the major is not installed.
    pub fn adopt(version: PgVersion, data: &Path) -> anyhow::Result<Self> {
        let dir = Arc::new(TestDir::new()?);
        Ok(Self::at(Place::around(version, false, dir, data.to_owned())?))
    }

    /// A server that something else has started. It is killed when this is dropped; its data directory stays.
    ///
    /// # Errors
    /// When the major is not installed.
    pub fn attach(version: PgVersion, data: &Path, sockets: &Path, port: u16) -> anyhow::Result<Self> {
        let mut cluster = Self::adopt(version, data)?;
        cluster.place.sockets = sockets.to_owned();
        cluster.port = port;
        Ok(cluster)
    }

    /// Starts the server and waits until it answers queries.
    ///
    /// # Errors
    /// When it ends instead; the message holds the end of its log.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        for attempt in 0.. {
            self.spawn()?;
            match self.until_ready().await {
                Err(_) if self.place.tcp && attempt < 3 && self.log().contains("Address already in use") => {}
                other => return other,
            }
        }
        Ok(())
    }

    /// Starts the server without waiting, for one that is expected to fail or to recover slowly.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.is_running(), "{} runs already", self.place.version);
        let mut command = process::command(&self.place.bin.join("postgres"), "QUIT");
        command
            .arg("-D")
            .arg(&self.place.data)
            .current_dir(self.place.dir.path());
        command.arg("-c").arg(format!(
            "unix_socket_directories={}",
            self.place.sockets.display()
        ));
        command.args(["-c", "logging_collector=off"]);
        if self.place.tcp {
            self.port = free_port()?;
            command.args(["-c", "listen_addresses=127.0.0.1"]);
        }
        command.arg("-c").arg(format!("port={}", self.port));
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.place.log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let program = self.place.bin.join("postgres");
        self.server =
            Some(Process::start(command).with_context(|| format!("cannot start {}", program.display()))?);
        Ok(())
    }

    /// Waits until the server answers queries.
    ///
    /// # Errors
    /// When it ends instead, or takes longer than two minutes.
    pub async fn until_ready(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        loop {
            if self.client().await.is_ok() {
                return Ok(());
            }
            if !self.is_running() || started.elapsed() > START_LIMIT {
                anyhow::bail!(
                    "{} does not start; its log ends:\n{}",
                    self.place.version,
                    self.log_tail()
                );
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    }

    /// Waits until the server has ended by itself.
    ///
    /// # Errors
    /// When it was not started or still runs after `limit`.
    pub async fn until_ended(&mut self, limit: Duration) -> anyhow::Result<std::process::ExitStatus> {
        self.server
            .as_mut()
            .context("the server was not started")?
            .wait(limit)
            .await
    }

    /// Shuts the server down and says how long that took.
    ///
    /// # Errors
    /// When it was not running or does not end within two minutes.
    pub async fn stop(&mut self, how: Stop) -> anyhow::Result<Duration> {
        let started = Instant::now();
        self.begin_stop(how);
        self.until_ended(STOP_LIMIT).await?;
        let took = started.elapsed();
        process::kill_below(&self.place.data);
        Ok(took)
    }

    /// Asks the server to shut down and returns at once.
    pub fn begin_stop(&mut self, how: Stop) {
        let signal = match how {
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
        };
        if let Some(server) = self.server.as_mut() {
            server.signal(signal);
        }
    }

    /// Kills the server and all of its children at once, as a machine that loses power would.
    pub fn kill9(&mut self) {
        if let Some(server) = self.server.as_mut() {
            server.kill9();
        }
        process::kill_below(&self.place.data);
    }

    /// Removes the data directory, as a lost disk would. The server must not run any more.
    ///
    /// # Errors
    /// When the directory cannot be removed.
    pub fn lose_disk(&mut self) -> std::io::Result<()> {
        std::fs::remove_dir_all(&self.place.data)
    }

    /// Makes a standby a primary and waits until it takes writes.
    ///
    /// # Errors
    /// When the promotion fails.
    pub async fn promote(&self) -> anyhow::Result<()> {
        let promoted = self.value("SELECT pg_promote(true, 60)").await?;
        anyhow::ensure!(promoted == "t", "pg_promote() answered {promoted}");
        Ok(())
    }

    /// Whether the server process runs.
    pub fn is_running(&mut self) -> bool {
        self.server
            .as_mut()
            .is_some_and(|server| server.exited().is_none())
    }

    /// A connection string for the superuser, through the Unix socket.
    #[must_use]
    pub fn connection_string(&self) -> String {
        self.connection_string_as("postgres")
    }

    /// A connection string for another user, through the Unix socket.
    #[must_use]
    pub fn connection_string_as(&self, user: &str) -> String {
        format!(
            "host={} port={} user={user} dbname=postgres",
            self.place.sockets.display(),
            self.port
        )
    }

    /// The Unix socket itself.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.place.sockets.join(format!(".s.PGSQL.{}", self.port))
    }

    /// The directory of the Unix socket.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        &self.place.sockets
    }

    /// The port: of TCP when that was asked for, and in the name of the Unix socket.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A new connection of the superuser.
    ///
    /// # Errors
    /// When the server does not take it.
    pub async fn client(&self) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(&self.place.sockets)
            .port(self.port)
            .user("postgres")
            .dbname("postgres");
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Runs SQL, several statements if need be, and returns the rows of all of them as text.
    ///
    /// # Errors
    /// The error of the server.
    pub async fn sql(&self, sql: &str) -> anyhow::Result<Vec<Row>> {
        let client = self.client().await?;
        let answers = client.simple_query(sql).await.with_context(|| sql.to_owned())?;
        let row = |message| match message {
            SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|column| row.get(column).map(str::to_owned))
                    .collect(),
            ),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(row).collect())
    }

    /// Runs SQL that gives one value, and returns it as text; NULL is an empty text.
    ///
    /// # Errors
    /// The error of the server, or that there was no row.
    pub async fn value(&self, sql: &str) -> anyhow::Result<String> {
        let rows = self.sql(sql).await?;
        let cell = rows
            .first()
            .and_then(|row| row.first())
            .with_context(|| format!("no row: {sql}"))?;
        Ok(cell.clone().unwrap_or_default())
    }

    /// The major version.
    #[must_use]
    pub fn version(&self) -> PgVersion {
        self.place.version
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.place.data
    }

    /// The directory of the server's programs.
    #[must_use]
    pub fn bin(&self) -> &Path {
        &self.place.bin
    }

    /// The directory that the cluster lives in.
    #[must_use]
    pub fn dir(&self) -> &TestDir {
        &self.place.dir
    }

    /// The process id of the server, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.server.as_ref().map(Process::pid)
    }

    /// Everything the server has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read(&self.place.log)
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }
}

impl Drop for PgCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let tail = self.log_tail();
            let mut err = std::io::stderr();
            drop(std::io::Write::write_fmt(
                &mut err,
                format_args!("--- log of {}\n{tail}\n---\n", self.place.version),
            ));
        }
        self.begin_stop(Stop::Immediate);
        if let Some(server) = self.server.as_mut() {
            server.wait_blocking(Duration::from_secs(3));
        }
        self.kill9();
    }
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
