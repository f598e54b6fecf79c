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
    let passed = soak::schedule(seed, Duration::from_secs(8), keep.path()).await?;
    ensure!(!passed.faults.is_empty() && passed.promised > 0, "{passed:?}");
    Ok(())
}

#[tokio::test]
async fn nothing_grows_while_both_regions_are_frozen() -> Result<()> {
    let measured = soak::both_regions_frozen(Duration::from_secs(12)).await?;
    ensure!(measured.wal_bytes > 1 << 20, "hardly any load: {measured:?}");
    Ok(())
}
