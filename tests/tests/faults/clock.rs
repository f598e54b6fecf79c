//! Clocks that are wrong. `libfaketime` gives the agent another clock than PostgreSQL and the stores have, and steps it
//! while the agent runs.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_tests::ledger::Expect;
use highwater_tests::site::{PATIENCE, Site};
use highwater_tests::witness::Rules;
use highwater_tests::{Ledger, PgCluster, Witness, clock};

use crate::support::{VERSION, both_hold, from_both, leave};

pub(crate) fn libfaketime() -> Option<PathBuf> {
    let architectures = ["x86_64-linux-gnu", "aarch64-linux-gnu"];
    let library = |name: &&str| PathBuf::from(format!("/usr/lib/{name}/faketime/libfaketime.so.1"));
    architectures.iter().map(library).find(|path| path.exists())
}

/// How many requests the regions have refused because of their time.
fn refused_for_their_time(site: &Site) -> u64 {
    let refused = site.regions.iter().map(|region| region.counters());
    refused
        .map(|counters| counters.answered("RequestTimeTooSkewed"))
        .sum()
}

/// An hour ahead, two hours back in one step, and right again: what is stored, reported and restorable does not
/// depend on it, though the regions refuse requests of that time, and the times of a restore are PostgreSQL's.
#[tokio::test]
async fn fault_31_a_clock_that_is_stepped_by_an_hour_changes_nothing() -> Result<()> {
    let library = libfaketime().context("libfaketime is missing: run scripts/setup.sh")?;
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let witness = Witness::of(&site, Rules::all());
    let offset = site.primary.dir().write("offset", "+3600\n")?;
    std::fs::set_permissions(&offset, std::fs::Permissions::from_mode(0o644))?;
    let variables = [
        format!("LD_PRELOAD={}", library.display()),
        format!("FAKETIME_TIMESTAMP_FILE={}", offset.display()),
        "FAKETIME_NO_CACHE=1".to_owned(),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
    ];
    let faked = |command: &str| anyhow::Ok(site.agent()?.arg(command).under("env", &variables));
    let mut agent = faked("run")?.start()?;
    agent.says("streaming", PATIENCE).await?;
    let ahead = refused_for_their_time(&site);
    ensure!(ahead > 0, "no region minds the time: the test proves nothing");
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(40).await?;
    faked("backup")?.output().await?.expect_code(0)?;
    ledger.grow(30).await?;
    let ahead = refused_for_their_time(&site);
    std::fs::write(&offset, "-3600\n")?;
    ledger.grow(30).await?;
    let behind = || async { (refused_for_their_time(&site) > ahead).then_some(()) };
    clock::eventually("a request to be refused after the step", PATIENCE, behind).await?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    faked("backup")?.output().await?.expect_code(0)?;
    agent.kill9();
    let mut agent = faked("run")?.start()?;
    agent.says("streaming", PATIENCE).await?;
    ledger.grow(30).await?;
    let moment = clock::now();
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    both_hold(&site, end).await?;
    witness.satisfied()?;
    leave(agent).await?;

    let place = from_both(&site)?;
    let time = Time::from_unix_micros(clock::unix_micros(moment)).to_string();
    let restored = place.recovered("then", &["--to-time", &time]).await?;
    let report = log.check(&restored, Expect::at_time(moment)).await?;
    ensure!(
        report.missing > 0,
        "nothing lies past the time: the test proves nothing"
    );
    drop(restored);
    log.check(&place.recovered("latest", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}
