//! Telling the server what is durable without becoming a synchronous standby: the slot is moved by SQL.
//!
//! For `acknowledge = "slot"`. The stream then runs without the slot and never reports a flush position, which is what makes
//! a synchronous standby of whoever does; so the slot can be moved from outside, which the server allows only while nobody
//! streams from it. Owns: what the stream would have reported, and moving the slot there every few seconds. Does not own
//! what may be reported (the receiver's feedback, from a [`DurableLsn`](crate::frontier::DurableLsn)).
//!
//! Invariants: the slot is never moved past what the stream would report (I1), never backwards, and only on the server and
//! timeline that the stream is of: a connection string may lead to another server a moment later. A slot that keeps nothing
//! any more is made anew, because here no stream ends of it.

use std::sync::Arc;
use std::time::Duration;

use highwater_format::{Lsn, SystemId, TimelineId};
use highwater_pgwire::{ConnInfo, Connection};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::error::Result;
use crate::sql::{self, Rows};
use crate::{server, slot};

/// Between two moves: a connection and one row. The server keeps what it writes meanwhile for longer than it must.
const EVERY: Duration = Duration::from_secs(5);

/// How long the last move may take, when the agent stops.
const LAST: Duration = Duration::from_secs(3);

/// What the stream would report if it reported anything; none before there is something, and once that stream has ended: the
/// next server at the address may have been rolled back, and have other WAL there.
#[derive(Clone, Debug)]
pub(crate) struct Confirmed {
    said: Arc<watch::Sender<Said>>,
    /// The session that this one speaks for.
    session: u64,
}

#[derive(Debug, Default)]
struct Said {
    session: u64,
    position: Option<(TimelineId, Lsn)>,
}

impl Default for Confirmed {
    fn default() -> Self {
        Self {
            said: Arc::new(watch::Sender::new(Said::default())),
            session: 0,
        }
    }
}

impl Confirmed {
    /// For the streams of the session that is on now.
    pub(crate) fn of_this_session(&self) -> Self {
        Self {
            session: self.said.borrow().session,
            ..self.clone()
        }
    }

    /// Everything before `lsn` of a stream on `timeline` is durable; zero: nothing may be said. Does nothing once the
    /// session has ended.
    pub(crate) fn send(&self, timeline: TimelineId, lsn: Lsn) {
        self.said.send_if_modified(|said| {
            let on = said.session == self.session;
            if on {
                said.position = (lsn > Lsn::ZERO).then_some((timeline, lsn));
            }
            on
        });
    }

    /// The session has ended, and with it what was known of the server.
    pub(crate) fn end_session(&self) {
        self.said.send_modify(|said| {
            said.session += 1;
            said.position = None;
        });
    }

    fn latest(&self) -> Option<(TimelineId, Lsn)> {
        self.said.borrow().position
    }
}

/// The task.
#[derive(Debug)]
pub(crate) struct Mover {
    /// The server.
    pub(crate) conninfo: ConnInfo,
    /// The slot.
    pub(crate) slot: String,
    /// Whose slot it is.
    pub(crate) system_id: SystemId,
    /// Where to.
    pub(crate) confirmed: Confirmed,
    /// Ends the task, after a last move.
    pub(crate) cancel: CancellationToken,
}

/// How the slot was found.
#[derive(Debug, Eq, PartialEq)]
enum Found {
    /// Moved, or nothing to be done, or not the server that the stream is of.
    Well,
    /// It keeps no WAL, or is not there.
    Gone,
    /// Somebody streams from it.
    InUse(u32),
    /// It keeps WAL only from there on, although less is durable.
    Ahead(Lsn),
}

impl Mover {
    /// Runs until cancelled.
    pub(crate) async fn run(self) -> Result<()> {
        let cancel = self.cancel.clone();
        cancel.run_until_cancelled(self.repeat()).await;
        // What was stored last; without it the server only keeps a little more.
        if let Some((timeline, lsn)) = self.confirmed.latest() {
            drop(timeout(LAST, self.advance(timeline, lsn)).await);
        }
        Ok(())
    }

    async fn repeat(&self) {
        let mut said = None;
        loop {
            let trouble = self.look().await;
            if let Some(trouble) = trouble.as_ref().filter(|_| trouble != said) {
                tracing::error!(slot = self.slot, "{trouble}");
            }
            said = trouble;
            sleep(EVERY).await;
        }
    }

    /// One move. What is wrong, if anything is.
    async fn look(&self) -> Option<String> {
        let (timeline, lsn) = self.confirmed.latest()?;
        match self.advance(timeline, lsn).await {
            Ok(Found::Well) => None,
            Ok(Found::Gone) => match self.make(timeline).await {
                Ok(()) => None,
                Err(error) => Some(format!("the slot keeps no WAL and cannot be made anew: {error}")),
            },
            Ok(Found::InUse(pid)) => Some(format!(
                "PID {pid} streams from the slot, which cannot be moved meanwhile: with acknowledge = \"slot\" nobody else may use it"
            )),
            Ok(Found::Ahead(at)) => Some(format!(
                "the slot keeps WAL from {at} on, but the regions hold it only up to {lsn}: somebody else moves it, or it was made \
                 anew a moment ago. What lies between is lost if the server removes it before it is stored"
            )),
            Err(error) => Some(format!(
                "the slot cannot be moved, so that the server keeps all WAL: acknowledge = \"slot\" needs SQL ({error})"
            )),
        }
    }

    async fn advance(&self, timeline: TimelineId, lsn: Lsn) -> Result<Found> {
        let mut sql = sql::connect(&self.conninfo).await?;
        let answer = sql.simple_query(&self.query(timeline, lsn)).await;
        sql.close().await;
        Ok(found(&Rows(answer?), lsn))
    }

    /// Each condition stands before what needs it: a server in recovery writes on no timeline, and says so with an error.
    fn query(&self, timeline: TimelineId, lsn: Lsn) -> String {
        // The configuration allows only [a-z0-9_] in the name.
        let (name, system_id) = (&self.slot, self.system_id.0.cast_signed());
        format!(
            "SELECT active_pid, restart_lsn, coalesce(wal_status, 'lost') = 'lost' AS lost, \
             CASE WHEN pg_catalog.pg_is_in_recovery() OR active OR restart_lsn IS NULL OR wal_status = 'lost' THEN NULL \
             WHEN (SELECT system_identifier FROM pg_catalog.pg_control_system()) <> {system_id} THEN NULL \
             WHEN left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8) <> '{:08X}' THEN NULL \
             WHEN restart_lsn > '{lsn}'::pg_lsn THEN 'ahead' \
             ELSE (pg_catalog.pg_replication_slot_advance(slot_name, '{lsn}'::pg_lsn)).end_lsn::text END AS moved \
             FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}'",
            timeline.get()
        )
    }

    /// Makes the slot anew, if the server that answers is the one that the stream is of: on any other it would keep WAL that
    /// nobody reads.
    async fn make(&self, timeline: TimelineId) -> Result<()> {
        let mut connection: Connection = server::connect(&self.conninfo).await?;
        let found = connection.identify_system().await?;
        let ours = found.system_id == self.system_id && found.timeline == timeline;
        if !ours || server::in_recovery(&mut connection).await? {
            tracing::debug!(system_id = %found.system_id, timeline = %found.timeline, "another server answers: no slot is made there");
            connection.close().await;
            return Ok(());
        }
        let made = slot::ensure(&mut connection, &self.conninfo, &self.slot).await;
        connection.close().await;
        if let Some(event) = made?.event {
            tracing::error!(
                slot = self.slot,
                event,
                "made the slot anew; what the server removed before that and no region holds will become a gap"
            );
        }
        Ok(())
    }
}

fn found(rows: &Rows, lsn: Lsn) -> Found {
    if rows.len() == 0 || rows.flag(0, "lost") == Some(true) {
        return Found::Gone;
    }
    if let Some(pid) = rows.value(0, "active_pid") {
        return Found::InUse(pid);
    }
    match rows.value::<Lsn>(0, "restart_lsn") {
        None => Found::Gone,
        Some(at) if at > lsn && rows.text(0, "moved").as_deref() == Some("ahead") => Found::Ahead(at),
        Some(_) => Found::Well,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use highwater_pgwire::QueryResult;

    use super::*;

    fn rows(values: &[Option<&'static str>]) -> Rows {
        let columns = ["active_pid", "restart_lsn", "lost", "moved"];
        let row = values
            .iter()
            .map(|value| value.map(|text| Bytes::from_static(text.as_bytes())))
            .collect();
        Rows(QueryResult {
            columns: columns.map(str::to_owned).to_vec(),
            rows: vec![row],
        })
    }

    #[test]
    fn what_a_session_confirmed_ends_with_it() {
        let confirmed = Confirmed::default();
        let (one, timeline) = (confirmed.of_this_session(), TimelineId::FIRST);
        one.send(timeline, Lsn(0x500));
        assert_eq!(confirmed.latest(), Some((timeline, Lsn(0x500))));
        confirmed.end_session();
        assert_eq!(confirmed.latest(), None);
        // The task that reports may outlive its stream for a moment.
        one.send(timeline, Lsn(0x500));
        assert_eq!(confirmed.latest(), None);
        confirmed.of_this_session().send(timeline, Lsn(0x350));
        assert_eq!(confirmed.latest(), Some((timeline, Lsn(0x350))));
    }

    #[test]
    fn what_is_wrong_with_the_slot_is_told_apart() {
        let lsn = Lsn(0x200);
        for (row, expected) in [
            ([None, Some("0/200"), Some("f"), Some("0/200")], Found::Well),
            // Another server, or another timeline.
            ([None, Some("0/300"), Some("f"), None], Found::Well),
            (
                [None, Some("0/300"), Some("f"), Some("ahead")],
                Found::Ahead(Lsn(0x300)),
            ),
            ([Some("17"), Some("0/100"), Some("f"), None], Found::InUse(17)),
            ([None, None, Some("t"), None], Found::Gone),
            ([None, None, Some("f"), None], Found::Gone),
        ] {
            assert_eq!(found(&rows(&row), lsn), expected, "{row:?}");
        }
    }
}
