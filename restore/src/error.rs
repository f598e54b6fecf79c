//! What can go wrong, and the exit code each case ends with.

use std::{io, path::PathBuf};

use highwater_config::{ConfigError, Exit};
use highwater_format::{FormatError, FormatErrorKind};
use highwater_store::{ErrorKind, StoreError};

use crate::{plan::Refusal, target::TargetError};

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The target makes no sense.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The target cannot be reached.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// A region failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An object is not what it should be.
    #[error("region {region}: object {key}: {source}")]
    Object {
        /// The region.
        region: String,
        /// The object.
        key: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A file or directory of this machine.
    #[error("cannot {action} {}: {source}", path.display())]
    Local {
        /// What was tried, as in "create".
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Anything else, with its exit code.
    #[error("{message}")]
    Failed {
        /// How the program ends.
        exit: Exit,
        /// What happened and the next step.
        message: String,
    },
}

impl RestoreError {
    /// A failure with its own exit code.
    #[must_use]
    pub fn failed(exit: Exit, message: impl Into<String>) -> Self {
        Self::Failed {
            exit,
            message: message.into(),
        }
    }

    /// How the program ends.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Config(_) | Self::Target(_) => Exit::Usage,
            Self::Refused(refusal) => refusal.exit,
            Self::Store(error) => store_exit(error.kind()),
            Self::Object { source, .. } => format_exit(source.kind()),
            Self::Local { .. } => Exit::Trouble,
            Self::Failed { exit, .. } => *exit,
        }
    }
}

impl From<Refusal> for RestoreError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

/// The exit code for a failure of a region.
#[must_use]
pub fn store_exit(kind: ErrorKind) -> Exit {
    match kind {
        ErrorKind::Retry | ErrorKind::Operator | ErrorKind::NotFound | ErrorKind::Bug => Exit::Trouble,
        ErrorKind::Config => Exit::Usage,
        ErrorKind::Corrupt | ErrorKind::Conflict => Exit::Damage,
    }
}

/// The exit code for an object that cannot be used.
#[must_use]
pub fn format_exit(kind: FormatErrorKind) -> Exit {
    match kind {
        FormatErrorKind::Corrupt
        | FormatErrorKind::NewerVersion
        | FormatErrorKind::Unsupported
        | FormatErrorKind::Mismatch
        | FormatErrorKind::Invalid => Exit::Damage,
    }
}
