//! A base backup.

use anyhow::{Result, ensure};
use highwater_tests::program::Running;
use highwater_tests::site::PATIENCE;

use crate::blow::{Blow, every_request, name_of, sweep};
use crate::stream::behind;

/// A base backup beside a running stream: whatever happens to it, every backup that is visible restores from either
/// region, and the next one is not bothered by what was left.
#[tokio::test]
async fn every_request_of_a_base_backup_may_fail_or_be_the_last() -> Result<()> {
    let mut bench = behind().await?;
    bench.before[1] = bench.before[0].clone();
    let struck = sweep(|nth, blow| {
        let bench = &bench;
        async move {
            let run = bench.run(name_of(nth, blow)).await?;
            let target = bench.write(1).await?;
            let mut agent = run.streams_to(target, None).await?;
            if !every_request() {
                // What the running stream asks meanwhile is the other sweeps'.
                run.only_keys("/base/");
            }
            run.strike(nth, blow);
            let mut backup = run.agent("backup")?.start()?;
            let is_to_die = matches!(blow, Blow::Crash(..));
            let ended = || !is_running(&backup) || (is_to_die && run.struck());
            run.until(&mut agent, None, ended).await?;
            let struck = run.struck();
            if !is_to_die {
                let code = backup.wait_exit(PATIENCE).await?;
                ensure!(code <= 3, "it ended with {code}:\n{}", backup.last_words());
            }
            backup.kill9();
            run.calm();
            // A clean run, beside an agent that goes on, and what it leaves.
            let target = bench.commit().await?;
            run.reaches(&mut agent, target, None).await?;
            run.agent("backup")?.output().await?.expect_code(0)?;
            let target = bench.write(1).await?;
            drop(agent);
            let agent = run.streams_to(target, None).await?;
            let backups = run.backups(0).len();
            ensure!((2..=3).contains(&backups), "{backups} backups");
            run.judge(agent, target).await?;
            run.restorable(target).await?;
            Ok(struck)
        }
    })
    .await?;
    // Packs, manifest and mark at the least.
    ensure!(struck > 3, "only {struck} requests were struck");
    Ok(())
}

/// Whether the process is there and no zombie.
fn is_running(process: &Running) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
