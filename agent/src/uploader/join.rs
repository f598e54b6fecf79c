//! Where a region goes on that was read after the start: one that joins late, or one that has had trouble.
//!
//! Owns: the comparison before a region that joins late counts, and which word is believed where the listing and what the
//! region counts for differ. Does not own: what a region lists ([`crate::inventory`]), nor comparing ([`crate::agree`]).
//!
//! Invariant: in this process a listing alone never moves a region beyond what it counts for. What lies there was stored in
//! parallel, perhaps, behind an object that contradicts the stream or that nobody can read.

use std::sync::PoisonError;
use std::time::Duration;

use highwater_store::ErrorKind;
use tokio::time::Instant;

use super::{PAUSE, Uploader};
use crate::agree::{self, Agreement, Witnesses};
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::identity;
use crate::inventory;
use crate::state::RegionState;

/// Between two looks at whether there is something to compare a region that joins with.
const LOOK: Duration = Duration::from_millis(500);

/// Between two comparisons, each of which reads up to 16 MiB, of a region that joins with the same others: the first pause,
/// which doubles, and the longest.
const RETRY_AGREE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// How long a region that joins waits for another one to be compared with.
const COMPARE_PATIENCE: Duration = Duration::from_secs(10);

impl Uploader {
    /// Reads a region that could not be read at the start: identity first, then its position.
    pub(super) async fn join(&self) -> Result<Option<Position>> {
        let store = &*self.region.store;
        identity::admit(store, &self.shared.archive).await?;
        self.shared.places.mark((&self.region.name, store)).await?;
        let regions: Vec<_> = self
            .shared
            .archive
            .regions
            .iter()
            .map(|region| region.place())
            .collect();
        self.shared.places.tell_apart(&regions).await?;
        let position =
            inventory::position(store, &self.shared.archive.layout, self.shared.segment_size).await?;
        tracing::info!(region = self.region.name, position = ?position, "region joined");
        self.refuse_other_course(position)?;
        Ok(position)
    }

    /// Where the region goes on that lists WAL up to `listed`. One that counts already goes on where it counted, unless it
    /// is read for what others have stored there.
    pub(super) async fn goes_on(&mut self, listed: Option<Position>) -> Result<Option<Position>> {
        let index = self.region.index;
        let counted = self.shared.progress.position(index);
        let takes_more = self.reads_again || counted.is_none();
        let more = listed.filter(|at| takes_more && counted.is_none_or(|counted| counted < *at));
        if let Some(position) = more {
            // From now on until it counts nobody takes it for a region that holds nothing.
            self.shared.progress.waits(index, Some(position));
            self.agree(position).await?;
        }
        self.reads_again = false;
        match counted {
            None => Ok(listed),
            Some(_) if more.is_some() => Ok(more),
            Some(counted) if listed >= Some(counted) => Ok(Some(counted)),
            Some(counted) => self.lists_less(listed, counted).await,
        }
    }

    /// The region lists less than it counts for: its listing lags, or objects are gone. What the window still has is stored
    /// again, which does no harm. Beyond that the object that was stored last is asked for, which needs no listing. Where
    /// that is gone, too, the rest is filled from other regions.
    async fn lists_less(&self, listed: Option<Position>, counted: Position) -> Result<Option<Position>> {
        if listed.is_some_and(|at| self.shared.window.reaches(at)) {
            return Ok(listed);
        }
        let has_newest = self.has_newest(counted).await?;
        tracing::warn!(
            region = self.region.name, ?listed, %counted, has_newest,
            "the region lists less than was stored: its listing lags, or objects are gone"
        );
        Ok(if has_newest { Some(counted) } else { listed })
    }

    /// Whether the object is there that took the region to `counted`, if it was stored by this process.
    async fn has_newest(&self, counted: Position) -> Result<bool> {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((_, key)) = newest.filter(|(at, _)| *at == counted) else {
            return Ok(false);
        };
        match self.region.store.head(&key).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// What a region lists by now that is at `position`, which is less than it counts for, and that nothing else fills:
    /// a listing that lags ends its lag. Asked no more often than trouble is tried again.
    pub(super) async fn listed_by_now(&self, position: Position, asked: &mut Instant) -> Result<Position> {
        let counted = self.shared.progress.position(self.region.index);
        let Some(counted) = counted.filter(|counted| *counted > position && asked.elapsed() >= PAUSE) else {
            return Ok(position);
        };
        *asked = Instant::now();
        let (store, layout) = (&*self.region.store, &self.shared.archive.layout);
        let listed = inventory::position(store, layout, self.shared.segment_size).await?;
        Ok(listed.map_or(position, |listed| listed.clamp(position, counted)))
    }

    /// A region that joins late was not compared with the stream when that began. Before it counts its last WAL
    /// is compared with what is archived since.
    async fn agree(&self, position: Position) -> Result<()> {
        let since = Instant::now();
        let mut comparison = Comparison::new();
        loop {
            let peers = agree::peers(&self.shared, &self.region);
            let witnesses = agree::witnesses(&self.shared, position, &peers);
            if comparison.is_due(witnesses) {
                match agree::tail(&self.shared, &self.region, position, &peers).await? {
                    Agreement::Equal(source) => {
                        tracing::info!(region = self.region.name, %position, with = source, "the region's last WAL is the same");
                        return Ok(());
                    }
                    Agreement::Unknown(why) => comparison.failed(why),
                }
            }
            let furthest = peers
                .iter()
                .filter_map(|peer| self.shared.progress.position(peer.index))
                .max();
            // What the server no longer has never comes from there: then the region is the only one to go on from, and the
            // stream is compared with it where it begins.
            let lost = self.shared.progress.lost_from();
            let ahead = furthest.is_none_or(|at| at < position) && lost.is_none_or(|at| at >= position);
            if !ahead && since.elapsed() >= COMPARE_PATIENCE {
                tracing::warn!(
                    region = self.region.name, %position, why = comparison.why,
                    "the region's last WAL cannot be compared now; it is used, and compared when another region answers"
                );
                return Ok(());
            }
            if ahead {
                self.shared.state.update_region(self.region.index, |view| {
                    let why = format!(
                        "it holds WAL up to {position}, which the stream has not reached: it counts when both agree"
                    );
                    view.pipeline(RegionState::CatchingUp, Some(why));
                });
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A region that joins late may show that the server is not the one that the archive follows.
    fn refuse_other_course(&self, position: Option<Position>) -> Result<()> {
        let (snapshot, server) = (self.shared.state.snapshot(), &self.shared.server);
        // A standby follows later than its primary's agent.
        let Some(at) = position.filter(|_| !snapshot.standby) else {
            return Ok(());
        };
        let (what, next) = if Some(at.timeline) > snapshot.timeline.max(Some(server.timeline)) {
            (
                "the server is an old primary that was started again, or not the one that was promoted"
                    .to_owned(),
                "Point the agent at the primary of the newest timeline",
            )
        } else if at.timeline < server.timeline && server.switch_of(at.timeline).is_none() {
            (
                format!(
                    "which is not in the history of the server's timeline {}",
                    server.timeline
                ),
                "Point the agent at a server that descends from the archived one, or give that region up: start its archive \
                 anew in a place of its own",
            )
        } else {
            return Ok(());
        };
        let (name, timeline, lsn) = (&self.region.name, at.timeline, at.lsn);
        Err(AgentError::refused(
            format!("region {name} already follows timeline {timeline} (up to {lsn}): {what}"),
            next,
        ))
    }
}

/// When a region that joins is compared once more, and what came of the last time.
#[derive(Debug)]
struct Comparison {
    witnesses: Option<Witnesses>,
    /// When the same witnesses are asked again.
    next: Instant,
    pause: Duration,
    why: String,
}

impl Comparison {
    fn new() -> Self {
        Self {
            witnesses: None,
            next: Instant::now(),
            pause: RETRY_AGREE.0,
            why: String::new(),
        }
    }

    /// The first time always: the region's last WAL must be readable at all. Then where there is somebody to compare it
    /// with, when that is somebody else than before, or was tried long enough ago.
    fn is_due(&mut self, witnesses: Witnesses) -> bool {
        let is_new = self.witnesses.as_ref() != Some(&witnesses);
        let is_due = is_new || (witnesses.any() && Instant::now() >= self.next);
        if is_new {
            self.pause = RETRY_AGREE.0;
            self.witnesses = Some(witnesses);
        }
        is_due
    }

    fn failed(&mut self, why: String) {
        self.why = why;
        self.next = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(RETRY_AGREE.1);
    }
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;
