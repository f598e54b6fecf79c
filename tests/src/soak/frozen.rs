//! Both regions hang for a long time while the load goes on: nothing grows, the server hears from the agent in
//! time, and when the regions are back everything is stored without help.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::ledger::{Expect, Ledger, Pace};
use crate::postgres::{PgCluster, PgVersion};
use crate::program::Running;
use crate::site::{REGIONS, RestoreSite, Site};

/// Servers ask after half of it.
const WAL_SENDER_TIMEOUT: Duration = Duration::from_secs(10);
/// Well above the limit that is configured, for the program itself.
const MEMORY_BOUND: u64 = 200 << 20;
/// How much more memory the second half of the outage may take than the first.
const GROWTH_BOUND: u64 = 24 << 20;

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub struct Frozen {
    /// How long the regions hung.
    pub outage: Duration,
    /// WAL that was written meanwhile.
    pub wal_bytes: u64,
    /// The largest resident size in the first half of the outage, and in the second.
    pub memory: [u64; 2],
    /// The longest silence between two status messages.
    pub silence: Duration,
    /// From the end of the outage until everything was stored.
    pub recovery: Duration,
}

/// Freezes both regions for `outage`.
///
/// # Errors
/// When memory grows, a status message is late, the connection is lost, or something is missing in the end.
pub async fn both_regions_frozen(outage: Duration) -> Result<Frozen> {
    let timeout = format!("{}s", WAL_SENDER_TIMEOUT.as_secs());
    let builder = PgCluster::builder(PgVersion::V15)
        .conf("wal_sender_timeout", &timeout)
        .conf("max_wal_size", "512MB");
    let mut site = Site::start(builder, 16).await?;
    site.settings += "[memory]\nlimit = \"64MiB\"\n";
    let agent = site.start_agent().await?;
    site.backup().await?;
    let pace = Pace {
        clients: 4,
        pause: Duration::from_millis(20),
        filling: 4000,
    };
    let ledger = Ledger::start_paced(&site.primary, pace).await?;
    // Rows of blanks would be compressed away, and the WAL of an hour would fit into memory.
    site.primary
        .sql("ALTER TABLE ledger ALTER COLUMN filling SET STORAGE PLAIN")
        .await?;
    ledger.grow(100).await?;
    site.all_durable().await?;
    let (began_at, messages) = (site.position().await?, site.tap.feedback().len());
    site.regions.iter().for_each(|region| region.faults().freeze());
    let memory = [watch(&agent, outage / 2).await?, watch(&agent, outage / 2).await?];
    let wal_bytes = site.position().await? - began_at;
    let feedback = site.tap.feedback();
    site.regions.iter().for_each(|region| region.faults().thaw());
    let thawed = Instant::now();
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    let measured = Frozen {
        outage,
        wal_bytes,
        memory,
        silence: longest_silence(&feedback[messages.saturating_sub(1)..]),
        recovery: thawed.elapsed(),
    };
    let connections: std::collections::BTreeSet<_> = feedback[messages..]
        .iter()
        .map(|message| message.connection)
        .collect();
    ensure!(connections.len() == 1, "the connection was lost: {connections:?}");
    ensure!(
        measured.silence < WAL_SENDER_TIMEOUT / 2,
        "a status message was late: {measured:?}"
    );
    ensure!(
        memory.iter().all(|peak| *peak < MEMORY_BOUND),
        "too much memory: {measured:?}"
    );
    ensure!(memory[1] < memory[0] + GROWTH_BOUND, "memory grows: {measured:?}");
    drop(agent);
    site.primary.kill9();
    for (name, region) in REGIONS.iter().zip(&site.regions) {
        let place = RestoreSite::new(PgVersion::V15, &[(name, region.as_ref())])?;
        log.check(&place.recovered("data", &[]).await?, Expect::everything())
            .await?;
    }
    Ok(measured)
}

/// The largest resident size in a stretch of time.
async fn watch(agent: &Running, stretch: Duration) -> Result<u64> {
    let (began, mut largest) = (Instant::now(), 0);
    while began.elapsed() < stretch {
        largest = largest.max(agent.memory()?);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(largest)
}

fn longest_silence(feedback: &[crate::tap::Feedback]) -> Duration {
    let gaps = feedback
        .windows(2)
        .map(|pair| pair[1].at.duration_since(pair[0].at).unwrap_or_default());
    gaps.max().unwrap_or_default()
}
