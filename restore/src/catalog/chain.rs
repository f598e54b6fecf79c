//! One timeline with all its ancestors, read as the single run of WAL that PostgreSQL would replay.
//!
//! Owns: which timeline a byte is taken from, which file name PostgreSQL asks for, where the run breaks. Does not own:
//! choosing the timeline.
//!
//! PostgreSQL reads the segment that holds a switch point under the *newer* timeline's name; the bytes of that segment
//! before the switch were copied from the parent when it was promoted. So a byte before the switch may come from either
//! timeline's objects, and a byte after it from the newer one's only.
//!
//! The descent is that of the timeline's own history file, which names every ancestor with the place where it was left;
//! PostgreSQL needs no other. An ancestor's own file is often nowhere: `pg_basebackup -X stream` copies that of the
//! server's timeline and no older one, and an archive that is begun on such a server never gets it. Where it is there,
//! it must tell the same.

use highwater_format::{
    History, Lsn, LsnRange, SegmentName, SegmentSize, TimelineId,
    coverage::{Coverage, Hole, Piece},
};

use super::{Catalog, descent};

/// A timeline, its ancestors and what the archive holds of them.
#[derive(Debug, Clone)]
pub struct Chain {
    /// The line of descent.
    pub history: History,
    /// Of the lineage.
    pub segment_size: SegmentSize,
    /// Oldest first; the last one is the timeline itself.
    legs: Vec<Leg>,
}

/// The part that one timeline contributes.
#[derive(Debug, Clone)]
struct Leg {
    timeline: TimelineId,
    /// From where it began to where the chain left it.
    range: LsnRange,
    coverage: Coverage,
}

/// One object and what is taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The timeline under whose keys the object lies.
    pub timeline: TimelineId,
    /// The object.
    pub piece: Piece,
    /// The bytes taken from it.
    pub used: LsnRange,
}

/// The descent of a timeline is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokenChain {
    /// The timeline's own history file is not there.
    #[error("the history file of timeline {missing} is not in any readable region")]
    HistoryMissing {
        /// The timeline whose history file is wanted.
        missing: TimelineId,
    },
    /// Two history files tell different stories.
    #[error("the history of timeline {timeline} contradicts that of its ancestor {ancestor}")]
    Contradiction {
        /// The timeline asked for.
        timeline: TimelineId,
        /// The ancestor.
        ancestor: TimelineId,
    },
}

impl Chain {
    pub(super) fn build(
        catalog: &Catalog,
        timeline: TimelineId,
        regions: &[usize],
    ) -> Result<Self, BrokenChain> {
        let history = catalog
            .history(timeline)
            .ok_or(BrokenChain::HistoryMissing { missing: timeline })?;
        for (position, entry) in history.entries.iter().enumerate() {
            let ancestor = entry.timeline;
            let Some(own) = catalog.history(ancestor) else {
                continue;
            };
            let before = history.entries.get(..position).unwrap_or_default();
            let same = descent(&own).eq(before.iter().map(|entry| (entry.timeline, entry.switch)));
            if !same {
                return Err(BrokenChain::Contradiction { timeline, ancestor });
            }
        }
        let ancestors = history.entries.iter().map(|entry| entry.timeline);
        let leg = |timeline| Leg {
            timeline,
            range: history
                .range_of(timeline)
                .unwrap_or(LsnRange::new(Lsn::ZERO, Lsn::ZERO)),
            coverage: catalog.coverage(timeline, regions),
        };
        let legs = ancestors.chain([timeline]).map(leg).collect();
        Ok(Self {
            history,
            segment_size: catalog.identity.segment_size,
            legs,
        })
    }

    /// The timeline that the chain leads to.
    #[must_use]
    pub fn timeline(&self) -> TimelineId {
        self.history.timeline
    }

    /// Whether a timeline is part of the chain at that LSN: a backup of it can serve as a base.
    #[must_use]
    pub fn holds(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.history
            .range_of(timeline)
            .is_some_and(|range| range.start <= lsn && lsn <= range.end)
    }

    /// The end of the unbroken WAL that begins at `from`; `from` itself if that byte is missing.
    #[must_use]
    pub fn contiguous_end(&self, from: Lsn) -> Lsn {
        let mut end = from;
        while let Some(source) = self.source_at(end) {
            end = source.used.end;
        }
        end
    }

    /// The end of the newest byte that there is anywhere on the chain.
    #[must_use]
    pub fn end(&self) -> Option<Lsn> {
        self.legs.iter().rev().find_map(|leg| {
            let end = leg.coverage.end()?.min(leg.range.end);
            (end > leg.range.start).then_some(end)
        })
    }

    /// The objects that hold `range`, in order, and what is taken from each.
    ///
    /// # Errors
    ///
    /// The first [`Hole`].
    pub fn cover(&self, range: LsnRange) -> Result<Vec<Source>, Hole> {
        let mut sources = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some(mut source) = self.source_at(at) else {
                return Err(Hole(LsnRange::new(at, self.next_start(at).min(range.end))));
            };
            source.used.end = source.used.end.min(range.end);
            at = source.used.end;
            sources.push(source);
        }
        Ok(sources)
    }

    /// The name under which PostgreSQL asks for the segment that holds `lsn`.
    #[must_use]
    pub fn segment_at(&self, lsn: Lsn) -> SegmentName {
        let end = self.segment_size.segment_end(lsn);
        let newest = self.legs.iter().rev().find(|leg| leg.range.start < end);
        SegmentName::of(
            newest.map_or(self.timeline(), |leg| leg.timeline),
            lsn,
            self.segment_size,
        )
    }

    /// The object that holds the byte at `at` and reaches furthest. Within the segment of a switch point the newer
    /// timeline's copy of the parent's bytes counts too.
    fn source_at(&self, at: Lsn) -> Option<Source> {
        let mut best: Option<Source> = None;
        for leg in &self.legs {
            let copied = self.segment_size.segment_start(leg.range.start);
            if at < copied || at >= leg.range.end {
                continue;
            }
            let Some((piece, until)) = leg.coverage.furthest(at) else {
                continue;
            };
            let used = LsnRange::new(at, until.min(leg.range.end));
            if best.as_ref().is_none_or(|best| used.end > best.used.end) {
                best = Some(Source {
                    timeline: leg.timeline,
                    piece: *piece,
                    used,
                });
            }
        }
        best
    }

    /// What is missing from `at` on: up to the next byte that is held, or to `end` if there is none.
    #[must_use]
    pub fn hole_at(&self, at: Lsn, end: Lsn) -> LsnRange {
        let next = self.next_start(at);
        LsnRange::new(at, if next == Lsn::MAX { end } else { next })
    }

    /// Where the next byte after `at` is held.
    fn next_start(&self, at: Lsn) -> Lsn {
        let starts = self.legs.iter().filter_map(|leg| {
            let from = at.max(self.segment_size.segment_start(leg.range.start));
            let run = leg.coverage.runs().into_iter().find(|run| run.end > from)?;
            let start = run.start.max(from);
            (start < leg.range.end).then_some(start)
        });
        starts.min().unwrap_or(Lsn::MAX)
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
