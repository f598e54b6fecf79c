//! Why a target cannot be reached, said so that the operator knows what is missing and what to do next.

use std::fmt;

use highwater_config::Exit;
use highwater_format::{Lsn, LsnRange, Time, TimelineId};

/// The answer "no", with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What stands in the way, for programs.
    pub reason: Reason,
    /// What stands in the way, for people.
    pub message: String,
    /// What to do about it.
    pub next: String,
    /// How the program ends: 1 the answer is no, 3 a region that does not answer may hold it, 4 damage.
    pub exit: Exit,
}

/// What stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// There is no usable backup at all.
    NoBackup,
    /// The backup asked for does not exist or does not lie on the timeline.
    UnknownBackup,
    /// WAL is missing before the target.
    Hole {
        /// The chain it is missing from.
        timeline: TimelineId,
        /// What is missing.
        range: LsnRange,
        /// The recorded reason, if it was left out on purpose.
        recorded: Option<String>,
        /// The objects that should hold it and that no region has a good copy of.
        damaged: Option<Box<str>>,
    },
    /// The target lies before the earliest consistent state.
    TooEarly {
        /// The earliest LSN that can be restored.
        earliest: Lsn,
        /// When it was.
        time: Option<Time>,
    },
    /// The target lies after the end of the archive.
    TooLate {
        /// The end.
        end: Lsn,
        /// The last time that can be proven.
        time: Option<Time>,
    },
    /// There is no such timeline.
    UnknownTimeline {
        /// As asked for.
        timeline: TimelineId,
    },
    /// The descent of the timeline is not known.
    BrokenHistory {
        /// The timeline asked for.
        timeline: TimelineId,
    },
    /// The histories of the timeline are there and contradict each other.
    DifferingHistories {
        /// The timeline they are told of.
        timeline: TimelineId,
    },
    /// No such transaction or restore point in the WAL that there is.
    NotFound {
        /// What of the WAL behind the first backup is not there and may hold it, in order.
        missing: Vec<Missing>,
    },
    /// A region that does not answer could change the answer.
    RegionUnreadable,
    /// Part of the archive was written by a newer release.
    NewerFormat,
}

/// A stretch of WAL that a line of descent lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The timeline that it begins on.
    pub timeline: TimelineId,
    /// What is missing.
    pub range: LsnRange,
    /// The recorded reason, if it was left out on purpose.
    pub recorded: Option<String>,
    /// The objects that should hold it and that no region has a good copy of.
    pub damaged: Option<Box<str>>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the WAL {} of timeline {} is ", self.range, self.timeline)?;
        match (&self.damaged, &self.recorded) {
            (Some(why), _) => write!(f, "damaged: {why}"),
            (None, Some(why)) => write!(f, "missing (recorded: {why})"),
            (None, None) => f.write_str("missing"),
        }
    }
}

impl From<Missing> for Reason {
    fn from(missing: Missing) -> Self {
        let Missing {
            timeline,
            range,
            recorded,
            damaged,
        } = missing;
        Self::Hole {
            timeline,
            range,
            recorded,
            damaged,
        }
    }
}

impl Reason {
    /// Whether a region that was left out may hold what stands in the way by not being there.
    #[must_use]
    pub fn may_be_held_elsewhere(&self) -> bool {
        match self {
            Self::NoBackup
            | Self::UnknownBackup
            | Self::Hole { .. }
            | Self::TooEarly { .. }
            | Self::TooLate { .. }
            | Self::UnknownTimeline { .. }
            | Self::BrokenHistory { .. }
            | Self::NotFound { .. } => true,
            Self::DifferingHistories { .. } | Self::RegionUnreadable | Self::NewerFormat => false,
        }
    }

    /// A stable word for JSON output.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoBackup => "no_backup",
            Self::UnknownBackup => "unknown_backup",
            Self::Hole { .. } => "hole",
            Self::TooEarly { .. } => "too_early",
            Self::TooLate { .. } => "too_late",
            Self::UnknownTimeline { .. } => "unknown_timeline",
            Self::BrokenHistory { .. } | Self::DifferingHistories { .. } => "broken_history",
            Self::NotFound { .. } => "not_found",
            Self::RegionUnreadable => "region_unreadable",
            Self::NewerFormat => "newer_format",
        }
    }
}

impl Refusal {
    /// A plain "no".
    #[must_use]
    pub fn no(reason: Reason, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            next: next.into(),
            exit: Exit::No,
        }
    }

    /// The same where objects that were found to be damaged are the reason: somebody may mend that.
    #[must_use]
    pub fn because_of_damage(mut self, damaged: bool) -> Self {
        if damaged {
            self.exit = Exit::Damage;
            self.next = format!("put an intact version of the object back, or {}", self.next);
        }
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.message, self.next)
    }
}
