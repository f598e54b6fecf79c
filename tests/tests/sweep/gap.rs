//! A gap: the server has removed WAL that the archive never got. The record of it, what follows, and the base backup that
//! ends it.

use anyhow::{Result, ensure};
use highwater_format::BackupId;
use highwater_tests::clock::eventually;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS};
use highwater_tests::{S3Snapshot, archive};

use crate::bench::{Bench, Law, Run, SEGMENT};
use crate::blow::{Blow, name_of, sweep, sweep_with_every_blow};
use crate::judge::{end, gaps, precedes};

/// Chunks come often, pulses only at the start. A base backup that one region got alone is copied while a run waits for it.
const HEALED: &str =
    "[wal]\nflush_interval = \"100ms\"\n[pulse]\ninterval = \"5m\"\n[heal]\ninterval = \"10s\"\n";

/// The server keeps what slots hold, and little else.
const FORGETTING: &[(&str, &str)] = &[("min_wal_size", "2MB"), ("max_wal_size", "8MB")];

/// An archive whose slot is gone, and the WAL behind its end, too.
async fn forgotten() -> Result<Bench> {
    let mut bench = Bench::archived(HEALED, FORGETTING).await?;
    let lost_from = end(&bench.before[0], 1);
    let name = "SELECT pg_walfile_name(pg_current_wal_insert_lsn())";
    let newest = bench.primary.value(name).await?;
    for _ in 0..8 {
        bench.write(1).await?;
    }
    let removed = || async {
        bench.primary.sql("CHECKPOINT").await.ok()?;
        let there = format!("SELECT count(*) FROM pg_ls_waldir() WHERE name <= '{newest}'");
        (bench.primary.value(&there).await.ok()? == "0").then_some(())
    };
    eventually("the server to remove WAL", PATIENCE, removed).await?;
    bench
        .primary
        .sql("INSERT INTO t VALUES (4, 'behind the gap')")
        .await?;
    bench.newest = "i = 4";
    bench.law = record_first(lost_from);
    Ok(bench)
}

/// I5: no region has WAL from behind the archive's end without an older record of the gap.
fn record_first(lost_from: u64) -> Law {
    Box::new(move |regions| {
        for (name, region) in REGIONS.iter().zip(regions) {
            let mut records = archive::keys_with(region, BUCKET, "/gap/");
            records.retain(|record| record.contains(&format!("/{lost_from:016X}-")));
            for key in region.keys(BUCKET) {
                let is_behind = archive::range_of(&key, SEGMENT).is_some_and(|(_, _, end)| end > lost_from);
                ensure!(
                    !is_behind || records.iter().any(|record| precedes(region, record, &key)),
                    "{name} had {key} before the record of the gap from {lost_from:X} on, of which there are {records:?}"
                );
            }
        }
        Ok(())
    })
}

impl Run<'_> {
    /// Whether both regions have all up to `target`, and a base backup behind the gap.
    fn has_gone_on(&self, target: u64) -> bool {
        let has = |region: &S3Snapshot| end(region, 1) >= target;
        let fresh = |(number, region): (usize, &S3Snapshot)| {
            let behind = gaps(region, 1).iter().map(|(_, end)| *end).max();
            let newest = self.backups(number).pop_last();
            let start = newest.and_then(|id| Some(BackupId::parse(&id).ok()?.start_lsn().0));
            start.is_some() && behind.is_some() && start >= behind
        };
        let regions = self.snapshots();
        regions.iter().all(has) && regions.iter().enumerate().all(fresh)
    }
}

/// One run with an agent that finds the gap. Whether it was struck.
async fn goes_on(run: Run<'_>, target: u64, nth: u64, blow: Blow) -> Result<bool> {
    run.strike(nth, blow);
    let mut agent = run.agent("run")?.start()?;
    run.until(&mut agent, Some(blow), || run.has_gone_on(target))
        .await?;
    agent.says("streaming", PATIENCE).await?;
    let struck = run.struck();
    run.calm();
    let target = run.bench.commit().await?;
    run.reaches(&mut agent, target, None).await?;
    run.judge(agent, target).await?;
    run.restorable(target).await?;
    Ok(struck)
}

#[tokio::test]
async fn every_request_of_a_gap_may_fail_or_be_the_last() -> Result<()> {
    let bench = forgotten().await?;
    let struck = sweep(|nth, blow| {
        let bench = &bench;
        async move {
            let run = bench.run(name_of(nth, blow)).await?;
            let target = bench.commit().await?;
            goes_on(run, target, nth, blow).await
        }
    })
    .await?;
    ensure!(struck > 20, "only {struck} requests were struck");
    Ok(())
}

/// With a policy that one region satisfies, the stream goes on as soon as that one has the record. The other one has to mind by
/// itself that the record comes first: it hangs with it while WAL from behind the gap waits.
#[tokio::test]
async fn every_request_about_the_record_of_a_gap_may_fail_or_be_the_last() -> Result<()> {
    let bench = forgotten().await?;
    let struck = sweep_with_every_blow(|nth, blow| {
        let bench = &bench;
        async move {
            let mut run = bench.run(name_of(nth, blow)).await?;
            let target = bench.commit().await?;
            run.policy = "any";
            run.lingers = Some(target);
            run.only_keys("/gap/");
            goes_on(run, target, nth, blow).await
        }
    })
    .await?;
    ensure!(struck > 1, "no record was struck");
    Ok(())
}
