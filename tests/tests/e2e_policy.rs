//! Invariant I1 with a policy that is a number: what is reported is in so many of the regions, whichever they are, and
//! where fewer answer, nothing more is.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::site::{self, BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, Program, S3Server, archive, lsn};

const VERSION: PgVersion = PgVersion::V15;
const SEGMENT_MB: u32 = 1;
const THIRD: &str = "third";

/// A site with three regions, two of which must hold what is reported.
struct TwoOfThree {
    site: Site,
    regions: [Arc<S3Server>; 3],
    toml: String,
    admin: SocketAddr,
    /// Status messages that promised more than two regions held.
    broken: Arc<Mutex<Vec<String>>>,
}

/// Where each region's WAL ends.
fn ends(regions: &[Arc<S3Server>; 3]) -> [u64; 3] {
    let segment = u64::from(SEGMENT_MB) << 20;
    regions
        .each_ref()
        .map(|region| archive::wal_end(&region.snapshot(), BUCKET, 1, segment))
}

/// What two of them hold.
fn held_twice(mut ends: [u64; 3]) -> u64 {
    ends.sort_unstable();
    ends[1]
}

impl TwoOfThree {
    async fn start() -> Result<Self> {
        let site = Site::start(PgCluster::builder(VERSION), SEGMENT_MB).await?;
        let third = S3Server::start().await?;
        third.create_bucket(BUCKET);
        let [north, south] = site.regions.clone();
        let regions = [north, south, Arc::new(third)];
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let named = [REGIONS[0], REGIONS[1], THIRD];
        let named: Vec<_> = named.into_iter().zip(regions.iter().map(AsRef::as_ref)).collect();
        let toml = format!(
            "{}[admin]\nlisten = \"{admin}\"\n{}[durability]\npolicy = 2\n",
            site::config(Some(&site.tap.connection_string()), &named),
            site.settings
        );
        let broken = Arc::<Mutex<Vec<String>>>::default();
        let (noted, watched) = (Arc::clone(&broken), regions.clone());
        // Before PostgreSQL reads the message.
        site.tap.on_feedback(move |message| {
            let ends = ends(&watched);
            if message.flush > held_twice(ends) {
                let what = format!(
                    "{} was reported; held: {:?}",
                    lsn::show(message.flush),
                    ends.map(lsn::show)
                );
                noted.lock().unwrap_or_else(PoisonError::into_inner).push(what);
            }
        });
        Ok(Self {
            site,
            regions,
            toml,
            admin,
            broken,
        })
    }

    fn broken(&self) -> Vec<String> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn agent(&self) -> Result<Program> {
        Program::agent()?.config(&self.toml)
    }

    async fn status(&self) -> Result<serde_json::Value> {
        let said = self
            .agent()?
            .args(["--output", "json", "status"])
            .output()
            .await?;
        serde_json::from_str(&said.stdout).with_context(|| said.said())
    }

    /// A series without labels, or with those that are given in braces.
    fn metric(&self, series: &str) -> Option<f64> {
        let mut stream = TcpStream::connect_timeout(&self.admin, Duration::from_secs(2)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok()?;
        let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
        page.lines().find_map(value)
    }

    /// Waits until the metrics call exactly these regions up.
    async fn called_up(&self, up: [bool; 3]) -> Result<()> {
        let said = || {
            [REGIONS[0], REGIONS[1], THIRD]
                .map(|name| self.metric(&format!("highwater_region_up{{region=\"{name}\"}}")))
        };
        let wanted = up.map(|up| Some(f64::from(u8::from(up))));
        let right = || async { (said() == wanted).then_some(()) };
        let waited = eventually("the metrics to tell which regions are up", PATIENCE, right).await;
        waited.with_context(|| format!("{:?} instead of {wanted:?}", said()))
    }

    /// The regions that cannot be read, as `status` says it (which asks them for ten seconds first).
    fn away(document: &serde_json::Value) -> Vec<&str> {
        let regions = document["regions"].as_array().into_iter().flatten();
        regions
            .filter(|region| region["error"].is_string())
            .filter_map(|region| region["name"].as_str())
            .collect()
    }

    /// Nothing that is written now is reported, though one region stores it, and both `status` and metrics say so.
    async fn one_is_not_enough(&self) -> Result<()> {
        let mark = self.site.position().await?;
        self.site.primary.sql("INSERT INTO mark VALUES (1)").await?;
        let stored = || async { (ends(&self.regions)[0] > mark).then_some(()) };
        eventually("the only region to go on", PATIENCE, stored).await?;
        let said = self.site.tap.feedback().len();
        let says = || async { (self.site.tap.feedback().len() > said + 2).then_some(()) };
        eventually("more status messages", PATIENCE, says).await?;
        ensure!(
            self.site.tap.highest_flush() <= mark,
            "one region was enough for a report"
        );
        self.called_up([true, false, false]).await?;
        let durable = self
            .metric("highwater_durable_lsn")
            .context("no durable position")?;
        let lag = self.metric("highwater_lag_bytes").context("no lag")?;
        ensure!(
            durable <= mark as f64 && lag > 0.0,
            "durable {durable}, lag {lag}"
        );
        let document = self.status().await?;
        ensure!(
            Self::away(&document) == [REGIONS[1], THIRD] && document["durable"].is_null(),
            "{document:#}"
        );
        Ok(())
    }
}

#[tokio::test]
async fn i1_two_of_three_regions_decide_what_is_reported() -> Result<()> {
    let place = TwoOfThree::start().await?;
    let (site, [_, south, third]) = (&place.site, &place.regions);
    let mut agent = place.agent()?.arg("run").start()?;
    agent.says("streaming", PATIENCE).await?;
    site.primary.sql("CREATE TABLE mark (i int)").await?;
    place.agent()?.arg("backup").output().await?.expect_code(0)?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(30).await?;
    site.all_durable().await?;

    // One is away: what two hold is enough.
    third.faults().refuse(true);
    ledger.grow(50).await?;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    let [first, second, away] = ends(&place.regions);
    ensure!(
        first.min(second) >= end && away < end,
        "{:?} of {}",
        [first, second, away].map(lsn::show),
        lsn::show(end)
    );
    place.called_up([true, true, false]).await?;
    ensure!(
        place
            .metric("highwater_durable_lsn")
            .is_some_and(|durable| durable >= end as f64)
    );

    // Two are away.
    south.faults().refuse(true);
    place
        .one_is_not_enough()
        .await
        .with_context(|| agent.last_words())?;

    // Any second one lets it go on.
    third.faults().refuse(false);
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    let [first, second, back] = ends(&place.regions);
    ensure!(
        first.min(back) >= end && second < end,
        "{:?} of {}",
        [first, second, back].map(lsn::show),
        lsn::show(end)
    );
    let log = ledger.stop().await;
    let end = site.all_durable().await?;
    let filled = || async { (ends(&place.regions)[2] >= end).then_some(()) };
    eventually("the third region to hold everything", PATIENCE, filled).await?;
    let broken = place.broken();
    ensure!(broken.is_empty(), "{broken:#?}");
    drop(agent);
    let alone = RestoreSite::new(VERSION, &[(THIRD, third.as_ref())])?;
    log.check(&alone.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}
