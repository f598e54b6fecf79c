//! A file system that is really full when it is full, without the right to mount one.
//!
//! Owns: a `tmpfs` of a given size in a user and mount namespace, and the process that keeps it there. Others reach it
//! through that process (`/proc/<pid>/root`), which the kernel allows to the same user; so servers and programs need not
//! run inside. Where namespaces of users are forbidden and the tests run as root, a mount namespace does.
//! Does not own: what is put there, or skipping what cannot be tested on such a machine.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::dir::TestDir;
use crate::process::{self, Process, RunAs};
use crate::program::Program;

/// As root of a namespace of its own: mounts, says so, and stays until its standard input ends.
const ALONE: &str = "mount -t tmpfs -o size=$1,mode=0755 tmpfs \"$2\" && echo ready && exec cat";
/// The same as real root, for the user that the tests' programs run as.
const AS_ROOT: &str = "mount -t tmpfs -o size=$1,mode=0755,uid=$3,gid=$4 tmpfs \"$2\" && echo ready && \
                       exec setpriv --reuid=$3 --regid=$4 --clear-groups cat";

/// See the module. It is gone with everything on it when this is dropped.
#[derive(Debug)]
pub struct SmallDisk {
    holder: Process,
    dir: TestDir,
    /// Whether users' namespaces are allowed, so that programs may run inside.
    joinable: bool,
}

impl SmallDisk {
    /// A file system of so many MiB; none where this machine allows nobody to mount one.
    ///
    /// # Errors
    /// When its directory cannot be made, or the programs for it are missing.
    pub fn new(mib: u32) -> Result<Option<Self>> {
        let dir = TestDir::new()?;
        let place = dir.create_dir("disk")?;
        let size = format!("{mib}m");
        let mut alone = process::command(Path::new("unshare"), "KILL");
        alone.args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            ALONE,
            "sh",
            &size,
        ]);
        alone.arg(&place);
        if let Some(holder) = held(alone, &dir)? {
            return Ok(Some(Self {
                holder,
                dir,
                joinable: true,
            }));
        }
        let Some(user) = RunAs::current() else {
            return Ok(None);
        };
        let mut as_root = Command::new("unshare");
        as_root
            .args(["--mount", "sh", "-c", AS_ROOT, "sh", &size])
            .arg(&place);
        as_root
            .args([user.uid.to_string(), user.gid.to_string()])
            .process_group(0);
        let held = held(as_root, &dir)?;
        Ok(held.map(|holder| Self {
            holder,
            dir,
            joinable: false,
        }))
    }

    /// Where it is, for every program of the tests' user.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let place = self.dir.join("disk");
        let below_root = place.strip_prefix("/").unwrap_or(&place);
        Path::new("/proc")
            .join(self.holder.pid().to_string())
            .join("root")
            .join(below_root)
    }

    /// The program, to be run inside, where the disk is at [`SmallDisk::inner_path`]: for one that asks for the real path of
    /// what it is given, which is another one outside. None where that is not allowed.
    #[must_use]
    pub fn inside(&self, program: Program) -> Option<Program> {
        let user = RunAs::current().unwrap_or_else(RunAs::ourselves);
        let ids = [user.uid, user.gid].map(|id| id.to_string());
        let [uid, gid] = ids.each_ref();
        let target = self.holder.pid().to_string();
        let join = [
            "--target",
            &target,
            "--user",
            "--mount",
            "--preserve-credentials",
            "--",
        ];
        // Root of that namespace would be refused: a second one gives the user its own number back.
        let again = ["unshare", "--user", "--map-user", uid, "--map-group", gid, "--"];
        self.joinable
            .then(|| program.under("nsenter", join.iter().chain(&again)))
    }

    /// Where it is for a program that runs [`SmallDisk::inside`].
    #[must_use]
    pub fn inner_path(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// Takes `mib` MiB of it away, until [`SmallDisk::make_room`].
    ///
    /// # Errors
    /// When there is less room than that.
    pub fn take(&self, mib: u32) -> Result<()> {
        let ballast = self.path().join("ballast");
        process::run(
            Path::new("fallocate"),
            &["-l".into(), format!("{mib}MiB"), ballast.display().to_string()],
            self.dir.path(),
        )
        .map(drop)
    }

    /// Gives back what was taken.
    ///
    /// # Errors
    /// When nothing was.
    pub fn make_room(&self) -> std::io::Result<()> {
        std::fs::remove_file(self.path().join("ballast"))
    }

    /// The bytes that are free.
    ///
    /// # Errors
    /// That of asking for it.
    pub fn free(&self) -> Result<u64> {
        let stats = nix::sys::statvfs::statvfs(&self.path())?;
        Ok(stats.blocks_available().saturating_mul(stats.fragment_size()))
    }
}

/// Starts the process that holds a file system; none if it could not mount it.
fn held(mut command: Command, dir: &TestDir) -> Result<Option<Process>> {
    command
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut holder = Process::start(command)?;
    let output = holder.pipes().stdout.take().context("no output")?;
    let mut said = String::new();
    BufReader::new(output).read_line(&mut said)?;
    Ok((said.trim() == "ready").then_some(holder))
}
