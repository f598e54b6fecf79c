//! Regions that lose something, join late or contradict each other: what one lacks is copied from another,
//! verified, while new WAL goes on; what contradicts is reported with both sides and nothing is replaced.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_format::{Codec, FrameEncoder, Object, seal};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, LedgerLog, Pace};
use highwater_tests::program::Running;
use highwater_tests::s3::{Operation, S3Server, S3Snapshot};
use highwater_tests::site::{self, BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, Program, Stop, archive, lsn};

const VERSION: PgVersion = PgVersion::V15;
const THIRD: &str = "third";
const TWO: Pace = Pace {
    clients: 2,
    pause: Duration::from_millis(2),
    filling: 400,
};

/// A site with small segments whose agent compares its regions every second and answers over HTTP.
struct Place {
    site: Site,
    third: Option<Arc<S3Server>>,
    admin: SocketAddr,
}

impl Place {
    async fn start(policy: &str) -> Result<Self> {
        let mut site = Site::start(PgCluster::builder(VERSION), 1).await?;
        site.settings += &format!("[durability]\npolicy = \"{policy}\"\n[heal]\ninterval = \"1s\"\n");
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        Ok(Self {
            site,
            third: None,
            admin,
        })
    }

    fn agent(&self) -> Result<Program> {
        let mut regions: Vec<(&str, &S3Server)> = REGIONS
            .iter()
            .zip(&self.site.regions)
            .map(|(name, server)| (*name, server.as_ref()))
            .collect();
        regions.extend(self.third.iter().map(|server| (THIRD, server.as_ref())));
        let connection = self.site.tap.connection_string_as(&self.site.user);
        let text = site::config(Some(&connection), &regions);
        Program::agent()?.config(&format!(
            "{text}[admin]\nlisten = \"{}\"\n{}",
            self.admin, self.site.settings
        ))
    }

    /// Starts the agent and waits until it answers and has a connection.
    async fn run(&self) -> Result<Running> {
        let before = self.site.tap.connections();
        let mut agent = self.agent()?.arg("run").start()?;
        let started = std::time::Instant::now();
        while self.site.tap.connections() == before {
            ensure!(
                agent.is_running() && started.elapsed() < PATIENCE,
                "the agent does not stream:\n{}",
                agent.stderr()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(agent)
    }

    async fn backup(&self) -> Result<()> {
        self.agent()?.arg("backup").output().await?.expect_code(0)?;
        Ok(())
    }

    /// The value of one series of one region.
    fn metric(&self, name: &str, region: &str) -> Option<f64> {
        let series = format!("{name}{{region=\"{region}\"}} ");
        let page = http(self.admin, "/metrics").ok()?;
        let line = page.lines().find_map(|line| line.strip_prefix(series.as_str()))?;
        line.parse().ok()
    }

    async fn until_metric(&self, name: &str, region: &str, good: impl Fn(f64) -> bool) -> Result<()> {
        let reached = || async { self.metric(name, region).is_some_and(&good).then_some(()) };
        eventually(name, PATIENCE, reached)
            .await
            .with_context(|| format!("{name} of {region} is {:?}", self.metric(name, region)))
    }

    /// Waits until a comparison that began after now found nothing missing in `region`.
    async fn until_whole(&self, region: &str) -> Result<()> {
        let compared = "highwater_region_compared_timestamp_seconds";
        let now = highwater_tests::clock::unix_micros(highwater_tests::clock::now()) as f64 / 1e6;
        self.until_metric(compared, region, |time| time > now).await?;
        self.until_metric("highwater_region_missing_wal_bytes", region, |bytes| bytes == 0.0)
            .await?;
        self.until_metric("highwater_region_missing_backups", region, |count| count == 0.0)
            .await
    }

    fn south(&self) -> &S3Server {
        &self.site.regions[1]
    }

    async fn both_hold(&self, position: u64) -> Result<()> {
        let hold = || async {
            let ends = self.site.stored_ends();
            ends.iter().all(|end| *end >= position).then_some(())
        };
        eventually("both regions to hold everything", PATIENCE, hold).await
    }

    /// Some rows, a backup, more rows and whole segments; everything durable.
    async fn fill(&self, agent: &Running) -> Result<LedgerLog> {
        let ledger = Ledger::start_paced(&self.site.primary, TWO).await?;
        ledger.grow(50).await?;
        self.backup().await?;
        for _ in 0..3 {
            ledger.grow(30).await?;
            self.site.primary.sql("SELECT pg_switch_wal()").await?;
        }
        self.backup().await?;
        ledger.grow(50).await?;
        let log = ledger.stop().await;
        let end = self
            .site
            .all_durable()
            .await
            .with_context(|| agent.last_words())?;
        self.both_hold(end).await?;
        Ok(log)
    }
}

fn http(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// What a region holds that a restore needs: keys without the pulse and the chunks that segments made superfluous.
fn needed(snapshot: &S3Snapshot) -> Vec<String> {
    let mut keys = snapshot.keys(BUCKET);
    keys.retain(|key| !key.contains("/tail/") && !key.contains("/probe/") && !key.ends_with("pulse.json"));
    keys
}

async fn restores_alone(name: &str, region: &S3Server, log: &LedgerLog, expect: Expect) -> Result<()> {
    let place = RestoreSite::new(VERSION, &[(name, region)])?;
    let restored = place
        .recovered("data", &[])
        .await
        .with_context(|| format!("from {name} alone"))?;
    log.check(&restored, expect)
        .await
        .with_context(|| format!("from {name} alone"))?;
    Ok(())
}

/// The same object with one plain byte changed, sealed anew: whole, and about other WAL.
fn altered(bytes: &[u8]) -> Result<Vec<u8>> {
    let object = Object::open(bytes.to_vec().into())?;
    let mut plain = object.plain()?;
    let middle = plain.len() / 2;
    plain[middle] ^= 0x55;
    let mut encoder = FrameEncoder::new(Codec::Lz4);
    let frames = plain
        .chunks(1 << 20)
        .map(|frame| encoder.encode(frame))
        .collect::<Result<Vec<_>, _>>()?;
    let mut header = object.header().clone();
    header.codec = Codec::Lz4;
    Ok(seal(header, &frames)?.bytes.to_vec())
}

#[tokio::test]
async fn fault_02_a_region_added_later_is_filled_and_restores_alone() -> Result<()> {
    let mut place = Place::start("all").await?;
    let mut agent = place.run().await?;
    let before = place.fill(&agent).await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());

    let third = S3Server::start().await?;
    third.create_bucket(BUCKET);
    let third = Arc::new(third);
    place.third = Some(third.clone());
    // Nothing may be acknowledged that the new region does not hold from where it joined.
    let told = place.site.tap.highest_flush();
    let ahead = Arc::new(Mutex::new(Vec::new()));
    place.site.tap.on_feedback({
        let (third, ahead) = (third.clone(), ahead.clone());
        move |feedback| {
            let wal = archive::wal(&third.snapshot(), BUCKET, 1 << 20);
            let held = wal.get(&1).map_or(told, |held| held.contiguous_end(told));
            if feedback.flush > told && feedback.flush > held {
                ahead.lock().unwrap().push((feedback.flush, held));
            }
        }
    });
    let agent = place.run().await?;
    let ledger = Ledger::resume(&place.site.primary, TWO, before).await?;
    ledger.grow(50).await?;
    place
        .site
        .all_durable()
        .await
        .with_context(|| agent.last_words())?;
    place.until_whole(THIRD).await.with_context(|| agent.stderr())?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    place.site.all_durable().await?;
    ensure!(ahead.lock().unwrap().is_empty(), "{:?}", ahead.lock().unwrap());
    drop(agent);
    let backups = archive::keys_with(&third.snapshot(), BUCKET, "/backup.json");
    ensure!(backups.len() == 2, "{backups:?}");
    restores_alone(THIRD, &third, &log, Expect::everything()).await
}

#[tokio::test]
async fn fault_41_a_region_emptied_while_it_runs_is_filled_again() -> Result<()> {
    let place = Place::start("all").await?;
    let mut agent = place.run().await?;
    let before = place.fill(&agent).await?;
    place.until_whole(REGIONS[1]).await?;
    let had = needed(&place.south().snapshot());
    for key in place.south().objects(BUCKET) {
        place.south().delete(BUCKET, &key);
    }
    let ledger = Ledger::resume(&place.site.primary, TWO, before).await?;
    agent
        .says("objects are gone that the region had", PATIENCE)
        .await?;
    ledger.grow(50).await?;
    // New WAL went on meanwhile, and what was lost is back.
    place.site.all_durable().await?;
    place
        .until_whole(REGIONS[1])
        .await
        .with_context(|| agent.last_words())?;
    place
        .until_metric("highwater_region_lost", REGIONS[1], |lost| lost == 0.0)
        .await?;
    ensure!(
        place
            .metric("highwater_region_healed_objects_total", REGIONS[1])
            .is_some_and(|count| count > 5.0)
    );
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    place.site.all_durable().await?;
    let has = needed(&place.south().snapshot());
    let still_gone: Vec<_> = had.iter().filter(|key| !has.contains(key)).collect();
    // WAL from before the oldest base backup is of no use and does not come back.
    ensure!(
        still_gone.iter().all(|key| key.contains("/segment/")) && still_gone.len() <= 2,
        "{still_gone:?}"
    );
    drop(agent);
    restores_alone(REGIONS[1], place.south(), &log, Expect::everything()).await
}

#[tokio::test]
async fn fault_41_a_region_emptied_at_rest_is_filled_again_while_storage_stumbles() -> Result<()> {
    let place = Place::start("all").await?;
    let mut agent = place.run().await?;
    let before = place.fill(&agent).await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    for key in place.south().objects(BUCKET) {
        place.south().delete(BUCKET, &key);
    }
    for region in &place.site.regions {
        region.faults().fail_every(5, 503);
    }
    let agent = place.run().await?;
    let ledger = Ledger::resume(&place.site.primary, TWO, before).await?;
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    place
        .site
        .all_durable()
        .await
        .with_context(|| agent.last_words())?;
    place
        .until_whole(REGIONS[1])
        .await
        .with_context(|| agent.last_words())?;
    for region in &place.site.regions {
        region.faults().clear();
    }
    let end = place.site.all_durable().await?;
    place.both_hold(end).await?;
    drop(agent);
    restores_alone(REGIONS[1], place.south(), &log, Expect::everything()).await
}

/// Three regions: one is filled from two, of which the first choice hangs. Neither the stream nor the filling
/// waits for it.
#[tokio::test]
async fn fault_45_a_region_that_hangs_holds_up_neither_the_stream_nor_the_filling_of_another() -> Result<()> {
    let mut place = Place::start("any").await?;
    let third = Arc::new(S3Server::start().await?);
    third.create_bucket(BUCKET);
    place.third = Some(third.clone());
    let mut agent = place.run().await?;
    let before = place.fill(&agent).await?;
    place.until_whole(THIRD).await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    for key in third.objects(BUCKET) {
        third.delete(BUCKET, &key);
    }
    let agent = place.run().await?;
    place.site.regions[0].faults().freeze();
    let ledger = Ledger::resume(&place.site.primary, TWO, before).await?;
    ledger.grow(50).await?;
    place
        .site
        .all_durable()
        .await
        .with_context(|| agent.last_words())?;
    let restored = || async {
        let backups = archive::keys_with(&third.snapshot(), BUCKET, "/backup.json").len();
        (backups == 2).then_some(())
    };
    eventually("both base backups in the third region", PATIENCE, restored)
        .await
        .with_context(|| agent.last_words())?;
    let log = ledger.stop().await;
    let end = place.site.all_durable().await?;
    let holds = || async {
        let held = archive::wal_end(&third.snapshot(), BUCKET, 1, 1 << 20);
        (held >= end).then_some(())
    };
    eventually("all WAL in the third region", PATIENCE, holds).await?;
    drop(agent);
    restores_alone(THIRD, &third, &log, Expect::everything()).await
}

#[tokio::test]
async fn fault_41_what_is_gone_at_rest_comes_back_and_damage_is_not_copied() -> Result<()> {
    let place = Place::start("all").await?;
    let mut agent = place.run().await?;
    let log = place.fill(&agent).await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    let had = needed(&place.south().snapshot());
    let parts = ["/segment/", "/pack/", "/manifest"];
    let mut removed = Vec::new();
    for part in parts {
        let keys = archive::keys_with(&place.south().snapshot(), BUCKET, part);
        removed.extend(keys.into_iter().skip(1).step_by(2));
    }
    for key in &removed {
        ensure!(place.south().delete(BUCKET, key));
    }
    // One of the segments that is gone here is damaged there.
    let north = &place.site.regions[0];
    let segments = archive::keys_with(&north.snapshot(), BUCKET, "/segment/");
    let hurt = segments
        .iter()
        .rfind(|key| removed.contains(key))
        .context("no segment was removed")?;
    ensure!(north.corrupt(BUCKET, hurt));
    // Nor are there chunks that it could be put together from.
    let whole = archive::range_of(hurt, 1 << 20).context("not a segment")?;
    for region in &place.site.regions {
        for key in archive::keys_with(&region.snapshot(), BUCKET, "/tail/") {
            let chunk = archive::range_of(&key, 1 << 20).context("not a chunk")?;
            if whole.1 <= chunk.1 && chunk.2 <= whole.2 {
                region.delete(BUCKET, &key);
            }
        }
    }

    let mut agent = place.run().await?;
    agent.says("the object is damaged", PATIENCE).await?;
    let missing = "highwater_region_missing_wal_bytes";
    let one = |bytes: f64| bytes > 0.0 && bytes <= f64::from(1 << 20);
    let waited = place.until_metric(missing, REGIONS[1], one).await;
    waited.with_context(|| agent.last_words())?;
    let has = place.south().objects(BUCKET);
    let gone = |key: &&String| !has.contains(key) && *key != hurt;
    let gone: Vec<_> = had.iter().filter(gone).collect();
    // WAL from before the oldest base backup is of no use and does not come back.
    ensure!(
        gone.iter().all(|key| key.contains("/segment/")) && gone.len() <= 2,
        "{gone:?}"
    );
    ensure!(!has.contains(hurt), "a damaged object was copied");

    ensure!(north.corrupt(BUCKET, hurt), "the same bit again mends it");
    place
        .until_whole(REGIONS[1])
        .await
        .with_context(|| agent.last_words())?;
    ensure!(place.south().objects(BUCKET).contains(hurt));
    drop(agent);
    restores_alone(REGIONS[1], place.south(), &log, Expect::everything()).await
}

#[tokio::test]
async fn fault_02_a_base_backup_that_one_region_missed_is_copied_to_it() -> Result<()> {
    let place = Place::start("any").await?;
    let agent = place.run().await?;
    let ledger = Ledger::start_paced(&place.site.primary, TWO).await?;
    ledger.grow(30).await?;
    let south = place.south().faults();
    south.fail_always(Some(403));
    place.backup().await?;
    let visible =
        |region: usize| archive::keys_with(&place.site.snapshots()[region], BUCKET, "/backup.json").len();
    ensure!((visible(0), visible(1)) == (1, 0), "visible in the wrong regions");
    let said = place.agent()?.arg("status").output().await?;
    ensure!(
        said.said().contains("AccessDenied") || said.said().contains("403"),
        "{}",
        said.said()
    );
    south.clear();
    let copied = || async { (visible(1) == 1).then_some(()) };
    eventually("the base backup in the other region", PATIENCE, copied)
        .await
        .with_context(|| agent.last_words())?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    let end = place.site.all_durable().await?;
    place.both_hold(end).await?;
    drop(agent);
    restores_alone(REGIONS[1], place.south(), &log, Expect::everything()).await
}

#[tokio::test]
async fn fault_02_a_region_that_takes_nothing_holds_the_position_and_status_says_why() -> Result<()> {
    let place = Place::start("all").await?;
    let agent = place.run().await?;
    let ledger = Ledger::start_paced(&place.site.primary, TWO).await?;
    ledger.grow(30).await?;
    place.site.all_durable().await?;
    let south = place.south().faults();
    // Out of space, and not allowed.
    for status in [507, 403] {
        south.only(&[Operation::Put]);
        south.fail_always(Some(status));
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (held, other) = (place.site.stored_ends()[1], place.site.stored_ends()[0]);
        ledger.grow(50).await?;
        let goes_on = || async { (place.site.stored_ends()[0] > other).then_some(()) };
        eventually("the healthy region to go on", PATIENCE, goes_on).await?;
        ensure!(
            place.site.tap.highest_flush() <= held,
            "{status}: more was reported than both hold"
        );
        let document = http(place.admin, "/status")?;
        ensure!(
            document.contains("\"failing\"") && document.contains(&status.to_string()),
            "{document}"
        );
        south.clear();
        let end = place
            .site
            .all_durable()
            .await
            .with_context(|| agent.last_words())?;
        place.both_hold(end).await?;
    }
    ledger.stop().await;
    Ok(())
}

#[tokio::test]
async fn fault_42_a_region_without_the_new_timeline_is_filled() -> Result<()> {
    let mut place = Place::start("any").await?;
    let agent = place.run().await?;
    let before = place.fill(&agent).await?;
    let mut standby = PgCluster::builder(VERSION)
        .standby_of(&place.site.primary)
        .await?;
    place.south().faults().refuse(true);
    place.site.primary.stop(Stop::Fast).await?;
    standby.promote().await?;
    place.site.tap.redirect(&standby);
    std::mem::swap(&mut place.site.primary, &mut standby);
    let ledger = Ledger::resume(&place.site.primary, TWO, before).await?;
    ledger.grow(50).await?;
    place.site.primary.sql("SELECT pg_switch_wal()").await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    let end = lsn::parse(
        &place
            .site
            .primary
            .value("SELECT pg_current_wal_flush_lsn()")
            .await?,
    )?;
    let stored = |region: usize| archive::wal_end(&place.site.snapshots()[region], BUCKET, 2, 1 << 20);
    let first = || async { (stored(0) >= end).then_some(()) };
    eventually("the new timeline in one region", PATIENCE, first).await?;
    ensure!(stored(1) == 0, "the other one was to be away");
    place.south().faults().refuse(false);
    let second = || async { (stored(1) >= end).then_some(()) };
    eventually("the new timeline in the other region", PATIENCE, second)
        .await
        .with_context(|| agent.last_words())?;
    drop(agent);
    restores_alone(REGIONS[1], place.south(), &log, Expect::everything()).await
}

#[tokio::test]
async fn fault_42_other_bytes_in_one_region_stop_the_agent_and_nothing_is_replaced() -> Result<()> {
    let place = Place::start("all").await?;
    let mut agent = place.run().await?;
    place.fill(&agent).await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    // The newest WAL of one region is replaced by WAL of another history.
    let tails = archive::keys_with(&place.south().snapshot(), BUCKET, "/tail/");
    let newest = tails.last().context("no chunk")?;
    let stored = place.south().get(BUCKET, newest).context("gone")?;
    let other = altered(&stored.bytes)?;
    place.south().put(BUCKET, newest, other.clone());
    let mut agent = place.agent()?.arg("run").start()?;
    let code = agent.wait_exit(PATIENCE).await?;
    let said = agent.stderr();
    ensure!(code == 4, "{code}: {said}");
    // Each by its bytes, from where they differ.
    let identities = said.matches("there with the bytes").count();
    ensure!(
        said.contains("region south") && said.contains("region north") && identities >= 2,
        "{said}"
    );
    let kept = place.south().get(BUCKET, newest).context("gone")?;
    ensure!(kept.bytes == other, "it was overwritten");
    Ok(())
}

#[tokio::test]
async fn fault_42_a_region_that_joins_late_with_other_bytes_does_not_count() -> Result<()> {
    let place = Place::start("any").await?;
    let mut agent = place.run().await?;
    place.fill(&agent).await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    let tails = archive::keys_with(&place.south().snapshot(), BUCKET, "/tail/");
    let newest = tails.last().context("no chunk")?;
    let stored = place.south().get(BUCKET, newest).context("gone")?;
    place.south().put(BUCKET, newest, altered(&stored.bytes)?);
    place.south().faults().refuse(true);
    let mut agent = place.run().await?;
    // It streams without the other region, whose last bytes nobody has seen.
    agent.says("it joins when it can", PATIENCE).await?;
    place.site.all_durable().await?;
    let before = place.south().objects(BUCKET);
    place.south().faults().refuse(false);
    let code = agent.wait_exit(PATIENCE).await?;
    ensure!(code == 4, "{code}: {}", agent.stderr());
    let said = agent.stderr();
    let identities = said.matches("there with the bytes").count();
    ensure!(said.contains("region south") && identities >= 2, "{said}");
    let mut after = place.south().objects(BUCKET);
    after.retain(|key| key.contains("/wal/") && !before.contains(key));
    ensure!(after.is_empty(), "WAL was added: {after:?}");
    Ok(())
}

/// Listings that do not show the newest keys make the agent neither forget nor overwrite anything.
#[tokio::test]
async fn fault_38_listings_that_lag_behind_do_not_move_the_position_back() -> Result<()> {
    let place = Place::start("all").await?;
    let mut agent = place.run().await?;
    let before = place.fill(&agent).await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    for region in &place.site.regions {
        region.faults().hide_newest(8);
    }
    let agent = place.run().await?;
    let ledger = Ledger::resume(&place.site.primary, TWO, before).await?;
    ledger.grow(30).await?;
    for region in &place.site.regions {
        region.faults().clear();
    }
    let log = ledger.stop().await;
    place
        .site
        .all_durable()
        .await
        .with_context(|| agent.last_words())?;
    ensure!(
        archive::keys_with(&place.site.snapshots()[0], BUCKET, "/gap/").is_empty(),
        "a gap was recorded"
    );
    drop(agent);
    restores_alone(REGIONS[0], &place.site.regions[0], &log, Expect::everything()).await
}

/// Each region is away in turn; together they restore all that was acknowledged, each alone what it holds.
#[tokio::test]
async fn i17_regions_that_are_away_in_turn_restore_together_what_was_acknowledged() -> Result<()> {
    let place = Place::start("any").await?;
    let agent = place.run().await?;
    let ledger = Ledger::start_paced(&place.site.primary, TWO).await?;
    ledger.grow(30).await?;
    place.backup().await?;
    for away in [0, 1, 0, 1] {
        place.site.regions[away].faults().refuse(true);
        ledger.grow(40).await?;
        place.site.primary.sql("SELECT pg_switch_wal()").await?;
        ledger.grow(20).await?;
        place
            .site
            .all_durable()
            .await
            .with_context(|| agent.last_words())?;
        place.site.regions[away].faults().refuse(false);
        // Not until it has caught up: what only one of them holds at this moment matters.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let flushed = place.site.tap.highest_flush();
    let copies = place.site.snapshots();
    let log = ledger.stop().await;
    drop(agent);
    let ends = copies.each_ref().map(|copy| {
        let runs = archive::wal(copy, BUCKET, 1 << 20)
            .get(&1)
            .map_or(0, |wal| wal.runs().len());
        (archive::wal_end(copy, BUCKET, 1, 1 << 20), runs)
    });
    let [north, south] = copies;
    let (north, south) = (S3Server::serve(north).await?, S3Server::serve(south).await?);
    let both = RestoreSite::new(VERSION, &[(REGIONS[0], &north), (REGIONS[1], &south)])?;
    let restored = both.recovered("both", &[]).await?;
    log.check(&restored, Expect::held_through(flushed)).await?;
    drop(restored);
    for ((name, region), (end, runs)) in REGIONS.iter().zip([&north, &south]).zip(ends) {
        let alone = RestoreSite::new(VERSION, &[(name, region)])?;
        let text = lsn::show(end);
        let mut target = vec![];
        // Uploads run in parallel: at this moment something later may have been there before something earlier.
        // A restore to the end then says where the hole is, and is asked for what lies before it.
        if runs > 1 {
            alone.run("refused", &[]).await?.expect_code(1)?;
            target = vec!["--to-lsn", text.as_str()];
        }
        let restored = alone.recovered("data", &target).await;
        let restored = restored.with_context(|| format!("from {name} alone"))?;
        log.check(&restored, Expect::held_through(end)).await?;
    }
    Ok(())
}
