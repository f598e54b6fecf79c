//! What a region lacks, and in which order it is filled. Pure.
//!
//! Owns the comparison of listings and the order of repair. Holes recorded on purpose come first: no WAL is
//! stored beyond a gap that the region does not know of. Then from the newest base backup to the oldest: the
//! WAL from its start on in LSN order, and the base backup itself. So a region that is filled can restore the
//! present state as early as possible, and the past bit by bit.
//!
//! What lies before the oldest visible base backup is needed by nobody and not copied. What lies beyond the
//! region's own position is the uploader's business.

use std::collections::{BTreeMap, BTreeSet};

use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::{BackupId, Lsn, LsnRange, TimelineId};

use super::listing::{Base, Wal};
use crate::frontier::Position;

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

/// What `ours` lacks below `position` and one of `peers` has.
pub(crate) fn compare(ours: &Held, peers: &[Held], position: Position) -> Lack {
    let mut lack = Lack::default();
    let mut missing = Vec::new();
    let mut known: BTreeMap<TimelineId, Coverage> = BTreeMap::new();
    for (peer, theirs) in peers.iter().enumerate() {
        for (timeline, wal) in &theirs.wal {
            let here = ours.wal.get(timeline);
            let Some(within) = within(*timeline, position) else {
                continue;
            };
            for gap in wal.gaps.iter().filter(|gap| gap.start <= within.end) {
                let step = Step::Gap(*timeline, *gap, peer);
                let is_it =
                    |step: &Step| matches!(step, Step::Gap(of, range, _) if of == timeline && range == gap);
                let known = here.is_some_and(|here| here.gaps.contains(gap)) || lack.steps.iter().any(is_it);
                if !known {
                    lack.steps.push(step);
                }
            }
            let covered = known
                .entry(*timeline)
                .or_insert_with(|| here.map(|here| here.coverage.clone()).unwrap_or_default());
            let (holes, pieces) = holes(covered, &wal.coverage, within);
            lack.wal.extend(holes.into_iter().map(|hole| (*timeline, hole)));
            covered.extend(pieces.iter().copied());
            missing.extend(pieces.into_iter().map(|piece| (*timeline, piece, peer)));
        }
    }
    missing.sort_by_key(|(timeline, piece, _)| (*timeline, piece.range.start, piece.range.end));
    let all = visible(std::iter::once(ours).chain(peers));
    for id in all.iter().rev() {
        let start = start_of(id);
        let later = missing
            .iter()
            .position(|(timeline, piece, _)| start < end_of(*timeline, piece));
        let newer = missing.split_off(later.unwrap_or(missing.len()));
        lack.steps.extend(newer.into_iter().map(wal_step));
        if peers.iter().any(|peer| adds_to(ours, peer, id)) {
            lack.steps.push(Step::Backup(id.clone()));
            lack.backups.push(id.clone());
        }
    }
    if all.is_empty() {
        lack.steps.extend(missing.into_iter().map(wal_step));
    }
    lack
}

/// What `before` covered and `now` does not, from `floor` on: something has removed it.
pub(crate) fn lost(
    before: &BTreeMap<TimelineId, Vec<LsnRange>>,
    now: &Held,
    floor: Option<Position>,
) -> Vec<(TimelineId, LsnRange)> {
    let nothing = Coverage::new();
    let holes = before.iter().flat_map(|(timeline, runs)| {
        let now = now.wal.get(timeline).map_or(&nothing, |wal| &wal.coverage);
        let from = floor.map_or(Lsn::ZERO, |floor| match floor.timeline.cmp(timeline) {
            std::cmp::Ordering::Less => Lsn::ZERO,
            std::cmp::Ordering::Equal => floor.lsn,
            std::cmp::Ordering::Greater => Lsn::MAX,
        });
        let kept = runs
            .iter()
            .map(move |run| LsnRange::new(run.start.max(from), run.end));
        kept.filter(|run| !run.is_empty())
            .flat_map(|run| now.holes(run))
            .map(|hole| (*timeline, hole))
    });
    holes.collect()
}

/// Pieces with the same key and another size: the same WAL sealed differently, or other WAL.
pub(crate) fn doubtful(ours: &Held, theirs: &Held) -> Vec<(TimelineId, Piece)> {
    let mut found = Vec::new();
    for (timeline, wal) in &ours.wal {
        let Some(theirs) = theirs.wal.get(timeline) else {
            continue;
        };
        let sizes: BTreeMap<(Lsn, Lsn, PieceKind), u64> = theirs
            .pieces
            .iter()
            .map(|piece| (key(piece), piece.size))
            .collect();
        let differs = |piece: &&Piece| sizes.get(&key(piece)).is_some_and(|size| *size != piece.size);
        found.extend(wal.pieces.iter().filter(differs).map(|piece| (*timeline, *piece)));
    }
    found
}

fn key(piece: &Piece) -> (Lsn, Lsn, PieceKind) {
    (piece.range.start, piece.range.end, piece.kind)
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

fn wal_step((timeline, piece, peer): (TimelineId, Piece, usize)) -> Step {
    Step::Wal(timeline, piece, peer)
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
