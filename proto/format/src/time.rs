//! Moments, to the microsecond, as PostgreSQL counts them.
//!
//! Owns: the conversion between Unix time, PostgreSQL's epoch and RFC 3339. Does not own: what time it is
//! now. Nothing in this crate reads a clock.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::ParseError;
use crate::text::serde_as_text;

/// Microseconds from 1970-01-01 to 2000-01-01 UTC, PostgreSQL's `POSTGRES_EPOCH_JDATE`.
const PG_EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;

/// A moment in UTC: microseconds since 1970-01-01, between the years -9999 and 9999.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(i64);

impl Time {
    /// The earliest moment that can be written as text.
    pub const MIN: Time = Time(-377_705_023_201_000_000);
    /// The latest moment that can be written as text: 9999-12-30T22:00:00Z.
    pub const MAX: Time = Time(253_402_207_200_000_000);
    /// 1970-01-01T00:00:00Z.
    pub const UNIX_EPOCH: Time = Time(0);

    /// Microseconds since 1970-01-01 UTC, held within [`Time::MIN`] and [`Time::MAX`].
    pub fn from_unix_micros(micros: i64) -> Time {
        Time(micros.clamp(Self::MIN.0, Self::MAX.0))
    }

    /// Microseconds since 1970-01-01 UTC.
    pub fn unix_micros(self) -> i64 {
        self.0
    }

    /// PostgreSQL's `TimestampTz`: microseconds since 2000-01-01 UTC.
    pub fn from_pg(micros: i64) -> Time {
        Time::from_unix_micros(micros.saturating_add(PG_EPOCH_UNIX_MICROS))
    }

    /// PostgreSQL's `TimestampTz`: microseconds since 2000-01-01 UTC.
    pub fn to_pg(self) -> i64 {
        self.0.saturating_sub(PG_EPOCH_UNIX_MICROS)
    }

    /// Later by `duration`, at most [`Time::MAX`].
    pub fn saturating_add(self, duration: Duration) -> Time {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Time::from_unix_micros(self.0.saturating_add(micros))
    }

    /// Earlier by `duration`, at least [`Time::MIN`].
    pub fn saturating_sub(self, duration: Duration) -> Time {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Time::from_unix_micros(self.0.saturating_sub(micros))
    }

    /// How long ago `earlier` was; zero if it is not earlier.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// `20261120T145653Z`: to the second, rounded down, without characters that keys or file names dislike.
    pub fn compact(self) -> String {
        let at = self.civil();
        format!(
            "{:04}{:02}{:02}T{:02}{:02}{:02}Z",
            at.year(),
            at.month(),
            at.day(),
            at.hour(),
            at.minute(),
            at.second()
        )
    }

    fn civil(self) -> jiff::civil::DateTime {
        // MIN and MAX are jiff's own bounds, so the fallback is unreachable.
        let timestamp = jiff::Timestamp::from_microsecond(self.0).unwrap_or_default();
        jiff::tz::Offset::UTC.to_datetime(timestamp)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timestamp = jiff::Timestamp::from_microsecond(self.0).unwrap_or_default();
        f.pad(&format!("{timestamp:.6}"))
    }
}

impl FromStr for Time {
    type Err = ParseError;

    /// Reads RFC 3339 with an explicit zone; digits beyond the microsecond are dropped (rounded down).
    fn from_str(text: &str) -> Result<Time, ParseError> {
        let expected = "a time with its zone like 2026-11-20T14:56:53.123456Z or 2026-11-20T15:56:53+01:00";
        // RFC 9557 adds the name of a zone in brackets, and jiff would ignore one that contradicts the offset.
        let parsed = Some(text.trim()).filter(|text| !text.contains('['));
        let timestamp: jiff::Timestamp = parsed
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| ParseError::new("a time", text, expected))?;
        let micros = timestamp.as_nanosecond().div_euclid(1000);
        i64::try_from(micros)
            .map(Time::from_unix_micros)
            .map_err(|_| ParseError::new("a time", text, expected))
    }
}

serde_as_text!(Time);
