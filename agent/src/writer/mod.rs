//! The writer claim: who writes an archive, and when an agent has to stop.
//!
//! Owns: what this agent holds, and asking the regions. Its parts: `enter` claims, `silence` watches the pulses of others
//! before their place is taken, `held` looks whether the claim still holds, `displaced` sees to it that nothing goes on beside what
//! another writer has stored meanwhile, `process` names this process. Does not own: the rules ([`judge`]), when it is
//! asked (the receiver at every connection and timeline, the pulse at every beat), and what then happens to the process.
//!
//! Invariants: a claim is the conditional creation of a key, so an epoch has one owner in a region; nothing of a
//! timeline is stored or acknowledged by an agent beside a primary before it has claimed that timeline. An agent
//! beside a standby never claims and never writes a pulse: what it stores is what the primary's agent stores, and
//! its server cannot say what the primary has committed.

pub mod claim;
mod displaced;
mod enter;
mod held;
pub mod judge;
mod process;
mod silence;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use highwater_format::{Layout, SegmentSize, Writer};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::clock::Clock;
use crate::error::{AgentError, Result};
use crate::region::{Archive, Region};
use crate::state::State;
use claim::{ask, name, newest_of};
use held::Beside;
use judge::rank;
pub use process::Me;
pub(crate) use silence::SILENT_FOR;

/// How long an agent that ends with a conflict looks for the name of its rival.
const NAMING: Duration = Duration::from_secs(10);

/// What this agent holds at the moment.
#[derive(Clone, Debug, Default)]
struct Held {
    claim: Option<Writer>,
    /// Who has taken its place.
    fenced: Option<Writer>,
}

/// See the module.
#[derive(Debug)]
pub struct Claims {
    me: Me,
    layout: Layout,
    segment_size: SegmentSize,
    regions: Vec<Arc<Region>>,
    state: State,
    clock: Clock,
    interval: Duration,
    /// The highest epoch that was ever tried: two claims of one process never have the same.
    tried: AtomicU64,
    /// Only for the first claim: later ones ask like everybody.
    take_over: AtomicBool,
    held: watch::Sender<Held>,
    /// Regions that did not answer at the start and have not since: nobody waits for them.
    away: Mutex<BTreeSet<usize>>,
    /// Regions in which somebody else's claim is newer and does not fence by itself.
    beside: Mutex<BTreeMap<usize, Beside>>,
    /// The epoch of this agent's own claim that was read in a region: claims do not change, and it is not read again.
    known: Mutex<BTreeMap<usize, u64>>,
    /// Regions from which the claim had gone that was read there, and when that was noticed.
    emptied: Mutex<BTreeMap<usize, Instant>>,
    /// Another writer had this one's place.
    displaced: AtomicBool,
}

/// The newest claim of each region that answered.
type Told = Vec<(Arc<Region>, Option<Writer>)>;

impl Claims {
    /// Nothing is claimed yet. `interval` is that of the pulse; with `take_over` nobody is waited for.
    pub fn new(
        me: Me,
        archive: &Archive,
        state: State,
        clock: Clock,
        interval: Duration,
        take_over: bool,
    ) -> Self {
        let (held, _) = watch::channel(Held::default());
        Self {
            me,
            layout: archive.layout.clone(),
            segment_size: archive.identity.segment_size,
            regions: archive.regions.clone(),
            state,
            clock,
            interval,
            tried: AtomicU64::new(0),
            take_over: AtomicBool::new(take_over),
            held,
            away: Mutex::default(),
            beside: Mutex::default(),
            known: Mutex::default(),
            emptied: Mutex::default(),
            displaced: AtomicBool::new(false),
        }
    }

    /// Does not wait for these regions until they have answered a [`Claims::look`].
    pub fn leave_out(&self, regions: impl IntoIterator<Item = usize>) {
        self.away().extend(regions);
    }

    fn away(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of this process in pulses.
    pub fn instance(&self) -> &str {
        &self.me.instance
    }

    /// Milliseconds between two of its pulses, as claims and pulses say it.
    pub fn interval_ms(&self) -> Option<u64> {
        u64::try_from(self.interval.as_millis()).ok()
    }

    /// Whether this agent is the archive's writer.
    pub fn is_writer(&self) -> bool {
        let held = self.held.borrow();
        held.claim.is_some() && held.fenced.is_none()
    }

    /// Adds to a conflict who else has claimed the archive.
    pub async fn name_rival(&self, error: AgentError) -> AgentError {
        let AgentError::Conflict {
            region,
            key,
            ours,
            theirs,
        } = error
        else {
            return error;
        };
        // The agent ends with this error, and must not wait for regions that do not answer.
        let told = timeout(NAMING, self.read()).await;
        let told = told.ok().and_then(Result::ok).unwrap_or_default();
        let mut rivals: Vec<&Writer> = told.iter().filter_map(|(_, claim)| claim.as_ref()).collect();
        rivals.retain(|claim| claim.instance != self.me.instance);
        let theirs = match rivals.iter().max_by_key(|claim| rank(claim)) {
            Some(rival) => format!("{theirs}; newest other writer: {}", name(rival)),
            None => theirs,
        };
        let ours = format!("{ours}, from {} (pid {})", self.me.host, self.me.pid);
        AgentError::Conflict {
            region,
            key,
            ours,
            theirs,
        }
    }

    /// The newest claim of any region, as text; for errors that it explains. None if there is none to be had.
    pub async fn newest_holder(&self) -> Option<String> {
        let told = self.read().await.ok()?;
        newest(&told).map(name)
    }

    async fn read(&self) -> Result<Told> {
        self.ask_all(|region| async move { newest_of(&*region.quick, &self.layout).await })
            .await
    }

    async fn ask_all<T, F>(&self, question: impl Fn(Arc<Region>) -> F) -> Result<Vec<(Arc<Region>, T)>>
    where
        F: Future<Output = Result<T>>,
    {
        let away = self.away().clone();
        let asked = self.regions.iter().filter(|region| !away.contains(&region.index));
        ask(asked.cloned(), question).await
    }
}

fn newest(told: &Told) -> Option<&Writer> {
    told.iter()
        .filter_map(|(_, claim)| claim.as_ref())
        .max_by_key(|claim| rank(claim))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
