//! The harness itself: clusters of every installed major.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::{PgCluster, PgVersion, Stop};

async fn starts_and_stops(version: PgVersion, segment_mb: u32) -> Result<()> {
    let mut cluster = PgCluster::builder(version).segment_mb(segment_mb).start().await?;
    let number = cluster.value("SHOW server_version_num").await?;
    ensure!(
        number.starts_with(&version.major().to_string()),
        "{version} calls itself {number}"
    );
    let size = cluster.value("SHOW wal_segment_size").await?;
    ensure!(
        size == format!("{segment_mb}MB"),
        "asked for segments of {segment_mb} MB, got {size}"
    );
    cluster
        .sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (7)")
        .await?;
    cluster.stop(Stop::Fast).await?;
    ensure!(!cluster.is_running());
    cluster.start_again().await?;
    ensure!(cluster.value("SELECT id FROM kept").await? == "7");
    Ok(())
}

#[tokio::test]
async fn every_installed_major_starts_stops_and_starts_again() -> Result<()> {
    ensure!(
        PgVersion::V15.available().is_some(),
        "PostgreSQL 15 is missing: run scripts/setup.sh"
    );
    for version in PgVersion::installed()? {
        starts_and_stops(version, if version == PgVersion::V17 { 1 } else { 16 })
            .await
            .context(version)?;
    }
    Ok(())
}

#[tokio::test]
async fn committed_rows_survive_kill9() -> Result<()> {
    let mut cluster = PgCluster::builder(PgVersion::V15).start().await?;
    cluster
        .sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)")
        .await?;
    cluster.kill9();
    ensure!(
        highwater_tests::process::working_below(cluster.data_dir()).is_empty(),
        "a child survived"
    );
    cluster.start_again().await?;
    ensure!(cluster.value("SELECT count(*) FROM kept").await? == "1");
    Ok(())
}

#[tokio::test]
async fn a_standby_follows_and_is_promoted() -> Result<()> {
    for version in [PgVersion::V14, PgVersion::V15] {
        let mut primary = PgCluster::builder(version).start().await?;
        primary.sql("CREATE TABLE kept (id int)").await?;
        let standby = PgCluster::builder(version).standby_of(&primary).await?;
        primary.sql("INSERT INTO kept VALUES (1)").await?;
        primary.stop(Stop::Fast).await?;
        standby.promote().await?;
        ensure!(
            standby.value("SELECT count(*) FROM kept").await? == "1",
            "the standby misses the row"
        );
        standby.sql("INSERT INTO kept VALUES (2)").await?;
        ensure!(
            standby
                .value("SELECT timeline_id FROM pg_control_checkpoint()")
                .await?
                .parse::<u32>()?
                >= 1
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_dropped_cluster_leaves_neither_processes_nor_files() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let dir = cluster.dir().path().to_owned();
    ensure!(dir.exists() && cluster.pid().is_some());
    drop(cluster);
    ensure!(
        highwater_tests::process::working_below(&dir).is_empty(),
        "processes are left"
    );
    ensure!(!dir.exists(), "{} is left", dir.display());
    Ok(())
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() -> Result<()> {
    let failed = PgCluster::builder(PgVersion::V15)
        .conf("shared_buffers", "nonsense")
        .start()
        .await;
    let error = failed.err().context("it started")?.to_string();
    ensure!(error.contains("shared_buffers"), "the reason is missing: {error}");
    Ok(())
}

#[tokio::test]
async fn tcp_clusters_run_side_by_side() -> Result<()> {
    let (one, two) = tokio::try_join!(
        PgCluster::builder(PgVersion::V15).tcp(true).start(),
        PgCluster::builder(PgVersion::V15).tcp(true).start(),
    )?;
    ensure!(one.port() != two.port());
    let reached = tokio::time::timeout(
        Duration::from_secs(5),
        tokio::net::TcpStream::connect(("127.0.0.1", one.port())),
    );
    reached.await??;
    Ok(())
}
