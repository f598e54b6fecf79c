//! Why a data directory cannot be written, and what the operator does about it.

use std::io;
use std::path::{Path, PathBuf};

use highwater_config::Exit;

/// A data directory that cannot be prepared, filled or finished.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Something is there that this program did not put there.
    #[error(
        "{path} is not empty (it holds {example}): nothing was written; name an empty or a new directory"
    )]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One of the names in it.
        example: String,
    },
    /// A server uses it.
    #[error(
        "a server with process id {pid} runs on {path}: nothing was written; stop it or name another directory"
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// From its `postmaster.pid`.
        pid: i32,
    },
    /// Another restore writes into it right now.
    #[error("another restore is writing into {path}: nothing was written; wait for it or end it")]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// A finished restore whose server has been started since.
    #[error(
        "{path} holds a restore of backup {backup} whose server has been started since: nothing was written; \
         move it away or name another directory"
    )]
    Started {
        /// The directory.
        path: PathBuf,
        /// Which backup it came from.
        backup: String,
    },
    /// The leftover of an interrupted restore of another cluster.
    #[error(
        "{path} holds an interrupted restore of system {found}, and this is system {wanted}: nothing was written; \
         remove it or name another directory"
    )]
    OtherSystem {
        /// The directory.
        path: PathBuf,
        /// The system identifier of the leftover.
        found: String,
        /// The system identifier of the archive.
        wanted: String,
    },
    /// A tablespace that another restore uses.
    #[error(
        "{path} belongs to the restore in {root} ({problem}): no file of it was changed; name another directory with \
         --tablespace, or remove {path} if that restore is gone"
    )]
    OfAnother {
        /// The tablespace's directory.
        path: PathBuf,
        /// The data directory that it belongs to.
        root: PathBuf,
        /// How that is known.
        problem: &'static str,
    },
    /// Not a directory, or a path that cannot be used.
    #[error("{path} cannot be restored into: {problem}")]
    Unusable {
        /// The path.
        path: PathBuf,
        /// What is wrong with it, and the cure.
        problem: String,
    },
    /// `--owner` or the owner found cannot be used.
    #[error("{0}")]
    Owner(String),
    /// `--tablespace` does not fit the backup, or a location cannot be used.
    #[error("tablespace: {0}")]
    Tablespace(String),
    /// The manifest asks for something outside the target.
    #[error("the manifest of backup {backup} names {path:?}: {problem}; nothing of it was written")]
    Hostile {
        /// The backup.
        backup: String,
        /// The offending path, as the manifest has it.
        path: String,
        /// Why it is refused.
        problem: String,
    },
    /// Not enough room.
    #[error(
        "{path} has {free} bytes free and the restore needs {needed} ({files} of files, the rest for WAL while \
         it is replayed): nothing was written; make room or name another directory"
    )]
    NoRoom {
        /// A directory on the file system that is too small.
        path: PathBuf,
        /// What is needed there.
        needed: u64,
        /// The part of it that the files themselves take.
        files: u64,
        /// What is free there for this user.
        free: u64,
    },
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl DataDirError {
    /// What the program ends with.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::NotEmpty { .. }
            | Self::InUse { .. }
            | Self::Busy { .. }
            | Self::Started { .. }
            | Self::OtherSystem { .. }
            | Self::OfAnother { .. }
            | Self::Unusable { .. }
            | Self::Owner(_)
            | Self::Tablespace(_) => Exit::Usage,
            Self::Hostile { .. } => Exit::Damage,
            Self::NoRoom { .. } => Exit::No,
            Self::Io { .. } => Exit::Trouble,
        }
    }

    /// For `map_err`: adds what was tried and on what.
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
