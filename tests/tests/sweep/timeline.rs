//! A timeline switch: the end of the old timeline, the history of the new one, and its first objects.

use anyhow::{Result, ensure};

use crate::bench::{Bench, CALM, KEEPING};
use crate::blow::sweep;
use crate::judge::histories_first;
use crate::stream::catches_up;

/// An archive of timeline 1, which its server has gone on with since, and then left for timeline 2.
pub(crate) async fn promoted(settings: &'static str) -> Result<Bench> {
    let mut bench = Bench::archived(settings, KEEPING).await?;
    bench.write(2).await?;
    bench.promote().await?;
    bench.write(2).await?;
    bench
        .primary
        .sql("INSERT INTO t VALUES (4, 'on timeline 2')")
        .await?;
    bench.newest = "i = 4";
    // The pulses of the agent that was there last are of another timeline: without a word it would be waited for.
    bench.told = &["--take-over"];
    Ok(bench)
}

/// I7: neither region may have anything of timeline 2, however it is struck, before it has the history of that.
#[tokio::test]
async fn every_request_of_a_timeline_switch_may_fail_or_be_the_last() -> Result<()> {
    let mut bench = promoted(CALM).await?;
    bench.law = Box::new(histories_first);
    let struck = sweep(|nth, blow| catches_up(&bench, nth, blow)).await?;
    ensure!(struck > 15, "only {struck} requests were struck");
    Ok(())
}
