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

use std::time::Duration;

use highwater_format::{Identity, Lsn, LsnRange};
use highwater_pgwire::{ConnInfo, Connection, NextTimeline, PgErrorKind, Started};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) use intake::Tools;

use crate::clock::Clock;
use crate::error::{AgentError, Kind, Result};
use crate::frontier::Position;
use crate::resume::{Resume, resume};
use crate::sealer::Work;
use crate::segmenter::object_start;
use crate::server;
use crate::state;
use crate::uploader::Shared;
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
                Err(error) if is_final(&error) => return Err(error),
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
                biased;
                () = self.context.cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// One connection, until it ends.
    async fn session(&mut self) -> Result<()> {
        let (mut connection, mut resume) = match self.first.take() {
            Some(first) => first,
            None => {
                let cancel = self.context.cancel.clone();
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => return Ok(()),
                    prepared = self.prepare() => prepared?,
                }
            }
        };
        loop {
            // Asked before every stream: the one before may have moved it past where the next timeline begins.
            let floor = self.slot_position(&mut connection).await?;
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
        }
    }

    /// Connects and finds out where to go on.
    async fn prepare(&mut self) -> Result<(Connection, Resume)> {
        let context = &self.context;
        let mut connection = server::connect(&context.conninfo).await?;
        let view = server::view(
            &mut connection,
            &context.conninfo,
            &context.slot,
            &context.identity,
        )
        .await?;
        let archived = self.sealed.or_else(|| context.shared.progress.furthest());
        let resume = resume(archived, &view, context.shared.segment_size)?;
        Ok((connection, resume))
    }

    /// From where the slot keeps WAL now: nothing before it is ever reported.
    async fn slot_position(&self, connection: &mut Connection) -> Result<Lsn> {
        let context = &self.context;
        let view = server::view(connection, &context.conninfo, &context.slot, &context.identity).await?;
        Ok(view.slot.unwrap_or(Lsn::ZERO))
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
            lsn: self.sealed.map_or(resume.sealed, |at| at.lsn),
        };
        tracing::info!(from = %resume.timeline, to = %next.timeline, at = %next.switch, received = %after.lsn, "timeline switch");
        if after.lsn > next.switch {
            tracing::warn!(
                timeline = %after.timeline, range = %LsnRange { start: next.switch, end: after.lsn },
                "the new timeline does not have this WAL; it stays in the archive on the old timeline"
            );
        }
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

/// Errors that a new connection will not cure.
fn is_final(error: &AgentError) -> bool {
    match error {
        AgentError::Postgres(error) => error.kind() == PgErrorKind::Config,
        _ => matches!(
            error.kind(),
            Kind::Damage | Kind::Refused | Kind::Config | Kind::Bug
        ),
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
        return AgentError::refused(
            format!(
                "the server's history does not contain {} on timeline {}: {error}",
                resume.start, resume.timeline
            ),
            "Point the agent at a server that descends from the archived one",
        );
    }
    error.into()
}
