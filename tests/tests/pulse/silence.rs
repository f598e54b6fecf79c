//! A dead agent, told from one that has nothing to do by whoever reaches neither it nor the server.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_tests::clock::{self, eventually};
use highwater_tests::program::Finished;
use highwater_tests::site::{PATIENCE, REGIONS, Site, config};
use highwater_tests::{PgCluster, Program, Stop};

use crate::clock::libfaketime;
use crate::pulse::until_pulse;
use crate::support::VERSION;

/// So far ahead is the clock of who asks: of the minute after which silence means death, the rest has to be waited for.
const AHEAD: &str = "+30";
/// That rest.
const SILENCE: Duration = Duration::from_secs(30);

/// What `status` says with nothing but the archive to ask.
async fn status_of_the_archive(site: &Site) -> Result<Finished> {
    let library = libfaketime().context("libfaketime is missing: run scripts/setup.sh")?;
    let variables = [
        format!("LD_PRELOAD={}", library.display()),
        format!("FAKETIME={AHEAD}"),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
    ];
    let [north, south] = &site.regions;
    let regions = [(REGIONS[0], north.as_ref()), (REGIONS[1], south.as_ref())];
    let nowhere = "host=/nowhere user=postgres dbname=postgres";
    let toml = config(Some(nowhere), &regions) + "[admin]\nlisten = \"off\"\n" + &site.settings;
    let program = Program::agent()?.config(&toml)?.arg("status");
    program.under("env", &variables).output().await
}

#[tokio::test]
async fn a_dead_agent_is_told_from_an_idle_one_by_the_archive_alone() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    site.all_durable().await?;
    // Nothing happens for longer than a dead agent has to be silent.
    let later = clock::unix_micros(clock::now()) + i64::try_from(SILENCE.as_micros())?;
    let goes_on = Time::from_unix_micros(later + 1_000_000);
    for region in &site.regions {
        until_pulse(region, |pulse| pulse.server_time > goes_on).await?;
    }
    let idle = status_of_the_archive(&site).await?.expect_code(0)?;
    ensure!(
        idle.stdout.contains("agent    not answering")
            && idle.stdout.contains("slot     missing or not visible")
            && idle.stdout.contains("the recovery point is kept"),
        "{}",
        idle.said()
    );

    agent.kill9();
    site.primary.stop(Stop::Fast).await?;
    let dead = || async {
        let said = status_of_the_archive(&site).await.ok()?;
        (said.code != 0).then_some(said)
    };
    let dead = eventually("the silence to be noticed", PATIENCE, dead)
        .await?
        .expect_code(1)?;
    let words = "neither agent nor server answers, and the last pulse in as many regions";
    ensure!(dead.stdout.contains(words), "{}", dead.said());
    Ok(())
}
