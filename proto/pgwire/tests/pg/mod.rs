//! A PostgreSQL 15 of our own: in a temporary directory, as an unprivileged user, always stopped.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use highwater_pgwire::{ConnInfo, Connection, Environment, Mode, PgError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};

const DEFAULT_BIN: &str = "/usr/lib/postgresql/15/bin";

/// Programs of PostgreSQL 15.
pub(crate) fn bin() -> PathBuf {
    let dir =
        std::env::var_os("HIGHWATER_PG15_BIN").map_or_else(|| PathBuf::from(DEFAULT_BIN), PathBuf::from);
    assert!(
        dir.join("postgres").exists(),
        "no PostgreSQL 15 in {}: install it or set HIGHWATER_PG15_BIN",
        dir.display()
    );
    dir
}

/// The user PostgreSQL runs as: it refuses to run as root.
fn account() -> Option<User> {
    let named = |name| User::from_name(name).ok().flatten();
    geteuid().is_root().then(|| {
        named("postgres")
            .or_else(|| named("nobody"))
            .expect("user postgres or nobody")
    })
}

/// A command that runs as PostgreSQL's user.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).stdin(Stdio::null()).env("LC_ALL", "C");
    if let Some(user) = account() {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A directory that PostgreSQL's user owns.
pub(crate) fn temp_dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix("hwpg")
        .tempdir_in("/tmp")
        .unwrap();
    own(dir.path());
    dir
}

/// Hands a file or directory to PostgreSQL's user, and closes it to others.
pub(crate) fn own(path: &Path) {
    let mode = if path.is_dir() { 0o700 } else { 0o600 };
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    if let Some(user) = account() {
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    }
}

/// A running server.
pub(crate) struct Server {
    dir: tempfile::TempDir,
    pub(crate) port: u16,
    child: Child,
}

impl Server {
    /// Initialises and starts a cluster with superuser `hw`, these extra settings and `pg_hba` lines.
    pub(crate) async fn start(settings: &str, hba: &str) -> Server {
        let dir = temp_dir();
        let data = dir.path().join("data");
        run(command(bin().join("initdb"), dir.path())
            .args(["-U", "hw", "-A", "trust", "-N", "-D"])
            .arg(&data));
        let local = "local all all trust\nlocal replication all trust\n";
        fs::write(data.join("pg_hba.conf"), format!("{local}{hba}")).unwrap();
        Server::launch(dir, settings).await
    }

    /// Starts on a data directory that is already in `dir/data`.
    pub(crate) async fn launch(dir: tempfile::TempDir, settings: &str) -> Server {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let data = dir.path().join("data");
        let conf = format!(
            "port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nfsync = off\n\
             wal_level = replica\nmax_wal_senders = 5\nmax_replication_slots = 5\nautovacuum = off\n{settings}\n",
            dir.path().display()
        );
        fs::write(data.join("postgresql.auto.conf"), "").unwrap();
        own(&data.join("postgresql.auto.conf"));
        fs::write(data.join("postgresql.conf"), conf).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let child = command(bin().join("postgres"), dir.path())
            .arg("-D")
            .arg(&data)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Server { dir, port, child };
        server.wait_ready().await;
        server
    }

    async fn wait_ready(&self) {
        for _ in 0..600 {
            if self.connect("user=hw dbname=postgres", Mode::Sql).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("server did not start: {}", self.log());
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Over the Unix socket, unless `extra` names another host.
    pub(crate) async fn connect(&self, extra: &str, mode: Mode) -> Result<Connection, PgError> {
        let text = format!("host={} port={} {extra}", self.dir.path().display(), self.port);
        let info = ConnInfo::resolve_in(Some(&text), &Environment::empty()).unwrap();
        Connection::connect(&info, mode).await
    }

    /// Over TCP.
    pub(crate) async fn tcp(&self, extra: &str, mode: Mode) -> Result<Connection, PgError> {
        self.connect(&format!("host=127.0.0.1 dbname=postgres {extra}"), mode)
            .await
    }

    pub(crate) async fn replication(&self) -> Connection {
        self.connect("user=hw", Mode::Replication).await.unwrap()
    }

    /// Runs statements one by one and returns the first value of the last.
    pub(crate) async fn sql(&self, statements: &[&str]) -> String {
        let mut connection = self.connect("user=hw dbname=postgres", Mode::Sql).await.unwrap();
        let mut answer = String::new();
        for statement in statements {
            let result = connection.simple_query(statement).await.unwrap();
            let value = result
                .rows
                .into_iter()
                .next()
                .and_then(|row| row.into_iter().next().flatten());
            answer = value.map_or_else(String::new, |value| String::from_utf8(value.to_vec()).unwrap());
        }
        connection.close().await;
        answer
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    /// Waits until the server is gone.
    pub(crate) async fn gone(&mut self) {
        for _ in 0..600 {
            if self.child.try_wait().unwrap().is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("server did not stop: {}", self.log());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.signal(Signal::SIGQUIT);
            let _ = self.child.wait();
        }
    }
}
