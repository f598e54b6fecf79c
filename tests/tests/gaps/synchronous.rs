//! Commits that wait for the agent inside a gap return when a base backup has them, in as many regions as the policy asks for.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::program::Running;
use highwater_tests::s3::Operation;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{PgVersion, S3Server, archive, lsn};
use tokio::task::JoinHandle;

use super::support::{Agent, Loss, range_of, records, take_again};

/// Several of the agent's status messages: whoever wrongly lets commits return does so within the first.
const LONG: Duration = Duration::from_secs(3);

/// WAL that fills a segment, without a commit: that would wait.
const FILL: &str = "SELECT pg_logical_emit_message(false, 'filler', 'x'); SELECT pg_switch_wal()";

/// A commit that waits for the agent, and where its transaction was a moment before.
struct Waiting {
    commit: JoinHandle<Result<()>>,
    before: u64,
}

/// The commit is made while no agent streams, and the server removes its WAL before one does.
async fn wal_of_a_waiting_commit_is_lost(site: &Site, agent: &mut Running) -> Result<Waiting> {
    agent.kill9();
    site.primary.sql(FILL).await?;
    let before = site.position().await?;
    let client = site.primary.client().await?;
    let commit = tokio::spawn(async move {
        client.batch_execute("INSERT INTO kept VALUES ('inside')").await?;
        Ok(())
    });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    let waiting = || async { (site.primary.value(waits).await.ok()? == "1").then_some(()) };
    eventually("the commit to wait", PATIENCE, waiting).await?;
    for _ in 0..8 {
        site.primary.sql(FILL).await?;
    }
    let drop_slot = || async {
        let dropped = site.primary.sql("SELECT pg_drop_replication_slot('highwater')");
        dropped.await.ok()
    };
    eventually("the slot to be dropped", PATIENCE, drop_slot).await?;
    for _ in 0..2 {
        site.primary.sql("CHECKPOINT").await?;
    }
    Ok(Waiting { commit, before })
}

/// How many complete base backups each region has.
fn backups(site: &Site) -> Vec<usize> {
    let count = |region| archive::keys_with(region, BUCKET, "backup.json").len();
    site.snapshots().iter().map(count).collect()
}

/// Waits until the agent says that no commit returns.
async fn are_held_back(admin: &Agent) -> Result<()> {
    let held = || async { (admin.metric("highwater_commits_held_back").await? == 1).then_some(()) };
    eventually("commits to be held back", PATIENCE, held).await
}

/// Where the WAL of each region ends, whatever it lacks before.
fn ends(site: &Site) -> Option<Vec<u64>> {
    let end = |region| {
        Some(
            archive::wal(region, BUCKET, site.segment_size())
                .get(&1)?
                .runs()
                .last()?
                .1,
        )
    };
    site.snapshots().iter().map(end).collect()
}

/// When the agent is killed, and started again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Killed {
    Never,
    /// While no region has the base backup.
    Before,
    /// While one region has it.
    Between,
}

async fn commits_inside_a_gap_wait_for_the_base_backup(version: PgVersion, killed: Killed) -> Result<()> {
    let builder = Loss::Dropped
        .cluster(version)
        .conf("synchronous_standby_names", "highwater");
    let mut site = Site::start(builder, 1).await?;
    site.settings = "[wal]\nsynchronous = true\n[heal]\ninterval = \"1s\"\n".to_owned();
    let mut agent = site.start_agent().await?;
    site.primary.sql("CREATE TABLE kept (line text)").await?;
    site.backup().await?;
    let waiting = wal_of_a_waiting_commit_is_lost(&site, &mut agent).await?;

    // All of the base backup is stored but its commit mark.
    for region in &site.regions {
        region.faults().only(&[Operation::Put]);
        region.faults().only_keys("backup.json");
        region.faults().fail_always(Some(503));
    }
    let admin = Agent::new()?;
    let mut agent = admin.program(&site)?.arg("run").start()?;
    are_held_back(&admin).await.with_context(|| agent.last_words())?;
    if killed == Killed::Before {
        agent.kill9();
        agent = admin.program(&site)?.arg("run").start()?;
        are_held_back(&admin).await.with_context(|| agent.last_words())?;
    }
    site.regions[0].faults().clear();
    let in_one = || async { (backups(&site) == [2, 1]).then_some(()) };
    let seen = eventually("the base backup in one region", PATIENCE, in_one).await;
    seen.with_context(|| agent.last_words())?;
    if killed == Killed::Between {
        agent.kill9();
        agent = admin.program(&site)?.arg("run").start()?;
        are_held_back(&admin).await.with_context(|| agent.last_words())?;
    }
    agent.says("streaming", PATIENCE).await?;
    // The stream goes on behind the gap, and is durable there.
    site.primary.sql(FILL).await?;
    let end = lsn::parse(&site.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
    let behind = || async { (ends(&site)?.iter().all(|held| *held >= end)).then_some(()) };
    let gone_on = eventually("WAL behind the gap in both regions", PATIENCE, behind).await;
    gone_on.with_context(|| agent.last_words())?;
    tokio::time::sleep(LONG).await;
    ensure!(
        !waiting.commit.is_finished() && backups(&site)[1] == 1,
        "the commit returned, and {} has neither its WAL nor a base backup with it",
        REGIONS[1]
    );
    take_again(&site);
    let returned = tokio::time::timeout(PATIENCE, waiting.commit).await;
    let held = backups(&site);
    returned.with_context(|| agent.last_words())???;
    ensure!(
        held.iter().all(|held| *held >= 2),
        "it returned when the regions had {held:?} base backups"
    );
    inside_the_gap_and_restored(site, agent, waiting.before).await
}

/// The commit really is inside the gap, and either region alone brings it back when everything else is lost.
async fn inside_the_gap_and_restored(mut site: Site, mut agent: Running, before: u64) -> Result<()> {
    let copies = site.snapshots();
    site.primary.kill9();
    agent.kill9();
    let (key, _) = records(&site)?[0].first().cloned().context("no gap on record")?;
    let (start, end) = range_of(&key)?;
    ensure!(
        start <= before && before < end,
        "{} is not in the gap {key}",
        lsn::show(before)
    );
    for (name, copy) in REGIONS.iter().zip(copies) {
        let frozen = S3Server::serve(copy).await?;
        let place = RestoreSite::new(site.primary.version(), &[(name, &frozen)])?;
        let restored = place.recovered("data", &[]).await?;
        let rows = restored.value("SELECT count(*) FROM kept").await?;
        ensure!(rows == "1", "{name} alone brings back {rows} rows");
    }
    Ok(())
}

#[tokio::test]
async fn fault_10_commits_inside_a_gap_wait_for_the_base_backup_that_ends_it_on_15() -> Result<()> {
    commits_inside_a_gap_wait_for_the_base_backup(PgVersion::V15, Killed::Never).await
}

#[tokio::test]
async fn fault_10_commits_inside_a_gap_wait_for_the_base_backup_that_ends_it_on_18() -> Result<()> {
    commits_inside_a_gap_wait_for_the_base_backup(PgVersion::V18, Killed::Never).await
}

#[tokio::test]
async fn fault_10_commits_inside_a_gap_wait_although_the_agent_is_killed() -> Result<()> {
    commits_inside_a_gap_wait_for_the_base_backup(PgVersion::V17, Killed::Before).await
}

#[tokio::test]
async fn fault_10_commits_inside_a_gap_wait_although_the_agent_is_killed_when_one_region_has_it() -> Result<()>
{
    commits_inside_a_gap_wait_for_the_base_backup(PgVersion::V15, Killed::Between).await
}
