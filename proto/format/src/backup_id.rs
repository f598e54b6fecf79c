//! The name of a base backup, which says where and when it began.

use std::fmt;
use std::str::FromStr;

use crate::error::ParseError;
use crate::lsn::Lsn;
use crate::text::serde_as_text;
use crate::time::Time;
use crate::timeline::TimelineId;

/// `00000001-0000000002000028-20261120T145653Z`: timeline, start LSN, server time at the start.
///
/// Ids of one timeline sort in the order of their start.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId(String);

impl BackupId {
    /// The id of a backup that starts at `start` on `timeline`; the time is kept to the second.
    pub fn new(timeline: TimelineId, start: Lsn, server_time: Time) -> BackupId {
        let time = server_time.max(Time::UNIX_EPOCH).compact();
        BackupId(format!("{}-{}-{time}", timeline.hex8(), start.hex16()))
    }

    /// Reads an id; only the form that [`BackupId::new`] makes is accepted.
    pub fn parse(text: &str) -> Result<BackupId, ParseError> {
        text.parse()
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The timeline the backup started on.
    pub fn timeline(&self) -> TimelineId {
        // Checked when the id was made.
        self.0
            .get(..8)
            .and_then(TimelineId::from_hex8)
            .unwrap_or(TimelineId::FIRST)
    }

    /// The start LSN.
    pub fn start_lsn(&self) -> Lsn {
        self.0.get(9..25).and_then(Lsn::from_hex16).unwrap_or(Lsn::ZERO)
    }

    /// The server's time at the start, to the second.
    pub fn started_at(&self) -> Time {
        self.0
            .get(26..)
            .and_then(|text| parse_compact(text).ok())
            .unwrap_or(Time::UNIX_EPOCH)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for BackupId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<BackupId, ParseError> {
        recognise(text).filter(|id| id.0 == text).ok_or_else(|| {
            ParseError::new(
                "a backup id",
                text,
                "an id like 00000001-0000000002000028-20261120T145653Z",
            )
        })
    }
}

serde_as_text!(BackupId);

fn recognise(text: &str) -> Option<BackupId> {
    let timeline = TimelineId::from_hex8(text.get(..8)?)?;
    let start = Lsn::from_hex16(text.get(9..25)?)?;
    let time = parse_compact(text.get(26..)?).ok()?;
    Some(BackupId::new(timeline, start, time))
}

/// `20261120T145653Z` is ISO 8601 in its basic form, which RFC 3339 does not know: punctuation is put back.
fn parse_compact(text: &str) -> Result<Time, ParseError> {
    let part = |from: usize, to: usize| text.get(from..to).unwrap_or("");
    let (date, hour) = (
        format!("{}-{}-{}", part(0, 4), part(4, 6), part(6, 8)),
        part(8, 11),
    );
    format!("{date}{hour}:{}:{}", part(11, 13), part(13, text.len())).parse()
}
