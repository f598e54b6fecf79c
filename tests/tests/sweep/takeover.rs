//! A take-over: the archive is claimed by a process of which nobody knows whether it lives.

use anyhow::{Context, Result, ensure};
use highwater_tests::S3Snapshot;
use highwater_tests::clock::eventually;
use highwater_tests::program::Running;
use highwater_tests::site::{BUCKET, PATIENCE};

use crate::bench::{Bench, KEEPING, Law, Run, claim, claims, with_claims};
use crate::blow::{Blow, name_of, sweep};

/// Three of these are a silence that is believed.
const PULSES: &str = "[wal]\nflush_interval = \"100ms\"\n[pulse]\ninterval = \"1s\"\n";

/// An archive whose writer was on another machine.
async fn claimed_elsewhere() -> Result<Bench> {
    let mut bench = Bench::archived(PULSES, KEEPING).await?;
    for before in &mut bench.before {
        ensure!(!claims(before).is_empty(), "nobody has claimed the archive");
        *before = with_claims(before, |claim| claim.machine = None).await?;
    }
    bench.law = claim_first(&bench.before);
    Ok(bench)
}

/// No region got new WAL before the right to write it was claimed in one.
fn claim_first(before: &[S3Snapshot; 2]) -> Law {
    let known = before.each_ref().map(|region| region.keys(BUCKET));
    Box::new(move |regions| {
        let mut new = Vec::new();
        for (region, known) in regions.iter().zip(&known) {
            let keys = region.keys(BUCKET).into_iter().filter(|key| !known.contains(key));
            new.extend(keys.filter_map(|key| Some((region.get(BUCKET, &key)?.at, key))));
        }
        let claimed = new.iter().filter(|(_, key)| key.contains("/writer/")).min();
        for (at, key) in new.iter().filter(|(_, key)| key.contains("/wal/")) {
            let was_claimed = claimed.is_some_and(|(claimed, _)| claimed <= at);
            ensure!(was_claimed, "{key} was stored before anything was claimed");
        }
        Ok(())
    })
}

impl Run<'_> {
    /// Waits until the newest claim of each region is the one of this agent, the same in both.
    async fn is_held_by(&self, agent: &Running) -> Result<()> {
        let held = || async {
            let newest = |region: &S3Snapshot| {
                Some((claims(region).pop()?, claim(region, &claims(region).pop()?).ok()?))
            };
            let [north, south] = self.snapshots().each_ref().map(newest);
            let pid = u32::try_from(agent.pid()).ok()?;
            (north.as_ref()?.1.pid == pid && north == south).then_some(())
        };
        eventually("both regions to have the agent's claim", PATIENCE, held).await
    }

    /// One run with an agent that takes the place of the one before. Whether it was struck.
    async fn takes_over(&self, nth: u64, blow: Blow) -> Result<bool> {
        let bench = self.bench;
        let target = bench.commit().await?;
        self.strike(nth, blow);
        let mut agent = self.streams_to(target, Some(blow)).await?;
        let struck = self.struck();
        self.is_lawful()?;
        self.calm();
        let target = bench.commit().await?;
        self.reaches(&mut agent, target, None).await?;
        self.is_held_by(&agent)
            .await
            .with_context(|| agent.last_words())?;
        self.judge(agent, target).await?;
        self.restorable(target).await?;
        Ok(struck)
    }
}

/// Nobody is waited for.
#[tokio::test]
async fn every_request_of_a_take_over_may_fail_or_be_the_last() -> Result<()> {
    let mut bench = claimed_elsewhere().await?;
    bench.told = &["--take-over"];
    let struck = sweep(|nth, blow| {
        let bench = &bench;
        async move { bench.run(name_of(nth, blow)).await?.takes_over(nth, blow).await }
    })
    .await?;
    ensure!(struck > 8, "only {struck} requests were struck");
    Ok(())
}

/// The other one's silence is waited for; struck are the requests about claims.
#[tokio::test]
async fn every_request_about_a_claim_may_fail_or_be_the_last() -> Result<()> {
    let bench = claimed_elsewhere().await?;
    let struck = sweep(|nth, blow| {
        let bench = &bench;
        async move {
            let run = bench.run(name_of(nth, blow)).await?;
            run.only_keys("/writer/");
            run.takes_over(nth, blow).await
        }
    })
    .await?;
    ensure!(struck > 3, "only {struck} requests about claims were struck");
    Ok(())
}
