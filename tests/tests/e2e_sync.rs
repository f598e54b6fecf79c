//! As a synchronous standby: a commit returns only when both regions hold it, so nothing that was
//! acknowledged can be lost, however the machine ends.
//!
//! One region is far slower than the other. Whoever acknowledged what only the fast one holds would be found out at
//! every commit: for the difference between the two, the slow one lacks it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, Pace};
use highwater_tests::postgres::PgBuilder;
use highwater_tests::program::Running;
use highwater_tests::s3::Operation;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::witness::Rules;
use highwater_tests::{Ledger, PgCluster, PgVersion, S3Server, Witness, lsn};

/// What a PUT takes, in the order of [`REGIONS`].
const PUTS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(300)];
/// Commits that are looked at one by one.
const LOOKED_AT: u32 = 12;
/// A commit record is at least this long: `SizeOfXLogRecord` of `access/xlogrecord.h`, and two bytes and the time of `xl_xact_commit`.
const COMMIT_RECORD: u64 = 24 + 2 + 8;

/// A primary whose commits wait for the agent. From the start: after a reload the first commits may return before the server's
/// processes know of it.
fn waiting_primary(version: PgVersion) -> PgBuilder {
    PgCluster::builder(version).conf("synchronous_standby_names", "highwater")
}

/// A site whose commits wait for the agent and whose regions differ in pace, and the agent.
async fn waited_for(version: PgVersion) -> Result<(Site, Running)> {
    let mut site = Site::start(waiting_primary(version), 16).await?;
    site.settings = "[wal]\nflush_interval = \"1s\"\nsynchronous = true\n".to_owned();
    let agent = site.start_agent().await?;
    site.backup().await?;
    for (region, put) in site.regions.iter().zip(PUTS) {
        region.faults().only(&[Operation::Put]);
        region.faults().delay(Some(put));
    }
    Ok((site, agent))
}

/// Commits one by one, in every manner of waiting, and looks into both regions the moment each returns.
async fn every_commit_is_held_when_it_returns(site: &Site) -> Result<()> {
    let client = site.primary.client().await?;
    client.batch_execute("CREATE TABLE t (i int)").await?;
    for (number, mode) in (1..=LOOKED_AT).zip(["on", "remote_apply", "remote_write"].iter().cycle()) {
        client
            .batch_execute(&format!(
                "SET synchronous_commit = {mode}; BEGIN; INSERT INTO t VALUES (1)"
            ))
            .await?;
        let row = client
            .query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
            .await?;
        // The record of the commit begins here or later.
        let least = lsn::parse(row.get(0))? + COMMIT_RECORD;
        client.batch_execute("COMMIT").await?;
        let ends = site.stored_ends();
        for (name, end) in REGIONS.iter().zip(ends) {
            ensure!(
                end >= least,
                "commit {number} ({mode}) returned when {name} held WAL up to {} only; it ends at {} at the least",
                lsn::show(end),
                lsn::show(least)
            );
        }
    }
    Ok(())
}

/// Agent and primary die; each region alone has every commit that returned.
async fn acknowledged_commits_survive(version: PgVersion) -> Result<()> {
    let (mut site, mut agent) = waited_for(version).await?;
    let witness = Witness::of(&site, Rules::all());
    every_commit_is_held_when_it_returns(&site).await?;
    let pace = Pace {
        clients: 24,
        pause: Duration::ZERO,
        ..Pace::default()
    };
    let ledger = Ledger::start_paced(&site.primary, pace).await?;
    ledger.grow(200).await?;

    // In this order: what the regions get after the notes were taken does not count.
    let log = ledger.log();
    let copies = site.snapshots();
    site.primary.kill9();
    agent.kill9();
    ledger.stop().await;
    witness.satisfied()?;
    for (name, copy) in REGIONS.iter().zip(copies) {
        let frozen = S3Server::serve(copy).await?;
        let place = RestoreSite::new(version, &[(name, &frozen)])?;
        place.run("data", &[]).await?.expect_code(0)?;
        let mut restored = PgCluster::adopt(version, &place.data("data"))?;
        restored.start_again().await?;
        restored.value("SELECT pg_promote()").await.ok();
        // Rows that were acknowledged after the notes were taken may be there as well.
        let rows = restored.sql("SELECT client, number FROM ledger").await?;
        for entry in &log.entries {
            let row = vec![Some(entry.client.to_string()), Some(entry.number.to_string())];
            ensure!(
                rows.contains(&row),
                "{name} misses row {} of client {}",
                entry.number,
                entry.client
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn every_acknowledged_commit_survives_on_15() -> Result<()> {
    acknowledged_commits_survive(PgVersion::V15).await
}

#[tokio::test]
async fn every_acknowledged_commit_survives_on_17() -> Result<()> {
    acknowledged_commits_survive(PgVersion::V17).await
}

#[tokio::test]
async fn every_acknowledged_commit_survives_on_18() -> Result<()> {
    acknowledged_commits_survive(PgVersion::V18).await
}

#[tokio::test]
async fn without_a_region_commits_wait_and_go_on_when_it_is_back() -> Result<()> {
    let mut site = Site::start(waiting_primary(PgVersion::V15), 16).await?;
    site.settings = "[wal]\nsynchronous = true\n".to_owned();
    let agent = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(20).await?;
    site.regions[0].faults().freeze();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    let all_wait = || async { (site.primary.value(waiting).await.ok()? == "2").then_some(()) };
    eventually("both clients to wait", PATIENCE, all_wait).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    // In this order; and positions, because commits whose WAL was on its way before the freeze may return after it.
    let acknowledged = ledger.log().entries;
    let held = site.stored_ends()[0];
    for entry in acknowledged {
        ensure!(
            entry.before + COMMIT_RECORD <= held,
            "a commit behind {} was acknowledged, and the frozen region holds WAL up to {} only",
            lsn::show(entry.before),
            lsn::show(held)
        );
    }
    site.regions[0].faults().thaw();
    ledger.grow(20).await.context("after the thaw")?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    drop(agent);
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}
