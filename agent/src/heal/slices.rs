//! Comparing what the regions list, a slice at a time.
//!
//! Owns: walking through the same part of each region's listing together. An archive only grows, and all healers
//! start when the agent does: what is held of the listings must not grow with it.
//! Does not own: what follows from a slice (`lack`), nor how a region is listed (`listing`).
//!
//! A slice ends where an object begins, so that what one region lacks is found as if all were compared at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use highwater_format::coverage::{Coverage, Piece};
use highwater_format::{Lsn, LsnRange, TimelineId};

use super::lack::{self, Comparison, Held, Lack};
use super::listing::Cursor;
use super::{Healer, Outcome};
use crate::agree;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::inventory::{gaps, piece_key, timelines};
use crate::region::Region;
use crate::segmenter::object_start;

/// Objects that are listed at once of each region: about 10 MiB while they are compared.
const SLICE: usize = 32 << 10;

/// Objects that are remembered to be copied, about 5 MiB, before everything is compared again.
const STEPS: usize = 32 << 10;

/// Objects of one key and different sizes that are read per comparison.
const DOUBTS: usize = 8;

/// An object of one key and different sizes.
#[derive(Debug)]
pub(super) struct Doubt {
    pub(super) peer: usize,
    pub(super) timeline: TimelineId,
    pub(super) piece: Piece,
    pub(super) key: String,
}

impl Doubt {
    /// By which it is remembered when it is settled.
    pub(super) fn name(&self, peer: &Region) -> String {
        format!("{} {}", peer.name, self.key)
    }
}

/// What came of a comparison.
#[derive(Debug)]
pub(super) struct Compared {
    /// The regions that could be asked, in the order of `theirs`.
    pub(super) peers: Vec<Arc<Region>>,
    pub(super) ours: Held,
    pub(super) theirs: Vec<Held>,
    pub(super) lack: Lack,
    /// A few that are not settled yet.
    pub(super) doubts: Vec<Doubt>,
}

impl Healer {
    /// Lists this region and those others that can be read, and compares them.
    pub(super) async fn compare(&self, position: Position, outcome: &mut Outcome) -> Result<Compared> {
        self.compare_by(position, outcome, SLICE, STEPS).await
    }

    pub(super) async fn compare_by(
        &self,
        position: Position,
        outcome: &mut Outcome,
        slice: usize,
        steps: usize,
    ) -> Result<Compared> {
        let ours = Held {
            backups: self.listing().backups(&*self.region.quick).await?,
            wal: BTreeMap::new(),
        };
        let (mut peers, mut theirs) = (Vec::new(), Vec::new());
        for peer in agree::peers(&self.shared, &self.region) {
            match self.listing().backups(&*peer.quick).await {
                Ok(backups) => {
                    peers.push(peer);
                    theirs.push(Held {
                        backups,
                        wal: BTreeMap::new(),
                    });
                }
                Err(error) => self.unreadable(&peer, &error, outcome),
            }
        }
        outcome.partial |= peers.len() + 1 < self.shared.archive.regions.len();
        let floor = lack::oldest_start(std::iter::once(&ours).chain(&theirs));
        let comparison = Comparison::new(std::iter::once(&ours).chain(&theirs), position, steps);
        let mut walk = Walk {
            healer: self,
            outcome,
            slice,
            floor,
            peers: &peers,
            silent: BTreeSet::new(),
            ours,
            theirs,
            comparison,
            doubts: Vec::new(),
        };
        walk.run().await?;
        let Walk {
            ours,
            theirs,
            comparison,
            doubts,
            ..
        } = walk;
        let lack = comparison.finish(&ours, &theirs);
        Ok(Compared {
            peers,
            ours,
            theirs,
            lack,
            doubts,
        })
    }

    fn unreadable(&self, peer: &Region, error: &AgentError, outcome: &mut Outcome) {
        outcome.partial = true;
        tracing::warn!(region = self.region.name, with = peer.name, %error, "the regions could not be compared");
    }
}

/// A comparison under way.
struct Walk<'a> {
    healer: &'a Healer,
    outcome: &'a mut Outcome,
    slice: usize,
    /// Before it nothing is needed.
    floor: Option<Position>,
    peers: &'a [Arc<Region>],
    /// Peers that have failed.
    silent: BTreeSet<usize>,
    ours: Held,
    theirs: Vec<Held>,
    comparison: Comparison,
    doubts: Vec<Doubt>,
}

impl Walk<'_> {
    async fn run(&mut self) -> Result<()> {
        let (layout, peers) = (&self.healer.shared.archive.layout, self.peers);
        let here: BTreeSet<_> = timelines(&*self.healer.region.quick, layout)
            .await?
            .into_iter()
            .collect();
        let (mut there, mut all) = (Vec::new(), here.clone());
        for (number, peer) in peers.iter().enumerate() {
            let found = timelines(&*peer.quick, layout).await;
            let found: BTreeSet<_> = self
                .or_silent(number, found)
                .unwrap_or_default()
                .into_iter()
                .collect();
            all.extend(&found);
            there.push(found);
        }
        for timeline in all {
            let from = match self.floor {
                Some(floor) if floor.timeline > timeline => continue,
                Some(floor) if floor.timeline == timeline => floor.lsn,
                _ => Lsn::ZERO,
            };
            let holders = there
                .iter()
                .map(|found| found.contains(&timeline))
                .collect::<Vec<_>>();
            self.timeline(timeline, from, here.contains(&timeline), &holders)
                .await?;
        }
        Ok(())
    }

    /// The answer of a peer; none if it is an error, after which it is not asked again.
    fn or_silent<T>(&mut self, peer: usize, answer: Result<T>) -> Option<T> {
        match answer {
            Ok(answer) => Some(answer),
            Err(error) => {
                if let Some(region) = self.peers.get(peer) {
                    self.healer.unreadable(region, &error, self.outcome);
                }
                self.silent.insert(peer);
                None
            }
        }
    }

    async fn timeline(&mut self, timeline: TimelineId, from: Lsn, here: bool, there: &[bool]) -> Result<()> {
        let (healer, peers, slice) = (self.healer, self.peers, self.slice);
        let (listing, layout) = (healer.listing(), &healer.shared.archive.layout);
        let mut at = object_start(listing.size, from);
        let cursor = |store| Cursor::new(listing, store, timeline, at);
        let mut ours = here.then(|| cursor(&*healer.region.quick));
        let mut theirs = Vec::new();
        for (number, peer) in peers.iter().enumerate() {
            let listed = there.get(number).is_some_and(|listed| *listed) && !self.silent.contains(&number);
            theirs.push(listed.then(|| cursor(&*peer.quick)));
        }
        while at < Lsn::MAX {
            let mut until = Lsn::MAX;
            if let Some(ours) = &mut ours {
                until = ours.look(at, slice).await?;
            }
            for (number, side) in theirs.iter_mut().enumerate() {
                let Some(theirs) = side else { continue };
                let answer = theirs.look(at, slice).await;
                match self.or_silent(number, answer) {
                    Some(end) => until = until.min(end),
                    None => *side = None,
                }
            }
            if until <= at {
                return Err(AgentError::Bug(format!("a listing of {timeline} stays at {at}")));
            }
            self.compare_slice(timeline, LsnRange::new(at, until), ours.as_mut(), &mut theirs);
            at = until;
        }
        // After the WAL: what lies behind a gap comes after its record.
        if here {
            self.ours.wal.entry(timeline).or_default().gaps =
                gaps(&*healer.region.quick, layout, timeline).await?;
        }
        for (number, peer) in peers.iter().enumerate() {
            if theirs.get(number).is_none_or(Option::is_none) {
                continue;
            }
            let recorded = gaps(&*peer.quick, layout, timeline).await;
            if let Some(recorded) = self.or_silent(number, recorded)
                && let Some(held) = self.theirs.get_mut(number)
            {
                held.wal.entry(timeline).or_default().gaps = recorded;
            }
        }
        Ok(())
    }

    fn compare_slice(
        &mut self,
        timeline: TimelineId,
        slice: LsnRange,
        ours: Option<&mut Cursor<'_>>,
        theirs: &mut [Option<Cursor<'_>>],
    ) {
        let pieces = ours.map(|ours| ours.take(slice.end)).unwrap_or_default();
        let held: Coverage = pieces.iter().copied().collect();
        self.ours.wal.entry(timeline).or_default().add(&held, slice);
        let mut sides = Vec::new();
        for (number, side) in theirs.iter_mut().enumerate() {
            let Some(side) = side else { continue };
            let their_pieces = side.take(slice.end);
            self.doubt(number, timeline, &pieces, &their_pieces);
            let coverage: Coverage = their_pieces.into_iter().collect();
            if let Some(held) = self.theirs.get_mut(number) {
                held.wal.entry(timeline).or_default().add(&coverage, slice);
            }
            sides.push((number, coverage));
        }
        self.comparison.slice(timeline, slice, held, &sides);
    }

    /// Remembers a few objects that differ in size.
    fn doubt(&mut self, peer: usize, timeline: TimelineId, ours: &[Piece], theirs: &[Piece]) {
        let archive = &self.healer.shared.archive;
        let Some(region) = self.peers.get(peer) else {
            return;
        };
        for piece in lack::doubtful(ours, theirs) {
            if self.doubts.len() >= DOUBTS {
                return;
            }
            let doubt = Doubt {
                peer,
                timeline,
                piece,
                key: piece_key(&archive.layout, self.healer.shared.segment_size, timeline, &piece),
            };
            let known = |other: &Doubt| (other.peer, &other.key) == (peer, &doubt.key);
            if !self.healer.settled.contains(&doubt.name(region)) && !self.doubts.iter().any(known) {
                self.doubts.push(doubt);
            }
        }
    }
}

#[cfg(test)]
#[path = "slices_tests.rs"]
mod tests;
