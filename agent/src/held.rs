//! What a region holds of one timeline when recorded gaps count: its WAL, and the holes that are known for good.
//!
//! Owns: which stretches follow each other without an *unexplained* hole, and what to copy so that another region
//! gets there too. Pure. Does not own: the WAL's own coverage (`highwater_format::coverage`), which is what counts
//! wherever bytes are needed: to compare, to assemble a segment, to publish a base backup.
//!
//! Invariant (I5): a hole is stepped over only where the region itself holds the record of it. Where WAL covers part
//! of a gap, the WAL counts.

use highwater_format::coverage::{Coverage, Hole, Piece};
use highwater_format::{Lsn, LsnRange};

/// One thing to copy, in order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// An object of WAL.
    Wal(Piece),
    /// The record of a gap; its range names it.
    Gap(LsnRange),
}

impl Part {
    /// What it covers.
    pub fn range(&self) -> LsnRange {
        match self {
            Self::Wal(piece) => piece.range,
            Self::Gap(range) => *range,
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Held {
    wal: Coverage,
    /// By start.
    gaps: Vec<LsnRange>,
}

impl Held {
    /// The WAL and the recorded gaps of one timeline, in any order.
    pub fn new(wal: Coverage, mut gaps: Vec<LsnRange>) -> Self {
        gaps.retain(|gap| !gap.is_empty());
        gaps.sort_by_key(|gap| (gap.start, gap.end));
        Self { wal, gaps }
    }

    /// The end of what follows `from` without an unexplained hole; `from` itself when nothing does.
    pub fn contiguous_end(&self, from: Lsn) -> Lsn {
        let mut end = self.wal.contiguous_end(from);
        while let Some(gap) = self.gap_at(end) {
            end = self.wal.contiguous_end(gap.end);
        }
        end
    }

    /// What to copy, in order, so that `range` is held elsewhere as it is here.
    ///
    /// # Errors
    /// The first [`Hole`] that no record explains.
    pub fn parts(&self, range: LsnRange) -> Result<Vec<Part>, Hole> {
        let mut parts = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = self.wal.contiguous_end(at).min(range.end);
            if end > at {
                let pieces = self.wal.cover(LsnRange { start: at, end })?;
                parts.extend(pieces.into_iter().map(Part::Wal));
                at = end;
                continue;
            }
            let Some(gap) = self.gap_at(at) else {
                let until = self.next_start(at).min(range.end);
                return Err(Hole(LsnRange {
                    start: at,
                    end: until,
                }));
            };
            parts.push(Part::Gap(gap));
            at = gap.end;
        }
        Ok(parts)
    }

    /// The stretches without an unexplained hole, in order, each of which holds some WAL. Gap records alone
    /// make one only where there is no WAL at all.
    pub fn runs(&self) -> Vec<LsnRange> {
        let mut ranges: Vec<(LsnRange, bool)> = self.wal.runs().into_iter().map(|run| (run, true)).collect();
        ranges.extend(self.gaps.iter().map(|gap| (*gap, false)));
        ranges.sort_by_key(|(range, _)| (range.start, range.end));
        let mut merged: Vec<(LsnRange, bool)> = Vec::new();
        for (range, wal) in ranges {
            match merged.last_mut() {
                Some((run, has_wal)) if run.end >= range.start => {
                    run.end = run.end.max(range.end);
                    *has_wal |= wal;
                }
                _ => merged.push((range, wal)),
            }
        }
        let any = merged.iter().any(|(_, wal)| *wal);
        merged
            .into_iter()
            .filter(|(_, wal)| *wal || !any)
            .map(|(run, _)| run)
            .collect()
    }

    /// The recorded gap that holds `at` and reaches furthest.
    fn gap_at(&self, at: Lsn) -> Option<LsnRange> {
        self.gaps
            .iter()
            .filter(|gap| gap.contains(at))
            .max_by_key(|gap| gap.end)
            .copied()
    }

    /// Where the next WAL or recorded gap behind `at` begins; the largest LSN if there is none.
    pub fn next_start(&self, at: Lsn) -> Lsn {
        let wal = self.wal.runs().into_iter().map(|run| run.start);
        let starts = wal.chain(self.gaps.iter().map(|gap| gap.start));
        starts.filter(|start| *start > at).min().unwrap_or(Lsn::MAX)
    }
}

#[cfg(test)]
#[path = "held_tests.rs"]
mod tests;
