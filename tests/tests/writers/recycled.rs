//! What the slot of a standby keeps is what the archive needs of it when it is promoted.

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, LedgerLog, Pace};
use highwater_tests::postgres::PgBuilder;
use highwater_tests::program::Running;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::witness::Rules;
use highwater_tests::{FeedbackTap, Ledger, PgCluster, Witness, lsn};

use crate::streams::follows;
use crate::{SOON, VERSION, builder, flushed};

/// What the slot of the agent keeps.
const SLOT: &str = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'highwater'";
/// What a standby needs itself, to start again.
const RESTARTPOINT: &str = "SELECT redo_lsn FROM pg_control_checkpoint()";
const REPLAYED: &str = "SELECT pg_last_wal_replay_lsn()";

/// Servers that keep little WAL that nobody needs.
fn small_wal() -> PgBuilder {
    builder()
        .conf("min_wal_size", "2MB")
        .conf("max_wal_size", "8MB")
        .conf("wal_keep_size", "0")
}

async fn place(server: &PgCluster, query: &str) -> Result<u64> {
    lsn::parse(&server.value(query).await?)
}

async fn switch_segments(server: &PgCluster, count: u32) -> Result<()> {
    for _ in 0..count {
        server
            .sql("CREATE TABLE IF NOT EXISTS filler (t text); INSERT INTO filler VALUES ('x'); SELECT pg_switch_wal()")
            .await?;
    }
    Ok(())
}

/// Where the WAL begins that the server has on its disk.
fn oldest_wal(server: &PgCluster, segment_size: u64) -> Result<u64> {
    let files = std::fs::read_dir(server.data_dir().join("pg_wal"))?;
    let starts = files.filter_map(|file| segment_start(file.ok()?.file_name().to_str()?, segment_size));
    starts.min().context("there is no WAL")
}

/// Of the name of a segment; there are other files beside them.
fn segment_start(name: &str, segment_size: u64) -> Option<u64> {
    let hex = |part: std::ops::Range<usize>| u64::from_str_radix(name.get(part)?, 16).ok();
    let start = (hex(8..16)? << 32) + hex(16..24)? * segment_size;
    (name.len() == 24).then_some(start)
}

async fn beside(site: &Site, tap: &FeedbackTap) -> Result<Running> {
    let mut agent = site.agent_at(&tap.connection_string())?.arg("run").start()?;
    agent.says("streaming", SOON).await?;
    Ok(agent)
}

/// Waits until the standby has removed what it may: it needs nothing before its restartpoint, and what it has from before that
/// begins with the segment that its slot keeps. Returns where that is.
async fn only_the_slot_keeps_it(site: &Site, standby: &PgCluster) -> Result<u64> {
    let segment = |at: u64| at - at % site.segment_size();
    let removed = || async {
        // A restartpoint is where a checkpoint of the primary was replayed.
        site.primary.sql("CHECKPOINT").await.ok()?;
        standby.sql("CHECKPOINT").await.ok()?;
        let kept = segment(place(standby, SLOT).await.ok()?);
        let needed = segment(place(standby, RESTARTPOINT).await.ok()?);
        let oldest = oldest_wal(standby, site.segment_size()).ok()?;
        (oldest == kept && kept < needed).then_some(kept)
    };
    eventually("the standby to keep WAL for its slot alone", PATIENCE, removed)
        .await
        .with_context(|| {
            let oldest = oldest_wal(standby, site.segment_size()).map(lsn::show);
            format!("the oldest WAL of the standby begins at {oldest:?}")
        })
}

/// The archive goes on beside the promoted server without a gap, and either region alone restores everything.
async fn goes_on(site: &Site, promoted: &PgCluster, tap: &FeedbackTap, log: LedgerLog) -> Result<()> {
    let mut agent = beside(site, tap).await?;
    let ledger = Ledger::resume(promoted, Pace::default(), log).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.archived(2, flushed(promoted).await?)
        .await
        .with_context(|| agent.last_words())?;
    site.has_no_gap().with_context(|| agent.last_words())?;
    ensure!(agent.is_running(), "{}", agent.last_words());
    for (name, region) in REGIONS.iter().zip(&site.regions) {
        let place = RestoreSite::new(VERSION, &[(name, region.as_ref())])?;
        let restored = place.recovered("data", &[]).await?;
        log.check(&restored, Expect::everything()).await.context(*name)?;
    }
    Ok(())
}

/// WAL goes on while neither region takes any, and the standby's restartpoints pass what they hold. Then the primary is lost, and
/// both agents with what they have in memory: what the archive lacks is what the standby has kept for its slot.
#[tokio::test]
async fn a_promotion_never_meets_recycled_wal() -> Result<()> {
    let mut site = Site::start(small_wal(), 1).await?;
    let mut first = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 1).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    let standby = small_wal().standby_of(&site.primary).await?;
    let oldest = oldest_wal(&standby, site.segment_size())?;
    let tap = FeedbackTap::start(&standby).await?;
    let witness = Witness::at(&site, &tap, Rules::all());
    let mut second = beside(&site, &tap).await?;
    switch_segments(&site.primary, 4).await?;
    ledger.grow(20).await?;
    let end = site.all_durable().await.with_context(|| first.last_words())?;
    follows(&tap, end, &second).await?;

    site.regions.iter().for_each(|region| region.faults().freeze());
    switch_segments(&site.primary, 6).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    let kept = only_the_slot_keeps_it(&site, &standby).await?;
    ensure!(
        oldest < kept,
        "there was nothing to be removed: the test proves nothing"
    );
    let end = flushed(&site.primary).await?;
    let replayed = || async { (place(&standby, REPLAYED).await.ok()? >= end).then_some(()) };
    eventually("the standby to have it all", PATIENCE, replayed).await?;

    site.primary.kill9();
    first.kill9();
    second.kill9();
    standby.promote().await?;
    standby.sql("CHECKPOINT").await?;
    ensure!(oldest_wal(&standby, site.segment_size())? == kept);
    site.regions.iter().for_each(|region| region.faults().thaw());
    goes_on(&site, &standby, &tap, log).await?;
    witness.satisfied().map(drop)
}
