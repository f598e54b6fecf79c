//! Several agents, one archive: on the same history they are one, on different ones exactly one goes on.

#[path = "writers/recycled.rs"]
mod recycled;
#[path = "writers/streams.rs"]
mod streams;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, Pace};
use highwater_tests::postgres::PgBuilder;
use highwater_tests::program::Running;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{FeedbackTap, Ledger, PgCluster, PgVersion, Stop, archive, lsn, process};
use nix::sys::signal::Signal;

const VERSION: PgVersion = PgVersion::V15;
const SOON: Duration = Duration::from_secs(30);

fn builder() -> PgBuilder {
    PgCluster::builder(VERSION)
}

async fn flushed(server: &PgCluster) -> Result<u64> {
    server.sql("SELECT txid_current()").await?;
    lsn::parse(&server.value("SELECT pg_current_wal_flush_lsn()").await?)
}

/// What the regions hold without pulses and claims.
fn content(site: &Site) -> [Vec<String>; 2] {
    site.snapshots().map(|snapshot| {
        let mut keys = snapshot.keys(BUCKET);
        keys.retain(|key| key.contains("/wal/") || key.contains("/base/"));
        keys
    })
}

async fn refused(agent: &mut Running, code: i32, parts: &[&str]) -> Result<()> {
    let ended = agent.wait_exit(PATIENCE).await?;
    ensure!(
        ended == code,
        "exit code {ended} instead of {code}:\n{}",
        agent.last_words()
    );
    for part in parts {
        ensure!(
            agent.last_words().contains(part),
            "{part} is not named:\n{}",
            agent.last_words()
        );
    }
    Ok(())
}

/// An agent that was refused leaves no slot behind, which would keep WAL until the disk is full.
async fn keeps_no_wal(server: &PgCluster) -> Result<()> {
    let slots = slots(server).await?;
    ensure!(slots == "0", "{slots} slots are left");
    Ok(())
}

async fn slots(server: &PgCluster) -> Result<String> {
    server.value("SELECT count(*) FROM pg_replication_slots").await
}

/// The agent that holds the slot is frozen: the next one says who is in the way, and goes on when that is gone.
#[tokio::test]
async fn fault_12_slot_busy() -> Result<()> {
    let site = Site::start(builder(), 16).await?;
    let mut frozen = site.start_agent().await?;
    frozen.signal(Signal::SIGSTOP);
    let pid = site
        .primary
        .value("SELECT active_pid FROM pg_replication_slots")
        .await?;
    let mut second = site.agent()?.arg("run").start()?;
    // PostgreSQL's words: the bare number may be part of a moment or of another process's.
    second.says(&format!("is active for PID {pid};"), SOON).await?;
    ensure!(
        site.primary
            .value("SELECT count(*) FROM pg_replication_slots")
            .await?
            == "1"
    );
    frozen.kill9();
    site.all_durable().await.with_context(|| second.last_words())?;
    ensure!(second.is_running());
    Ok(())
}

/// The standby is promoted, then the old primary comes back with its agent still running: that one stops, says
/// who has taken over, and has done no harm. Started again, it is refused.
#[tokio::test]
async fn fault_18_old_primary_revived() -> Result<()> {
    let mut site = Site::start(builder(), 16).await?;
    let mut old_agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(30).await?;
    site.backup().await?;
    let standby = builder().standby_of(&site.primary).await?;
    ledger.grow(30).await?;
    let before = ledger.stop().await;
    site.all_durable().await?;
    site.primary.kill9();
    standby.promote().await?;

    let tap = FeedbackTap::start(&standby).await?;
    let mut new_agent = site.agent_at(&tap.connection_string())?.arg("run").start()?;
    let ledger = Ledger::resume(&standby, Pace::default(), before).await?;
    ledger.grow(30).await?;
    site.archived(2, flushed(&standby).await?)
        .await
        .with_context(|| new_agent.last_words())?;
    let archived = site.snapshots();

    site.primary.start_again().await?;
    let new_pid = format!("pid {}", new_agent.pid());
    refused(&mut old_agent, 4, &[&new_pid, "timeline 2", "old primary"]).await?;
    let flush = site.tap.highest_flush();
    site.primary.sql("CREATE TABLE lost ()").await?;
    let mut again = site.agent()?.arg("run").start()?;
    refused(&mut again, 1, &[&new_pid, "timeline 2"]).await?;
    ensure!(
        site.tap.highest_flush() == flush,
        "the old primary was told that something is safe"
    );
    // The new primary's agent may not have written a pulse yet.
    let told = || async {
        let status = site.agent().ok()?.arg("status").output().await.ok()?;
        let named = "nobody archives the server that was asked";
        (status.code == 1 && status.stdout.contains(named)).then_some(())
    };
    eventually("status to say whose pulses they are", PATIENCE, told)
        .await
        .with_context(|| new_agent.last_words())?;
    site.nothing_was_replaced(&archived)?;
    ensure!(new_agent.is_running(), "{}", new_agent.last_words());

    let log = ledger.stop().await;
    site.archived(2, flushed(&standby).await?).await?;
    drop(new_agent);
    let place = RestoreSite::new(VERSION, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let restored = place.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// Two standbys are promoted, each to timeline 2, from different places. The first one's history is archived: the
/// second one is refused with both, whether the first lives or not.
#[tokio::test]
async fn fault_18_two_promotions_to_the_same_timeline() -> Result<()> {
    let mut site = Site::start(builder(), 16).await?;
    let first_agent = site.start_agent().await?;
    let mut second = builder().standby_of(&site.primary).await?;
    second.stop(Stop::Fast).await?;
    site.primary.sql("CREATE TABLE later ()").await?;
    let mut first = builder().standby_of(&site.primary).await?;
    site.all_durable().await?;
    drop(first_agent);
    site.primary.stop(Stop::Fast).await?;
    first.promote().await?;
    let first_agent = site.agent_at(&first.connection_string())?.arg("run").start()?;
    site.archived(2, flushed(&first).await?)
        .await
        .with_context(|| first_agent.last_words())?;
    second.start_again().await?;
    second.promote().await?;
    let second_agent = || {
        site.agent_at(&second.connection_string())
            .and_then(|agent| agent.arg("run").start())
    };
    let switch = |server: &PgCluster| -> Result<String> {
        let history = std::fs::read_to_string(server.data_dir().join("pg_wal/00000002.history"))?;
        Ok(history
            .split_whitespace()
            .nth(1)
            .context("no switch point")?
            .to_owned())
    };
    let (pid, before) = (format!("pid {}", first_agent.pid()), site.snapshots());
    let (ours, theirs) = (switch(&second)?, switch(&first)?);
    refused(
        &mut second_agent()?,
        4,
        &[&pid, &ours, &theirs, "Nothing was replaced"],
    )
    .await?;
    // Silence does not make it right.
    drop(first_agent);
    first.kill9();
    refused(&mut second_agent()?, 4, &[&ours, &theirs, "Nothing was replaced"]).await?;
    site.nothing_was_replaced(&before)
}

/// Beside a standby that is promoted for a test, and has no slot then, a running agent waits while production lives. What it
/// made for the first attempt it takes back, and makes nothing more until the way is free.
#[tokio::test]
async fn a_running_agent_that_waits_leaves_no_slot() -> Result<()> {
    let mut site = Site::start(builder(), 16).await?;
    let mut production = site.start_agent().await?;
    let standby = builder().standby_of(&site.primary).await?;
    site.all_durable().await?;
    let tap = FeedbackTap::start(&standby).await?;
    let mut waiting = site.agent_at(&tap.connection_string())?.arg("run").start()?;
    let streams = || async { (tap.highest_flush() > 0).then_some(()) };
    eventually("the stream from the standby", PATIENCE, streams)
        .await
        .with_context(|| waiting.last_words())?;
    tap.refuse(true);
    tap.sever();
    let dropped = || async {
        let drop_it = "SELECT pg_drop_replication_slot('highwater')";
        standby.sql(drop_it).await.ok().map(drop)
    };
    eventually("the slot to be free", PATIENCE, dropped).await?;
    standby.promote().await?;
    tap.refuse(false);

    let refusals = || waiting.stderr().matches("this archive is in use").count();
    let made = || standby.log().matches("CREATE_REPLICATION_SLOT").count();
    let seen = |times| async move { (refusals() >= times).then_some(()) };
    eventually("the first refusal", PATIENCE, || seen(1)).await?;
    let none = || async { (slots(&standby).await.ok()? == "0").then_some(()) };
    eventually("the slot to be taken back", PATIENCE, none)
        .await
        .with_context(|| waiting.last_words())?;
    let (before, times) = (made(), refusals());
    eventually("two more refusals", PATIENCE, || seen(times + 2)).await?;
    ensure!(made() == before, "it makes a slot at every attempt");
    keeps_no_wal(&standby).await?;

    // Production ends, and the other one takes its place, with a slot.
    production.kill9();
    site.primary.kill9();
    site.archived(2, flushed(&standby).await?)
        .await
        .with_context(|| waiting.last_words())?;
    ensure!(slots(&standby).await? == "1", "{}", waiting.last_words());
    ensure!(waiting.is_running(), "{}", waiting.last_words());
    Ok(())
}

/// The host of the connection string becomes a standby: noticed when the agent connects again.
#[tokio::test]
async fn fault_19_demoted_node() -> Result<()> {
    let mut site = Site::start(builder(), 16).await?;
    let mut agent = site.start_agent().await?;
    site.all_durable().await?;
    site.primary.stop(Stop::Fast).await?;
    std::fs::write(site.primary.data_dir().join("standby.signal"), "")?;
    site.primary.start_again().await?;
    refused(&mut agent, 1, &["in recovery", "standby = \"stream\""]).await?;
    site.primary
        .sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        .await?;
    let mut again = site.agent()?.arg("run").start()?;
    refused(&mut again, 1, &["in recovery"]).await?;
    keeps_no_wal(&site.primary).await?;

    // Where the configuration allows it, the same server is followed, and its promotion too.
    let mut beside = site.agent_at(&site.tap.connection_string())?.arg("run").start()?;
    beside.says("streaming", SOON).await?;
    site.primary.promote().await?;
    site.archived(2, flushed(&site.primary).await?)
        .await
        .with_context(|| beside.last_words())?;
    ensure!(beside.is_running());
    Ok(())
}

/// A restored copy is started with production's agent configuration. While production lives it is refused and
/// production goes on; when production is gone it takes its place.
#[tokio::test]
async fn fault_67_a_restored_copy_with_the_production_configuration() -> Result<()> {
    let mut site = Site::start(builder(), 16).await?;
    // Production must not seem to be silent, which after a few intervals it would, even on a machine that stalls.
    site.settings = site.settings.replace("interval = \"1s\"", "interval = \"5s\"");
    let mut production = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 1).await?;
    ledger.grow(30).await?;
    site.backup().await?;
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    let regions: Vec<_> = REGIONS
        .iter()
        .zip(&site.regions)
        .map(|(name, region)| (*name, region.as_ref()))
        .collect();
    let place = RestoreSite::new(VERSION, &regions)?;
    let copy = place.recovered("copy", &[]).await?;
    // Production is idle: the copy's timeline begins exactly where the archive ends.
    let (archived, held) = (site.snapshots(), content(&site));
    let mut agent = site.agent_at(&copy.connection_string())?.arg("run").start()?;
    let pid = format!("pid {}", production.pid());
    refused(
        &mut agent,
        4,
        &[&pid, "timeline 1", "timeline 2", "restored copy", "--take-over"],
    )
    .await?;
    keeps_no_wal(&copy).await?;
    // A slot that kept nothing, as a copy of a data directory may have one, does not keep WAL after that either.
    copy.sql("SELECT pg_create_physical_replication_slot('highwater')")
        .await?;
    let mut agent = site.agent_at(&copy.connection_string())?.arg("run").start()?;
    refused(&mut agent, 4, &[&pid, "restored copy"]).await?;
    keeps_no_wal(&copy).await?;
    site.nothing_was_replaced(&archived)?;
    ensure!(
        content(&site).iter().zip(&held).all(|(now, before)| now
            .iter()
            .all(|key| before.contains(key) || key.contains("/00000001/"))),
        "something of the copy was stored"
    );
    let ledger = Ledger::resume(&site.primary, Pace::default(), log).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    ensure!(production.is_running(), "{}", production.last_words());

    // The disaster: production and its agent are gone. What was committed last comes back with a new restore.
    production.kill9();
    site.primary.kill9();
    drop(copy);
    let place = RestoreSite::new(VERSION, &regions)?;
    let restored = place.recovered("restored", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    let agent = site.agent_at(&restored.connection_string())?.arg("run").start()?;
    site.archived(2, flushed(&restored).await?)
        .await
        .with_context(|| agent.last_words())?;
    Ok(())
}

/// After `initdb` over the old path the same configuration leads to another cluster, which is refused; as after
/// `pg_upgrade`, a new lineage may be begun deliberately, and the old one still restores.
#[tokio::test]
async fn fault_78_and_79_a_new_system_identifier() -> Result<()> {
    let mut site = Site::start(builder(), 16).await?;
    let agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 1).await?;
    ledger.grow(30).await?;
    site.backup().await?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    let identifier = "SELECT system_identifier FROM pg_control_system()";
    let old = site.primary.value(identifier).await?;
    drop(agent);

    let mut upgraded = PgCluster::builder(PgVersion::V17).start().await?;
    site.primary.kill9();
    std::mem::swap(&mut site.primary, &mut upgraded);
    site.tap.redirect(&site.primary);
    let new = site.primary.value(identifier).await?;
    let before = content(&site);
    let mut agent = site.agent()?.arg("run").start()?;
    refused(&mut agent, 4, &[&old, &new, "--new-lineage"]).await?;
    ensure!(content(&site) == before, "something was stored");

    let agent = site.agent()?.args(["run", "--new-lineage"]).start()?;
    site.primary.sql("CREATE TABLE newer ()").await?;
    let begun = || async {
        let wal = format!("/{new}/wal/");
        let held = site
            .snapshots()
            .map(|snapshot| archive::keys_with(&snapshot, BUCKET, &wal).len());
        (held[0] > 0 && held[1] > 0).then_some(())
    };
    eventually("WAL of the new lineage", PATIENCE, begun)
        .await
        .with_context(|| agent.last_words())?;
    site.backup().await?;
    drop(agent);
    upgraded.start_again().await?;
    let mut old_agent = site.agent_at(&upgraded.connection_string())?.arg("run").start()?;
    refused(&mut old_agent, 4, &[&old, &new, "begun in its place"]).await?;
    for (before, after) in before.iter().zip(content(&site)) {
        ensure!(
            before.iter().all(|key| after.contains(key)),
            "something of the old lineage is gone"
        );
    }
    let place = RestoreSite::new(VERSION, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let restored = place.recovered("old", &["--system-id", &old]).await?;
    log.check(&restored, Expect::everything()).await?;
    let place = RestoreSite::new(PgVersion::V17, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let restored = place.recovered("new", &["--system-id", &new]).await?;
    ensure!(
        restored.value("SELECT to_regclass('newer')").await? == "newer",
        "the new lineage lacks its table"
    );
    Ok(())
}

/// PostgreSQL's own `pg_upgrade`, by the steps of `deploy/README.md`: what was archived before restores, and so does what
/// comes afterwards, rows of before included. (From one directory to another of the same major: the others lack the program.)
#[tokio::test]
async fn fault_78_after_pg_upgrade_both_lineages_restore() -> Result<()> {
    let mut site = Site::start(builder(), 16).await?;
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 1).await?;
    ledger.grow(30).await?;
    site.backup().await?;
    ledger.grow(30).await?;
    let before = ledger.stop().await;
    site.all_durable().await?;
    let identifier = "SELECT system_identifier FROM pg_control_system()";
    let old = site.primary.value(identifier).await?;
    site.primary.stop(Stop::Fast).await?;

    let mut upgraded = builder().start().await?;
    upgraded.stop(Stop::Fast).await?;
    pg_upgrade(&site.primary, &upgraded)?;
    upgraded.start_again().await?;
    std::mem::swap(&mut site.primary, &mut upgraded);
    site.tap.redirect(&site.primary);
    let new = site.primary.value(identifier).await?;
    // The agent that was running finds another cluster.
    refused(&mut agent, 4, &[&old, &new, "--new-lineage"]).await?;
    keeps_no_wal(&site.primary).await?;

    let mut by_hand = site.agent()?.args(["run", "--new-lineage"]).start()?;
    by_hand.says("streaming", SOON).await?;
    site.all_durable().await.with_context(|| by_hand.last_words())?;
    by_hand.terminate();
    ensure!(
        by_hand.wait_exit(PATIENCE).await? == 0,
        "{}",
        by_hand.last_words()
    );
    let agent = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::resume(&site.primary, Pace::default(), before.clone()).await?;
    ledger.grow(30).await?;
    let after = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;

    for (name, region) in REGIONS.iter().zip(&site.regions) {
        let place = RestoreSite::new(VERSION, &[(name, region.as_ref())])?;
        let restored = place.recovered("old", &["--system-id", &old]).await?;
        before
            .check(&restored, Expect::everything())
            .await
            .context(*name)?;
        ensure!(restored.value(identifier).await? == old);
        // Nothing said is the lineage that was begun last.
        let restored = place.recovered("new", &[]).await?;
        after
            .check(&restored, Expect::everything())
            .await
            .context(*name)?;
        ensure!(restored.value(identifier).await? == new);
        let verify = place.program()?.arg("verify").output().await?;
        ensure!(verify.code == 0, "{name}: {}", verify.said());
    }
    Ok(())
}

/// Both servers are stopped.
fn pg_upgrade(old: &PgCluster, new: &PgCluster) -> Result<()> {
    let path = |path: &std::path::Path| path.display().to_string();
    let arguments = [
        ("--old-bindir", path(old.bin())),
        ("--new-bindir", path(new.bin())),
        ("--old-datadir", path(old.data_dir())),
        ("--new-datadir", path(new.data_dir())),
        ("--socketdir", path(new.socket_dir())),
        ("--username", "postgres".to_owned()),
        ("--jobs", "1".to_owned()),
    ];
    let arguments: Vec<String> = arguments.map(|(name, value)| format!("{name}={value}")).into();
    process::run(&new.bin().join("pg_upgrade"), &arguments, new.dir().path())?;
    Ok(())
}
