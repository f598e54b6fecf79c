//! Filling what a region lacks below its position: one task per region, off the path of new WAL.
//!
//! Owns: comparing the listings of the regions now and then, copying what is missing here from another region
//! (gap records, WAL, base backups, in the order that `lack` says), and telling what was found. Idempotent and
//! restartable: what was copied is found by the next comparison.
//! Does not own: new WAL and a region that fell behind (uploader, backfill), nor deletion. Retention must take
//! the commit mark of a base backup out of every region before it deletes anything of it: a base backup that
//! is visible in one region is copied to those that lack it.
//!
//! Works only while the region takes new WAL without trouble, one object at a time. Trouble with this region or
//! another one is waited out; only regions that contradict each other end the agent.

mod copy;
pub(crate) mod history;
mod lack;
pub(crate) mod listing;
mod report;
mod slices;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use highwater_format::{BackupId, LsnRange, TimelineId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::copy::{Copied, CopiedWal, Copier};
use self::lack::{Held, Lack, Step};
use self::listing::{Base, Listing};
use self::slices::{Compared, Doubt};
use crate::agree::{self, Agreement};
use crate::clock::Clock;
use crate::error::{AgentError, Result};
use crate::identity;
use crate::region::Region;
use crate::salvage::Damage;
use crate::state::{Lacks, RegionState};
use crate::uploader::{Shared, is_of_this_region};

/// The first comparison comes this long after the region is in use: a start has more urgent things to do.
const FIRST: Duration = Duration::from_secs(10);

/// So much later the next region's turn comes: in the same moment their order would be drawn at random.
const STAGGER: Duration = Duration::from_millis(1);

/// After a region was away, or something could not be copied, the next comparison comes this soon.
const SOON: Duration = Duration::from_secs(30);

/// A region whose calls failed for this long was away, and may have missed something.
const AWAY: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub struct Healer {
    shared: Shared,
    region: Arc<Region>,
    interval: Duration,
    clock: Clock,
    /// What the region covered in any comparison so far.
    before: BTreeMap<TimelineId, Vec<LsnRange>>,
    /// The base backups that were visible here in any of them.
    backups_before: BTreeSet<BackupId>,
    /// What stays missing when everything that others have was copied.
    beyond_help: Lacks,
    /// What the last comparison found to be damaged wherever it is.
    damaged: Vec<Damage>,
    /// What was last said to be gone, so that it is said once.
    said: Option<String>,
    /// Histories and doubtful objects that were compared and found equal, or damaged and reported.
    settled: BTreeSet<String>,
    /// The last WAL was compared with that of another region.
    agreed: bool,
    passes: u32,
    /// How often the region had been emptied when the last comparison began.
    emptied: u32,
    /// Comparisons in a row that left something undone.
    failures: u32,
}

/// What became of one comparison.
#[derive(Debug, Default)]
struct Outcome {
    /// Steps that failed and are left for the next time.
    left: usize,
    /// Not every other region could be read.
    partial: bool,
    /// There was more to copy than is remembered at once.
    more: bool,
    /// What cannot be copied because it is damaged everywhere.
    damaged: Vec<Damage>,
}

impl Healer {
    /// The healer of one region.
    pub fn new(shared: Shared, region: Arc<Region>, interval: Duration, clock: Clock) -> Self {
        Self {
            shared,
            region,
            interval,
            clock,
            before: BTreeMap::new(),
            backups_before: BTreeSet::new(),
            beyond_help: Lacks::default(),
            damaged: Vec::new(),
            said: None,
            settled: BTreeSet::new(),
            agreed: false,
            passes: 0,
            emptied: 0,
            failures: 0,
        }
    }

    /// Works until cancelled; ends early only with an error that concerns the whole archive.
    pub async fn run(mut self, cancel: CancellationToken) -> Result<()> {
        if self.shared.archive.regions.len() < 2 {
            return Ok(());
        }
        cancel.run_until_cancelled(self.persist()).await.unwrap_or(Ok(()))
    }

    async fn persist(&mut self) -> Result<()> {
        let mut wait = FIRST.min(self.interval) + STAGGER * u32::try_from(self.region.index).unwrap_or(0);
        loop {
            let away = self.wait(wait).await?;
            if away && wait > SOON && self.emptied == self.emptied() {
                // What was missed meanwhile is looked for soon after, not at once: the backlog comes first. A region that was emptied
                // cannot be read at all before its identity is back.
                self.wait(SOON).await?;
            }
            self.passes = self.passes.saturating_add(1);
            self.emptied = self.emptied();
            let mut more = false;
            let done = match self.pass().await {
                Ok(outcome) => {
                    more = outcome.more;
                    outcome.left == 0 && !outcome.partial
                }
                Err(error) if is_of_this_region(&error) => {
                    tracing::warn!(region = self.region.name, %error, "the region could not be compared with the others; it is tried again");
                    false
                }
                Err(error) => return Err(error),
            };
            self.failures = if done { 0 } else { self.failures.saturating_add(1) };
            wait = match self.failures {
                0 if more => SOON,
                0 => self.jittered(),
                failures => self.interval.min(SOON * (1 << (failures - 1).min(8))),
            };
        }
    }

    /// Waits for `time`, and then until the region takes new WAL. Returns early, with true, when the region is
    /// back after it was away, or was emptied.
    async fn wait(&self, time: Duration) -> Result<bool> {
        let index = self.region.index;
        let mut state = self.shared.state.subscribe();
        let until = Instant::now() + time;
        let (mut away, mut troubled) = (false, None::<Instant>);
        loop {
            let now = Instant::now();
            let (region, emptied) = match state.borrow_and_update().regions.get(index) {
                Some(view) => (Some(view.state), view.emptied),
                None => (None, 0),
            };
            away |= emptied != self.emptied;
            match region {
                Some(RegionState::Ok) => {
                    if until <= now || (away && time > SOON) {
                        return Ok(away);
                    }
                    troubled = None;
                }
                // One failed call is not an absence.
                Some(RegionState::Failing) => away |= now - *troubled.get_or_insert(now) >= AWAY,
                _ => away = true,
            }
            tokio::select! {
                biased;
                // The time is looked at first: a busy snapshot must not put it off.
                () = tokio::time::sleep_until(until), if now < until => {}
                changed = state.changed() => changed.map_err(|_| AgentError::Cancelled)?,
            }
        }
    }

    fn emptied(&self) -> u32 {
        let state = self.shared.state.subscribe();
        let view = state.borrow();
        view.regions.get(self.region.index).map_or(0, |view| view.emptied)
    }

    /// Spread by a tenth around the interval, differently for each region, so that they do not all list at once.
    fn jittered(&self) -> Duration {
        let seed = (self.region.index as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
            ^ u64::from(self.passes).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let per_mille = 900 + u32::try_from((seed >> 32) % 200).unwrap_or(0);
        self.interval * per_mille / 1000
    }

    fn listing(&self) -> Listing<'_> {
        Listing {
            layout: &self.shared.archive.layout,
            size: self.shared.segment_size,
        }
    }

    /// One comparison, and the filling of what it finds.
    async fn pass(&mut self) -> Result<Outcome> {
        let Some(position) = self.shared.progress.position(self.region.index) else {
            return Ok(Outcome::default());
        };
        identity::ensure(&*self.region.quick, &self.shared.archive).await?;
        if !self.agreed {
            let peers = agree::peers(&self.shared, &self.region);
            let _turn = self.shared.budget.turn().await;
            let answer = agree::tail(&self.shared, &self.region, position, &peers).await?;
            self.agreed = matches!(answer, Agreement::Equal(_));
        }
        let mut outcome = Outcome::default();
        let Compared {
            peers,
            ours,
            theirs,
            lack,
            doubts,
        } = self.compare(position, &mut outcome).await?;
        self.settle_histories(&peers).await?;
        self.settle_doubts(&peers, doubts).await?;
        if lack.steps.is_empty() {
            self.damaged.clear();
        }
        self.note(&ours, &theirs, &lack, outcome.partial);
        outcome.more = lack.more;
        if !lack.steps.is_empty() {
            self.repair(&peers, &ours, lack, &mut outcome).await?;
            self.damaged = std::mem::take(&mut outcome.damaged);
            self.note_damage();
        }
        Ok(outcome)
    }

    /// Histories are copied before any WAL of their timeline, and must be the same everywhere.
    async fn settle_histories(&mut self, peers: &[Arc<Region>]) -> Result<()> {
        for peer in peers {
            match history::settle(&self.shared, &self.region, peer, &mut self.settled).await {
                Ok(copied) => self.count(copied),
                Err(error) if is_of_this_region(&error) => {
                    tracing::warn!(region = self.region.name, with = peer.name, %error, "history files could not be compared");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads a few of the objects that differ in size from those of another region.
    async fn settle_doubts(&mut self, peers: &[Arc<Region>], doubts: Vec<Doubt>) -> Result<()> {
        for doubt in doubts {
            let Some(peer) = peers.get(doubt.peer) else {
                continue;
            };
            let (key, timeline, piece) = (&doubt.key, doubt.timeline, &doubt.piece);
            match agree::piece(&self.shared, &self.region, peer, timeline, piece).await {
                Ok(readable) => {
                    if !readable {
                        tracing::error!(
                            region = self.region.name,
                            key,
                            "the object is damaged here; another region has its own. Nothing is replaced: run `highwater-restore verify`"
                        );
                    }
                    self.settled.insert(doubt.name(peer));
                }
                Err(error) if is_of_this_region(&error) => {
                    tracing::warn!(region = self.region.name, with = peer.name, key, %error, "an object could not be compared");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Copies what is missing, in order.
    async fn repair(
        &self,
        peers: &[Arc<Region>],
        ours: &Held,
        lack: Lack,
        outcome: &mut Outcome,
    ) -> Result<()> {
        tracing::warn!(
            region = self.region.name,
            objects = lack.steps.len(),
            wal_bytes = lack.wal_bytes(),
            backups = lack.backups.len(),
            "the region lacks what another one has; filling it"
        );
        let copier = Copier {
            shared: &self.shared,
            region: &self.region,
            peers,
        };
        let mut healed = Copied::default();
        for step in &lack.steps {
            self.wait(Duration::ZERO).await?;
            match self.step(&copier, ours, step).await {
                Ok(done) => {
                    healed.add(done.copied);
                    match done.damage.is_empty() {
                        true => self.step_done(),
                        false => outcome.left += 1,
                    }
                    outcome.damaged.extend(done.damage);
                }
                Err(error) if is_of_this_region(&error) => {
                    outcome.left += 1;
                    tracing::warn!(region = self.region.name, %error, "not copied; it is tried again");
                    if is_about(&error, &self.region) {
                        break;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        tracing::info!(
            region = self.region.name,
            objects = healed.objects,
            bytes = healed.bytes,
            left = outcome.left,
            "copied from other regions"
        );
        if outcome.left == 0 && !lack.more {
            self.filled();
        }
        Ok(())
    }

    async fn step(&self, copier: &Copier<'_>, ours: &Held, step: &Step) -> Result<CopiedWal> {
        let mut done = CopiedWal::default();
        match step {
            Step::Gap(timeline, range, peer) => done.copied = copier.gap(*timeline, *range, *peer).await?,
            Step::Wal(timeline, piece, peer) => done = copier.wal(*timeline, *piece, *peer).await?,
            Step::Backup(id) => {
                let nothing = Base::default();
                let held = ours.backups.get(id).unwrap_or(&nothing);
                copier
                    .backup(id, held, |one| {
                        done.copied.add(one);
                        self.count(one);
                    })
                    .await?;
                return Ok(done);
            }
        }
        self.count(done.copied);
        Ok(done)
    }
}

/// Whether the region that is filled is the one in trouble, so that going on is of no use.
fn is_about(error: &AgentError, region: &Region) -> bool {
    matches!(error, AgentError::Store(error) if error.region() == region.name)
}
