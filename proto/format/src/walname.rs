//! Names of WAL files: what PostgreSQL calls a segment, and what it may ask a `restore_command` for.
//!
//! Owns: building and reading these names. Does not own: keys of the archive (see [`crate::layout`]).

use std::fmt;

use crate::error::ParseError;
use crate::lsn::{Lsn, LsnRange, SegmentSize};
use crate::text::fixed_hex;
use crate::timeline::TimelineId;

/// One segment of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline.
    pub timeline: TimelineId,
    /// The segment's number, counted from the beginning of the WAL.
    pub number: u64,
}

impl SegmentName {
    /// The segment of `timeline` that holds `lsn`.
    pub fn of(timeline: TimelineId, lsn: Lsn, size: SegmentSize) -> SegmentName {
        SegmentName {
            timeline,
            number: size.segment_number(lsn),
        }
    }

    /// PostgreSQL's file name: 24 hexadecimal digits.
    pub fn to_string(self, size: SegmentSize) -> String {
        self.wal_name(size).to_string()
    }

    /// Reads a file name of 24 hexadecimal digits.
    pub fn parse(name: &str, size: SegmentSize) -> Result<SegmentName, ParseError> {
        WalName::parse(name)
            .and_then(|wal| wal.resolve(size))
            .ok_or_else(|| {
                ParseError::new(
                    "a WAL segment name",
                    name,
                    "24 upper-case hexadecimal digits that fit the segment size",
                )
            })
    }

    /// The segment's first byte.
    pub fn start(self, size: SegmentSize) -> Lsn {
        Lsn(self.number.saturating_mul(size.bytes()))
    }

    /// All bytes of the segment.
    pub fn range(self, size: SegmentSize) -> LsnRange {
        let start = self.start(size);
        LsnRange::new(start, start.saturating_add(size.bytes()))
    }

    /// The next segment of the same timeline.
    pub fn next(self) -> SegmentName {
        SegmentName {
            timeline: self.timeline,
            number: self.number.saturating_add(1),
        }
    }

    /// The three numbers of the file name.
    pub fn wal_name(self, size: SegmentSize) -> WalName {
        let per_id = size.segments_per_id();
        // A number beyond the WAL's 64 bits has no name; it is held at the last one.
        let high = u32::try_from(self.number / per_id).unwrap_or(u32::MAX);
        let low = u32::try_from(self.number % per_id).unwrap_or(u32::MAX);
        WalName {
            timeline: self.timeline,
            high,
            low,
        }
    }
}

/// The three numbers of a segment's file name. Which LSN they mean depends on the segment size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalName {
    /// The first eight digits.
    pub timeline: TimelineId,
    /// The middle eight digits: the upper half of the LSN.
    pub high: u32,
    /// The last eight digits: the segment within those 4 GiB.
    pub low: u32,
}

impl WalName {
    /// Reads exactly 24 upper-case hexadecimal digits.
    pub fn parse(name: &str) -> Option<WalName> {
        let timeline = TimelineId::from_hex8(name.get(..8)?)?;
        let high = u32::try_from(fixed_hex(name.get(8..16)?, 8)?).ok()?;
        let low = u32::try_from(fixed_hex(name.get(16..)?, 8)?).ok()?;
        Some(WalName { timeline, high, low })
    }

    /// The segment meant, or `None` if no segment of this size has such a name.
    pub fn resolve(self, size: SegmentSize) -> Option<SegmentName> {
        let per_id = size.segments_per_id();
        let (high, low) = (u64::from(self.high), u64::from(self.low));
        (low < per_id).then_some(SegmentName {
            timeline: self.timeline,
            number: high * per_id + low,
        })
    }
}

impl fmt::Display for WalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.get(), self.high, self.low)
    }
}

/// A name that PostgreSQL or an operator may hand to `restore_command` or `archive_command`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WalFile {
    /// `000000010000000000000002`.
    Segment(WalName),
    /// `000000010000000000000002.partial`: the cut-off segment of a timeline that was left.
    Partial(WalName),
    /// `00000002.history`.
    History(TimelineId),
    /// `000000010000000000000002.00000028.backup`: the note that ends a base backup.
    BackupHistory(WalName, u32),
}

impl WalFile {
    /// Reads a bare file name; anything else than the four forms is refused.
    pub fn parse(name: &str) -> Result<WalFile, ParseError> {
        let expected = "a segment, .partial, .history or .backup file name";
        Self::recognise(name).ok_or_else(|| ParseError::new("a WAL file name", name, expected))
    }

    fn recognise(name: &str) -> Option<WalFile> {
        if let Some(timeline) = name.strip_suffix(".history") {
            return TimelineId::from_hex8(timeline).map(WalFile::History);
        }
        let (segment, suffix) = name.split_at_checked(24)?;
        let segment = WalName::parse(segment)?;
        match suffix {
            "" => Some(WalFile::Segment(segment)),
            ".partial" => Some(WalFile::Partial(segment)),
            _ => {
                let offset = fixed_hex(suffix.strip_prefix('.')?.strip_suffix(".backup")?, 8)?;
                Some(WalFile::BackupHistory(segment, u32::try_from(offset).ok()?))
            }
        }
    }
}

impl fmt::Display for WalFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WalFile::Segment(name) => name.fmt(f),
            WalFile::Partial(name) => write!(f, "{name}.partial"),
            WalFile::History(timeline) => write!(f, "{:08X}.history", timeline.get()),
            WalFile::BackupHistory(name, offset) => write!(f, "{name}.{offset:08X}.backup"),
        }
    }
}
