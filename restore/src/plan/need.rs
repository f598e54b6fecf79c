//! Which objects make up the segments that PostgreSQL will ask for.

use highwater_format::{
    Lsn, LsnRange, SegmentName, TimelineId,
    coverage::{Hole, Piece},
};

use super::Plan;
use crate::catalog::Catalog;

/// What makes up one WAL segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalNeed {
    /// The name PostgreSQL asks for.
    pub segment: SegmentName,
    /// The bytes of it that the archive holds and replay needs, from the segment's start; the rest is zeros.
    pub range: LsnRange,
    /// The objects, in order.
    pub pieces: Vec<WalPiece>,
}

/// One object of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalPiece {
    /// The timeline under which it is stored.
    pub timeline: TimelineId,
    /// The object.
    pub piece: Piece,
    /// The bytes taken from it.
    pub used: LsnRange,
    /// Its key.
    pub key: String,
    /// The regions that hold it, the preferred one first.
    pub regions: Vec<usize>,
}

impl Plan {
    /// The segments that PostgreSQL will ask for, in order.
    pub fn segments(&self) -> impl Iterator<Item = SegmentName> + '_ {
        let size = self.chain.segment_size;
        let step = usize::try_from(size.bytes()).unwrap_or(usize::MAX);
        (size.segment_start(self.wal.start).0..self.wal.end.0)
            .step_by(step)
            .map(|lsn| self.chain.segment_at(Lsn(lsn)))
    }

    /// The objects that make up one segment, up to the end of the archive.
    ///
    /// # Errors
    ///
    /// A [`Hole`] where the archive lacks bytes of it before [`Plan::wal_end`]; cannot happen for the segments of the plan.
    pub fn need(&self, catalog: &Catalog, segment: SegmentName) -> Result<WalNeed, Hole> {
        let whole = segment.range(self.chain.segment_size);
        let range = LsnRange::new(whole.start, whole.end.min(self.wal_end).max(whole.start));
        let pieces = self.chain.cover(range)?.into_iter().map(|source| {
            let holders = catalog.holders(source.timeline, &source.piece);
            WalPiece {
                timeline: source.timeline,
                piece: source.piece,
                used: source.used,
                key: catalog.piece_key(source.timeline, &source.piece),
                regions: self
                    .regions
                    .iter()
                    .copied()
                    .filter(|index| holders.contains(index))
                    .collect(),
            }
        });
        Ok(WalNeed {
            segment,
            range,
            pieces: pieces.collect(),
        })
    }

    /// The history files that PostgreSQL asks for: those of the chain, without the first timeline.
    #[must_use]
    pub fn histories(&self) -> Vec<TimelineId> {
        let ancestors = self.chain.history.entries.iter().map(|entry| entry.timeline);
        ancestors
            .chain([self.timeline])
            .filter(|timeline| *timeline != TimelineId::FIRST)
            .collect()
    }
}
