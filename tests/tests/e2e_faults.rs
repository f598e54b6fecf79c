//! Regions that fail while WAL streams: what is reported to be safe follows the policy, the other
//! region goes on, and the lost one catches up by itself.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::s3::Operation;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site, region_config};
use highwater_tests::{Ledger, PgCluster, PgVersion, TestDir, lsn};

async fn site(policy: &str) -> Result<Site> {
    let mut site = Site::start(
        PgCluster::builder(PgVersion::V15).conf("wal_sender_timeout", "6s"),
        16,
    )
    .await?;
    site.settings += &format!("[durability]\npolicy = \"{policy}\"\n");
    Ok(site)
}

/// Waits until both regions hold everything up to `position`.
async fn both_hold(site: &Site, position: u64) -> Result<()> {
    let hold = || async {
        site.stored_ends()
            .iter()
            .all(|end| *end >= position)
            .then_some(())
    };
    eventually("both regions to hold everything", PATIENCE, hold)
        .await
        .with_context(|| {
            let ends = site.stored_ends().map(lsn::show);
            format!("{ends:?} of {}", lsn::show(position))
        })
}

#[tokio::test]
async fn fault_06_a_stalled_region_holds_the_position_but_not_the_feedback() -> Result<()> {
    let site = site("all").await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    site.all_durable().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;

    site.regions[1].faults().freeze();
    let frozen_end = site.stored_ends()[1];
    // Longer than wal_sender_timeout: status messages must go on, or PostgreSQL cuts the connection.
    let connection = site.tap.last_feedback().map(|message| message.connection);
    let messages = site.tap.feedback().len();
    tokio::time::sleep(Duration::from_secs(8)).await;
    ensure!(
        site.tap.highest_flush() <= frozen_end,
        "more was reported than the frozen region holds"
    );
    let now = site.tap.last_feedback().map(|message| message.connection);
    ensure!(
        now == connection,
        "the connection was lost while a region was frozen"
    );
    ensure!(
        site.tap.feedback().len() > messages,
        "no status messages while a region was frozen"
    );
    ensure!(
        site.stored_ends()[0] > frozen_end,
        "the healthy region did not go on"
    );

    site.regions[1].faults().thaw();
    let log = ledger.stop().await;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[1], site.regions[1].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

#[tokio::test]
async fn fault_02_with_policy_any_a_region_that_is_down_is_filled_afterwards() -> Result<()> {
    let site = site("any").await?;
    let agent = site.start_agent().await?;
    site.backup().await?;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;

    site.regions[0].faults().refuse(true);
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(100).await?;
    site.primary.sql("SELECT pg_switch_wal()").await?;
    ledger.grow(100).await?;
    let log = ledger.stop().await;
    // Safe by the policy, though one region is away.
    let end = site.all_durable().await?;
    ensure!(site.stored_ends()[0] < end && site.stored_ends()[1] >= end);

    site.regions[0].faults().refuse(false);
    both_hold(&site, end).await?;
    drop(agent);
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

#[tokio::test]
async fn fault_46_error_storms_and_lost_replies_change_nothing() -> Result<()> {
    let site = site("all").await?;
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    site.regions[0].faults().fail_every(6, 503);
    site.regions[1].faults().only(&[Operation::Put]);
    site.regions[1].faults().fail_every(6, 500);
    site.backup().await?;
    for _ in 0..5 {
        site.regions[0].faults().lose_replies(2);
        site.regions[1].faults().lose_replies(2);
        ledger.grow(40).await?;
    }
    let log = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    for region in &site.regions {
        region.faults().clear();
    }
    both_hold(&site, end).await?;
    ensure!(agent.is_running(), "the agent has left:\n{}", agent.last_words());
    drop(agent);
    for (name, region) in REGIONS.iter().zip(&site.regions) {
        let place = RestoreSite::new(PgVersion::V15, &[(name, region.as_ref())])?;
        log.check(&place.recovered("data", &[]).await?, Expect::everything())
            .await
            .context(*name)?;
    }
    Ok(())
}

/// Each region misses what the other has: together they still restore everything.
#[tokio::test]
async fn fault_40_damage_in_one_region_is_read_around() -> Result<()> {
    let site = site("all").await?;
    let agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;
    site.backup().await?;
    ledger.grow(100).await?;
    let log = ledger.stop().await;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;
    drop(agent);

    let [north, south] = &site.regions;
    let bucket = highwater_tests::site::BUCKET;
    let (mut damaged, mut spared) = (0, 0);
    for key in north
        .objects(bucket)
        .iter()
        .filter(|key| key.contains("/wal/") || key.contains("/pack/"))
    {
        let victim = if (damaged + spared) % 2 == 0 { north } else { south };
        let done = if spared % 3 == 0 {
            victim.corrupt(bucket, key)
        } else {
            victim.delete(bucket, key)
        };
        if done {
            damaged += 1;
        }
        spared += 1;
    }
    ensure!(damaged > 2, "nothing was damaged");
    let place = RestoreSite::new(
        PgVersion::V15,
        &[(REGIONS[0], north.as_ref()), (REGIONS[1], south.as_ref())],
    )?;
    let verify = place.program()?.arg("verify").output().await?;
    ensure!(
        verify.code == 1 || verify.code == 4,
        "verify found nothing ({}):\n{}",
        verify.code,
        verify.said()
    );
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

/// What a running agent bears in one region keeps none that starts from the others: a directory whose volume is not
/// mounted, a bucket that somebody has removed.
#[tokio::test]
async fn regions_that_are_away_for_reasons_of_their_own_keep_no_agent_from_starting() -> Result<()> {
    let mut site = site("any").await?;
    let mut agent = site.start_agent().await?;
    site.all_durable().await?;
    agent.terminate();
    agent.wait_exit(PATIENCE).await?;

    let dir = TestDir::new()?;
    let south = &site.regions[1];
    let gone = region_config(
        "gone",
        "no-such-bucket",
        &south.endpoint(),
        south.access_key(),
        south.secret_key(),
    );
    let url = dir.path().join("not/mounted").display().to_string();
    let unmounted = format!("[[region]]\nname = \"unmounted\"\nurl = \"file://{url}\"\n");
    site.settings += &(unmounted + &gone);
    let agent = site.start_agent().await?;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;
    for cause in ["not/mounted", "no-such-bucket"] {
        let told = || async { agent.stderr().contains(cause).then_some(()) };
        eventually("the reason to be said", PATIENCE, told).await?;
    }
    let status = site.agent()?.arg("status").output().await?;
    ensure!(
        status.code != 2 && status.stdout.contains("unmounted") && status.stdout.contains("gone"),
        "{}",
        status.said()
    );
    Ok(())
}
