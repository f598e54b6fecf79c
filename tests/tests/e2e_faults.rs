//! Regions that fail while WAL streams: what is reported to be safe follows the policy, the other
//! region goes on, and the lost one catches up by itself.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::s3::Operation;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site, region_config};
use highwater_tests::tap::{Feedback, came_in_time};
use highwater_tests::{Ledger, PgCluster, PgVersion, TestDir, lsn};

/// `wal_sender_timeout` where it matters: short, and still far above what a loaded machine takes for an answer.
const SENDER_TIMEOUT: Duration = Duration::from_secs(10);

/// An agent in a storm keeps what it cannot store, and no more than `memory.limit` of that.
const STORM_MEMORY: u64 = 200 << 20;

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

/// The process that streams to the agent.
async fn walsender(site: &Site) -> Result<String> {
    let pids = site
        .primary
        .value("SELECT string_agg(pid::text, ' ') FROM pg_stat_replication")
        .await?;
    ensure!(!pids.is_empty(), "nobody streams");
    Ok(pids)
}

/// Whether each status message came in time after the one before, and none of them promised more than `end`.
fn status_went_on(messages: &[Feedback], end: u64) -> Result<()> {
    came_in_time(messages, SENDER_TIMEOUT)?;
    for next in &messages[1..] {
        ensure!(
            next.flush <= end,
            "{} was reported, and a region that is frozen holds WAL up to {} only",
            lsn::show(next.flush),
            lsn::show(end)
        );
    }
    Ok(())
}

#[tokio::test]
async fn fault_06_a_stalled_region_holds_the_position_but_not_the_feedback() -> Result<()> {
    let primary = PgCluster::builder(PgVersion::V15)
        .conf("wal_sender_timeout", &format!("{}ms", SENDER_TIMEOUT.as_millis()));
    let site = Site::start(primary, 16).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    site.all_durable().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;

    let walsender = walsender(&site).await?;
    site.regions[1].faults().freeze();
    let frozen_end = site.stored_ends()[1];
    let goes_on = || async { (site.stored_ends()[0] > frozen_end).then_some(()) };
    eventually("the healthy region to go on", PATIENCE, goes_on).await?;
    site.regions[0].faults().freeze();
    let from = site.tap.feedback().len().saturating_sub(1);
    let frozen_at = site.tap.feedback()[from].at;
    // Status messages must go on, or PostgreSQL cuts the connection.
    let long_after = || async {
        let waited = site.tap.last_feedback()?.at.duration_since(frozen_at);
        (waited.unwrap_or_default() >= 2 * SENDER_TIMEOUT).then_some(())
    };
    eventually("status messages for two timeouts", PATIENCE, long_after).await?;
    let messages = site.tap.feedback();
    // Read now: a request that had begun before the freeze may have had its effect after it.
    let ends = site.stored_ends();
    status_went_on(&messages[from..], ends[0].min(ends[1]))?;
    ensure!(
        walsender == self::walsender(&site).await?,
        "the connection was lost while the regions were frozen"
    );
    ensure!(
        site.position().await? > ends[0].max(ends[1]),
        "nothing waits: the test proves nothing"
    );

    site.regions.iter().for_each(|region| region.faults().thaw());
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
    let mut site = site("all").await?;
    site.settings += "[memory]\nlimit = \"64MiB\"\n";
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
    let peak = agent.peak_memory()?;
    ensure!(peak < STORM_MEMORY, "{} MiB resident", peak >> 20);
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
    let mut site = site("all").await?;
    // Many packs and segments: each region is to lose some of both.
    site.settings += "[backup]\npack_size = \"1MiB\"\n";
    let agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;
    site.backup().await?;
    for _ in 0..4 {
        ledger.grow(25).await?;
        site.primary.sql("SELECT pg_switch_wal()").await?;
    }
    let log = ledger.stop().await;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;
    drop(agent);

    let [north, south] = &site.regions;
    let bucket = highwater_tests::site::BUCKET;
    for part in ["/wal/", "/pack/"] {
        let mut damaged = [0, 0];
        let mut keys = north.objects(bucket);
        keys.retain(|key| key.contains(part));
        // The regions take turns, and of two turns of a region one deletes.
        for (nth, key) in keys.iter().enumerate() {
            let victim = &site.regions[nth % 2];
            let done = match nth / 2 % 2 {
                0 => victim.corrupt(bucket, key),
                _ => victim.delete(bucket, key),
            };
            damaged[nth % 2] += u32::from(done);
        }
        ensure!(
            damaged.iter().all(|count| *count > 1),
            "{damaged:?} objects below {part} were damaged"
        );
    }
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
