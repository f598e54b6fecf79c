//! What can go wrong, and the exit code each case ends with.

use std::{io, path::PathBuf};

use highwater_config::{ConfigError, Exit};
use highwater_format::{FormatError, FormatErrorKind};
use highwater_store::{ErrorKind, StoreError};

use crate::{plan::Refusal, regions::left_out_note, target::TargetError};

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
    /// The regions that were read lack something that is needed, or hold no good copy of it.
    #[error("{message}")]
    Lacking {
        /// How the program ends.
        exit: Exit,
        /// What is lacking and the next step.
        message: String,
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

    /// The same for what the regions that were read do not give.
    #[must_use]
    pub fn lacking(exit: Exit, message: impl Into<String>) -> Self {
        Self::Lacking {
            exit,
            message: message.into(),
        }
    }

    /// The same where these regions were left out on purpose: what is lacking may be there, and who left them out for one
    /// restore may have forgotten them at the next.
    #[must_use]
    pub fn beside_left_out(mut self, names: &[String]) -> Self {
        let Some(note) = left_out_note(names.iter().map(String::as_str)) else {
            return self;
        };
        match &mut self {
            Self::Refused(refusal) if refusal.reason.may_be_held_elsewhere() => {
                refusal.next = format!("{}; {note}", refusal.next);
            }
            Self::Lacking { message, .. } => *message = format!("{message}; {note}"),
            _ => {}
        }
        self
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
            Self::Lacking { exit, .. } | Self::Failed { exit, .. } => *exit,
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

#[cfg(test)]
mod tests {
    use highwater_format::{Lsn, TimelineId};

    use super::*;
    use crate::plan::Reason;

    const NOTE: &str = "; region b was left out and may hold it: try the restore without --without-region b";

    fn refused(reason: Reason) -> RestoreError {
        Refusal::no(reason, "no", "ask for another").into()
    }

    fn told(error: RestoreError, left_out: &[&str]) -> String {
        let names: Vec<String> = left_out.iter().map(|name| (*name).to_owned()).collect();
        error.beside_left_out(&names).to_string()
    }

    #[test]
    fn what_a_region_that_was_left_out_may_hold_is_told_as_the_next_step() {
        let lacking = || RestoreError::lacking(Exit::Damage, "a pack is gone");
        let too_late = || {
            let end = Lsn(0x100);
            refused(Reason::TooLate { end, time: None })
        };
        let not_found = || refused(Reason::NotFound { missing: vec![] });
        let errors: [fn() -> RestoreError; 3] = [lacking, too_late, not_found];
        for error in errors {
            let (alone, exit) = (told(error(), &[]), error().exit());
            assert_eq!(alone, error().to_string());
            assert_eq!(told(error(), &["b"]), format!("{alone}{NOTE}"));
            assert_eq!(error().beside_left_out(&["b".to_owned()]).exit(), exit);
        }
        let RestoreError::Refused(refusal) = too_late().beside_left_out(&["b".to_owned()]) else {
            panic!("another error")
        };
        assert!(refusal.next.ends_with(NOTE), "{refusal}");
    }

    #[test]
    fn what_no_further_region_cures_is_told_as_it_is() {
        let timeline = TimelineId::FIRST;
        for error in [
            refused(Reason::NewerFormat),
            refused(Reason::RegionUnreadable),
            refused(Reason::DifferingHistories { timeline }),
            RestoreError::failed(Exit::Trouble, "the disk is full"),
        ] {
            let alone = error.to_string();
            assert_eq!(told(error, &["b"]), alone);
        }
    }
}
