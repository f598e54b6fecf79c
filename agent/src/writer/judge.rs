//! Who may write, decided. Pure.
//!
//! Epochs order the claims; the timeline tells friend from foe. What a standby sends is what its primary sent, and its agent
//! is harmless on the timeline of the newest claim. A primary has one agent: another one on the same timeline streams from
//! a copy of the server, which goes on differently, and on another timeline from one that the other's has left behind, or that
//! was promoted for a test. Two promotions that took the same number are different timelines, told apart by where they began.
//!
//! Rules: beside a primary nobody begins to write while anybody else shows signs of life; whoever finds a newer claim on a later timeline
//! than its own, or on another one of its number, has been left behind and stops; whoever finds one on its own or an earlier
//! timeline stops once anybody else shows signs of life.
//! No clock: an epoch is newer because it is higher, and life is a pulse that changes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use highwater_format::{History, Lsn, Pulse, Time, TimelineId, Writer};

/// The order of claims. Two writers that could not see each other's region may hold the same epoch: then all agree
/// on the one with the higher timeline, or name.
pub fn rank(claim: &Writer) -> (u64, TimelineId, &str) {
    (claim.epoch, claim.timeline, &claim.instance)
}

/// One timeline, told apart from another promotion of the same number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Line {
    /// Its number.
    pub timeline: TimelineId,
    /// Where it left its parent; `0/0` if it has none.
    pub begins: Lsn,
}

impl Line {
    /// The timeline that a server's history is of.
    pub fn of(history: &History) -> Self {
        Self {
            timeline: history.timeline,
            begins: history.begin_of(history.timeline).unwrap_or(Lsn::ZERO),
        }
    }

    /// Whether a claim is of this timeline.
    pub fn is_of(self, claim: &Writer) -> bool {
        claim.timeline == self.timeline && claim.begins.is_none_or(|begins| begins == self.begins)
    }
}

/// What stands between an agent and a timeline that it wants to write.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Entry {
    /// Nothing: it may claim it.
    Free,
    /// This claim of another timeline: its side must first be seen to be silent.
    Ask(Writer),
}

/// Who asks, beside the newest claim.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Asking<'a> {
    /// The name of the process.
    pub me: &'a str,
    /// It is beside a standby.
    pub standby: bool,
    /// Nobody but itself was seen to write.
    pub alone: bool,
    /// The process of the newest claim is known to have ended.
    pub gone: bool,
}

/// Decides on `line`, with the newest claim of any region.
pub fn entry(asking: Asking<'_>, line: Line, newest: Option<&Writer>) -> Entry {
    let Some(claim) = newest else {
        return Entry::Free;
    };
    let own = claim.instance == asking.me;
    let free = match line.is_of(claim) {
        true => own || asking.standby || asking.gone,
        false => own && asking.alone,
    };
    if free {
        Entry::Free
    } else {
        Entry::Ask(claim.clone())
    }
}

/// How a writer stands once it has looked at a region.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Standing {
    /// It may go on, as far as claims say.
    Holds,
    /// Another process has made this claim after it, of its own timeline or of one that came before. It may be long dead:
    /// a region that was away when this writer claimed still has it. Only one may go on if both live.
    Beside(Writer),
    /// This claim has taken its place: its server has been left behind.
    Fenced(Writer),
}

/// The epoch to claim anew where the newest claim is a stray one of `own`'s process, whose creation was given up and
/// took effect all the same: others would take it for what is written.
pub fn above_a_stray(own: &Writer, newest: &Writer) -> Option<u64> {
    (newest.instance == own.instance && newest.epoch > own.epoch).then_some(newest.epoch + 1)
}

/// Judges the newest claim of a region against a writer's own.
pub fn standing(own: &Writer, newest: &Writer) -> Standing {
    // A claim whose creation was given up may arrive later: nobody takes its own place.
    if newest.instance == own.instance {
        return Standing::Holds;
    }
    let line = Line {
        timeline: own.timeline,
        begins: own.begins.or(newest.begins).unwrap_or(Lsn::ZERO),
    };
    if rank(newest) <= rank(own) {
        Standing::Holds
    } else if line.is_of(newest) || newest.timeline < own.timeline {
        Standing::Beside(newest.clone())
    } else {
        Standing::Fenced(newest.clone())
    }
}

/// Watches pulses for signs of life from one rival, and from everybody else who is no companion.
///
/// A sign of life is what the *server* says in a pulse, on its stream or beside it: an agent whose server is gone goes on writing
/// pulses, with the same times and place in them. One change proves nothing: in a failover the last words of the dead primary
/// are still on their way. Two do.
#[derive(Debug)]
pub struct Watch {
    companions: Option<TimelineId>,
    me: String,
    rival: String,
    /// The longest that anybody who is watched lets pass between two pulses, as they say.
    longest: Option<Duration>,
    /// Regions that were looked at: who appears in one later was not there before.
    looked_at: BTreeSet<usize>,
    seen: BTreeMap<(usize, String), Seen>,
    beats: bool,
}

#[derive(Debug)]
struct Seen {
    said: (Time, Lsn, Option<Time>),
    sequence: u64,
    changes: u32,
}

/// What a pulse says about its writer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sign {
    /// Nothing new, or nothing that matters here.
    None,
    /// Something new; it may have been the last.
    Changed,
    /// Its server is alive.
    Alive,
}

/// What `pulse.interval` allows: more is not believed.
const INTERVALS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// Changes that prove life.
const PROOF: u32 = 2;

fn declared(millis: u64) -> Duration {
    let (least, most) = INTERVALS;
    Duration::from_millis(millis).clamp(least, most)
}

/// How long the writer of a pulse lets pass until the next one; `otherwise` if it does not say.
pub fn interval(pulse: &Pulse, otherwise: Duration) -> Duration {
    pulse.interval_ms.map_or(otherwise, declared)
}

/// The same of who made a claim, which may have written no pulse yet.
pub fn interval_of(claim: &Writer) -> Option<Duration> {
    claim.interval_ms.map(declared)
}

impl Watch {
    /// Watches for others than `me`. Who writes the timeline `companions` is none of them, unless it is `rival`: beside a standby
    /// those are its primary's. Beside a primary there are no companions.
    pub fn new(me: &str, companions: Option<TimelineId>, rival: &Writer) -> Self {
        Self {
            companions,
            me: me.to_owned(),
            rival: rival.instance.clone(),
            longest: interval_of(rival),
            looked_at: BTreeSet::new(),
            seen: BTreeMap::new(),
            beats: false,
        }
    }

    /// Whether some agent that is watched was seen to go on, whatever became of its server.
    pub fn beats(&self) -> bool {
        self.beats
    }

    /// How often those who are watched show that they live; `otherwise` where they do not say.
    pub fn interval(&self, otherwise: Duration) -> Duration {
        self.longest.unwrap_or(otherwise)
    }

    /// Takes the pulse as it is in a region now. `otherwise` is the interval of a writer that does not say.
    pub fn observe(&mut self, region: usize, pulse: Option<&Pulse>, otherwise: Duration) -> Sign {
        let first_look = self.looked_at.insert(region);
        let Some(pulse) = pulse else {
            return Sign::None;
        };
        let companion = Some(pulse.timeline) == self.companions && pulse.instance != self.rival;
        if pulse.instance == self.me || companion {
            return Sign::None;
        }
        self.longest = self.longest.max(Some(interval(pulse, otherwise)));
        let now = Seen {
            said: (pulse.server_time, pulse.wal_end, pulse.answered_at),
            sequence: pulse.sequence,
            changes: 0,
        };
        let key = (region, pulse.instance.clone());
        let changes = match self.seen.get(&key) {
            // It was not there at the first look.
            None => {
                self.beats |= !first_look;
                u32::from(!first_look)
            }
            Some(seen) => {
                self.beats |= seen.sequence != now.sequence;
                seen.changes + u32::from(seen.said != now.said)
            }
        };
        let before = self.seen.insert(key, Seen { changes, ..now });
        match changes == before.map_or(0, |seen| seen.changes) {
            true => Sign::None,
            false if changes < PROOF => Sign::Changed,
            false => Sign::Alive,
        }
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
