//! A writer that sleeps while another one takes its place: when it wakes it stores nothing more, reports nothing more, and ends.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::postgres::PgBuilder;
use highwater_tests::program::Running;
use highwater_tests::site::{BUCKET, PATIENCE, Site};
use highwater_tests::{FeedbackTap, PgCluster, PgVersion, S3Snapshot, Stop, archive, lsn, process};
use nix::sys::signal::Signal;

const VERSION: PgVersion = PgVersion::V15;
const SOON: Duration = Duration::from_secs(30);

/// The server, too, has time until the agent wakes: it does not ask for an answer meanwhile.
fn builder() -> PgBuilder {
    PgCluster::builder(VERSION).conf("wal_sender_timeout", "10min")
}

/// What a sleeper finds on its socket would be stored in a hundredth of the time that it has to find out what it has missed.
const SETTINGS: &str = "[wal]\nflush_interval = \"10ms\"\n[pulse]\ninterval = \"1s\"\n";

async fn flushed(server: &PgCluster) -> Result<u64> {
    server.sql("SELECT txid_current()").await?;
    lsn::parse(&server.value("SELECT pg_current_wal_flush_lsn()").await?)
}

/// Stops a process and waits until no thread of it runs any more.
async fn put_to_sleep(agent: &mut Running) -> Result<()> {
    agent.signal(Signal::SIGSTOP);
    let threads = PathBuf::from(format!("/proc/{}/task", agent.pid()));
    let state = |thread: PathBuf| {
        let stat = std::fs::read_to_string(thread.join("stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    };
    let asleep = || async {
        let mut threads = std::fs::read_dir(&threads).ok()?.flatten();
        let all = threads.all(|thread| state(thread.path()) == Some('T'));
        all.then_some(())
    };
    eventually("the agent to be asleep", SOON, asleep).await
}

/// Where objects of a timeline begin that a region did not have before.
fn new_beginnings(before: &S3Snapshot, after: &S3Snapshot, timeline: u32, site: &Site) -> Vec<u64> {
    let known = before.keys(BUCKET);
    let new = after.keys(BUCKET).into_iter().filter(|key| !known.contains(key));
    let ranges = new.filter_map(|key| archive::range_of(&key, site.segment_size()));
    let of_it = ranges.filter(|(of, ..)| *of == timeline);
    of_it.map(|(_, start, _)| start).collect()
}

/// Wakes `sleeper`, whose server has written on meanwhile, and waits until it has ended because of `rival`. Of what its server wrote
/// it has stored nothing and reported nothing: what is new on its timeline begins behind `end`, where the rival goes on.
async fn wakes_and_stops(
    site: &Site,
    sleeper: &mut Running,
    rival: &Running,
    end: Option<u64>,
) -> Result<()> {
    let (before, told) = (site.snapshots(), site.tap.highest_flush());
    sleeper.signal(Signal::SIGCONT);
    let code = sleeper.wait_exit(PATIENCE).await?;
    let said = sleeper.last_words();
    let named = said.contains(&format!("pid {}", rival.pid()));
    ensure!(code == 4 && named, "exit code {code}:\n{said}");
    for (before, after) in before.iter().zip(site.snapshots()) {
        let stored = new_beginnings(before, &after, 1, site);
        ensure!(
            stored.iter().all(|start| end.is_some_and(|end| *start >= end)),
            "the sleeper stored what begins at {stored:x?}"
        );
    }
    ensure!(site.tap.highest_flush() == told, "it has reported something");
    site.nothing_was_replaced(&before)
}

/// Its server lives on after another one was promoted.
#[tokio::test]
async fn i8_a_writer_that_slept_through_the_takeover_stops() -> Result<()> {
    let mut site = Site::start(builder(), 16).await?;
    site.settings = SETTINGS.to_owned();
    let mut sleeper = site.start_agent().await?;
    let standby = builder().standby_of(&site.primary).await?;
    site.all_durable().await?;
    let tap = FeedbackTap::start(&standby).await?;
    let mut rival = site.agent_at(&tap.connection_string())?.arg("run").start()?;
    rival.says("streaming", SOON).await?;
    // The standby is promoted and both servers live: while the first one's agent does too, the other waits its turn.
    standby.promote().await?;
    rival.says("this archive is in use", SOON).await?;
    let sleeper_pid = format!("pid {}", sleeper.pid());
    ensure!(
        rival.is_running() && rival.last_words().contains(&sleeper_pid),
        "{}",
        rival.last_words()
    );
    ensure!(sleeper.is_running(), "{}", sleeper.last_words());

    put_to_sleep(&mut sleeper).await?;
    // It finds this on its socket when it wakes.
    site.primary.sql("CREATE TABLE split_brain ()").await?;
    site.archived(2, flushed(&standby).await?)
        .await
        .with_context(|| rival.last_words())?;
    wakes_and_stops(&site, &mut sleeper, &rival, None).await?;
    site.primary.sql("CREATE TABLE split_brain_again ()").await?;
    standby.sql("CREATE TABLE the_other_goes_on ()").await?;
    site.archived(2, flushed(&standby).await?).await?;
    ensure!(rival.is_running(), "{}", rival.last_words());
    Ok(())
}

/// A writer that sleeps, and a copy of its server on the same timeline, which runs. What both have ends at the LSN.
async fn asleep_beside_a_copy() -> Result<(Site, Running, PgCluster, u64)> {
    let mut site = Site::start(builder(), 16).await?;
    site.settings = SETTINGS.to_owned();
    let mut sleeper = site.start_agent().await?;
    site.all_durable().await?;
    site.primary.stop(Stop::Fast).await?;
    let kept = site.primary.dir().join("clone");
    process::copy_tree(site.primary.data_dir(), &kept)?;
    site.primary.start_again().await?;
    let common = site.all_durable().await?;
    put_to_sleep(&mut sleeper).await?;
    let mut clone = PgCluster::adopt(VERSION, &kept)?;
    clone.start_again().await?;
    Ok((site, sleeper, clone, common))
}

/// A copy of the server, on the same timeline, whose agent is told to take the place of the one that sleeps.
#[tokio::test]
async fn i8_a_writer_that_slept_stores_nothing_beside_the_agent_of_a_copy() -> Result<()> {
    let (site, mut sleeper, clone, common) = asleep_beside_a_copy().await?;
    // The copy starts where production stopped, and has written what it has from there on: the same records so far.
    site.primary.sql("CREATE TABLE split_brain ()").await?;
    let rows = "CREATE TABLE of_the_copy AS SELECT g FROM generate_series(1, 5000) g";
    clone.sql(rows).await?;
    let rival = site.agent_at(&clone.connection_string())?;
    let mut rival = rival.args(["run", "--take-over"]).start()?;
    let end = flushed(&clone).await?;
    ensure!(end > common, "the copy lies behind");
    site.archived(1, end).await.with_context(|| rival.last_words())?;
    wakes_and_stops(&site, &mut sleeper, &rival, Some(end)).await?;
    clone.sql("CREATE TABLE the_other_goes_on ()").await?;
    site.archived(1, flushed(&clone).await?).await?;
    ensure!(rival.is_running(), "{}", rival.last_words());
    Ok(())
}

/// The agent of a copy had the place of the one that sleeps, and both it and the copy are gone when that one wakes. What it holds in memory
/// would lie beside what was stored meanwhile.
#[tokio::test]
async fn i8_a_writer_that_slept_does_not_go_on_beside_what_the_agent_of_a_copy_has_left() -> Result<()> {
    let (site, mut sleeper, mut clone, common) = asleep_beside_a_copy().await?;
    let rows = |name: &str, count: u32| {
        format!("CREATE TABLE {name} AS SELECT g FROM generate_series(1, {count}) g")
    };
    clone.sql(&rows("of_the_copy", 5000)).await?;
    // Once the sleeper is silent, without being told to.
    let mut rival = site.agent_at(&clone.connection_string())?.arg("run").start()?;
    let end = flushed(&clone).await?;
    ensure!(end > common, "the copy lies behind");
    site.archived(1, end).await.with_context(|| rival.last_words())?;
    rival.kill9();
    clone.kill9();

    site.primary.sql(&rows("of_production", 20_000)).await?;
    let (before, told) = (site.snapshots(), site.tap.highest_flush());
    sleeper.signal(Signal::SIGCONT);
    let code = sleeper.wait_exit(PATIENCE).await?;
    let said = sleeper.last_words();
    ensure!(
        code == 3 && said.contains("that this agent did not store"),
        "exit code {code}:\n{said}"
    );
    let mut again = site.agent()?.arg("run").start()?;
    let code = again.wait_exit(PATIENCE).await?;
    ensure!(code == 4, "exit code {code}:\n{}", again.last_words());
    for (before, after) in before.iter().zip(site.snapshots()) {
        let stored = new_beginnings(before, &after, 1, &site);
        ensure!(stored.is_empty(), "what begins at {stored:x?} was stored");
    }
    ensure!(site.tap.highest_flush() == told, "something was reported");
    site.nothing_was_replaced(&before)
}
