//! The built programs, run as their users run them: by command line, environment and configuration file.
//!
//! Each runs in a directory of its own, unprivileged, without the settings of whoever runs the
//! tests (`PG*`, `AWS_*`, `HIGHWATER_*`, the home directory), and dies with the test.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;

use crate::dir::{TestDir, reachable};
use crate::process::{self, Process, RunAs};
use crate::s3::S3Server;

/// A program that takes longer to end is taken for hanging.
const OUTPUT_LIMIT: Duration = Duration::from_secs(180);

/// One invocation of a program, being prepared.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    dir: Arc<TestDir>,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

/// How a program ended, and what it said.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The exit code; 128 plus the signal when a signal ended it, as a shell says it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A program that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    process: Process,
    dir: Arc<TestDir>,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Program {
    /// `highwater-agent` in a new directory.
    ///
    /// # Errors
    /// When it was not built.
    pub fn agent() -> anyhow::Result<Self> {
        Self::built("highwater-agent")
    }

    /// `highwater-restore` in a new directory.
    ///
    /// # Errors
    /// When it was not built.
    pub fn restore() -> anyhow::Result<Self> {
        Self::built("highwater-restore")
    }

    /// A program of this workspace by name.
    ///
    /// # Errors
    /// When it was not built.
    pub fn built(name: &str) -> anyhow::Result<Self> {
        let dir = Arc::new(TestDir::new()?);
        let mut path = bin_dir()?.join(name);
        anyhow::ensure!(
            path.exists(),
            "{} is missing: run cargo build -p highwater-agent -p highwater-restore, or scripts/test.sh",
            path.display()
        );
        if !reachable(&path) {
            let copy = dir.join(name);
            std::fs::copy(&path, &copy)?;
            RunAs::own(&copy)?;
            path = copy;
        }
        Ok(Self::new(path, dir)
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("RUST_BACKTRACE", "1"))
    }

    /// A program of this machine.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn other(name: &str) -> anyhow::Result<Self> {
        Ok(Self::new(PathBuf::from(name), Arc::new(TestDir::new()?)))
    }

    fn new(path: PathBuf, dir: Arc<TestDir>) -> Self {
        Self {
            path,
            dir,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Where the program is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory it runs in, which is also its home.
    #[must_use]
    pub fn dir(&self) -> &TestDir {
        &self.dir
    }

    /// Writes `toml` as its configuration file and passes it with `--config`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn config(self, toml: &str) -> anyhow::Result<Self> {
        let path = self.dir.write("highwater.toml", toml)?;
        Ok(self.arg("--config").arg(path))
    }

    /// The key pair of an endpoint, in the standard variables.
    #[must_use]
    pub fn keys_of(self, server: &S3Server) -> Self {
        self.keys(server.access_key(), server.secret_key())
    }

    /// A key pair, in the standard variables.
    #[must_use]
    pub fn keys(self, access_key: &str, secret_key: &str) -> Self {
        self.env("AWS_ACCESS_KEY_ID", access_key)
            .env("AWS_SECRET_ACCESS_KEY", secret_key)
            .env("AWS_REGION", "us-east-1")
    }

    /// One argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Several arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.arguments
            .extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// One variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs it through another program, for instance `env` with variables that must reach nothing before it.
    #[must_use]
    pub fn under(mut self, program: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let mut through: Vec<OsString> = arguments
            .into_iter()
            .map(|argument| argument.as_ref().to_owned())
            .collect();
        through.push(std::mem::replace(&mut self.path, PathBuf::from(program)).into());
        through.append(&mut self.arguments);
        self.arguments = through;
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self) -> anyhow::Result<Running> {
        let run = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(self.dir.path())?
            .keep();
        let (stdout, stderr) = (run.join("stdout"), run.join("stderr"));
        let mut command = process::command(&self.path, "KILL");
        command
            .args(&self.arguments)
            .current_dir(self.dir.path())
            .env_clear();
        for (name, value) in std::env::vars_os().filter(|(name, _)| inherited(name)) {
            command.env(name, value);
        }
        command.env("HOME", self.dir.path());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null());
        command
            .stdout(std::fs::File::create(&stdout)?)
            .stderr(std::fs::File::create(&stderr)?);
        let name = self
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let process =
            Process::start(command).with_context(|| format!("cannot start {}", self.path.display()))?;
        Ok(Running {
            name,
            process,
            dir: Arc::clone(&self.dir),
            stdout,
            stderr,
        })
    }

    /// Runs it to its end, at most three minutes.
    ///
    /// # Errors
    /// When it cannot be started or does not end.
    pub async fn output(&self) -> anyhow::Result<Finished> {
        self.start()?.finish(OUTPUT_LIMIT).await
    }
}

/// What of the tests' own environment programs see.
fn inherited(name: &OsStr) -> bool {
    const KEPT: [&str; 6] = ["PATH", "TMPDIR", "LANG", "TZ", "RUST_LOG", "LLVM_PROFILE_FILE"];
    name.to_str().is_some_and(|name| KEPT.contains(&name))
}

/// Where Cargo put the programs of the build that this test belongs to.
fn bin_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("HIGHWATER_BIN_DIR") {
        return Ok(PathBuf::from(dir));
    }
    let test = std::env::current_exe()?;
    let deps = test.parent().context("the test program has no directory")?;
    let outer = if deps.ends_with("deps") {
        deps.parent()
    } else {
        Some(deps)
    };
    Ok(outer.context("the test program has no directory")?.to_owned())
}

impl Running {
    /// The process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// The directory it runs in.
    #[must_use]
    pub fn dir(&self) -> &TestDir {
        &self.dir
    }

    /// Standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// Standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// The last lines of standard error so far.
    #[must_use]
    pub fn last_words(&self) -> String {
        let said = self.stderr();
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.process.exited().is_none()
    }

    /// Waits until standard error or output holds `text`.
    ///
    /// # Errors
    /// When that does not happen within `limit`, or the program ends first; with what it said.
    pub async fn says(&mut self, text: &str, limit: Duration) -> anyhow::Result<()> {
        let started = std::time::Instant::now();
        loop {
            let running = self.is_running();
            if self.stderr().contains(text) || self.stdout().contains(text) {
                return Ok(());
            }
            if !running || started.elapsed() > limit {
                anyhow::bail!(
                    "{} did not say {text:?}; it said:\n{}{}",
                    self.name,
                    self.stdout(),
                    self.stderr()
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks it to leave (SIGTERM).
    pub fn terminate(&mut self) {
        self.process.signal(Signal::SIGTERM);
    }

    /// Sends any signal, for instance SIGSTOP and SIGCONT.
    pub fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Kills it with SIGKILL.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs after `limit`; with what it said.
    pub async fn wait_exit(&mut self, limit: Duration) -> anyhow::Result<i32> {
        let ended = self.process.wait(limit).await;
        let status =
            ended.with_context(|| format!("{} said:\n{}{}", self.name, self.stdout(), self.stderr()))?;
        Ok(code(status))
    }

    /// Waits for its end and takes what it said.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub async fn finish(mut self, limit: Duration) -> anyhow::Result<Finished> {
        let code = self.wait_exit(limit).await?;
        Ok(Finished {
            code,
            stdout: self.stdout(),
            stderr: self.stderr(),
        })
    }

    /// The largest amount of memory it ever had resident, in bytes.
    ///
    /// # Errors
    /// When it does not run any more.
    pub fn peak_memory(&self) -> anyhow::Result<u64> {
        self.status_bytes("VmHWM:")
    }

    /// The amount of memory it has resident now, in bytes.
    ///
    /// # Errors
    /// When it does not run any more.
    pub fn memory(&self) -> anyhow::Result<u64> {
        self.status_bytes("VmRSS:")
    }

    fn status_bytes(&self, field: &str) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(field))
            .with_context(|| format!("no {field}"))?;
        let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kilobytes * 1024)
    }

    /// Processor time it has used so far.
    ///
    /// # Errors
    /// When it does not run any more.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        const PER_SECOND: u64 = 100; // USER_HZ, the same on every Linux architecture we run on
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // After the name in parentheses, which may hold anything: state is field 3, utime 14, stime 15.
        let (_, fields) = stat.rsplit_once(") ").context("no process name")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let ticks = |at: usize| fields.get(at - 3).and_then(|field| field.parse::<u64>().ok());
        let used = ticks(14).zip(ticks(15)).context("no processor times")?;
        Ok(Duration::from_millis((used.0 + used.1) * 1000 / PER_SECOND))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut err = std::io::stderr();
            drop(std::io::Write::write_fmt(
                &mut err,
                format_args!("--- {} said\n{}\n---\n", self.name, self.last_words()),
            ));
        }
    }
}

impl Finished {
    /// Fails unless it ended with `code`; the failure shows what it said.
    ///
    /// # Errors
    /// When the code is another.
    pub fn expect_code(self, code: i32) -> anyhow::Result<Self> {
        anyhow::ensure!(
            self.code == code,
            "exit code {} instead of {code}; it said:\n{}",
            self.code,
            self.said()
        );
        Ok(self)
    }

    /// Standard output and standard error, one after the other.
    #[must_use]
    pub fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn read(path: &Path) -> String {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}
