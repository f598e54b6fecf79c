//! The sign of life in every region: one small object, rewritten every few seconds.
//!
//! It tells "nothing happened" from "the agent is dead": it says up to which moment of the server's clock
//! nothing lies beyond the stored WAL. Each region has its own, with its own position, and a region that
//! does not answer holds up no other. Each beat follows a look whether the writer claim still holds there, and a pulse that
//! hangs does not hold up the next look; an agent
//! that has no claim (its server is a standby, or another writer has taken its place) writes no pulse.

use std::sync::Arc;
use std::time::Duration;

use highwater_format::{Lsn, Pulse, Quorum, TimelineId, records};
use highwater_store::{Object, PutMode};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::error::{AgentError, Result};
use crate::lease::Moment;
use crate::metrics;
use crate::region::Region;
use crate::state::Snapshot;
use crate::uploader::Shared;
use crate::writer::Claims;

/// Between two looks that somebody waits for.
const AGAIN: Duration = Duration::from_millis(500);

/// The same after one that has failed.
const AGAIN_AFTER_TROUBLE: Duration = Duration::from_secs(2);

/// How long the last pulse may take: the process waits for it.
const LAST: Duration = Duration::from_secs(5);

/// Looks at the claims of one region, and writes its pulse, until cancelled. Fails only where the agent has to begin anew.
pub async fn run(
    shared: Shared,
    region: Arc<Region>,
    interval: Duration,
    claims: Arc<Claims>,
    cancel: CancellationToken,
) -> Result<()> {
    let beat = Notify::new();
    let looks = Box::pin(async {
        let mut failed = false;
        loop {
            next(&region, interval, &claims, failed).await;
            let looked = claims.look(&region).await;
            if let Err(error @ AgentError::Restart { .. }) = looked {
                return error;
            }
            failed = looked.is_err();
            if log(&region, looked) == Some(true) {
                beat.notify_one();
            }
        }
    });
    let mut sequence = 0;
    let beats = Box::pin(async {
        loop {
            beat.notified().await;
            sequence += 1;
            log(&region, write(&shared, &region, &claims, sequence).await);
        }
    });
    let ended = cancel.run_until_cancelled(async {
        tokio::select! {
            biased;
            error = looks => error,
            () = beats => AgentError::Cancelled,
        }
    });
    if let Some(error) = ended.await {
        return Err(error);
    }
    // The last one says how far the archive goes, for whoever looks at it after the agent has stopped.
    let last = async {
        match claims.look(&region).await? {
            true => write(&shared, &region, &claims, sequence + 1).await,
            false => Ok(()),
        }
    };
    if let Ok(written) = tokio::time::timeout(interval.min(LAST), last).await {
        log(&region, written);
    }
    Ok(())
}

/// An interval, or less where something waits to be stored until a writer has looked.
async fn next(region: &Region, interval: Duration, claims: &Claims, failed: bool) {
    let wanted = async {
        tokio::time::sleep(if failed { AGAIN_AFTER_TROUBLE } else { AGAIN }).await;
        while !claims.is_writer() {
            tokio::time::sleep(AGAIN).await;
        }
        region.lease.wanted().await;
    };
    tokio::select! {
        () = tokio::time::sleep(interval) => {}
        () = wanted => {}
    }
}

fn log<T>(region: &Region, done: Result<T>) -> Option<T> {
    done.inspect_err(|error| tracing::warn!(region = region.name, %error, "the pulse could not be written"))
        .ok()
}

async fn write(shared: &Shared, region: &Region, claims: &Claims, sequence: u64) -> Result<()> {
    let pulse = pulse(&shared.state.snapshot(), region.index, claims, sequence);
    // The claim may be gone since the look.
    let Some(pulse) = pulse.filter(|_| claims.is_writer()) else {
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
    // After a failover to a server that lagged, what is durable on the timeline before may lie behind the switch: of
    // this one nothing is.
    let durable_lsn = match snapshot.durable_timeline == Some(timeline) {
        true => snapshot.durable,
        false => Lsn::ZERO,
    };
    Some(Pulse {
        timeline,
        server_time: snapshot.server_time?,
        wal_end: snapshot.server_end,
        durable_lsn,
        stored_lsn: if view.stored == Lsn::ZERO {
            return None;
        } else {
            view.stored
        },
        last_commit: snapshot.durable_commit,
        instance: claims.instance().to_owned(),
        sequence,
        quorum: quorum(snapshot),
        interval_ms: claims.interval_ms(),
        waiting_ms: waiting(snapshot, Moment::now()),
        answered_at: snapshot.answered_at,
    })
}

/// For how long WAL has waited, whatever the wall clock was set to meanwhile: whoever finds fresh pulses must not take them for a
/// sign that the recovery point is kept.
fn waiting(snapshot: &Snapshot, now: Moment) -> Option<u64> {
    let waited = Duration::from_secs_f64(metrics::lag_seconds(snapshot, now));
    u64::try_from(waited.as_millis()).ok()
}

/// What the policy asks for, so that a reader of one region knows what that region alone can prove.
fn quorum(snapshot: &Snapshot) -> Option<Quorum> {
    let needed = u32::try_from(snapshot.needed).ok().filter(|needed| *needed > 0)?;
    let regions = u32::try_from(snapshot.regions.len()).ok()?;
    Some(Quorum { needed, regions })
}

#[cfg(test)]
mod tests {
    use highwater_config::Policy;
    use highwater_format::Time;

    use super::*;
    use crate::clock::Clock;
    use crate::frontier::Position;
    use crate::state::RegionView;
    use crate::test_world::world;
    use crate::writer::Me;

    fn claims(shared: &Shared, now: Time) -> Claims {
        Claims::new(
            Me::beside(""),
            &shared.archive,
            shared.state.clone(),
            Clock::held_at(now),
            Duration::from_secs(5),
            false,
        )
    }

    /// A failover to a server that lagged: one region follows, the others take no writes and hold more of the old timeline
    /// than the new one has.
    #[tokio::test]
    async fn nothing_is_durable_on_a_timeline_on_which_the_policy_is_not_met() {
        let shared = world(Policy::All).shared;
        let (old, new) = (TimelineId::FIRST, TimelineId::new(2).unwrap());
        let stored = |region, timeline, lsn| {
            let lsn = Lsn(lsn);
            shared.progress.stored(region, Position { timeline, lsn });
        };
        let time = Time::from_unix_micros(1);
        let claims = claims(&shared, time);
        let said = |timeline| {
            shared.state.update(|snapshot| {
                snapshot.timeline = Some(timeline);
                snapshot.server_time = Some(time);
            });
            let said = pulse(&shared.state.snapshot(), 0, &claims, 1).unwrap();
            (said.timeline, said.stored_lsn, said.durable_lsn)
        };
        (0..3).for_each(|region| stored(region, old, 0x500));
        assert_eq!(said(old), (old, Lsn(0x500), Lsn(0x500)));
        stored(0, new, 0x420);
        assert_eq!(said(new), (new, Lsn(0x420), Lsn::ZERO));
        stored(1, new, 0x410);
        stored(2, new, 0x420);
        assert_eq!(said(new), (new, Lsn(0x420), Lsn(0x410)));
    }

    #[tokio::test(start_paused = true)]
    async fn it_says_for_how_long_wal_has_waited() {
        let shared = world(Policy::All).shared;
        let began = Time::from_unix_micros(1_000_000);
        // The wall clock was set back by as much as WAL has waited.
        let claims = claims(&shared, began);
        let timeline = Some(TimelineId::FIRST);
        let mut snapshot = Snapshot {
            timeline,
            server_time: Some(began),
            received: Lsn(0x500),
            durable: Lsn(0x400),
            durable_timeline: timeline,
            current_at: Some(Clock::held_at(began).stamp()),
            regions: vec![RegionView {
                timeline,
                stored: Lsn(0x500),
                ..RegionView::default()
            }],
            ..Snapshot::default()
        };
        let waiting = |snapshot: &Snapshot| pulse(snapshot, 0, &claims, 1).unwrap().waiting_ms;
        tokio::time::advance(Duration::from_secs(10_800)).await;
        assert_eq!(waiting(&snapshot), Some(10_800_000));
        snapshot.durable = Lsn(0x500);
        assert_eq!(waiting(&snapshot), Some(0));
    }
}
