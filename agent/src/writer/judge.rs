//! Who may write, decided. Pure.
//!
//! Epochs order the claims; the timeline tells friend from foe. Writers on the same timeline store the same bytes
//! and are harmless to each other: should they differ after all, write-once finds it. Writers on different
//! timelines are not: one of them streams from a server that the other's has left behind.
//!
//! Rules: nobody begins another timeline than the newest claim's while that claim's side shows signs of life; and
//! whoever finds a newer claim on another timeline than its own has been left behind and stops. No clock: an
//! epoch is newer because it is higher, and life is a pulse that changes.

use std::collections::BTreeMap;

use highwater_format::{Lsn, Pulse, Time, TimelineId, Writer};

/// The order of claims. Two writers that could not see each other's region may hold the same epoch: then all agree
/// on the one with the higher timeline, or name.
pub fn rank(claim: &Writer) -> (u64, TimelineId, &str) {
    (claim.epoch, claim.timeline, &claim.instance)
}

/// What stands between an agent and a timeline that it wants to write.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Entry {
    /// Nothing: it may claim it.
    Free,
    /// This claim of another timeline: its side must first be seen to be silent.
    Ask(Writer),
}

/// Decides on `timeline`, with the newest claim of any region. `alone` says that nobody but `me` was seen to write.
pub fn entry(me: &str, timeline: TimelineId, newest: Option<&Writer>, alone: bool) -> Entry {
    match newest {
        None => Entry::Free,
        Some(claim) if claim.timeline == timeline => Entry::Free,
        Some(claim) if claim.instance == me && alone => Entry::Free,
        Some(claim) => Entry::Ask(claim.clone()),
    }
}

/// How a writer stands once it has looked at a region.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Standing {
    /// It may go on.
    Holds,
    /// This claim has taken its place.
    Fenced(Writer),
}

/// Judges the newest claim of a region against a writer's own.
pub fn standing(own: &Writer, newest: &Writer) -> Standing {
    // A claim whose creation was given up may arrive later: nobody takes its own place.
    if newest.instance == own.instance {
        return Standing::Holds;
    }
    if rank(newest) <= rank(own) || newest.timeline == own.timeline {
        Standing::Holds
    } else {
        Standing::Fenced(newest.clone())
    }
}

/// Watches pulses for signs of life from other timelines than one.
///
/// A pulse counts as alive when what the *server* says in it changes: an agent whose server is gone goes on
/// writing pulses, with the same time and place in them.
#[derive(Debug)]
pub struct Watch {
    timeline: TimelineId,
    me: String,
    seen: BTreeMap<(usize, String), (Time, Lsn)>,
}

impl Watch {
    /// Watches for others than `me` that write another timeline than `timeline`.
    pub fn new(me: &str, timeline: TimelineId) -> Self {
        Self {
            timeline,
            me: me.to_owned(),
            seen: BTreeMap::new(),
        }
    }

    /// Takes the pulse as it is in a region now. True: its writer is alive.
    pub fn observe(&mut self, region: usize, pulse: &Pulse) -> bool {
        if pulse.instance == self.me || pulse.timeline == self.timeline {
            return false;
        }
        let now = (pulse.server_time, pulse.wal_end);
        let before = self.seen.insert((region, pulse.instance.clone()), now);
        before.is_some_and(|before| before != now)
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
