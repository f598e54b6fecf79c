//! One stream: reads WAL until it ends, while the feedback task answers the server.
//!
//! Owns the order of the arms below: stopping first, then what is due, then what arrives. Nothing here
//! waits for storage, except that reading pauses while the memory budget is spent.

use std::sync::Arc;
use std::time::Duration;

use highwater_format::{History, Lsn};
use highwater_pgwire::{Connection, PgError, StatusWriter, StreamEnd, StreamMessage, WalReader};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::feedback::{Feedback, Flush, Signals};
use super::intake::Intake;
use super::overlap::Overlap;
use super::words::Words;
use super::{Context, GRACE};
use crate::error::{AgentError, Result};
use crate::frontier::{DurableLsn, Position};
use crate::resume::{Resume, ServerView};
use crate::sealer::Work;
use crate::server;
use crate::state;

/// The snapshot is refreshed at most this often while WAL arrives.
const REFRESH: Duration = Duration::from_millis(100);

/// How long a stream whose sending half failed may still deliver what is on its way, and how long the server may take to
/// read the last status message: one that is stopped reads nothing.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long a server that wants to stop is made to wait for storage.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

/// Questions of a stopping server follow each other closely.
const ASKS_FOLLOW_WITHIN: Duration = Duration::from_secs(2);

/// A server is asked for its position every second; one that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(60);

/// How a stream ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// The server went away in good order, or the agent was told to stop.
    Closed,
    /// The timeline ended; the connection goes on.
    Timeline(Box<Connection>, highwater_pgwire::NextTimeline),
}

/// A stream at work.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    context: &'a Context,
    intake: Intake,
    overlap: Overlap,
    /// The archive has lost what the stream begins with: that is sealed once more when the rest of the object has been
    /// compared, and not before, because the server may be another one.
    lacks_its_front: bool,
    /// Goes into the pipeline before the first WAL.
    opening: Option<Work>,
    durable: watch::Receiver<Option<DurableLsn>>,
    resume: Resume,
    history: History,
    /// When the server was last heard, or could have been.
    heard: Instant,
    server_end: Lsn,
    refreshed: Option<Instant>,
    /// Since when, and when last, the server has asked for a position that storage does not reach.
    asked: Option<(Instant, Instant)>,
    /// What the server says of itself, for what is stored of this stream.
    words: Words,
}

impl<'a> Stream<'a> {
    pub(super) fn new(
        context: &'a Context,
        resume: Resume,
        history: History,
        overlap: Overlap,
        opening: Option<Work>,
        view: &ServerView,
    ) -> Self {
        let intake = Intake::new(
            &context.tools,
            &resume,
            overlap.unused_at(resume.start),
            context.now(),
        );
        let durable = context.shared.progress.subscribe();
        Self {
            context,
            intake,
            lacks_its_front: overlap.lacks_its_front(),
            overlap,
            opening,
            durable,
            resume,
            history,
            heard: Instant::now(),
            server_end: Lsn::ZERO,
            refreshed: None,
            asked: None,
            words: Words::of(view, resume.timeline),
        }
    }

    /// End of what was sealed.
    pub(super) fn sealed(&self) -> Lsn {
        self.intake.sealed()
    }

    /// End of what the server sent.
    fn received(&self) -> Lsn {
        self.overlap.asks_from(self.intake.received())
    }

    /// Whether the server sent all that is archived of it so far once more, unchanged.
    pub(super) fn is_compared(&self) -> bool {
        self.intake.received() >= self.overlap.end()
    }

    /// Reads until the stream ends. Everything received is sealed then, however it ended.
    pub(super) async fn run(
        &mut self,
        mut reader: WalReader,
        writer: StatusWriter,
        floor: Lsn,
    ) -> Result<Ended> {
        let (signals, feedback) = self.feedback(writer, floor);
        let mut feedback = AbortOnDropHandle::new(tokio::spawn(feedback.run()));
        // The status messages end before the stream where one could not be sent any more.
        let (end, told) = {
            let read = self.read(&mut reader, &signals);
            tokio::pin!(read);
            tokio::select! {
                biased;
                // A stream that has ended says more than the status message that could not be sent any more.
                end = &mut read => (end, None),
                // What the server sent before the connection broke can still be read, its good-bye among it.
                told = &mut feedback => match tokio::time::timeout(LAST_WORDS, &mut read).await {
                    Ok(Ok(end)) => (Ok(end), Some(told)),
                    _ => (Err(feedback_error(told)), None),
                },
            }
        };
        self.intake.seal().await?;
        self.refresh();
        let end = end?;
        if end.is_none() {
            self.wait_until_durable().await;
        }
        signals.done.cancel();
        let Some(StreamEnd::Timeline(next)) = end else {
            // The last word: it is lost if the server is gone already, or does not listen.
            if told.is_none() {
                drop(tokio::time::timeout(LAST_WORDS, feedback).await);
            }
            return Ok(Ended::Closed);
        };
        let told = match told {
            Some(told) => told,
            None => feedback.await,
        };
        let writer = told.map_err(|error| AgentError::Bug(format!("status messages: {error}")))??;
        Ok(Ended::Timeline(Box::new(reader.into_connection(writer)?), next))
    }

    fn feedback(&self, writer: StatusWriter, floor: Lsn) -> (Signals, Feedback) {
        let (received, watcher) = watch::channel(self.received());
        let (reply, done) = (Arc::new(Notify::new()), CancellationToken::new());
        let feedback = Feedback {
            writer,
            clock: self.context.clock.clone(),
            flush: Flush {
                history: self.history.clone(),
                floor,
                compared: self.overlap.end(),
            },
            durable: self.context.shared.progress.subscribe(),
            received: watcher,
            reply: reply.clone(),
            done: done.clone(),
            waited_for: (self.context.manner.synchronous && !self.words.standby)
                .then(|| self.context.unended.follow()),
            elsewhere: (!self.context.acknowledges(self.words.standby))
                .then(|| self.context.confirmed.of_this_session()),
        };
        (
            Signals {
                received,
                reply,
                done,
            },
            feedback,
        )
    }

    /// Reads messages. None: the agent was told to stop.
    async fn read(&mut self, reader: &mut WalReader, signals: &Signals) -> Result<Option<StreamEnd>> {
        let budget = self.context.tools.budget.clone();
        let mut durable = self.durable.clone();
        loop {
            let deadline = self.intake.deadline().map(|at| self.context.started + at);
            let room = budget.has_room();
            if !room {
                self.context
                    .shared
                    .state
                    .update(|snapshot| snapshot.connection = state::Connection::Throttled);
            }
            tokio::select! {
                biased;
                () = self.context.cancel.cancelled() => return Ok(None),
                () = self.context.give_up.when_asked() => return Err(giving_up()),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    self.intake.tick(self.context.now()).await?;
                    self.refresh();
                }
                changed = durable.changed(), if self.context.manner.synchronous => {
                    changed.map_err(|_| AgentError::Cancelled)?;
                    self.commit_group().await?;
                }
                () = budget.room(), if !room => {
                    self.heard = Instant::now();
                    self.refresh();
                }
                () = tokio::time::sleep(SHUTDOWN_PATIENCE), if !room => self.let_go_while_throttled().await?,
                () = sleep_until(self.heard + SILENCE), if room => return Err(silent()),
                message = reader.next(), if room => {
                    self.heard = Instant::now();
                    if let Some(end) = self.take(message?, signals).await? {
                        return Ok(Some(end));
                    }
                }
            }
        }
    }

    async fn take(&mut self, message: StreamMessage, signals: &Signals) -> Result<Option<StreamEnd>> {
        match message {
            StreamMessage::Data {
                server_end,
                server_time,
                data,
                ..
            } => {
                let said = self.words.server_end(server_end);
                self.server_end = self.server_end.max(said);
                self.intake.stamp(self.words.stamp(server_time, server_end));
                let bytes = data.len() as u64;
                let passed = self.overlap.pass(data)?;
                if self.overlap.is_over() && std::mem::take(&mut self.lacks_its_front) {
                    self.intake.seal_again(self.context.now());
                }
                for cleared in passed {
                    if !cleared.is_empty()
                        && let Some(opening) = self.opening.take()
                    {
                        self.intake.open(opening).await?;
                    }
                    self.intake.push(&cleared, self.context.now()).await?;
                }
                if let Some(end) = self.intake.take_recorded() {
                    self.reanchor_behind(end);
                }
                let received = self.received();
                signals.received.send_replace(received);
                self.context.shared.state.update_quietly(|snapshot| {
                    snapshot.received_bytes += bytes;
                    snapshot.received = received;
                    // Before its first message on this stream the server has said nothing.
                    if server_end > Lsn::ZERO {
                        snapshot.server_end = said;
                    }
                    snapshot.server_time = Some(server_time);
                });
                self.commit_group().await?;
                if self.refreshed.is_none_or(|at| at.elapsed() >= REFRESH) {
                    self.refresh();
                }
                Ok(None)
            }
            StreamMessage::Keepalive {
                server_end,
                server_time,
                reply_requested,
            } => {
                // A keepalive says how far the server has sent. Where that is behind the end that it named
                // before, its clock proves nothing about the WAL in between.
                let said = self.words.server_end(server_end);
                if said >= self.server_end {
                    self.server_end = said;
                    self.intake.stamp(self.words.stamp(server_time, server_end));
                    self.context.shared.state.update_quietly(|snapshot| {
                        snapshot.server_end = said;
                        snapshot.server_time = Some(server_time);
                    });
                }
                // Nothing is left to receive and the server wants to know: it may be shutting down and
                // wait for its last bytes to be safe.
                if reply_requested && server_end <= self.received() {
                    self.intake.seal().await?;
                }
                if reply_requested {
                    signals.reply.notify_one();
                    self.let_go_of_a_stopping_server(server_end)?;
                }
                self.refresh();
                Ok(None)
            }
            StreamMessage::Ended(end) => Ok(Some(end)),
        }
    }

    /// A server that is shutting down asks again after every answer until all it sent is reported safe. If
    /// storage does not take it within [`SHUTDOWN_PATIENCE`], the connection is closed, so that the server can
    /// stop; nothing is lost, because its slot keeps the WAL.
    fn let_go_of_a_stopping_server(&mut self, server_end: Lsn) -> Result<()> {
        let received = self.received();
        let safe = self
            .durable
            .borrow()
            .is_some_and(|at| at.reportable(&self.history) >= received);
        if server_end > received || safe {
            self.asked = None;
            return Ok(());
        }
        let now = Instant::now();
        // An ordinary server hears from us every second and has no reason to ask; one question is no shutdown.
        let since = match self.asked {
            Some((since, last)) if now - last < ASKS_FOLLOW_WITHIN => since,
            _ => now,
        };
        self.asked = Some((since, now));
        if now - since < SHUTDOWN_PATIENCE {
            return Ok(());
        }
        Err(AgentError::Trouble {
            what: format!(
                "PostgreSQL wants to stop and waits for WAL up to {received} to be durable, which storage has not taken for {} s; \
                 letting it go",
                SHUTDOWN_PATIENCE.as_secs()
            ),
            next: "Its slot keeps the WAL: it is stored when server and regions are back".into(),
        })
    }

    /// While memory is spent nothing is read, so that a stopping server cannot say so: ask it.
    async fn let_go_while_throttled(&self) -> Result<()> {
        if !server::is_stopping(&self.context.conninfo).await {
            return Ok(());
        }
        Err(AgentError::Trouble {
            what: "PostgreSQL wants to stop while storage takes nothing; letting it go".into(),
            next: "Its slot keeps the WAL: it is stored when server and regions are back".into(),
        })
    }

    /// As a synchronous standby: what arrived while the last chunk was on its way goes into the next one.
    async fn commit_group(&mut self) -> Result<()> {
        if !self.context.manner.synchronous || !self.intake.has_unsealed() {
            return Ok(());
        }
        let durable = self.durable.borrow().map(DurableLsn::position);
        let idle =
            durable.is_some_and(|at| at.timeline == self.resume.timeline && at.lsn >= self.intake.sealed());
        if idle { self.intake.seal().await } else { Ok(()) }
    }

    /// Stopping: gives storage a bounded time to take the last bytes, while the server still gets answers.
    async fn wait_until_durable(&mut self) {
        let (timeline, sealed) = (self.resume.timeline, self.intake.sealed());
        let reached = |durable: &Option<DurableLsn>| {
            durable.is_some_and(|at| at.position().timeline == timeline && at.position().lsn >= sealed)
        };
        let waited = tokio::time::timeout(GRACE, self.durable.wait_for(reached))
            .await
            .is_ok();
        if !waited {
            tracing::warn!(%sealed, "stopping before the last bytes are durable: PostgreSQL keeps them for the slot");
        }
    }

    /// Has a base backup taken once WAL that no recovery gets past is durable, and with it the record that says so; whatever becomes of
    /// the stream meanwhile.
    fn reanchor_behind(&self, end: Lsn) {
        let timeline = self.resume.timeline;
        let behind = Position { timeline, lsn: end };
        let (mut durable, unended) = (self.durable.clone(), self.context.unended.clone());
        let ring = async move {
            let reached = |at: &Option<DurableLsn>| at.is_some_and(|at| at.position() >= behind);
            if durable.wait_for(reached).await.is_ok() {
                unended.bell.notify_one();
            }
        };
        tokio::spawn(self.context.cancel.clone().run_until_cancelled_owned(ring));
    }

    /// Shows others where the stream stands.
    fn refresh(&mut self) {
        self.refreshed = Some(Instant::now());
        let (received, server_end, timeline) = (self.received(), self.server_end, self.resume.timeline);
        let (used, commit) = (self.context.tools.budget.used(), self.intake.newest_commit());
        let throttled = !self.context.tools.budget.has_room();
        let at_home = self.words.left_behind.is_none();
        let now = self.context.clock.stamp();
        self.context.shared.state.update(|snapshot| {
            snapshot.timeline = Some(timeline);
            snapshot.received = received;
            snapshot.server_end = server_end;
            snapshot.memory_used = used;
            snapshot.received_commit = commit.max(snapshot.received_commit);
            snapshot.connection = if throttled {
                state::Connection::Throttled
            } else {
                state::Connection::Streaming
            };
            if at_home {
                snapshot.look(now);
            }
        });
    }
}

fn giving_up() -> AgentError {
    AgentError::Trouble {
        what: "the stream is let go so that the slot can be given up".into(),
        next: "What is received and not stored yet stays in memory".into(),
    }
}

fn silent() -> AgentError {
    AgentError::Trouble {
        what: format!(
            "the server has said nothing for {} s although it was asked every second",
            SILENCE.as_secs()
        ),
        next: "Connecting anew".into(),
    }
}

type FeedbackResult = std::result::Result<std::result::Result<StatusWriter, PgError>, tokio::task::JoinError>;

fn feedback_error(ended: FeedbackResult) -> AgentError {
    match ended {
        Ok(Ok(_)) => AgentError::Cancelled,
        Ok(Err(error)) => error.into(),
        Err(error) => AgentError::Bug(format!("status messages: {error}")),
    }
}
