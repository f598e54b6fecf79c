//! The directory that is the region, and the proof that it still is.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::absent;
use super::faults::{At, Failure};

/// The root and what this process knows about the directories below it.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    /// Device and inode as first seen; a volume that is unmounted or mounted over changes them.
    identity: OnceLock<(u64, u64)>,
    /// Directories whose own entry this process has made durable.
    durable: Mutex<HashSet<PathBuf>>,
    /// Numbers the temporary files of this process.
    pub(super) serial: AtomicU64,
    /// The temporary directory exists and was swept.
    pub(super) tmp_ready: Mutex<bool>,
    sync: Sync,
}

/// Makes the entries of a directory durable.
type Sync = fn(&Path) -> Result<(), Failure>;

impl Root {
    pub(super) fn new(path: PathBuf) -> Self {
        Self::syncing_with(path, super::write::sync_dir)
    }

    pub(super) fn syncing_with(path: PathBuf, sync: Sync) -> Self {
        Self {
            sync,
            path,
            identity: OnceLock::new(),
            durable: Mutex::default(),
            serial: AtomicU64::new(0),
            tmp_ready: Mutex::new(false),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the entries of `dir` durable.
    pub(super) fn sync(&self, dir: &Path) -> Result<(), Failure> {
        (self.sync)(dir)
    }

    /// Whether the root exists. One that was there before and is not now, or is another, is an error, as is
    /// a missing directory above it.
    pub(super) fn look(&self) -> Result<bool, Failure> {
        let gone = |what| Failure::Root {
            path: self.path.clone(),
            what,
        };
        match fs::metadata(&self.path) {
            Ok(meta) if !meta.is_dir() => Err(gone("is not a directory")),
            Ok(meta) if self.is_the_same(&meta) => Ok(true),
            Ok(_) => Err(gone(
                "is no longer the directory that was opened: a volume was unmounted or replaced",
            )),
            Err(error) if absent(&error) && self.identity.get().is_some() => Err(gone("has disappeared")),
            Err(error) if absent(&error) => match self.path.parent().map(fs::metadata) {
                Some(Ok(parent)) if parent.is_dir() => Ok(false),
                Some(Err(error)) if !absent(&error) => Err(error).at(&self.path),
                _ => Err(gone("does not exist, nor does the directory above it")),
            },
            Err(error) => Err(error).at(&self.path),
        }
    }

    fn is_the_same(&self, meta: &Metadata) -> bool {
        let seen = (meta.dev(), meta.ino());
        *self.identity.get_or_init(|| seen) == seen
    }

    /// Makes `dir`, a directory at or below the root, exist with durable entries all the way down from the root.
    /// Directories of other processes are synced once too: they may be as new as ours.
    pub(super) fn ensure_dir(&self, dir: &Path) -> Result<(), Failure> {
        if !self.look()? {
            create(&self.path)?;
            tracing::warn!(root = %self.path.display(), "the region's directory did not exist and was made");
            self.look()?;
        }
        let mut missing: Vec<&Path> = Vec::new();
        for ancestor in dir.ancestors() {
            if self.lock().contains(ancestor) {
                break;
            }
            missing.push(ancestor);
            if ancestor == self.path {
                break;
            }
        }
        for ancestor in missing.into_iter().rev() {
            if ancestor != self.path {
                create(ancestor)?;
            }
            if let Some(parent) = ancestor.parent() {
                super::write::sync_parent(parent)?;
            }
            self.lock().insert(ancestor.to_owned());
        }
        Ok(())
    }

    /// Forgets what is known about directories, after one of them turned out to be gone.
    pub(super) fn forget_dirs(&self) {
        self.lock().clear();
        *self.tmp_ready.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn create(dir: &Path) -> Result<(), Failure> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error).at(dir),
        _ => Ok(()),
    }
}
