//! The main path on every supported major: stream, take a base backup, lose the machine, restore
//! to the end, to a position and to a time, from either region alone.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_tests::clock;
use highwater_tests::ledger::{Expect, LedgerLog};
use highwater_tests::process::RunAs;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, lsn};

/// What was written before the machine was lost, and the points to go back to.
struct Story {
    site: Site,
    log: LedgerLog,
    flushed: u64,
    target_lsn: u64,
    target_time: String,
    target_at: std::time::SystemTime,
}

/// Runs a site until its primary and disk are lost: a backup under load, a marked point, more load.
async fn until_the_machine_is_lost(version: PgVersion, segment_mb: u32) -> Result<Story> {
    let mut site = Site::start(PgCluster::builder(version), segment_mb).await?;
    let ledger = Ledger::start(&site.primary, 3).await?;
    let mut agent = site.start_agent().await?;
    ledger.grow(100).await?;
    site.backup().await?;
    ledger.grow(100).await?;

    // A point with commits on both sides of it and, for the time, a moment without any.
    let target_lsn = site.position().await?;
    ledger.grow(50).await?;
    let target_at = clock::now();
    let target_time = Time::from_unix_micros(clock::unix_micros(target_at)).to_string();
    ledger.grow(50).await?;
    // Complete segments beside the tail chunks.
    site.primary.sql("SELECT pg_switch_wal()").await?;
    ledger.grow(100).await?;
    let log = ledger.stop().await;
    let flushed = site.all_durable().await?;

    agent.terminate();
    let code = agent.wait_exit(PATIENCE).await?;
    ensure!(code == 0, "the agent left with {code}:\n{}", agent.last_words());
    site.primary.kill9();
    site.primary.lose_disk()?;
    Ok(Story {
        site,
        log,
        flushed,
        target_lsn,
        target_time,
        target_at,
    })
}

async fn restores(version: PgVersion, segment_mb: u32) -> Result<()> {
    let story = until_the_machine_is_lost(version, segment_mb).await?;
    for (name, end) in REGIONS.iter().zip(story.site.stored_ends()) {
        ensure!(
            end >= story.flushed,
            "{name} holds WAL up to {} only",
            lsn::show(end)
        );
    }
    let [north, south] = &story.site.regions;
    let from_north = RestoreSite::new(version, &[(REGIONS[0], north.as_ref())])?;
    let from_south = RestoreSite::new(version, &[(REGIONS[1], south.as_ref())])?;

    let latest = from_north
        .recovered("latest", &[])
        .await
        .context("to the end, from the first region")?;
    story
        .log
        .check(&latest, Expect::everything())
        .await
        .context("to the end")?;
    ensure!(latest.value("SELECT count(*) FROM ledger").await? != "0");
    latest
        .sql("INSERT INTO ledger VALUES (99, 1, 'writable again')")
        .await?;
    drop(latest);

    let at_lsn = from_south
        .recovered("lsn", &["--to-lsn", &lsn::show(story.target_lsn)])
        .await
        .context("to a position")?;
    let report = story
        .log
        .check(&at_lsn, Expect::at_lsn(story.target_lsn))
        .await
        .context("to a position")?;
    ensure!(
        report.missing > 0,
        "nothing lies past the position: the test proves nothing"
    );
    drop(at_lsn);

    let at_time = from_south
        .recovered("time", &["--to-time", &story.target_time])
        .await
        .context("to a time")?;
    let report = story
        .log
        .check(&at_time, Expect::at_time(story.target_at))
        .await
        .context("to a time")?;
    ensure!(
        report.missing > 0,
        "nothing lies past the time: the test proves nothing"
    );
    Ok(())
}

#[tokio::test]
async fn restores_postgresql_14() -> Result<()> {
    restores(PgVersion::V14, 16).await
}

#[tokio::test]
async fn restores_postgresql_15() -> Result<()> {
    restores(PgVersion::V15, 16).await
}

#[tokio::test]
async fn fault_20_restores_postgresql_15_with_segments_of_1_mb() -> Result<()> {
    restores(PgVersion::V15, 1).await
}

#[tokio::test]
async fn fault_20_restores_postgresql_15_with_segments_of_128_mb() -> Result<()> {
    restores(PgVersion::V15, 128).await
}

#[tokio::test]
async fn restores_postgresql_16() -> Result<()> {
    restores(PgVersion::V16, 16).await
}

#[tokio::test]
async fn fault_20_restores_postgresql_17_with_segments_of_64_mb() -> Result<()> {
    restores(PgVersion::V17, 64).await
}

#[tokio::test]
async fn restores_postgresql_18() -> Result<()> {
    restores(PgVersion::V18, 16).await
}

#[tokio::test]
async fn fault_20_restores_postgresql_14_with_segments_of_1_mb() -> Result<()> {
    restores(PgVersion::V14, 1).await
}

#[tokio::test]
async fn fault_20_restores_postgresql_16_with_segments_of_1_mb() -> Result<()> {
    restores(PgVersion::V16, 1).await
}

#[tokio::test]
async fn fault_20_restores_postgresql_18_with_segments_of_1_mb() -> Result<()> {
    restores(PgVersion::V18, 1).await
}

#[tokio::test]
async fn restores_postgresql_17() -> Result<()> {
    restores(PgVersion::V17, 16).await
}

/// The size of the file that a relation has at its server; nothing is said of rows that are in memory only.
async fn size_on_disk(cluster: &PgCluster, relation: &str) -> Result<u64> {
    let path = cluster
        .value(&format!("SELECT pg_relation_filepath('{relation}')"))
        .await?;
    Ok(std::fs::metadata(cluster.data_dir().join(path))?.len())
}

/// Temporary files below a data directory: of temporary tables (`t3_16384`), and all that is in a `pgsql_tmp`.
fn temporary(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let of_a_table = name.strip_prefix('t').and_then(|rest| rest.split_once('_'));
        let number = |text: &str| text.starts_with(|first: char| first.is_ascii_digit());
        if of_a_table.is_some_and(|(backend, file)| number(backend) && number(file))
            || name.starts_with("pgsql_tmp") && path.is_file()
        {
            found.push(path);
        } else if path.is_dir() {
            found.extend(temporary(&path)?);
        }
    }
    Ok(found)
}

/// Tablespaces and unlogged tables come back as they were, the latter empty, and temporary files do not.
#[tokio::test]
async fn fault_65_tablespaces_and_unlogged_tables_come_back() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15).checksums(true), 16).await?;
    let space = site.primary.dir().create_dir("space")?;
    site.primary
        .sql(&format!("CREATE TABLESPACE far LOCATION '{}'", space.display()))
        .await?;
    site.primary
        .sql(
            "CREATE TABLE near AS SELECT g AS id, repeat(md5(g::text), 20) AS text FROM generate_series(1, 20000) g;
             CREATE TABLE away TABLESPACE far AS SELECT * FROM near;
             CREATE UNLOGGED TABLE fleeting AS SELECT id FROM near;
             CREATE UNLOGGED TABLE fleeting_away TABLESPACE far AS SELECT id FROM near",
        )
        .await?;
    site.primary.sql("CREATE DATABASE other").await?;
    let sum = "SELECT count(*) || ' ' || sum(hashtext(text)) FROM";
    let (near, away) = (
        site.primary.value(&format!("{sum} near")).await?,
        site.primary.value(&format!("{sum} away")).await?,
    );
    // A session with a temporary table, and what another one left in the middle of a sort.
    let session = site.primary.client().await?;
    session
        .batch_execute("CREATE TEMP TABLE passing AS SELECT * FROM near")
        .await?;
    let spill = site.primary.data_dir().join("base/pgsql_tmp");
    std::fs::create_dir_all(&spill)?;
    std::fs::write(spill.join("pgsql_tmp4711.0"), "what a sort left")?;
    RunAs::own_tree(&spill)?;
    // Rows that are only in memory would come back as an empty table by themselves.
    site.primary.sql("CHECKPOINT").await?;
    for relation in ["fleeting", "fleeting_away"] {
        ensure!(size_on_disk(&site.primary, relation).await? > 100_000);
    }
    let passing = temporary(site.primary.data_dir())?;
    ensure!(
        passing.len() >= 2,
        "the primary has no temporary files: {passing:?}"
    );

    let agent = site.start_agent().await?;
    site.backup().await?;
    drop(session);
    site.primary
        .sql("UPDATE away SET text = text WHERE id % 100 = 0")
        .await?;
    site.all_durable().await?;
    drop(agent);
    site.primary.kill9();

    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let moved = place.data("moved-space");
    let mapping = format!("{}={}", space.display(), moved.display());
    place
        .run("data", &["--tablespace", &mapping])
        .await?
        .expect_code(0)?;
    // Before it is started: PostgreSQL itself removes such files then.
    for dir in [&place.data("data"), &moved] {
        let passing = temporary(dir)?;
        ensure!(passing.is_empty(), "temporary files came back: {passing:?}");
    }
    let mut restored = PgCluster::adopt(PgVersion::V15, &place.data("data"))?;
    restored.start_again().await?;
    place.until_writable(&restored).await?;
    ensure!(restored.value(&format!("{sum} near")).await? == near);
    ensure!(restored.value(&format!("{sum} away")).await? == away);
    for relation in ["fleeting", "fleeting_away"] {
        let rows = format!("SELECT count(*) FROM {relation}");
        let before = restored.value(&rows).await?;
        ensure!(before == "0", "{relation} has {before} rows");
        restored
            .sql(&format!("INSERT INTO {relation} VALUES (1), (2)"))
            .await?;
        ensure!(restored.value(&rows).await? == "2", "{relation} is not usable");
    }
    let place = restored
        .value("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'far'")
        .await?;
    ensure!(place == moved.to_string_lossy(), "the tablespace is at {place}");
    ensure!(restored.value("SHOW data_checksums").await? == "on");
    Ok(())
}
