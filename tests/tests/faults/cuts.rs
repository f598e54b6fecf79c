//! Scenario 7: the agent is killed at every step of one object's life, and the archive still holds exactly the bytes
//! that were sent, once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::program::Running;
use highwater_tests::s3::{Operation, Strike};
use highwater_tests::site::{PATIENCE, Site};
use highwater_tests::witness::Rules;
use highwater_tests::{Ledger, PgCluster, S3Server, Witness};

use crate::sent::holds_what_was_sent;
use crate::support::{VERSION, both_hold, from_region, leave};

/// Waits for the strike at the next tail chunk and kills the agent there.
async fn killed_at(mut agent: Running, at: &S3Server, strike: Strike) -> Result<()> {
    at.faults().only(&[Operation::Put]);
    at.faults().only_keys("/tail/");
    at.faults().strike(1, strike);
    tokio::time::timeout(PATIENCE, at.faults().until_struck())
        .await
        .context("no tail chunk came")?;
    agent.kill9();
    at.faults().clear();
    Ok(())
}

/// Freezes the connection to PostgreSQL when both regions hold more than was reported over it.
async fn stored_and_not_reported(site: &Site, ledger: &Ledger) -> Result<()> {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        site.tap.freeze(true);
        let stored = || async {
            let ends = site.stored_ends();
            ends.iter()
                .all(|end| *end > site.tap.highest_flush())
                .then_some(())
        };
        // What was received before the freeze may be all reported already: then nothing more comes.
        if eventually("more than was reported", Duration::from_secs(2), stored)
            .await
            .is_ok()
        {
            return Ok(());
        }
        site.tap.freeze(false);
        ledger.grow(20).await?;
    }
    anyhow::bail!("the regions never held more than was reported")
}

#[tokio::test]
async fn fault_07_killed_at_every_step_of_an_object_nothing_is_lost_or_stored_twice() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 1).await?;
    site.tap.record();
    let witness = Witness::of(&site, Rules::all());
    let mut agent: Running = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    let [north, south] = &site.regions;
    // Before it is in the first region; in the first only; in the second only; in both, and no reply came.
    killed_at(agent, north, Strike::HoldBefore).await?;
    agent = site.start_agent().await?;
    south.faults().freeze();
    killed_at(agent, north, Strike::HoldAfter).await?;
    south.faults().thaw();
    for strike in [Strike::HoldBefore, Strike::HoldAfter] {
        agent = site.start_agent().await?;
        killed_at(agent, south, strike).await?;
    }
    agent = site.start_agent().await?;

    // In both, but PostgreSQL has not been told.
    ledger.grow(20).await?;
    stored_and_not_reported(&site, &ledger).await?;
    agent.kill9();
    site.tap.sever();
    site.tap.freeze(false);
    agent = site.start_agent().await?;
    // Right after it was reported.
    let reported = site.tap.highest_flush();
    let moved = || async { (site.tap.highest_flush() > reported).then_some(()) };
    eventually("the next report", PATIENCE, moved).await?;
    agent.kill9();
    agent = site.start_agent().await?;

    let log = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    both_hold(&site, end).await?;
    witness.satisfied()?;
    leave(agent).await?;
    holds_what_was_sent(&site)?;
    for index in 0..2 {
        let place = from_region(&site, index)?;
        let restored = place.recovered("data", &[]).await?;
        log.check(&restored, Expect::everything()).await?;
    }
    Ok(())
}
