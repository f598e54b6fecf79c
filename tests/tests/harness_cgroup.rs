//! The harness itself: control groups that bound memory.

use std::time::Duration;

use anyhow::{Result, ensure};
use highwater_tests::cgroup::MemoryGroup;
use highwater_tests::{Program, skip};

const LIMIT: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A pipe's reader that keeps so many bytes.
fn holding(mib: u32) -> Result<Program> {
    let bytes = u64::from(mib) << 20;
    let script = format!("head -c {bytes} /dev/zero | tail -c {bytes} | wc -c");
    Ok(Program::other("sh")?.args(["-c", &script]))
}

#[tokio::test]
async fn the_kernel_kills_who_takes_more_than_the_group_has() -> Result<()> {
    let group = match MemoryGroup::new(LIMIT) {
        Ok(group) => group,
        Err(why) => return skip::not_allowed(&why),
    };
    let fits = group.start(&holding(16)?).await?.finish(PATIENCE).await?;
    ensure!(fits.stdout.trim() == (16 << 20).to_string(), "{}", fits.said());
    ensure!(group.killed()? == 0);
    ensure!(
        group.peak().unwrap_or(LIMIT) >= 16 << 20,
        "it was not in the group"
    );

    let bursts = group.start(&holding(256)?).await?.finish(PATIENCE).await?;
    ensure!(bursts.stdout.trim() == "0", "{}", bursts.said());
    ensure!(group.killed()? > 0, "nobody was killed");
    Ok(())
}

#[tokio::test]
async fn a_dropped_group_leaves_neither_processes_nor_itself() -> Result<()> {
    let group = match MemoryGroup::new(LIMIT) {
        Ok(group) => group,
        Err(why) => return skip::not_allowed(&why),
    };
    let beside = MemoryGroup::new(LIMIT).map_err(anyhow::Error::msg)?;
    ensure!(group.path() != beside.path());
    let mut sleeper = group.start(&Program::other("sleep")?.arg("1000")).await?;
    ensure!(group.members()? == [sleeper.pid()]);
    ensure!(beside.members()?.is_empty());
    let path = group.path().to_owned();
    drop(group);
    ensure!(!path.exists(), "{} is left", path.display());
    ensure!(sleeper.wait_exit(PATIENCE).await? == 128 + 9);
    Ok(())
}
