//! A fast shutdown of PostgreSQL ends promptly under the agent, idle and loaded, and the archive
//! then holds everything up to the shutdown checkpoint.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::ledger::Expect;
use highwater_tests::program::Running;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::witness::Rules;
use highwater_tests::{Ledger, PgCluster, PgVersion, S3Server, Stop, Witness, lsn};

/// The agent lets a server go after ten seconds.
const LET_GO_WITHIN: Duration = Duration::from_secs(60);

/// Stops the server. That it came to its end says little: an agent that acknowledged nothing would let it go too, after a while.
async fn stop_is_acknowledged(site: &mut Site, agent: &Running) -> Result<u64> {
    let took = site.primary.stop(Stop::Fast).await?;
    ensure!(took < PATIENCE, "the shutdown took {took:?}");
    let said = agent.stderr();
    ensure!(!said.contains("letting it go"), "the server was let go:\n{said}");
    let (sent, told) = (site.tap.sent().wal_end, site.tap.highest_flush());
    ensure!(
        told >= sent,
        "the server sent WAL up to {}, and {} was reported to be safe",
        lsn::show(sent),
        lsn::show(told)
    );
    Ok(sent)
}

async fn stops(version: PgVersion) -> Result<()> {
    let mut site = Site::start(PgCluster::builder(version), 16).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;

    // Idle.
    stop_is_acknowledged(&mut site, &agent).await.context("idle")?;
    let end = site.primary.value("SELECT 1").await;
    ensure!(end.is_err(), "the server still answers");

    // Loaded, with WAL that the agent has not stored yet. Before it is back a shutdown has nobody to wait for.
    site.primary.start_again().await?;
    site.primary.sql("CREATE TABLE again ()").await?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    let ledger = Ledger::start(&site.primary, 4).await?;
    ledger.grow(200).await?;
    let sent = stop_is_acknowledged(&mut site, &agent).await.context("loaded")?;
    let log = ledger.stop().await;
    ensure!(
        agent.is_running(),
        "the agent left with the server:\n{}",
        agent.stderr()
    );

    let committed = log.entries.iter().filter_map(|entry| entry.after).max();
    let committed = committed.context("nothing was committed")?;
    ensure!(
        sent >= committed,
        "the server ended without sending its last commits"
    );
    for (name, end) in REGIONS.iter().zip(site.stored_ends()) {
        ensure!(end >= sent, "{name} misses the end of WAL");
    }
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    let place = RestoreSite::new(version, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let restored = place.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// What a region does to whoever asks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Resets,
    Answers(u16),
    Delays,
}

impl Trouble {
    fn befalls(self, region: &S3Server) {
        match self {
            Self::Resets => region.faults().refuse(true),
            Self::Answers(status) => region.faults().fail_always(Some(status)),
            Self::Delays => region.faults().delay(Some(Duration::from_millis(100))),
        }
    }
}

/// A fast shutdown ends while a region that the policy needs is in trouble: acknowledged where the region is only slow, and else
/// because the server is let go. What it wrote last is stored when both are back.
async fn stops_though_a_region(trouble: Trouble) -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    // A look at the claim of a slow region takes as long, and with the usual interval there is time for it.
    site.settings = site.settings.replace("interval = \"1s\"", "interval = \"5s\"");
    let witness = Witness::of(&site, Rules::all());
    let mut agent = site.start_agent().await?;
    site.all_durable().await?;
    trouble.befalls(&site.regions[1]);
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;
    if trouble == Trouble::Delays {
        stop_is_acknowledged(&mut site, &agent).await?;
    } else {
        site.primary.begin_stop(Stop::Fast);
        let stopped = site.primary.until_ended(LET_GO_WITHIN).await;
        stopped.with_context(|| agent.last_words())?;
        agent.says("letting it go", PATIENCE).await?;
    }
    ledger.stop().await;

    site.regions[1].faults().clear();
    site.primary.start_again().await?;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    ensure!(agent.is_running(), "{}", agent.last_words());
    let ends = site.stored_ends();
    ensure!(
        ends.iter().all(|held| *held >= end),
        "{:?} of {}",
        ends.map(lsn::show),
        lsn::show(end)
    );
    witness.satisfied()?;
    site.has_no_gap()
}

#[tokio::test]
async fn i15_a_fast_shutdown_ends_though_a_region_resets_connections() -> Result<()> {
    stops_though_a_region(Trouble::Resets).await
}

#[tokio::test]
async fn i15_a_fast_shutdown_ends_though_a_region_answers_503() -> Result<()> {
    stops_though_a_region(Trouble::Answers(503)).await
}

#[tokio::test]
async fn i15_a_fast_shutdown_ends_though_a_region_answers_403() -> Result<()> {
    stops_though_a_region(Trouble::Answers(403)).await
}

#[tokio::test]
async fn i15_a_fast_shutdown_ends_though_a_region_is_slow() -> Result<()> {
    stops_though_a_region(Trouble::Delays).await
}

/// The server has gone while a status message was on its way, and its good-bye is read after that.
#[tokio::test]
async fn a_good_bye_behind_a_status_message_that_nobody_took_is_heard() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let mut agent = site.start_agent().await?;
    site.all_durable().await?;
    site.tap.end_late(true);
    for _ in 0..3 {
        site.primary.stop(Stop::Fast).await?;
        site.primary.start_again().await?;
        site.primary.sql("CREATE TABLE IF NOT EXISTS again ()").await?;
        site.all_durable().await.with_context(|| agent.last_words())?;
        ensure!(agent.is_running(), "{}", agent.last_words());
    }
    Ok(())
}

#[tokio::test]
async fn fault_04_a_fast_shutdown_of_postgresql_15_ends() -> Result<()> {
    stops(PgVersion::V15).await
}

#[tokio::test]
async fn fault_04_a_fast_shutdown_of_postgresql_17_ends() -> Result<()> {
    stops(PgVersion::V17).await
}

#[tokio::test]
async fn fault_04_a_fast_shutdown_of_postgresql_18_ends() -> Result<()> {
    stops(PgVersion::V18).await
}
