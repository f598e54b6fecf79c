//! Where a place is had again that another writer had meanwhile, or may have had: nothing goes on beside what that one stored.
//!
//! Owns: noticing it, and the error that ends the process. What this one holds in memory follows what it had stored itself; only an
//! agent that begins anew reads what lies there now, compares it with its server, and goes on behind it.

use std::sync::atomic::Ordering;

use highwater_format::Writer;

use super::Claims;
use super::claim::name;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::inventory::{held, onward, timelines};
use crate::region::Region;

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
    pub(super) async fn nothing_came_between(&self, region: &Region, rival: &Writer) -> Result<()> {
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
