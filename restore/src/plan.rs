//! Chooses backup, WAL and recovery settings for a target, or says why it cannot be reached. Pure: values in, a value
//! out, so that `plan` and `run` cannot differ and the choice can be tested against a model.
//!
//! Owns: the choice and the reasons. Does not own: reading WAL. What the keys of the archive cannot tell (which commit
//! is the last before a time) it asks as a [`Question`]; the caller answers and plans again.
//!
//! Every target inside the WAL becomes a `recovery_target_lsn`, inclusive or not, that exactly one record satisfies
//! first. PostgreSQL's own `recovery_target_time` ends with FATAL when no commit follows the target (an idle night),
//! and silently promotes at a later state when the target lies before the backup's end; an LSN found in the verified
//! archive does neither, and it is the same rule for time, LSN, transaction id and name.

mod assemble;
mod base;
mod choose;
mod need;
mod question;
mod refusal;
mod say;
mod targets;
mod timeline;
mod windows;

#[cfg(test)]
pub(crate) mod model;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod say_tests;

use std::fmt;

use highwater_format::{Backup, Lsn, LsnRange, SystemId, Time, TimelineId};
use serde::Serialize;

use crate::{
    catalog::Chain,
    target::{Action, Target},
};

pub use choose::{Step, plan};
pub use need::{WalNeed, WalPiece};
pub use question::{Answer, Answers, Mark, Question, Span};
pub use refusal::{Missing, Reason, Refusal};
pub use windows::{End, Window, Windows, windows};

/// Where recovery begins, what it reads and where it ends.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The lineage.
    pub system_id: SystemId,
    /// The base backup.
    pub backup: Backup,
    /// The regions that hold it, the preferred one first; indices into [`Catalog::regions`].
    pub backup_regions: Vec<usize>,
    /// All readable regions, the preferred one first.
    pub regions: Vec<usize>,
    /// The timeline that recovery ends on: `recovery_target_timeline`.
    pub timeline: TimelineId,
    /// The timeline with its ancestors, and the WAL there is of them in all readable regions.
    pub chain: Chain,
    /// The WAL to fetch: from the start of the backup's first segment to the end of what is needed.
    pub wal: LsnRange,
    /// The end of unbroken WAL behind the backup. Nothing that continues it is in any readable region.
    pub wal_end: Lsn,
    /// Objects lie behind `wal_end` after a break that this restore does not cross: nothing of them was ever
    /// acknowledged, or the target lies before it.
    pub ragged: bool,
    /// How PostgreSQL is told.
    pub target: ResolvedTarget,
    /// What will be fetched.
    pub amount: Amount,
    /// What the operator should know and what does not stop anything.
    pub notes: Vec<String>,
}

/// The target in PostgreSQL's terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedTarget {
    /// As asked for.
    pub asked: Target,
    /// Just before it instead of just after it.
    pub exclusive: bool,
    /// `recovery_target*` settings in full, `recovery_target_timeline` included.
    pub settings: Vec<(&'static str, String)>,
    /// What happens at the target.
    pub action: Action,
    /// Where replay is expected to end. `None`: not known to the record (only for the end of the archive).
    pub stop: Stop,
}

impl fmt::Display for ResolvedTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.exclusive {
            f.write_str("just before ")?;
        }
        self.asked.fmt(f)
    }
}

/// Where replay ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// Everything before this LSN is replayed, and no transaction that ends after it is. Behind the last archived byte
    /// when the last record is a `pg_switch_wal()`, which ends where its segment does.
    pub lsn: Lsn,
    /// The last transaction end that is replayed, as far as it was looked up; always if replay stops right after it.
    /// PostgreSQL itself then names the one before: it looks for its target first and at the record's time afterwards
    /// (`recoveryStopsAfter`).
    pub last_commit: Option<Time>,
}

/// What will be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Amount {
    /// Stored bytes of the backup's packs.
    pub backup_bytes: u64,
    /// Plain bytes of the backup: what it needs on disk.
    pub backup_plain_bytes: u64,
    /// Packs.
    pub packs: u64,
    /// Stored bytes of WAL objects.
    pub wal_bytes: u64,
    /// WAL objects.
    pub wal_objects: u64,
    /// WAL segments that PostgreSQL will ask for.
    pub wal_segments: u64,
}
