//! Child processes that cannot outlive their test.
//!
//! Owns: how a child is started (its user, its process group, its parent-death signal), waited for
//! and killed. Every child is started from one thread that lives as long as the test program,
//! because Linux sends the parent-death signal when the starting *thread* ends.
//! Does not own: what a child does, or its files (`dir`).

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::{Pid, User, getegid, geteuid};

/// The unprivileged user that programs run as when the tests run as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunAs {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl RunAs {
    /// `postgres` or else `nobody` when the tests run as root, otherwise nothing.
    ///
    /// # Panics
    /// When the tests run as root on a machine with neither user.
    #[must_use]
    pub fn current() -> Option<Self> {
        if !geteuid().is_root() {
            return None;
        }
        let user = ["postgres", "nobody"]
            .iter()
            .find_map(|name| User::from_name(name).ok().flatten());
        let user = user.expect("PostgreSQL refuses to run as root, and there is neither postgres nor nobody");
        Some(Self {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        })
    }

    /// Whoever runs the tests.
    #[must_use]
    pub fn ourselves() -> Self {
        Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
        }
    }

    /// Gives `path` to the user that programs run as; nothing to do when that is ourselves.
    ///
    /// # Errors
    /// The error of chown.
    pub fn own(path: &Path) -> io::Result<()> {
        match Self::current() {
            Some(user) => std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        }
    }

    /// Gives `path` and all below it to the user that programs run as.
    ///
    /// # Errors
    /// The error of chown or of reading a directory.
    pub fn own_tree(path: &Path) -> io::Result<()> {
        let Some(user) = Self::current() else {
            return Ok(());
        };
        std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))?;
        if path.symlink_metadata()?.is_dir() {
            for entry in std::fs::read_dir(path)? {
                Self::own_tree(&entry?.path())?;
            }
        }
        Ok(())
    }
}

/// A command that runs unprivileged, in its own process group, and gets `on_parent_death` when
/// the test program goes away.
#[must_use]
pub fn command(program: &Path, on_parent_death: &str) -> Command {
    let mut command = Command::new("setpriv");
    if let Some(user) = RunAs::current() {
        command
            .arg(format!("--reuid={}", user.uid))
            .arg(format!("--regid={}", user.gid))
            .arg("--clear-groups");
    }
    command.args(["--pdeathsig", on_parent_death, "--"]).arg(program);
    command.process_group(0);
    command
}

type Spawned = io::Result<Child>;
type Order = (Command, SyncSender<Spawned>);

/// Starts `command` from the thread that lives as long as the test program.
///
/// # Errors
/// The error of the start, for instance a missing program.
pub fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<SyncSender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = sync_channel::<Order>(16);
        let work = move || {
            for (mut command, reply) in inbox {
                drop(reply.send(command.spawn()));
            }
        };
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(work)
            .expect("a thread");
        orders
    });
    let (reply, answer) = sync_channel(1);
    spawner.send((command, reply)).map_err(io::Error::other)?;
    answer.recv().map_err(io::Error::other)?
}

/// Copies a directory with owners, modes and times.
///
/// # Errors
/// Those of `cp`.
pub fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    let arguments = ["-a".as_ref(), from.as_os_str(), to.as_os_str()];
    run(Path::new("cp"), &arguments, Path::new("/")).map(drop)
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// When it cannot be started or fails; the message holds its standard error.
pub fn run(program: &Path, arguments: &[impl AsRef<OsStr>], cwd: &Path) -> anyhow::Result<String> {
    let mut command = command(program, "KILL");
    command
        .args(arguments)
        .current_dir(cwd)
        .stdin(std::process::Stdio::null());
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let output = spawn(command)?.wait_with_output()?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!(
            "{} failed ({}): {}",
            program.display(),
            output.status,
            stderr.trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A running child, killed with its process group when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pid: Pid,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`, as [`command`] made it.
    ///
    /// # Errors
    /// The error of the start.
    pub fn start(command: Command) -> io::Result<Self> {
        let child = spawn(command)?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        Ok(Self {
            child,
            pid,
            status: None,
        })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// The pipes that the command asked for.
    pub fn pipes(&mut self) -> &mut Child {
        &mut self.child
    }

    /// How it ended, or `None` while it runs.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    /// Sends a signal; to a process that is gone it does nothing.
    pub fn signal(&mut self, signal: Signal) {
        if self.exited().is_none() {
            let _ = signal::kill(self.pid, signal);
        }
    }

    /// Waits for the end, at most for `limit`.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub async fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.exited() {
                return Ok(status);
            }
            if started.elapsed() > limit {
                anyhow::bail!("process {} still runs after {limit:?}", self.pid);
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    /// Kills the process and its group, and reaps it.
    pub fn kill9(&mut self) {
        if self.exited().is_none() {
            let _ = signal::killpg(self.pid, Signal::SIGKILL);
            let _ = signal::kill(self.pid, Signal::SIGKILL);
            self.status = self.child.wait().ok();
        }
    }

    /// Waits up to `limit` without a runtime, for destructors.
    pub(crate) fn wait_blocking(&mut self, limit: Duration) -> bool {
        let started = Instant::now();
        while self.exited().is_none() {
            if started.elapsed() > limit {
                return false;
            }
            pause(Duration::from_millis(5));
        }
        true
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// Every process whose working directory is `dir` or below it: PostgreSQL and all of its children
/// work in their data directory, whoever started them.
#[must_use]
pub fn working_below(dir: &Path) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pid_of = |name: &OsStr| name.to_str().and_then(|name| name.parse::<i32>().ok());
    let works_below =
        |path: PathBuf| std::fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
    entries
        .flatten()
        .filter_map(|entry| Some((pid_of(&entry.file_name())?, entry.path())))
        .filter(|(pid, path)| *pid != Pid::this().as_raw() && works_below(path.clone()))
        .map(|(pid, _)| Pid::from_raw(pid))
        .collect()
}

/// The command line of a process, for messages; empty when it is gone.
#[must_use]
pub fn command_line(pid: Pid) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line)
        .replace('\0', " ")
        .trim()
        .to_owned()
}

/// Kills every process that works below `dir` and waits until none is left, at most five seconds.
pub fn kill_below(dir: &Path) {
    for _ in 0..500 {
        let left = working_below(dir);
        if left.is_empty() {
            return;
        }
        for pid in left {
            let _ = signal::kill(pid, Signal::SIGKILL);
        }
        pause(Duration::from_millis(10));
    }
}

/// A runtime of its own for a part of the harness. Dropped anywhere, also in the middle of an `await` that is given
/// up, it ends in the background: a runtime itself must not be dropped where tasks run.
#[derive(Debug)]
pub(crate) struct Threads(Option<tokio::runtime::Runtime>);

impl Threads {
    pub(crate) fn start(count: usize, name: &str) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(count)
            .thread_name(name)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    pub(crate) fn spawn<F>(&self, work: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        match &self.0 {
            Some(runtime) => runtime.spawn(work),
            None => unreachable!("the runtime is taken in drop alone"),
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "destructors cannot await")]
pub(crate) fn pause(duration: Duration) {
    std::thread::sleep(duration);
}
