//! From PostgreSQL into the pipeline, across reconnects and timeline switches.
//!
//! Owns: the connection, where the stream resumes, the comparison with what is archived, the feedback.
//! Does not own: what durable means (frontier), what is cut where (segmenter), storing (uploaders).
//!
//! A session is one connection. Whatever ends it, the next one resumes at the end of what was sealed, and
//! begins by comparing the object around that end with what the server sends now. The archive's end is always tried
//! first; only the server's word that this segment is removed proves a gap (`bridge`).

mod begin;
mod bridge;
mod feedback;
mod intake;
mod overlap;
mod refusal;
mod stream;
mod words;

use std::sync::Arc;
use std::time::Duration;

use highwater_config::{Acknowledge, Standby};
use highwater_format::{History, Identity, Lsn};
use highwater_pgwire::{ConnInfo, Connection, NextTimeline, PgError, PgErrorKind, Started};
use highwater_store::ErrorKind as StoreKind;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) use intake::Tools;

use crate::acknowledge::Confirmed;
use crate::clock::Clock;
use crate::error::{AgentError, Kind, Result};
use crate::frontier::Position;
use crate::outage::GiveUp;
use crate::resume::{Resume, ServerView, resume};
use crate::sealer::Work;
use crate::segmenter::object_start;
use crate::server;
use crate::slot;
use crate::state;
use crate::synchronous::{self, Manner};
use crate::unended::Unended;
use crate::uploader::Shared;
use crate::writer::Claims;
use crate::writer::judge::Line;
use overlap::Overlap;
use refusal::is_removed;
use stream::{Ended, Stream};

/// How long the last bytes may take to become durable when the agent is told to stop.
const GRACE: Duration = Duration::from_secs(20);

/// First and longest pause between connection attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), LONGEST_PAUSE);

/// What a running agent that has lost its connection waits at the most before it comes back.
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(5);

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
    pub(crate) manner: Manner,
    /// What may be acknowledged, for whoever moves the slot when the stream does not.
    pub(crate) confirmed: Confirmed,
    /// Where a gap is noted that has been recorded: a base backup has to end it.
    pub(crate) unended: Arc<Unended>,
    /// The outage policy's wish to give the slot up.
    pub(crate) give_up: GiveUp,
    pub(crate) clock: Clock,
    /// Start of the monotonic clock that the segmenter is driven with.
    pub(crate) started: Instant,
    pub(crate) cancel: CancellationToken,
}

impl Context {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether the stream itself acknowledges. One from a standby always may: commits never wait for it.
    fn acknowledges(&self, standby: bool) -> bool {
        standby || self.manner.acknowledge == Acknowledge::Stream
    }
}

/// A step on the way to a stream, which an agent that is told to stop has no use for: neither a server nor a region that takes
/// its time over it is waited for.
async fn unless_stopped<T>(cancel: &CancellationToken, step: impl Future<Output = Result<T>>) -> Result<T> {
    let done = cancel.run_until_cancelled(step).await;
    done.unwrap_or(Err(AgentError::Cancelled))
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
    /// The stream begins with the object before the one that is open, only to be compared.
    compares_before: bool,
    /// Since when the server says that it no longer has what comes next.
    removed_since: Option<Instant>,
    /// Where the regions stood when they were last read again because another agent was found to have stored more.
    read_again: Vec<Option<Position>>,
    /// Since when the regions have answered that they lack some of what the stream has to be compared with.
    lacking_since: Option<Instant>,
    /// What was wrong with the slot since the stream last got on: the likely cause of a gap.
    cause: Option<String>,
    /// A slot that was made for a server of which no stream was compared with the archive yet, and from where on it
    /// keeps WAL: if that server is refused, nobody will read from it.
    new_slot: Option<Option<Lsn>>,
    /// The last session ended because another agent is in the way: until it is not, nobody would read from a new slot.
    turned_away: bool,
    /// The server was a standby when it was last asked.
    standby: bool,
}

impl Receiver {
    /// A receiver whose first session is ready to stream.
    pub(crate) fn new(
        context: Context,
        connection: Connection,
        resume: Resume,
        slot_event: Option<String>,
        new_slot: Option<Option<Lsn>>,
    ) -> Self {
        Self {
            context,
            sealed: None,
            first: Some((connection, resume)),
            removed: false,
            compares_before: false,
            removed_since: None,
            read_again: Vec::new(),
            lacking_since: None,
            cause: slot_event,
            new_slot,
            turned_away: false,
            standby: false,
        }
    }

    /// Streams until told to stop; ends early only with an error that trying again cannot cure.
    pub(crate) async fn run(mut self) -> Result<()> {
        let mut pause = BACKOFF.0;
        loop {
            let began = Instant::now();
            let result = self.session().await;
            if self.context.cancel.is_cancelled() {
                // A session that ended well has waited for its last bytes already.
                return match result {
                    Ok(()) => Ok(()),
                    Err(_) => self.give_grace().await,
                };
            }
            self.context.confirmed.end_session();
            self.turned_away = matches!(result, Err(AgentError::Fenced { .. } | AgentError::InUse { .. }));
            let reason = match result {
                Ok(()) => "the server closed the stream".to_owned(),
                Err(error) => {
                    self.take_slot_back(&error).await;
                    if self.is_final(&error) {
                        return Err(error);
                    }
                    error.to_string()
                }
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
                () = self.context.cancel.cancelled() => return self.give_grace().await,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// Leaves no slot on a server that was refused. After any other error the server may be the right one, and what the
    /// slot keeps is archived by the next agent. A slot that kept WAL before stays in any case: a server that is rewound, or
    /// made a standby, needs it.
    async fn take_slot_back(&mut self, error: &AgentError) {
        let refused = matches!(
            error,
            AgentError::Diverged { .. }
                | AgentError::Conflict { .. }
                | AgentError::OtherCluster { .. }
                | AgentError::Fenced { .. }
                | AgentError::InUse { .. }
                | AgentError::Refused { .. }
        );
        if let Some(made_at) = self.new_slot.filter(|_| refused) {
            let settled = slot::take_back(&self.context.conninfo, &self.context.slot, made_at).await;
            self.new_slot.take_if(|_| settled);
        }
    }

    /// Told to stop while nothing is streamed: what earlier streams have sealed is given its time all the same.
    async fn give_grace(&self) -> Result<()> {
        let Some(sealed) = self.sealed else {
            return Ok(());
        };
        let mut durable = self.context.shared.progress.subscribe();
        let reached = durable.wait_for(|at| at.is_some_and(|at| at.position() >= sealed));
        if tokio::time::timeout(GRACE, reached).await.is_err() {
            tracing::warn!(%sealed, "stopping before the last bytes are durable: PostgreSQL keeps them for the slot");
        }
        Ok(())
    }

    /// One connection, until it ends.
    async fn session(&mut self) -> Result<()> {
        self.give_up_if_asked().await?;
        let (connection, resume) = match self.first.take() {
            Some(first) => first,
            None => {
                let cancel = self.context.cancel.clone();
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => return self.give_grace().await,
                    prepared = self.prepare() => prepared?,
                }
            }
        };
        let claims = self.context.claims.clone();
        tokio::select! {
            biased;
            ended = Box::pin(self.stream(connection, resume)) => ended,
            error = claims.fenced() => {
                // What was received but not sealed is given up with the session.
                self.sealed = None;
                Err(error)
            }
        }
    }

    /// Streams on a connection that is ready, one timeline after the other.
    async fn stream(&mut self, mut connection: Connection, mut resume: Resume) -> Result<()> {
        let cancel = self.context.cancel.clone();
        let mut view = unless_stopped(&cancel, self.look_at(&mut connection)).await?;
        let mut floor = view.slot.unwrap_or(Lsn::ZERO);
        loop {
            let set_up = self.set_up(connection, &mut resume, &view);
            let SetUp {
                history,
                overlap,
                opening,
                started,
            } = unless_stopped(&cancel, set_up).await?;
            let next = match started {
                Err(error) => return self.refused(error.into(), &resume).await,
                Ok(Started::AtEnd(back, next)) => {
                    if let Some(opening) = opening {
                        self.send(opening).await?;
                    }
                    connection = back;
                    next
                }
                Ok(Started::Streaming(reader, writer)) => {
                    tracing::info!(timeline = %resume.timeline, from = %resume.start, sealed = %resume.sealed, "streaming");
                    let mut stream = Stream::new(&self.context, resume, history, overlap, opening, &view);
                    let ended = stream.run(reader, writer, floor).await;
                    self.new_slot.take_if(|_| stream.is_compared());
                    let reached = Position {
                        timeline: resume.timeline,
                        // What is sealed once more is compared next time up to where it was sealed before.
                        lsn: stream.sealed().max(resume.sealed),
                    };
                    // A timeline of which nothing was sealed begins once more, with what it shares with the one before.
                    let untouched = resume.after.filter(|_| reached.lsn == resume.sealed);
                    self.sealed = Some(untouched.unwrap_or(reached));
                    if self.got_on(&resume) {
                        self.removed = false;
                        self.removed_since = None;
                        self.context.shared.progress.server_lost(None);
                        // What was wrong with the slot may still be why a segment is gone, until all that follows is kept by it.
                        let is_kept = reached.lsn >= floor && !ended.as_ref().is_err_and(is_removed);
                        self.cause.take_if(|_| is_kept);
                    }
                    match ended {
                        Err(error) => return self.refused(error, &resume).await,
                        Ok(Ended::Closed) => return Ok(()),
                        Ok(Ended::Timeline(back, next)) => {
                            connection = *back;
                            next
                        }
                    }
                }
            };
            resume = self.switch(&resume, next);
            // A standby that was promoted is a primary now, and its agent the writer.
            view = unless_stopped(&cancel, self.look_at(&mut connection)).await?;
            floor = view.slot.unwrap_or(floor);
            unless_stopped(&cancel, self.enter(&view)).await?;
        }
    }

    /// Everything up to the server's answer to the request to stream.
    async fn set_up(
        &mut self,
        mut connection: Connection,
        resume: &mut Resume,
        view: &ServerView,
    ) -> Result<SetUp> {
        let history = server::history_of(&mut connection, resume.timeline).await?;
        let overlap = self.overlap(resume, &history, view).await?;
        let overlap = overlap.but_for_what_is_unused(&self.context.tools.identity);
        let opening = match resume.after {
            Some(after) => Some(opening(&mut connection, resume, after).await?),
            None => None,
        };
        self.send(Work::Begin(resume.timeline)).await?;
        // A slot that a stream uses cannot be moved by anybody else.
        let acknowledges = self.context.acknowledges(self.standby);
        let slot = acknowledges.then_some(self.context.slot.as_str());
        let started = connection
            .start_replication(slot, overlap.asks_from(resume.start), resume.timeline)
            .await;
        Ok(SetUp {
            history,
            overlap,
            opening,
            started,
        })
    }

    /// Connects and finds out where to go on.
    async fn prepare(&mut self) -> Result<(Connection, Resume)> {
        let mut connection = server::connect(&self.context.conninfo).await?;
        let view = self.look_first(&mut connection).await?;
        self.context.claims.compare(&view.history).await?;
        let shared = &self.context.shared;
        let furthest = shared.progress.furthest();
        // Where a timeline has begun in a region, nothing that is stored of an older one is ever durable in this process.
        let begun = furthest.filter(|at| at.timeline > view.timeline);
        let archived = begun.or(self.sealed).or(furthest);
        if self.sealed.is_none() {
            // Where a region has got to that may not have been asked.
            self.context.unended.ask_again();
        }
        let resume = resume(archived, &view, shared.segment_size)?;
        self.enter(&view).await?;
        Ok((connection, resume))
    }

    /// Where the server stands, before it is known whether this agent may write. Where it was turned away a moment ago no slot
    /// is made: it would be taken back at every attempt. Only an empty archive begins where a slot keeps WAL from.
    async fn look_first(&mut self, connection: &mut Connection) -> Result<ServerView> {
        let context = &self.context;
        let is_empty = self.sealed.is_none() && context.shared.progress.furthest().is_none();
        if !self.turned_away || is_empty {
            return self.look_at(connection).await;
        }
        let view = server::facts(connection, &context.identity, context.standby).await?;
        self.notice(connection, &view).await;
        Ok(view)
    }

    /// Where the server stands now. Nothing before its slot's position is ever reported.
    async fn look_at(&mut self, connection: &mut Connection) -> Result<ServerView> {
        let context = &self.context;
        let view = server::view(
            connection,
            &context.conninfo,
            &context.slot,
            &context.identity,
            context.standby,
        )
        .await?;
        if view.slot_event.is_some() {
            self.cause.clone_from(&view.slot_event);
        }
        if view.slot_is_new {
            self.new_slot = Some(view.slot);
        }
        self.notice(connection, &view).await;
        Ok(view)
    }

    /// What the server is now, and whether its commits wait for this agent.
    async fn notice(&mut self, connection: &mut Connection, view: &ServerView) {
        self.standby = view.in_recovery;
        if let Ok(names) = connection.show(synchronous::SETTING).await {
            let context = &self.context;
            synchronous::notice(&context.shared.state, context.manner, &names, view.in_recovery);
        }
    }

    /// Makes sure that what this server sends may be stored.
    async fn enter(&self, view: &ServerView) -> Result<()> {
        let line = Line::of(&view.history);
        self.context.claims.enter(line, view.in_recovery).await
    }

    /// Errors that a new connection will not cure. Where every node has an agent, one whose server is not the
    /// cluster's primary, or not yet the only one, waits until that is settled.
    fn is_final(&self, error: &AgentError) -> bool {
        match error {
            AgentError::Fenced { .. } | AgentError::InUse { .. } => self.context.standby == Standby::Refuse,
            AgentError::Restart { .. } => true,
            // What comes damaged over the wire may come whole the next time.
            AgentError::Store(error) if error.kind() == StoreKind::Corrupt => false,
            AgentError::Object { .. } => false,
            AgentError::Postgres(error) => error.kind() == PgErrorKind::Config,
            _ => matches!(
                error.kind(),
                Kind::Damage | Kind::Refused | Kind::Config | Kind::Bug
            ),
        }
    }

    /// Whether the stream brought anything that the archive did not have.
    fn got_on(&self, resume: &Resume) -> bool {
        self.sealed
            .is_some_and(|at| at.timeline == resume.timeline && at.lsn > resume.sealed)
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
}

/// A stream that was asked for, and what it is to begin with.
struct SetUp {
    history: History,
    overlap: Overlap,
    /// The history of a timeline that begins.
    opening: Option<Work>,
    started: std::result::Result<Started, PgError>,
}

/// The history of the timeline that begins. It goes into the pipeline before any of its WAL, and after what it shares with
/// the archive was compared: one of a server that is refused would lead every restore away.
async fn opening(connection: &mut Connection, resume: &Resume, after: Position) -> Result<Work> {
    let content = server::required_history(connection, resume.timeline).await?;
    server::parse_history(resume.timeline, &content)?;
    Ok(Work::History {
        timeline: resume.timeline,
        begins: resume.start,
        after,
        content,
    })
}
