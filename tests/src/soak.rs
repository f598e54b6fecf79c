//! Random fault schedules: a primary under load, an agent, two regions, and everything that can go wrong with them,
//! in an order that a seed decides; at a random moment the machine is lost.
//!
//! Owns: which faults there are, their order and length, and the verdict. The oracle is the rig's: the witness at
//! every status message, and restores from the copies of the regions at the highest position ever reported, from each
//! region alone and from both, compared with the ledger. Scheduling is repeatable by seed as far as
//! processes are: the same faults in the same order, not the same interleaving.

mod frozen;
mod site;
mod troubles;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

pub use frozen::{Frozen, both_regions_frozen};
use site::{Branch, Soaked};
use troubles::Trouble;

use crate::clock::unix_micros;
use crate::dice::Dice;
use crate::ledger::{Entry, Expect, LedgerLog};
use crate::lsn;
use crate::postgres::{PgCluster, PgVersion};
use crate::program::Finished;
use crate::s3::S3Server;
use crate::site::{REGIONS, RestoreSite};
use crate::witness::Seen;

/// Restoring and starting one copy, on a busy machine.
const RESTORE_LIMIT: Duration = Duration::from_secs(180);

/// What one schedule went through and proved.
#[derive(Clone, Debug, Default)]
pub struct Passed {
    /// PostgreSQL's major version.
    pub major: u32,
    /// Server, segment size and policy.
    pub setting: String,
    /// The faults in order.
    pub faults: Vec<&'static str>,
    /// Acknowledged commits.
    pub commits: usize,
    /// Those of them that were reported as stored, and were all found in every restore that had to hold them.
    pub promised: usize,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    KillAgent,
    StopAgent,
    KillPrimary,
    FreezeRegion,
    RefuseRegion,
    Errors,
    LostReplies,
    SeverStream,
    FreezeStream,
    Backup,
    SwitchSegment,
    Checkpoint,
    Promote,
    FailOver,
    Quiet,
}

/// Frequent ones are listed more than once.
const FAULTS: [Fault; 20] = [
    Fault::KillAgent,
    Fault::KillAgent,
    Fault::KillAgent,
    Fault::StopAgent,
    Fault::KillPrimary,
    Fault::FreezeRegion,
    Fault::FreezeRegion,
    Fault::RefuseRegion,
    Fault::Errors,
    Fault::Errors,
    Fault::LostReplies,
    Fault::SeverStream,
    Fault::FreezeStream,
    Fault::Backup,
    Fault::SwitchSegment,
    Fault::Checkpoint,
    Fault::Promote,
    Fault::FailOver,
    Fault::FailOver,
    Fault::Quiet,
];

/// Runs the schedule of a seed for about `length`, then loses the machine and restores. Whatever the failure was
/// about is kept in `keep`.
///
/// # Errors
/// A loss, a gap, a false success, or a program that hung.
pub async fn schedule(seed: u64, length: Duration, keep: &Path) -> Result<Passed> {
    let mut dice = Dice::seeded(seed);
    let mut soaked = Soaked::start(&mut dice).await?;
    let mut passed = Passed {
        major: soaked.site.primary.version().major(),
        setting: soaked.setting.clone(),
        ..Passed::default()
    };
    let judged = async {
        let began = Instant::now();
        while began.elapsed() < length {
            let fault = dice.one(&FAULTS);
            passed.faults.push(
                strike(&mut soaked, fault, &mut dice)
                    .await
                    .with_context(|| format!("{fault:?}"))?,
            );
            soaked.lives_on(dice.millis(50, 1500)).await;
            soaked.agent_lives()?;
        }
        // Otherwise everything is lost in the middle of the troubles.
        if dice.once_in(2) {
            soaked.settles().await?;
        }
        let (log, seen) = soaked.lose_the_machine(&mut dice).await?;
        passed.commits = log.entries.len();
        passed.promised = promised(&log, seen.flush).len();
        if let Some(branch) = &soaked.branch {
            let left_behind = promised(&branch.log, branch.flush);
            passed.promised += left_behind
                .iter()
                .filter(|entry| entry.after > Some(branch.switch))
                .count();
        }
        verdict(&soaked, &log, &seen, &mut dice).await
    }
    .await;
    match judged {
        Ok(()) => Ok(passed),
        Err(error) => {
            let kept = soaked.keep(keep, seed);
            let faults = passed.faults.join(", ");
            Err(error.context(format!(
                "seed {seed} ({}; {faults}); kept in {kept}",
                passed.setting
            )))
        }
    }
}

/// The acknowledged commits that were reported as stored.
fn promised(log: &LedgerLog, flush: u64) -> Vec<Entry> {
    let is_promised = |entry: &&Entry| entry.after.is_some_and(|after| after <= flush);
    log.entries.iter().filter(is_promised).copied().collect()
}

/// One fault. What lasts goes on beside the next ones.
async fn strike(soaked: &mut Soaked, fault: Fault, dice: &mut Dice) -> Result<&'static str> {
    let region = usize::try_from(dice.below(2)).unwrap_or(0);
    Ok(match fault {
        Fault::KillAgent => {
            soaked.agent_dies();
            soaked.lives_on(dice.millis(0, 1500)).await;
            soaked.agent_starts()?;
            "agent killed"
        }
        Fault::StopAgent => {
            soaked.suffers(Trouble::AgentStopped, dice.millis(200, 9000));
            "agent stopped"
        }
        Fault::KillPrimary => {
            soaked.primary_crashes().await?;
            "primary killed"
        }
        Fault::FreezeRegion => {
            soaked.suffers(Trouble::Frozen(region), dice.millis(300, 6000));
            "region frozen"
        }
        Fault::RefuseRegion => {
            soaked.suffers(Trouble::Down(region), dice.millis(300, 5000));
            "region down"
        }
        Fault::Errors => {
            let (every, status) = (2 + dice.below(4), dice.one(&[500, 503, 409, 200]));
            soaked.suffers(Trouble::Storm(region, every, status), dice.millis(500, 5000));
            "error storm"
        }
        Fault::LostReplies => {
            let faults = soaked.site.regions[region].faults().clone();
            faults.lose_replies(1 + dice.below(5));
            "lost replies"
        }
        Fault::SeverStream => {
            soaked.site.tap.sever();
            "stream severed"
        }
        Fault::FreezeStream => {
            soaked.suffers(Trouble::StreamFrozen, dice.millis(100, 4000));
            "stream frozen"
        }
        Fault::Backup => {
            soaked.backup_begins()?;
            "backup begun"
        }
        Fault::SwitchSegment => {
            soaked.asks("SELECT pg_switch_wal()").await;
            "segment switched"
        }
        Fault::Checkpoint => {
            soaked.asks("CHECKPOINT").await;
            "checkpoint"
        }
        Fault::Promote => match soaked.promote().await? {
            true => "standby promoted",
            false => "quiet",
        },
        Fault::FailOver => match soaked.fails_over(dice.millis(100, 4000)).await? {
            true => "failed over to a standby that lags",
            false => "quiet",
        },
        Fault::Quiet => {
            soaked.lives_on(dice.millis(500, 2500)).await;
            "quiet"
        }
    })
}

/// Restores what the regions held at the last promise, and compares: the end from each region and from both, and a
/// moment in between.
async fn verdict(soaked: &Soaked, log: &LedgerLog, seen: &Seen, dice: &mut Dice) -> Result<()> {
    let version = soaked.site.primary.version();
    let copies = [
        S3Server::serve(seen.regions[0].clone()).await?,
        S3Server::serve(seen.regions[1].clone()).await?,
    ];
    let [north, south] = [(REGIONS[0], &copies[0]), (REGIONS[1], &copies[1])];
    let both = [north, south];
    let all = soaked.needed == 2;
    let end = Expect::held_through(seen.flush);
    for (what, regions, must) in [
        ("north alone", &both[..1], all),
        ("south alone", &both[1..], all),
        ("both", &both[..], true),
    ] {
        let branch = soaked.branch.as_ref();
        in_time(what, restore(version, regions, (log, branch), end, must)).await?;
    }
    if let Some(branch) = &soaked.branch {
        let regions = if all { &both[1..] } else { &both[..] };
        branch_restores(version, regions, branch).await?;
    }
    let Some(entry) = some_promised(log, seen, dice) else {
        return Ok(());
    };
    let after = entry.after.context("not promised")?;
    let at = lsn::show(after);
    let target = ["--to-lsn", at.as_str()];
    let to_lsn = recovered(version, &both, log, &target, Expect::at_lsn(after));
    let (cluster, place) = in_time(&format!("to LSN {at}"), to_lsn).await?;
    // The harness reads no calendars; PostgreSQL does.
    let time = cluster
        .value(&format!(
            "SELECT to_char((timestamptz 'epoch' + interval '1 microsecond' * {}) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
            unix_micros(entry.acknowledged)
        ))
        .await?;
    drop((cluster, place));
    let expect = Expect::at_time(entry.acknowledged);
    let target = ["--to-time", time.as_str()];
    let to_time = recovered(version, &both, log, &target, expect);
    in_time(&format!("to time {time}"), to_time).await?;
    Ok(())
}

/// What was promised of a line that was left is there too, when it is asked for.
async fn branch_restores(version: PgVersion, regions: &[(&str, &S3Server)], branch: &Branch) -> Result<()> {
    let timeline = branch.timeline.to_string();
    let target = ["--timeline", timeline.as_str()];
    let expect = Expect::held_through(branch.flush);
    let restored = recovered(version, regions, &branch.log, &target, expect);
    in_time("the branch that was left", restored).await.map(drop)
}

async fn in_time<T>(what: &str, restore: impl Future<Output = Result<T>>) -> Result<T> {
    let restored = tokio::time::timeout(RESTORE_LIMIT, restore).await;
    restored
        .context("the restore does not end")
        .and_then(|result| result)
        .with_context(|| format!("restore, {what}"))
}

/// Any promised commit but the last ones: a time needs a commit behind it to be known.
fn some_promised(log: &LedgerLog, seen: &Seen, dice: &mut Dice) -> Option<Entry> {
    let promised = promised(log, seen.flush);
    let most = promised.len() * 9 / 10;
    (most > 0).then(|| promised[usize::try_from(dice.below(most as u64)).unwrap_or(0)])
}

/// The end of what is there. Where the region did not have to hold everything, it may be refused; if it succeeds, what
/// it restored is what it says: the story up to a position, without a gap and with nothing behind it.
async fn restore(
    version: PgVersion,
    regions: &[(&str, &S3Server)],
    (log, branch): (&LedgerLog, Option<&Branch>),
    end: Expect,
    must: bool,
) -> Result<()> {
    let place = RestoreSite::new(version, regions)?;
    let run = place.run("data", &["--output", "json"]).await?;
    if run.code != 0 {
        let refused = [1, 3, 4].contains(&run.code);
        ensure!(!must && refused, "exit code {}:\n{}", run.code, run.said());
        return Ok(());
    }
    let mut cluster = PgCluster::adopt(version, &place.data("data"))?;
    cluster.start_again().await?;
    place.until_writable(&cluster).await?;
    let said = Expect::at_lsn(said_end(&run)?);
    if must {
        log.check(&cluster, said).await?;
        return log.check(&cluster, end).await.map(drop);
    }
    match (log.check(&cluster, said).await, branch) {
        // The region may not know of the failover.
        (Err(_), Some(branch)) => branch.log.check(&cluster, said).await.map(drop),
        (checked, _) => checked.map(drop),
    }
}

/// Where a restore said that it ends.
fn said_end(run: &Finished) -> Result<u64> {
    let document: serde_json::Value =
        serde_json::from_str(&run.stdout).with_context(|| format!("not JSON: {}", run.said()))?;
    let end = document["answer"]["planned_end"].as_str();
    lsn::parse(end.context("it does not say where it ends")?)
}

/// A restore to a target that was promised, and the server that came of it.
async fn recovered(
    version: PgVersion,
    regions: &[(&str, &S3Server)],
    log: &LedgerLog,
    target: &[&str],
    expect: Expect,
) -> Result<(PgCluster, RestoreSite)> {
    let place = RestoreSite::new(version, regions)?;
    let cluster = place.recovered("data", target).await?;
    log.check(&cluster, expect).await?;
    Ok((cluster, place))
}
