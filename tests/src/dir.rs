//! Directories that go away with their test.
//!
//! A `TestDir` is removed when it is dropped, after every process that still works in it was
//! killed. When the test program is killed instead, a small shell that waits at the end of a pipe
//! does both. `HIGHWATER_TEST_KEEP=1` leaves the directories for a look.

use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::process::{self, RunAs};

/// Longest path at which a Unix socket can still live (`sun_path` holds 108 bytes), less the names we add.
const LONGEST_ROOT: usize = 60;

/// A temporary directory, owned by the user that programs run as.
#[derive(Debug)]
pub struct TestDir {
    path: PathBuf,
}

impl TestDir {
    /// Makes a new one below `$TMPDIR`, or below `/tmp` where the unprivileged user could not get
    /// into `$TMPDIR` or socket paths would become too long.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new() -> io::Result<Self> {
        let root = std::env::temp_dir();
        let usable = reachable(&root) && root.as_os_str().len() <= LONGEST_ROOT;
        let root = if usable { root } else { PathBuf::from("/tmp") };
        let made = tempfile::Builder::new().prefix("highwater-").tempdir_in(root)?;
        let path = made.keep();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        RunAs::own(&path)?;
        if !keep() {
            janitor_add(&path);
        }
        Ok(Self { path })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of `name` in it.
    #[must_use]
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a directory in it for the user that programs run as.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn create_dir(&self, name: impl AsRef<Path>) -> io::Result<PathBuf> {
        let path = self.join(name);
        std::fs::create_dir_all(&path)?;
        RunAs::own(&path)?;
        Ok(path)
    }

    /// Writes a file in it for the user that programs run as, readable by nobody else.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, name: impl AsRef<Path>, content: impl AsRef<[u8]>) -> io::Result<PathBuf> {
        let path = self.join(name);
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        RunAs::own(&path)?;
        Ok(path)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        process::kill_below(&self.path);
        if !keep() {
            drop(std::fs::remove_dir_all(&self.path));
        }
    }
}

fn keep() -> bool {
    std::env::var_os("HIGHWATER_TEST_KEEP").is_some()
}

/// Whether the user that programs run as can reach `path` through all of its ancestors.
#[must_use]
pub fn reachable(path: &Path) -> bool {
    let Some(user) = RunAs::current() else { return true };
    let Ok(path) = path.canonicalize() else {
        return false;
    };
    path.ancestors().skip(usize::from(path.is_file())).all(|dir| {
        dir.metadata().is_ok_and(|meta| {
            let bit = match (meta.uid() == user.uid, meta.gid() == user.gid) {
                (true, _) => 0o100,
                (false, true) => 0o010,
                (false, false) => 0o001,
            };
            meta.mode() & bit != 0
        })
    })
}

/// Told of every directory; acts when the pipe to it closes, which is when the test program ends.
const JANITOR: &str = r#"
set -f
dirs=
while read -r dir; do dirs="$dirs $dir"; done
for dir in $dirs; do
  [ -d "$dir" ] || continue
  for round in 1 2 3; do
    for cwd in $(set +f; echo /proc/[0-9]*/cwd); do
      case "$(readlink "$cwd" 2>/dev/null)" in "$dir"|"$dir"/*) pid=${cwd#/proc/}; kill -9 "${pid%/cwd}" 2>/dev/null ;; esac
    done
    # Of a control group nobody can remove the files, and needs not.
    rmdir "$dir" 2>/dev/null && break
    rm -rf "$dir" 2>/dev/null && break
    sleep 0.2
  done
done
"#;

pub(crate) fn janitor_add(dir: &Path) {
    static JANITOR_PIPE: OnceLock<Mutex<Option<ChildStdin>>> = OnceLock::new();
    let pipe = JANITOR_PIPE.get_or_init(|| {
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", JANITOR]).current_dir("/");
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Mutex::new(command.spawn().ok().and_then(|mut child| child.stdin.take()))
    });
    let mut pipe = pipe.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pipe) = pipe.as_mut() {
        drop(writeln!(pipe, "{}", dir.display()));
    }
}
