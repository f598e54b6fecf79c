//! What the pulse of a region says, for tests that wait until the archive itself tells of something.

use anyhow::Result;
use highwater_format::{Pulse, records};
use highwater_tests::S3Server;
use highwater_tests::clock::eventually;
use highwater_tests::site::{BUCKET, PATIENCE};

/// Waits until the pulse of a region tells enough.
pub(crate) async fn until_pulse(region: &S3Server, enough: impl Fn(&Pulse) -> bool) -> Result<()> {
    let told = || async { pulse_of(region).filter(&enough).map(drop) };
    eventually("the pulse to tell of it", PATIENCE, told).await
}

fn pulse_of(region: &S3Server) -> Option<Pulse> {
    let keys = region.objects(BUCKET);
    let key = keys.iter().find(|key| key.ends_with("/pulse.json"))?;
    records::decode(&region.get(BUCKET, key)?.bytes).ok()
}
