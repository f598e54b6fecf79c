//! A synchronous standby that nobody meant, and an agent that can be none.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::program::{Program, Running};
use highwater_tests::site::{BUCKET, PATIENCE, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, Stop, archive, lsn};

use crate::support::{VERSION, both_hold, from_region, leave};

/// Far above what a commit needs, far below a hang.
const COMMITS_WITHIN: Duration = Duration::from_secs(20);

/// What the agent's metrics say about commits.
async fn waited_for(port: u16) -> Option<bool> {
    let answer = crate::security::ask(port, "GET", "/metrics").await.ok()?;
    let line = answer
        .lines()
        .find(|line| line.starts_with("highwater_synchronous_standby "))?;
    Some(line.ends_with(" 1"))
}

async fn list(site: &Site, names: &str) -> Result<()> {
    let set = format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'");
    site.primary.sql(&set).await?;
    site.primary.sql("SELECT pg_reload_conf()").await.map(drop)
}

/// The list names the agent although nobody told it that commits would wait: it says so when it starts, shows it, and
/// notices when the list is changed under it.
#[tokio::test]
async fn fault_29_run_says_that_commits_wait_for_it_and_notices_when_that_changes() -> Result<()> {
    let builder = PgCluster::builder(VERSION).conf("synchronous_standby_names", "FIRST 1 (a, \"Highwater\")");
    let site = Site::start(builder, 16).await?;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port();
    let program = || {
        let agent = site
            .agent()?
            .env("HIGHWATER_ADMIN_LISTEN", format!("127.0.0.1:{port}"));
        Ok::<_, anyhow::Error>(agent)
    };
    let mut agent = program()?.arg("run").start()?;
    agent
        .says("makes this agent a synchronous standby", PATIENCE)
        .await?;
    let remark = "commits  synchronous_standby_names";
    let status = program()?.arg("status").output().await?;
    ensure!(status.stdout.contains(remark), "{}", status.said());
    for (names, expected) in [("a", false), ("*", true)] {
        list(&site, names).await?;
        let noticed = || async { (waited_for(port).await? == expected).then_some(()) };
        eventually(names, PATIENCE, noticed)
            .await
            .with_context(|| agent.last_words())?;
    }
    list(&site, "").await?;
    let status = program()?.arg("status").output().await?;
    ensure!(!status.stdout.contains(remark), "{}", status.said());
    // Where it is meant nobody is warned.
    leave(agent).await?;
    list(&site, "highwater").await?;
    let mut agent = program()?
        .args(["--set", "wal.synchronous=true", "run"])
        .start()?;
    agent.says("role=Synchronous", PATIENCE).await?;
    ensure!(!agent.stderr().contains("makes this agent"), "{}", agent.stderr());
    leave(agent).await?;
    Ok(())
}

const SLOT: &str = "FROM pg_replication_slots WHERE slot_name = 'highwater'";

async fn slot_at(site: &Site) -> Result<u64> {
    lsn::parse(&site.primary.value(&format!("SELECT restart_lsn {SLOT}")).await?)
}

/// Fails when the server is told more than both regions hold at that moment.
fn watch(site: &Site) -> Arc<Mutex<Option<String>>> {
    let breach = Arc::<Mutex<Option<String>>>::default();
    let (noted, regions, size) = (Arc::clone(&breach), site.regions.clone(), site.segment_size());
    let highest = Mutex::new(0);
    site.tap.on_feedback(move |feedback| {
        let mut highest = highest.lock().unwrap_or_else(PoisonError::into_inner);
        let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
        if feedback.flush != 0 || feedback.apply != 0 {
            noted.get_or_insert(format!("flushed {} was reported", lsn::show(feedback.flush)));
        }
        if feedback.write > *highest {
            *highest = feedback.write;
            let ends = regions
                .each_ref()
                .map(|region| archive::wal_end(&region.snapshot(), BUCKET, 1, size));
            if ends.iter().any(|end| *end < feedback.write) {
                noted.get_or_insert(format!("written {} was reported", lsn::show(feedback.write)));
            }
        }
    });
    breach
}

/// The agent that moves its slot by SQL, as a role with no right but REPLICATION.
async fn without_acknowledgement(version: PgVersion) -> Result<(Site, Running)> {
    let builder = PgCluster::builder(version)
        .conf("log_statement", "all")
        .conf("synchronous_standby_names", "*");
    let mut site = Site::start(builder, 1).await?;
    let local = "SET synchronous_commit = local; CREATE ROLE archiver LOGIN REPLICATION";
    site.primary.sql(local).await?;
    site.user = "archiver".to_owned();
    site.settings = site
        .settings
        .replace("[wal]\n", "[wal]\nacknowledge = \"slot\"\n");
    let agent = run(site.agent()?).await?;
    Ok((site, agent))
}

async fn run(program: Program) -> Result<Running> {
    let mut agent = program.arg("run").start()?;
    agent.says("streaming", PATIENCE).await?;
    Ok(agent)
}

/// Waits until the agent has moved its slot, or tried to, twice more.
async fn looked_twice(site: &Site) -> Result<()> {
    let moves = || site.primary.log().matches("pg_replication_slot_advance").count();
    let before = moves();
    let looked = || async { (moves() >= before + 2).then_some(()) };
    eventually("the agent to look at its slot", PATIENCE, looked).await
}

/// The stream goes on while the agent's other connections reach a standby: it looks for its slot there, and makes none.
#[tokio::test]
async fn a_slot_that_is_moved_by_sql_is_not_made_on_a_standby() -> Result<()> {
    let (site, agent) = without_acknowledgement(VERSION).await?;
    list(&site, "").await?;
    looked_twice(&site).await?;
    let standby = PgCluster::builder(VERSION)
        .conf("log_statement", "all")
        .standby_of(&site.primary)
        .await?;
    site.tap.lead_to(&standby);
    let looked = || async {
        let looks = standby.log().matches("pg_replication_slot_advance").count();
        (looks >= 3).then_some(())
    };
    eventually("the agent to look for its slot on the standby", PATIENCE, looked)
        .await
        .with_context(|| agent.last_words())?;
    let slots = standby.value("SELECT count(*) FROM pg_replication_slots").await?;
    ensure!(
        slots == "0",
        "{slots} slots on the standby:\n{}",
        agent.last_words()
    );
    site.tap.lead_to(&site.primary);
    leave(agent).await?;
    Ok(())
}

/// `*` lists everybody, and the agent alone is there: it does not count, so commits wait for a standby that does; with one
/// there they return although no region takes anything. The slot follows what the regions hold, and a shutdown waits for them.
async fn commits_wait_for_others(version: PgVersion) -> Result<()> {
    let (mut site, mut agent) = without_acknowledgement(version).await?;
    let breach = watch(&site);
    agent.says("does not count", PATIENCE).await?;
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    let client = site.primary.client().await?;
    let first = tokio::spawn(async move { client.simple_query("CREATE TABLE t (i int)").await.map(drop) });
    let waiting = || async { (site.primary.value(waits).await.ok()? == "1").then_some(()) };
    eventually("the commit to wait", PATIENCE, waiting).await?;
    let state = "SELECT sync_state FROM pg_stat_replication WHERE application_name = 'highwater'";
    ensure!(site.primary.value(state).await? == "async");

    let standby = PgCluster::builder(version).standby_of(&site.primary).await?;
    tokio::time::timeout(PATIENCE, first)
        .await
        .context("the first commit hangs")???;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(20).await?;
    site.regions.iter().for_each(|region| region.faults().freeze());
    let held = site.stored_ends();
    for mode in ["on", "remote_apply", "remote_write"] {
        let commit =
            format!("SET synchronous_commit = {mode}; INSERT INTO t VALUES (1); SELECT pg_switch_wal()");
        let committed = tokio::time::timeout(COMMITS_WITHIN, site.primary.sql(&commit)).await;
        committed.with_context(|| format!("a commit with {mode} waits for a region"))??;
    }
    looked_twice(&site).await?;
    let at = slot_at(&site).await?;
    ensure!(
        held.iter().all(|end| at <= *end),
        "the slot is at {} of {held:x?}",
        lsn::show(at)
    );
    site.regions.iter().for_each(|region| region.faults().thaw());

    let log = ledger.stop().await;
    let end = lsn::parse(&site.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
    both_hold(&site, end).await?;
    let moved = || async { (slot_at(&site).await.ok()? >= end).then_some(()) };
    eventually("the slot to follow", PATIENCE, moved)
        .await
        .with_context(|| agent.last_words())?;
    drop(standby);
    list(&site, "").await?;
    let took = site.primary.stop(Stop::Fast).await?;
    ensure!(took < PATIENCE, "the shutdown took {took:?}");
    let said = agent.stderr();
    ensure!(!said.contains("letting it go"), "the server was let go:\n{said}");
    let sent = site.tap.sent().wal_end;
    let told = site.tap.feedback().iter().map(|feedback| feedback.write).max();
    ensure!(
        told >= Some(sent),
        "the server ended before it was told of its last WAL"
    );
    ensure!(
        site.stored_ends().iter().all(|end| *end >= sent),
        "the server did not wait for its last WAL"
    );
    agent.kill9();
    let breach = breach.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ensure!(breach.is_none(), "{}", breach.unwrap_or_default());
    let place = from_region(&site, 0)?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

#[tokio::test]
async fn fault_29_without_acknowledgement_commits_wait_for_others_on_postgresql_15() -> Result<()> {
    commits_wait_for_others(PgVersion::V15).await
}

#[tokio::test]
async fn fault_29_without_acknowledgement_commits_wait_for_others_on_postgresql_17() -> Result<()> {
    commits_wait_for_others(PgVersion::V17).await
}

#[tokio::test]
async fn fault_29_without_acknowledgement_commits_wait_for_others_on_postgresql_18() -> Result<()> {
    commits_wait_for_others(PgVersion::V18).await
}

/// No stream ends when such a slot is dropped: the agent notices all the same, and makes it anew. One that somebody else
/// streams from is reported.
#[tokio::test]
async fn fault_29_a_slot_that_is_moved_by_sql_is_watched_over() -> Result<()> {
    let (site, mut agent) = without_acknowledgement(VERSION).await?;
    list(&site, "").await?;
    looked_twice(&site).await?;
    site.primary
        .sql("SELECT pg_drop_replication_slot('highwater')")
        .await?;
    let anew = || async { slot_at(&site).await.ok() };
    eventually("the slot to be made anew", PATIENCE, anew)
        .await
        .with_context(|| agent.last_words())?;
    let said = || async { agent.stderr().contains("made the slot anew").then_some(()) };
    eventually("the agent to say so", PATIENCE, said)
        .await
        .with_context(|| agent.last_words())?;
    let used = agent_of_another_archive(&site).await?;
    agent.says("streams from the slot", PATIENCE).await?;
    drop(used);
    leave(agent).await?;
    Ok(())
}

/// One that acknowledges on the stream, for an archive of its own.
async fn agent_of_another_archive(site: &Site) -> Result<Running> {
    let toml = site
        .config()
        .replace("acknowledge = \"slot\"\n", "")
        .replace("/prod\"", "/other\"");
    run(Program::agent()?.config(&toml)?).await
}
