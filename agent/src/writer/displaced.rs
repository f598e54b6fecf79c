//! Where what lies in the regions is not what this process has stored there: because another writer had its place meanwhile, or
//! because somebody has emptied them.
//!
//! Owns: noticing it, and the error that ends the process. What this one holds in memory follows what it had stored itself; only an
//! agent that begins anew reads what lies there now, compares it with its server, and goes on behind it. One region that was emptied
//! is filled from the others ([`crate::heal`]).

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use highwater_format::Writer;
use highwater_store::ErrorKind;
use tokio::time::Instant;

use super::Claims;
use super::claim::name;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::inventory::{held, onward, timelines};
use crate::region::Region;

/// What a region lacks, as long as nobody has compared it since.
const EMPTIED: &str = "has lost this agent's claim, and perhaps all else: it is compared with the other regions now, and filled from \
                       them. Find out who removes objects";
/// Regions that were emptied within so many intervals of the pulse were emptied at once.
const LATELY: u32 = 4;

impl Claims {
    /// Another writer has taken the place, in one region or all.
    pub(super) fn note_displaced(&self) {
        self.displaced.store(true, Ordering::Relaxed);
    }

    /// May this agent store again?
    pub(super) fn begins_anew_if_displaced(&self) -> Result<()> {
        match self.displaced.load(Ordering::Relaxed) {
            true => Err(begin_anew("another writer had this agent's place for a while")),
            false => Ok(()),
        }
    }

    /// Fails if there is WAL in a region that this process has not counted there, although `rival` stores nothing any more. Some of it
    /// may be its own, out of order: to begin anew costs little.
    /// What was left behind on an earlier timeline is none of it.
    pub(super) async fn nothing_came_between(
        &self,
        region: &Region,
        own: &Writer,
        rival: &Writer,
    ) -> Result<()> {
        if rival.timeline < own.timeline && self.has_begun(own.timeline) {
            return Ok(());
        }
        let snapshot = self.state.snapshot();
        let view = snapshot.regions.get(region.index);
        let Some((timeline, lsn)) = view.and_then(|view| Some((view.timeline?, view.stored))) else {
            // It has not been read yet.
            return Ok(());
        };
        match self.lies_behind(region, Position { timeline, lsn }).await? {
            true => Err(begin_anew(&format!(
                "region {} holds WAL behind {lsn} of timeline {timeline} that this agent did not store: {} had its place for a while",
                region.name,
                name(rival)
            ))),
            false => Ok(()),
        }
    }

    /// Our claim is not listed. If it was there and is gone, so is the rest: nobody removes a claim alone.
    pub(super) async fn is_still_there(&self, region: &Region, own: &Writer) -> Result<()> {
        let Some(epoch) = self.known().get(&region.index).copied() else {
            return Ok(());
        };
        // Not read: it may be in an archive tier.
        match region.quick.head(&self.layout.writer(epoch)).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => return Ok(other.map(drop)?),
        }
        self.known().remove(&region.index);
        tracing::error!(
            region = region.name,
            epoch = own.epoch,
            "the claim that this agent had made there is gone: something outside the agent removes objects"
        );
        self.state.update_region(region.index, |view| {
            view.emptied = view.emptied.wrapping_add(1);
            // The comparison that follows soon says what exactly.
            view.lacks.lost = true;
            let lacks = &mut view.lacks;
            lacks.detail.get_or_insert_with(|| EMPTIED.to_owned());
        });
        match self.are_all_emptied(region) {
            true => Err(begin_anew("every region was emptied")),
            false => Ok(()),
        }
    }

    fn are_all_emptied(&self, region: &Region) -> bool {
        let mut emptied = self.emptied.lock().unwrap_or_else(PoisonError::into_inner);
        emptied.insert(region.index, Instant::now());
        let lately = |region: &Arc<Region>| {
            let at = emptied.get(&region.index);
            at.is_some_and(|at| at.elapsed() < self.interval * LATELY)
        };
        self.regions.iter().all(lately)
    }

    async fn lies_behind(&self, region: &Region, stored: Position) -> Result<bool> {
        let (store, layout) = (&*region.quick, &self.layout);
        let newest = timelines(store, layout).await?.into_iter().max();
        if newest.is_some_and(|newest| newest > stored.timeline) {
            return Ok(true);
        }
        let range = onward(stored.lsn);
        let held = held(store, layout, self.segment_size, stored.timeline, range).await?;
        Ok(held.runs().iter().any(|run| run.end > stored.lsn))
    }
}

fn begin_anew(what: &str) -> AgentError {
    AgentError::Restart {
        what: what.to_owned(),
        next: "The agent ends, and is to be started again: then it compares what is stored with its server before it goes on".into(),
    }
}
