//! Streaming: what is reported while storage, server or agent fail.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, Pace};
use highwater_tests::s3::Rights;
use highwater_tests::site::{PATIENCE, REGIONS, Site};
use highwater_tests::tap::came_in_time;
use highwater_tests::witness::Rules;
use highwater_tests::{Ledger, PgCluster, PgVersion, Program, Stop, Witness, lsn};

use crate::security::ask;
use crate::support::{
    VERSION, answers, both_hold, copy_holds, from_region, leave, one_region_has_everything,
};

/// Both regions hang, the load goes on, the agent dies: the copies of the regions at that moment hold all that was
/// ever reported, and a new agent goes on without a hole.
async fn nothing_ahead_of_frozen_regions(version: PgVersion) -> Result<()> {
    let mut site = Site::start(PgCluster::builder(version), 16).await?;
    let witness = Witness::of(&site, Rules::all());
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 3).await?;
    ledger.grow(60).await?;
    site.all_durable().await?;
    site.regions.iter().for_each(|region| region.faults().freeze());
    ledger.grow(200).await?;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    agent.kill9();
    // Not earlier: a request that had begun before the freeze may have had its effect after it.
    let copies = site.snapshots();
    let seen = witness.satisfied()?;
    let noted = ledger.log();

    site.regions.iter().for_each(|region| region.faults().thaw());
    let agent = site.start_agent().await?;
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;
    witness.satisfied()?;
    leave(agent).await?;
    site.primary.kill9();
    let promised = noted
        .entries
        .iter()
        .filter(|entry| entry.after.is_some_and(|after| after <= seen.flush));
    ensure!(
        promised.count() > 20,
        "hardly anything was promised: the test proves little"
    );
    for (name, copy) in REGIONS.iter().zip(copies) {
        // Rows that came after the notes were taken are told apart by the position alone.
        copy_holds(version, name, copy, &log, Expect::held_through(seen.flush)).await?;
    }
    copy_holds(
        version,
        REGIONS[1],
        site.regions[1].snapshot(),
        &log,
        Expect::everything(),
    )
    .await
}

#[tokio::test]
async fn fault_01_the_reported_position_never_passes_frozen_regions_on_postgresql_15() -> Result<()> {
    nothing_ahead_of_frozen_regions(PgVersion::V15).await
}

#[tokio::test]
async fn fault_01_the_reported_position_never_passes_frozen_regions_on_postgresql_18() -> Result<()> {
    nothing_ahead_of_frozen_regions(PgVersion::V18).await
}

/// For the agent's own answers.
fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port())
}

/// What `status` says, and what it ends with.
async fn status(site: &Site) -> Result<(i32, serde_json::Value)> {
    let program = site.agent()?.args(["--output", "json", "status"]);
    let said = program.output().await?;
    let document = serde_json::from_str(&said.stdout).with_context(|| said.said())?;
    Ok((said.code, document))
}

/// Waits until `status` has no complaint.
async fn status_is_content(site: &Site) -> Result<()> {
    let content = || async { (status(site).await.ok()?.0 == 0).then_some(()) };
    eventually(
        "`status` to say that the recovery point is kept",
        PATIENCE,
        content,
    )
    .await
}

/// WAL that waits is a breach after a minute: the agent is not ready any more, and `status` ends with 1; both name the region.
async fn a_minute_of_waiting_is_a_breach(program: &Program, port: u16) -> Result<()> {
    let breached = || async {
        let answer = ask(port, "GET", "/readyz").await.ok()?;
        answer.starts_with("HTTP/1.1 503").then_some(answer)
    };
    let answer = eventually("the agent not to be ready any more", PATIENCE, breached).await?;
    ensure!(
        answer.contains("WAL has waited") && answer.contains(&format!("region {}", REGIONS[1])),
        "{answer}"
    );
    let told = program.clone().arg("status").output().await?;
    answers(&told, 1, &["WAL has waited", &format!("region {}", REGIONS[1])])
}

/// One region refuses every connection for a while under the policy `all`, and answers every request with 503 after that.
#[tokio::test]
async fn fault_02_with_policy_all_a_region_that_is_down_is_named_waited_for_and_filled() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let port = free_port()?;
    let toml = site
        .config()
        .replacen("listen = \"off\"", &format!("listen = \"127.0.0.1:{port}\""), 1);
    let program = Program::agent()?.config(&toml)?;
    let witness = Witness::of(&site, Rules::all());
    let mut agent = program.clone().arg("run").start()?;
    agent.says("streaming", PATIENCE).await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(40).await?;
    status_is_content(&site).await?;
    site.regions[1].faults().refuse(true);
    ledger.grow(100).await?;
    site.primary.sql("SELECT pg_switch_wal()").await?;
    ledger.grow(100).await?;
    let ahead = || async { (site.stored_ends()[0] > site.stored_ends()[1] + 16).then_some(()) };
    eventually("the healthy region to go on", PATIENCE, ahead).await?;
    ensure!(
        site.tap.highest_flush() <= site.stored_ends()[1],
        "the policy was loosened"
    );
    let (code, document) = status(&site).await?;
    let reasons = document["breached"].as_array().map_or(0, Vec::len);
    ensure!(code == 1 && reasons > 0, "exit code {code}: {document:#}");
    let told = program
        .clone()
        .args(["--output", "json", "status"])
        .output()
        .await?;
    let document: serde_json::Value = serde_json::from_str(&told.stdout).with_context(|| told.said())?;
    let away = &document["regions"][1];
    ensure!(
        away["name"] == REGIONS[1] && away["error"].is_string(),
        "{document:#}"
    );
    // What cannot be read is not guessed at; the agent knows what it has reported.
    ensure!(
        document["durable"].is_null() && document["agent"]["lag_seconds"].as_f64() > Some(0.0),
        "no lag while a region of the policy is away: {document:#}"
    );
    ensure!(
        told.code == i32::from(document["agent"]["lag_seconds"].as_f64() > Some(60.0)),
        "exit code {}: {document:#}",
        told.code
    );
    let page = ask(port, "GET", "/metrics").await?;
    for series in [
        "highwater_lag_bytes ".to_owned(),
        format!("highwater_region_lag_bytes{{region=\"{}\"}} ", REGIONS[1]),
    ] {
        let lag = page.lines().find_map(|line| line.strip_prefix(series.as_str()));
        ensure!(
            lag.is_some_and(|lag| lag.parse().is_ok_and(|lag: u64| lag > 0)),
            "{series}is {lag:?} while a region of the policy is away"
        );
    }

    let log = ledger.stop().await;
    // Down no more, but in a storm: to be answered with 503 is no better than to be refused.
    site.regions[1].faults().fail_always(Some(503));
    site.regions[1].faults().refuse(false);
    a_minute_of_waiting_is_a_breach(&program, port).await?;

    let pace = Pace {
        clients: 2,
        ..Pace::default()
    };
    let ledger = Ledger::resume(&site.primary, pace, log).await?;
    ledger.grow(40).await?;
    site.regions[1].faults().clear();
    let log = ledger.stop().await;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;
    let ready = || async {
        let answer = ask(port, "GET", "/readyz").await.ok()?;
        answer.starts_with("HTTP/1.1 200").then_some(())
    };
    eventually("the agent to be ready again", PATIENCE, ready).await?;
    status_is_content(&site).await?;
    witness.satisfied()?;
    leave(agent).await?;
    one_region_has_everything(&site, 1, &log).await
}

/// PostgreSQL stops while no region answers: it asks again after every answer, tens of thousands of times a second
/// if it gets one each time. The agent's calm answers keep that down, and it lets the server go, which nothing else does.
async fn a_flood_of_questions_is_answered_calmly(version: PgVersion) -> Result<()> {
    let builder = PgCluster::builder(version).conf("wal_sender_timeout", "0");
    let mut site = Site::start(builder, 16).await?;
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;
    site.all_durable().await?;
    site.regions.iter().for_each(|region| region.faults().freeze());
    ledger.grow(50).await?;
    let (asked, answered) = (site.tap.sent().keepalives, site.tap.feedback().len());
    let (began, cpu) = (Instant::now(), agent.cpu_time()?);
    site.primary.begin_stop(Stop::Fast);
    site.primary.until_ended(Duration::from_secs(60)).await?;
    let took = began.elapsed();
    let (asked, answered) = (
        site.tap.sent().keepalives - asked,
        site.tap.feedback().len() - answered,
    );
    let cpu = agent.cpu_time()? - cpu;
    ledger.stop().await;
    agent.says("letting it go", PATIENCE).await?;
    ensure!(
        asked > 100,
        "{asked} questions are no flood: the test proves nothing"
    );
    ensure!(
        (answered as u128) < took.as_millis() / 20 + 50,
        "{answered} answers to {asked} questions in {took:?}"
    );
    // Ten times what it takes, and what a loaded machine does not add to: time on the processor, not time that passes.
    ensure!(cpu < took / 4, "{cpu:?} of processor time in {took:?}");
    site.regions.iter().for_each(|region| region.faults().thaw());
    Ok(())
}

#[tokio::test]
async fn fault_05_a_flood_of_questions_is_answered_calmly_on_postgresql_15() -> Result<()> {
    a_flood_of_questions_is_answered_calmly(PgVersion::V15).await
}

#[tokio::test]
async fn fault_05_a_flood_of_questions_is_answered_calmly_on_postgresql_17() -> Result<()> {
    a_flood_of_questions_is_answered_calmly(PgVersion::V17).await
}

#[tokio::test]
async fn fault_05_a_flood_of_questions_is_answered_calmly_on_postgresql_18() -> Result<()> {
    a_flood_of_questions_is_answered_calmly(PgVersion::V18).await
}

/// More WAL than memory takes is written while no region takes any: the agent does not read from its stream any more.
async fn memory_is_spent(site: &Site, port: u16) -> Result<()> {
    let load =
        "CREATE TABLE big AS SELECT g AS id, repeat(md5(g::text), 28) AS t FROM generate_series(1, 130000) g";
    site.primary.sql(load).await?;
    let spent = || async {
        let page = ask(port, "GET", "/metrics").await.ok()?;
        let throttled = page.contains("highwater_connection{state=\"throttled\"} 1");
        throttled.then_some(())
    };
    eventually("memory to be spent", PATIENCE, spent).await?;
    let (sent, written) = (site.tap.sent().wal_end, site.position().await?);
    ensure!(
        sent < written,
        "all has been sent: the server could ask for its position"
    );
    Ok(())
}

/// PostgreSQL stops while no region answers and memory is spent. What it asks stands behind WAL that nobody reads: the agent has
/// to find out by itself that the server wants to stop, and lets it go, which nothing else does.
#[tokio::test]
async fn fault_05_a_fast_shutdown_ends_though_memory_is_spent_and_no_region_answers() -> Result<()> {
    let builder = PgCluster::builder(VERSION)
        .conf("wal_sender_timeout", "0")
        .conf("max_wal_size", "2GB");
    let mut site = Site::start(builder, 16).await?;
    let plain = "[wal]\ncompression = \"none\"\n";
    site.settings = site.settings.replace("[wal]\n", plain) + "[memory]\nlimit = \"64MiB\"\n";
    let (port, witness) = (free_port()?, Witness::of(&site, Rules::all()));
    let listen = format!("127.0.0.1:{port}");
    let program = site.agent()?.env("HIGHWATER_ADMIN_LISTEN", listen);
    let mut agent = program.arg("run").start()?;
    agent.says("streaming", PATIENCE).await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;
    site.all_durable().await?;
    site.regions.iter().for_each(|region| region.faults().freeze());
    ledger.grow(50).await?;
    memory_is_spent(&site, port).await?;
    site.primary.begin_stop(Stop::Fast);
    let stopped = site.primary.until_ended(Duration::from_secs(60)).await;
    stopped.with_context(|| agent.last_words())?;
    let words = "wants to stop while storage takes nothing; letting it go";
    agent.says(words, PATIENCE).await?;
    let log = ledger.stop().await;

    site.regions.iter().for_each(|region| region.faults().thaw());
    site.primary.start_again().await?;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    both_hold(&site, end).await?;
    // At every message, those before the thaw among them.
    witness.satisfied()?;
    site.has_no_gap().with_context(|| agent.last_words())?;
    leave(agent).await?;
    one_region_has_everything(&site, 1, &log).await
}

/// A segment size of 1 GB: segments are stored in parts, and come back padded to the whole.
#[tokio::test]
#[ignore = "takes three quarters of a minute and several GB of disk: cargo nextest run --run-ignored all"]
async fn fault_20_segments_of_1_gb_are_archived_and_restored() -> Result<()> {
    let site = Site::start(
        PgCluster::builder(VERSION)
            .conf("min_wal_size", "2GB")
            .conf("max_wal_size", "4GB"),
        1024,
    )
    .await?;
    let agent = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(60).await?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    leave(agent).await?;
    log.check(
        &from_region(&site, 0)?.recovered("data", &[]).await?,
        Expect::everything(),
    )
    .await?;
    Ok(())
}

/// More WAL than the regions take for a while: memory stays within its bound, the server waits, nothing is lost.
#[tokio::test]
async fn fault_23_wal_faster_than_storage_is_held_back_not_hoarded() -> Result<()> {
    const BOUND: u64 = 200 << 20;
    let mut site = Site::start(PgCluster::builder(VERSION).conf("max_wal_size", "2GB"), 16).await?;
    site.settings += "[memory]\nlimit = \"64MiB\"\n";
    let agent = site.start_agent().await?;
    let taken = site.tap.sent().wal_bytes;
    site.regions.iter().for_each(|region| region.faults().freeze());
    let load =
        "CREATE TABLE big AS SELECT g AS id, repeat(md5(g::text), 28) AS t FROM generate_series(1, 250000) g";
    site.primary.sql(load).await?;
    let hoards = || async { (site.tap.sent().wal_bytes - taken > 16 << 20).then_some(()) };
    eventually("the agent to take what it has room for", PATIENCE, hoards).await?;
    let behind = site.position().await? - site.tap.highest_flush();
    ensure!(
        behind > 64 << 20,
        "only {} MiB behind: memory holds all of it",
        behind >> 20
    );
    site.regions.iter().for_each(|region| region.faults().thaw());
    site.all_durable().await.with_context(|| agent.last_words())?;
    let peak = agent.peak_memory()?;
    ensure!(peak < BOUND, "{} MiB resident", peak >> 20);
    leave(agent).await?;
    Ok(())
}

/// Half a second for each answer, where the other region takes a few milliseconds: what is reported follows the server all the same,
/// status messages go on, and the slow region has everything a little later.
#[tokio::test]
async fn a_region_that_is_a_hundred_times_slower_holds_up_neither_the_other_nor_the_socket() -> Result<()> {
    const SENDER_TIMEOUT: Duration = Duration::from_secs(10);
    const ROUNDS: usize = 10;
    let builder = PgCluster::builder(VERSION).conf("wal_sender_timeout", "10s");
    let mut site = Site::start(builder, 16).await?;
    // A look at the claim takes as long, and with the usual interval there is time for it.
    site.settings = site.settings.replace("interval = \"1s\"", "interval = \"5s\"");
    site.settings += "[durability]\npolicy = \"any\"\n";
    let rules = Rules {
        regions: 1,
        across: true,
    };
    let witness = Witness::of(&site, rules);
    let agent = site.start_agent().await?;
    site.backup().await?;
    site.regions[1].faults().delay(Some(Duration::from_millis(500)));
    let from = site.tap.feedback().len().saturating_sub(1);
    let pace = Pace {
        clients: 4,
        filling: 1000,
        ..Pace::default()
    };
    let ledger = Ledger::start_paced(&site.primary, pace).await?;
    let mut ahead = 0;
    for _ in 0..ROUNDS {
        tokio::time::sleep(Duration::from_secs(1)).await;
        ledger.grow(20).await?;
        let flushed = lsn::parse(&site.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
        let reported = || async { (site.tap.highest_flush() >= flushed).then_some(()) };
        let soon = eventually("the report to follow", Duration::from_secs(5), reported).await;
        soon.with_context(|| agent.last_words())?;
        ahead += usize::from(site.stored_ends()[1] < flushed);
    }
    ensure!(
        ahead >= ROUNDS / 2,
        "only {ahead} of {ROUNDS} times was anything reported that the slow region did not have: the test proves little"
    );
    came_in_time(&site.tap.feedback()[from..], SENDER_TIMEOUT)?;
    let log = ledger.stop().await;
    let end = site.all_durable().await?;
    both_hold(&site, end).await.with_context(|| agent.last_words())?;
    site.regions[1].faults().clear();
    witness.satisfied()?;
    leave(agent).await?;
    one_region_has_everything(&site, 1, &log).await
}

/// What no retry cures is said at once with the region and what to do, and the stream goes on answering.
#[tokio::test]
async fn fault_24_a_region_that_turns_forbidden_is_named_while_the_stream_goes_on() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(VERSION).conf("wal_sender_timeout", "10s"), 16).await?;
    site.settings += "[durability]\npolicy = \"any\"\n";
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 1).await?;
    let connection = site.tap.last_feedback().map(|message| message.connection);
    site.regions[1].faults().fail_always(Some(403));
    ledger.grow(20).await?;
    agent.says("AccessDenied", PATIENCE).await?;
    let said = agent.stderr();
    let line = said
        .lines()
        .find(|line| line.contains("AccessDenied"))
        .unwrap_or_default();
    ensure!(line.contains(REGIONS[1]), "the region is not named: {line}");
    let messages = site.tap.feedback().len();
    tokio::time::sleep(Duration::from_secs(12)).await;
    let now = site.tap.last_feedback().map(|message| message.connection);
    ensure!(now == connection, "the stream broke off");
    ensure!(site.tap.feedback().len() > messages + 2, "no status messages");
    // Loud once per attempt of a series that slows down, not once per object.
    let loud = agent.stderr().matches("AccessDenied").count();
    ensure!(loud < 100, "{loud} complaints in a few seconds");
    ledger.stop().await;
    let end = site.all_durable().await?;
    site.regions[1].faults().clear();
    both_hold(&site, end).await?;
    leave(agent).await?;
    // A wrong key pair from the start: `run` says so and does not spin.
    let denied = site.regions[1].key_pair(Rights::Nothing).clone();
    let toml = site.config();
    let (before, south) = toml.split_at(toml.find(REGIONS[1]).context("no second region")?);
    let south = south.replace(site.regions[1].secret_key(), &denied.secret_key);
    let south = south.replace(site.regions[1].access_key(), &denied.access_key);
    let toml = before.to_owned() + &south;
    let mut agent = Program::agent()?.config(&toml)?.arg("run").start()?;
    agent.says("AccessDenied", PATIENCE).await?;
    let asked = || (site.regions[1].counters().total(), site.tap.connections());
    let ((requests, connections), began) = (asked(), Instant::now());
    tokio::time::sleep(Duration::from_secs(5)).await;
    ensure!(agent.is_running(), "the agent has left:\n{}", agent.last_words());
    let (requests, connections) = (asked().0 - requests, asked().1 - connections);
    let seconds = began.elapsed().as_secs();
    ensure!(
        u64::from(connections) < 6 * seconds && requests < 40 * seconds,
        "{requests} requests that are refused and {connections} connections to the server in {seconds} s"
    );
    Ok(())
}

/// Listed as a synchronous standby by `*`: `check` says so, and no mode of `synchronous_commit` hangs for ever.
#[tokio::test]
async fn fault_29_an_accidental_synchronous_standby_is_named_and_commits_return() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let witness = Witness::of(&site, Rules::all());
    let agent = site.start_agent().await?;
    site.primary
        .sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        .await?;
    site.primary.sql("SELECT pg_reload_conf()").await?;
    let check = site.agent()?.arg("check").output().await?;
    ensure!(
        check.stdout.contains("synchronous_standby_names"),
        "{}",
        check.said()
    );
    site.primary.sql("CREATE TABLE t (i int)").await?;
    for mode in ["on", "remote_apply", "remote_write"] {
        let commit = format!("SET synchronous_commit = {mode}; INSERT INTO t VALUES (1)");
        let committed = tokio::time::timeout(Duration::from_secs(20), site.primary.sql(&commit)).await;
        committed.with_context(|| format!("a commit with {mode} hangs"))??;
    }
    witness.satisfied()?;
    leave(agent).await?;
    Ok(())
}

/// Five times under load: each time the agent streams again from where it was, and nothing that was reported is lost.
#[tokio::test]
async fn fault_25_a_walsender_that_is_terminated_again_and_again_costs_nothing() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let witness = Witness::of(&site, Rules::all());
    let agent = site.start_agent().await?;
    site.backup().await?;
    let pace = Pace {
        clients: 2,
        ..Pace::default()
    };
    let ledger = Ledger::start_paced(&site.primary, pace).await?;
    for _ in 0..5 {
        ledger.grow(20).await?;
        site.primary
            .sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
            .await?;
    }
    let log = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    both_hold(&site, end).await?;
    witness.satisfied()?;
    leave(agent).await?;
    log.check(
        &from_region(&site, 0)?.recovered("data", &[]).await?,
        Expect::everything(),
    )
    .await?;
    Ok(())
}
