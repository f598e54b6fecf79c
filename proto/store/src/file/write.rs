//! One object into place: temporary file, fsync, link or rename, fsync of the directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::errno::Errno;

use crate::key::TMP_PART;
use crate::{Put, PutMode};

use super::faults::{At, Failure};
use super::root::Root;

/// Age, by the file system's own clock, at which a temporary file can only be what a crash left. A write
/// takes seconds; its time limit is minutes.
const STALE: Duration = Duration::from_secs(3600);

/// Owner writes, group reads: a restore may run under another account of the same group.
const MODE: u32 = 0o640;

/// How much is given to the kernel at once. It sizes the page cache's folios by the write: one call for a whole object
/// takes them from the largest runs of free memory, which a virtual machine has given back to its host and gets again
/// one page fault at a time. Measured there: 1.5 ms per MB, against 0.3.
const WRITE_SIZE: usize = 64 * 1024;

pub(super) fn put(root: &Root, key: &str, bytes: &[u8], mode: PutMode) -> Result<Put, Failure> {
    let target = root.path().join(key);
    // A taken key is refused before its bytes are written; the link below decides races.
    match fs::metadata(&target) {
        Ok(meta) if meta.is_dir() => return Err(io::Error::from(Errno::EISDIR)).at(&target),
        Ok(_) if mode == PutMode::Create => return exists(root, &target),
        _ => {}
    }
    match place(root, &target, bytes, mode) {
        // Someone removed an empty directory that was remembered: make it again, once.
        Err(Failure::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
            root.forget_dirs();
            place(root, &target, bytes, mode)
        }
        outcome => outcome,
    }
}

fn place(root: &Root, target: &Path, bytes: &[u8], mode: PutMode) -> Result<Put, Failure> {
    let dir = target.parent().unwrap_or(root.path());
    root.ensure_dir(dir)?;
    let tmp = Temporary::write(root, bytes)?;
    let put = match mode {
        PutMode::Create => tmp.link(target)?,
        PutMode::Overwrite => tmp.rename(target)?,
    };
    // One that was there already may be as new as ours: see `exists`.
    root.sync(dir)?;
    Ok(put)
}

/// The name is taken. Whoever took it may have died, or failed, before the entry was durable; an answer that will be
/// taken for "it is stored" makes it so. The content was durable before it had a name.
fn exists(root: &Root, target: &Path) -> Result<Put, Failure> {
    let dir = target.parent().unwrap_or(root.path());
    root.ensure_dir(dir)?;
    root.sync(dir)?;
    Ok(Put::Exists)
}

/// A durable file that no key reaches; removed when dropped.
struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    fn write(root: &Root, bytes: &[u8]) -> Result<Self, Failure> {
        let mut tmp = Self::create(&tmp_dir(root)?, root)?;
        for piece in bytes.chunks(WRITE_SIZE) {
            tmp.file.write_all(piece).at(&tmp.path)?;
        }
        tmp.file.sync_all().at(&tmp.path)?;
        Ok(tmp)
    }

    /// A name that neither another process of this or another host nor an earlier one with the same process
    /// id can hold is left to `create_new`: a taken name is skipped.
    fn create(dir: &Path, root: &Root) -> Result<Self, Failure> {
        loop {
            let serial = root.serial.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!("{}-{serial}", std::process::id()));
            match OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(MODE)
                .open(&path)
            {
                Ok(file) => return Ok(Self { path, file }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).at(&path),
            }
        }
    }

    fn link(self, target: &Path) -> Result<Put, Failure> {
        let Err(error) = fs::hard_link(&self.path, target) else {
            return Ok(Put::Created);
        };
        match error.raw_os_error().map(Errno::from_raw) {
            // Over NFS a repeated request may find its own first success: then the file has two names.
            Some(Errno::EEXIST) => match self.file.metadata() {
                Ok(meta) if meta.nlink() > 1 => Ok(Put::Created),
                _ => Ok(Put::Exists),
            },
            Some(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EMLINK) => self.rename_new(target),
            _ => Err(error).at(target),
        }
    }

    /// For file systems without hard links.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn rename_new(self, target: &Path) -> Result<Put, Failure> {
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        match renameat2(
            AT_FDCWD,
            &self.path,
            AT_FDCWD,
            target,
            RenameFlags::RENAME_NOREPLACE,
        ) {
            Ok(()) => Ok(Put::Created),
            Err(Errno::EEXIST) => Ok(Put::Exists),
            Err(Errno::EINVAL) => Err(io::Error::from(Errno::EOPNOTSUPP)).at(target),
            Err(errno) => Err(io::Error::from(errno)).at(target),
        }
    }

    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    fn rename_new(self, target: &Path) -> Result<Put, Failure> {
        Err(io::Error::from(Errno::EOPNOTSUPP)).at(target)
    }

    fn rename(self, target: &Path) -> Result<Put, Failure> {
        fs::rename(&self.path, target).at(target)?;
        Ok(Put::Created)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename the name is gone; after a failure the sweep of a later writer is the second chance.
        let _ = fs::remove_file(&self.path);
    }
}

/// The directory for temporary files. The first use by a process removes what crashed ones left there.
fn tmp_dir(root: &Root) -> Result<PathBuf, Failure> {
    let dir = root.path().join(TMP_PART);
    let mut ready = root.tmp_ready.lock().unwrap_or_else(PoisonError::into_inner);
    if !*ready {
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error).at(&dir),
            _ => {}
        }
        sweep(&dir, root)?;
        *ready = true;
    }
    Ok(dir)
}

/// Removes stale temporary files. Age is measured against a file written now, so that neither this host's
/// clock nor the file server's matters. What can't be removed is left: it does no harm.
fn sweep(dir: &Path, root: &Root) -> Result<(), Failure> {
    let marker = Temporary::create(dir, root)?;
    let now = marker
        .file
        .metadata()
        .and_then(|meta| meta.modified())
        .at(&marker.path)?;
    for entry in fs::read_dir(dir).at(dir)?.flatten() {
        let age = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|at| now.duration_since(at).ok());
        if age.is_some_and(|age| age > STALE) && fs::remove_file(entry.path()).is_ok() {
            tracing::info!(path = %entry.path().display(), "removed a temporary file that a crash left");
        }
    }
    Ok(())
}

/// Makes the entries of `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), Failure> {
    let synced = File::open(dir).and_then(|file| file.sync_all());
    match synced {
        // Some network and FUSE file systems have no fsync for directories; there the server orders it.
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => Ok(()),
        synced => synced.at(dir),
    }
}

/// Like [`sync_dir`], for the directory above the root, which may be closed to this account.
pub(super) fn sync_parent(dir: &Path) -> Result<(), Failure> {
    match File::open(dir) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        _ => sync_dir(dir),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    static BROKEN: AtomicBool = AtomicBool::new(false);

    fn sync(dir: &Path) -> Result<(), Failure> {
        match BROKEN.load(Ordering::Relaxed) {
            true => Err(io::Error::from(Errno::EIO)).at(dir),
            false => sync_dir(dir),
        }
    }

    #[test]
    fn a_name_whose_entry_may_not_be_durable_is_no_stored_object() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::syncing_with(dir.path().to_owned(), sync);
        let create = || put(&root, "a/b", b"x", PutMode::Create);
        put(&root, "a/other", b"x", PutMode::Create).ok().unwrap();
        BROKEN.store(true, Ordering::Relaxed);
        assert!(create().is_err());
        assert!(dir.path().join("a/b").exists(), "the link came first");
        assert!(create().is_err(), "a taken name was believed");
        BROKEN.store(false, Ordering::Relaxed);
        assert_eq!(create().ok(), Some(Put::Exists));
    }
}
