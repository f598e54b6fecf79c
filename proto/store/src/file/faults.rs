//! From an error of the operating system to what the caller can do about it.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::{ErrorKind, Operation, StoreError};

/// A failure inside blocking work, before region and key are known.
#[derive(Debug)]
pub(super) enum Failure {
    NotFound,
    /// The root is gone or is not the one that was opened.
    Root {
        path: PathBuf,
        what: &'static str,
    },
    Io {
        path: PathBuf,
        error: io::Error,
    },
    TooLarge {
        path: PathBuf,
        len: u64,
    },
    Short {
        path: PathBuf,
        expected: u64,
        got: u64,
    },
    Known(StoreError),
}

/// Says which path an operation failed on.
pub(super) trait At<T> {
    fn at(self, path: &Path) -> Result<T, Failure>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, Failure> {
        self.map_err(|error| Failure::Io {
            path: path.to_owned(),
            error,
        })
    }
}

impl Failure {
    pub(super) fn into_error(self, region: &str, operation: Operation, key: &str) -> StoreError {
        let new = |kind, message: String| StoreError::new(kind, region, operation, key, message);
        match self {
            Self::Known(error) => error,
            Self::NotFound => new(ErrorKind::NotFound, "no such object".to_owned()),
            Self::Root { path, what } => new(ErrorKind::Operator, format!("{} {what}", path.display()))
                .with_next_step("mount the volume, or create the directory if this is a new archive"),
            Self::TooLarge { path, len } => new(
                ErrorKind::Corrupt,
                format!(
                    "{} has {len} bytes: no object of an archive is that large",
                    path.display()
                ),
            )
            .with_next_step("find out who put it there; other regions can be read meanwhile"),
            Self::Short { path, expected, got } => new(
                ErrorKind::Retry,
                format!("{} gave {got} of {expected} bytes", path.display()),
            )
            .with_next_step("the file changed while it was read; objects never do: find out who writes here"),
            Self::Io { path, error } => {
                let (kind, advice) = classify(&error);
                let told = new(kind, format!("{}: {error}", path.display())).with_source(error);
                match advice {
                    Some(advice) => told.with_next_step(format!("{advice}: {}", path.display())),
                    None => told,
                }
            }
        }
    }
}

/// Kind and advice by errno, never by text.
pub(super) fn classify(error: &io::Error) -> (ErrorKind, Option<&'static str>) {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC) => (
            ErrorKind::Operator,
            Some("free space on, or enlarge, the file system that holds"),
        ),
        Some(Errno::EDQUOT) => (
            ErrorKind::Operator,
            Some("raise the disk quota of the file system that holds"),
        ),
        Some(Errno::EROFS) => (
            ErrorKind::Operator,
            Some("mount writable the file system that holds"),
        ),
        Some(Errno::EACCES | Errno::EPERM) => (
            ErrorKind::Operator,
            Some("grant the account of this program access to"),
        ),
        Some(Errno::EIO | Errno::ENXIO | Errno::ENODEV | Errno::EUCLEAN) => (
            ErrorKind::Operator,
            Some("check the kernel log and the disk that holds"),
        ),
        Some(Errno::EXDEV) => (
            ErrorKind::Config,
            Some("keep the whole region on one file system"),
        ),
        Some(Errno::ENOTDIR | Errno::EISDIR | Errno::ENAMETOOLONG | Errno::EINVAL | Errno::ELOOP) => (
            ErrorKind::Bug,
            Some("the key does not fit what stands in the directory"),
        ),
        Some(Errno::EOPNOTSUPP | Errno::ENOSYS) => (
            ErrorKind::Config,
            Some(
                "the file system has neither hard links nor renames that refuse to replace; use another for",
            ),
        ),
        // ESTALE, ETIMEDOUT, EINTR, EAGAIN, EMFILE, ENFILE, ENOMEM, a vanished directory and all unknown ones.
        _ => (ErrorKind::Retry, None),
    }
}
