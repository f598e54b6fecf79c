//! What a region lacks, and in which order it is filled. Pure.
//!
//! Owns the comparison of listings, slice by slice, and the order of repair. Holes recorded on purpose come first: no
//! WAL is stored beyond a gap that the region does not know of. Then from the newest base backup to the oldest: the
//! WAL from its start on in LSN order, and the base backup itself. So a region that is filled can restore the
//! present state as early as possible, and the past bit by bit.
//!
//! What lies before the oldest visible base backup is needed by nobody and not copied. What lies beyond the
//! region's own position is the uploader's business.
//!
//! Of what a slice lists only this is kept: the unbroken runs, and the objects that fill a hole, of those the first ones
//! in the order of repair. So memory does not grow with the archive.

use std::collections::{BTreeMap, BTreeSet};

use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::{BackupId, Lsn, LsnRange, TimelineId};

use super::listing::Base;
use crate::frontier::Position;

/// One timeline in one region.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wal {
    /// What is covered, in order; what touches is one run.
    pub(crate) runs: Vec<LsnRange>,
    /// Holes recorded on purpose.
    pub(crate) gaps: Vec<LsnRange>,
}

/// Everything that matters of one region.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    /// WAL by timeline.
    pub(crate) wal: BTreeMap<TimelineId, Wal>,
    /// Base backups.
    pub(crate) backups: BTreeMap<BackupId, Base>,
}

/// One thing to be done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// Copy a gap record from that peer.
    Gap(TimelineId, LsnRange, usize),
    /// Copy a piece of WAL from that peer.
    Wal(TimelineId, Piece, usize),
    /// Complete a base backup.
    Backup(BackupId),
}

/// The answer.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Lack {
    /// In the order of repair.
    pub(crate) steps: Vec<Step>,
    /// WAL that is missing.
    pub(crate) wal: Vec<(TimelineId, LsnRange)>,
    /// Base backups that are not complete here.
    pub(crate) backups: Vec<BackupId>,
    /// There are more steps than these, which come first.
    pub(crate) more: bool,
}

impl Lack {
    /// Nothing is missing.
    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.wal.is_empty()
    }

    /// Missing bytes of WAL.
    pub(crate) fn wal_bytes(&self) -> u64 {
        self.wal.iter().map(|(_, range)| range.len()).sum()
    }
}

/// Where the WAL that any base backup needs begins; none while there is no base backup.
pub(crate) fn oldest_start<'a>(all: impl Iterator<Item = &'a Held>) -> Option<Position> {
    visible(all).first().map(start_of)
}

impl Wal {
    /// Adds what the next slice covers.
    pub(crate) fn add(&mut self, held: &Coverage, slice: LsnRange) {
        for run in held.runs() {
            if let Some(run) = run.intersect(slice) {
                join(&mut self.runs, run);
            }
        }
    }

    /// The same as a coverage, in which a run is a piece.
    pub(crate) fn coverage(&self) -> Coverage {
        covering(self.runs.iter().copied())
    }
}

/// Ranges as a coverage.
pub(crate) fn covering(ranges: impl IntoIterator<Item = LsnRange>) -> Coverage {
    let piece = |range| Piece {
        range,
        kind: PieceKind::Tail,
        size: 0,
    };
    ranges.into_iter().map(piece).collect()
}

/// Adds the range that follows.
fn join(ranges: &mut Vec<LsnRange>, next: LsnRange) {
    match ranges.last_mut() {
        Some(last) if last.end >= next.start => last.end = last.end.max(next.end),
        _ => ranges.push(next),
    }
}

/// Where a piece stands in the order of repair: how many base backups are newer than the newest that needs it, then its
/// place in the WAL.
type Order = (usize, TimelineId, Lsn, Lsn);

/// A comparison with other regions, fed with slices in LSN order.
#[derive(Debug)]
pub(crate) struct Comparison {
    position: Position,
    /// The base backups that are visible anywhere, the newest first.
    backups: Vec<BackupId>,
    /// Most pieces that are remembered.
    limit: usize,
    /// By the peer that fills them.
    holes: BTreeMap<(usize, TimelineId), Vec<LsnRange>>,
    pieces: BTreeMap<Order, (Piece, usize)>,
    /// The first piece that was one too many.
    cut: Option<Order>,
}

impl Comparison {
    /// Of a region at `position` with its peers, of which the base backups are known.
    pub(crate) fn new<'a>(all: impl Iterator<Item = &'a Held>, position: Position, limit: usize) -> Self {
        let mut backups = visible(all);
        backups.reverse();
        Self {
            position,
            backups,
            limit,
            holes: BTreeMap::new(),
            pieces: BTreeMap::new(),
            cut: None,
        }
    }

    /// What `slice` of a timeline holds here and in each peer that could be listed.
    pub(crate) fn slice(
        &mut self,
        timeline: TimelineId,
        slice: LsnRange,
        ours: Coverage,
        theirs: &[(usize, Coverage)],
    ) {
        let within = within(timeline, self.position).and_then(|within| within.intersect(slice));
        let Some(within) = within else {
            return;
        };
        let mut covered = ours;
        for (peer, theirs) in theirs {
            let (holes, pieces) = holes(&covered, theirs, within);
            for hole in holes {
                join(self.holes.entry((*peer, timeline)).or_default(), hole);
            }
            for piece in &pieces {
                self.remember(timeline, *piece, *peer);
            }
            covered.extend(pieces);
        }
    }

    fn remember(&mut self, timeline: TimelineId, piece: Piece, peer: usize) {
        let end = end_of(timeline, &piece);
        let newer = self.backups.partition_point(|id| start_of(id) >= end);
        if newer == self.backups.len() && newer > 0 {
            return;
        }
        let order = (newer, timeline, piece.range.start, piece.range.end);
        self.pieces.entry(order).or_insert((piece, peer));
        if self.pieces.len() > self.limit
            && let Some((last, _)) = self.pieces.pop_last()
        {
            self.cut = Some(self.cut.map_or(last, |cut| cut.min(last)));
        }
    }

    /// What was found, when all slices are in.
    pub(crate) fn finish(self, ours: &Held, peers: &[Held]) -> Lack {
        let holes = self.holes.into_iter();
        let mut lack = Lack {
            steps: gap_steps(ours, peers, self.position),
            wal: holes
                .flat_map(|((_, timeline), holes)| holes.into_iter().map(move |hole| (timeline, hole)))
                .collect(),
            backups: Vec::new(),
            more: self.cut.is_some(),
        };
        let mut pieces = self.pieces.into_iter().peekable();
        let wal_step =
            |((_, timeline, ..), (piece, peer)): (Order, (Piece, usize))| Step::Wal(timeline, piece, peer);
        for (newer, id) in self.backups.into_iter().enumerate() {
            while let Some(next) = pieces.next_if(|(order, _)| order.0 == newer) {
                lack.steps.push(wal_step(next));
            }
            if peers.iter().any(|peer| adds_to(ours, peer, &id)) {
                // It comes after all of its WAL.
                if self.cut.is_none_or(|cut| cut.0 > newer) {
                    lack.steps.push(Step::Backup(id.clone()));
                }
                lack.backups.push(id);
            }
        }
        lack.steps.extend(pieces.map(wal_step));
        lack
    }
}

fn gap_steps(ours: &Held, peers: &[Held], position: Position) -> Vec<Step> {
    let mut steps = Vec::new();
    for (peer, theirs) in peers.iter().enumerate() {
        for (timeline, wal) in &theirs.wal {
            let here = ours.wal.get(timeline);
            let Some(within) = within(*timeline, position) else {
                continue;
            };
            for gap in wal.gaps.iter().filter(|gap| gap.start <= within.end) {
                let is_it =
                    |step: &Step| matches!(step, Step::Gap(of, range, _) if of == timeline && range == gap);
                let known = here.is_some_and(|here| here.gaps.contains(gap)) || steps.iter().any(is_it);
                if !known {
                    steps.push(Step::Gap(*timeline, *gap, peer));
                }
            }
        }
    }
    steps
}

/// What `before` covered and `now` does not, from `floor` on: something has removed it.
pub(crate) fn lost(
    before: &BTreeMap<TimelineId, Vec<LsnRange>>,
    now: &Held,
    floor: Option<Position>,
) -> Vec<(TimelineId, LsnRange)> {
    let holes = before.iter().flat_map(|(timeline, runs)| {
        let now = now.wal.get(timeline).map(Wal::coverage).unwrap_or_default();
        let from = floor.map_or(Lsn::ZERO, |floor| match floor.timeline.cmp(timeline) {
            std::cmp::Ordering::Less => Lsn::ZERO,
            std::cmp::Ordering::Equal => floor.lsn,
            std::cmp::Ordering::Greater => Lsn::MAX,
        });
        let kept = runs
            .iter()
            .map(move |run| LsnRange::new(run.start.max(from), run.end));
        kept.filter(|run| !run.is_empty())
            .flat_map(move |run| now.holes(run))
            .map(|hole| (*timeline, hole))
    });
    holes.collect()
}

/// Pieces with the same key and another size: the same WAL sealed differently, or other WAL.
pub(crate) fn doubtful(ours: &[Piece], theirs: &[Piece]) -> Vec<Piece> {
    let key = |piece: &Piece| (piece.range.start, piece.range.end, piece.kind);
    let sizes: BTreeMap<(Lsn, Lsn, PieceKind), u64> =
        theirs.iter().map(|piece| (key(piece), piece.size)).collect();
    let differs = |piece: &&Piece| sizes.get(&key(piece)).is_some_and(|size| *size != piece.size);
    ours.iter().filter(differs).copied().collect()
}

/// The base backups that are visible anywhere, by where they start.
fn visible<'a>(all: impl Iterator<Item = &'a Held>) -> Vec<BackupId> {
    let ids = all.flat_map(|held| held.backups.iter().filter(|(_, base)| base.visible));
    let ids: BTreeSet<(Position, BackupId)> = ids.map(|(id, _)| (start_of(id), id.clone())).collect();
    ids.into_iter().map(|(_, id)| id).collect()
}

fn start_of(id: &BackupId) -> Position {
    Position {
        timeline: id.timeline(),
        lsn: id.start_lsn(),
    }
}

fn end_of(timeline: TimelineId, piece: &Piece) -> Position {
    Position {
        timeline,
        lsn: piece.range.end,
    }
}

/// Whether `peer`, where the base backup is visible, has an object of it that is not here.
fn adds_to(ours: &Held, peer: &Held, id: &BackupId) -> bool {
    let Some(theirs) = peer.backups.get(id).filter(|base| base.visible) else {
        return false;
    };
    let nothing = Base::default();
    let ours = ours.backups.get(id).unwrap_or(&nothing);
    !ours.visible
        || (theirs.manifest && !ours.manifest)
        || theirs.packs.keys().any(|number| !ours.packs.contains_key(number))
}

/// The part of `timeline` that lies before `position`.
fn within(timeline: TimelineId, position: Position) -> Option<LsnRange> {
    let end = match timeline.cmp(&position.timeline) {
        std::cmp::Ordering::Less => Lsn::MAX,
        std::cmp::Ordering::Equal => position.lsn,
        std::cmp::Ordering::Greater => return None,
    };
    Some(LsnRange::new(Lsn::ZERO, end))
}

/// The parts of `within` that `theirs` covers and `ours` does not, and their fewest pieces that fill them.
fn holes(ours: &Coverage, theirs: &Coverage, within: LsnRange) -> (Vec<LsnRange>, Vec<Piece>) {
    let (mut holes, mut pieces): (Vec<LsnRange>, Vec<Piece>) = (Vec::new(), Vec::new());
    for run in theirs.runs() {
        let Some(run) = run.intersect(within).filter(|run| !run.is_empty()) else {
            continue;
        };
        for hole in ours.holes(run) {
            let chosen = theirs.cover(hole).unwrap_or_default();
            for piece in chosen {
                if pieces.last() != Some(&piece) {
                    pieces.push(piece);
                }
            }
            holes.push(hole);
        }
    }
    (holes, pieces)
}

#[cfg(test)]
#[path = "lack_tests.rs"]
mod tests;
