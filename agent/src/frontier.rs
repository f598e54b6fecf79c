//! What "durable" means: the only maker of a [`DurableLsn`], and so the only thing that can move the slot.
//!
//! Owns the position of every region and the policy. A region's position is the end of its own gap-free
//! prefix; the durable position is the one that as many regions have reached as the policy asks for.
//! It never moves back. No I/O, no clock.
//!
//! What a position promises: the region holds every byte from where it joined up to it. It joined at or before
//! what PostgreSQL had been told by then ([`crate::backfill::origin`]), so every byte that is acknowledged later
//! is in the region when it counts. It does not promise what was acknowledged before the region was added, nor
//! that nobody removes objects afterwards: what lies before is compared and filled behind it ([`crate::heal`]),
//! and until that is done status, metrics and log say what the region lacks.
//!
//! Invariant (I1): at every moment `durable <= Q(positions)`; a region that has not been read yet counts
//! as holding nothing.

use std::fmt;

use highwater_config::Policy;
use highwater_format::{History, Lsn, TimelineId};

/// A place in a lineage: how far on which timeline. Child timelines have larger ids than their parents,
/// so the order of the fields is the order of history.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Position {
    /// Timeline.
    pub timeline: TimelineId,
    /// End of what is held on it.
    pub lsn: Lsn,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on timeline {}", self.lsn, self.timeline)
    }
}

/// A position that as many regions hold as the policy asks for. Only [`Frontier`] makes one.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct DurableLsn(Position);

impl DurableLsn {
    /// The position itself.
    pub fn position(self) -> Position {
        self.0
    }

    /// The flush LSN that may be reported on a stream whose timeline has this history.
    ///
    /// Regions that are still on an ancestor hold the common history, at most up to where it was left; of a
    /// timeline that is no ancestor, or a newer one, nothing may be said.
    pub fn reportable(self, history: &History) -> Lsn {
        if self.0.timeline == history.timeline {
            return self.0.lsn;
        }
        history
            .switch_of(self.0.timeline)
            .map_or(Lsn::ZERO, |switch| self.0.lsn.min(switch))
    }
}

/// Every region's position, and what the policy makes of them.
#[derive(Debug)]
pub struct Frontier {
    needed: usize,
    positions: Vec<Option<Position>>,
    durable: Option<DurableLsn>,
}

impl Frontier {
    /// A frontier over `regions` regions of which none has been read.
    pub fn new(policy: Policy, regions: usize) -> Self {
        Self {
            needed: policy.needed(regions).max(1),
            positions: vec![None; regions],
            durable: None,
        }
    }

    /// Notes that `region` holds everything before `at`. Returns the durable position if it moved.
    pub fn stored(&mut self, region: usize, at: Position) -> Option<DurableLsn> {
        let slot = self.positions.get_mut(region)?;
        if slot.is_some_and(|held| held >= at) {
            return None;
        }
        *slot = Some(at);
        let reached = self.quorum()?;
        if self.durable.is_some_and(|durable| durable.0 >= reached) {
            return None;
        }
        self.durable = Some(DurableLsn(reached));
        self.durable
    }

    /// The durable position; none before enough regions were read.
    pub fn durable(&self) -> Option<DurableLsn> {
        self.durable
    }

    /// A region's own position; none before it was read.
    pub fn position(&self, region: usize) -> Option<Position> {
        self.positions.get(region).copied().flatten()
    }

    /// The furthest position of any region.
    pub fn furthest(&self) -> Option<Position> {
        self.positions.iter().copied().flatten().max()
    }

    /// The position that at least `needed` regions have reached.
    fn quorum(&self) -> Option<Position> {
        let mut held: Vec<Position> = self.positions.iter().copied().flatten().collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        held.get(self.needed.checked_sub(1)?).copied()
    }
}

#[cfg(test)]
#[path = "frontier_tests.rs"]
mod tests;
