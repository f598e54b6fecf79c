//! Where to stream from: what the archive holds against what the server says. Pure.
//!
//! The archive, not the slot, knows where to resume. The stream begins at the start of the object that
//! holds the archive's end, so that its bytes can be compared with what the server sends now.

use highwater_format::{History, Lsn, SegmentSize, TimelineId};

use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::segmenter::object_start;

/// What the server says about itself.
#[derive(Clone, Debug)]
pub struct ServerView {
    /// Its timeline.
    pub timeline: TimelineId,
    /// Its end of WAL; on a standby of what it has received.
    pub end: Lsn,
    /// It is a standby, or has not finished recovery.
    pub in_recovery: bool,
    /// History of its timeline; of the first one the empty history.
    pub history: History,
    /// WAL is kept from here on for the slot; none if the slot has not reserved any, or was not looked at.
    pub slot: Option<Lsn>,
    /// What was wrong with the slot, when it had to be made just now.
    pub slot_event: Option<String>,
    /// The slot was made just now: there was none, or it kept nothing.
    pub slot_is_new: bool,
}

/// A stream to be started.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Resume {
    /// On this timeline.
    pub timeline: TimelineId,
    /// From this LSN, the start of an object.
    pub start: Lsn,
    /// What lies before it is in the archive already.
    pub sealed: Lsn,
    /// The archive's end on an older timeline that the server has left since: the history of `timeline`
    /// has to be stored after it.
    pub after: Option<Position>,
}

/// Decides where to go on. `archived` is the end of the archive; none while it holds no WAL.
pub fn resume(archived: Option<Position>, server: &ServerView, size: SegmentSize) -> Result<Resume> {
    match archived {
        None => Ok(begin(server, size)),
        Some(at) if lags(at, server) => Err(lagging(at, server.end)),
        Some(at) if at.timeline > server.timeline => Err(AgentError::refused(
            format!(
                "the archive already follows timeline {} (up to {}), the server is on timeline {}: it is an old primary that \
                 was started again, or not the cluster that was promoted",
                at.timeline, at.lsn, server.timeline
            ),
            "Nothing was stored. Point the agent at the primary of the newest timeline",
        )),
        Some(at) if at.timeline == server.timeline => go_on(at, server, size),
        Some(at) => follow(at, server, size),
    }
}

/// A standby that has not yet received what the archive holds: that is no divergence, it only has to be waited for.
fn lags(at: Position, server: &ServerView) -> bool {
    let before = at.timeline > server.timeline || (at.timeline == server.timeline && server.end < at.lsn);
    server.in_recovery && before
}

/// An empty archive begins with the WAL that the slot keeps.
fn begin(server: &ServerView, size: SegmentSize) -> Resume {
    let first = server.slot.unwrap_or(server.end);
    let timeline = server.history.timeline_at(first);
    let start = object_start(size, size.segment_start(first));
    Resume {
        timeline,
        start,
        sealed: start,
        after: None,
    }
}

fn go_on(at: Position, server: &ServerView, size: SegmentSize) -> Result<Resume> {
    if server.end < at.lsn {
        return Err(AgentError::Diverged {
            timeline: at.timeline,
            at: server.end,
            range: highwater_format::LsnRange {
                start: server.end,
                end: at.lsn,
            },
        });
    }
    Ok(Resume {
        timeline: at.timeline,
        start: object_start(size, at.lsn),
        sealed: at.lsn,
        after: None,
    })
}

/// A standby that has less than the archive gets the rest from its primary, or is promoted without it; which of the
/// two is not known yet, and neither means that histories differ.
pub fn lagging(at: Position, end: Lsn) -> AgentError {
    AgentError::Trouble {
        what: format!("the server is a standby that has WAL up to {end}; the archive ends at {at}"),
        next: "The stream goes on when the standby is that far".into(),
    }
}

/// The server was promoted since: the rest of the old timeline first, if there is any, or the next one.
fn follow(at: Position, server: &ServerView, size: SegmentSize) -> Result<Resume> {
    let Some(switch) = server.history.switch_of(at.timeline) else {
        return Err(AgentError::refused(
            format!(
                "timeline {}, which the archive follows up to {}, is not in the history of the server's timeline {}",
                at.timeline, at.lsn, server.timeline
            ),
            "Nothing was stored. Point the agent at a server that descends from the archived one",
        ));
    };
    if at.lsn < switch {
        let start = object_start(size, at.lsn);
        return Ok(Resume {
            timeline: at.timeline,
            start,
            sealed: at.lsn,
            after: None,
        });
    }
    let timeline = child_of(&server.history, at.timeline);
    let start = object_start(size, switch);
    Ok(Resume {
        timeline,
        start,
        sealed: start,
        after: Some(at),
    })
}

/// The timeline that follows `parent` in a history that contains it.
fn child_of(history: &History, parent: TimelineId) -> TimelineId {
    let mut later = history
        .entries
        .iter()
        .map(|entry| entry.timeline)
        .skip_while(|id| *id != parent)
        .skip(1);
    later.next().unwrap_or(history.timeline)
}

#[cfg(test)]
#[path = "resume_tests.rs"]
mod tests;
