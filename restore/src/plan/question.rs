//! What the keys of the archive cannot tell: the planner's questions, and what the WAL answers.

use std::collections::BTreeMap;

use highwater_format::{Lsn, Time, TimelineId};

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
    /// Where the record begins, behind a page header: PostgreSQL's `ReadRecPtr`.
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
    /// To [`Question::Records`]; with times of transaction ends only.
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
