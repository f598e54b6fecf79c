//! What reading has taught about objects that a listing only names: some are damaged in every region that holds them.
//!
//! Owns: taking such an object out of what the regions cover, and letting in the chunks that it had hidden, so that a
//! plan made afterwards counts only what can be had. Does not own: reading (`locate`), nor what follows for a target
//! (`plan`).
//!
//! Invariant: what is damaged stays known. Bytes that were stored once are never taken for the end of the archive.

use std::fmt;

use highwater_format::{LsnRange, TimelineId, coverage::Piece};
use serde::Serialize;

use super::{Catalog, TimelineView};

/// An object of WAL that no region gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damaged {
    /// Its timeline.
    pub timeline: TimelineId,
    /// The WAL that it should hold.
    pub range: LsnRange,
    /// Its key.
    pub object: String,
    /// What is wrong with it, by region.
    pub problem: String,
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no region has a good copy of {} ({})",
            self.object, self.problem
        )
    }
}

impl Catalog {
    /// Notes that no region gives an object: nothing is planned with it any more.
    pub(crate) fn spoil(&mut self, timeline: TimelineId, piece: &Piece, problem: String) {
        let object = self.piece_key(timeline, piece);
        for region in &mut self.regions {
            if let Some(view) = region.timelines.get_mut(&timeline) {
                view.remove(piece);
            }
        }
        self.damaged.push(Damaged {
            timeline,
            range: piece.range,
            object,
            problem,
        });
    }

    /// Adds what a region lists beside what was known of it. What was found to be damaged stays out.
    pub(crate) fn uncover(
        &mut self,
        region: usize,
        timeline: TimelineId,
        pieces: impl IntoIterator<Item = Piece>,
    ) {
        let usable: Vec<Piece> = pieces
            .into_iter()
            .filter(|piece| {
                let key = self.piece_key(timeline, piece);
                !self.damaged.iter().any(|damaged| damaged.object == key)
            })
            .collect();
        if let Some(region) = self.regions.get_mut(region) {
            let view = region.timelines.entry(timeline).or_default();
            usable.into_iter().for_each(|piece| view.insert(piece));
        }
    }

    /// The damaged objects that should hold some of `range`, in words.
    #[must_use]
    pub fn damage_within(&self, range: LsnRange) -> Option<Box<str>> {
        let within = |damaged: &&Damaged| {
            damaged
                .range
                .intersect(range)
                .is_some_and(|common| !common.is_empty())
        };
        let words: Vec<String> = self
            .damaged
            .iter()
            .filter(within)
            .map(ToString::to_string)
            .collect();
        (!words.is_empty()).then(|| words.join("; ").into())
    }
}

impl TimelineView {
    fn remove(&mut self, bad: &Piece) {
        if self
            .pieces
            .remove(&(bad.range.start, bad.range.end, bad.kind))
            .is_none()
        {
            return;
        }
        let left = self.pieces.iter().map(|((start, end, kind), size)| Piece {
            range: LsnRange::new(*start, *end),
            kind: *kind,
            size: *size,
        });
        self.coverage = left.collect();
    }
}
