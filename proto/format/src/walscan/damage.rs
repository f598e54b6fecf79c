//! What can be wrong with WAL, in words that say where and what.

use crate::lsn::Lsn;
use crate::timeline::TimelineId;

/// WAL that PostgreSQL would not replay beyond `lsn`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the WAL at {lsn} is damaged: {what}")]
pub struct WalDamage {
    /// Where the record or page begins that is wrong.
    pub lsn: Lsn,
    /// What is wrong with it.
    pub what: Damage,
}

impl WalDamage {
    /// Zeros where a record or page should begin. In a segment padded to its full size this is the end of the WAL;
    /// in a stream it is damage like any other.
    #[must_use]
    pub fn is_end_of_wal(&self) -> bool {
        self.what == Damage::Zeros
    }
}

/// A way in which WAL can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// Nothing was written here.
    #[error("zeros where a record or a page header should be")]
    Zeros,
    /// A page does not begin with the magic number of its version.
    #[error("the page begins with {found:04X}, PostgreSQL {expected} writes another magic number")]
    Magic {
        /// What is there.
        found: u16,
        /// The major version that was expected.
        expected: u32,
    },
    /// A page begins with a magic number of no version that is supported.
    #[error(
        "the page begins with {found:04X}, the magic number of no supported PostgreSQL version (13 to 18)"
    )]
    UnknownMagic {
        /// What is there.
        found: u16,
    },
    /// The header has flags that mean nothing, or lacks the long form at the start of a segment.
    #[error("the page header has impossible flags {found:04X}")]
    PageFlags {
        /// What is there.
        found: u16,
    },
    /// The page belongs somewhere else.
    #[error("the page says that it belongs at {found}")]
    PageAddress {
        /// What is there.
        found: Lsn,
    },
    /// The page belongs to a timeline that cannot come here.
    #[error("the page is of timeline {found}, which is none or outside {lowest} to {highest}")]
    PageTimeline {
        /// What is there.
        found: u32,
        /// The timeline of the page before, or 1.
        lowest: TimelineId,
        /// The timeline that is being read, or the highest there can be.
        highest: TimelineId,
    },
    /// The segment was written by another cluster.
    #[error("the segment is of the cluster with system identifier {found}, not {expected}")]
    SystemId {
        /// What is there.
        found: u64,
        /// The cluster that is being read.
        expected: u64,
    },
    /// The segment was written with another segment or page size.
    #[error(
        "the segment says its sizes are {segment} (segment) and {page} (page), expected {expected_segment} and {expected_page}"
    )]
    Sizes {
        /// Segment size that is there.
        segment: u32,
        /// Page size that is there.
        page: u32,
        /// Segment size of the cluster.
        expected_segment: u64,
        /// Page size of the cluster.
        expected_page: u32,
    },
    /// A record that runs over from the page before does not go on here as it should.
    #[error("the page continues a record with {found} bytes to come, expected {expected}")]
    Continuation {
        /// What the header says.
        found: u32,
        /// What the record's length leaves.
        expected: u32,
    },
    /// A record has a length that no record has.
    #[error("the record says that it is {found} bytes long")]
    RecordLength {
        /// What is there.
        found: u32,
    },
    /// A record does not follow the one before it.
    #[error("the record says that it follows the one at {found}, not that at {expected}")]
    BackLink {
        /// What is there.
        found: Lsn,
        /// Where the record before begins.
        expected: Lsn,
    },
    /// A record says that it follows one that comes later.
    #[error("the record says that it follows one at {found}, which is not before it")]
    BackLinkAhead {
        /// What is there.
        found: Lsn,
    },
    /// A record's bytes are not those that were written.
    #[error("the record's CRC-32C is {computed:08X}, stored is {stored:08X}")]
    Checksum {
        /// As written.
        stored: u32,
        /// Of the bytes that are there.
        computed: u32,
    },
}

impl Damage {
    pub(super) fn at(self, lsn: Lsn) -> WalDamage {
        WalDamage { lsn, what: self }
    }
}
