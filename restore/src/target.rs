//! What the operator asked for, checked as far as it can be without looking at an archive.
//!
//! Owns: the target's forms and which of them contradict each other. Does not own: whether it can be reached (`plan`).

use std::{fmt, str::FromStr, time::Duration};

use highwater_format::{BackupId, Lsn, Time, TimelineId};

use crate::clock::Clock;

/// A target this far ahead of the local clock cannot be a clock that is a little slow.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(600);

/// The point to which WAL is replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The end of the archive.
    Latest,
    /// The last transaction that ended at or before that moment.
    Time(Time),
    /// The record at that position.
    Lsn(Lsn),
    /// That transaction's end.
    Xid(u32),
    /// The restore point of that name.
    Name(String),
    /// The earliest consistent state: the end of a base backup.
    Immediate,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("the end of the archive"),
            Self::Time(time) => write!(f, "time {time}"),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Name(name) => write!(f, "restore point \"{name}\""),
            Self::Immediate => f.write_str("the end of the base backup"),
        }
    }
}

/// What PostgreSQL does when it has reached the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Action {
    /// Open for reading and writing on a new timeline.
    #[default]
    Promote,
    /// Stay read-only at the target.
    Pause,
    /// Stop the server at the target.
    Shutdown,
}

impl Action {
    /// PostgreSQL's word for it, as in `recovery_target_action`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Pause => "pause",
            Self::Shutdown => "shutdown",
        }
    }
}

impl FromStr for Action {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        match text {
            "promote" => Ok(Self::Promote),
            "pause" => Ok(Self::Pause),
            "shutdown" => Ok(Self::Shutdown),
            other => Err(TargetError::new(format!(
                "`{other}` is not an action; use promote, pause or shutdown"
            ))),
        }
    }
}

/// Everything asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The point.
    pub target: Target,
    /// Stop just before the point instead of just after it.
    pub exclusive: bool,
    /// The timeline to end on; the latest when not given (`plan::timeline` has the rule).
    pub timeline: Option<TimelineId>,
    /// What happens at the target.
    pub action: Action,
    /// The backup to start from; the best one when not given.
    pub backup: Option<BackupId>,
}

impl Request {
    /// The end of the archive on its latest timeline.
    #[must_use]
    pub fn latest() -> Self {
        Self {
            target: Target::Latest,
            exclusive: false,
            timeline: None,
            action: Action::Promote,
            backup: None,
        }
    }

    /// A request for `target` with everything else at its default.
    #[must_use]
    pub fn to(target: Target) -> Self {
        Self {
            target,
            ..Self::latest()
        }
    }
}

/// The target's flags as they were typed.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// `--to-latest`.
    pub latest: bool,
    /// `--to-time`.
    pub time: Option<String>,
    /// `--to-lsn`.
    pub lsn: Option<String>,
    /// `--to-xid`.
    pub xid: Option<String>,
    /// `--to-name`.
    pub name: Option<String>,
    /// `--to-immediate`.
    pub immediate: bool,
    /// `--exclusive`.
    pub exclusive: bool,
    /// `--timeline`.
    pub timeline: Option<String>,
    /// `--action`.
    pub action: Option<String>,
    /// `--backup`.
    pub backup: Option<String>,
}

/// The target makes no sense; nothing was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TargetError {
    message: String,
}

impl TargetError {
    fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
        }
    }
}

impl Asked {
    /// The request these flags make.
    ///
    /// # Errors
    ///
    /// What cannot be read, what contradicts, and a time in the future, each with what to write instead.
    pub fn request(&self, clock: &Clock) -> Result<Request, TargetError> {
        let target = self.target(clock)?;
        self.check_exclusive(&target)?;
        let action = self.action.as_deref().map_or(Ok(Action::default()), str::parse)?;
        if target == Target::Latest && action != Action::Promote {
            return Err(TargetError::new(format!(
                "--action {} needs a target: at the end of the archive PostgreSQL always promotes; \
                 give --to-lsn, --to-time or another target, or leave out --action",
                action.as_str()
            )));
        }
        Ok(Request {
            target,
            exclusive: self.exclusive,
            timeline: self.timeline.as_deref().map(parse_timeline).transpose()?,
            action,
            backup: self.backup.as_deref().map(parse_backup).transpose()?,
        })
    }

    fn target(&self, clock: &Clock) -> Result<Target, TargetError> {
        let mut given: Vec<(&str, Target)> = Vec::new();
        if self.latest {
            given.push(("--to-latest", Target::Latest));
        }
        if let Some(text) = &self.time {
            given.push(("--to-time", Target::Time(parse_time(text, clock)?)));
        }
        if let Some(text) = &self.lsn {
            given.push(("--to-lsn", Target::Lsn(parse_lsn(text)?)));
        }
        if let Some(text) = &self.xid {
            given.push(("--to-xid", Target::Xid(parse_xid(text)?)));
        }
        if let Some(text) = &self.name {
            given.push(("--to-name", Target::Name(parse_name(text)?)));
        }
        if self.immediate {
            given.push(("--to-immediate", Target::Immediate));
        }
        let mut given = given.into_iter();
        match (given.next(), given.next()) {
            (None, _) => Ok(Target::Latest),
            (Some((_, target)), None) => Ok(target),
            (Some((first, _)), Some((second, _))) => Err(TargetError::new(format!(
                "{first} and {second} contradict each other: recovery has one target; leave one of them out"
            ))),
        }
    }

    fn check_exclusive(&self, target: &Target) -> Result<(), TargetError> {
        let without = match target {
            Target::Latest => "--to-latest",
            Target::Name(_) => "--to-name",
            Target::Immediate => "--to-immediate",
            Target::Time(_) | Target::Lsn(_) | Target::Xid(_) => return Ok(()),
        };
        if !self.exclusive {
            return Ok(());
        }
        let message =
            format!("--exclusive means nothing with {without}; it goes with --to-time, --to-lsn or --to-xid");
        Err(TargetError::new(message))
    }
}

/// The moment as of which the buckets are read.
///
/// # Errors
///
/// What is no time with a zone, and what lies in the future.
pub fn parse_as_of(text: &str, clock: &Clock) -> Result<Time, TargetError> {
    let time = parse_zoned(text)?;
    let now = clock.now();
    if time > now.saturating_add(CLOCK_TOLERANCE) {
        return Err(TargetError::new(format!(
            "--as-of {time} lies in the future (it is {now} now); leave it out to read the archive as it is"
        )));
    }
    Ok(time)
}

fn parse_zoned(text: &str) -> Result<Time, TargetError> {
    text.parse().map_err(|_| {
        let text = text.trim();
        let zoned = format!("{}Z", text.replacen(' ', "T", 1));
        if zoned.parse::<Time>().is_ok() {
            return TargetError::new(format!(
                "the time `{text}` has no zone, and the hosts involved may be in different ones; \
                 write `{zoned}` if you mean UTC, or give the offset as in `{}+02:00`",
                zoned.trim_end_matches('Z')
            ));
        }
        TargetError::new(format!(
            "`{text}` is not a time; write it in RFC 3339 with its zone, \
             as in 2026-11-20T14:56:53Z or 2026-11-20T15:56:53.25+01:00"
        ))
    })
}

fn parse_time(text: &str, clock: &Clock) -> Result<Time, TargetError> {
    let time = parse_zoned(text)?;
    let now = clock.now();
    if time > now.saturating_add(CLOCK_TOLERANCE) {
        return Err(TargetError::new(format!(
            "the target time {time} lies in the future (it is {now} now); use --to-latest for everything there is"
        )));
    }
    Ok(time)
}

fn parse_lsn(text: &str) -> Result<Lsn, TargetError> {
    let lsn: Lsn = text.trim().parse().map_err(|_| {
        TargetError::new(format!(
            "`{text}` is not an LSN; write it as PostgreSQL does: two hexadecimal numbers with a slash, as in 0/16B3748"
        ))
    })?;
    if lsn == Lsn::ZERO {
        return Err(TargetError::new(
            "0/0 is not a place in the WAL; it is what PostgreSQL prints for \"unknown\"",
        ));
    }
    Ok(lsn)
}

fn parse_xid(text: &str) -> Result<u32, TargetError> {
    let wide: u64 = text.trim().parse().map_err(|_| {
        TargetError::new(format!(
            "`{text}` is not a transaction id; write the number that txid_current() or a log line shows"
        ))
    })?;
    // txid_current() and pg_current_xact_id() put the epoch into the upper half; WAL holds the lower one.
    let xid = u32::try_from(wide & u64::from(u32::MAX)).unwrap_or_default();
    if xid < 3 {
        return Err(TargetError::new(format!(
            "{text} is no transaction: ids from 3 on belong to transactions"
        )));
    }
    Ok(xid)
}

/// The length that `pg_create_restore_point()` accepts: `MAXFNAMELEN` in `access/xlog_internal.h`, less the NUL.
const MAX_NAME: usize = 63;

fn parse_name(text: &str) -> Result<String, TargetError> {
    if text.is_empty() {
        return Err(TargetError::new(
            "--to-name is empty; an unset shell variable? give the name of a restore point",
        ));
    }
    if text.len() > MAX_NAME {
        let message = format!(
            "the name of a restore point has at most {MAX_NAME} bytes; this one has {}",
            text.len()
        );
        return Err(TargetError::new(message));
    }
    Ok(text.to_owned())
}

fn parse_timeline(text: &str) -> Result<TimelineId, TargetError> {
    let number: Option<TimelineId> = text.trim().parse().ok();
    number.ok_or_else(|| {
        TargetError::new(format!(
            "`{text}` is not a timeline; write its number in decimal, from 1"
        ))
    })
}

fn parse_backup(text: &str) -> Result<BackupId, TargetError> {
    text.trim().parse().map_err(|_| {
        TargetError::new(format!(
            "`{text}` is not a backup id; `highwater-restore list` prints them, as in \
             00000001-0000000002000028-20261120T145653Z"
        ))
    })
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
