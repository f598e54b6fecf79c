//! One region's pipeline: stores the window's items in parallel, counts them in order.
//!
//! Owns: the region's place in the window, its uploads in flight, and its position in [`Progress`]. A region
//! that falls out of the window is filled from another ([`crate::backfill`]) and joins again. Nothing here
//! waits for another region, and nothing else waits for this one. Does not own: where a region that was just
//! read goes on (`join`).
//!
//! Invariant: the position reported to [`Progress`] is the end of what the region holds without a hole,
//! because uploads are retired in the order in which they were taken.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::try_join;
use futures::stream::FuturesOrdered;
use highwater_format::{History, SegmentSize, TimelineId};
use highwater_store::Object;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backfill::{self, Absent};
use crate::budget::Budget;
use crate::compact;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::gap;
use crate::places::Places;
use crate::progress::Progress;
use crate::region::{Archive, Region, write_once};
use crate::state::{RegionState, State};
use crate::strays::Strays;
use crate::window::{Item, Next, What, Window};

mod join;

/// Before a region that found nothing for it in the window looks again.
const RETRY_ATTACH: Duration = Duration::from_millis(200);

/// Before a region that cannot be used is tried again.
const PAUSE: Duration = Duration::from_secs(5);

/// What all regions' pipelines share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Keys and regions.
    pub archive: Archive,
    /// The server's segment size.
    pub segment_size: SegmentSize,
    /// What is to be stored.
    pub window: Arc<Window>,
    /// Where positions are reported.
    pub progress: Arc<Progress>,
    /// What others see.
    pub state: State,
    /// Uploads in flight per region.
    pub uploads: usize,
    /// Bytes in flight per region; one object always may be. What is in flight to a region that does not
    /// answer stays in memory, and must leave room for the others.
    pub in_flight: u64,
    /// The server's timeline when the agent started, and what that descends from.
    pub server: History,
    /// The bound on memory.
    pub budget: Arc<Budget>,
    /// Where the stream began: the position of a region that holds nothing when no other does either.
    pub origin: Position,
    /// What PostgreSQL had been told to be safe when the agent started, as its slot shows; none if it keeps
    /// no WAL yet, or was made for this start.
    pub acknowledged: Option<Position>,
    /// From where on the server kept WAL for the slot then, be it one that was made a moment before.
    pub kept_from: Option<Position>,
    /// History files of the timelines that lead to the one of `origin`, and its own.
    pub histories: Arc<[(TimelineId, Bytes)]>,
    /// Tells regions that join late from those that are there.
    pub(crate) places: Places,
}

type Upload = Pin<Box<dyn Future<Output = Result<(u64, Arc<Item>)>> + Send>>;

/// See the module.
#[derive(Debug)]
pub struct Uploader {
    shared: Shared,
    region: Arc<Region>,
    /// What was found behind the region's position when that was read, or when its timeline began.
    strays: Mutex<Arc<Strays>>,
    /// The object that was stored last, and where the region stood then.
    newest: Mutex<Option<(Position, String)>>,
    /// The region is to be read for what others have stored there.
    reads_again: bool,
}

impl Uploader {
    /// The pipeline of one region.
    pub fn new(shared: Shared, region: Arc<Region>) -> Self {
        Self {
            shared,
            region,
            strays: Mutex::default(),
            newest: Mutex::default(),
            reads_again: false,
        }
    }

    /// Works until cancelled; ends early only with an error that concerns the whole archive. Trouble of this
    /// region alone is shown and tried again: it must not stop the others.
    ///
    /// `known` is the region's position if it has been read already.
    pub async fn run(mut self, known: Option<Option<Position>>, cancel: CancellationToken) -> Result<()> {
        cancel
            .run_until_cancelled(self.persist(known))
            .await
            .unwrap_or(Ok(()))
    }

    async fn persist(&mut self, mut known: Option<Option<Position>>) -> Result<()> {
        let mut readings = self.shared.progress.readings();
        loop {
            let error = tokio::select! {
                biased;
                Ok(()) = readings.changed() => {
                    self.shared.window.detach(self.region.index);
                    self.shared.progress.waits(self.region.index, None);
                    known = None;
                    self.reads_again = true;
                    continue;
                }
                Err(error) = self.work(known.take()) => error,
            };
            if !is_of_this_region(&error) {
                return Err(error);
            }
            tracing::error!(region = self.region.name, %error, "the region cannot be used; it is tried again");
            self.shared.window.detach(self.region.index);
            self.shared.progress.waits(self.region.index, None);
            self.shared.state.update_region(self.region.index, |view| {
                view.pipeline(RegionState::Failing, Some(error.to_string()));
            });
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn work(&mut self, known: Option<Option<Position>>) -> Result<Infallible> {
        let index = self.region.index;
        let mut at = match known {
            Some(position) => position,
            None => {
                let listed = self.join().await?;
                self.goes_on(listed).await?
            }
        };
        if let Some(position) = at {
            self.look_behind(position).await?;
        }
        for (timeline, content) in self.shared.histories.iter() {
            let key = self.shared.archive.layout.history(*timeline);
            write_once(&*self.region.store, &key, Object::new(content.clone())).await?;
        }
        let (mut absent, mut listed_at) = (Absent::default(), Instant::now());
        loop {
            let position = match at {
                Some(position) => position,
                None => backfill::origin(&self.shared, &self.region).await?,
            };
            self.shared.progress.stored(index, position);
            self.shared.progress.waits(index, None);
            at = Some(match self.shared.window.attach(index, position) {
                Some(from) => {
                    // After a failure only what is stored is a success.
                    if !self.has_failed() {
                        self.set_state(RegionState::Ok);
                    }
                    absent.ended();
                    // Beside what follows: commits may wait for that.
                    let (reached, ()) = try_join(self.follow(from, position), self.compact(position)).await?;
                    if reached == position {
                        tokio::time::sleep(RETRY_ATTACH).await;
                    }
                    reached
                }
                None => {
                    self.set_state(RegionState::CatchingUp);
                    let mut reached =
                        backfill::advance(&self.shared, &self.region, position, &mut absent).await?;
                    if reached == position {
                        reached = self.listed_by_now(position, &mut listed_at).await?;
                    }
                    if reached > position {
                        self.shared.state.update_region(index, |view| {
                            view.pipeline(RegionState::CatchingUp, None);
                        });
                    }
                    if reached.timeline != position.timeline {
                        self.look_behind(reached).await?;
                    }
                    reached
                }
            });
        }
    }

    /// Only makes reading easier, so that trouble with it changes nothing else.
    async fn compact(&self, position: Position) -> Result<()> {
        match compact::last_segment(&self.shared, &self.region, position).await {
            Err(error @ (AgentError::Conflict { .. } | AgentError::Bug(_))) => Err(error),
            Err(error) => {
                tracing::warn!(region = self.region.name, %error, "the last segment stays in chunks");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Stores items in window order from number `from` on, until the window has forgotten what comes next.
    async fn follow(&self, mut from: u64, mut position: Position) -> Result<Position> {
        let index = self.region.index;
        let mut changed = self.shared.window.subscribe();
        let mut uploads: FuturesOrdered<Upload> = FuturesOrdered::new();
        let mut oldest = from;
        let mut barrier = false;
        // Whoever lists the region takes its first object of a timeline for the beginning: it is stored before any
        // that follows it.
        let mut opens = true;
        let mut behind = false;
        let mut in_flight = 0;
        let (mut taken, mut waiting_since) = (position, Instant::now());
        let mut failed = self.has_failed();
        loop {
            changed.mark_unchanged();
            while !behind
                && !barrier
                && uploads.len() < self.shared.uploads
                && (uploads.is_empty() || in_flight < self.shared.in_flight)
            {
                match self.shared.window.next(from) {
                    Next::Item(number, item) => {
                        // Nothing of a timeline may be stored before its history is, nothing behind a gap before the
                        // gap is on record, and nothing behind an object that is there already before that is known to
                        // be the same: whoever lists the region would be carried over it.
                        let is_barrier = item.what.is_barrier();
                        let first_alone = is_barrier || self.strays().meet(&item);
                        if first_alone && !uploads.is_empty() {
                            break;
                        }
                        if item.what.start() > taken {
                            // Something between is missing here: it has to come from another region.
                            behind = true;
                            break;
                        }
                        taken = taken.max(item.what.end());
                        barrier = first_alone || opens;
                        opens = is_barrier;
                        from = number + 1;
                        if uploads.is_empty() {
                            waiting_since = Instant::now();
                        }
                        in_flight += item.object.bytes.len() as u64;
                        uploads.push_back(self.upload(number, item));
                    }
                    Next::Wait => break,
                    Next::Behind => behind = true,
                }
            }
            if behind && uploads.is_empty() {
                self.shared.window.detach(index);
                return Ok(position);
            }
            if uploads.is_empty() && std::mem::take(&mut failed) {
                self.set_state(RegionState::Ok);
            }
            tokio::select! {
                biased;
                // What is done makes room and moves the position; then what is overdue; then what is new.
                Some(done) = uploads.next() => {
                    let (number, item) = done?;
                    in_flight -= item.object.bytes.len() as u64;
                    position = self.retire(position, number, &item)?;
                    if matches!(item.what, What::History { .. }) {
                        self.look_behind(position).await?;
                    }
                    waiting_since = Instant::now();
                    oldest = number + 1;
                    barrier = false;
                }
                () = tokio::time::sleep_until(waiting_since + PAUSE), if !uploads.is_empty() => {
                    // What is in flight to a region that does not answer is memory that the others need.
                    if matches!(self.shared.window.next(oldest), Next::Behind) {
                        self.shared.window.detach(index);
                        return Ok(position);
                    }
                    waiting_since = Instant::now();
                }
                changed = changed.changed(), if !behind => {
                    changed.map_err(|_| AgentError::Cancelled)?;
                }
            }
        }
    }

    /// Lists what somebody has stored behind `position`: an agent that died, or on a timeline that begins one whose server
    /// was promoted at the same place to the same number. That is another course, with nothing else to tell it by.
    async fn look_behind(&self, position: Position) -> Result<()> {
        let found = Arc::new(Strays::find(&self.shared, &self.region, position).await?);
        *self.strays.lock().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(())
    }

    fn strays(&self) -> Arc<Strays> {
        self.strays.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn upload(&self, number: u64, item: Arc<Item>) -> Upload {
        let (shared, region, strays) = (self.shared.clone(), self.region.clone(), self.strays());
        Box::pin(async move {
            strays.agree(&shared, &region, &item).await?;
            let (store, layout) = (&*region.store, &shared.archive.layout);
            match item.what {
                What::Gap { .. } | What::Unreplayable { .. } => {
                    gap::write(store, layout, &item.key, item.object.clone()).await?;
                }
                What::Wal { .. } | What::History { .. } => {
                    write_once(store, &item.key, item.object.clone()).await?;
                }
            }
            Ok((number, item))
        })
    }

    fn retire(&self, position: Position, number: u64, item: &Item) -> Result<Position> {
        let index = self.region.index;
        if item.what.start() > position {
            return Err(AgentError::Bug(format!(
                "region {}: stored {} although the region's WAL ends at {position}",
                self.region.name, item.key
            )));
        }
        let position = position.max(item.what.end());
        self.shared.progress.stored(index, position);
        self.shared.window.passed(index, number + 1);
        if position == item.what.end() {
            *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some((position, item.key.clone()));
        }
        let bytes = item.object.bytes.len() as u64;
        self.shared.state.update_region(index, |view| {
            view.objects += 1;
            view.bytes += bytes;
            if view.pipeline_state() == RegionState::Failing {
                view.pipeline(RegionState::Ok, None);
            }
        });
        Ok(position)
    }

    fn has_failed(&self) -> bool {
        let state = self.shared.state.subscribe();
        let view = state.borrow();
        let view = view.regions.get(self.region.index);
        view.is_some_and(|view| view.pipeline_state() == RegionState::Failing)
    }

    /// What kept the pipeline from a better state stays said while it is in the same.
    fn set_state(&self, state: RegionState) {
        self.shared.state.update_region(self.region.index, |view| {
            if view.pipeline_state() != state {
                view.pipeline(state, None);
            }
        });
    }
}

/// Whether an error leaves the other regions untouched. A conflict, another cluster's archive or a mistake of
/// ours does not: going on could make it worse.
pub(crate) fn is_of_this_region(error: &AgentError) -> bool {
    matches!(
        error,
        AgentError::Store(_) | AgentError::Object { .. } | AgentError::Trouble { .. }
    )
}

#[cfg(test)]
#[path = "uploader_tests.rs"]
mod tests;
