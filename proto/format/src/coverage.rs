//! Which bytes of one timeline the archive holds, as far as a listing of keys alone can say.
//!
//! Owns: the set of pieces (segment objects and tail chunks), which runs they form, where the holes are, and which
//! few objects to read for a range. Does not own: whether an object's content is whole (the container says that when
//! it is opened), nor why a range was excluded.
//!
//! Pieces may overlap, because two writers may cut the stream at different places; bytes that overlap are equal.
//! A piece that lies wholly inside another adds nothing and is dropped, so among the kept pieces both starts and
//! ends ascend strictly. That makes the greedy choice "the piece that reaches furthest from here" one look-up, and
//! greedy is optimal for covering a line with intervals: no cover uses fewer objects. A caller that finds a piece
//! damaged builds a new `Coverage` without it, and the pieces that it had hidden come into play.

use std::collections::BTreeMap;

use crate::lsn::{Lsn, LsnRange};

/// What sort of object a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PieceKind {
    /// One whole WAL segment.
    Segment,
    /// A sealed run of the segment that was being written.
    Tail,
}

/// One stored object: what it holds and how large it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Piece {
    /// WAL bytes that the object holds.
    pub range: LsnRange,
    /// Segment object or tail chunk; with the range and the timeline it gives the key.
    pub kind: PieceKind,
    /// Stored size in bytes, as listed.
    pub size: u64,
}

/// The first range that no piece holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no stored object holds the WAL range {0}")]
pub struct Hole(pub LsnRange);

/// The pieces of one timeline.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// By start. No piece contains another.
    pieces: BTreeMap<Lsn, Piece>,
    /// Not held, whatever the pieces say.
    excluded: Vec<LsnRange>,
}

impl Coverage {
    /// Nothing stored.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a piece. An empty range changes nothing.
    pub fn insert(&mut self, piece: Piece) {
        if piece.range.start >= piece.range.end || self.makes_superfluous(&piece) {
            return;
        }
        while let Some((&start, after)) = self.pieces.range(piece.range.start..).next() {
            if after.range.end > piece.range.end {
                break;
            }
            self.pieces.remove(&start);
        }
        self.pieces.insert(piece.range.start, piece);
    }

    /// Counts `range` as not held, whatever pieces there are or come.
    pub fn exclude(&mut self, range: LsnRange) {
        if !range.is_empty() && !self.excluded.contains(&range) {
            self.excluded.push(range);
        }
    }

    /// Whether a kept piece already holds all of this one; of two with the same range the segment object stays.
    fn makes_superfluous(&self, piece: &Piece) -> bool {
        self.pieces
            .range(..=piece.range.start)
            .next_back()
            .is_some_and(|(_, before)| {
                before.range.end >= piece.range.end
                    && (before.range != piece.range || before.kind <= piece.kind)
            })
    }

    /// The piece that holds the byte at `at` and reaches furthest, and how far it counts.
    #[must_use]
    pub fn furthest(&self, at: Lsn) -> Option<(&Piece, Lsn)> {
        let (_, piece) = self.pieces.range(..=at).next_back()?;
        let excluded = self.excluded.iter().filter(|range| range.end > at);
        let until = excluded.map(|range| range.start).min().unwrap_or(Lsn::MAX);
        (piece.range.end > at && until > at).then(|| (piece, piece.range.end.min(until)))
    }

    /// The end of the unbroken coverage that begins at `from`; `from` itself when that byte is not held.
    #[must_use]
    pub fn contiguous_end(&self, from: Lsn) -> Lsn {
        let mut end = from;
        while let Some((_, until)) = self.furthest(end) {
            end = until;
        }
        end
    }

    /// The fewest pieces that together hold `range`, in order; they may reach beyond it at both ends.
    ///
    /// # Errors
    /// [`Hole`]: the first part of `range` that nothing holds.
    pub fn cover(&self, range: LsnRange) -> Result<Vec<Piece>, Hole> {
        let mut chosen = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some((piece, until)) = self.furthest(at) else {
                return Err(Hole(LsnRange {
                    start: at,
                    end: self.next_start(at).min(range.end),
                }));
            };
            chosen.push(*piece);
            at = until;
        }
        Ok(chosen)
    }

    /// Where the first byte behind `at`, which is not held, is held again; the end of all WAL when none is.
    fn next_start(&self, mut at: Lsn) -> Lsn {
        loop {
            while let Some(range) = self.excluded.iter().find(|range| range.contains(at)) {
                at = range.end;
            }
            if self.furthest(at).is_some() {
                return at;
            }
            match self.pieces.range(at..).next() {
                Some((&start, _)) => at = start,
                None => return Lsn::MAX,
            }
        }
    }

    /// The parts of `range` that nothing holds, in order.
    #[must_use]
    pub fn holes(&self, range: LsnRange) -> Vec<LsnRange> {
        let mut holes = Vec::new();
        let mut at = self.contiguous_end(range.start);
        while at < range.end {
            let end = self.next_start(at).min(range.end);
            holes.push(LsnRange { start: at, end });
            at = self.contiguous_end(end);
        }
        holes
    }

    /// The unbroken runs, in order; pieces that touch are one run.
    #[must_use]
    pub fn runs(&self) -> Vec<LsnRange> {
        let mut runs: Vec<LsnRange> = Vec::new();
        if self.excluded.is_empty() {
            for piece in self.pieces.values() {
                match runs.last_mut() {
                    Some(run) if run.end >= piece.range.start => run.end = piece.range.end,
                    _ => runs.push(piece.range),
                }
            }
            return runs;
        }
        let mut start = self.next_start(Lsn::ZERO);
        while start < Lsn::MAX {
            let end = self.contiguous_end(start);
            runs.push(LsnRange { start, end });
            start = self.next_start(end);
        }
        runs
    }

    /// The end of the newest piece.
    #[must_use]
    pub fn end(&self) -> Option<Lsn> {
        self.pieces.values().next_back().map(|piece| piece.range.end)
    }

    /// The pieces that matter, in order: those that lie inside another are not among them.
    pub fn pieces(&self) -> impl DoubleEndedIterator<Item = &Piece> {
        self.pieces.values()
    }
}

impl Extend<Piece> for Coverage {
    fn extend<I: IntoIterator<Item = Piece>>(&mut self, pieces: I) {
        for piece in pieces {
            self.insert(piece);
        }
    }
}

impl FromIterator<Piece> for Coverage {
    fn from_iter<I: IntoIterator<Item = Piece>>(pieces: I) -> Self {
        let mut coverage = Self::new();
        coverage.extend(pieces);
        coverage
    }
}

#[cfg(test)]
#[path = "coverage_tests.rs"]
mod tests;
