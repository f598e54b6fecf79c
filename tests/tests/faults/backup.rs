//! Base backups while their source, their WAL or PostgreSQL's own archiving fails.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::program::Running;
use highwater_tests::site::{BUCKET, PATIENCE, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, Program, archive};

use crate::support::{VERSION, backups, from_region, leave, one_region_has_everything};

/// Many packs, and memory for few of them: when they are held up, the server's part of the backup is too. Compressed, all of
/// a young cluster would find room.
const SMALL: &str = "[backup]\npack_size = \"1MiB\"\ncompression = \"none\"\n";

/// Starts a backup and waits until its first packs are stored in one region. The other takes none before [`go_on`]: until
/// then the backup stays where it is.
async fn half_way(site: &Site, config: &str) -> Result<Running> {
    let toml = config.to_owned() + SMALL;
    let held = site.regions[1].faults();
    held.only_keys("/pack/");
    held.fail_always(Some(503));
    let backup = Program::agent()?.config(&toml)?.arg("backup").start()?;
    let before = packs(site);
    let begun = || async { (packs(site) > before + 1).then_some(()) };
    eventually("the first packs", PATIENCE, begun)
        .await
        .with_context(|| backup.last_words())?;
    Ok(backup)
}

/// Lets a backup that is held half way go on.
fn go_on(site: &Site) {
    site.regions[1].faults().clear();
}

fn packs(site: &Site) -> usize {
    archive::keys_with(&site.regions[0].snapshot(), BUCKET, "/pack/").len()
}

/// The walsender of a backup is terminated; its standby is promoted: no backup, by name, and the next one is whole.
#[tokio::test]
async fn fault_25_a_backup_whose_source_is_cut_off_or_promoted_is_not_visible() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let agent = site.start_agent().await?;
    let backup = half_way(&site, &site.config()).await?;
    site.primary
        .sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication WHERE state = 'backup'")
        .await?;
    go_on(&site);
    let failed = backup.finish(PATIENCE).await?;
    ensure!(
        failed.code == 3 && failed.said().contains("not visible"),
        "{}",
        failed.said()
    );
    ensure!(backups(&site, 0).is_empty() && backups(&site, 1).is_empty());
    let id = site.backup().await?;
    ensure!(backups(&site, 0) == [id.clone()] && backups(&site, 1) == [id]);
    leave(agent).await?;

    let mut standby = PgCluster::builder(VERSION).standby_of(&site.primary).await?;
    site.tap.redirect(&standby);
    let beside = site
        .config()
        .replacen("[cluster]\n", "[cluster]\nstandby = \"stream\"\n", 1);
    let mut agent = Program::agent()?.config(&beside)?.arg("run").start()?;
    agent.says("streaming", PATIENCE).await?;
    // A standby's backup begins at its last restart point, which must lie in WAL that is archived.
    site.primary.sql("CREATE TABLE t (i int); CHECKPOINT").await?;
    site.all_durable().await?;
    standby.sql("CHECKPOINT").await?;
    let backup = half_way(&site, &beside).await?;
    standby.promote().await?;
    go_on(&site);
    let failed = backup.finish(PATIENCE).await?;
    ensure!(
        failed.code != 0,
        "a backup across a promotion was called good:\n{}",
        failed.said()
    );
    ensure!(backups(&site, 0).len() == 1 && backups(&site, 1).len() == 1);
    std::mem::swap(&mut site.primary, &mut standby);
    drop(agent);
    Ok(())
}

/// The server recycles WAL as fast as it can while a slow backup runs: the stream has it, and the backup restores.
#[tokio::test]
async fn fault_26_wal_recycled_during_a_backup_is_in_the_archive() -> Result<()> {
    let small = PgCluster::builder(VERSION)
        .conf("min_wal_size", "2MB")
        .conf("max_wal_size", "2MB");
    let site = Site::start(small, 1).await?;
    let agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    let mut backup = half_way(&site, &site.config()).await?;
    let first = site
        .primary
        .value("SELECT pg_walfile_name(pg_current_wal_lsn())")
        .await?;
    let gone = || !site.primary.data_dir().join("pg_wal").join(&first).exists();
    let began = Instant::now();
    while !gone() {
        ensure!(
            began.elapsed() < PATIENCE,
            "the server keeps the WAL of the backup: the test proves nothing"
        );
        site.primary
            .sql("CREATE TABLE filling AS SELECT repeat(md5(g::text), 30) FROM generate_series(1, 3000) g; DROP TABLE filling")
            .await?;
        site.primary.sql("CHECKPOINT").await?;
    }
    ensure!(backup.is_running(), "{}", backup.last_words());
    go_on(&site);
    backup.finish(PATIENCE).await?.expect_code(0)?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    leave(agent).await?;
    one_region_has_everything(&site, 1, &log).await
}

/// PostgreSQL's own archiving fails all the time: neither the stream nor a backup waits for it.
async fn a_failing_archive_command_holds_nothing_up(version: PgVersion) -> Result<()> {
    let failing = PgCluster::builder(version)
        .conf("archive_mode", "on")
        .conf("archive_command", "false");
    let site = Site::start(failing, 16).await?;
    let agent = site.start_agent().await?;
    site.primary.sql("CREATE TABLE t AS SELECT 7 AS i").await?;
    let backup = tokio::time::timeout(Duration::from_secs(45), site.backup()).await;
    backup.context("the backup waits for archive_command")??;
    let check = site.agent()?.arg("check").output().await?.expect_code(0)?;
    ensure!(check.stdout.contains("archive_mode"), "{}", check.said());
    site.all_durable().await?;
    leave(agent).await?;
    let place = from_region(&site, 0)?;
    let restored = place.recovered("data", &[]).await?;
    ensure!(restored.value("SELECT i FROM t").await? == "7");
    Ok(())
}

#[tokio::test]
async fn fault_28_a_failing_archive_command_holds_nothing_up_on_postgresql_14() -> Result<()> {
    a_failing_archive_command_holds_nothing_up(PgVersion::V14).await
}

#[tokio::test]
async fn fault_28_a_failing_archive_command_holds_nothing_up_on_postgresql_15() -> Result<()> {
    a_failing_archive_command_holds_nothing_up(PgVersion::V15).await
}

/// Nothing is written any more when the backup has ended: it is restorable at once, and all that is archived is, without
/// another segment switch than PostgreSQL's own.
async fn a_backup_of_an_idle_database_restores_without_forced_wal(version: PgVersion) -> Result<()> {
    let site = Site::start(PgCluster::builder(version), 16).await?;
    let agent = site.start_agent().await?;
    site.primary.sql("CREATE TABLE t AS SELECT 7 AS i").await?;
    site.backup().await?;
    // Not `pg_walfile_name`: what that says of a position between two segments depends on the version.
    let segment = async || Ok::<_, anyhow::Error>(site.position().await? / site.segment_size());
    let before = segment().await?;
    let plan = from_region(&site, 0)?.program()?.args(["plan"]).output().await?;
    ensure!(plan.code == 0, "right after the backup:\n{}", plan.said());
    let place = from_region(&site, 1)?;
    let restored = place.recovered("data", &["--to-immediate"]).await?;
    ensure!(restored.value("SELECT i FROM t").await? == "7");
    drop(restored);
    let latest = place.recovered("latest", &[]).await?;
    ensure!(latest.value("SELECT i FROM t").await? == "7");
    ensure!(segment().await? == before, "somebody switched segments");
    leave(agent).await?;
    Ok(())
}

#[tokio::test]
async fn fault_22_a_backup_of_an_idle_database_restores_without_forced_wal_on_postgresql_15() -> Result<()> {
    a_backup_of_an_idle_database_restores_without_forced_wal(PgVersion::V15).await
}

#[tokio::test]
async fn fault_22_a_backup_of_an_idle_database_restores_without_forced_wal_on_postgresql_17() -> Result<()> {
    a_backup_of_an_idle_database_restores_without_forced_wal(PgVersion::V17).await
}

#[tokio::test]
async fn fault_22_a_backup_of_an_idle_database_restores_without_forced_wal_on_postgresql_18() -> Result<()> {
    a_backup_of_an_idle_database_restores_without_forced_wal(PgVersion::V18).await
}
