//! What must hold before a base backup may begin.
//!
//! Owns: proof that the regions take writes and already hold the WAL right up to where the server is, and the
//! server's time once it has begun. A base backup without the WAL that follows it is worth nothing, and PostgreSQL recycles WAL
//! while a long one runs; so the stream must be stored first.
//! Does not own: the stream itself, nor the check at the end that the WAL of the whole backup is there.

use std::time::Duration;

use futures::future::join_all;
use highwater_format::records::Pulse;
use highwater_format::{Lsn, Time};
use highwater_pgwire::ConnInfo;
use tokio::time::{Instant, sleep};

use super::regions::Targets;
use super::stream::Position;
use super::wal::WalOf;
use crate::error::{AgentError, Result};
use crate::inventory;
use crate::region::Archive;
use crate::sql;

/// Between two looks at how far a region's WAL reaches.
const POLL: Duration = Duration::from_millis(250);

/// Waits until every live region holds the WAL up to `lsn`; regions that do not get there within `patience`
/// are given up, as far as the policy allows.
pub(crate) async fn confirm_stream(
    targets: &Targets,
    wal: &WalOf<'_>,
    lsn: Lsn,
    patience: Duration,
) -> Result<()> {
    let regions = targets.live().map(|target| async move {
        let started = Instant::now();
        loop {
            match wal.reaches(&*target.region.quick, lsn).await {
                Ok(true) => return (target, Ok(())),
                Ok(false) if started.elapsed() < patience => sleep(POLL).await,
                Ok(false) => return (target, Err(no_stream(&target.region.name, wal, lsn, patience))),
                Err(error) => return (target, Err(error)),
            }
        }
    });
    targets.settle(join_all(regions).await)
}

fn no_stream(region: &str, wal: &WalOf<'_>, lsn: Lsn, patience: Duration) -> AgentError {
    AgentError::refused(
        format!(
            "region {region} does not hold the WAL of timeline {} up to {lsn}, where the server was {} s ago. A base \
             backup could not be restored without the WAL that follows it, so none was begun",
            wal.timeline,
            patience.as_secs()
        ),
        "Start `highwater-agent run` and leave it running, or see with `highwater-agent status` why it is behind",
    )
}

/// The server's clock once the backup has begun: asked by SQL, or where the role may only replicate, taken from a
/// pulse that the running agent wrote. Names and orders backups, so the clock of this machine will not do.
///
/// Never earlier than the start of the backup: its files hold what was committed before `start`, so a restore to an
/// earlier time must not take it. A pulse says so if it saw the server at or behind `start`; one that does is waited
/// for up to `patience`.
pub(crate) async fn server_time(
    conn: &ConnInfo,
    archive: &Archive,
    start: Position,
    patience: Duration,
) -> Result<Time> {
    let asked = async {
        let mut sql = sql::connect(conn).await?;
        let time = sql::server_time(&mut sql).await?;
        sql.close().await;
        Ok::<_, AgentError>(time)
    };
    match asked.await {
        Ok(time) => Ok(time),
        Err(error) => {
            tracing::debug!(%error, "the server's clock could not be asked by SQL; waiting for a pulse");
            let pulse = pulse_behind(archive, start, patience).await;
            pulse
                .map(|pulse| pulse.server_time)
                .ok_or_else(|| no_time(start, &error))
        }
    }
}

/// A pulse that saw the server at or behind `start`.
async fn pulse_behind(archive: &Archive, start: Position, patience: Duration) -> Option<Pulse> {
    let started = Instant::now();
    loop {
        let newest = newest_pulse(archive).await;
        let behind = newest.filter(|pulse| pulse.timeline == start.timeline && pulse.wal_end >= start.lsn);
        if behind.is_some() || started.elapsed() >= patience {
            return behind;
        }
        sleep(POLL).await;
    }
}

fn no_time(start: Position, error: &AgentError) -> AgentError {
    AgentError::refused(
        format!(
            "the server's time at {}, where the base backup began, is not known: it cannot be asked by SQL ({error}), \
             and no region has a pulse from there",
            start.lsn
        ),
        "Let the role connect to a database, or see with `highwater-agent status` why the pulse is old",
    )
}

/// The newest pulse of all regions that answer.
pub(crate) async fn newest_pulse(archive: &Archive) -> Option<Pulse> {
    let mut newest: Option<Pulse> = None;
    for region in &archive.regions {
        match inventory::pulse(&*region.quick, &archive.layout).await {
            Ok(Some(pulse))
                if newest
                    .as_ref()
                    .is_none_or(|best| best.server_time < pulse.server_time) =>
            {
                newest = Some(pulse);
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(region = %region.name, %error, "no pulse from this region"),
        }
    }
    newest
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use highwater_format::layout::ClusterName;
    use highwater_format::records::{self, Identity};
    use highwater_format::{SegmentSize, SystemId, TimelineId};
    use highwater_store::{MemoryStore, Object, PutMode, Store};

    use super::*;
    use crate::region::Region;

    const START: Position = Position {
        lsn: Lsn(0x200_0028),
        timeline: TimelineId::FIRST,
    };

    fn archive(store: &Arc<MemoryStore>) -> Archive {
        let region = Region::bare("a", 0, store.clone());
        let identity = Identity {
            system_id: SystemId(7),
            server_version: 150_020,
            segment_size: SegmentSize::DEFAULT,
            wal_block_size: 8192,
            block_size: 8192,
        };
        let cluster = "orders".parse::<ClusterName>().unwrap();
        Archive::new(cluster, identity, vec![Arc::new(region)])
    }

    async fn put_pulse(store: &MemoryStore, archive: &Archive, wal_end: u64, second: i64) {
        let pulse = Pulse {
            timeline: TimelineId::FIRST,
            server_time: Time::from_unix_micros(second * 1_000_000),
            wal_end: Lsn(wal_end),
            durable_lsn: Lsn(wal_end),
            stored_lsn: Lsn(wal_end),
            last_commit: None,
            instance: "test".to_owned(),
            sequence: 1,
            quorum: None,
            interval_ms: None,
            waiting_ms: None,
            answered_at: None,
        };
        let object = Object::new(records::encode(&pulse).unwrap());
        store
            .put(&archive.layout.pulse(), object, PutMode::Overwrite)
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_pulse_of_before_the_start_is_not_the_time_of_the_backup() {
        let store = Arc::new(MemoryStore::new("a"));
        let archive = archive(&store);
        let patience = Duration::from_millis(600);
        assert!(
            pulse_behind(&archive, START, patience).await.is_none(),
            "no pulse"
        );
        put_pulse(&store, &archive, 0x200_0000, 10).await;
        assert!(
            pulse_behind(&archive, START, patience).await.is_none(),
            "it may be older than what the files hold"
        );
        let later = async {
            sleep(Duration::from_millis(300)).await;
            put_pulse(&store, &archive, 0x200_0100, 20).await;
        };
        let (pulse, ()) = tokio::join!(pulse_behind(&archive, START, Duration::from_secs(30)), later);
        assert_eq!(pulse.unwrap().server_time.unix_micros(), 20_000_000);
    }
}
