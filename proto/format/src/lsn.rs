//! Positions in the WAL, ranges of it, and the sizes it is cut into.
//!
//! Owns: LSN arithmetic (saturating, never wrapping) and its text forms. Does not own: timelines; an LSN
//! means something only together with one.

use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;

use crate::error::ParseError;
use crate::text::serde_as_text;

/// A byte position in the WAL of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// `0/0`, which PostgreSQL uses for "no position".
    pub const ZERO: Lsn = Lsn(0);
    /// The highest position there is.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// Moves forward, or `None` past the highest position.
    pub fn checked_add(self, bytes: u64) -> Option<Lsn> {
        self.0.checked_add(bytes).map(Lsn)
    }

    /// Moves forward and stops at the highest position.
    pub fn saturating_add(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_add(bytes))
    }

    /// Moves back and stops at `0/0`.
    pub fn saturating_sub(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_sub(bytes))
    }

    /// The last multiple of `unit` at or below this position. A unit of zero changes nothing.
    pub fn align_down(self, unit: u64) -> Lsn {
        self.0.checked_rem(unit).map_or(self, |rest| Lsn(self.0 - rest))
    }

    /// Bytes from `earlier` to here; zero if `earlier` is later.
    pub fn distance_from(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Sixteen hexadecimal digits, which sort as the positions do: the form in keys.
    pub fn hex16(self) -> String {
        format!("{:016X}", self.0)
    }

    /// Reads the form of [`Lsn::hex16`], and no other.
    pub fn from_hex16(text: &str) -> Option<Lsn> {
        crate::text::fixed_hex(text, 16).map(Lsn)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF))
    }
}

impl FromStr for Lsn {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Lsn, ParseError> {
        let half = |part: &str| {
            let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
            digits
                .then(|| u32::from_str_radix(part, 16).ok())
                .flatten()
                .map(u64::from)
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Lsn(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| ParseError::new("an LSN", text, "two hexadecimal numbers like 0/2000028"))
    }
}

serde_as_text!(Lsn);

impl Add<u64> for Lsn {
    type Output = Lsn;

    fn add(self, bytes: u64) -> Lsn {
        self.saturating_add(bytes)
    }
}

impl Sub<u64> for Lsn {
    type Output = Lsn;

    fn sub(self, bytes: u64) -> Lsn {
        self.saturating_sub(bytes)
    }
}

/// WAL bytes from `start` up to, not including, `end`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize,
)]
pub struct LsnRange {
    /// The first byte.
    pub start: Lsn,
    /// One past the last byte. A range whose end is not after its start is empty.
    pub end: Lsn,
}

impl LsnRange {
    /// `[start, end)`.
    pub fn new(start: Lsn, end: Lsn) -> LsnRange {
        LsnRange { start, end }
    }

    /// Bytes in the range.
    pub fn len(&self) -> u64 {
        self.end.distance_from(self.start)
    }

    /// True if there is no byte in the range.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    /// True if the byte at `lsn` is in the range.
    pub fn contains(&self, lsn: Lsn) -> bool {
        self.start <= lsn && lsn < self.end
    }

    /// True if every byte of `other` is in this range; an empty range is in every range.
    pub fn contains_range(&self, other: LsnRange) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// The bytes that both ranges have, or `None` if there are none.
    pub fn intersect(&self, other: LsnRange) -> Option<LsnRange> {
        let both = LsnRange {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        };
        (!both.is_empty()).then_some(both)
    }
}

impl fmt::Display for LsnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("[{}, {})", self.start, self.end))
    }
}

/// The size of one WAL segment: a power of two from 1 MiB to 1 GiB, fixed at `initdb`
/// (PostgreSQL: `IsValidWalSegSize` in `access/xlog_internal.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// 16 MiB, what `initdb` chooses unless told otherwise.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);
    const EXPECTED: &str = "a power of two from 1MB to 1GB";

    /// A segment size in bytes.
    pub fn new(bytes: u64) -> Result<SegmentSize, ParseError> {
        u32::try_from(bytes)
            .ok()
            .filter(|size| size.is_power_of_two() && (1 << 20..=1 << 30).contains(size))
            .map(SegmentSize)
            .ok_or_else(|| ParseError::new("a WAL segment size", &bytes.to_string(), Self::EXPECTED))
    }

    /// The answer to `SHOW wal_segment_size`, like `16MB` or `1GB`.
    pub fn from_show(text: &str) -> Result<SegmentSize, ParseError> {
        let error = || ParseError::new("a WAL segment size", text, Self::EXPECTED);
        let trimmed = text.trim();
        let digits = trimmed.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match trimmed.get(digits.len()..).map(str::trim) {
            Some("" | "B") => 1,
            Some("kB") => 1 << 10,
            Some("MB") => 1 << 20,
            Some("GB") => 1 << 30,
            _ => return Err(error()),
        };
        let count: u64 = digits.parse().map_err(|_| error())?;
        SegmentSize::new(count.checked_mul(unit).ok_or_else(error)?).map_err(|_| error())
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// The first byte of the segment that holds `lsn`.
    pub fn segment_start(self, lsn: Lsn) -> Lsn {
        lsn.align_down(self.bytes())
    }

    /// One past the last byte of the segment that holds `lsn`; a boundary belongs to the segment it begins.
    pub fn segment_end(self, lsn: Lsn) -> Lsn {
        self.segment_start(lsn).saturating_add(self.bytes())
    }

    /// The number of the segment that holds `lsn`, counted from the beginning of the WAL.
    pub fn segment_number(self, lsn: Lsn) -> u64 {
        lsn.0 / self.bytes()
    }

    /// How many segments share the middle eight digits of a WAL file name
    /// (PostgreSQL: `XLogSegmentsPerXLogId`).
    pub fn segments_per_id(self) -> u64 {
        (1 << 32) / self.bytes()
    }
}

impl fmt::Display for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}MB", self.0 >> 20))
    }
}

impl serde::Serialize for SegmentSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for SegmentSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        SegmentSize::new(u64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// PostgreSQL's system identifier: one number per `initdb`, kept through its life.
///
/// Written as text in JSON: numbers above 2^53 do not survive every reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for SystemId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<SystemId, ParseError> {
        let canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        text.parse()
            .ok()
            .filter(|_| canonical)
            .map(SystemId)
            .ok_or_else(|| ParseError::new("a system identifier", text, "a decimal number of 64 bits"))
    }
}

serde_as_text!(SystemId);
