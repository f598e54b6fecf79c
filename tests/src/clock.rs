//! The harness's one reading of the wall clock, and its one way to wait for something.

use std::future::Future;
use std::time::{Duration, Instant, SystemTime};

/// The machine's time. PostgreSQL under test runs on the same machine and so on the same clock.
#[must_use]
#[expect(
    clippy::disallowed_methods,
    reason = "tests compare the times that PostgreSQL stamps with the machine's clock"
)]
pub fn now() -> SystemTime {
    SystemTime::now()
}

/// Microseconds since 1970 of a time of the machine's clock.
#[must_use]
pub fn unix_micros(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// The present moment, returned when its second is over: what is done from then on is later also for a store that dates its
/// versions to the second.
///
/// # Errors
/// When the clock stands still.
pub async fn second_over() -> anyhow::Result<SystemTime> {
    let (moment, second) = (now(), |time| unix_micros(time) / 1_000_000);
    let over = || async { (second(now()) > second(moment)).then_some(moment) };
    eventually("the next second", Duration::from_secs(60), over).await
}

/// Waits until `probe` gives a value, asking every 20 ms, at most for `limit`.
///
/// # Errors
/// The description of what was awaited, when it did not come in time.
pub async fn eventually<T, F>(what: &str, limit: Duration, mut probe: impl FnMut() -> F) -> anyhow::Result<T>
where
    F: Future<Output = Option<T>>,
{
    let started = Instant::now();
    loop {
        if let Some(value) = probe().await {
            return Ok(value);
        }
        if started.elapsed() > limit {
            anyhow::bail!("waited {limit:?} in vain for {what}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
