//! The stream: its very beginning, its roll-ups, and a region that is behind.
//!
//! The first two begin with an empty archive and take no base backup: there is nothing to restore, and what is judged of them is
//! that both regions hold the same WAL, byte for byte. That such WAL restores is for those to show that begin with a base backup.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::StreamExt;
use highwater_tests::s3::Strike;
use highwater_tests::site::PATIENCE;

use crate::bench::{Bench, CALM, KEEPING};
use crate::blow::{Blow, EVERY_BLOW, error, everything, name_of, strike_each, sweep, turn};

/// Commits that follow a blow, beyond the roll-up that it was near.
const AFTERWARDS: u32 = 10;

/// From an empty archive to a stored segment: the very first requests of an agent's life are among those struck.
#[tokio::test]
async fn every_request_of_a_stream_may_fail_or_be_the_last() -> Result<()> {
    let bench = Bench::start(CALM, KEEPING).await?;
    let struck = sweep(|nth, blow| {
        let bench = &bench;
        async move {
            let run = bench.run(name_of(nth, blow)).await?;
            bench.primary.sql("CHECKPOINT").await?;
            let target = bench.write(3).await?;
            run.strike(nth, blow);
            let mut agent = run.streams_to(target, Some(blow)).await?;
            let struck = run.struck();
            run.calm();
            // The checkpoint of a run beside this one may have let the archive begin behind the target.
            let target = bench.commit().await?;
            run.reaches(&mut agent, target, None).await?;
            run.judge(agent, target).await?;
            Ok(struck)
        }
    })
    .await?;
    ensure!(struck > 8, "only {struck} requests were struck");
    Ok(())
}

/// Chunks of ten milliseconds, so that they are rolled up: the requests around two roll-ups are struck.
#[tokio::test]
async fn every_request_around_a_roll_up_may_fail_or_be_the_last() -> Result<()> {
    let bench = Bench::start(
        "[wal]\nflush_interval = \"10ms\"\n[pulse]\ninterval = \"5m\"\n",
        KEEPING,
    )
    .await?;
    let around = [30, 31, 32, 33, 34, 63, 64, 65];
    let operation = |nth: u64, blow: Blow| {
        let bench = &bench;
        async move {
            let run = bench.run(name_of(nth, blow)).await?;
            bench.primary.sql("CHECKPOINT").await?;
            bench.primary.sql("SELECT pg_switch_wal()").await?;
            run.only_keys("/tail/");
            run.strike(nth, blow);
            let mut agent = run.agent("run")?.start()?;
            agent.says("streaming", PATIENCE).await?;
            let (mut killed, mut afterwards) = (false, 0);
            let began = std::time::Instant::now();
            // Commits go on until the request has come that is struck, and past the roll-up that follows.
            while afterwards < AFTERWARDS {
                afterwards += u32::from(run.fallen(blow));
                ensure!(began.elapsed() < PATIENCE, "never struck:\n{}", agent.stderr());
                bench
                    .primary
                    .sql("INSERT INTO t VALUES (1, 'a small commit')")
                    .await?;
                tokio::time::sleep(Duration::from_millis(16)).await;
                if !killed && run.dead(&mut agent, blow)? {
                    killed = true;
                    agent = run.agent("run")?.start()?;
                }
            }
            let target = bench.position().await?;
            if !matches!(blow, Blow::Refused(_)) {
                agent.kill9();
                agent = run.agent("run")?.start()?;
            }
            run.reaches(&mut agent, target, None).await?;
            agent.says("streaming", PATIENCE).await?;
            run.judge(agent, target).await?;
            Ok(true)
        }
    };
    let blows = |nth: u64| match (everything(), turn(nth)) {
        (true, _) => EVERY_BLOW.to_vec(),
        (false, region) => vec![
            error(nth),
            Blow::Crash(region, Strike::HoldBefore),
            Blow::Crash(1 - region, Strike::HoldAfter),
        ],
    };
    let all = around
        .into_iter()
        .flat_map(|nth| blows(nth).into_iter().map(move |blow| (nth, blow)));
    let mut runs = std::pin::pin!(strike_each(all, operation));
    while let Some(run) = runs.next().await {
        run?;
    }
    Ok(())
}

/// An archive with a base backup, the second region behind the first one by several segments.
pub(crate) async fn behind() -> Result<Bench> {
    let mut bench = Bench::archived(CALM, KEEPING).await?;
    let run = bench.run("ahead".to_owned()).await?;
    bench.write(2).await?;
    let target = bench.write(2).await?;
    let agent = run.streams_to(target, None).await?;
    run.judge(agent, target).await?;
    let [late, _] = run.left().await?;
    drop(run);
    bench.before[0] = late;
    Ok(bench)
}

/// One region is behind and is filled from the other, while new WAL comes.
#[tokio::test]
async fn every_request_of_a_catch_up_may_fail_or_be_the_last() -> Result<()> {
    let bench = behind().await?;
    let struck = sweep(|nth, blow| catches_up(&bench, nth, blow)).await?;
    ensure!(struck > 8, "only {struck} requests were struck");
    Ok(())
}

/// One run with an agent that is struck between its start and the server's end. Whether it was.
pub(crate) async fn catches_up(bench: &Bench, nth: u64, blow: Blow) -> Result<bool> {
    let run = bench.run(name_of(nth, blow)).await?;
    let target = bench.commit().await?;
    run.strike(nth, blow);
    let mut agent = run.streams_to(target, Some(blow)).await?;
    let struck = run.struck();
    run.calm();
    // An agent that ends late, for a request that was refused, is not taken for one that goes on.
    let target = bench.commit().await?;
    run.reaches(&mut agent, target, None).await?;
    agent.says("streaming", PATIENCE).await?;
    run.judge(agent, target).await?;
    run.restorable(target).await?;
    Ok(struck)
}
