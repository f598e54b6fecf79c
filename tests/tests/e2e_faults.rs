//! Regions that fail while WAL streams: what is reported to be safe follows the policy, the other
//! region goes on, and the lost one catches up by itself.

#[path = "sent/mod.rs"]
mod sent;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::dice::Dice;
use highwater_tests::ledger::Expect;
use highwater_tests::s3::Operation;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site, region_config};
use highwater_tests::tap::came_in_time;
use highwater_tests::{Ledger, PgCluster, PgVersion, S3Snapshot, TestDir, archive, lsn};
use sent::holds_what_was_sent;

/// `wal_sender_timeout` where it matters: short, and still far above what a loaded machine takes for an answer.
const SENDER_TIMEOUT: Duration = Duration::from_secs(10);

/// For so many seconds WAL waits at least while nothing is stored: far more than a stumbling region makes it wait.
const WAITED: f64 = 8.0;

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

/// Neither region takes anything any more, one after the other. Returns what is reported when all is that they have.
async fn freeze_in_turn(site: &Site) -> Result<u64> {
    site.regions[1].faults().freeze();
    let frozen_end = site.stored_ends()[1];
    let goes_on = || async { (site.stored_ends()[0] > frozen_end).then_some(()) };
    eventually("the healthy region to go on", PATIENCE, goes_on).await?;
    site.regions[0].faults().freeze();
    // A request that had begun before the freeze may have had its effect after it.
    let settled = || async {
        let reported = site.tap.last_feedback()?.flush;
        let [north, south] = site.stored_ends();
        (reported >= north.min(south)).then_some(reported)
    };
    eventually("the report to come to rest", PATIENCE, settled).await
}

/// For three timeouts status messages go on, with no longer pause between two of them than half a timeout, which leaves room for
/// what gets lost or comes late, and every one says what the first one did.
async fn stalls(site: &Site, reported: u64) -> Result<()> {
    let from = site.tap.feedback().len().saturating_sub(1);
    let began = site.tap.feedback()[from].at;
    let long_after = || async {
        let waited = site.tap.last_feedback()?.at.duration_since(began);
        (waited.unwrap_or_default() >= 3 * SENDER_TIMEOUT).then_some(())
    };
    eventually("status messages for three timeouts", PATIENCE, long_after).await?;
    let messages = site.tap.feedback();
    came_in_time(&messages[from..], SENDER_TIMEOUT / 2)?;
    for message in &messages[from..] {
        ensure!(
            message.flush == reported,
            "{} was reported, and {} before that, while both regions were frozen",
            lsn::show(message.flush),
            lsn::show(reported)
        );
    }
    Ok(())
}

#[tokio::test]
async fn fault_06_a_stalled_region_holds_the_position_but_not_the_feedback() -> Result<()> {
    let primary = PgCluster::builder(PgVersion::V15)
        .conf("wal_sender_timeout", &format!("{}ms", SENDER_TIMEOUT.as_millis()));
    let site = Site::start(primary, 16).await?;
    site.tap.record();
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    site.all_durable().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;

    let walsender = walsender(&site).await?;
    let reported = freeze_in_turn(&site).await?;
    stalls(&site, reported).await?;
    ensure!(
        walsender == self::walsender(&site).await?,
        "the connection was lost while the regions were frozen"
    );
    let ends = site.stored_ends();
    ensure!(
        ends.iter().all(|end| *end >= reported),
        "more was reported than both hold: {:?}",
        ends.map(lsn::show)
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
    holds_what_was_sent(&site)?;
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[1], site.regions[1].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

/// What `status` says while the first region is away: that one by name with its error, and that the policy is kept without it.
async fn status_names_the_region_that_is_away(site: &Site, end: u64) -> Result<()> {
    let program = site.agent()?.args(["--output", "json", "status"]);
    let said = program.output().await?;
    let document: serde_json::Value = serde_json::from_str(&said.stdout).with_context(|| said.said())?;
    let (away, there) = (&document["regions"][0], &document["regions"][1]);
    ensure!(
        away["name"] == REGIONS[0] && away["error"].is_string() && away["stored"].is_null(),
        "{document:#}"
    );
    ensure!(
        there["name"] == REGIONS[1] && there["error"].is_null(),
        "{document:#}"
    );
    let durable = document["durable"]["lsn"].as_str().map(lsn::parse).transpose()?;
    ensure!(
        said.code == 0 && durable >= Some(end),
        "exit code {}: {document:#}",
        said.code
    );
    Ok(())
}

/// What a region has taken of the WAL before `until` since it looked like `before` came in LSN order: nothing was stored behind
/// a hole. Larger objects for WAL that was there already may come at any time.
fn was_filled_in_order(before: &S3Snapshot, filled: &S3Snapshot, until: u64, segment: u64) -> Result<()> {
    let keys = filled.keys(BUCKET).into_iter();
    let mut came: Vec<(u64, u64, u64)> = keys
        .filter(|key| before.get(BUCKET, key).is_none())
        .filter_map(|key| {
            let (_, start, end) = archive::range_of(&key, segment)?;
            Some((filled.get(BUCKET, &key)?.sequence, start, end))
        })
        .filter(|(_, start, _)| *start < until)
        .collect();
    came.sort_unstable();
    ensure!(
        came.len() > 2,
        "only {} objects came: the test proves nothing",
        came.len()
    );
    let mut held = archive::wal_end(before, BUCKET, 1, segment);
    for (_, start, end) in came {
        ensure!(
            start <= held,
            "WAL from {} on was stored while there was none behind {}",
            lsn::show(start),
            lsn::show(held)
        );
        held = held.max(end);
    }
    Ok(())
}

#[tokio::test]
async fn fault_02_with_policy_any_a_region_that_is_down_is_filled_afterwards() -> Result<()> {
    let site = site("any").await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;

    site.regions[0].faults().refuse(true);
    let before = site.regions[0].snapshot();
    let ledger = Ledger::start(&site.primary, 2).await?;
    for _ in 0..3 {
        ledger.grow(50).await?;
        site.primary.sql("SELECT pg_switch_wal()").await?;
    }
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    // Safe by the policy, though one region is away.
    let end = site.all_durable().await?;
    ensure!(site.stored_ends()[0] < end && site.stored_ends()[1] >= end);
    // A new agent has nothing of it in memory: it comes from the other region.
    agent.kill9();
    let agent = site.start_agent().await?;
    status_names_the_region_that_is_away(&site, end).await?;

    site.regions[0].faults().refuse(false);
    both_hold(&site, end).await?;
    // The segment that is being written is sent by the server again, and stored as it comes.
    let until = end - end % site.segment_size();
    was_filled_in_order(&before, &site.regions[0].snapshot(), until, site.segment_size())?;
    drop(agent);
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

/// What the agent answers on its own port.
async fn ask(port: u16, path: &str) -> Result<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// How long WAL has waited to become durable, in seconds.
async fn lag(port: u16) -> Option<f64> {
    let page = ask(port, "/metrics").await.ok()?;
    let mut lines = page.lines();
    lines.find_map(|line| line.strip_prefix("highwater_lag_seconds ")?.parse().ok())
}

/// The recovery point is not said to be breached.
async fn is_ready(port: u16) -> Result<()> {
    let answer = ask(port, "/readyz").await?;
    let status = answer.lines().next().unwrap_or_default();
    ensure!(status.contains("200"), "{answer}");
    Ok(())
}

/// One of three calls fails in both regions, and some replies are lost: WAL gets through all the same, and nobody is alarmed.
async fn storm(site: &Site, port: u16, ledger: &Ledger) -> Result<()> {
    for region in &site.regions {
        region.faults().fail_every(3, 503);
    }
    site.backup().await?;
    for _ in 0..5 {
        for region in &site.regions {
            region.faults().lose_replies(2);
        }
        ledger.grow(40).await?;
        is_ready(port).await?;
    }
    site.all_durable().await?;
    is_ready(port).await
}

/// No call that stores anything succeeds: nothing more is reported, and the time that WAL has waited grows, which is what a breach is
/// judged by. For these few seconds it is none yet.
async fn nothing_is_taken(site: &Site, port: u16) -> Result<()> {
    for region in &site.regions {
        region.faults().only(&[Operation::Put]);
        region.faults().fail_always(Some(503));
    }
    site.primary.sql("CREATE TABLE in_the_storm ()").await?;
    let written = site.position().await?;
    let waits = || async { lag(port).await.filter(|lag| *lag > WAITED) };
    eventually("the lag to grow", PATIENCE, waits).await?;
    ensure!(
        site.tap.highest_flush() < written,
        "what nobody took was reported"
    );
    is_ready(port).await
}

/// Waits until the agent says that nothing waits any more.
async fn nothing_waits(port: u16) -> Result<()> {
    let over = || async { lag(port).await.filter(|lag| *lag <= 0.0).map(drop) };
    eventually("the lag to be over", PATIENCE, over).await
}

#[tokio::test]
async fn fault_46_error_storms_and_lost_replies_change_nothing() -> Result<()> {
    let mut site = site("all").await?;
    site.settings += "[memory]\nlimit = \"64MiB\"\n";
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port();
    let listen = format!("127.0.0.1:{port}");
    let program = site.agent()?.env("HIGHWATER_ADMIN_LISTEN", listen);
    site.tap.record();
    let mut agent = program.arg("run").start()?;
    agent.says("streaming", PATIENCE).await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    site.all_durable().await?;
    storm(&site, port, &ledger)
        .await
        .with_context(|| agent.last_words())?;
    nothing_is_taken(&site, port)
        .await
        .with_context(|| agent.last_words())?;
    let log = ledger.stop().await;
    site.regions.iter().for_each(|region| region.faults().clear());
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    both_hold(&site, end).await?;
    nothing_waits(port).await?;
    is_ready(port).await?;
    let peak = agent.peak_memory()?;
    ensure!(peak < STORM_MEMORY, "{} MiB resident", peak >> 20);
    ensure!(agent.is_running(), "the agent has left:\n{}", agent.last_words());
    drop(agent);
    holds_what_was_sent(&site)?;
    for (name, region) in REGIONS.iter().zip(&site.regions) {
        let place = RestoreSite::new(PgVersion::V15, &[(name, region.as_ref())])?;
        log.check(&place.recovered("data", &[]).await?, Expect::everything())
            .await
            .context(*name)?;
    }
    Ok(())
}

/// Damages objects of each region that the other one has, at random, but of each region at least one in each way.
fn damage_apart(site: &Site, dice: &mut Dice) -> Result<()> {
    for part in ["/wal/", "/pack/"] {
        let mut keys = site.regions[0].objects(BUCKET);
        keys.retain(|key| key.contains(part) && site.regions[1].get(BUCKET, key).is_some());
        ensure!(keys.len() >= 4, "only {} objects below {part}", keys.len());
        // The first four meet every fate, the others any or none.
        let fates = [(0, true), (1, true), (0, false), (1, false)];
        for nth in 0..keys.len() {
            let drawn = dice.below((keys.len() - nth) as u64);
            keys.swap(nth, nth + usize::try_from(drawn)?);
            let drawn = (!dice.once_in(3)).then(|| dice.one(&fates));
            let Some((region, deleted)) = fates.get(nth).copied().or(drawn) else {
                continue;
            };
            let (victim, key) = (&site.regions[region], &keys[nth]);
            let done = match deleted {
                true => victim.delete(BUCKET, key),
                false => victim.corrupt(BUCKET, key),
            };
            ensure!(done, "{} did not have {key}", REGIONS[region]);
        }
    }
    Ok(())
}

/// Each region misses what the other has: together they still restore everything. `HIGHWATER_TEST_SEED` repeats what is missing
/// where.
#[tokio::test]
async fn fault_40_damage_in_one_region_is_read_around() -> Result<()> {
    let mut dice = Dice::thrown();
    let seed = dice.seed();
    damage_is_read_around(&mut dice)
        .await
        .with_context(|| format!("HIGHWATER_TEST_SEED={seed}"))
}

async fn damage_is_read_around(dice: &mut Dice) -> Result<()> {
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
    damage_apart(&site, dice)?;
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
