//! A disk that really fills: `pg_wal` on a small file system while no region takes anything.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::postgres::PgBuilder;
use highwater_tests::program::Running;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgVersion, SmallDisk, lsn, skip};

use crate::support::{Agent, Loss, SLOW, backed_up, now, one_gap, restores_around, stop_taking, take_again};

const MIB: u64 = 1 << 20;

/// Why a test of this module may be skipped.
const NO_DISK: &str = "nobody may mount a file system on this machine";

/// A server whose `pg_wal` is on the disk.
fn on(disk: &SmallDisk) -> PgBuilder {
    let waldir = disk.path().join("pg_wal");
    Loss::Dropped
        .cluster(PgVersion::V15)
        .initdb(&format!("--waldir={}", waldir.display()))
}

/// Rows that do not compress, so that memory does not hold more of them than it should.
async fn prepare_flood(site: &Site) -> Result<()> {
    let rows = "CREATE UNLOGGED TABLE source AS
        SELECT decode(string_agg(md5(g::text || r::text), ''), 'hex') AS bytes
        FROM generate_series(1, 600) r, generate_series(1, 100) g GROUP BY r;
        CREATE TABLE flood (bytes bytea);
        ALTER TABLE flood ALTER bytes SET STORAGE EXTERNAL";
    site.primary.sql(rows).await.map(drop)
}

/// About a megabyte of WAL.
async fn write_a_little(site: &Site) -> Result<()> {
    site.primary
        .sql("INSERT INTO flood SELECT * FROM source")
        .await
        .map(drop)
}

/// The slot is given up while there is room, so that the server goes on through more WAL than its disk holds; what is
/// missing is on record, and a base backup ends the gap.
#[tokio::test]
async fn fault_03_a_disk_that_fills_is_given_up_in_time_and_the_server_goes_on() -> Result<()> {
    let Some(disk) = SmallDisk::new(160)? else {
        return skip::not_allowed(NO_DISK);
    };
    let mut site = Site::start(on(&disk), 1).await?;
    site.settings += &format!(
        "[memory]\nlimit = \"64MiB\"\n[outage]\npolicy = \"give-up\"\nkeep_free = \"96MiB\"\npatience = \"1s\"\ndisk = \"{}\"\n",
        disk.path().display()
    );
    let agent = Agent::new()?;
    let mut running = agent.program(&site)?.arg("run").start()?;
    prepare_flood(&site).await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    let before = now(&site).await?;
    ledger.grow(20).await?;
    site.all_durable().await?;

    stop_taking(&site);
    let start = site.position().await?;
    // More than memory takes, and then until the slot is given up.
    while site.position().await? < start + 50 * MIB {
        write_a_little(&site).await?;
    }
    let inside = now(&site).await?;
    let (mut least, mut written) = (u64::MAX, 0);
    while written < 320 * MIB || !gave_up(&running) || restart(&site).await? <= inside.lsn {
        write_a_little(&site).await.context("the server is down")?;
        least = least.min(disk.free()?);
        written = site.position().await? - start;
        // As fast as the disk allows while nobody has let go yet; the policy looks every five seconds.
        if disk.free()? < 100 * MIB {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        ensure!(
            written < 2048 * MIB,
            "the slot is not given up:\n{}",
            running.last_words()
        );
    }
    ensure!(
        least < 96 * MIB,
        "the limit was never reached: {least} bytes were free at the least"
    );
    let status = agent.program(&site)?.arg("status").output().await?;
    ensure!(
        status.code == 1 && status.stdout.contains("keep_free"),
        "{}",
        status.said()
    );
    ensure!(!site.primary.log().contains("PANIC"), "the disk was full");

    take_again(&site);
    backed_up(&site, 2, &running).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| running.last_words())?;
    ensure!(running.is_running());
    drop(running);
    let gap = one_gap(&site, "given up by outage.policy")?;
    restores_around(&site, &log, (&before, &inside), gap, "given up by outage.policy").await
}

fn gave_up(agent: &Running) -> bool {
    agent.stderr().contains("GAVE UP THE SLOT")
}

async fn restart(site: &Site) -> Result<u64> {
    let slot = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'highwater'";
    lsn::parse(&site.primary.value(slot).await?)
}

/// The slot is held until the disk is full and the server down: the log says so, and metrics and `status` give the time, long
/// before. Nothing is lost by it: with room again the server starts, and the archive gets everything.
#[tokio::test]
async fn fault_03_a_disk_that_fills_is_announced_and_holding_on_loses_nothing() -> Result<()> {
    const SIZE: u32 = 96;
    let Some(disk) = SmallDisk::new(SIZE)? else {
        return skip::not_allowed(NO_DISK);
    };
    let mut site = Site::start(on(&disk), 1).await?;
    site.settings += &format!(
        "[memory]\nlimit = \"64MiB\"\n[outage]\ndisk = \"{}\"\n",
        disk.path().display()
    );
    let agent = Agent::new()?;
    let mut running = agent.program(&site)?.arg("run").start()?;
    prepare_flood(&site).await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    site.all_durable().await?;
    disk.take(24)?;

    stop_taking(&site);
    let mut announced = None;
    while write_a_little(&site).await.is_ok() {
        if announced.is_none() && running.stderr().contains("the room for it runs out") {
            let free = disk.free()?;
            let seconds = agent.metric("highwater_slot_seconds_until_full").await;
            let status = agent.program(&site)?.arg("status").output().await?;
            announced = Some((free, seconds, status));
        }
        // Slower than the five seconds between two looks take a disk to fill.
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    let (free, seconds, status) =
        announced.with_context(|| format!("nothing was announced:\n{}", running.last_words()))?;
    ensure!(free > 20 * MIB, "announced only when {free} bytes were free");
    ensure!(
        seconds.is_some_and(|seconds| seconds > 0 && seconds < 3600),
        "{seconds:?}"
    );
    ensure!(status.stdout.contains("FULL IN "), "{}", status.said());
    let down = || async { site.primary.sql("SELECT 1").await.is_err().then_some(()) };
    eventually("the server to be down", PATIENCE, down).await?;
    ensure!(
        site.primary.log().contains("No space left on device"),
        "{}",
        site.primary.log()
    );
    let log = ledger.stop().await;
    ensure!(running.is_running(), "{}", running.last_words());

    disk.make_room()?;
    take_again(&site);
    site.primary.kill9();
    site.primary.start_again().await?;
    site.all_durable().await.with_context(|| running.last_words())?;
    drop(running);
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await
        .map(drop)
}
