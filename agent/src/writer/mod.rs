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

pub mod claim;
pub mod judge;

use std::collections::BTreeSet;
use std::future::Future;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use highwater_format::{History, Layout, Pulse, TimelineId, Writer};
use highwater_store::Store;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::error::{AgentError, Kind, Result};
use crate::inventory;
use crate::region::{Archive, Region, get_optional};
use crate::state::State;
use claim::{GRACE, ask, create, descent, name, newest_of, older_claim};
use judge::{Entry, Line, Sign, Standing, Watch, above_a_stray, entry, rank, standing};

/// The other side of a timeline is silent when its pulses did not change for so many of our own intervals.
const SILENT_FOR: u32 = 3;

/// Looks at the pulses within one interval: often enough to tell apart two writers that overwrite each other's.
const LOOKS: u32 = 4;

/// Lost races for an epoch in a row before the attempt is given up; another connection tries again.
const ROUNDS: u32 = 16;

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
    /// The highest epoch that was ever tried: two claims of one process never have the same.
    tried: AtomicU64,
    /// Only for the first claim: later ones ask like everybody.
    take_over: AtomicBool,
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
            tried: AtomicU64::new(0),
            take_over: AtomicBool::new(take_over),
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

    /// Asks to write what a server on `line` sends: before the first byte of every connection and timeline.
    pub async fn enter(&self, line: Line, standby: bool) -> Result<()> {
        if standby {
            self.hold(None);
        } else {
            let own = self.held.borrow().claim.clone();
            match own.filter(|own| line.is_of(own)) {
                None => self.claim(line).await?,
                Some(own) => self.still_holds(own).await?,
            }
        }
        self.state.update(|snapshot| snapshot.standby = standby);
        Ok(())
    }

    /// Makes sure that the archive does not know the server's timeline with another history. Positions mean nothing
    /// before that: the same number stands for two different timelines then.
    pub async fn compare(&self, history: &History) -> Result<()> {
        let timeline = history.timeline;
        let claimed = |held: &Held| {
            held.claim
                .as_ref()
                .is_some_and(|own| Line::of(history).is_of(own))
        };
        if timeline == TimelineId::FIRST || claimed(&self.held.borrow()) {
            return Ok(());
        }
        let key = self.layout.history(timeline);
        let read = self.ask_all(|region| {
            let key = key.clone();
            async move { get_optional(&*region.quick, &key).await }
        });
        for (region, content) in read.await? {
            let Some(theirs) = content.and_then(|content| History::parse(timeline, &content).ok()) else {
                continue;
            };
            if theirs.entries != history.entries {
                return Err(AgentError::Conflict {
                    region: region.name.clone(),
                    key,
                    ours: descent(history),
                    theirs: descent(&theirs),
                });
            }
        }
        Ok(())
    }

    async fn still_holds(&self, own: Writer) -> Result<()> {
        // While no region answers nothing can be stored either; the next pulse that gets through looks again.
        let told = tokio::time::timeout(GRACE, self.read()).await;
        let told = told.ok().and_then(Result::ok).unwrap_or_default();
        let holder = match newest(&told) {
            Some(newest) => standing(&own, newest),
            None => self
                .held
                .borrow()
                .fenced
                .clone()
                .map_or(Standing::Holds, Standing::Fenced),
        };
        if let Standing::Fenced(holder) = holder {
            let error = fenced(own.timeline, &holder);
            self.fence(&own, holder);
            return Err(error);
        }
        self.hold(Some(own));
        Ok(())
    }

    async fn claim(&self, line: Line) -> Result<()> {
        let mut silent = None;
        for _ in 0..ROUNDS {
            let told = self.read().await?;
            let newest = newest(&told);
            let alone = self.is_alone(&told, newest).await?;
            if let Entry::Ask(holder) = entry(&self.me.instance, line, newest, alone)
                && !self.take_over.load(Ordering::Relaxed)
                && silent.as_ref() != Some(&holder)
            {
                self.must_be_silent(&told, line.timeline, &holder).await?;
                // Meanwhile somebody else may have claimed: look again.
                silent = Some(holder);
                continue;
            }
            let claim = Writer {
                epoch: self.next_epoch(newest.map_or(1, |newest| newest.epoch + 1)),
                instance: self.me.instance.clone(),
                host: self.me.host.clone(),
                pid: self.me.pid,
                timeline: line.timeline,
                claimed_at: self.clock.now(),
                begins: Some(line.begins),
            };
            if self.place(&claim, &told).await? {
                log_claim(&claim, newest);
                self.take_over.store(false, Ordering::Relaxed);
                self.hold(Some(claim));
                return Ok(());
            }
        }
        Err(AgentError::Trouble {
            what: format!(
                "{ROUNDS} attempts to claim timeline {} were overtaken by other agents",
                line.timeline
            ),
            next: "Trying again; if it goes on, see which agents are configured for this archive".into(),
        })
    }

    /// At least `epoch`, and higher than any that was tried before.
    fn next_epoch(&self, epoch: u64) -> u64 {
        let epoch = epoch.max(self.tried.load(Ordering::Relaxed) + 1);
        self.tried.store(epoch, Ordering::Relaxed);
        epoch
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
        let (mut changed, mut watch) = (
            Instant::now(),
            Watch::new(&self.me.instance, timeline, &holder.instance),
        );
        loop {
            for (region, pulse) in self.pulses(told).await? {
                match watch.observe(region.index, &pulse) {
                    Sign::None => {}
                    Sign::Changed => changed = Instant::now(),
                    Sign::Alive => return Err(self.in_use(&region, &pulse, holder, timeline).await),
                }
            }
            if changed.elapsed() >= patience {
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
        let other = if pulse.timeline == timeline {
            ", begun elsewhere"
        } else {
            ""
        };
        AgentError::InUse {
            what: format!(
                "this archive is in use: {holder}, and its server is alive at {} on timeline {}; this server is on timeline \
                 {timeline}{other}. It is a restored copy, or was promoted beside a primary that lives. Nothing was written",
                pulse.wal_end, pulse.timeline
            ),
            next: "Give this server a cluster name or prefix of its own. If it really takes the other one's place, stop that \
                   one first, or start this agent with `run --take-over`"
                .into(),
        }
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
        if let Some(epoch) = newest.as_ref().and_then(|newest| above_a_stray(&own, newest)) {
            return self.claim_above(store, &own, epoch).await;
        }
        match newest {
            None => create(store, &self.layout, &own).await,
            Some(newest) => match standing(&own, &newest) {
                Standing::Holds => Ok(true),
                Standing::Fenced(holder) => {
                    self.fence(&own, holder);
                    Ok(false)
                }
            },
        }
    }

    /// Claims what is held again, above a stray claim. The other regions get it with their next look.
    async fn claim_above(&self, store: &dyn Store, own: &Writer, epoch: u64) -> Result<bool> {
        let again = Writer {
            epoch: self.next_epoch(epoch),
            claimed_at: self.clock.now(),
            ..own.clone()
        };
        if !create(store, &self.layout, &again).await? {
            return Ok(false);
        }
        self.held.send_if_modified(|held| {
            let ours = held.claim.as_ref() == Some(own);
            if ours {
                held.claim = Some(again);
            }
            ours
        });
        Ok(true)
    }

    /// Notes who has taken the place of `own`, unless that is not held any more.
    fn fence(&self, own: &Writer, holder: Writer) {
        let changed = self.held.send_if_modified(|held| {
            let ours = held.claim.as_ref() == Some(own);
            let changed = ours && held.fenced.as_ref() != Some(&holder);
            if ours {
                held.fenced = Some(holder);
            }
            changed
        });
        if changed {
            self.state.update(|snapshot| snapshot.writer_epoch = 0);
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
                return fenced(own.timeline, holder);
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
        let (mut placed, mut failure) = (false, None);
        for (region, _) in told {
            match create(&*region.quick, &self.layout, claim).await {
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

    async fn read(&self) -> Result<Told> {
        self.ask_all(|region| async move { newest_of(&*region.quick, &self.layout, 0).await })
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

fn is_of_the_region(error: &AgentError) -> bool {
    matches!(error.kind(), Kind::Retry | Kind::Operator)
}

fn fenced(timeline: TimelineId, holder: &Writer) -> AgentError {
    AgentError::Fenced {
        timeline,
        theirs: holder.timeline,
        holder: name(holder),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
