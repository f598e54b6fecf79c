//! The soak itself works: one short schedule and one short outage. `scripts/soak.sh` runs them for as long as one likes.

use std::time::Duration;

use anyhow::{Result, ensure};
use highwater_tests::TestDir;
use highwater_tests::dice::Dice;
use highwater_tests::soak;

#[tokio::test]
async fn a_short_schedule_passes() -> Result<()> {
    let seed = Dice::thrown().seed();
    let keep = TestDir::new()?;
    // Eight seconds may be over before anything of the ledger was promised, as where the agent was stopped all the time: such a
    // schedule proves little.
    for seed in seed..seed + 5 {
        let passed = soak::schedule(seed, Duration::from_secs(8), keep.path()).await?;
        ensure!(!passed.faults.is_empty() && passed.commits > 0, "{passed:?}");
        if passed.promised > 0 {
            return Ok(());
        }
    }
    anyhow::bail!("five schedules from seed {seed} on, and nothing was ever promised")
}

#[tokio::test]
async fn nothing_grows_while_both_regions_are_frozen() -> Result<()> {
    let measured = soak::both_regions_frozen(Duration::from_secs(12)).await?;
    ensure!(measured.wal_bytes > 1 << 20, "hardly any load: {measured:?}");
    Ok(())
}
