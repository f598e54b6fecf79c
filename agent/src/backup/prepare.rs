//! What must hold before a base backup may begin.
//!
//! Owns: proof that the regions take writes and already hold the WAL right up to where the server is, and the
//! server's time. A base backup without the WAL that follows it is worth nothing, and PostgreSQL recycles WAL
//! while a long one runs; so the stream must be stored first.
//! Does not own: the stream itself, nor the check at the end that the WAL of the whole backup is there.

use std::time::Duration;

use futures::future::join_all;
use highwater_format::records::Pulse;
use highwater_format::{Lsn, Time};
use highwater_pgwire::ConnInfo;
use tokio::time::{Instant, sleep};

use super::regions::Targets;
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

/// The server's clock: asked by SQL, or where the role may only replicate, taken from the newest pulse that
/// the running agent wrote. Names and orders backups, so the clock of this machine will not do.
pub(crate) async fn server_time(conn: &ConnInfo, archive: &Archive) -> Result<Time> {
    let asked = async {
        let mut sql = sql::connect(conn).await?;
        let time = sql::server_time(&mut sql).await?;
        sql.close().await;
        Ok::<_, AgentError>(time)
    };
    match asked.await {
        Ok(time) => Ok(time),
        Err(error) => {
            tracing::debug!(%error, "the server's clock could not be asked by SQL; taking it from the newest pulse");
            newest_pulse(archive)
                .await
                .map(|pulse| pulse.server_time)
                .ok_or(error)
        }
    }
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
