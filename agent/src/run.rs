//! `run`: puts the parts together, watches over them, and stops them in the order of the data.
//!
//! Owns every task. The first that fails stops all; a stop signal reaches the receiver first, then what
//! comes after it, so that the last bytes are stored before the process ends.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use highwater_config::{Acknowledge, Config, OutagePolicy};
use highwater_format::{Identity, Lsn, SegmentSize};
use highwater_pgwire::{ConnInfo, Connection};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::acknowledge::{Confirmed, Mover};
use crate::backup::BackupOptions;
use crate::budget::Budget;
use crate::clock::Clock;
use crate::encoder::Encoder;
use crate::error::{AgentError, Kind, Result};
use crate::frontier::Position;
use crate::heal::Healer;
use crate::outage::{GiveUp, LettingGo, Watcher, is_waited_for};
use crate::places::Places;
use crate::progress::Progress;
use crate::receiver::{Context, Receiver, Tools};
use crate::region::{Archive, Region};
use crate::resume::Resume;
use crate::schedule::{Schedule, Scheduled};
use crate::sealer::Sealer;
use crate::segmenter::{Rules, object_size};
use crate::start::{Beginning, Start};
use crate::surroundings::Surroundings;
use crate::synchronous::{APPLICATION_NAME, Manner};
use crate::unended::Unended;
use crate::unended::ask::Asker;
use crate::uploader::{Shared, Uploader, is_of_this_region};
use crate::window::Window;
use crate::writer::Claims;
use crate::{admin, agree, branches, ending, identity, inventory, pulse, server};

/// Pause between attempts while nothing runs yet.
const START_PAUSE: Duration = Duration::from_secs(1);

/// Cuts that may wait for the sealer.
const QUEUE: usize = 64;

/// The share of the memory limit that WAL bytes may take; the rest is for sockets, TLS and the program.
const WAL_SHARE: u64 = 2;

/// Whole objects of WAL that have to find room: one being received, one sealed for the regions that keep up,
/// one in flight to one that does not.
const OBJECTS_AT_ONCE: u64 = 4;

/// How long the start waits for the other regions when one has been read; they join later then.
const JOIN_GRACE: Duration = Duration::from_secs(3);

/// For so long what comes damaged from every region may have been damaged on the way, and not where it lies.
const ON_THE_WAY: Duration = Duration::from_secs(15);

/// What the command line adds to the configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// A new system identifier may begin under a cluster name that already holds another one.
    pub new_lineage: bool,
    /// The place of another agent is taken whether it lives or not.
    pub take_over: bool,
}

/// Runs the agent until `cancel`, which stores the last bytes first.
pub async fn run(config: Config, options: Options, cancel: CancellationToken) -> Result<()> {
    let surroundings = Surroundings::of(&config).await?;
    Box::pin(run_in(config, options, surroundings, cancel)).await
}

/// The same, in surroundings that the caller brings.
pub async fn run_in(
    config: Config,
    options: Options,
    surroundings: Surroundings,
    cancel: CancellationToken,
) -> Result<()> {
    let Surroundings { clock, state, .. } = &surroundings;
    state.update(|snapshot| {
        snapshot.started_at = Some(clock.now());
        snapshot.cluster = config.cluster.name.to_string();
    });
    let schedule = config.backup.schedule.as_deref().map(str::parse).transpose()?;
    let mut tasks = JoinSet::new();
    let services = CancellationToken::new();
    if let Some(listen) = config.admin.listen {
        let listener = admin::bind(listen).await?;
        tasks.spawn(admin::serve(
            listener,
            state.clone(),
            clock.clone(),
            services.clone(),
        ));
    }
    let give_up = GiveUp::default();
    tasks.spawn(Watcher::new(&config, &surroundings, &give_up, &services).run());
    let (conninfo, clock, state) = (surroundings.conninfo.clone(), clock.clone(), state.clone());
    let letting_go = LettingGo {
        give_up: &give_up,
        conninfo: &conninfo,
        slot: &config.cluster.slot,
        system_id: None,
        standby: config.cluster.standby,
        state: &state,
        clock: &clock,
    };
    let (started, given_up) = tokio::select! {
        biased;
        () = cancel.cancelled() => return Ok(()),
        started = letting_go.during(start(&config, options, surroundings)) => started,
    };
    let mut started = started?;
    started.slot_event = given_up.or(started.slot_event);
    started
        .supervise(config, schedule, tasks, give_up, services, cancel)
        .await
}

/// Bytes of WAL that may be held: the configured limit's share, but at least what large segments need to get
/// through at all.
fn wal_limit(config: &Config, size: SegmentSize) -> u64 {
    let (share, needed) = (config.wal.memory / WAL_SHARE, OBJECTS_AT_ONCE * object_size(size));
    if needed > share {
        tracing::warn!(
            needed_mib = needed >> 20,
            "memory.limit is too small for this server's WAL segments; using more: set it to at least twice what is needed"
        );
    }
    share.max(needed)
}

/// The connection parameters: those of the configuration, or libpq's own environment.
pub fn connection(config: &Config) -> Result<ConnInfo> {
    use secrecy::ExposeSecret as _;
    let text = config
        .cluster
        .connection
        .as_ref()
        .map(|secret| secret.expose_secret());
    Ok(ConnInfo::resolve(text)?.with_application_name(APPLICATION_NAME))
}

/// Everything that is known before the first byte is streamed.
struct Started {
    shared: Shared,
    claims: Arc<Claims>,
    conninfo: ConnInfo,
    identity: Identity,
    connection: Connection,
    resume: Resume,
    slot_event: Option<String>,
    /// A slot that was made for this start.
    new_slot: Option<Option<Lsn>>,
    /// Per region: read already (and where its WAL ends), or to be joined later.
    positions: Vec<Option<Option<Position>>>,
    clock: Clock,
}

async fn start(config: &Config, options: Options, surroundings: Surroundings) -> Result<Started> {
    let Surroundings {
        clock,
        state,
        conninfo,
        regions,
        me,
    } = surroundings;
    let (connection, identity) = first_contact(&conninfo, config.outage.policy).await?;
    state.update(|snapshot| snapshot.system_id = Some(identity.system_id));
    let mut archive = Archive::new(config.cluster.name.clone(), identity.clone(), regions);
    archive.new_lineage = options.new_lineage;
    let places = Places::new(archive.layout.root(), &me.instance);
    let positions = read_regions(&archive, &places, config.outage.policy).await?;
    let claims = Claims::new(
        me,
        &archive,
        state.clone(),
        clock.clone(),
        config.pulse.interval,
        options.take_over,
    );
    let unread = positions
        .iter()
        .enumerate()
        .filter(|(_, position)| position.is_none());
    claims.leave_out(unread.map(|(index, _)| index));
    let start = Start {
        config,
        conninfo: &conninfo,
        identity: &identity,
        claims: &claims,
        state: &state,
    };
    let mut begun = start.begin(furthest(&positions), connection).await?;
    let mut positions = positions;
    if furthest(&positions).is_none() {
        // Until this agent might write another one may have: an archive is begun once.
        positions = match read_regions(&archive, &places, config.outage.policy).await {
            Ok(positions) => positions,
            Err(error) => {
                start.give_up(begun).await;
                return Err(error);
            }
        };
        if furthest(&positions).is_some() {
            tracing::info!("another agent has begun the archive meanwhile: going on where that ends");
            begun = start.anew(begun, furthest(&positions)).await?;
        }
    }
    let Beginning {
        connection,
        new_slot,
        view,
        resume,
        histories,
    } = begun;
    let limit = wal_limit(config, identity.segment_size);
    let origin = Position {
        timeline: resume.timeline,
        lsn: resume.sealed,
    };
    let begins = resume.after.unwrap_or(origin);
    let kept_from = view.slot.map(|lsn| Position {
        timeline: view.history.timeline_at(lsn),
        lsn,
    });
    let shared = Shared {
        segment_size: identity.segment_size,
        window: Arc::new(Window::new(archive.regions.len(), limit / 2, begins)),
        progress: Arc::new(Progress::new(
            config.durability.policy,
            archive.regions.len(),
            state.clone(),
        )),
        state,
        uploads: config.wal.uploads,
        in_flight: limit / 4,
        server: view.history.clone(),
        budget: Budget::new(limit),
        origin,
        // One that was made a moment ago says nothing of what was stored before.
        acknowledged: kept_from.filter(|_| new_slot.is_none()),
        kept_from,
        histories: histories.into(),
        places,
        archive,
    };
    agree::at_start(&shared, &positions, JOIN_GRACE).await?;
    Ok(Started {
        shared,
        claims: Arc::new(claims),
        conninfo,
        identity,
        connection,
        resume,
        slot_event: view.slot_event,
        new_slot,
        positions,
        clock,
    })
}

/// The end of the archive, as far as it was read.
fn furthest(positions: &[Option<Option<Position>>]) -> Option<Position> {
    positions.iter().flatten().flatten().max().copied()
}

/// Connects for the first time. A server that is not up yet is waited for; one that says no is not.
async fn first_contact(conninfo: &ConnInfo, policy: OutagePolicy) -> Result<(Connection, Identity)> {
    loop {
        let attempt = async {
            let mut connection = server::connect(conninfo).await?;
            let identity = server::identity(&mut connection).await?;
            Ok((connection, identity))
        };
        match attempt.await {
            Ok(contact) => return Ok(contact),
            Err(error) => wait_or_fail(policy, error, "PostgreSQL cannot be reached yet").await?,
        }
    }
}

async fn wait_or_fail(policy: OutagePolicy, error: AgentError, what: &str) -> Result<()> {
    if !is_waited_for(policy, &error) {
        return Err(error);
    }
    tracing::warn!(%error, "{what}, trying again");
    tokio::time::sleep(START_PAUSE).await;
    Ok(())
}

/// Reads every region; those that cannot be read join later, whatever the reason, as long as one holds WAL: what a
/// running agent bears in one region must not keep one that starts from the others. Two that are the same place are
/// refused.
///
/// Where those that answer hold nothing, nobody but the others knows where the archive ends: beginning anew beside one
/// that holds WAL would leave a hole between the two that nobody has recorded. The slot cannot tell: it may have been made
/// anew since, and a moment ago is not now.
async fn read_regions(
    archive: &Archive,
    places: &Places,
    policy: OutagePolicy,
) -> Result<Vec<Option<Option<Position>>>> {
    let mut damaged = None;
    loop {
        let read = read_all(archive, places).await;
        let answered = archive
            .regions
            .iter()
            .zip(&read)
            .filter(|(_, result)| result.is_ok());
        let answered: Vec<_> = answered.map(|(region, _)| region.place()).collect();
        places.tell_apart(&answered).await?;
        let mut positions = Vec::with_capacity(read.len());
        let mut failures = Vec::new();
        for (region, result) in archive.regions.iter().zip(read) {
            match result {
                Ok(position) => positions.push(Some(position)),
                Err(error) if is_of_this_region(&error) => {
                    tracing::error!(region = region.name, %error, "the region cannot be read; it joins when it can");
                    positions.push(None);
                    failures.push(error);
                }
                Err(error) => return Err(error),
            }
        }
        let known = positions.iter().flatten().any(Option::is_some);
        failures.sort_by_key(may_pass);
        let Some(failure) = failures.into_iter().next().filter(|_| !known) else {
            return Ok(positions);
        };
        if may_be_whole(&failure, &mut damaged) {
            tracing::warn!(error = %failure, "it may have been damaged on the way: reading it again");
            tokio::time::sleep(START_PAUSE).await;
            continue;
        }
        nothing_is_known(policy, failure, positions.iter().any(Option::is_some)).await?;
    }
}

/// Whether what came damaged, since `damaged`, may lie there whole.
fn may_be_whole(failure: &AgentError, damaged: &mut Option<Instant>) -> bool {
    if failure.kind() != Kind::Damage {
        *damaged = None;
        return false;
    }
    damaged.get_or_insert_with(Instant::now).elapsed() < ON_THE_WAY
}

/// Whether waiting may cure it; a wrong setting stays wrong.
fn may_pass(error: &AgentError) -> bool {
    matches!(error.kind(), Kind::Retry | Kind::Operator)
}

/// No region was read that holds WAL. `answered`: at least one was, and is empty.
async fn nothing_is_known(policy: OutagePolicy, failure: AgentError, answered: bool) -> Result<()> {
    if !answered {
        return wait_or_fail(policy, failure, "no region can be read").await;
    }
    if !may_pass(&failure) {
        return Err(failure);
    }
    tracing::error!(
        error = %failure,
        "the archive begins when this region has been read once: the others hold nothing, and this one may know how far it \
         was archived. If it is gone for good, take it out of the configuration"
    );
    tokio::time::sleep(START_PAUSE).await;
    Ok(())
}

/// Reads all regions at once. When one has been read the others have a little longer: one that does not
/// answer must not keep the WAL from those that do.
async fn read_all(archive: &Archive, places: &Places) -> Vec<Result<Option<Position>>> {
    let mut results: Vec<_> = archive.regions.iter().map(|region| Err(late(region))).collect();
    let reads = archive
        .regions
        .iter()
        .map(|region| async move { (region.index, read_region(archive, places, region).await) });
    let mut reads: FuturesUnordered<_> = reads.collect();
    let mut limit = None;
    loop {
        tokio::select! {
            biased;
            read = reads.next() => {
                let Some((index, result)) = read else { return results };
                if result.is_ok() && limit.is_none() {
                    limit = Some(Instant::now() + JOIN_GRACE);
                }
                if let Some(place) = results.get_mut(index) {
                    *place = result;
                }
            }
            () = tokio::time::sleep_until(limit.unwrap_or_else(Instant::now)), if limit.is_some() => return results,
        }
    }
}

fn late(region: &Region) -> AgentError {
    AgentError::Trouble {
        what: format!(
            "region {} did not answer within {} s after another one",
            region.name,
            JOIN_GRACE.as_secs()
        ),
        next: "It joins when it does".into(),
    }
}

async fn read_region(archive: &Archive, places: &Places, region: &Region) -> Result<Option<Position>> {
    identity::admit(&*region.quick, archive).await?;
    places.mark(region.place()).await?;
    inventory::position(&*region.quick, &archive.layout, archive.identity.segment_size).await
}

impl Started {
    async fn supervise(
        self,
        config: Config,
        schedule: Option<Schedule>,
        mut tasks: JoinSet<Result<()>>,
        give_up: GiveUp,
        services: CancellationToken,
        cancel: CancellationToken,
    ) -> Result<()> {
        let budget = self.shared.budget.clone();
        self.shared.state.update(|snapshot| {
            snapshot.memory_limit = budget.limit();
            snapshot.needed = config.durability.policy.needed(config.regions.len());
        });
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let encoder = Encoder::new(config.wal.compression, threads);
        let (queue, work) = mpsc::channel(QUEUE);
        let stop_storing = CancellationToken::new();
        let (shared, claims) = (self.shared, self.claims);
        // Everybody's position is known before anybody decides where an empty region begins.
        for (region, known) in shared.archive.regions.iter().zip(&self.positions) {
            if let Some(Some(position)) = known {
                shared.progress.stored(region.index, *position);
            }
        }
        for (region, known) in shared.archive.regions.iter().zip(self.positions) {
            let uploader = Uploader::new(shared.clone(), region.clone());
            tasks.spawn(uploader.run(known, stop_storing.clone()));
            let interval = config.pulse.interval;
            let pulse = pulse::run(
                shared.clone(),
                region.clone(),
                interval,
                claims.clone(),
                stop_storing.clone(),
            );
            tasks.spawn(pulse);
            let healer = Healer::new(
                shared.clone(),
                region.clone(),
                config.heal.interval,
                self.clock.clone(),
            );
            tasks.spawn(healer.run(services.clone()));
        }
        let unended = Arc::new(Unended::default());
        let branches = branches::watch(shared.archive.clone(), shared.state.clone(), stop_storing.clone());
        tasks.spawn(async move {
            branches.await;
            Ok(())
        });
        let scheduled = Scheduled {
            schedule,
            unended: unended.clone(),
            conn: self.conninfo.clone().with_application_name("highwater backup"),
            archive: Arc::new(shared.archive.clone()),
            options: BackupOptions::from_config(&config),
            state: shared.state.clone(),
            clock: self.clock.clone(),
            cancel: services.clone(),
        };
        tasks.spawn(scheduled.run());
        let manner = Manner::from(&config.wal);
        if manner.synchronous {
            let asker = Asker {
                unended: unended.clone(),
                archive: shared.archive.clone(),
                needed: config.durability.policy.needed(config.regions.len()),
                progress: shared.progress.clone(),
                state: shared.state.clone(),
                cancel: services.clone(),
            };
            tasks.spawn(asker.run());
        }
        let confirmed = Confirmed::default();
        if manner.acknowledge == Acknowledge::Slot {
            let mover = Mover {
                conninfo: self.conninfo.clone().with_application_name("highwater slot"),
                slot: config.cluster.slot.clone(),
                system_id: self.identity.system_id,
                confirmed: confirmed.clone(),
                cancel: services.clone(),
            };
            tasks.spawn(mover.run());
        }
        let sealer = Sealer::new(&shared, self.identity.system_id, encoder.clone(), budget.clone());
        tasks.spawn(sealer.run(work));
        let rules = Rules {
            interval: config.wal.flush_interval,
            size: config.wal.flush_size,
        };
        let tools = Tools {
            rules,
            identity: self.identity.clone(),
            encoder,
            budget,
            queue,
            state: shared.state.clone(),
        };
        let context = Context {
            shared: shared.clone(),
            tools,
            conninfo: self.conninfo,
            identity: self.identity,
            slot: config.cluster.slot.clone(),
            standby: config.cluster.standby,
            claims: claims.clone(),
            manner,
            confirmed,
            unended,
            give_up,
            clock: self.clock,
            started: Instant::now(),
            cancel: cancel.clone(),
        };
        let receiver = Receiver::new(
            context,
            self.connection,
            self.resume,
            self.slot_event,
            self.new_slot,
        );
        let result = watch(receiver, &mut tasks).await;
        // In the order of the data: nothing comes any more, what is sealed has been given its time.
        services.cancel();
        stop_storing.cancel();
        let ended = ending::drain(&mut tasks).await;
        match result.and(ended) {
            Err(error) => Err(claims.name_rival(error).await),
            done => done,
        }
    }
}

/// Runs the receiver; if any other task fails first, that failure ends everything.
async fn watch(receiver: Receiver, tasks: &mut JoinSet<Result<()>>) -> Result<()> {
    let receiving = receiver.run();
    tokio::pin!(receiving);
    loop {
        tokio::select! {
            biased;
            // A task that failed takes the receiver with it: its error is the cause.
            Some(ended) = tasks.join_next() => ending::flatten(ended)?,
            result = &mut receiving => return result,
        }
    }
}
