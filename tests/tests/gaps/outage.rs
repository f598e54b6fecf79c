//! Storage that stays away, and what gives way.

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgVersion, lsn};

use crate::support::{
    Agent, Loss, SLOW, backed_up, go_away, now, one_gap, records, recycle, restores_around, stop_taking,
    take_again, write_segments,
};

/// Rows that do not compress, more than the agent's memory takes.
async fn flood(site: &Site) -> Result<()> {
    const MORE_THAN_MEMORY: u64 = 50 << 20;
    let start = site.position().await?;
    site.primary
        .sql(
            "CREATE TABLE flood AS SELECT decode(string_agg(md5(g::text || r::text), ''), 'hex') AS bytes
               FROM generate_series(1, 1000) r, generate_series(1, 100) g GROUP BY r;
             ALTER TABLE flood ALTER bytes SET STORAGE EXTERNAL",
        )
        .await?;
    while site.position().await? < start + MORE_THAN_MEMORY {
        site.primary
            .sql("INSERT INTO flood SELECT * FROM flood LIMIT 3000")
            .await?;
    }
    site.primary.sql("DROP TABLE flood").await?;
    Ok(())
}

/// No region takes WAL for longer than the operator allows: the slot is given up, aloud; when storage is back the gap is
/// recorded and a base backup ends it.
#[tokio::test]
async fn fault_03_give_up_when_storage_stays_away() -> Result<()> {
    storage_stays_away(None).await
}

/// The same for an agent that is killed and cannot even read where the archive ends when it is started again.
#[tokio::test]
async fn fault_03_give_up_by_an_agent_that_cannot_begin() -> Result<()> {
    storage_stays_away(Some(503)).await
}

/// Nor while somebody has to let the agent in first.
#[tokio::test]
async fn fault_03_give_up_by_an_agent_that_is_not_let_in() -> Result<()> {
    storage_stays_away(Some(403)).await
}

/// `begins_with`: the agent is killed, and hears only that from the regions when it is started again.
async fn storage_stays_away(begins_with: Option<u16>) -> Result<()> {
    let mut site = Site::start(Loss::Dropped.cluster(PgVersion::V15), 1).await?;
    site.settings += "[memory]\nlimit = \"64MiB\"\n[outage]\npolicy = \"give-up\"\nmax_backlog = \"8MiB\"\npatience = \"5s\"\n";
    let with_status = Agent::new()?;
    let mut agent = with_status.program(&site)?.arg("run").start()?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    let before = now(&site).await?;
    ledger.grow(20).await?;
    site.all_durable().await?;

    match begins_with {
        None => stop_taking(&site),
        Some(status) => {
            go_away(&site, status);
            agent.kill9();
            agent.wait_exit(PATIENCE).await?;
            agent = with_status.program(&site)?.arg("run").start()?;
        }
    }
    flood(&site).await?;
    ledger.grow(20).await?;
    let inside = now(&site).await?;
    ledger.grow(20).await?;
    agent.says("GAVE UP THE SLOT", PATIENCE).await?;
    let status = with_status.program(&site)?.arg("status").output().await?;
    ensure!(
        status.code == 1 && status.stdout.contains("max_backlog") && status.stdout.contains("room not known"),
        "{}",
        status.said()
    );
    // What the new slot holds from then on counts anew.
    let moved = || async {
        recycle(&site).await.ok()?;
        let slot = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'highwater'";
        let restart = lsn::parse(&site.primary.value(slot).await.ok()?).ok()?;
        (restart > inside.lsn).then_some(())
    };
    eventually("the slot to let go", PATIENCE, moved)
        .await
        .with_context(|| agent.last_words())?;
    recycle(&site).await?;
    ensure!(
        site.tap.highest_flush() < inside.lsn,
        "more was reported than is stored"
    );

    take_again(&site);
    backed_up(&site, 2, &agent).await?;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    let well = || async {
        let status = with_status
            .program(&site)
            .ok()?
            .arg("status")
            .output()
            .await
            .ok()?;
        (status.code == 0).then_some(())
    };
    eventually("the status to be well again", PATIENCE, well)
        .await
        .with_context(|| agent.last_words())?;
    let said = agent.stderr();
    drop(agent);
    let gap = one_gap(&site, "given up by outage.policy").context(said)?;
    restores_around(&site, &log, (&before, &inside), gap, "given up by outage.policy").await
}

/// The server gives the slot up under an agent that cannot store anything but has everything in memory: the slot is made
/// anew, and there is no gap.
#[tokio::test]
async fn fault_10_a_slot_lost_under_a_running_agent_costs_nothing_that_memory_holds() -> Result<()> {
    let site = Site::start(Loss::Outgrown.cluster(PgVersion::V17), 1).await?;
    let agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    site.backup().await?;
    ledger.grow(20).await?;
    stop_taking(&site);
    write_segments(&site, 6).await?;
    let end = site.position().await?;
    let received = || async { (site.tap.last_feedback()?.write >= end).then_some(()) };
    eventually("the agent to have it all", PATIENCE, received).await?;
    let made_anew = || async {
        site.primary.sql("CHECKPOINT").await.ok()?;
        agent
            .stderr()
            .contains("dropped the replication slot")
            .then_some(())
    };
    eventually("the slot to be lost and made anew", PATIENCE, made_anew)
        .await
        .with_context(|| agent.last_words())?;
    ledger.grow(20).await?;
    take_again(&site);
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    drop(agent);
    ensure!(
        records(&site)?.iter().all(Vec::is_empty),
        "a gap: {:?}",
        records(&site)?
    );
    let place = RestoreSite::new(PgVersion::V17, &[(REGIONS[0], site.regions[0].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}
