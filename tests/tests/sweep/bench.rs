//! A server that many archives are made of, and one run of an operation with an archive of its own.
//!
//! Owns: what every run begins with, striking it, killing its agent and starting it again. Does not own: judging what is left
//! ([`crate::judge`]).

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_format::{Writer, decode, encode};
use highwater_tests::program::Running;
use highwater_tests::s3::Strike;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, config};
use highwater_tests::{PgCluster, PgVersion, Program, S3Server, S3Snapshot, Stop, archive, lsn};

use crate::blow::{Blow, refusal};
use crate::judge;

pub(crate) const VERSION: PgVersion = PgVersion::V15;
pub(crate) const SEGMENT: u64 = 1 << 20;

/// Chunks come often, pulses only at the start.
pub(crate) const CALM: &str = "[wal]\nflush_interval = \"100ms\"\n[pulse]\ninterval = \"5m\"\n";

/// For so long a region that hangs may hold up everything.
const LINGER: Duration = Duration::from_secs(2);

/// A process that nobody is: Linux gives no number above 2^22.
const NOBODY: u32 = i32::MAX.unsigned_abs();

/// The server keeps all WAL of the test.
pub(crate) const KEEPING: &[(&str, &str)] = &[("wal_keep_size", "1GB")];

/// What base backups a region has: visible ones, and those that were begun and never became it.
pub(crate) type Backups = (usize, usize);

/// What must hold of both regions at every moment, or an error.
pub(crate) type Law = Box<dyn Fn(&[S3Snapshot; 2]) -> Result<()>>;

/// A server that many archives are made of: each run has its own slot and its own regions.
pub(crate) struct Bench {
    pub(crate) primary: PgCluster,
    /// What both regions hold before the operation.
    pub(crate) before: [S3Snapshot; 2],
    pub(crate) settings: &'static str,
    /// What the agent's `run` is told besides.
    pub(crate) told: &'static [&'static str],
    /// The timelines before the server's, each with where it was left.
    pub(crate) left: Vec<(u32, u64)>,
    /// The server's.
    pub(crate) timeline: u32,
    /// The condition of a row that whatever is restored has to hold.
    pub(crate) newest: &'static str,
    pub(crate) law: Law,
    /// The end states that were restored.
    restored: Mutex<BTreeSet<[Backups; 2]>>,
}

impl Bench {
    pub(crate) async fn start(settings: &'static str, conf: &[(&str, &str)]) -> Result<Self> {
        let mut primary = PgCluster::builder(VERSION)
            .segment_mb(1)
            .conf("max_replication_slots", "100")
            .conf("max_wal_senders", "60");
        for (name, value) in conf {
            primary = primary.conf(name, value);
        }
        let primary = primary.start().await?;
        primary.sql("CREATE TABLE t (i int, filling text)").await?;
        let empty = S3Server::start().await?;
        empty.create_bucket(BUCKET);
        let before = [empty.snapshot(), empty.snapshot()];
        Ok(Self {
            primary,
            before,
            settings,
            told: &[],
            left: Vec::new(),
            timeline: 1,
            newest: "true",
            law: Box::new(|_| Ok(())),
            restored: Mutex::default(),
        })
    }

    /// An archive with a base backup, both regions equal, and nobody who archives.
    pub(crate) async fn archived(settings: &'static str, conf: &[(&str, &str)]) -> Result<Self> {
        let mut bench = Self::start(settings, conf).await?;
        let run = bench.run("prepare".to_owned()).await?;
        let target = bench.write(3).await?;
        let mut agent = run.streams_to(target, None).await?;
        run.agent("backup")?.output().await?.expect_code(0)?;
        let target = bench.write(2).await?;
        run.reaches(&mut agent, target, None).await?;
        run.judge(agent, target).await?;
        let before = run.left().await?;
        drop(run);
        bench.before = before;
        Ok(bench)
    }

    /// Whether an end state is seen for the first time.
    pub(crate) fn is_new(&self, state: [Backups; 2]) -> bool {
        self.restored
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(state)
    }

    pub(crate) async fn run(&self, name: String) -> Result<Run<'_>> {
        let [north, south] = &self.before;
        let regions = [
            S3Server::serve(north.clone()).await?,
            S3Server::serve(south.clone()).await?,
        ];
        Ok(Run {
            bench: self,
            regions,
            slot: format!("sweep_{name}"),
            policy: "all",
            lingers: None,
            refused: Cell::new(false),
        })
    }

    /// One small commit. A run that begins with what was there before all runs has to stream what every other run
    /// wrote too: the n-th of them would otherwise make ever more requests, and the sweep never end.
    pub(crate) async fn commit(&self) -> Result<u64> {
        self.primary
            .sql("INSERT INTO t VALUES (3, 'while it catches up')")
            .await?;
        self.position().await
    }

    /// Commits of a few pages each, and a segment that ends.
    pub(crate) async fn write(&self, commits: u32) -> Result<u64> {
        for _ in 0..commits {
            self.primary
                .sql("INSERT INTO t VALUES (1, repeat('x', 300))")
                .await?;
        }
        self.primary.sql("SELECT pg_switch_wal()").await?;
        self.primary
            .sql("INSERT INTO t VALUES (2, 'after the switch')")
            .await?;
        self.position().await
    }

    /// How far the server's WAL is written.
    pub(crate) async fn position(&self) -> Result<u64> {
        lsn::parse(&self.primary.value("SELECT pg_current_wal_flush_lsn()").await?)
    }

    /// The server becomes a standby of nobody, and is promoted: it goes on with the next timeline.
    pub(crate) async fn promote(&mut self) -> Result<()> {
        self.primary.stop(Stop::Fast).await?;
        let data = self.primary.data_dir().to_owned();
        std::fs::write(data.join("standby.signal"), "")?;
        self.primary.start_again().await?;
        self.primary.promote().await?;
        let next = self.timeline + 1;
        let history = std::fs::read_to_string(data.join(format!("pg_wal/{next:08X}.history")))?;
        let switch = history
            .lines()
            .last()
            .and_then(|line| line.split_whitespace().nth(1));
        self.left
            .push((self.timeline, lsn::parse(switch.unwrap_or_default())?));
        self.timeline = next;
        Ok(())
    }
}

/// One run of an operation, with its own regions and slot.
pub(crate) struct Run<'a> {
    pub(crate) bench: &'a Bench,
    pub(crate) regions: [S3Server; 2],
    pub(crate) slot: String,
    /// In which regions what is reported has to be.
    pub(crate) policy: &'static str,
    /// A process that is to die does so when the region that is not struck has all up to here, or after [`LINGER`].
    pub(crate) lingers: Option<u64>,
    /// The agent may end, once, for a request that is refused.
    refused: Cell<bool>,
}

/// The claims of a region.
pub(crate) fn claims(region: &S3Snapshot) -> Vec<String> {
    archive::keys_with(region, BUCKET, "/writer/")
}

pub(crate) fn claim(region: &S3Snapshot, key: &str) -> Result<Writer> {
    Ok(decode(&region.get(BUCKET, key).context("no claim")?.bytes)?)
}

/// The region with every claim changed.
pub(crate) async fn with_claims(region: &S3Snapshot, change: impl Fn(&mut Writer)) -> Result<S3Snapshot> {
    let server = S3Server::serve(region.clone()).await?;
    for key in claims(region) {
        let mut claim = claim(region, &key)?;
        change(&mut claim);
        server.put(BUCKET, &key, encode(&claim)?);
    }
    Ok(server.snapshot())
}

impl Run<'_> {
    pub(crate) fn agent(&self, command: &str) -> Result<Program> {
        let regions: Vec<_> = REGIONS.into_iter().zip(&self.regions).collect();
        let connection = self.bench.primary.connection_string();
        let toml = config(Some(&connection), &regions).replacen(
            "[cluster]\n",
            &format!("[cluster]\nslot = \"{}\"\n", self.slot),
            1,
        );
        let toml = format!(
            "{toml}[admin]\nlisten = \"off\"\n[durability]\npolicy = \"{}\"\n{}",
            self.policy, self.bench.settings
        );
        let told = self.bench.told.iter().filter(|_| command == "run");
        Ok(Program::agent()?.config(&toml)?.arg(command).args(told))
    }

    pub(crate) fn snapshots(&self) -> [S3Snapshot; 2] {
        [self.regions[0].snapshot(), self.regions[1].snapshot()]
    }

    /// What both regions hold, for other runs to begin with. The numbers of the processes that wrote it are given to others
    /// before those come to an end, and whoever has one would be taken for a writer that lives.
    pub(crate) async fn left(&self) -> Result<[S3Snapshot; 2]> {
        let [north, south] = self.snapshots();
        let ended = |claim: &mut Writer| claim.pid = NOBODY;
        Ok([
            with_claims(&north, ended).await?,
            with_claims(&south, ended).await?,
        ])
    }

    pub(crate) fn strike(&self, nth: u64, blow: Blow) {
        self.refused.set(matches!(blow, Blow::Refused(_)));
        match blow {
            Blow::Refused(region) => self.regions[region].faults().strike(nth, refusal(nth)),
            Blow::Errors(region) => {
                self.regions[region].faults().strike(nth, Strike::Fail(503));
                self.regions[1 - region].faults().strike(nth, Strike::LoseReply);
            }
            Blow::Crash(region, strike) => self.regions[region].faults().strike(nth, strike),
        }
    }

    /// Only requests about objects whose keys contain `part` are struck.
    pub(crate) fn only_keys(&self, part: &str) {
        self.regions
            .iter()
            .for_each(|region| region.faults().only_keys(part));
    }

    /// Nothing is struck any more.
    pub(crate) fn calm(&self) {
        self.regions.iter().for_each(|region| region.faults().clear());
    }

    /// Whether the blow has fallen in every region that it is for.
    pub(crate) fn fallen(&self, blow: Blow) -> bool {
        let struck = |region: &S3Server| region.faults().struck();
        match blow {
            Blow::Errors(_) => self.regions.iter().all(struck),
            Blow::Refused(region) | Blow::Crash(region, _) => struck(&self.regions[region]),
        }
    }

    pub(crate) fn struck(&self) -> bool {
        self.regions.iter().any(|region| region.faults().struck())
    }

    /// Kills the process if the blow that is to kill it has fallen, and looks at what it leaves; whether it has.
    pub(crate) fn dead(&self, process: &mut Running, blow: Blow) -> Result<bool> {
        if !matches!(blow, Blow::Crash(..)) || !self.fallen(blow) {
            return Ok(false);
        }
        process.kill9();
        self.is_lawful()?;
        Ok(true)
    }

    /// Whether a refused request may be why an agent ends.
    pub(crate) fn is_refused(&self) -> bool {
        self.struck() && self.refused.get()
    }

    /// Whether the agent lives. One that a refused request has ended is started again, as a service manager does, or whoever has
    /// looked at the settings (2). It must not have called it damage (4).
    async fn lives(&self, agent: &mut Running) -> Result<bool> {
        if agent.is_running() {
            return Ok(true);
        }
        if !self.is_refused() {
            return Ok(false);
        }
        self.refused.set(false);
        let code = agent.wait_exit(PATIENCE).await?;
        ensure!(
            matches!(code, 1..=3),
            "it ended with {code}:\n{}",
            agent.last_words()
        );
        self.is_lawful()?;
        *agent = self.agent("run")?.start()?;
        Ok(true)
    }

    /// Whether a process that is to die has had its time.
    fn is_over(&self, blow: Blow, fallen: &mut Option<Instant>) -> bool {
        let (Some(target), Blow::Crash(region, _)) = (self.lingers, blow) else {
            return true;
        };
        if !self.fallen(blow) {
            return false;
        }
        let other = judge::end(&self.regions[1 - region].snapshot(), self.bench.timeline);
        other >= target || fallen.get_or_insert_with(Instant::now).elapsed() > LINGER
    }

    /// The law, for both regions as they are now.
    pub(crate) fn is_lawful(&self) -> Result<()> {
        (self.bench.law)(&self.snapshots())
    }

    /// Runs the agent until both regions hold everything up to `target`; it may be killed by the blow, and is started again.
    pub(crate) async fn streams_to(&self, target: u64, blow: Option<Blow>) -> Result<Running> {
        let mut agent = self.agent("run")?.start()?;
        self.reaches(&mut agent, target, blow).await?;
        // Before that it could not leave in good order.
        agent.says("streaming", PATIENCE).await?;
        Ok(agent)
    }

    /// Waits until both regions hold everything up to `target`.
    pub(crate) async fn reaches(&self, agent: &mut Running, target: u64, blow: Option<Blow>) -> Result<()> {
        let timeline = self.bench.timeline;
        self.until(agent, blow, || {
            self.snapshots()
                .iter()
                .all(|region| judge::end(region, timeline) >= target)
        })
        .await
    }

    /// Waits until the archive is as it is to be. The agent is killed where a blow says so, or ends for a refused request, and is
    /// started again.
    pub(crate) async fn until(
        &self,
        agent: &mut Running,
        mut blow: Option<Blow>,
        done: impl Fn() -> bool,
    ) -> Result<()> {
        let (started, mut fallen) = (Instant::now(), None);
        while !done() {
            if let Some(fatal) = blow
                && self.is_over(fatal, &mut fallen)
                && self.dead(agent, fatal)?
            {
                blow = None;
                *agent = self.agent("run")?.start()?;
            }
            let lives = self.lives(agent).await?;
            ensure!(
                lives && started.elapsed() < PATIENCE,
                "no end:\n{}",
                agent.stderr()
            );
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        Ok(())
    }
}
