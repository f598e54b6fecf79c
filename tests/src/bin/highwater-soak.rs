//! Runs random fault schedules against the built programs until told to stop, or until one loses something.
//! `scripts/soak.sh` builds and calls it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use highwater_tests::dice::Dice;
use highwater_tests::soak::{self, Passed};
use tokio::task::JoinSet;

/// Random fault schedules, each compared with the ledger; stops at the first loss and keeps everything.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Begin no schedule after so many minutes
    #[arg(long)]
    minutes: Option<u64>,
    /// Run so many schedules
    #[arg(long)]
    schedules: Option<u64>,
    /// Seed of the first schedule; the next ones count up from it. A failure names its own
    #[arg(long)]
    seed: Option<u64>,
    /// Seconds of faults in each schedule; starting and restoring come on top
    #[arg(long, default_value_t = 60)]
    length: u64,
    /// Schedules at the same time
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Instead of schedules: freeze both regions for so many minutes under load
    #[arg(long)]
    frozen: Option<f64>,
    /// Where the evidence of a failure is kept
    #[arg(long, default_value = ".")]
    keep: PathBuf,
}

fn say(line: &str) {
    drop(writeln!(std::io::stdout(), "{line}"));
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.frozen {
        Some(minutes) => frozen(minutes).await,
        None => schedules(&arguments).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("FAILED: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn frozen(minutes: f64) -> anyhow::Result<()> {
    let measured = soak::both_regions_frozen(Duration::from_secs_f64(minutes * 60.0)).await?;
    say(&format!(
        "both regions frozen for {:?}: {} MiB of WAL meanwhile, at most {} MiB resident in the first half and {} MiB in the second, \
         at most {:?} between status messages, everything stored {:?} after the thaw, both regions restore everything",
        measured.outage,
        measured.wal_bytes >> 20,
        measured.memory[0] >> 20,
        measured.memory[1] >> 20,
        measured.silence,
        measured.recovery
    ));
    Ok(())
}

async fn schedules(arguments: &Arguments) -> anyhow::Result<()> {
    let first = arguments
        .seed
        .unwrap_or_else(|| Dice::thrown().seed() % 1_000_000_000);
    let count = arguments.schedules.unwrap_or(match arguments.minutes {
        Some(_) => u64::MAX,
        None => 1,
    });
    let until = arguments
        .minutes
        .map(|minutes| Instant::now() + Duration::from_secs(minutes * 60));
    let length = Duration::from_secs(arguments.length);
    say(&format!(
        "schedules of {} s from seed {first} on",
        arguments.length
    ));
    let (mut running, mut begun, mut passed) = (JoinSet::new(), 0, 0);
    let mut faults: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut majors: BTreeMap<u32, u64> = BTreeMap::new();
    let mut promised = 0;
    loop {
        while running.len() < arguments.jobs.max(1)
            && begun < count
            && until.is_none_or(|until| Instant::now() < until)
        {
            let (seed, keep) = (first + begun, arguments.keep.clone());
            running.spawn(async move { (seed, soak::schedule(seed, length, &keep).await) });
            begun += 1;
        }
        let Some(ended) = running.join_next().await else {
            break;
        };
        let (seed, result) = ended?;
        let schedule: Passed = result?;
        passed += 1;
        promised += schedule.promised;
        *majors.entry(schedule.major).or_default() += 1;
        for fault in &schedule.faults {
            *faults.entry(fault).or_default() += 1;
        }
        say(&format!(
            "{passed}: seed {seed} passed ({}): {} faults, {} commits acknowledged, {} reported as stored and all restored",
            schedule.setting,
            schedule.faults.len(),
            schedule.commits,
            schedule.promised
        ));
    }
    say(&format!(
        "{passed} schedules passed, {promised} promised commits, none lost; by PostgreSQL's version {majors:?}; {faults:?}"
    ));
    Ok(())
}
