//! The status messages to PostgreSQL, from a task that storage cannot block.
//!
//! Owns the sending half of the stream. Sends when the durable position moves, when the server asks, and
//! every [`INTERVAL`]; floods of requests that find nothing new are answered at most once per [`CALM`].
//!
//! Invariants (I1, I2): the flush LSN comes from a [`DurableLsn`](crate::frontier::DurableLsn) and nothing else, never moves back on a
//! stream, and is 0 ("no opinion", the slot stays) while it would be below what the slot already keeps.
//! Apply equals flush. Where the slot is moved by SQL ([`crate::acknowledge`]) flush is always 0, and write is what flush
//! would be. Where commits are meant to wait for the agent, write equals flush as well, so that `remote_write` waits for the regions like
//! `on`; and flush is 0 while some may wait inside a gap that no base backup has ended ([`crate::unended`]): a stream without a flush
//! position lets none return.

use std::sync::Arc;
use std::time::Duration;

use highwater_format::{History, Lsn};
use highwater_pgwire::{PgError, Status, StatusWriter};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::acknowledge::Confirmed;
use crate::clock::Clock;
use crate::frontier::DurableLsn;

/// A status message goes out at least this often; PostgreSQL's shortest useful `wal_sender_timeout` is
/// a few seconds.
const INTERVAL: Duration = Duration::from_secs(1);

/// Requests that find nothing new to say are answered this often at most.
const CALM: Duration = Duration::from_millis(20);

/// What the reading half tells the sending half.
#[derive(Debug)]
pub(super) struct Signals {
    /// End of what was received.
    pub(super) received: watch::Sender<Lsn>,
    /// The server wants an answer now.
    pub(super) reply: Arc<Notify>,
    /// The stream has ended: say the last word.
    pub(super) done: CancellationToken,
}

/// What the flush LSN is worked out from.
#[derive(Debug)]
pub(super) struct Flush {
    /// History of the stream's timeline.
    pub(super) history: History,
    /// The least that may be said; below it nothing is.
    pub(super) floor: Lsn,
    /// Nothing is said before all WAL up to here has come: until then it may turn out that the server is not the one
    /// that is archived.
    pub(super) compared: Lsn,
}

impl Flush {
    /// What may be reported now; never less than before.
    fn report(&mut self, durable: Option<DurableLsn>, received: Lsn) -> Lsn {
        let allowed = durable.map_or(Lsn::ZERO, |durable| durable.reportable(&self.history));
        // The archive may be ahead of this stream, which begins at an object's start.
        let allowed = allowed.min(received);
        if allowed < self.floor || received < self.compared {
            return Lsn::ZERO;
        }
        self.floor = allowed;
        allowed
    }
}

/// The sending task.
#[derive(Debug)]
pub(super) struct Feedback {
    pub(super) writer: StatusWriter,
    pub(super) clock: Clock,
    pub(super) flush: Flush,
    pub(super) durable: watch::Receiver<Option<DurableLsn>>,
    pub(super) received: watch::Receiver<Lsn>,
    pub(super) reply: Arc<Notify>,
    pub(super) done: CancellationToken,
    /// Commits are meant to wait for this stream, and this says whether they may return once they are durable.
    pub(super) waited_for: Option<watch::Receiver<bool>>,
    /// The stream acknowledges nothing: what may be acknowledged goes here instead.
    pub(super) elsewhere: Option<Confirmed>,
}

impl Feedback {
    /// Sends until the connection fails or the reading half is gone. Gives the writer back.
    pub(super) async fn run(mut self) -> Result<StatusWriter, PgError> {
        let (mut last, mut ask) = (None, false);
        loop {
            let positions = self.send(ask).await?;
            ask = false;
            if last.replace(positions) == Some(positions) {
                tokio::time::sleep(CALM).await;
            }
            tokio::select! {
                biased;
                // The last word says all that the others would; then news before questions, questions before routine.
                () = self.done.cancelled() => break,
                changed = self.durable.changed() => if changed.is_err() { break },
                changed = next(&mut self.waited_for) => if changed.is_err() { break },
                () = self.reply.notified() => {}
                // An idle server says nothing by itself as long as it hears from us: ask for its clock.
                () = tokio::time::sleep(INTERVAL) => ask = true,
            }
        }
        self.send(false).await?;
        Ok(self.writer)
    }

    /// Write and flush position, where `safe` is what may be acknowledged.
    fn positions(&mut self, received: Lsn, safe: Lsn) -> (Lsn, Lsn) {
        if let Some(confirmed) = &self.elsewhere {
            confirmed.send(self.flush.history.timeline, safe);
        }
        let waited_for = self.waited_for.as_mut();
        let may_return = waited_for.map(|may_return| *may_return.borrow_and_update());
        match (&self.elsewhere, may_return) {
            // A server that shuts down waits for the write position where there is no flush position.
            (Some(_), _) | (None, Some(false)) => (safe, Lsn::ZERO),
            (None, Some(true)) => (safe, safe),
            (None, None) => (received, safe),
        }
    }

    async fn send(&mut self, ask: bool) -> Result<(Lsn, Lsn), PgError> {
        let received = *self.received.borrow();
        let durable = *self.durable.borrow_and_update();
        let safe = self.flush.report(durable, received);
        let (write, flush) = self.positions(received, safe);
        let status = Status {
            write,
            flush,
            apply: flush,
            reply_requested: ask,
            now: self.clock.now(),
        };
        self.writer.send(status).await?;
        Ok((write, flush))
    }
}

/// The next change of what is followed, if anything is.
async fn next(followed: &mut Option<watch::Receiver<bool>>) -> Result<(), watch::error::RecvError> {
    match followed {
        Some(followed) => followed.changed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use highwater_config::Policy;
    use highwater_format::TimelineId;

    use super::*;
    use crate::frontier::{Frontier, Position};

    fn durable(lsn: u64) -> Option<DurableLsn> {
        Frontier::new(Policy::Any, 1).stored(
            0,
            Position {
                timeline: TimelineId::FIRST,
                lsn: Lsn(lsn),
            },
        )
    }

    #[test]
    fn the_flush_position_is_durable_received_and_never_below_the_slot() {
        let mut flush = Flush {
            history: History::root(TimelineId::FIRST),
            floor: Lsn(100),
            compared: Lsn(110),
        };
        assert_eq!(flush.report(durable(150), Lsn(109)), Lsn::ZERO);
        assert_eq!(flush.report(None, Lsn(200)), Lsn::ZERO);
        assert_eq!(flush.report(durable(90), Lsn(200)), Lsn::ZERO);
        assert_eq!(flush.report(durable(150), Lsn(120)), Lsn(120));
        assert_eq!(flush.report(durable(150), Lsn(200)), Lsn(150));
        assert_eq!(flush.report(durable(140), Lsn(200)), Lsn::ZERO);
    }
}
