//! Promotions: whatever the agent has missed or seen too much of, the whole ancestry is archived, nothing that
//! was acknowledged is lost, and every timeline restores.

#[path = "sent/mod.rs"]
mod sent;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_format::{Lsn, Object};
use highwater_tests::ledger::{Expect, LedgerLog, Pace};
use highwater_tests::site::{BUCKET, REGIONS, RestoreSite, Site};
use highwater_tests::witness::Rules;
use highwater_tests::{FeedbackTap, Ledger, PgCluster, PgVersion, Stop, Witness, archive, lsn};
use serde_json::Value;

const TWO: Pace = Pace {
    clients: 2,
    pause: Duration::from_millis(2),
    filling: 100,
};

async fn flushed(server: &PgCluster) -> Result<u64> {
    server.sql("SELECT txid_current()").await?;
    lsn::parse(&server.value("SELECT pg_current_wal_flush_lsn()").await?)
}

/// What was acknowledged by a primary that is stopped for good, with its promoted standby in its place.
async fn switch_over(site: &mut Site, mut standby: PgCluster, log: LedgerLog) -> Result<(PgCluster, Ledger)> {
    site.primary.stop(Stop::Fast).await?;
    standby.promote().await?;
    std::mem::swap(&mut site.primary, &mut standby);
    let ledger = Ledger::resume(&site.primary, TWO, log).await?;
    ledger.grow(30).await?;
    Ok((standby, ledger))
}

/// Everything of `log` is restored from the second region alone, on the newest timeline.
async fn restores(site: &Site, version: PgVersion, log: &LedgerLog) -> Result<()> {
    let place = RestoreSite::new(version, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let restored = place.recovered("latest", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// The server writes `timeline`, and neither region took anything of a timeline before its history.
async fn has_entered(site: &Site, timeline: u32) -> Result<()> {
    let written = "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)";
    let written = site.primary.value(written).await?;
    ensure!(
        written == format!("{timeline:08X}"),
        "the server writes timeline {written}"
    );
    archive::histories_first(&site.snapshots(), BUCKET, site.segment_size())
}

/// Where the server went over to timeline 2, in its own words.
fn switch_point(server: &PgCluster) -> Result<String> {
    let history = std::fs::read_to_string(server.data_dir().join("pg_wal/00000002.history"))?;
    let switch = history.split_whitespace().nth(1).context("no switch point")?;
    Ok(switch.to_owned())
}

/// Of each chunk of a timeline: whether it claims that nothing was committed behind it by the server's clock.
fn proves(site: &Site, timeline: &str) -> Result<Vec<bool>> {
    let snapshot = &site.snapshots()[0];
    let tails = archive::keys_with(snapshot, BUCKET, &format!("/wal/{timeline}/tail/"));
    let stored = tails.iter().filter_map(|key| snapshot.get(BUCKET, key));
    let stored = stored.map(|stored| Ok(Object::open(stored.bytes.clone())?.header().server_end != Lsn::MAX));
    stored.collect()
}

/// The agent beside the standby is the only one. When the standby is promoted it goes over to the new timeline in
/// the middle of a segment; what it received of the old one stays as it was received.
async fn promotion_while_streaming_from_the_standby(version: PgVersion) -> Result<()> {
    let mut site = Site::start(PgCluster::builder(version), 16).await?;
    site.tap.record();
    let mut first = site.start_agent().await?;
    site.backup().await?;
    let standby = PgCluster::builder(version).standby_of(&site.primary).await?;
    first.terminate();
    first.wait_exit(Duration::from_secs(30)).await?;
    let of_the_primary = std::mem::replace(&mut site.tap, FeedbackTap::start(&standby).await?);
    site.tap.record();
    let witness = Witness::of(&site, Rules::all());
    let connection = site.tap.connection_string();
    let mut agent = site.agent_at(&connection)?.arg("run").start()?;
    agent.says("streaming", Duration::from_secs(30)).await?;
    let ledger = Ledger::start_paced(&site.primary, TWO).await?;
    ledger.grow(60).await?;
    let (_old, ledger) = switch_over(&mut site, standby, ledger.stop().await).await?;
    let log = ledger.stop().await;
    let end = flushed(&site.primary).await?;
    let archived = site.archived(2, end).await;
    archived.with_context(|| agent.last_words())?;
    ensure!(agent.is_running(), "{}", agent.last_words());
    has_entered(&site, 2).await?;
    // The standby was left everything, and so was the archive.
    let switch = lsn::parse(&switch_point(&site.primary)?)?;
    for (name, old_end) in REGIONS.iter().zip(site.stored_ends()) {
        ensure!(
            old_end == switch,
            "in {name} the old timeline ends at {}, on the server at {}",
            lsn::show(old_end),
            lsn::show(switch)
        );
    }
    sent::equals(&site, &[&of_the_primary, &site.tap])?;
    site.durable(end).await?;
    witness.satisfied()?;
    // A standby's clock proves nothing about the primary, and no reader may take it for that.
    let (first, second) = (proves(&site, "00000001")?, proves(&site, "00000002")?);
    ensure!(
        first.contains(&false),
        "the standby's agent stored nothing of timeline 1"
    );
    ensure!(
        !second.is_empty() && !second.contains(&false),
        "the primary's agent stores as a standby's"
    );
    // Beside the standby it had no say; the promotion made it the writer.
    ensure!(
        agent.stderr().contains("claimed the archive"),
        "{}",
        agent.last_words()
    );
    drop(agent);
    restores(&site, version, &log).await
}

#[tokio::test]
async fn fault_14_promotion_while_streaming_from_the_standby_on_15() -> Result<()> {
    promotion_while_streaming_from_the_standby(PgVersion::V15).await
}

#[tokio::test]
async fn fault_14_promotion_while_streaming_from_the_standby_on_17() -> Result<()> {
    promotion_while_streaming_from_the_standby(PgVersion::V17).await
}

#[tokio::test]
async fn fault_14_promotion_while_streaming_from_the_standby_on_18() -> Result<()> {
    promotion_while_streaming_from_the_standby(PgVersion::V18).await
}

/// While the agent is away the cluster is promoted twice, with commits on each timeline.
async fn two_promotions_missed(version: PgVersion) -> Result<()> {
    let builder = || PgCluster::builder(version).conf("wal_keep_size", "512MB");
    let mut site = Site::start(builder(), 16).await?;
    site.tap.record();
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, TWO).await?;
    ledger.grow(30).await?;
    site.backup().await?;
    agent.terminate();
    agent.wait_exit(Duration::from_secs(30)).await?;
    ledger.grow(30).await?;
    let second = builder().standby_of(&site.primary).await?;
    let (_first, ledger) = switch_over(&mut site, second, ledger.stop().await).await?;
    let third = builder().standby_of(&site.primary).await?;
    let (_second, ledger) = switch_over(&mut site, third, ledger.stop().await).await?;
    let log = ledger.stop().await;

    site.tap.redirect(&site.primary);
    let agent = site.agent()?.arg("run").start()?;
    let end = flushed(&site.primary).await?;
    let archived = site.archived(3, end).await;
    archived.with_context(|| agent.last_words())?;
    has_entered(&site, 3).await?;
    for (name, region) in REGIONS.iter().zip(site.snapshots()) {
        let [older, newer] = ["/wal/00000002/history", "/wal/00000003/history"]
            .map(|history| archive::keys_with(&region, BUCKET, history).concat());
        ensure!(
            archive::precedes(&region, BUCKET, &older, &newer),
            "{name} had {newer:?} before the history of timeline 2"
        );
    }
    sent::holds_what_was_sent(&site)?;
    // The clock of the third server is that of timeline 3: what is left of the others proves nothing of what came after.
    let of_the_first = proves(&site, "00000001")?;
    ensure!(
        of_the_first.contains(&true) && of_the_first.contains(&false),
        "timeline 1: {of_the_first:?}"
    );
    let of_the_second = proves(&site, "00000002")?;
    ensure!(!of_the_second.contains(&true), "timeline 2: {of_the_second:?}");
    ensure!(!of_the_second.is_empty(), "nothing of timeline 2");
    drop(agent);
    restores(&site, version, &log).await
}

#[tokio::test]
async fn fault_15_two_promotions_missed() -> Result<()> {
    two_promotions_missed(PgVersion::V15).await
}

#[tokio::test]
async fn fault_15_two_promotions_missed_on_postgresql_18() -> Result<()> {
    two_promotions_missed(PgVersion::V18).await
}

/// Timelines 2 to 4 are known to the standby already, as after test restores: it becomes timeline 5.
#[tokio::test]
async fn fault_16_next_timeline_is_not_current_plus_one() -> Result<()> {
    let version = PgVersion::V15;
    let mut site = Site::start(PgCluster::builder(version), 16).await?;
    let agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, TWO).await?;
    ledger.grow(30).await?;
    site.backup().await?;
    let standby = PgCluster::builder(version).standby_of(&site.primary).await?;
    for timeline in 2..=4 {
        let name = standby.data_dir().join(format!("pg_wal/{timeline:08X}.history"));
        std::fs::write(name, "1\t0/1000000\ta test\n")?;
    }
    let (_old, ledger) = switch_over(&mut site, standby, ledger.stop().await).await?;
    site.tap.redirect(&site.primary);
    let log = ledger.stop().await;
    let end = flushed(&site.primary).await?;
    let archived = site.archived(5, end).await;
    archived.with_context(|| agent.last_words())?;
    has_entered(&site, 5).await?;
    for (name, region) in REGIONS.iter().zip(site.snapshots()) {
        let invented = archive::keys_with(&region, BUCKET, "/wal/00000002/");
        ensure!(invented.is_empty(), "{name} holds {invented:?}");
    }
    drop(agent);
    restores(&site, version, &log).await
}

/// A standby that lacks the last commits is promoted. They stay in the archive, are named, and can be restored.
async fn agent_ahead_of_the_new_primary(version: PgVersion, restart: bool) -> Result<()> {
    let mut site = Site::start(PgCluster::builder(version), 16).await?;
    let mut agent = site.start_agent().await?;
    site.primary.sql("CREATE TABLE kept (line text)").await?;
    site.backup().await?;
    let mut standby = PgCluster::builder(version).standby_of(&site.primary).await?;
    standby.stop(Stop::Fast).await?;
    site.primary
        .sql("INSERT INTO kept SELECT 'only in the archive' FROM generate_series(1, 500)")
        .await?;
    let end = site.all_durable().await?;
    if restart {
        agent.terminate();
        agent.wait_exit(Duration::from_secs(30)).await?;
    }
    site.primary.kill9();
    standby.start_again().await?;
    standby.promote().await?;
    std::mem::swap(&mut site.primary, &mut standby);
    site.tap.redirect(&site.primary);
    if restart {
        agent = site.agent()?.arg("run").start()?;
    }
    site.primary
        .sql("INSERT INTO kept VALUES ('on the new timeline')")
        .await?;
    let new_end = flushed(&site.primary).await?;
    let archived = site.archived(2, new_end).await;
    archived.with_context(|| agent.last_words())?;
    agent.says("divergent branch", Duration::from_secs(20)).await?;

    // The switch as the server says it, the end as the archive's names do.
    let switch = switch_point(&site.primary)?;
    let kept = archive::wal_end(&site.snapshots()[1], BUCKET, 1, site.segment_size());
    ensure!(kept >= end);
    let range = format!("[{switch}, {})", lsn::show(kept));
    ensure!(
        agent.stderr().contains(&range),
        "not {range}: {}",
        agent.last_words()
    );
    let status = site.agent()?.arg("status").output().await?;
    ensure!(
        status.stdout.contains(&range),
        "status does not name {range}:\n{}",
        status.said()
    );
    drop(agent);

    let place = RestoreSite::new(version, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let list = place
        .program()?
        .args(["--output", "json", "list"])
        .output()
        .await?;
    let list: Value = serde_json::from_str(&list.expect_code(0)?.stdout)?;
    let branch = &list["answer"]["branches"][0];
    ensure!(
        branch["timeline"] == 1 && branch["start"] == switch && branch["end"] == lsn::show(kept),
        "{branch}"
    );
    let plan = place
        .program()?
        .args(["plan", "--timeline", "1"])
        .output()
        .await?
        .expect_code(0)?;
    ensure!(plan.stdout.contains("divergent branch"), "{}", plan.said());
    let rows = "SELECT count(*) FILTER (WHERE line = 'only in the archive'), count(*) FROM kept";
    for (name, target, expected) in [("old", &["--timeline", "1"][..], "500 500"), ("new", &[], "0 1")] {
        let restored = place.recovered(name, target).await?;
        let counted = restored.sql(rows).await?;
        let counted: Vec<_> = counted[0].iter().flatten().cloned().collect();
        ensure!(
            counted.join(" ") == expected,
            "{name}: {counted:?} instead of {expected}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn fault_17_the_running_agent_is_ahead_of_the_new_primary_on_15() -> Result<()> {
    agent_ahead_of_the_new_primary(PgVersion::V15, false).await
}

#[tokio::test]
async fn fault_17_the_running_agent_is_ahead_of_the_new_primary_on_18() -> Result<()> {
    agent_ahead_of_the_new_primary(PgVersion::V18, false).await
}

#[tokio::test]
async fn fault_17_an_agent_started_later_finds_itself_ahead_of_the_new_primary_on_15() -> Result<()> {
    agent_ahead_of_the_new_primary(PgVersion::V15, true).await
}

#[tokio::test]
async fn fault_17_an_agent_started_later_finds_itself_ahead_of_the_new_primary_on_17() -> Result<()> {
    agent_ahead_of_the_new_primary(PgVersion::V17, true).await
}

#[tokio::test]
async fn fault_17_an_agent_started_later_finds_itself_ahead_of_the_new_primary_on_18() -> Result<()> {
    agent_ahead_of_the_new_primary(PgVersion::V18, true).await
}
