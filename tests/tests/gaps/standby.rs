//! What a standby lacks is no gap: its primary may have it.

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{FeedbackTap, Ledger, PgCluster, PgVersion, archive, lsn};

use crate::support::{Loss, SLOW, records, recycle};

const VERSION: PgVersion = PgVersion::V15;

/// A standby that was made after the archive's end, with a `pg_wal` that begins behind it, as `pg_basebackup` leaves one.
async fn made_anew(site: &Site) -> Result<PgCluster> {
    let end = site.stored_ends()[0];
    let standby = Loss::Dropped.cluster(VERSION).standby_of(&site.primary).await?;
    let name = format!("SELECT pg_walfile_name('{}')", lsn::show(end + 1));
    let segment = site.primary.value(&name).await?;
    let file = standby.data_dir().join("pg_wal").join(segment);
    let gone = || async {
        site.primary.sql("CHECKPOINT").await.ok()?;
        standby.sql("CHECKPOINT").await.ok()?;
        (!file.exists()).then_some(())
    };
    eventually(
        "the standby to remove the WAL at the archive's end",
        PATIENCE,
        gone,
    )
    .await?;
    Ok(standby)
}

/// While no agent ran, only the primary's slot kept what was written; the standby was made anew after that. Its agent
/// records nothing, and goes on when the primary's has stored what was kept.
#[tokio::test]
async fn i5_what_only_the_primary_keeps_is_no_gap() -> Result<()> {
    let site = Site::start(Loss::Dropped.cluster(VERSION), 1).await?;
    let mut first = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    site.backup().await?;
    ledger.grow(20).await?;
    first.kill9();
    recycle(&site).await?;
    ledger.grow(20).await?;
    let standby = made_anew(&site).await?;

    let tap = FeedbackTap::start(&standby).await?;
    let mut beside = site.agent_at(&tap.connection_string())?.arg("run").start()?;
    let decided = || async {
        let asked = beside
            .stderr()
            .matches("this standby no longer has the WAL")
            .count();
        let recorded = !records(&site).ok()?.concat().is_empty();
        (asked >= 2 || recorded).then_some(())
    };
    eventually("the standby's word that its WAL is gone", PATIENCE, decided)
        .await
        .with_context(|| beside.last_words())?;
    ensure!(
        records(&site)?.concat().is_empty(),
        "a gap:\n{}",
        beside.last_words()
    );

    let first = site.start_agent().await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| first.last_words())?;
    let followed = || async { (tap.highest_flush() >= end).then_some(()) };
    eventually("the standby's slot to follow", PATIENCE, followed)
        .await
        .with_context(|| beside.last_words())?;
    ensure!(beside.is_running(), "{}", beside.last_words());
    ensure!(
        records(&site)?.concat().is_empty(),
        "a gap:\n{}",
        beside.last_words()
    );
    for snapshot in site.snapshots() {
        let runs = archive::wal(&snapshot, BUCKET, site.segment_size())[&1].runs();
        ensure!(runs.len() == 1, "the archive has a hole: {runs:x?}");
    }
    let place = RestoreSite::new(VERSION, &[(REGIONS[1], site.regions[1].as_ref())])?;
    log.check(&place.recovered("latest", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}
