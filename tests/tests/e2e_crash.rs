//! Agent and primary are killed at random moments under load, and the disk is gone: what PostgreSQL
//! was told to be safe must come back from either region alone and from both, as they were at that moment.
//!
//! `HIGHWATER_TEST_SEED` repeats a run; every failure names its seed.

#[path = "pulse/mod.rs"]
mod pulse;
#[path = "sent/mod.rs"]
mod sent;

use anyhow::{Context, Result, ensure};
use highwater_tests::archive;
use highwater_tests::dice::Dice;
use highwater_tests::ledger::Expect;
use highwater_tests::site::{BUCKET, REGIONS, RestoreSite, Site};
use highwater_tests::witness::Rules;
use highwater_tests::{Ledger, PgCluster, PgVersion, S3Server, Witness, lsn};
use sent::holds_what_was_sent;

async fn killed_at_random(version: PgVersion, segment_mb: u32, dice: &mut Dice) -> Result<()> {
    let mut site = Site::start(PgCluster::builder(version), segment_mb).await?;
    site.tap.record();
    let witness = Witness::of(&site, Rules::all());
    let ledger = Ledger::start(&site.primary, 4).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    // The copies that are restored are those of the last promise: there must be one that came after the backup.
    site.all_durable().await?;
    for _ in 0..4 {
        tokio::time::sleep(dice.millis(50, 900)).await;
        agent.kill9();
        tokio::time::sleep(dice.millis(0, 300)).await;
        agent = site.start_agent().await?;
    }
    tokio::time::sleep(dice.millis(100, 900)).await;
    site.primary.kill9();
    tokio::time::sleep(dice.millis(0, 50)).await;
    agent.kill9();
    site.primary.lose_disk()?;
    let log = ledger.stop().await;

    let seen = witness.satisfied()?;
    holds_what_was_sent(&site)?;
    let promised = log
        .entries
        .iter()
        .filter(|entry| entry.after.is_some_and(|after| after <= seen.flush))
        .count();
    ensure!(
        promised > 20,
        "only {promised} commits were promised: the test proves little"
    );
    let [north, south] = seen.regions;
    let frozen = [S3Server::serve(north).await?, S3Server::serve(south).await?];
    let named = [(REGIONS[0], &frozen[0]), (REGIONS[1], &frozen[1])];
    for regions in [&named[..1], &named[1..], &named[..]] {
        let from: Vec<&str> = regions.iter().map(|(name, _)| *name).collect();
        let place = RestoreSite::new(version, regions)?;
        let restored = place
            .recovered("data", &[])
            .await
            .with_context(|| format!("from {from:?}"))?;
        log.check(&restored, Expect::held_through(seen.flush))
            .await
            .with_context(|| format!("from {from:?}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn fault_68_what_was_promised_survives_kill9_of_agent_and_primary() -> Result<()> {
    let mut dice = Dice::thrown();
    let seed = dice.seed();
    killed_at_random(PgVersion::V15, 16, &mut dice)
        .await
        .with_context(|| format!("HIGHWATER_TEST_SEED={seed}"))
}

#[tokio::test]
async fn fault_68_what_was_promised_survives_kill9_with_small_segments() -> Result<()> {
    let mut dice = Dice::thrown();
    let seed = dice.seed();
    killed_at_random(PgVersion::V17, 1, &mut dice)
        .await
        .with_context(|| format!("HIGHWATER_TEST_SEED={seed}"))
}

/// The primary crashes and recovers by itself; the agent goes on where the archive ends.
#[tokio::test]
async fn the_stream_goes_on_after_a_crash_of_the_primary() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    site.tap.record();
    let witness = Witness::of(
        &site,
        Rules {
            across: false,
            ..Rules::all()
        },
    );
    let ledger = Ledger::start(&site.primary, 2).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    ledger.grow(50).await?;
    site.primary.kill9();
    let before = ledger.stop().await;
    site.primary.start_again().await?;
    let ledger = Ledger::resume(
        &site.primary,
        highwater_tests::ledger::Pace {
            clients: 2,
            ..Default::default()
        },
        before,
    )
    .await?;
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    ensure!(agent.is_running(), "the agent has left:\n{}", agent.last_words());
    drop(agent);
    witness.satisfied()?;
    holds_what_was_sent(&site)?;

    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let restored = place.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// The tests above can fail: a region that has lost the newest WAL that was promised is noticed. By the restore itself,
/// because the region's pulse tells how far it had been; by the ledger, where that is lost with it.
#[tokio::test]
async fn promised_wal_that_is_gone_is_noticed() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    let agent = site.start_agent().await?;
    site.backup().await?;
    ledger.grow(50).await?;
    let kept_end = site.all_durable().await?;
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    let flush = site.all_durable().await?;
    pulse::until_pulse(&site.regions[0], |pulse| pulse.stored_lsn.0 >= flush).await?;
    drop(agent);
    site.primary.kill9();

    let whole = site.regions[0].snapshot();
    let size = site.segment_size();
    let cut = whole
        .clone()
        .filtered(|key, _| archive::range_of(key, size).is_none_or(|(_, _, end)| end <= kept_end));
    ensure!(
        archive::wal_end(&cut, BUCKET, 1, size) < flush,
        "nothing was cut away"
    );
    let silent = cut.clone().filtered(|key, _| !key.ends_with("/pulse.json"));
    let lost = lsn::show(archive::wal_end(&cut, BUCKET, 1, size));
    let frozen = S3Server::serve(cut).await?;
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], &frozen)])?;
    let refused = place.run("data", &[]).await?.expect_code(1)?.said();
    ensure!(
        refused.contains(&format!("the WAL [{lost}, ")) && refused.contains("of timeline 1 is missing"),
        "the range from {lost} on is not named:\n{refused}"
    );
    ensure!(!place.data("data").exists(), "something was written all the same");

    let frozen = S3Server::serve(silent).await?;
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], &frozen)])?;
    let restored = place.recovered("data", &[]).await?;
    let checked = log.check(&restored, Expect::held_through(flush)).await;
    let found = checked.err().map_or(String::new(), |error| error.to_string());
    ensure!(
        found.contains("lost: "),
        "the loss of promised commits was not noticed: {found:?}"
    );
    Ok(())
}
