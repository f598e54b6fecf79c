//! The sign of life in every region: one small object, rewritten every few seconds.
//!
//! It tells "nothing happened" from "the agent is dead": it says up to which moment of the server's clock
//! nothing lies beyond the stored WAL. Each region has its own, with its own position, and a region that
//! does not answer holds up no other. Each beat looks first whether the writer claim still holds there; an agent
//! that has none (its server is a standby, or another writer has taken its place) writes no pulse.

use std::sync::Arc;
use std::time::Duration;

use highwater_format::{Lsn, Pulse, Quorum, TimelineId, records};
use highwater_store::{Object, PutMode};
use tokio_util::sync::CancellationToken;

use crate::error::{AgentError, Result};
use crate::region::Region;
use crate::state::Snapshot;
use crate::uploader::Shared;
use crate::writer::Claims;

/// Writes one region's pulse until cancelled.
pub async fn run(
    shared: Shared,
    region: Arc<Region>,
    interval: Duration,
    claims: Arc<Claims>,
    cancel: CancellationToken,
) {
    let mut sequence = 0;
    while cancel
        .run_until_cancelled(tokio::time::sleep(interval))
        .await
        .is_some()
    {
        sequence += 1;
        if let Some(written) = cancel
            .run_until_cancelled(write(&shared, &region, &claims, sequence))
            .await
        {
            log(&region, written);
        }
    }
    // The last one says how far the archive goes, for whoever looks at it after the agent has stopped.
    if let Ok(written) = tokio::time::timeout(interval, write(&shared, &region, &claims, sequence + 1)).await
    {
        log(&region, written);
    }
}

fn log(region: &Region, written: Result<()>) {
    if let Err(error) = written {
        tracing::warn!(region = region.name, %error, "the pulse could not be written");
    }
}

async fn write(shared: &Shared, region: &Region, claims: &Claims, sequence: u64) -> Result<()> {
    if !claims.look(region).await? || !claims.is_writer() {
        return Ok(());
    }
    let Some(pulse) = pulse(&shared.state.snapshot(), region.index, claims, sequence) else {
        return Ok(());
    };
    let document = records::encode(&pulse).map_err(|source| AgentError::Encode {
        what: "a pulse".into(),
        source,
    })?;
    region
        .quick
        .put(
            &shared.archive.layout.pulse(),
            Object::new(document),
            PutMode::Overwrite,
        )
        .await?;
    Ok(())
}

/// What can be said now; nothing before the server and the region have been heard.
fn pulse(snapshot: &Snapshot, index: usize, claims: &Claims, sequence: u64) -> Option<Pulse> {
    let view = snapshot.regions.get(index)?;
    // What the server says belongs to the timeline that is streamed; a region on another one has its own story.
    let timeline: TimelineId = view
        .timeline
        .filter(|timeline| snapshot.timeline == Some(*timeline))?;
    Some(Pulse {
        timeline,
        server_time: snapshot.server_time?,
        wal_end: snapshot.server_end,
        durable_lsn: snapshot.durable,
        stored_lsn: if view.stored == Lsn::ZERO {
            return None;
        } else {
            view.stored
        },
        last_commit: snapshot.durable_commit,
        instance: claims.instance().to_owned(),
        sequence,
        quorum: quorum(snapshot),
        interval_ms: u64::try_from(claims.interval().as_millis()).ok(),
    })
}

/// What the policy asks for, so that a reader of one region knows what that region alone can prove.
fn quorum(snapshot: &Snapshot) -> Option<Quorum> {
    let needed = u32::try_from(snapshot.needed).ok().filter(|needed| *needed > 0)?;
    let regions = u32::try_from(snapshot.regions.len()).ok()?;
    Some(Quorum { needed, regions })
}
