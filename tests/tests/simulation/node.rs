//! The PostgreSQL server as far as a receiver can tell: timelines, a slot, what WAL it still has.
//!
//! Pure: no I/O, no time. The bytes are in the [`Version`]s; a node says which of them it is on.

use crate::rng::Rng;
use crate::wal::{Cut, Version};

pub(crate) const SLOT: &str = "highwater";

/// A timeline that a node has left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Ancestor {
    pub(crate) timeline: u32,
    /// Number of its [`Version`].
    pub(crate) version: usize,
    /// The first LSN that is not on it any more.
    pub(crate) switch: u64,
}

/// The line of descent that a stream or a restore follows: ancestors, and the timeline itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Line {
    pub(crate) ancestors: Vec<Ancestor>,
    pub(crate) timeline: u32,
    pub(crate) version: usize,
}

impl Line {
    /// The version that the line takes a timeline's bytes from, and how far.
    pub(crate) fn part(&self, timeline: u32) -> Option<(usize, u64)> {
        if timeline == self.timeline {
            return Some((self.version, u64::MAX));
        }
        let ancestor = self.ancestors.iter().find(|at| at.timeline == timeline)?;
        Some((ancestor.version, ancestor.switch))
    }

    /// Every version that the line takes bytes from, and how far.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (usize, u64)> {
        let ancestors = self.ancestors.iter().map(|at| (at.version, at.switch));
        ancestors.chain([(self.version, u64::MAX)])
    }

    /// The same line, left at `timeline`, which goes on without end.
    pub(crate) fn up_to(&self, timeline: u32) -> Option<Line> {
        if timeline == self.timeline {
            return Some(self.clone());
        }
        let place = self.ancestors.iter().position(|at| at.timeline == timeline)?;
        Some(Line {
            ancestors: self.ancestors[..place].to_vec(),
            timeline,
            version: self.ancestors[place].version,
        })
    }

    /// The timeline that follows `timeline`, and where.
    pub(crate) fn after(&self, timeline: u32) -> Option<(u32, u64)> {
        let place = self.ancestors.iter().position(|at| at.timeline == timeline)?;
        let next = self
            .ancestors
            .get(place + 1)
            .map_or(self.timeline, |at| at.timeline);
        Some((next, self.ancestors[place].switch))
    }

    /// Where `timeline` left the one before it; 0 for the first.
    pub(crate) fn begins(&self, timeline: u32) -> u64 {
        let place = self.ancestors.iter().position(|at| at.timeline == timeline);
        let before = place.unwrap_or(self.ancestors.len()).checked_sub(1);
        before.map_or(0, |before| self.ancestors[before].switch)
    }

    /// A history file's content.
    pub(crate) fn history(&self) -> Vec<u8> {
        let line = |at: &Ancestor| {
            let (high, low) = (at.switch >> 32, at.switch & 0xffff_ffff);
            format!(
                "{}\t{high:X}/{low:X}\tno recovery target specified\n",
                at.timeline
            )
        };
        self.ancestors.iter().map(line).collect::<String>().into_bytes()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) line: Line,
    /// WAL before this is gone.
    pub(crate) kept_from: u64,
    /// None: no such slot. Some(None): it keeps nothing.
    pub(crate) slot: Option<Option<u64>>,
    /// What of the slot is on disk: a crash goes back to it.
    pub(crate) saved_slot: Option<Option<u64>>,
    /// Where a new slot would begin.
    pub(crate) checkpoint: u64,
    /// `wal_keep_size`, in segments.
    pub(crate) keep: u64,
}

impl Node {
    pub(crate) fn new(version: usize, timeline: u32, start: u64, keep: u64) -> Self {
        Self {
            line: Line {
                ancestors: Vec::new(),
                timeline,
                version,
            },
            kept_from: start,
            slot: None,
            saved_slot: None,
            checkpoint: start,
            keep,
        }
    }

    pub(crate) fn create_slot(&mut self) {
        self.slot = Some(Some(self.checkpoint));
        self.saved_slot = self.slot;
    }

    /// A checkpoint at `end`: the slot is saved, and WAL that nobody keeps is removed, but for a little.
    pub(crate) fn checkpoint(&mut self, end: u64, segment: u64) {
        self.checkpoint = end;
        self.saved_slot = self.slot;
        let kept_anyway = end.saturating_sub(self.keep * segment);
        let needed = self.slot.flatten().unwrap_or(end).min(kept_anyway);
        self.kept_from = self.kept_from.max(needed - needed % segment);
    }

    pub(crate) fn drop_slot(&mut self) {
        self.slot = None;
        self.saved_slot = None;
    }

    /// Somebody makes the slot anew: at the present position, or so that it keeps nothing.
    pub(crate) fn replace_slot(&mut self, keeps: Option<u64>) {
        self.slot = Some(keeps);
        self.saved_slot = self.slot;
    }

    /// The server process dies and starts again.
    pub(crate) fn crash(&mut self) {
        self.slot = self.saved_slot;
    }

    /// Promotion of this node, or of a standby that had received everything up to `cut`. Returns the version that the new
    /// timeline begins with.
    pub(crate) fn promote(
        &mut self,
        versions: &[Version],
        cut: Cut,
        timeline: u32,
        rng: &mut Rng,
    ) -> Version {
        let old = self.line.version;
        self.line.ancestors.push(Ancestor {
            timeline: self.line.timeline,
            version: old,
            switch: cut.at,
        });
        self.line.timeline = timeline;
        self.line.version = versions.len();
        self.checkpoint = self.checkpoint.min(cut.at);
        versions[old].branch(timeline, cut, rng)
    }
}
