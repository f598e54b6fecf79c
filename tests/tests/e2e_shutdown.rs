//! A fast shutdown of PostgreSQL ends promptly under the agent, idle and loaded, and the archive
//! then holds everything up to the shutdown checkpoint.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::ledger::Expect;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, Stop};

/// Far above the two seconds that are promised on an idle machine, far below a hang.
const BOUND: Duration = Duration::from_secs(15);

async fn stops(version: PgVersion) -> Result<()> {
    let mut site = Site::start(PgCluster::builder(version), 16).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;

    // Idle.
    let idle = site.primary.stop(Stop::Fast).await?;
    ensure!(idle < BOUND, "{version}: the idle shutdown took {idle:?}");
    let end = site.primary.value("SELECT 1").await;
    ensure!(end.is_err(), "the server still answers");

    // Loaded, with WAL that the agent has not stored yet.
    site.primary.start_again().await?;
    let ledger = Ledger::start(&site.primary, 4).await?;
    ledger.grow(200).await?;
    let loaded = site.primary.stop(Stop::Fast).await?;
    ensure!(loaded < BOUND, "{version}: the loaded shutdown took {loaded:?}");
    let log = ledger.stop().await;
    ensure!(
        agent.is_running(),
        "the agent left with the server:\n{}",
        agent.stderr()
    );

    // The server waited until its last record was reported to be safe.
    let sent = site.tap.sent().wal_end;
    ensure!(
        site.tap.highest_flush() >= sent,
        "the server sent more than was reported to be safe"
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
