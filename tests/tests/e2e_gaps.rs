//! WAL that the server removed before the archive had it: the gap is on record before anything behind it is stored, a
//! base backup ends it by itself, and a restore refuses every moment inside and none outside.

#[path = "gaps/disk.rs"]
mod disk;
#[path = "gaps/outage.rs"]
mod outage;
#[path = "pulse/mod.rs"]
mod pulse;
#[path = "gaps/standby.rs"]
mod standby;
#[path = "gaps/support.rs"]
mod support;
#[path = "gaps/synchronous.rs"]
mod synchronous;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, LedgerLog};
use highwater_tests::s3::Operation;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, Stop, archive, lsn};

use support::{
    Agent, Loss, SLOW, Story, archived_for_a_while, backed_up, now, one_gap, range_of, records, recycle,
    restores_around, stop, take_again, until_wal_is_lost,
};

async fn a_gap_is_bridged(version: PgVersion, loss: Loss) -> Result<()> {
    let Story {
        site,
        ledger,
        before,
        inside,
    } = until_wal_is_lost(version, loss).await?;
    let site = &site;
    // The base backup that ends the gap takes long enough for the gap to be seen before.
    for region in &site.regions {
        region.faults().only(&[Operation::Put]);
        region.faults().only_keys("/base/");
        region.faults().delay(Some(std::time::Duration::from_secs(2)));
    }
    let admin = Agent::new()?;
    let agent = admin.program(site)?.arg("run").start()?;
    let seen = admin.counts_gaps(1, 1).await;
    seen.with_context(|| agent.last_words())?;
    let lost = admin.metric("highwater_gap_last_bytes").await;
    take_again(site);
    backed_up(site, 2, &agent).await?;
    admin.counts_gaps(1, 0).await?;
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
    ensure!(
        !matches!(loss, Loss::Outgrown) || status.stdout.contains("room for"),
        "{}",
        status.stdout
    );
    let slot = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'highwater'";
    ensure!(
        site.primary.value(slot).await? == "reserved",
        "the slot holds nothing"
    );
    drop(agent);
    let gap = one_gap(site, loss.cause())?;
    ensure!(lost == Some(gap.1 - gap.0), "{lost:?} bytes are said to be lost");
    restores_around(site, &log, (&before, &inside), gap, loss.cause()).await
}

#[tokio::test]
async fn fault_09_slot_missing_and_wal_recycled_on_postgresql_15() -> Result<()> {
    a_gap_is_bridged(PgVersion::V15, Loss::Dropped).await
}

#[tokio::test]
async fn fault_09_slot_missing_and_wal_recycled_on_postgresql_18() -> Result<()> {
    a_gap_is_bridged(PgVersion::V18, Loss::Dropped).await
}

/// A slot of the same name stands there and looks as if nothing had happened.
#[tokio::test]
async fn fault_09_slot_dropped_and_made_again_is_a_gap_on_postgresql_15() -> Result<()> {
    a_gap_is_bridged(PgVersion::V15, Loss::Recreated).await
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

/// For a while the server writes what no recovery gets past; all of it is there.
async fn a_spell_of_minimal_wal_is_a_gap(version: PgVersion) -> Result<()> {
    let builder = PgCluster::builder(version).conf("wal_keep_size", "256MB");
    let mut site = Site::start(builder, 1).await?;
    let (ledger, before) = archived_for_a_while(&site).await?;
    let log = ledger.stop().await;
    spell_of_minimal_wal(&mut site).await?;
    let inside = now(&site).await?;

    let agent = site.start_agent().await?;
    backed_up(&site, 2, &agent).await?;
    site.primary.sql("INSERT INTO bare VALUES (0)").await?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    ensure!(agent.last_words().contains("NO RECOVERY GETS PAST THIS WAL"));
    let status = site.agent()?.arg("status").output().await?.expect_code(0)?;
    ensure!(status.stdout.contains("wal_level = minimal"), "{}", status.said());
    drop(agent);
    let records = records(&site)?;
    ensure!(
        records[0].len() == 1 && records[0] == records[1],
        "not one record: {records:?}"
    );
    let place = RestoreSite::new(version, &[(REGIONS[1], site.regions[1].as_ref())])?;
    for target in [
        ["--to-lsn", &lsn::show(inside.lsn)],
        ["--to-time", &inside.time()],
    ] {
        let said = place.run("never", &target).await?.expect_code(1)?;
        ensure!(
            said.said().contains("wal_level = minimal"),
            "{target:?}: {}",
            said.said()
        );
    }
    place.program()?.arg("verify").output().await?.expect_code(0)?;
    let restored = place
        .recovered("before", &["--to-lsn", &lsn::show(before.lsn)])
        .await?;
    log.check(&restored, Expect::at_lsn(before.lsn)).await?;
    drop(restored);
    let latest = place.recovered("latest", &[]).await?;
    log.check(&latest, Expect::everything()).await?;
    ensure!(latest.value("SELECT count(*) FROM bare").await? == "1001");
    Ok(())
}

/// A record that is damaged on the server's disk: PostgreSQL would take it for the end of the WAL and open there, without a word of
/// what follows.
#[tokio::test]
async fn a_damaged_record_on_the_server_is_a_gap() -> Result<()> {
    let builder = PgCluster::builder(PgVersion::V15).conf("wal_keep_size", "256MB");
    let site = Site::start(builder, 1).await?;
    let (ledger, before) = archived_for_a_while(&site).await?;
    site.primary.sql("SELECT pg_switch_wal()").await?;
    ledger.grow(5).await?;
    let segment = site
        .primary
        .value("SELECT pg_walfile_name(pg_current_wal_lsn())")
        .await?;
    let damaged = site.position().await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    let inside = now(&site).await?;
    site.primary.sql("SELECT pg_switch_wal()").await?;
    let path = site.primary.data_dir().join("pg_wal").join(segment);
    let place = usize::try_from(damaged % site.segment_size())? + 30;
    let mut bytes = std::fs::read(&path)?;
    bytes[place] ^= 0xFF;
    std::fs::write(&path, bytes)?;

    let agent = site.start_agent().await?;
    backed_up(&site, 2, &agent).await?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    drop(agent);
    let records = records(&site)?;
    ensure!(
        records[0].len() == 1 && records[0] == records[1] && records[0][0].1.contains("damaged WAL"),
        "not one record: {records:?}"
    );
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let said = place.run("never", &["--to-lsn", &lsn::show(inside.lsn)]).await?;
    ensure!(said.expect_code(1)?.said().contains("damaged WAL"));
    before_and_latest(&place, &log, before.lsn).await
}

/// Both sides of what no recovery gets past: the state at `before`, and all that there is.
async fn before_and_latest(place: &RestoreSite, log: &LedgerLog, before: u64) -> Result<()> {
    let restored = place
        .recovered("before", &["--to-lsn", &lsn::show(before)])
        .await?;
    log.check(&restored, Expect::at_lsn(before)).await?;
    drop(restored);
    log.check(&place.recovered("latest", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

/// Replication is not to be had meanwhile, and a table is filled past the WAL.
async fn spell_of_minimal_wal(site: &mut Site) -> Result<()> {
    for setting in ["wal_level = minimal", "max_wal_senders = 0"] {
        site.primary.sql(&format!("ALTER SYSTEM SET {setting}")).await?;
    }
    let drop_slot = "SELECT pg_drop_replication_slot('highwater')";
    site.primary.sql(drop_slot).await?;
    restart(site).await?;
    let rows = "CREATE TABLE bare AS SELECT generate_series(1, 1000) AS row";
    site.primary.sql(rows).await?;
    site.primary.sql("ALTER SYSTEM RESET ALL").await?;
    restart(site).await
}

async fn restart(site: &mut Site) -> Result<()> {
    site.primary.stop(Stop::Fast).await?;
    site.primary.start_again().await
}

#[tokio::test]
async fn a_spell_of_minimal_wal_is_a_gap_on_postgresql_15() -> Result<()> {
    a_spell_of_minimal_wal_is_a_gap(PgVersion::V15).await
}

#[tokio::test]
async fn a_spell_of_minimal_wal_is_a_gap_on_postgresql_18() -> Result<()> {
    a_spell_of_minimal_wal_is_a_gap(PgVersion::V18).await
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
    let status = site.agent()?.arg("status").output().await?.expect_code(1)?;
    ensure!(status.stdout.contains("OPEN"), "{}", status.stdout);
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

/// A region that was away while the gap was recorded gets the record like the WAL, when it catches up.
#[tokio::test]
async fn i5_a_region_that_was_away_gets_the_record_too() -> Result<()> {
    let Story { mut site, ledger, .. } = until_wal_is_lost(PgVersion::V15, Loss::Dropped).await?;
    site.settings += "[durability]\npolicy = \"any\"\n";
    let south = site.regions[1].faults();
    south.refuse(true);
    let agent = site.start_agent().await?;
    ledger.grow(20).await?;
    drop(ledger.stop().await);
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    ensure!(records(&site)?[0].len() == 1 && records(&site)?[1].is_empty());
    south.refuse(false);
    let filled = || async {
        let wal = archive::wal(&site.snapshots()[1], BUCKET, site.segment_size());
        let (_, newest) = *wal.get(&1)?.runs().last()?;
        (newest >= end).then_some(())
    };
    eventually("the region to catch up", PATIENCE, filled)
        .await
        .with_context(|| agent.last_words())?;
    one_gap(&site, Loss::Dropped.cause())?;
    Ok(())
}

/// Under `any` the newest WAL may lie in the one region that does not answer when the agent starts, and the server has
/// removed it, rightly. That is no gap as long as the region may only be late.
#[tokio::test]
async fn i5_what_only_a_late_region_holds_is_no_gap() -> Result<()> {
    let mut site = Site::start(Loss::Dropped.cluster(PgVersion::V15), 1).await?;
    site.settings += "[durability]\npolicy = \"any\"\n";
    let site = &site;
    let [north, south] = [site.regions[0].faults(), site.regions[1].faults()];
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    ledger.grow(20).await?;
    north.only(&[Operation::Put]);
    north.only_keys("/wal/");
    north.fail_always(Some(503));
    recycle(site).await?;
    let only_south = site.all_durable().await?;
    agent.kill9();
    recycle(site).await?;
    north.clear();
    south.refuse(true);

    let agent = site.agent()?.arg("run").start()?;
    let told = || async { agent.stderr().contains("no longer has the WAL").then_some(()) };
    eventually("the server's word that its WAL is gone", PATIENCE, told)
        .await
        .with_context(|| agent.last_words())?;
    south.refuse(false);
    ledger.grow(20).await?;
    drop(ledger.stop().await);
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    site.archived(1, end).await.with_context(|| agent.last_words())?;
    for snapshot in site.snapshots() {
        let runs = archive::wal(&snapshot, BUCKET, site.segment_size())[&1].runs();
        ensure!(runs.len() == 1 && runs[0].0 < only_south, "{runs:x?}");
    }
    ensure!(records(site)?.concat().is_empty(), "a gap was recorded");
    Ok(())
}

/// The agent misses a promotion and all WAL around it: one gap to the end of the old timeline, one at the beginning of
/// the new one.
#[tokio::test]
async fn fault_15_a_gap_that_holds_a_promotion() -> Result<()> {
    let Story {
        mut site,
        ledger,
        before,
        ..
    } = until_wal_is_lost(PgVersion::V15, Loss::Dropped).await?;
    let mut standby = PgCluster::builder(PgVersion::V15)
        .standby_of(&site.primary)
        .await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.primary.stop(Stop::Fast).await?;
    standby.promote().await?;
    site.tap.redirect(&standby);
    std::mem::swap(&mut site.primary, &mut standby);
    let ledger = Ledger::resume(&site.primary, SLOW, log).await?;
    ledger.grow(20).await?;
    recycle(&site).await?;

    let agent = site.start_agent().await?;
    backed_up(&site, 2, &agent).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    drop(agent);
    let records = records(&site)?;
    ensure!(records[0] == records[1] && records[0].len() == 2, "{records:?}");
    let (old, new) = (range_of(&records[0][0].0)?, range_of(&records[0][1].0)?);
    ensure!(records[0][0].0.contains("/00000001/gap/") && records[0][1].0.contains("/00000002/gap/"));
    ensure!(
        new.0 <= old.1 && old.1 < new.1 && old.1 - new.0 < site.segment_size(),
        "{old:x?} {new:x?}"
    );
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let target = lsn::show(old.1 - 1);
    place.run("never", &["--to-lsn", &target]).await?.expect_code(1)?;
    before_and_latest(&place, &log, before.lsn).await
}

/// A hole without a record: every target behind it is refused, with the range, before anything is written; and a time
/// in an idle stretch is no hole.
#[tokio::test]
async fn fault_53_and_57_a_hole_is_refused_and_an_idle_stretch_is_not() -> Result<()> {
    let site = Site::start(PgCluster::builder(PgVersion::V15), 1).await?;
    let agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    ledger.grow(20).await?;
    let hole = site.position().await? / site.segment_size() * site.segment_size();
    for _ in 0..3 {
        site.primary.sql("SELECT pg_switch_wal()").await?;
        ledger.grow(20).await?;
    }
    let log = ledger.stop().await;
    site.all_durable().await?;
    // Nothing happens, and the archive says so.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let idle = now(&site).await?;
    pulse::until_pulse(&site.regions[0], |pulse| {
        pulse.server_time > idle.at() && pulse.stored_lsn >= pulse.wal_end
    })
    .await?;
    let idle = idle.time();
    drop(agent);
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let restored = place.recovered("idle", &["--to-time", &idle]).await?;
    log.check(&restored, Expect::everything()).await?;
    drop(restored);

    let north = &site.regions[0];
    for key in north.objects(BUCKET) {
        let range = archive::range_of(&key, site.segment_size());
        if range.is_some_and(|(_, start, end)| start < hole + site.segment_size() && hole < end) {
            north.delete(BUCKET, &key);
        }
    }
    for target in [
        &[][..],
        &["--to-time", &idle],
        &["--to-lsn", &lsn::show(hole + 1)],
    ] {
        let said = place.run("never", target).await?.expect_code(1)?;
        ensure!(
            said.said().contains(&lsn::show(hole)) && !place.data("never").exists(),
            "{target:?}: {}",
            said.said()
        );
    }
    let verify = place.program()?.arg("verify").output().await?.expect_code(1)?;
    ensure!(verify.stdout.contains("missing"), "{}", verify.stdout);
    Ok(())
}
