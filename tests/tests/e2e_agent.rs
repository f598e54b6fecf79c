//! The agent under constraint: least rights, bounded memory, storage that hangs while the server
//! wants to stop, and secrets that stay secret.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::s3::{Operation, Rights};
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site, region_config};
use highwater_tests::{Ledger, PgCluster, PgVersion, Program, Stop, lsn};

#[tokio::test]
async fn fault_97_least_rights_suffice_and_secrets_stay_secret() -> Result<()> {
    const PASSWORD: &str = "planted-password-of-the-role";
    let site = Site::start(
        PgCluster::builder(PgVersion::V15)
            .hba("local all archiver scram-sha-256\nlocal replication archiver scram-sha-256"),
        16,
    )
    .await?;
    site.primary
        .sql(&format!(
            "CREATE ROLE archiver LOGIN REPLICATION PASSWORD '{PASSWORD}'"
        ))
        .await?;
    let region = |index: usize, rights: Rights| {
        let server = &site.regions[index];
        let pair = server.key_pair(rights);
        region_config(
            REGIONS[index],
            BUCKET,
            &server.endpoint(),
            &pair.access_key,
            &pair.secret_key,
        )
    };
    let connection = format!(
        "{} password={PASSWORD}",
        site.tap.connection_string_as("archiver")
    );
    let toml = format!(
        "[cluster]\nname = \"orders\"\nconnection = \"{connection}\"\n{}{}[admin]\nlisten = \"off\"\n{}",
        region(0, Rights::NoDelete),
        region(1, Rights::NoDelete),
        site.settings
    );
    let program = || {
        Program::agent()?
            .config(&toml)
            .map(|program| program.env("HIGHWATER_LOG", "trace"))
    };
    let mut said = program()?.arg("check").output().await?.expect_code(0)?.said();
    let mut agent = program()?.arg("run").start()?;
    let ledger = Ledger::start(&site.primary, 1).await?;
    ledger.grow(20).await?;
    let streaming = || async { (site.tap.highest_flush() > 0).then_some(()) };
    eventually("the stream", PATIENCE, streaming)
        .await
        .with_context(|| agent.last_words())?;
    said += &program()?.arg("backup").output().await?.expect_code(0)?.said();
    said += &program()?.arg("status").output().await?.said();
    let log = ledger.stop().await;
    site.all_durable().await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    said += &agent.stderr();

    for region in &site.regions {
        let asked = region.counters().requests(Operation::Delete);
        ensure!(
            asked == 0,
            "{asked} requests to delete: a lock on objects would be in the way"
        );
    }
    let place = RestoreSite::with_config(
        PgVersion::V15,
        &format!(
            "[cluster]\nname = \"orders\"\n{}{}",
            region(0, Rights::ReadOnly),
            region(1, Rights::ReadOnly)
        ),
    )?;
    let list = place
        .program()?
        .env("HIGHWATER_LOG", "trace")
        .arg("list")
        .output()
        .await?
        .expect_code(0)?;
    said += &list.said();
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    let written = std::fs::read_to_string(place.data("data").join("postgresql.auto.conf"))?;
    for secret in [
        PASSWORD,
        &site.regions[0].key_pair(Rights::NoDelete).secret_key,
        &site.regions[0].key_pair(Rights::ReadOnly).secret_key,
    ] {
        ensure!(
            !said.contains(secret),
            "a secret was logged: {}",
            said.lines()
                .find(|line| line.contains(secret))
                .unwrap_or_default()
        );
        ensure!(
            !written.contains(secret),
            "a secret was written into postgresql.auto.conf"
        );
    }
    Ok(())
}

/// More backlog than memory, and a region that takes nothing: the other one gets everything.
#[tokio::test]
async fn fault_23_memory_is_bounded_while_a_backlog_drains_past_a_frozen_region() -> Result<()> {
    const BOUND: u64 = 300 << 20;
    let site = Site::start(PgCluster::builder(PgVersion::V15).conf("max_wal_size", "4GB"), 16).await?;
    let mut agent = site.start_agent().await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    site.primary
        .sql("CREATE TABLE big AS SELECT g AS id, repeat(md5(g::text), 28) AS text FROM generate_series(1, 500000) g")
        .await?;
    let end = lsn::parse(&site.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
    ensure!(
        end > 400 << 20,
        "the backlog is too small to prove anything: {}",
        lsn::show(end)
    );

    site.regions[1].faults().freeze();
    let agent = site.agent()?.arg("run").start()?;
    let drained = || async { (site.stored_ends()[0] >= end).then_some(()) };
    eventually("the healthy region to have all", PATIENCE, drained)
        .await
        .with_context(|| agent.last_words())?;
    site.regions[1].faults().thaw();
    let filled = || async { (site.stored_ends()[1] >= end).then_some(()) };
    eventually("the other region to catch up", PATIENCE, filled)
        .await
        .with_context(|| agent.last_words())?;
    let peak = agent.peak_memory()?;
    ensure!(peak < BOUND, "the agent had {} MiB resident", peak >> 20);
    Ok(())
}

/// Nothing can be stored, and PostgreSQL waits for the agent before it stops: the agent must let it go. Nothing else ends it.
async fn a_fast_shutdown_ends_though_no_region_answers(version: PgVersion) -> Result<()> {
    let builder = PgCluster::builder(version).conf("wal_sender_timeout", "0");
    let mut site = Site::start(builder, 16).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;
    site.all_durable().await?;
    for region in &site.regions {
        region.faults().freeze();
    }
    ledger.grow(50).await?;
    let asked: u64 = site.regions.iter().map(|region| region.counters().total()).sum();
    let began = Instant::now();
    site.primary.begin_stop(Stop::Fast);
    site.primary
        .until_ended(Duration::from_secs(60))
        .await
        .context("PostgreSQL waits for the agent")?;
    let took = began.elapsed();
    ensure!(took >= Duration::from_secs(10), "storage was given {took:?} only");
    agent.says("letting it go", PATIENCE).await?;
    let asked = site
        .regions
        .iter()
        .map(|region| region.counters().total())
        .sum::<u64>()
        - asked;
    ensure!(
        asked < 1000,
        "{asked} requests to storage while the server wanted to stop"
    );
    let log = ledger.stop().await;

    for region in &site.regions {
        region.faults().thaw();
    }
    site.primary.start_again().await?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    ensure!(agent.is_running(), "{}", agent.last_words());
    drop(agent);
    let place = RestoreSite::new(version, &[(REGIONS[1], site.regions[1].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

#[tokio::test]
async fn fault_05_a_fast_shutdown_ends_though_no_region_answers_on_postgresql_15() -> Result<()> {
    a_fast_shutdown_ends_though_no_region_answers(PgVersion::V15).await
}

#[tokio::test]
async fn fault_05_a_fast_shutdown_ends_though_no_region_answers_on_postgresql_17() -> Result<()> {
    a_fast_shutdown_ends_though_no_region_answers(PgVersion::V17).await
}

#[tokio::test]
async fn fault_05_a_fast_shutdown_ends_though_no_region_answers_on_postgresql_18() -> Result<()> {
    a_fast_shutdown_ends_though_no_region_answers(PgVersion::V18).await
}

/// Somebody has sent half a request to the admin endpoint, and no more.
#[tokio::test]
async fn half_a_request_keeps_no_agent_from_stopping() -> Result<()> {
    let site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let agent = site.agent()?.env("HIGHWATER_ADMIN_LISTEN", admin.to_string());
    let mut agent = agent.arg("run").start()?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    let mut half = TcpStream::connect(admin)?;
    half.write_all(b"GET /livez HT")?;
    // What came after it is answered: so the half has been read.
    let mut whole = TcpStream::connect(admin)?;
    whole.write_all(b"GET /livez HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    whole.read_to_string(&mut answer)?;
    ensure!(answer.contains("200 OK"), "{answer}");

    agent.terminate();
    let code = agent.wait_exit(Duration::from_secs(30)).await;
    ensure!(
        code.with_context(|| agent.last_words())? == 0,
        "{}",
        agent.last_words()
    );
    drop(half);
    Ok(())
}
