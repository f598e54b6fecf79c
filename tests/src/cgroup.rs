//! A bound on memory that the kernel enforces, as containers and `MemoryMax` have it: whoever exceeds it is killed.
//!
//! Owns: a memory control group below the one that the tests run in, or the nearest above it that allows one, of either version;
//! who is in it from its first instruction on; what the kernel says of it; and that it goes away with its test. Does not own:
//! skipping what cannot be tested on a machine that allows nobody to make one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::clock::eventually;
use crate::dir;
use crate::process;
use crate::program::{Program, Running};

/// Stops before it becomes the program that it is given: what is then in a group has charged nothing to another one.
const STOP_FIRST: &str = "kill -STOP $$; exec \"$@\"";
/// How long a shell may take to stop.
const STOPS_WITHIN: Duration = Duration::from_secs(30);

/// What the two versions call the same things.
#[derive(Debug)]
struct Names {
    limit: &'static str,
    /// Without these, what does not fit goes to swap. They are absent where the kernel does not account for it.
    swap: (&'static str, Swap),
    peak: &'static str,
    /// The file with a line `oom_kill`.
    events: &'static str,
}

#[derive(Debug)]
enum Swap {
    /// The bound is of memory and swap together.
    Together,
    /// The bound is of swap alone.
    Alone,
}

const FIRST: Names = Names {
    limit: "memory.limit_in_bytes",
    swap: ("memory.memsw.limit_in_bytes", Swap::Together),
    peak: "memory.max_usage_in_bytes",
    events: "memory.oom_control",
};
const SECOND: Names = Names {
    limit: "memory.max",
    swap: ("memory.swap.max", Swap::Alone),
    peak: "memory.peak",
    events: "memory.events",
};

/// See the module.
#[derive(Debug)]
pub struct MemoryGroup {
    path: PathBuf,
    names: &'static Names,
}

impl MemoryGroup {
    /// A group whose processes have `limit` bytes together.
    ///
    /// # Errors
    /// Why this machine allows nobody to make one: the test is to be skipped.
    pub fn new(limit: u64) -> Result<Self, String> {
        let mut why = vec!["no memory control group can be made on this machine".to_owned()];
        for (place, names) in places() {
            match Self::below(&place, names, limit) {
                Ok(group) => return Ok(group),
                Err(error) => why.push(format!("{}: {error:#}", place.display())),
            }
        }
        Err(why.join("; "))
    }

    fn below(place: &Path, names: &'static Names, limit: u64) -> Result<Self> {
        let made = tempfile::Builder::new().prefix("highwater-").tempdir_in(place)?;
        let group = Self {
            path: made.keep(),
            names,
        };
        dir::janitor_add(&group.path);
        // Absent where the group above hands down no memory controller.
        ensure!(
            group.path.join(names.limit).exists(),
            "no {} below it",
            names.limit
        );
        group.write(names.limit, &limit.to_string())?;
        let (file, swap) = &names.swap;
        if group.path.join(file).exists() {
            let bound = match swap {
                Swap::Together => limit,
                Swap::Alone => 0,
            };
            group.write(file, &bound.to_string())?;
        }
        Ok(group)
    }

    /// Starts `program` in the group.
    ///
    /// # Errors
    /// When it cannot be started or put there.
    pub async fn start(&self, program: &Program) -> Result<Running> {
        let program = program.clone().under("sh", ["-c", STOP_FIRST, "sh"]);
        let mut running = program.start()?;
        let pid = running.pid();
        let stopped = || async { is_stopped(pid).then_some(()) };
        eventually("the shell before the program to stop", STOPS_WITHIN, stopped).await?;
        self.write("cgroup.procs", &pid.to_string())?;
        running.signal(Signal::SIGCONT);
        Ok(running)
    }

    /// The most memory that the group ever had, what the kernel kept of files for it included.
    ///
    /// # Errors
    /// When the kernel does not say, as some do not.
    pub fn peak(&self) -> Result<u64> {
        let said = self.read(self.names.peak)?;
        Ok(said.trim().parse()?)
    }

    /// How many of its processes the kernel has killed for want of memory.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn killed(&self) -> Result<u64> {
        let said = self.read(self.names.events)?;
        let count = said.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(count.context("no oom_kill")?.trim().parse()?)
    }

    /// Who is in it.
    ///
    /// # Errors
    /// When it is gone.
    pub fn members(&self) -> Result<Vec<i32>> {
        let said = self.read("cgroup.procs")?;
        said.lines().map(|line| Ok(line.parse()?)).collect()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.path.join(file);
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        std::fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Only an empty group can be removed, and one is empty a little after its last process was killed.
        for _ in 0..500 {
            if std::fs::remove_dir(&self.path).is_ok() || !self.path.exists() {
                return;
            }
            for pid in self.members().unwrap_or_default() {
                let _ = signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            process::pause(Duration::from_millis(10));
        }
    }
}

fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// Where a group may be made, the best first: in the group of this process, then in those above it. Of the first version
/// wherever it has the memory controller, as the second has none then.
fn places() -> Vec<(PathBuf, &'static Names)> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (groups, mounts) = (read("/proc/self/cgroup"), read("/proc/self/mountinfo"));
    found(&groups, &mounts)
}

/// Out of `/proc/self/cgroup` and `/proc/self/mountinfo`.
fn found(groups: &str, mounts: &str) -> Vec<(PathBuf, &'static Names)> {
    let is_memory = |line: &&str| {
        let controllers = line.split(':').nth(1).unwrap_or_default();
        controllers.split(',').any(|name| name == "memory")
    };
    let first = groups.lines().find(is_memory).map(|line| (line, &FIRST));
    let second = groups.lines().find(|line| line.starts_with("0::"));
    let Some((line, names)) = first.or(second.map(|line| (line, &SECOND))) else {
        return Vec::new();
    };
    let own = line.splitn(3, ':').nth(2).unwrap_or("/");
    let Some((root, mount)) = mounts.lines().find_map(|line| mounted(line, names)) else {
        return Vec::new();
    };
    // What is mounted may be a part of the hierarchy, and then is all of it that there is here.
    let inside = own.strip_prefix(root.trim_end_matches('/')).unwrap_or_default();
    let own = mount.join(inside.trim_start_matches('/'));
    let upwards = own.ancestors().take_while(|place| place.starts_with(&mount));
    upwards.map(|place| (place.to_owned(), names)).collect()
}

/// What part of the hierarchy a line says to be mounted, and where.
fn mounted(line: &str, names: &Names) -> Option<(String, PathBuf)> {
    let (place, what) = line.split_once(" - ")?;
    let mut place = place.split(' ').skip(3);
    let (root, mount) = (place.next()?, place.next()?);
    let mut what = what.split(' ');
    let (kind, options) = (what.next()?, what.nth(1)?);
    let fits = match names.swap.1 {
        Swap::Together => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
        Swap::Alone => kind == "cgroup2",
    };
    fits.then(|| (root.to_owned(), PathBuf::from(mount)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places_of(groups: &str, mounts: &str) -> Vec<(PathBuf, &'static str)> {
        let named = |(path, names): (PathBuf, &'static Names)| (path, names.limit);
        found(groups, mounts).into_iter().map(named).collect()
    }

    #[test]
    fn the_first_version_is_taken_where_it_has_the_memory_controller() {
        let groups = "5:devices:/\n4:memory:/jobs/7\n0::/\n";
        let mounts = "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let memory = Path::new("/sys/fs/cgroup/memory");
        let upwards = ["jobs/7", "jobs", ""].map(|place| (memory.join(place), "memory.limit_in_bytes"));
        assert_eq!(places_of(groups, mounts), upwards);
    }

    #[test]
    fn the_second_version_is_taken_else_and_a_part_of_it_may_be_mounted() {
        let mounts = "30 23 0:26 /docker/abc /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n";
        let upwards = ["/sys/fs/cgroup/init.scope", "/sys/fs/cgroup"];
        let upwards = upwards.map(|place| (PathBuf::from(place), "memory.max"));
        assert_eq!(places_of("0::/docker/abc/init.scope\n", mounts), upwards);
        assert_eq!(places_of("0::/\n", ""), []);
        assert_eq!(places_of("", mounts), []);
    }
}
