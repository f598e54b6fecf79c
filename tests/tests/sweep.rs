//! The fault sweep: an error, a lost reply and a crash at every single request that an operation makes to a store,
//! each followed by a clean run, after which the archive is in the state of a run without faults.
//!
//! Owns: which request is struck, and what "the same state" is. The request is the n-th that a region gets, for
//! n = 1, 2, ... until the operation makes fewer. In one run the n-th request to one region fails and the n-th to
//! the other takes effect without a reply; in another one the process is killed at the n-th request of one region,
//! before it takes effect or after it did. Regions and sides take turns from request to request, and of the many
//! requests of a long catch-up every third is struck; `HIGHWATER_SWEEP=all` strikes every one, with the error in either
//! region and all four crashes.
//!
//! The same state: in both regions WAL without a hole to the end that was asked for, equal bytes, and base backups
//! that both have. After every run each visible base backup is planned with, from each region alone; each state that
//! differs in what base backups are visible or unfinished where is, once, verified object by object, restored and
//! started from each region.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use highwater_format::Object;
use highwater_tests::clock::eventually;
use highwater_tests::program::Running;
use highwater_tests::s3::Strike;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, config};
use highwater_tests::{PgCluster, PgVersion, Program, S3Server, S3Snapshot, archive, lsn};

const VERSION: PgVersion = PgVersion::V15;
const SEGMENT: u64 = 1 << 20;
/// Runs side by side: each is mostly waiting.
const PARALLEL: usize = 4;
/// No operation here makes as many requests; one that does not come to an end would be a fault by itself.
const MOST: u64 = 150;
/// Commits that follow a blow, beyond the roll-up that it was near.
const AFTERWARDS: u32 = 10;
/// Behind so many requests an operation repeats itself, and every third one is struck.
const EACH: u64 = 20;

/// Where a strike lands.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// An error at this region, a lost reply at the other.
    Errors(usize),
    /// The process dies at a request of this region.
    Crash(usize, Strike),
}

/// What base backups a region has: visible ones, and those that were begun and never became it.
type Backups = (usize, usize);

/// A server that many archives are made of: each run has its own slot and its own regions.
struct Bench {
    primary: PgCluster,
    /// What both regions hold before the operation.
    before: [S3Snapshot; 2],
    settings: &'static str,
    /// The end states that were restored.
    restored: Mutex<BTreeSet<[Backups; 2]>>,
}

impl Bench {
    async fn start(settings: &'static str) -> Result<Self> {
        let primary = PgCluster::builder(VERSION)
            .segment_mb(1)
            .conf("max_replication_slots", "100")
            .conf("max_wal_senders", "60")
            .conf("wal_keep_size", "1GB");
        let primary = primary.start().await?;
        primary.sql("CREATE TABLE t (i int, filling text)").await?;
        let empty = S3Server::start().await?;
        empty.create_bucket(BUCKET);
        let before = [empty.snapshot(), empty.snapshot()];
        Ok(Self {
            primary,
            before,
            settings,
            restored: Mutex::default(),
        })
    }

    /// Whether an end state is seen for the first time.
    fn is_new(&self, state: [Backups; 2]) -> bool {
        self.restored
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(state)
    }

    async fn run(&self, name: String) -> Result<Run<'_>> {
        let [north, south] = &self.before;
        let regions = [
            S3Server::serve(north.clone()).await?,
            S3Server::serve(south.clone()).await?,
        ];
        Ok(Run {
            bench: self,
            regions,
            slot: format!("sweep_{name}"),
        })
    }

    /// One small commit. A run that begins with what was there before all runs has to stream what every other run
    /// wrote too: the n-th of them would otherwise make ever more requests, and the sweep never end.
    async fn commit(&self) -> Result<u64> {
        self.primary
            .sql("INSERT INTO t VALUES (3, 'while it catches up')")
            .await?;
        lsn::parse(&self.primary.value("SELECT pg_current_wal_flush_lsn()").await?)
    }

    /// Commits of a few pages each, and a segment that ends.
    async fn write(&self, commits: u32) -> Result<u64> {
        for _ in 0..commits {
            self.primary
                .sql("INSERT INTO t VALUES (1, repeat('x', 300))")
                .await?;
        }
        self.primary.sql("SELECT pg_switch_wal()").await?;
        self.primary
            .sql("INSERT INTO t VALUES (2, 'after the switch')")
            .await?;
        lsn::parse(&self.primary.value("SELECT pg_current_wal_flush_lsn()").await?)
    }
}

/// One run of an operation, with its own regions and slot.
struct Run<'a> {
    bench: &'a Bench,
    regions: [S3Server; 2],
    slot: String,
}

impl Run<'_> {
    fn agent(&self, command: &str) -> Result<Program> {
        let regions: Vec<_> = REGIONS.into_iter().zip(&self.regions).collect();
        let connection = self.bench.primary.connection_string();
        let toml = config(Some(&connection), &regions).replacen(
            "[cluster]\n",
            &format!("[cluster]\nslot = \"{}\"\n", self.slot),
            1,
        );
        let toml = format!("{toml}[admin]\nlisten = \"off\"\n{}", self.bench.settings);
        Ok(Program::agent()?.config(&toml)?.arg(command))
    }

    fn strike(&self, nth: u64, blow: Blow) {
        match blow {
            Blow::Errors(region) => {
                self.regions[region].faults().strike(nth, Strike::Fail(503));
                self.regions[1 - region].faults().strike(nth, Strike::LoseReply);
            }
            Blow::Crash(region, strike) => self.regions[region].faults().strike(nth, strike),
        }
    }

    /// Nothing is struck any more.
    fn calm(&self) {
        self.regions.iter().for_each(|region| region.faults().clear());
    }

    /// Whether the blow has fallen in every region that it is for.
    fn fallen(&self, blow: Blow) -> bool {
        let struck = |region: &S3Server| region.faults().struck();
        match blow {
            Blow::Errors(_) => self.regions.iter().all(struck),
            Blow::Crash(region, _) => struck(&self.regions[region]),
        }
    }

    fn struck(&self) -> bool {
        self.regions.iter().any(|region| region.faults().struck())
    }

    /// Kills the process if the blow that is to kill it has fallen; whether it has.
    fn dead(&self, process: &mut Running, blow: Blow) -> bool {
        let Blow::Crash(region, _) = blow else {
            return false;
        };
        if !self.regions[region].faults().struck() {
            return false;
        }
        process.kill9();
        true
    }

    /// Runs the agent until both regions hold everything up to `target`; killed and started again where a blow says so.
    async fn streams_to(&self, target: u64, blow: Option<Blow>) -> Result<Running> {
        let mut agent = self.agent("run")?.start()?;
        self.reaches(&mut agent, target, blow).await?;
        // Before that it could not leave in good order.
        agent.says("streaming", PATIENCE).await?;
        Ok(agent)
    }

    /// Waits until both regions hold everything up to `target`.
    async fn reaches(&self, agent: &mut Running, target: u64, mut blow: Option<Blow>) -> Result<()> {
        let started = std::time::Instant::now();
        while !self
            .regions
            .iter()
            .all(|region| end(&region.snapshot()) >= target)
        {
            if blow.is_some_and(|blow| self.dead(agent, blow)) {
                blow = None;
                *agent = self.agent("run")?.start()?;
            }
            ensure!(
                agent.is_running() && started.elapsed() < PATIENCE,
                "no end:\n{}",
                agent.stderr()
            );
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        Ok(())
    }

    /// Ends the agent, drops the slot, and judges the state that is left. Nothing is struck any more.
    async fn judge(&self, mut agent: Running, target: u64) -> Result<()> {
        self.calm();
        agent.terminate();
        ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
        let drop_slot = format!("SELECT pg_drop_replication_slot('{}')", self.slot);
        let dropped = || async { self.bench.primary.sql(&drop_slot).await.ok() };
        eventually("the slot to be free", PATIENCE, dropped).await?;
        let mut contents = Vec::new();
        for (name, region) in REGIONS.iter().zip(&self.regions) {
            contents.push(wal_of(region, target).with_context(|| (*name).to_owned())?);
        }
        let [(north_first, north), (south_first, south)] = &contents[..] else {
            anyhow::bail!("two regions");
        };
        ensure!(
            north_first == south_first,
            "{} begins at {}, {} at {}",
            REGIONS[0],
            lsn::show(*north_first),
            REGIONS[1],
            lsn::show(*south_first)
        );
        let differ = north.iter().zip(south).position(|(one, other)| one != other);
        let differ = differ.map(|at| lsn::show(north_first + at as u64));
        ensure!(
            differ.is_none(),
            "the regions differ from {} on",
            differ.unwrap_or_default()
        );
        self.same_backups()
    }

    /// The backup that was struck may have become visible in one region only, where it is whole; all others are in both.
    fn same_backups(&self) -> Result<()> {
        let [north, south] = [self.backups(0), self.backups(1)];
        let single: Vec<_> = north.symmetric_difference(&south).collect();
        let newest_in_both = north.last() == south.last();
        ensure!(
            single.len() <= 1 && newest_in_both,
            "the regions have different backups: {north:?} {south:?}"
        );
        Ok(())
    }

    /// Every visible backup can be planned with from either region alone; one end state of each kind is restored.
    async fn restorable(&self, target: u64) -> Result<()> {
        for region in 0..2 {
            self.plans(region, target).await?;
        }
        let state = [self.begun_and_done(0), self.begun_and_done(1)];
        if self.bench.is_new(state) {
            for (region, name) in REGIONS.iter().enumerate() {
                self.restores(region)
                    .await
                    .with_context(|| format!("from {name}, with the backups {state:?}"))?;
            }
        }
        Ok(())
    }

    fn begun_and_done(&self, region: usize) -> Backups {
        let keys = self.regions[region].objects(BUCKET);
        let begun: BTreeSet<&str> = keys
            .iter()
            .filter_map(|key| key.split_once("/base/")?.1.split('/').next())
            .collect();
        let done = self.backups(region).len();
        (done, begun.len() - done)
    }

    /// Every visible backup can be restored from this region alone, says the program.
    async fn plans(&self, region: usize, target: u64) -> Result<()> {
        let place = self.place(region)?;
        for id in self.backups(region) {
            let plan = place
                .program()?
                .args(["plan", "--backup", &id, "--to-lsn", &lsn::show(target)]);
            plan.output().await?.expect_code(0)?;
        }
        Ok(())
    }

    fn place(&self, region: usize) -> Result<RestoreSite> {
        RestoreSite::new(VERSION, &[(REGIONS[region], &self.regions[region])])
    }

    /// The visible base backups.
    fn backups(&self, region: usize) -> BTreeSet<String> {
        let keys = self.regions[region].objects(BUCKET);
        let id = |key: &String| Some(key.strip_suffix("/backup.json")?.rsplit('/').next()?.to_owned());
        keys.iter().filter_map(id).collect()
    }

    /// Verifies one region, restores every visible backup of it, starts it and looks into the table.
    async fn restores(&self, region: usize) -> Result<()> {
        self.place(region)?
            .program()?
            .arg("verify")
            .output()
            .await?
            .expect_code(0)?;
        for (number, id) in self.backups(region).iter().enumerate() {
            let place = self.place(region)?;
            let restored = place
                .recovered(&format!("data{number}"), &["--backup", id])
                .await?;
            let rows = restored.value("SELECT count(*) FROM t").await?;
            ensure!(rows != "0", "backup {id} restores an empty table");
        }
        Ok(())
    }
}

fn end(snapshot: &S3Snapshot) -> u64 {
    archive::wal_end(snapshot, BUCKET, 1, SEGMENT)
}

/// The WAL of a region from its beginning to `target`, put together from its objects: every object opens, none
/// contradicts another, and there is no hole.
fn wal_of(region: &S3Server, target: u64) -> Result<(u64, Vec<u8>)> {
    let mut pieces = Vec::new();
    for key in region.objects(BUCKET) {
        let Some((_, start, end)) = archive::range_of(&key, SEGMENT) else {
            continue;
        };
        let stored = region.get(BUCKET, &key).context("an object is gone")?;
        let plain = Object::open(stored.bytes.clone())?.plain()?;
        ensure!(
            plain.len() as u64 == end - start,
            "{key} holds {} bytes",
            plain.len()
        );
        pieces.push((start, key, plain));
    }
    pieces.sort();
    let first = pieces.first().context("no WAL")?.0;
    let mut whole: Vec<u8> = Vec::new();
    for (start, key, plain) in pieces {
        let at = usize::try_from(start - first)?;
        ensure!(at <= whole.len(), "a hole before {key}");
        let known = (whole.len() - at).min(plain.len());
        ensure!(
            whole[at..at + known] == plain[..known],
            "{key} contradicts another object"
        );
        whole.extend_from_slice(&plain[known..]);
    }
    let needed = usize::try_from(target.checked_sub(first).context("it begins behind the target")?)?;
    ensure!(
        whole.len() >= needed,
        "it ends at {}",
        lsn::show(first + whole.len() as u64)
    );
    whole.truncate(needed);
    Ok((first, whole))
}

/// Whether nothing is left to taking turns.
fn everything() -> bool {
    std::env::var("HIGHWATER_SWEEP").is_ok_and(|sweep| sweep == "all")
}

/// What can happen at one request.
const EVERY_BLOW: [Blow; 6] = [
    Blow::Errors(0),
    Blow::Errors(1),
    Blow::Crash(0, Strike::HoldBefore),
    Blow::Crash(0, Strike::HoldAfter),
    Blow::Crash(1, Strike::HoldBefore),
    Blow::Crash(1, Strike::HoldAfter),
];

/// Whose turn it is.
fn turn(nth: u64) -> usize {
    usize::from(!nth.is_multiple_of(2))
}

/// Strikes at request 1, 2, ... until runs are not hit any more; several runs at a time. Returns where that was.
async fn sweep<F>(operation: impl Fn(u64, Blow) -> F) -> Result<u64>
where
    F: Future<Output = Result<bool>>,
{
    let everything = everything();
    let blows = |nth: u64| match everything {
        true => EVERY_BLOW.to_vec(),
        false => {
            let strike = match nth / 2 % 2 {
                0 => Strike::HoldBefore,
                _ => Strike::HoldAfter,
            };
            vec![Blow::Errors(turn(nth)), Blow::Crash(turn(nth), strike)]
        }
    };
    let struck = (1..=MOST).filter(|nth| everything || *nth <= EACH || nth % 3 == 0);
    let all = struck.flat_map(|nth| blows(nth).into_iter().map(move |blow| (nth, blow)));
    let mut runs = futures::stream::iter(all)
        .map(|(nth, blow)| {
            let run = operation(nth, blow);
            async move {
                (
                    nth,
                    run.await.with_context(|| format!("{blow:?} at request {nth}")),
                )
            }
        })
        .buffered(PARALLEL);
    let mut missed = 0;
    while let Some((nth, struck)) = runs.next().await {
        missed = if struck? { 0 } else { missed + 1 };
        // Every kind, and for both regions, came too late.
        if missed == if everything { EVERY_BLOW.len() } else { 4 } {
            return Ok(nth);
        }
    }
    anyhow::bail!("more than {MOST} requests: the operation does not come to an end")
}

/// From an empty archive to a stored segment: the very first requests of an agent's life are among those struck.
#[tokio::test]
async fn every_request_of_a_stream_may_fail_or_be_the_last() -> Result<()> {
    let bench = Bench::start("[wal]\nflush_interval = \"100ms\"\n[pulse]\ninterval = \"5m\"\n").await?;
    let struck = sweep(|nth, blow| {
        let bench = &bench;
        async move {
            let run = bench.run(format!("{nth}_{}", name_of(blow))).await?;
            bench.primary.sql("CHECKPOINT").await?;
            let target = bench.write(3).await?;
            run.strike(nth, blow);
            let mut agent = run.streams_to(target, Some(blow)).await?;
            let struck = run.struck();
            run.calm();
            // The checkpoint of a run beside this one may have let the archive begin behind the target.
            let target = bench.commit().await?;
            run.reaches(&mut agent, target, None).await?;
            run.judge(agent, target).await?;
            Ok(struck)
        }
    })
    .await?;
    ensure!(struck > 8, "only {struck} requests were struck");
    Ok(())
}

/// Chunks of ten milliseconds, so that they are rolled up: the requests around two roll-ups are struck.
#[tokio::test]
async fn every_request_around_a_roll_up_may_fail_or_be_the_last() -> Result<()> {
    let bench = Bench::start("[wal]\nflush_interval = \"10ms\"\n[pulse]\ninterval = \"5m\"\n").await?;
    let around = [30, 31, 32, 33, 34, 63, 64, 65];
    let operation = |nth: u64, blow: Blow| {
        let bench = &bench;
        async move {
            let run = bench.run(format!("{nth}_{}", name_of(blow))).await?;
            bench.primary.sql("CHECKPOINT").await?;
            bench.primary.sql("SELECT pg_switch_wal()").await?;
            run.regions
                .iter()
                .for_each(|region| region.faults().only_keys("/tail/"));
            run.strike(nth, blow);
            let mut agent = run.agent("run")?.start()?;
            agent.says("streaming", PATIENCE).await?;
            let (mut killed, mut afterwards) = (false, 0);
            let began = std::time::Instant::now();
            // Commits go on until the request has come that is struck, and past the roll-up that follows.
            while afterwards < AFTERWARDS {
                afterwards += u32::from(run.fallen(blow));
                ensure!(began.elapsed() < PATIENCE, "never struck:\n{}", agent.stderr());
                bench
                    .primary
                    .sql("INSERT INTO t VALUES (1, 'a small commit')")
                    .await?;
                tokio::time::sleep(Duration::from_millis(16)).await;
                if !killed && run.dead(&mut agent, blow) {
                    killed = true;
                    agent = run.agent("run")?.start()?;
                }
            }
            let target = lsn::parse(&bench.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
            agent.kill9();
            let agent = run.streams_to(target, None).await?;
            run.judge(agent, target).await
        }
    };
    let blows = |nth: u64| match (everything(), turn(nth)) {
        (true, _) => EVERY_BLOW.to_vec(),
        (false, region) => vec![
            Blow::Errors(region),
            Blow::Crash(region, Strike::HoldBefore),
            Blow::Crash(1 - region, Strike::HoldAfter),
        ],
    };
    let all = around
        .into_iter()
        .flat_map(|nth| blows(nth).into_iter().map(move |blow| (nth, blow)));
    let runs = futures::stream::iter(all).map(|(nth, blow)| {
        let run = operation(nth, blow);
        async move { run.await.with_context(|| format!("{blow:?} at chunk {nth}")) }
    });
    let mut runs = runs.buffered(PARALLEL);
    while let Some(run) = runs.next().await {
        run?;
    }
    Ok(())
}

/// An archive with a base backup, the second region behind the first one by several segments.
async fn behind() -> Result<Bench> {
    let mut bench = Bench::start("[wal]\nflush_interval = \"100ms\"\n[pulse]\ninterval = \"5m\"\n").await?;
    let run = bench.run("prepare".to_owned()).await?;
    let target = bench.write(3).await?;
    let agent = run.streams_to(target, None).await?;
    run.agent("backup")?.output().await?.expect_code(0)?;
    let target = bench.write(2).await?;
    drop(agent);
    let agent = run.streams_to(target, None).await?;
    let early = run.regions[1].snapshot();
    bench.write(2).await?;
    let target = bench.write(2).await?;
    drop(agent);
    let agent = run.streams_to(target, None).await?;
    let late = run.regions[0].snapshot();
    run.judge(agent, target).await?;
    drop(run);
    bench.before = [late, early];
    Ok(bench)
}

/// One region is behind and is filled from the other, while new WAL comes.
#[tokio::test]
async fn every_request_of_a_catch_up_may_fail_or_be_the_last() -> Result<()> {
    let bench = behind().await?;
    let struck = sweep(|nth, blow| {
        let bench = &bench;
        async move {
            let run = bench.run(format!("{nth}_{}", name_of(blow))).await?;
            let target = bench.commit().await?;
            run.strike(nth, blow);
            let agent = run.streams_to(target, Some(blow)).await?;
            let struck = run.struck();
            run.judge(agent, target).await?;
            run.restorable(target).await?;
            Ok(struck)
        }
    })
    .await?;
    ensure!(struck > 8, "only {struck} requests were struck");
    Ok(())
}

/// A base backup beside a running stream: whatever happens to it, every backup that is visible restores from either
/// region, and the next one is not bothered by what was left.
#[tokio::test]
async fn every_request_of_a_base_backup_may_fail_or_be_the_last() -> Result<()> {
    let mut bench = behind().await?;
    bench.before[1] = bench.before[0].clone();
    let struck = sweep(|nth, blow| {
        let bench = &bench;
        async move {
            let run = bench.run(format!("{nth}_{}", name_of(blow))).await?;
            let target = bench.write(1).await?;
            let agent = run.streams_to(target, None).await?;
            if !everything() {
                // What the running stream asks meanwhile is the other sweeps'.
                run.regions
                    .iter()
                    .for_each(|region| region.faults().only_keys("/base/"));
            }
            run.strike(nth, blow);
            let mut backup = run.agent("backup")?.start()?;
            let ended = || async {
                (!is_running(&backup) || (run.struck() && matches!(blow, Blow::Crash(..)))).then_some(())
            };
            eventually("the backup to end or be struck", PATIENCE, ended).await?;
            let struck = run.struck();
            backup.kill9();
            run.calm();
            // A clean run, and what it leaves.
            run.agent("backup")?.output().await?.expect_code(0)?;
            let target = bench.write(1).await?;
            drop(agent);
            let agent = run.streams_to(target, None).await?;
            let backups = run.backups(0).len();
            ensure!((2..=3).contains(&backups), "{backups} backups");
            run.judge(agent, target).await?;
            run.restorable(target).await?;
            Ok(struck)
        }
    })
    .await?;
    // Packs, manifest and mark at the least.
    ensure!(struck > 3, "only {struck} requests were struck");
    Ok(())
}

/// Whether the process is there and no zombie.
fn is_running(process: &Running) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn name_of(blow: Blow) -> &'static str {
    match blow {
        Blow::Errors(0) => "errors_0",
        Blow::Errors(_) => "errors_1",
        Blow::Crash(0, Strike::HoldBefore) => "before_0",
        Blow::Crash(_, Strike::HoldBefore) => "before_1",
        Blow::Crash(0, _) => "after_0",
        Blow::Crash(..) => "after_1",
    }
}
