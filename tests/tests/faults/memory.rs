//! The agent where the kernel bounds its memory, as it does in a container or in a unit with `MemoryMax`, and WAL comes faster
//! than storage takes it.

use anyhow::{Context, Result, ensure};
use highwater_tests::cgroup::MemoryGroup;
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::program::Running;
use highwater_tests::site::{PATIENCE, Site};
use highwater_tests::{Ledger, PgCluster, skip};

use crate::support::{VERSION, backups, both_hold, from_region, leave};

/// What the unit that comes with the agent gives it.
const UNIT: &str = include_str!("../../../deploy/systemd/highwater-agent.service");

/// What the agent takes though no region takes anything.
const HELD: u64 = 64 << 20;

/// A table of about so many MiB, and as much WAL.
fn fill(table: &str, mib: u64) -> String {
    let rows = mib * 1100;
    format!(
        "CREATE TABLE {table} AS SELECT g AS id, repeat(md5(g::text), 28) AS t FROM generate_series(1, {rows}) g"
    )
}

fn unit_memory() -> Result<u64> {
    let told = UNIT.lines().find_map(|line| line.strip_prefix("MemoryMax="));
    let mib = told
        .and_then(|told| told.strip_suffix('M'))
        .context("MemoryMax")?;
    Ok(mib.parse::<u64>()? << 20)
}

/// With the default `memory.limit`, and nothing that becomes smaller by compression.
async fn site() -> Result<Site> {
    let mut site = Site::start(PgCluster::builder(VERSION).conf("max_wal_size", "4GB"), 16).await?;
    site.settings = site
        .settings
        .replace("[wal]\n", "[wal]\ncompression = \"none\"\n");
    site.settings += "[backup]\ncompression = \"none\"\n";
    Ok(site)
}

/// More WAL than `memory` is written while no region takes anything, and the agent has taken what it has room for.
async fn overwhelm(site: &Site, memory: u64) -> Result<()> {
    let (position, taken) = (site.position().await?, site.tap.sent().wal_bytes);
    site.regions.iter().for_each(|region| region.faults().freeze());
    site.primary.sql(&fill("load", (memory >> 20) * 5 / 4)).await?;
    let written = site.position().await? - position;
    ensure!(
        written > memory,
        "{} MiB of WAL fit into the group",
        written >> 20
    );
    // Nearly half of the default `memory.limit` fits.
    let full = || async { (site.tap.sent().wal_bytes - taken > HELD).then_some(()) };
    eventually("the agent to take what it has room for", PATIENCE, full).await
}

/// It is the process that was started, it was never killed, and it was in the group with what it held.
fn lives(agent: &mut Running, group: &MemoryGroup) -> Result<()> {
    ensure!(
        group.killed()? == 0,
        "{} were killed for want of memory",
        group.killed()?
    );
    ensure!(agent.is_running(), "the agent has left:\n{}", agent.last_words());
    ensure!(group.members()? == [agent.pid()], "the agent is not in its group");
    // Some kernels do not say it.
    let peak = group.peak().unwrap_or(u64::MAX);
    ensure!(peak > HELD, "{} MiB: the agent held nothing", peak >> 20);
    Ok(())
}

/// In as much as `memory.limit` says: what does not fit stays with PostgreSQL.
#[tokio::test]
async fn fault_23_in_a_control_group_of_256_mb_the_agent_lives_and_recovers() -> Result<()> {
    const MEMORY: u64 = 256 << 20;
    let group = match MemoryGroup::new(MEMORY) {
        Ok(group) => group,
        Err(why) => return skip::not_allowed(&why),
    };
    let site = site().await?;
    let mut agent = group.start(&site.agent()?.arg("run")).await?;
    agent.says("streaming", PATIENCE).await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(30).await?;
    overwhelm(&site, MEMORY).await?;
    ledger.grow(30).await?;
    lives(&mut agent, &group)?;

    // One comes back long before the other, and is filled from what the server still has.
    site.regions[0].faults().thaw();
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    site.regions[1].faults().thaw();
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    both_hold(&site, end).await?;
    lives(&mut agent, &group)?;
    leave(agent).await?;
    let place = from_region(&site, 1)?;
    let restored = place.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// As the unit has it, a base backup on top.
#[tokio::test]
async fn fault_23_with_the_memory_of_the_unit_a_base_backup_fits_on_top() -> Result<()> {
    let memory = unit_memory()?;
    let group = match MemoryGroup::new(memory) {
        Ok(group) => group,
        Err(why) => return skip::not_allowed(&why),
    };
    let mut site = site().await?;
    // More than the packs that are in flight at a time. Its WAL is behind a checkpoint, and so not to be archived first.
    site.primary.sql(&fill("content", 256)).await?;
    site.primary.sql("CHECKPOINT").await?;
    site.settings += "schedule = \"0 2 * * *\"\n";
    let mut agent = group.start(&site.agent()?.arg("run")).await?;
    // The archive has none: one is taken at once.
    let packs = || async {
        let keys = site.regions[0].objects(highwater_tests::site::BUCKET);
        keys.iter().any(|key| key.contains("/pack/")).then_some(())
    };
    eventually("a pack", PATIENCE, packs)
        .await
        .with_context(|| agent.last_words())?;
    ensure!(
        backups(&site, 0).is_empty(),
        "it is over already: this proves nothing"
    );
    overwhelm(&site, memory).await?;
    lives(&mut agent, &group)?;
    site.regions.iter().for_each(|region| region.faults().thaw());
    site.all_durable().await.with_context(|| agent.last_words())?;
    let taken = || async {
        (0..2)
            .all(|region| backups(&site, region).len() == 1)
            .then_some(())
    };
    eventually("the base backup in both regions", PATIENCE, taken)
        .await
        .with_context(|| agent.last_words())?;
    lives(&mut agent, &group)?;
    leave(agent).await?;
    Ok(())
}
