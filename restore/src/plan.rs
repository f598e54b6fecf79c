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

mod base;
mod choose;
mod refusal;
mod say;
mod windows;

#[cfg(test)]
pub(crate) mod model;
#[cfg(test)]
mod model_tests;

use std::collections::BTreeMap;

use highwater_format::{
    Backup, BackupId, Lsn, LsnRange, SegmentName, SystemId, Time, TimelineId, coverage::Hole, coverage::Piece,
};

use crate::{
    catalog::{Catalog, Chain},
    target::{Action, Target},
};

pub use choose::{Step, plan};
pub use refusal::{Reason, Refusal};
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

/// Where replay ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// Everything before this LSN is replayed, and no transaction that ends after it is. Behind the last archived byte
    /// when the last record is a `pg_switch_wal()`, which ends where its segment does.
    pub lsn: Lsn,
    /// The last transaction end that is replayed, as far as it was looked up.
    pub last_commit: Option<Time>,
}

/// What will be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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

/// What makes up one WAL segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalNeed {
    /// The name PostgreSQL asks for.
    pub segment: SegmentName,
    /// The bytes of it that the archive holds and replay needs, from the segment's start; the rest is zeros.
    pub range: LsnRange,
    /// The objects, in order.
    pub pieces: Vec<WalPiece>,
}

/// One object of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalPiece {
    /// The timeline under which it is stored.
    pub timeline: TimelineId,
    /// The object.
    pub piece: Piece,
    /// The bytes taken from it.
    pub used: LsnRange,
    /// Its key.
    pub key: String,
    /// The regions that hold it, the preferred one first.
    pub regions: Vec<usize>,
}

impl Plan {
    /// The segments that PostgreSQL will ask for, in order.
    pub fn segments(&self) -> impl Iterator<Item = SegmentName> + '_ {
        let size = self.chain.segment_size;
        let step = usize::try_from(size.bytes()).unwrap_or(usize::MAX);
        (size.segment_start(self.wal.start).0..self.wal.end.0)
            .step_by(step)
            .map(|lsn| self.chain.segment_at(Lsn(lsn)))
    }

    /// The objects that make up one segment, up to the end of the archive.
    ///
    /// # Errors
    ///
    /// A [`Hole`] where the archive lacks bytes of it before [`Plan::wal_end`]; cannot happen for the segments of the plan.
    pub fn need(&self, catalog: &Catalog, segment: SegmentName) -> Result<WalNeed, Hole> {
        let whole = segment.range(self.chain.segment_size);
        let range = LsnRange::new(whole.start, whole.end.min(self.wal_end).max(whole.start));
        let pieces = self.chain.cover(range)?.into_iter().map(|source| {
            let holders = catalog.holders(source.timeline, &source.piece);
            WalPiece {
                timeline: source.timeline,
                piece: source.piece,
                used: source.used,
                key: catalog.piece_key(source.timeline, &source.piece),
                regions: self
                    .regions
                    .iter()
                    .copied()
                    .filter(|index| holders.contains(index))
                    .collect(),
            }
        });
        Ok(WalNeed {
            segment,
            range,
            pieces: pieces.collect(),
        })
    }

    /// The history files that PostgreSQL asks for: those of the chain, without the first timeline.
    #[must_use]
    pub fn histories(&self) -> Vec<TimelineId> {
        let ancestors = self.chain.history.entries.iter().map(|entry| entry.timeline);
        ancestors
            .chain([self.timeline])
            .filter(|timeline| *timeline != TimelineId::FIRST)
            .collect()
    }
}

/// A stretch of WAL along one chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// The timeline that the chain leads to.
    pub timeline: TimelineId,
    /// The first byte; a record begins here or earlier on this page.
    pub start: Lsn,
    /// Behind the last byte.
    pub end: Lsn,
}

/// What only the WAL itself can tell.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Question {
    /// The first transaction end in the span that is later than `time` (or at it, with `or_at`), and the last transaction
    /// end before that one. Answered by [`Answer::Commits`].
    Commits {
        /// Where to look.
        span: Span,
        /// The moment.
        time: Time,
        /// Also stop at exactly that moment.
        or_at: bool,
    },
    /// The records around an LSN. Answered by [`Answer::Records`].
    Records {
        /// Where to look.
        span: Span,
        /// The place.
        lsn: Lsn,
    },
    /// The first end of that transaction. Answered by [`Answer::Mark`].
    Xid {
        /// Where to look.
        span: Span,
        /// The transaction.
        xid: u32,
    },
    /// The first restore point of that name. Answered by [`Answer::Mark`].
    Name {
        /// Where to look.
        span: Span,
        /// The name.
        name: String,
    },
    /// The latest server time at which everything up to then is proven to be in the span. Answered by [`Answer::Time`].
    Proven {
        /// Where to look.
        span: Span,
    },
}

/// One record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The record begins here or within the padding that follows: no other record begins between this and `end`.
    pub start: Lsn,
    /// Its end.
    pub end: Lsn,
    /// For transaction ends and restore points: when.
    pub time: Option<Time>,
}

/// What the WAL says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To [`Question::Commits`].
    Commits {
        /// The last transaction end before `first_after`; before the end of the span if there is none after.
        last_before: Option<Mark>,
        /// The first one that must not be replayed.
        first_after: Option<Mark>,
    },
    /// To [`Question::Records`].
    Records {
        /// The last whole record that begins before the LSN.
        before: Option<Mark>,
        /// The first whole record that begins at or after it.
        at_or_after: Option<Mark>,
    },
    /// To [`Question::Xid`] and [`Question::Name`].
    Mark(Option<Mark>),
    /// To [`Question::Proven`].
    Time(Option<Time>),
}

/// The answers so far.
pub type Answers = BTreeMap<Question, Answer>;

/// Why a backup was passed over, for the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// The backup.
    pub backup: BackupId,
    /// Why.
    pub why: String,
}
