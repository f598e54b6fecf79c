//! Timelines: a promoted standby and a restored cluster are archived on a new timeline, and a
//! restore follows the history across the switch.

#[path = "sent/mod.rs"]
mod sent;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, Pace};
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, Stop, archive, lsn};
use sent::holds_what_was_sent;

const TWO: Pace = Pace {
    clients: 2,
    pause: std::time::Duration::from_millis(2),
    filling: 100,
};

/// The server writes `timeline`, and neither region took anything of a timeline before its history.
async fn has_entered(site: &Site, timeline: u32) -> Result<()> {
    let written = "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)";
    let written = site.primary.value(written).await?;
    ensure!(
        written == format!("{timeline:08X}"),
        "the server writes timeline {written}"
    );
    archive::histories_first(&site.snapshots(), BUCKET, site.segment_size())
}

async fn follows_a_promotion(version: PgVersion) -> Result<()> {
    let mut site = Site::start(PgCluster::builder(version), 16).await?;
    site.tap.record();
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, TWO).await?;
    ledger.grow(50).await?;
    site.backup().await?;
    let mut standby = PgCluster::builder(version).standby_of(&site.primary).await?;
    ledger.grow(50).await?;
    let before = ledger.stop().await;
    // A clean switchover: the standby has everything, the old primary does not come back.
    site.primary.stop(Stop::Fast).await?;
    standby.promote().await?;
    site.tap.redirect(&standby);
    std::mem::swap(&mut site.primary, &mut standby);

    let ledger = Ledger::resume(&site.primary, TWO, before).await?;
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    let end = lsn::parse(&site.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
    let archived = || async {
        let ends = site
            .snapshots()
            .map(|snapshot| archive::wal_end(&snapshot, BUCKET, 2, site.segment_size()));
        ends.iter().all(|stored| *stored >= end).then_some(())
    };
    let waited = eventually("the new timeline in both regions", PATIENCE, archived).await;
    waited.with_context(|| format!("the agent said:\n{}", agent.last_words()))?;
    ensure!(agent.is_running(), "the agent has left:\n{}", agent.last_words());
    has_entered(&site, 2).await?;
    holds_what_was_sent(&site)?;
    drop(agent);

    let place = RestoreSite::new(version, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let restored = place.recovered("latest", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

#[tokio::test]
async fn a_promotion_is_followed_on_postgresql_15() -> Result<()> {
    follows_a_promotion(PgVersion::V15).await
}

#[tokio::test]
async fn a_promotion_is_followed_on_postgresql_18() -> Result<()> {
    follows_a_promotion(PgVersion::V18).await
}

/// The cluster that came out of a restore is archived too, and can be restored in its turn.
#[tokio::test]
async fn a_restored_cluster_goes_on_in_the_same_archive() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, TWO).await?;
    ledger.grow(50).await?;
    site.backup().await?;
    ledger.grow(50).await?;
    let before = ledger.stop().await;
    site.all_durable().await?;
    drop(agent);
    site.primary.kill9();

    let regions = [
        (REGIONS[0], site.regions[0].clone()),
        (REGIONS[1], site.regions[1].clone()),
    ];
    let both: Vec<_> = regions
        .iter()
        .map(|(name, region)| (*name, region.as_ref()))
        .collect();
    let place = RestoreSite::new(PgVersion::V15, &both)?;
    let restored = place.recovered("first", &[]).await?;
    before.check(&restored, Expect::everything()).await?;
    site.primary = restored;
    site.tap.redirect(&site.primary);
    let agent = site.start_agent().await?;
    let ledger = Ledger::resume(&site.primary, TWO, before).await?;
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    has_entered(&site, 2).await?;
    drop(agent);
    site.primary.kill9();

    let again = place.recovered("second", &[]).await?;
    log.check(&again, Expect::everything()).await?;
    ensure!(
        again
            .value("SELECT count(*) FROM ledger")
            .await?
            .parse::<usize>()?
            >= log.entries.len()
    );
    Ok(())
}
