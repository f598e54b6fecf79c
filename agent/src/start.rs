//! Where the first stream begins, and the right to store it.
//!
//! Owns the order of the questions: is the server one that may be archived, does the archive know its timeline as the
//! same one, where does the archive end, may this agent write. Nothing is stored before all are answered. Does not own
//! the answers ([`crate::resume`], [`crate::writer`]).

use std::time::Duration;

use bytes::Bytes;
use highwater_config::Config;
use highwater_format::{Identity, Lsn, TimelineId};
use highwater_pgwire::{ConnInfo, Connection};

use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::outage;
use crate::resume::{Resume, ServerView, resume};
use crate::server;
use crate::slot;
use crate::state::{Connection::Reconnecting, State};
use crate::writer::Claims;
use crate::writer::judge::Line;

/// Pause between attempts: a standby that lags is often seconds behind.
const PAUSE: Duration = Duration::from_secs(1);

/// Of the attempts in a row, one in thirty is logged.
const SAY_EVERY: u32 = 30;

/// Where the stream begins, and the right to write it.
pub(crate) struct Beginning {
    pub(crate) connection: Connection,
    /// A slot that was made for this start, and from where on it keeps WAL.
    pub(crate) new_slot: Option<Option<Lsn>>,
    pub(crate) view: ServerView,
    pub(crate) resume: Resume,
    /// History files that every region must have before anything of the stream.
    pub(crate) histories: Vec<(TimelineId, Bytes)>,
}

/// What does not change from one attempt to the next.
pub(crate) struct Start<'a> {
    pub(crate) config: &'a Config,
    pub(crate) conninfo: &'a ConnInfo,
    pub(crate) identity: &'a Identity,
    pub(crate) claims: &'a Claims,
    pub(crate) state: &'a State,
}

impl Start<'_> {
    /// Leaves nothing on the server of what was made for this start.
    pub(crate) async fn give_up(&self, begun: Beginning) {
        begun.connection.close().await;
        self.take_back(begun.new_slot).await;
    }

    async fn take_back(&self, new_slot: Option<Option<Lsn>>) {
        if let Some(made_at) = new_slot {
            slot::take_back(self.conninfo, &self.config.cluster.slot, made_at).await;
        }
    }

    /// The same once more, where the archive turned out to end elsewhere.
    pub(crate) async fn anew(&self, begun: Beginning, furthest: Option<Position>) -> Result<Beginning> {
        let (made, cause) = (begun.new_slot, begun.view.slot_event);
        match self.begin(furthest, begun.connection).await {
            Ok(mut begun) => {
                begun.new_slot = begun.new_slot.or(made);
                begun.view.slot_event = begun.view.slot_event.or(cause);
                Ok(begun)
            }
            Err(error) => {
                self.take_back(made).await;
                Err(error)
            }
        }
    }

    /// Asks until it is known. Waits for a standby that has yet to receive what is archived; a connection that was lost
    /// while the regions were read is made again.
    pub(crate) async fn begin(
        &self,
        furthest: Option<Position>,
        connection: Connection,
    ) -> Result<Beginning> {
        let Self {
            config,
            conninfo,
            identity,
            claims,
            state,
        } = self;
        let (mut open, mut attempts) = (Some(connection), 0_u32);
        let slot = &config.cluster.slot;
        let mut new_slot = None;
        loop {
            let attempt = async {
                let mut connection = match open.take() {
                    Some(connection) => connection,
                    None => server::connect(conninfo).await?,
                };
                let standby = config.cluster.standby;
                let view = server::view(&mut connection, conninfo, slot, identity, standby).await?;
                if view.slot_is_new {
                    new_slot = Some(view.slot);
                }
                claims.compare(&view.history).await?;
                let resume = match resume(furthest, &view, identity.segment_size) {
                    Err(AgentError::Refused { what, next }) => return Err(held_by(claims, what, next).await),
                    other => other?,
                };
                claims.enter(Line::of(&view.history), view.in_recovery).await?;
                let histories = leading_histories(&mut connection, &view, &resume).await?;
                Ok(Beginning {
                    new_slot,
                    connection,
                    view,
                    resume,
                    histories,
                })
            };
            match attempt.await {
                Ok(begun) => return Ok(begun),
                Err(error) if outage::is_waited_for(config.outage.policy, &error) => {
                    if attempts % SAY_EVERY == 0 {
                        tracing::warn!(%error, "not streaming yet, trying again");
                    }
                    attempts += 1;
                    let reason = error.to_string();
                    state.update(|snapshot| snapshot.connection = Reconnecting(reason));
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => {
                    self.take_back(new_slot).await;
                    return Err(claims.name_rival(error).await);
                }
            }
        }
    }
}

/// A refusal that also names the writer of the archive.
async fn held_by(claims: &Claims, what: String, next: String) -> AgentError {
    match claims.newest_holder().await {
        Some(holder) => AgentError::refused(format!("{what}. Its writer: {holder}"), next),
        None => AgentError::Refused { what, next },
    }
}

/// The history files of everything up to the timeline that is streamed first. When that timeline follows
/// an archived one its own history goes through the pipeline instead, after the rest of the old one.
async fn leading_histories(
    connection: &mut Connection,
    view: &ServerView,
    resume: &Resume,
) -> Result<Vec<(TimelineId, Bytes)>> {
    let mut files = server::histories(connection, view.timeline).await?;
    let last = resume.after.map_or(resume.timeline, |after| after.timeline);
    files.retain(|(timeline, _)| *timeline <= last);
    Ok(files)
}
