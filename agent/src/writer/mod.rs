//! The writer claim: who writes an archive, and when an agent has to stop.
//!
//! Owns: reading and placing `writer/<epoch>`, watching the pulses of others before their place is taken, and the
//! knowledge whether this agent still holds its claim. Does not own: the rules ([`judge`]), when it is asked (the
//! receiver at every connection and timeline, the pulse at every beat), and what then happens to the process.
//!
//! Invariants: a claim is the conditional creation of a key, so an epoch has one owner in a region; nothing of a
//! timeline is stored or acknowledged by an agent beside a primary before it has claimed that timeline. An agent
//! beside a standby never claims and never writes a pulse: what it stores is what the primary's agent stores, and
//! its server cannot say what the primary has committed.

pub mod judge;

use std::collections::BTreeSet;
use std::future::Future;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use highwater_format::{Key, Layout, Pulse, TimelineId, Writer, records};
use highwater_store::{Object, Put, PutMode, Store, list_all};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::error::{AgentError, Kind, Result};
use crate::inventory;
use crate::region::{Archive, Region, get_optional};
use crate::state::State;
use judge::{Entry, Standing, Watch, entry, rank, standing};

/// The other side of a timeline is silent when its pulses did not change for so many of our own intervals.
const SILENT_FOR: u32 = 3;

/// Looks at the pulses within one interval: often enough to tell apart two writers that overwrite each other's.
const LOOKS: u32 = 4;

/// Lost races for an epoch in a row before the attempt is given up; another connection tries again.
const ROUNDS: u32 = 16;

/// How long other regions are waited for once one has answered.
const GRACE: Duration = Duration::from_secs(3);

/// Older claims that are read to find out whose pulse it is.
const OLDER: usize = 20;

/// How this process names itself in claims and pulses.
#[derive(Clone, Debug)]
pub struct Me {
    /// Random, so that a process that was started again is another one.
    pub instance: String,
    /// The machine.
    pub host: String,
    /// The process there.
    pub pid: u32,
}

impl Me {
    /// This process.
    pub fn this_process() -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = match host.trim() {
            "" => "unknown",
            name => name,
        };
        Self {
            instance: format!("{:016x}", RandomState::new().build_hasher().finish()),
            host: host.to_owned(),
            pid: std::process::id(),
        }
    }
}

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
    regions: Vec<Arc<Region>>,
    state: State,
    clock: Clock,
    interval: Duration,
    take_over: bool,
    held: watch::Sender<Held>,
    /// Regions that did not answer at the start and have not since: nobody waits for them.
    away: Mutex<BTreeSet<usize>>,
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
            regions: archive.regions.clone(),
            state,
            clock,
            interval,
            take_over,
            held,
            away: Mutex::default(),
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

    /// Whether this agent is the archive's writer, or one of several on the same timeline.
    pub fn is_writer(&self) -> bool {
        let held = self.held.borrow();
        held.claim.is_some() && held.fenced.is_none()
    }

    /// Asks to write what a server on `timeline` sends: before the first byte of every connection and timeline.
    pub async fn enter(&self, timeline: TimelineId, standby: bool) -> Result<()> {
        if standby {
            self.hold(None);
        } else {
            let own = self.held.borrow().claim.clone();
            match own.filter(|own| own.timeline == timeline) {
                None => self.claim(timeline).await?,
                Some(own) => self.still_holds(own).await?,
            }
        }
        self.state.update(|snapshot| snapshot.standby = standby);
        Ok(())
    }

    async fn still_holds(&self, own: Writer) -> Result<()> {
        let told = self.read().await?;
        if let Some(newest) = newest(&told)
            && let Standing::Fenced(holder) = standing(&own, newest)
        {
            return Err(fenced(own.timeline, holder));
        }
        self.hold(Some(own));
        Ok(())
    }

    async fn claim(&self, timeline: TimelineId) -> Result<()> {
        let mut silent = None;
        for _ in 0..ROUNDS {
            let told = self.read().await?;
            let newest = newest(&told);
            let alone = self.is_alone(&told, newest).await?;
            if let Entry::Ask(holder) = entry(&self.me.instance, timeline, newest, alone)
                && !self.take_over
                && silent.as_ref() != Some(&holder)
            {
                self.must_be_silent(&told, timeline, &holder).await?;
                // Meanwhile somebody else may have claimed: look again.
                silent = Some(holder);
                continue;
            }
            let claim = Writer {
                epoch: newest.map_or(0, |newest| newest.epoch) + 1,
                instance: self.me.instance.clone(),
                host: self.me.host.clone(),
                pid: self.me.pid,
                timeline,
                claimed_at: self.clock.now(),
            };
            if self.place(&claim, &told).await? {
                log_claim(&claim, newest);
                self.hold(Some(claim));
                return Ok(());
            }
        }
        Err(AgentError::Trouble {
            what: format!("{ROUNDS} attempts to claim timeline {timeline} were overtaken by other agents"),
            next: "Trying again; if it goes on, see which agents are configured for this archive".into(),
        })
    }

    fn hold(&self, claim: Option<Writer>) {
        let epoch = claim.as_ref().map_or(0, |claim| claim.epoch);
        self.held.send_replace(Held { claim, fenced: None });
        self.state.update(|snapshot| snapshot.writer_epoch = epoch);
    }

    /// Whether no other process's pulse is in any region. Only asked where the newest claim is our own: then a
    /// silent companion of ours need not be waited for.
    async fn is_alone(&self, told: &Told, newest: Option<&Writer>) -> Result<bool> {
        if newest.is_none_or(|claim| claim.instance != self.me.instance) {
            return Ok(false);
        }
        let pulses = self.pulses(told).await?;
        Ok(pulses.iter().all(|(_, pulse)| pulse.instance == self.me.instance))
    }

    /// Fails with who it is if a server on another timeline than `timeline` shows signs of life.
    async fn must_be_silent(&self, told: &Told, timeline: TimelineId, holder: &Writer) -> Result<()> {
        let patience = self.interval * SILENT_FOR;
        tracing::info!(
            holder = %name(holder), ours = %timeline, seconds = patience.as_secs(),
            "the newest writer is on another timeline: making sure that it is silent"
        );
        let (until, mut watch) = (Instant::now() + patience, Watch::new(&self.me.instance, timeline));
        loop {
            let pulses = self.pulses(told).await?;
            if let Some((region, pulse)) = pulses
                .iter()
                .find(|(region, pulse)| watch.observe(region.index, pulse))
            {
                return Err(self.in_use(region, pulse, holder, timeline).await);
            }
            if Instant::now() >= until {
                tracing::warn!(holder = %name(holder), "it is silent: going on in its place");
                return Ok(());
            }
            tokio::time::sleep(self.interval / LOOKS).await;
        }
    }

    async fn in_use(
        &self,
        region: &Region,
        pulse: &Pulse,
        newest: &Writer,
        timeline: TimelineId,
    ) -> AgentError {
        let holder = match older_claim(&*region.quick, &self.layout, &pulse.instance).await {
            Ok(Some(claim)) => name(&claim),
            _ if pulse.instance == newest.instance => name(newest),
            _ => format!("instance {}", pulse.instance),
        };
        AgentError::refused(
            format!(
                "this archive is in use: {holder}, and its server is alive at {} on timeline {}; this server is on timeline \
                 {timeline}. It is a restored copy, or was promoted beside a primary that lives. Nothing was written",
                pulse.wal_end, pulse.timeline
            ),
            "Give this server a cluster name or prefix of its own. If it really takes the other one's place, stop that one \
             first, or start this agent with `run --take-over`",
        )
    }

    /// With each pulse: whether the claim still holds in that region. A region that was away when the claim was
    /// made gets it now. False: this agent has no say there at present, and writes no pulse.
    pub async fn look(&self, region: &Region) -> Result<bool> {
        let Some(own) = self.held.borrow().claim.clone() else {
            return Ok(false);
        };
        let store = &*region.quick;
        let newest = newest_of(store, &self.layout, own.epoch - 1).await?;
        self.away().remove(&region.index);
        match newest {
            None => self.create(store, &own, encode(&own)?).await,
            Some(newest) => match standing(&own, &newest) {
                Standing::Holds => Ok(true),
                Standing::Fenced(holder) => {
                    self.held.send_if_modified(|held| {
                        let ours = held.claim.as_ref() == Some(&own);
                        let changed = ours && held.fenced.as_ref() != Some(&holder);
                        if ours {
                            held.fenced = Some(holder);
                        }
                        changed
                    });
                    Ok(false)
                }
            },
        }
    }

    /// Returns when another writer has taken this agent's place.
    pub async fn fenced(&self) -> AgentError {
        let mut held = self.held.subscribe();
        loop {
            if let Held {
                claim: Some(own),
                fenced: Some(holder),
            } = &*held.borrow_and_update()
            {
                return fenced(own.timeline, holder.clone());
            }
            if held.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
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
        let told = self.read().await.unwrap_or_default();
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

    /// Creates the claim in every region that answered. False: another process has that epoch somewhere.
    async fn place(&self, claim: &Writer, told: &Told) -> Result<bool> {
        let document = encode(claim)?;
        let (mut placed, mut failure) = (false, None);
        for (region, _) in told {
            match self.create(&*region.quick, claim, document.clone()).await {
                Ok(true) => placed = true,
                Ok(false) => return Ok(false),
                Err(error) if is_of_the_region(&error) => {
                    tracing::warn!(region = region.name, %error, "the claim is placed there later");
                    failure = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        match failure {
            Some(error) if !placed => Err(error),
            _ => Ok(placed),
        }
    }

    async fn create(&self, store: &dyn Store, claim: &Writer, document: Bytes) -> Result<bool> {
        let key = self.layout.writer(claim.epoch);
        let put = store
            .put(&key, Object::new(document.clone()), PutMode::Create)
            .await?;
        // An attempt whose answer was lost finds its own claim.
        Ok(put == Put::Created || store.get(&key).await? == document)
    }

    async fn read(&self) -> Result<Told> {
        let away = self.away().clone();
        let asked = self
            .regions
            .iter()
            .filter(|region| !away.contains(&region.index))
            .cloned();
        ask(asked, |region| async move {
            newest_of(&*region.quick, &self.layout, 0).await
        })
        .await
    }

    async fn pulses(&self, told: &Told) -> Result<Vec<(Arc<Region>, Pulse)>> {
        let regions = told.iter().map(|(region, _)| region.clone());
        let read = ask(regions, |region| async move {
            match inventory::pulse(&*region.quick, &self.layout).await {
                Err(AgentError::Object { .. }) => Ok(None),
                other => other,
            }
        });
        let read = read.await?.into_iter();
        Ok(read
            .filter_map(|(region, pulse)| Some((region, pulse?)))
            .collect())
    }
}

fn log_claim(claim: &Writer, before: Option<&Writer>) {
    let before = before.map_or_else(|| "none".to_owned(), name);
    tracing::info!(epoch = claim.epoch, timeline = %claim.timeline, instance = claim.instance, before, "claimed the archive");
}

fn newest(told: &Told) -> Option<&Writer> {
    told.iter()
        .filter_map(|(_, claim)| claim.as_ref())
        .max_by_key(|claim| rank(claim))
}

/// Asks regions at the same time. Those that fail or are much slower than another one are left out, as long as one
/// answers.
async fn ask<T, F>(
    regions: impl Iterator<Item = Arc<Region>>,
    question: impl Fn(Arc<Region>) -> F,
) -> Result<Vec<(Arc<Region>, T)>>
where
    F: Future<Output = Result<T>>,
{
    let mut asked: FuturesUnordered<_> = regions
        .map(|region| {
            let answer = question(region.clone());
            async move { (region, answer.await) }
        })
        .collect();
    let (mut told, mut failure, mut limit) = (Vec::new(), None, None);
    loop {
        tokio::select! {
            biased;
            answer = asked.next() => match answer {
                None => break,
                Some((region, Ok(answer))) => {
                    limit.get_or_insert_with(|| Instant::now() + GRACE);
                    told.push((region, answer));
                }
                Some((region, Err(error))) => {
                    tracing::debug!(region = region.name, %error, "its claims cannot be read");
                    failure = Some(error);
                }
            },
            () = tokio::time::sleep_until(limit.unwrap_or_else(Instant::now)), if limit.is_some() => break,
        }
    }
    told.sort_by_key(|(region, _)| region.index);
    match failure {
        Some(error) if told.is_empty() => Err(error),
        _ => Ok(told),
    }
}

fn is_of_the_region(error: &AgentError) -> bool {
    matches!(error.kind(), Kind::Retry | Kind::Operator)
}

fn encode(claim: &Writer) -> Result<Bytes> {
    let document = records::encode(claim).map_err(|source| AgentError::Encode {
        what: "a writer claim".into(),
        source,
    })?;
    Ok(document.into())
}

/// The claim with the highest epoch above `after`.
pub async fn newest_of(store: &dyn Store, layout: &Layout, after: u64) -> Result<Option<Writer>> {
    match epochs(store, layout, after).await?.last() {
        Some(epoch) => read_claim(store, layout, *epoch).await,
        None => Ok(None),
    }
}

/// The newest claim of a process that may not be the newest of all.
async fn older_claim(store: &dyn Store, layout: &Layout, instance: &str) -> Result<Option<Writer>> {
    for epoch in epochs(store, layout, 0).await?.into_iter().rev().take(OLDER) {
        let claim = read_claim(store, layout, epoch).await?;
        if claim.as_ref().is_some_and(|claim| claim.instance == instance) {
            return Ok(claim);
        }
    }
    Ok(None)
}

/// The claimed epochs above `after`, ascending.
async fn epochs(store: &dyn Store, layout: &Layout, after: u64) -> Result<Vec<u64>> {
    let listed = list_all(store, &layout.writer_dir(), Some(&layout.writer(after))).await?;
    let epoch = |key: &str| match layout.parse(key) {
        Some(Key::Writer(epoch)) => Some(epoch),
        _ => None,
    };
    Ok(listed.iter().filter_map(|meta| epoch(&meta.key)).collect())
}

async fn read_claim(store: &dyn Store, layout: &Layout, epoch: u64) -> Result<Option<Writer>> {
    let key = layout.writer(epoch);
    let Some(bytes) = get_optional(store, &key).await? else {
        return Ok(None);
    };
    let claim = records::decode(&bytes).map_err(|source| AgentError::Object {
        region: store.region().to_owned(),
        key,
        source,
    });
    claim.map(Some)
}

/// Who a claim is of, for people.
fn name(claim: &Writer) -> String {
    format!(
        "{} (pid {}, instance {}) writes timeline {} since {}, epoch {}",
        claim.host, claim.pid, claim.instance, claim.timeline, claim.claimed_at, claim.epoch
    )
}

fn fenced(timeline: TimelineId, holder: Writer) -> AgentError {
    AgentError::Fenced {
        timeline,
        theirs: holder.timeline,
        holder: name(&holder),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
