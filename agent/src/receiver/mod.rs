//! From PostgreSQL into the pipeline, across reconnects and timeline switches.
//!
//! Owns: the connection, where the stream resumes, the comparison with what is archived, the feedback.
//! Does not own: what durable means (frontier), what is cut where (segmenter), storing (uploaders).
//!
//! A session is one connection. Whatever ends it, the next one resumes at the end of what was sealed, and
//! begins by comparing the object around that end with what the server sends now.

mod feedback;
mod intake;
mod overlap;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use highwater_config::Standby;
use highwater_format::{Identity, Lsn, LsnRange};
use highwater_pgwire::{ConnInfo, Connection, NextTimeline, PgErrorKind, Started};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) use intake::Tools;

use crate::clock::Clock;
use crate::error::{AgentError, Kind, Result};
use crate::frontier::Position;
use crate::resume::{Resume, ServerView, resume};
use crate::sealer::Work;
use crate::segmenter::object_start;
use crate::server;
use crate::state;
use crate::uploader::Shared;
use crate::writer::Claims;
use crate::writer::judge::Line;
use overlap::Overlap;
use stream::{Ended, Stream};

/// How long the last bytes may take to become durable when the agent is told to stop.
const GRACE: Duration = Duration::from_secs(20);

/// First and longest pause between connection attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// A session that lasted this long was a good one: the next pause is short again.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// What every session needs.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) shared: Shared,
    pub(crate) tools: Tools,
    pub(crate) conninfo: ConnInfo,
    pub(crate) identity: Identity,
    pub(crate) slot: String,
    pub(crate) standby: Standby,
    pub(crate) claims: Arc<Claims>,
    pub(crate) synchronous: bool,
    pub(crate) clock: Clock,
    /// Start of the monotonic clock that the segmenter is driven with.
    pub(crate) started: Instant,
    pub(crate) cancel: CancellationToken,
}

impl Context {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Receiver {
    context: Context,
    /// End of what was sealed on the stream so far; none until something was.
    sealed: Option<Position>,
    first: Option<(Connection, Resume)>,
    /// The server no longer has the last archived object: the stream begins right after it.
    removed: bool,
}

impl Receiver {
    /// A receiver whose first session is ready to stream.
    pub(crate) fn new(context: Context, connection: Connection, resume: Resume) -> Self {
        Self {
            context,
            sealed: None,
            first: Some((connection, resume)),
            removed: false,
        }
    }

    /// Streams until told to stop; ends early only with an error that trying again cannot cure.
    pub(crate) async fn run(mut self) -> Result<()> {
        let mut pause = BACKOFF.0;
        loop {
            let began = Instant::now();
            let result = self.session().await;
            if self.context.cancel.is_cancelled() {
                return Ok(());
            }
            let reason = match result {
                Ok(()) => "the server closed the stream".to_owned(),
                Err(error) if self.is_final(&error) => return Err(error),
                Err(error) => error.to_string(),
            };
            if began.elapsed() >= GOOD_SESSION {
                pause = BACKOFF.0;
            }
            tracing::warn!(
                reason,
                pause_ms = pause.as_millis(),
                "not streaming, connecting again"
            );
            self.context
                .shared
                .state
                .update(|snapshot| snapshot.connection = state::Connection::Reconnecting(reason));
            tokio::select! {
                () = self.context.cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// One connection, until it ends.
    async fn session(&mut self) -> Result<()> {
        let (connection, resume) = match self.first.take() {
            Some(first) => first,
            None => {
                let cancel = self.context.cancel.clone();
                tokio::select! {
                    () = cancel.cancelled() => return Ok(()),
                    prepared = self.prepare() => prepared?,
                }
            }
        };
        let claims = self.context.claims.clone();
        tokio::select! {
            ended = self.stream(connection, resume) => ended,
            error = claims.fenced() => {
                // What was received but not sealed is given up with the session.
                self.sealed = None;
                Err(error)
            }
        }
    }

    /// Streams on a connection that is ready, one timeline after the other.
    async fn stream(&mut self, mut connection: Connection, mut resume: Resume) -> Result<()> {
        let mut floor = self.look_at(&mut connection).await?.slot.unwrap_or(Lsn::ZERO);
        loop {
            if let Some(after) = resume.after {
                self.follow_history(&mut connection, &resume, after).await?;
            }
            let history = server::history_of(&mut connection, resume.timeline).await?;
            let overlap = self.overlap(&mut resume).await?;
            self.send(Work::Begin(resume.timeline)).await?;
            let started = connection
                .start_replication(Some(&self.context.slot), resume.start, resume.timeline)
                .await;
            let next = match started.map_err(|error| self.explain(error.into(), &resume))? {
                Started::AtEnd(back, next) => {
                    connection = back;
                    next
                }
                Started::Streaming(reader, writer) => {
                    tracing::info!(timeline = %resume.timeline, from = %resume.start, sealed = %resume.sealed, "streaming");
                    let mut stream = Stream::new(&self.context, resume, history, overlap);
                    let ended = stream.run(reader, writer, floor).await;
                    self.sealed = Some(Position {
                        timeline: resume.timeline,
                        lsn: stream.sealed(),
                    });
                    match ended.map_err(|error| self.explain(error, &resume))? {
                        Ended::Closed => return Ok(()),
                        Ended::Timeline(back, next) => {
                            connection = *back;
                            next
                        }
                    }
                }
            };
            resume = self.switch(&resume, next);
            // A standby that was promoted is a primary now, and its agent the writer.
            let view = self.look_at(&mut connection).await?;
            floor = view.slot.unwrap_or(floor);
            let cancel = self.context.cancel.clone();
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                entered = self.enter(&view) => entered?,
            }
        }
    }

    /// Connects and finds out where to go on.
    async fn prepare(&mut self) -> Result<(Connection, Resume)> {
        let context = &self.context;
        let mut connection = server::connect(&context.conninfo).await?;
        let view = self.look_at(&mut connection).await?;
        context.claims.compare(&view.history).await?;
        let archived = self.sealed.or_else(|| context.shared.progress.furthest());
        let resume = resume(archived, &view, context.shared.segment_size)?;
        self.enter(&view).await?;
        Ok((connection, resume))
    }

    /// Where the server stands now. Nothing before its slot's position is ever reported.
    async fn look_at(&self, connection: &mut Connection) -> Result<ServerView> {
        let context = &self.context;
        server::view(connection, &context.conninfo, &context.slot, &context.identity).await
    }

    /// Makes sure that what this server sends may be stored.
    async fn enter(&self, view: &ServerView) -> Result<()> {
        server::refuse_standby(view, self.context.standby)?;
        let line = Line::of(&view.history);
        self.context.claims.enter(line, view.in_recovery).await
    }

    /// Errors that a new connection will not cure. Where every node has an agent, one whose server is not the
    /// cluster's primary, or not yet the only one, waits until that is settled.
    fn is_final(&self, error: &AgentError) -> bool {
        match error {
            AgentError::Fenced { .. } | AgentError::InUse { .. } => self.context.standby == Standby::Refuse,
            AgentError::Postgres(error) => error.kind() == PgErrorKind::Config,
            _ => matches!(
                error.kind(),
                Kind::Damage | Kind::Refused | Kind::Config | Kind::Bug
            ),
        }
    }

    /// Waits until the sealer is through with earlier streams, and reads back where they ended. When they ended
    /// with an object, the stream is made to begin with that object, if it is in the archive: so there is always
    /// something to compare.
    async fn overlap(&self, resume: &mut Resume) -> Result<Overlap> {
        let (answer, settled) = oneshot::channel();
        self.send(Work::Settle(answer)).await?;
        settled.await.map_err(|_| AgentError::Cancelled)?;
        let (sealed, size) = (resume.sealed, self.context.shared.segment_size);
        if resume.start == sealed && resume.after.is_none() && !self.removed {
            let start = object_start(size, sealed.saturating_sub(1));
            let range = LsnRange { start, end: sealed };
            if let Ok(overlap) = Overlap::load(&self.context.shared, resume.timeline, range).await {
                resume.start = start;
                return Ok(overlap);
            }
        }
        let range = LsnRange {
            start: resume.start,
            end: sealed,
        };
        Overlap::load(&self.context.shared, resume.timeline, range).await
    }

    /// Explains why a stream could not be had. Where only the archived object before the end is gone from the
    /// server, the next session begins right after it, which is then not compared.
    fn explain(&mut self, error: AgentError, resume: &Resume) -> AgentError {
        let gone = matches!(&error, AgentError::Postgres(error) if error.is_segment_removed());
        let whole_object = object_start(self.context.shared.segment_size, resume.sealed) == resume.sealed;
        if gone && whole_object && resume.start < resume.sealed && !self.removed {
            self.removed = true;
            return AgentError::Trouble {
                what: format!(
                    "the server no longer has the WAL before {}, which is archived",
                    resume.sealed
                ),
                next: "The stream goes on from there without comparing it".into(),
            };
        }
        explain(error, resume)
    }

    async fn send(&self, work: Work) -> Result<()> {
        self.context
            .tools
            .queue
            .send(work)
            .await
            .map_err(|_| AgentError::Cancelled)
    }

    /// The timeline ended where the server says; the next one begins with the object around that place.
    fn switch(&self, resume: &Resume, next: NextTimeline) -> Resume {
        let after = Position {
            timeline: resume.timeline,
            lsn: self
                .sealed
                .filter(|at| at.timeline == resume.timeline)
                .map_or(resume.sealed, |at| at.lsn),
        };
        tracing::info!(from = %resume.timeline, to = %next.timeline, at = %next.switch, received = %after.lsn, "timeline switch");
        let start = object_start(self.context.shared.segment_size, next.switch);
        Resume {
            timeline: next.timeline,
            start,
            sealed: start,
            after: Some(after),
        }
    }

    /// Puts the history of the timeline that begins into the pipeline, before any of its WAL.
    async fn follow_history(
        &self,
        connection: &mut Connection,
        resume: &Resume,
        after: Position,
    ) -> Result<()> {
        let content = server::required_history(connection, resume.timeline).await?;
        server::parse_history(resume.timeline, &content)?;
        let (timeline, begins) = (resume.timeline, resume.start);
        self.send(Work::History {
            timeline,
            begins,
            after,
            content,
        })
        .await
    }
}

/// What a refusal to stream means for the archive. Some come only with the first message of a stream.
fn explain(error: AgentError, resume: &Resume) -> AgentError {
    let AgentError::Postgres(error) = error else {
        return error;
    };
    if error.is_segment_removed() {
        return AgentError::refused(
            format!(
                "the server has already removed WAL that the archive needs: it would go on at {} on timeline {} ({error})",
                resume.sealed, resume.timeline
            ),
            "Nothing after that point can be archived without a hole. Keep what is archived under its own cluster name, \
             and begin a new archive with a new base backup under another name",
        );
    }
    if let Some(end) = error.ahead_of_server() {
        let range = LsnRange {
            start: end,
            end: resume.sealed,
        };
        return AgentError::Diverged {
            timeline: resume.timeline,
            at: end,
            range,
        };
    }
    if error.is_not_in_history() {
        // It did when it was asked a moment ago: it has been promoted since, or another one answers now.
        return AgentError::Trouble {
            what: format!(
                "the server's history does not contain {} on timeline {} any more: {error}",
                resume.start, resume.timeline
            ),
            next: "Its history is read again".into(),
        };
    }
    error.into()
}
