//! Regions whose clocks lie apart: one endpoint is an hour ahead of everybody else, the other an hour behind. Each is a process
//! of its own, `highwater-s3`, to which `libfaketime` tells another time.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_store::{RegionConfig, list_all};
use highwater_tests::clock::{self, eventually};
use highwater_tests::ledger::{Expect, LedgerLog, Pace};
use highwater_tests::program::Running;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, region_config};
use highwater_tests::tap::FeedbackTap;
use highwater_tests::{Ledger, PgCluster, Program, Stop, lsn};
use nix::sys::signal::Signal;

use crate::clock::libfaketime;
use crate::support::{VERSION, answers, leave};

/// How far ahead of this machine's clock the one of each region is, in minutes.
const AHEAD: [i64; 2] = [60, -60];
const KEY: &str = "apart";
const SECRET: &str = "secret-of-the-regions";

/// An endpoint with a clock of its own.
struct Region {
    process: Running,
    endpoint: String,
}

impl Region {
    async fn start(minutes: i64) -> Result<Self> {
        let library = libfaketime().context("libfaketime is missing: run scripts/setup.sh")?;
        let variables = [
            format!("LD_PRELOAD={}", library.display()),
            format!("FAKETIME={:+}", minutes * 60),
            "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        ];
        let process = Program::built("highwater-s3")?
            .args(["--versions", "--key", KEY, "--secret", SECRET])
            .under("env", variables)
            .start()?;
        let told = || async { process.stdout().ends_with('\n').then(|| process.stdout()) };
        let endpoint = eventually("the endpoint's address", PATIENCE, told).await?;
        Ok(Self {
            endpoint: endpoint.trim().to_owned(),
            process,
        })
    }

    /// The `Date` of an answer.
    fn date(&self) -> Result<String> {
        let address = self.endpoint.trim_start_matches("http://");
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let headers = answer.lines().filter_map(|line| line.split_once(": "));
        let mut dates = headers.filter(|(name, _)| name.eq_ignore_ascii_case("date"));
        let (_, date) = dates.next().with_context(|| format!("no date: {answer}"))?;
        Ok(date.trim().to_owned())
    }

    /// Whether it refuses a request that is signed with this machine's time.
    async fn refuses_our_time(&self) -> Result<bool> {
        let mut config = RegionConfig::new("apart", format!("s3://{BUCKET}/prod"));
        config.endpoint = Some(self.endpoint.clone());
        config.access_key_id = Some(KEY.to_owned());
        config.secret_access_key = Some(SECRET.to_owned().into());
        let store = highwater_store::open(&config).await?;
        let refused = list_all(store.as_ref(), "", None).await.err();
        Ok(refused.is_some_and(|error| error.message().contains("RequestTimeTooSkewed")))
    }
}

/// A primary that is archived into both.
struct Site {
    primary: PgCluster,
    tap: FeedbackTap,
    regions: [Region; 2],
}

impl Site {
    async fn start() -> Result<Self> {
        let primary = PgCluster::builder(VERSION).segment_mb(1).start().await?;
        let site = Self {
            tap: FeedbackTap::start(&primary).await?,
            regions: [Region::start(AHEAD[0]).await?, Region::start(AHEAD[1]).await?],
            primary,
        };
        site.clocks_lie().await?;
        Ok(site)
    }

    /// PostgreSQL reads the dates, by its own rules.
    async fn clocks_lie(&self) -> Result<()> {
        for (region, minutes) in self.regions.iter().zip(AHEAD) {
            let date = region.date()?;
            let query =
                format!("SELECT round(extract(epoch FROM '{date}'::timestamptz - clock_timestamp()) / 60)");
            let ahead: i64 = self.primary.value(&query).await?.parse()?;
            ensure!(
                (ahead - minutes).abs() <= 2,
                "{ahead} minutes ahead instead of {minutes}"
            );
            ensure!(
                region.refuses_our_time().await?,
                "the region does not mind the time: the test proves nothing"
            );
        }
        Ok(())
    }

    async fn position(&self) -> Result<u64> {
        lsn::parse(&self.primary.value("SELECT pg_current_wal_insert_lsn()").await?)
    }

    fn regions(&self, wanted: &[usize]) -> String {
        let one = |index: &usize| {
            region_config(
                REGIONS[*index],
                BUCKET,
                &self.regions[*index].endpoint,
                KEY,
                SECRET,
            )
        };
        let all: String = wanted.iter().map(one).collect();
        format!("[cluster]\nname = \"orders\"\n{all}")
    }

    fn agent(&self) -> Result<Program> {
        let connection = self.tap.connection_string_as("postgres");
        let settings =
            "[wal]\nflush_interval = \"200ms\"\n[pulse]\ninterval = \"1s\"\n[admin]\nlisten = \"off\"\n";
        let named = format!("name = \"orders\"\nconnection = \"{connection}\"\n");
        let regions = self.regions(&[0, 1]).replacen("name = \"orders\"\n", &named, 1);
        Program::agent()?.config(&format!("{regions}{settings}"))
    }

    async fn streaming(&self) -> Result<Running> {
        let mut agent = self.agent()?.arg("run").start()?;
        agent.says("streaming", PATIENCE).await?;
        Ok(agent)
    }

    async fn backup(&self) -> Result<()> {
        self.agent()?.arg("backup").output().await?.expect_code(0)?;
        Ok(())
    }

    /// The WAL that there is now, once both regions hold it: the policy is `all`.
    async fn all_durable(&self, agent: &Running) -> Result<u64> {
        self.primary.sql("SELECT txid_current()").await?;
        let end = lsn::parse(&self.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
        let reached = || async { (self.tap.highest_flush() >= end).then_some(()) };
        let waited = eventually("the report to get there", PATIENCE, reached).await;
        waited.with_context(|| agent.last_words())?;
        Ok(end)
    }

    /// One region alone holds the WAL up to a place, as the restore sees it.
    async fn alone_has(&self, index: usize, end: u64) -> Result<()> {
        let place = RestoreSite::with_config(VERSION, &self.regions(&[index]))?;
        let program = place.program()?.args(["plan", "--to-lsn", &lsn::show(end)]);
        let planned = || async { (program.output().await.ok()?.code == 0).then_some(()) };
        eventually("one region to get ahead", PATIENCE, planned).await
    }

    /// A switchover to a standby, which then is the primary.
    async fn promote(&mut self, standby: PgCluster) -> Result<()> {
        self.primary.stop(Stop::Fast).await?;
        standby.promote().await?;
        self.tap.redirect(&standby);
        self.primary = standby;
        Ok(())
    }
}

/// A place between commits, as the command line has it, and what a restore to it must hold.
type Place = ([String; 2], Expect);

async fn here(site: &Site) -> Result<[Place; 2]> {
    let (position, now) = (site.position().await?, clock::now());
    let time = Time::from_unix_micros(clock::unix_micros(now)).to_string();
    Ok([
        (
            ["--to-lsn".to_owned(), lsn::show(position)],
            Expect::at_lsn(position),
        ),
        (["--to-time".to_owned(), time], Expect::at_time(now)),
    ])
}

/// Restores from one region alone, to the end and to each place.
async fn check(site: &Site, index: usize, log: &LedgerLog, places: &[Place]) -> Result<()> {
    let from = RestoreSite::with_config(VERSION, &site.regions(&[index]))?;
    from.program()?.arg("verify").output().await?.expect_code(0)?;
    let latest = from.recovered("latest", &[]).await?;
    log.check(&latest, Expect::everything()).await?;
    for (number, (target, expect)) in places.iter().enumerate() {
        let [option, value] = target;
        let restored = from.recovered(&number.to_string(), &[option, value]).await?;
        let report = log
            .check(&restored, *expect)
            .await
            .with_context(|| target.join(" "))?;
        ensure!(
            report.missing > 0,
            "nothing lies past {value}: the test proves nothing"
        );
    }
    Ok(())
}

/// `--as-of` means the store's own clock: what is an hour ago there was just now here.
async fn past(site: &Site, then: SystemTime, early: u64, late: u64) -> Result<()> {
    let shown = |minutes: i64| {
        let micros = clock::unix_micros(then) + minutes * 60_000_000;
        Time::from_unix_micros(micros).to_string()
    };
    let from = |index: usize| RestoreSite::with_config(VERSION, &site.regions(&[index]));
    let behind = shown(AHEAD[1]);
    for (target, code) in [(early, 0), (late, 1)] {
        let asked = ["plan", "--as-of", &behind, "--to-lsn", &lsn::show(target)];
        let said = from(1)?.program()?.args(asked).output().await?;
        answers(&said, code, &[])?;
    }
    // The other one dates everything later than that.
    let said = from(0)?
        .program()?
        .args(["list", "--as-of", &shown(0)])
        .output()
        .await?;
    answers(&said, 1, &["there is no archive of cluster orders"])
}

/// Two hours lie between the regions, and one between each and everybody else. An agent streams, takes a base backup, is killed
/// while one region is behind, fills it from the other and follows a promotion; each region alone brings back exactly what the
/// ledger says, to the end, to positions and to times.
#[tokio::test]
async fn fault_31_regions_whose_clocks_lie_apart_agree_on_everything() -> Result<()> {
    const TWO: Pace = Pace {
        clients: 2,
        pause: Duration::from_millis(2),
        filling: 100,
    };
    let mut site = Site::start().await?;
    let mut agent = site.streaming().await?;
    let ledger = Ledger::start_paced(&site.primary, TWO).await?;
    ledger.grow(30).await?;
    site.backup().await?;
    ledger.grow(30).await?;
    let mut places = Vec::from(here(&site).await?);
    ledger.grow(30).await?;

    // The region that is behind in time falls behind in WAL, too, and the agent dies.
    site.regions[1].process.signal(Signal::SIGSTOP);
    ledger.grow(60).await?;
    site.primary.sql("SELECT pg_switch_wal()").await?;
    let ahead = site.position().await?;
    site.alone_has(0, ahead).await?;
    agent.kill9();
    site.regions[1].process.signal(Signal::SIGCONT);
    let agent = site.streaming().await?;
    ledger.grow(30).await?;
    let early = site.all_durable(&agent).await?;
    let then = clock::second_over().await?;

    let standby = PgCluster::builder(VERSION).standby_of(&site.primary).await?;
    ledger.grow(30).await?;
    let before = ledger.stop().await;
    site.promote(standby).await?;
    let ledger = Ledger::resume(&site.primary, TWO, before).await?;
    ledger.grow(30).await?;
    places.extend(here(&site).await?);
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    let late = site.all_durable(&agent).await?;
    leave(agent).await?;
    for (index, name) in REGIONS.into_iter().enumerate() {
        check(&site, index, &log, &places).await.context(name)?;
    }
    past(&site, then, early, late).await
}
