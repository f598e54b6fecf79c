//! Timelines and their history: which timeline holds an LSN.
//!
//! Owns: timeline ids and the reading of history files. Does not own: the history file's bytes, which the
//! archive keeps verbatim; they are never written from a parsed value.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use crate::error::ParseError;
use crate::lsn::{Lsn, LsnRange};

/// PostgreSQL's timeline: a number from 1 that rises at every promotion and point-in-time recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct TimelineId(NonZeroU32);

impl TimelineId {
    /// Where every cluster begins. It has no history file.
    pub const FIRST: TimelineId = TimelineId(NonZeroU32::MIN);

    /// A timeline by its number; there is no timeline 0.
    pub fn new(number: u32) -> Option<TimelineId> {
        NonZeroU32::new(number).map(TimelineId)
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// Eight hexadecimal digits: the form in WAL file names and keys.
    pub fn hex8(self) -> String {
        format!("{:08X}", self.get())
    }

    /// Reads the form of [`TimelineId::hex8`], and no other.
    pub fn from_hex8(text: &str) -> Option<TimelineId> {
        let number = crate::text::fixed_hex(text, 8)?;
        u32::try_from(number).ok().and_then(TimelineId::new)
    }

    /// The next higher number, if there is one.
    pub fn next(self) -> Option<TimelineId> {
        self.0.checked_add(1).map(TimelineId)
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for TimelineId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<TimelineId, ParseError> {
        let number = text
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse().ok())
            .flatten();
        number
            .and_then(TimelineId::new)
            .ok_or_else(|| ParseError::new("a timeline", text, "a decimal number from 1"))
    }
}

/// One ancestor of a timeline: its WAL counts up to `switch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The ancestor.
    pub timeline: TimelineId,
    /// The first LSN that no longer belongs to the ancestor.
    pub switch: Lsn,
    /// PostgreSQL's free text ("no recovery target specified").
    pub reason: String,
}

/// The line of descent of one timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// The timeline the history is of.
    pub timeline: TimelineId,
    /// Its ancestors, oldest first, with rising numbers and switch points that never go back.
    pub entries: Vec<HistoryEntry>,
}

/// A line of a history file that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the history file of timeline {timeline} is not usable: {problem}")]
pub struct HistoryError {
    /// The timeline whose history was read.
    pub timeline: TimelineId,
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: String,
}

impl History {
    /// The history of a timeline without ancestors.
    pub fn root(timeline: TimelineId) -> History {
        History {
            timeline,
            entries: Vec::new(),
        }
    }

    /// Reads a history file as PostgreSQL does (`readTimeLineHistory` in `access/transam/timeline.c`):
    /// comments and blank lines are skipped, any white space separates, numbers must rise.
    pub fn parse(timeline: TimelineId, content: &[u8]) -> Result<History, HistoryError> {
        let mut history = History::root(timeline);
        let text = String::from_utf8_lossy(content);
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let entry = parse_line(line)
                .and_then(|entry| history.check_follows(&entry).map(|()| entry))
                .map_err(|problem| HistoryError {
                    timeline,
                    line: index + 1,
                    problem,
                })?;
            history.entries.push(entry);
        }
        Ok(history)
    }

    fn check_follows(&self, entry: &HistoryEntry) -> Result<(), String> {
        if entry.timeline >= self.timeline {
            return Err(format!("timeline {} is not an ancestor's number", entry.timeline));
        }
        match self.entries.last() {
            Some(last) if entry.timeline <= last.timeline => Err(format!(
                "timeline {} follows timeline {}",
                entry.timeline, last.timeline
            )),
            Some(last) if entry.switch < last.switch => {
                Err(format!("switch point {} follows {}", entry.switch, last.switch))
            }
            _ => Ok(()),
        }
    }

    /// The timeline whose WAL holds the byte at `lsn`; a switch point belongs to the child.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.entries
            .iter()
            .find(|entry| lsn < entry.switch)
            .map_or(self.timeline, |entry| entry.timeline)
    }

    /// Where this line of descent left `timeline`; `None` for the timeline itself and for strangers.
    pub fn switch_of(&self, timeline: TimelineId) -> Option<Lsn> {
        self.entries
            .iter()
            .find(|entry| entry.timeline == timeline)
            .map(|entry| entry.switch)
    }

    /// Where `timeline` begins in this line of descent (`0/0` for the first); `None` for strangers.
    pub fn begin_of(&self, timeline: TimelineId) -> Option<Lsn> {
        let index = match self.entries.iter().position(|entry| entry.timeline == timeline) {
            Some(index) => index,
            None if timeline == self.timeline => self.entries.len(),
            None => return None,
        };
        Some(
            index
                .checked_sub(1)
                .and_then(|i| self.entries.get(i))
                .map_or(Lsn::ZERO, |entry| entry.switch),
        )
    }

    /// What this line of descent takes from `timeline`; the last one is open (up to [`Lsn::MAX`]).
    pub fn range_of(&self, timeline: TimelineId) -> Option<LsnRange> {
        let start = self.begin_of(timeline)?;
        Some(LsnRange::new(start, self.switch_of(timeline).unwrap_or(Lsn::MAX)))
    }

    /// True if `timeline` is this one or an ancestor.
    pub fn contains(&self, timeline: TimelineId) -> bool {
        timeline == self.timeline || self.switch_of(timeline).is_some()
    }

    /// The direct parent; `None` for a timeline without ancestors.
    pub fn parent(&self) -> Option<&HistoryEntry> {
        self.entries.last()
    }
}

fn parse_line(line: &str) -> Result<HistoryEntry, String> {
    let (number, rest) = split_word(line);
    let (switch, reason) = split_word(rest);
    let timeline = number.parse::<TimelineId>().map_err(|error| error.to_string())?;
    let switch = switch.parse::<Lsn>().map_err(|error| error.to_string())?;
    Ok(HistoryEntry {
        timeline,
        switch,
        reason: reason.to_owned(),
    })
}

fn split_word(text: &str) -> (&str, &str) {
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    (word, rest.trim_start())
}
