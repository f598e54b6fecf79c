//! One history, two streams: what is reported beside a standby is held to the same as what is reported beside its primary.

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::dice::Dice;
use highwater_tests::ledger::{Expect, Pace};
use highwater_tests::program::Running;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::witness::Rules;
use highwater_tests::{FeedbackTap, Ledger, Stop, Witness, archive};

use crate::{SOON, VERSION, builder, flushed};

/// Waits until the slot of the server behind `tap` is moved to `end`.
pub(crate) async fn follows(tap: &FeedbackTap, end: u64, agent: &Running) -> Result<()> {
    let followed = || async { (tap.highest_flush() >= end).then_some(()) };
    eventually("the standby's slot to follow", PATIENCE, followed)
        .await
        .with_context(|| agent.last_words())
}

/// One agent beside every node, as under Patroni: whichever node is promoted, its agent becomes the writer, and the
/// other one goes on beside the standby that its node has become. No agent is told anything or started again.
#[tokio::test]
async fn one_agent_beside_every_node_follows_failovers() -> Result<()> {
    let mut site = Site::start(builder(), 1).await?;
    // Its server crashes.
    let rules = Rules {
        across: false,
        ..Rules::all()
    };
    let beside_a = Witness::of(&site, rules);
    let mut a = site.agent_at(&site.tap.connection_string())?.arg("run").start()?;
    a.says("streaming", SOON).await?;
    let ledger = Ledger::start(&site.primary, 1).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    let mut node_b = builder().standby_of(&site.primary).await?;
    let tap_b = FeedbackTap::start(&node_b).await?;
    let beside_b = Witness::at(&site, &tap_b, Rules::all());
    let mut b = site.agent_at(&tap_b.connection_string())?.arg("run").start()?;
    b.says("streaming", SOON).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;

    // A crash, and the old primary comes back as one before anybody makes it a standby: its agent waits.
    site.all_durable().await?;
    site.primary.kill9();
    node_b.promote().await?;
    let ledger = Ledger::resume(&node_b, Pace::default(), log).await?;
    ledger.grow(20).await?;
    b.says("claimed the archive", SOON).await?;
    site.archived(2, flushed(&node_b).await?)
        .await
        .with_context(|| b.last_words())?;
    site.primary.start_again().await?;
    a.says("another one has taken its place", SOON).await?;
    site.primary.kill9();
    let mut node_a = builder().standby_of(&node_b).await?;
    site.tap.redirect(&node_a);
    ledger.grow(20).await?;
    let end = flushed(&node_b).await?;
    let before = site.tap.feedback().len();
    let followed = || async {
        let said = site.tap.feedback();
        said[before..]
            .iter()
            .any(|feedback| feedback.flush >= end)
            .then_some(())
    };
    eventually("the slot of the new standby to follow", PATIENCE, followed)
        .await
        .with_context(|| a.last_words())?;

    // A switchover back: the primary is stopped in good order.
    let log = ledger.stop().await;
    node_b.stop(Stop::Fast).await?;
    node_a.promote().await?;
    let ledger = Ledger::resume(&node_a, Pace::default(), log).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.archived(3, flushed(&node_a).await?)
        .await
        .with_context(|| a.last_words())?;
    for agent in [&mut a, &mut b] {
        ensure!(agent.is_running(), "{}", agent.last_words());
    }
    beside_a.satisfied()?;
    beside_b.satisfied()?;
    std::mem::swap(&mut site.primary, &mut node_a);
    let place = RestoreSite::new(VERSION, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let restored = place.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// An agent beside the primary and one beside the standby. Either is killed at any moment, several times, and
/// started again; then the primary's machine is lost for good and the standby's agent goes on alone.
#[tokio::test]
async fn two_streams_stay_correct_when_either_dies_at_any_moment() -> Result<()> {
    let mut dice = Dice::thrown();
    let seed = dice.seed();
    either_dies(&mut dice)
        .await
        .with_context(|| format!("HIGHWATER_TEST_SEED={seed}"))
}

async fn either_dies(dice: &mut Dice) -> Result<()> {
    let mut site = Site::start(builder(), 1).await?;
    let beside_the_primary = Witness::of(&site, Rules::all());
    let first = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    let standby = builder().standby_of(&site.primary).await?;
    let tap = FeedbackTap::start(&standby).await?;
    let beside_the_standby = Witness::at(&site, &tap, Rules::all());
    let start_second = || {
        site.agent_at(&tap.connection_string())
            .and_then(|agent| agent.arg("run").start())
    };
    let mut agents = [first, start_second()?];
    agents[1].says("streaming", SOON).await?;
    for victim in [0, 1, 0, 1, 0, 1] {
        // Long enough for all phases of sealing, storing and reporting.
        tokio::time::sleep(dice.millis(0, 600)).await;
        agents[victim].kill9();
        ledger.grow(40).await?;
        agents[victim] = if victim == 0 {
            site.agent()?.arg("run").start()?
        } else {
            start_second()?
        };
        ledger.grow(10).await?;
    }
    let before = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| agents[0].last_words())?;
    follows(&tap, end, &agents[1]).await?;
    for agent in &mut agents {
        ensure!(agent.is_running(), "{}", agent.last_words());
    }
    for (name, region) in REGIONS.iter().zip(&site.regions) {
        let place = RestoreSite::new(VERSION, &[(name, region.as_ref())])?;
        let restored = place.recovered("data", &[]).await?;
        before
            .check(&restored, Expect::everything())
            .await
            .context(*name)?;
        let verify = place.program()?.arg("verify").output().await?;
        ensure!(verify.code == 0, "{name}: {}", verify.said());
    }

    site.primary.kill9();
    agents[0].kill9();
    standby.promote().await?;
    let ledger = Ledger::resume(&standby, Pace::default(), before).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.archived(2, flushed(&standby).await?)
        .await
        .with_context(|| agents[1].last_words())?;
    ensure!(agents[1].is_running(), "{}", agents[1].last_words());
    beside_the_primary.satisfied()?;
    beside_the_standby.satisfied()?;
    let place = RestoreSite::new(VERSION, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let restored = place.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// A standby that has received less than the archive holds is waited for; it has not diverged.
#[tokio::test]
async fn a_standby_that_lags_is_waited_for() -> Result<()> {
    let site = Site::start(builder(), 16).await?;
    let first = site.start_agent().await?;
    let mut standby = builder().standby_of(&site.primary).await?;
    standby.stop(Stop::Fast).await?;
    site.primary
        .sql("CREATE TABLE more AS SELECT generate_series(1, 5000)")
        .await?;
    let end = site.all_durable().await?;
    // Without the primary's address it stays where it is.
    let conf = standby.data_dir().join("postgresql.auto.conf");
    std::fs::write(&conf, "primary_conninfo = ''\n")?;
    standby.start_again().await?;
    let tap = FeedbackTap::start(&standby).await?;
    let witness = Witness::at(&site, &tap, Rules::all());
    let mut second = site.agent_at(&tap.connection_string())?.arg("run").start()?;
    second.says("is a standby that has WAL up to", SOON).await?;
    ensure!(second.is_running() && tap.highest_flush() == 0);
    standby
        .sql(&format!(
            "ALTER SYSTEM SET primary_conninfo = '{} application_name=standby'",
            site.primary.connection_string()
        ))
        .await?;
    standby.sql("SELECT pg_reload_conf()").await?;
    follows(&tap, end, &second).await?;
    witness.satisfied()?;
    // It proves nothing about the primary: no pulse of its own.
    let pulses = archive::keys_with(&site.snapshots()[0], BUCKET, "/writer/");
    ensure!(
        pulses.len() == 1,
        "the agent beside the standby claimed the archive: {pulses:?}"
    );
    drop(first);
    Ok(())
}
