//! WAL that the server removed before the archive had it: the gap is on record before anything behind it is stored, a
//! base backup ends it by itself, and a restore refuses every moment inside and none outside.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_tests::clock::{self, eventually};
use highwater_tests::ledger::{Expect, LedgerLog, Pace};
use highwater_tests::postgres::PgBuilder;
use highwater_tests::program::Running;
use highwater_tests::s3::Operation;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, archive, lsn};

/// Rows small and few enough that a megabyte of WAL is not full in a moment.
const SLOW: Pace = Pace {
    clients: 2,
    pause: std::time::Duration::from_millis(5),
    filling: 60,
};

/// How WAL is lost while no agent streams.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// `pg_drop_replication_slot`.
    Dropped,
    /// `max_slot_wal_keep_size` is passed.
    Outgrown,
    /// `idle_replication_slot_timeout` has passed.
    Idle,
}

impl Loss {
    fn cluster(self, version: PgVersion) -> PgBuilder {
        let builder = PgCluster::builder(version)
            .conf("min_wal_size", "2MB")
            .conf("max_wal_size", "8MB");
        match self {
            Self::Dropped => builder,
            Self::Outgrown => builder.conf("max_slot_wal_keep_size", "2MB"),
            Self::Idle => builder.conf("idle_replication_slot_timeout", "1s"),
        }
    }

    async fn happens_at(self, site: &Site) -> Result<()> {
        let slot = "FROM pg_replication_slots WHERE slot_name = 'highwater'";
        let unused = || async {
            let active = site.primary.value(&format!("SELECT active {slot}")).await.ok()?;
            (active == "f").then_some(())
        };
        eventually("the slot to be free", PATIENCE, unused).await?;
        if matches!(self, Self::Dropped) {
            site.primary
                .sql("SELECT pg_drop_replication_slot('highwater')")
                .await?;
        }
        recycle(site).await?;
        if matches!(self, Self::Dropped) {
            return Ok(());
        }
        let lost = || async {
            site.primary.sql("CHECKPOINT").await.ok()?;
            let status = site
                .primary
                .value(&format!("SELECT wal_status {slot}"))
                .await
                .ok()?;
            (status == "lost").then_some(())
        };
        eventually("the slot to be lost", PATIENCE, lost).await
    }

    /// What the record says about it.
    fn cause(self) -> &'static str {
        match self {
            Self::Dropped => "did not exist",
            Self::Outgrown | Self::Idle => "kept no WAL any more",
        }
    }
}

/// Fills a few segments and lets the server remove what nobody holds.
async fn recycle(site: &Site) -> Result<()> {
    for _ in 0..8 {
        site.primary
            .sql("CREATE TABLE IF NOT EXISTS filler (t text); INSERT INTO filler VALUES ('x'); SELECT pg_switch_wal()")
            .await?;
    }
    site.primary.sql("CHECKPOINT").await?;
    site.primary.sql("CHECKPOINT").await?;
    Ok(())
}

/// A moment: where the server was and when.
struct Moment {
    lsn: u64,
    at: SystemTime,
}

async fn now(site: &Site) -> Result<Moment> {
    Ok(Moment {
        lsn: site.position().await?,
        at: clock::now(),
    })
}

impl Moment {
    fn time(&self) -> String {
        Time::from_unix_micros(clock::unix_micros(self.at)).to_string()
    }
}

/// An archive with a base backup and WAL, a ledger that went on after the agent had left, and the moments between.
struct Story {
    site: Site,
    ledger: Ledger,
    before: Moment,
    inside: Moment,
}

async fn until_wal_is_lost(version: PgVersion, loss: Loss) -> Result<Story> {
    let site = Site::start(loss.cluster(version), 1).await?;
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    ledger.grow(20).await?;
    let before = now(&site).await?;
    ledger.grow(20).await?;
    stop(&mut agent).await?;
    // Its own last bytes are archived; from the next segment on nothing is.
    site.primary.sql("SELECT pg_switch_wal()").await?;
    ledger.grow(20).await?;
    let inside = now(&site).await?;
    ledger.grow(20).await?;
    loss.happens_at(&site).await?;
    Ok(Story {
        site,
        ledger,
        before,
        inside,
    })
}

async fn stop(agent: &mut Running) -> Result<()> {
    agent.terminate();
    let code = agent.wait_exit(PATIENCE).await?;
    ensure!(code == 0, "the agent left with {code}:\n{}", agent.last_words());
    Ok(())
}

/// The gap records of each region: keys and content.
fn records(site: &Site) -> Result<Vec<Vec<(String, String)>>> {
    site.snapshots()
        .iter()
        .map(|region| {
            let content = |key: String| {
                let object = region.get(BUCKET, &key).context("gone")?;
                Ok((key, String::from_utf8(object.bytes.to_vec())?))
            };
            archive::keys_with(region, BUCKET, "/gap/")
                .into_iter()
                .map(content)
                .collect()
        })
        .collect()
}

/// Waits until both regions have `backups` complete base backups.
async fn backed_up(site: &Site, backups: usize, agent: &Running) -> Result<()> {
    let there = || async {
        let count = |region| archive::keys_with(region, BUCKET, "backup.json").len();
        site.snapshots()
            .iter()
            .all(|region| count(region) >= backups)
            .then_some(())
    };
    let waited = eventually("the base backup that ends the gap", PATIENCE, there).await;
    waited.with_context(|| agent.last_words())
}

/// The range that a gap's key names.
fn range_of(key: &str) -> Result<(u64, u64)> {
    let name = key.rsplit('/').next().unwrap_or_default();
    let (start, end) = name.split_once('-').context("no range")?;
    Ok((u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?))
}

/// The archive on both sides of its only gap: the record is the same everywhere, and the WAL leaves out just that.
fn one_gap(site: &Site, cause: &str) -> Result<(u64, u64)> {
    let records = records(site)?;
    ensure!(records[0] == records[1], "the regions differ: {records:?}");
    let [(key, record)] = &records[0][..] else {
        anyhow::bail!("not one gap: {records:?}")
    };
    ensure!(record.contains(cause), "{cause:?} is not in {record}");
    let (start, end) = range_of(key)?;
    for snapshot in site.snapshots() {
        let wal = archive::wal(&snapshot, BUCKET, site.segment_size());
        let runs = wal.get(&1).context("no WAL")?.runs();
        ensure!(
            runs.len() == 2 && runs[0].1 == start && runs[1].0 == end,
            "gap {} to {}, WAL {runs:x?}",
            lsn::show(start),
            lsn::show(end)
        );
    }
    Ok((start, end))
}

/// Before and behind the gap everything can be restored, inside nothing.
async fn restores_around(
    site: &Site,
    log: &LedgerLog,
    (before, inside): (&Moment, &Moment),
    gap: (u64, u64),
    cause: &str,
) -> Result<()> {
    let version = site.primary.version();
    ensure!(before.lsn < gap.0 && gap.0 <= inside.lsn && inside.lsn < gap.1);
    let place = RestoreSite::new(version, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let target = lsn::show(inside.lsn);
    let behind = lsn::show(gap.1 - 1);
    for target in [
        ["--to-lsn", &target],
        ["--to-lsn", &behind],
        ["--to-time", &inside.time()],
    ] {
        let said = place.run("never", &target).await?.expect_code(1)?;
        ensure!(
            said.said().contains(cause) && said.said().contains(&lsn::show(gap.0)),
            "{target:?}: {}",
            said.said()
        );
        ensure!(
            !place.data("never").exists(),
            "{target:?}: the directory was made"
        );
    }
    let list = place.program()?.arg("list").output().await?.expect_code(0)?;
    ensure!(
        list.stdout.contains("gaps") && list.stdout.contains(cause) && list.stdout.contains("ended by"),
        "{}",
        list.stdout
    );
    place.program()?.arg("verify").output().await?.expect_code(0)?;

    let restored = place
        .recovered("before", &["--to-lsn", &lsn::show(before.lsn)])
        .await?;
    let report = log.check(&restored, Expect::at_lsn(before.lsn)).await?;
    ensure!(report.missing > 0, "nothing lies past the position");
    drop(restored);
    log.check(&place.recovered("latest", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

async fn a_gap_is_bridged(version: PgVersion, loss: Loss) -> Result<()> {
    let Story {
        site,
        ledger,
        before,
        inside,
    } = until_wal_is_lost(version, loss).await?;
    let site = &site;
    let agent = site.start_agent().await?;
    backed_up(site, 2, &agent).await?;
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    ensure!(end > inside.lsn);
    let status = site.agent()?.arg("status").output().await?;
    ensure!(
        status.code == 0 && status.stdout.contains("ended by base backup"),
        "{}\n{}",
        status.said(),
        agent.last_words()
    );
    let slot = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'highwater'";
    ensure!(
        site.primary.value(slot).await? == "reserved",
        "the slot holds nothing"
    );
    drop(agent);
    let gap = one_gap(site, loss.cause())?;
    restores_around(site, &log, (&before, &inside), gap, loss.cause()).await
}

#[tokio::test]
async fn fault_09_slot_missing_and_wal_recycled_on_postgresql_15() -> Result<()> {
    a_gap_is_bridged(PgVersion::V15, Loss::Dropped).await
}

#[tokio::test]
async fn fault_10_slot_lost_on_postgresql_15() -> Result<()> {
    a_gap_is_bridged(PgVersion::V15, Loss::Outgrown).await
}

#[tokio::test]
async fn fault_10_slot_lost_on_postgresql_17() -> Result<()> {
    a_gap_is_bridged(PgVersion::V17, Loss::Outgrown).await
}

#[tokio::test]
async fn fault_10_slot_lost_on_postgresql_18() -> Result<()> {
    a_gap_is_bridged(PgVersion::V18, Loss::Outgrown).await
}

#[tokio::test]
async fn fault_85_slot_idle_for_too_long_on_postgresql_18() -> Result<()> {
    a_gap_is_bridged(PgVersion::V18, Loss::Idle).await
}

/// The archive's end is tried first: a slot that is gone is no gap while the WAL is there.
#[tokio::test]
async fn fault_09_a_missing_slot_is_no_gap_while_the_wal_is_there() -> Result<()> {
    let builder = Loss::Dropped
        .cluster(PgVersion::V15)
        .conf("wal_keep_size", "64MB");
    let site = Site::start(builder, 1).await?;
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    site.backup().await?;
    ledger.grow(20).await?;
    stop(&mut agent).await?;
    Loss::Dropped.happens_at(&site).await?;
    ledger.grow(20).await?;

    let agent = site.start_agent().await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    drop(agent);
    ensure!(
        records(&site)?.iter().all(Vec::is_empty),
        "a gap: {:?}",
        records(&site)?
    );
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

/// A slot that never reserved any WAL would lose what is written during the first outage.
async fn an_unreserved_slot_is_made_anew(version: PgVersion) -> Result<()> {
    let site = Site::start(PgCluster::builder(version), 1).await?;
    let slot = "FROM pg_replication_slots WHERE slot_name = 'highwater'";
    site.primary
        .sql("SELECT pg_create_physical_replication_slot('highwater')")
        .await?;
    ensure!(site.primary.value(&format!("SELECT restart_lsn {slot}")).await? == "");
    // No region takes anything: what keeps the WAL now is the slot alone.
    for region in &site.regions {
        region.faults().only_keys("/wal/");
        region.faults().fail_always(Some(503));
    }
    let agent = site.agent()?.arg("run").start()?;
    let reserved = || async {
        let keeps = site
            .primary
            .value(&format!("SELECT restart_lsn {slot}"))
            .await
            .ok()?;
        (!keeps.is_empty()).then_some(())
    };
    eventually("the slot to keep WAL", PATIENCE, reserved)
        .await
        .with_context(|| agent.last_words())?;
    recycle(&site).await?;
    for region in &site.regions {
        region.faults().clear();
    }
    site.all_durable().await.with_context(|| agent.last_words())?;
    ensure!(
        records(&site)?.iter().all(Vec::is_empty),
        "a gap: {:?}",
        records(&site)?
    );
    site.backup().await?;
    Ok(())
}

#[tokio::test]
async fn fault_13_a_slot_without_reserved_wal_on_postgresql_15() -> Result<()> {
    an_unreserved_slot_is_made_anew(PgVersion::V15).await
}

#[tokio::test]
async fn fault_13_a_slot_without_reserved_wal_on_postgresql_18() -> Result<()> {
    an_unreserved_slot_is_made_anew(PgVersion::V18).await
}

/// While one region cannot take the record nothing goes past the gap; a crash then, and the other region gets the
/// very same record.
#[tokio::test]
async fn i5_a_crash_between_record_and_stream_leaves_one_record() -> Result<()> {
    let Story { site, ledger, .. } = until_wal_is_lost(PgVersion::V15, Loss::Dropped).await?;
    let site = &site;
    let south = site.regions[1].faults();
    south.only(&[Operation::Put]);
    south.only_keys("/wal/");
    south.fail_always(Some(503));
    let mut agent = site.agent()?.arg("run").start()?;
    let recorded = || async { (!records(site).ok()?[0].is_empty()).then_some(()) };
    eventually("the record in one region", PATIENCE, recorded)
        .await
        .with_context(|| agent.last_words())?;
    ledger.grow(30).await?;
    let (start, _) = range_of(&records(site)?[0][0].0)?;
    ensure!(records(site)?[1].is_empty());
    ensure!(
        site.stored_ends() == [start, start] && site.tap.highest_flush() <= start,
        "{:x?}, {} reported",
        site.stored_ends(),
        lsn::show(site.tap.highest_flush())
    );
    agent.kill9();
    south.clear();

    let agent = site.start_agent().await?;
    backed_up(site, 2, &agent).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    drop(agent);
    one_gap(site, Loss::Dropped.cause())?;
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[1], site.regions[1].as_ref())])?;
    log.check(&place.recovered("latest", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

/// Rows that do not compress, more than the agent's memory takes.
async fn flood(site: &Site) -> Result<()> {
    const MORE_THAN_MEMORY: u64 = 50 << 20;
    let start = site.position().await?;
    site.primary
        .sql(
            "CREATE TABLE flood AS SELECT decode(string_agg(md5(g::text || r::text), ''), 'hex') AS bytes
               FROM generate_series(1, 1000) r, generate_series(1, 100) g GROUP BY r;
             ALTER TABLE flood ALTER bytes SET STORAGE EXTERNAL",
        )
        .await?;
    while site.position().await? < start + MORE_THAN_MEMORY {
        site.primary
            .sql("INSERT INTO flood SELECT * FROM flood LIMIT 3000")
            .await?;
    }
    site.primary.sql("DROP TABLE flood").await?;
    Ok(())
}

/// No region takes WAL for longer than the operator allows: the slot is given up, aloud; when storage is back the gap is
/// recorded and a base backup ends it.
#[tokio::test]
async fn fault_03_give_up_when_storage_stays_away() -> Result<()> {
    let mut site = Site::start(Loss::Dropped.cluster(PgVersion::V15), 1).await?;
    site.settings += "[memory]\nlimit = \"64MiB\"\n[outage]\npolicy = \"give-up\"\nmax_backlog = \"8MiB\"\n";
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port();
    let program = || {
        anyhow::Ok(
            site.agent()?
                .env("HIGHWATER_ADMIN_LISTEN", format!("127.0.0.1:{port}")),
        )
    };
    let mut agent = program()?.arg("run").start()?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    let before = now(&site).await?;
    ledger.grow(20).await?;
    site.all_durable().await?;

    for region in &site.regions {
        region.faults().only_keys("/wal/");
        region.faults().fail_always(Some(503));
    }
    flood(&site).await?;
    ledger.grow(20).await?;
    let inside = now(&site).await?;
    ledger.grow(20).await?;
    agent.says("GAVE UP THE SLOT", PATIENCE).await?;
    let status = program()?.arg("status").output().await?;
    ensure!(
        status.code == 1 && status.stdout.contains("max_backlog") && status.stdout.contains("room not known"),
        "{}",
        status.said()
    );
    // What the new slot holds from then on counts anew.
    let moved = || async {
        recycle(&site).await.ok()?;
        let slot = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'highwater'";
        let restart = lsn::parse(&site.primary.value(slot).await.ok()?).ok()?;
        (restart > inside.lsn).then_some(())
    };
    eventually("the slot to let go", PATIENCE, moved)
        .await
        .with_context(|| agent.last_words())?;
    recycle(&site).await?;
    ensure!(
        site.tap.highest_flush() < inside.lsn,
        "more was reported than is stored"
    );

    for region in &site.regions {
        region.faults().clear();
    }
    backed_up(&site, 2, &agent).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    let well = || async {
        let status = program().ok()?.arg("status").output().await.ok()?;
        (status.code == 0).then_some(())
    };
    eventually("the status to be well again", PATIENCE, well)
        .await
        .with_context(|| agent.last_words())?;
    drop(agent);
    let gap = one_gap(&site, "given up by outage.policy")?;
    restores_around(&site, &log, (&before, &inside), gap, "given up by outage.policy").await
}
