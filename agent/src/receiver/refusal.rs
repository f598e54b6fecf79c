//! What it means when the server does not stream, and what is done about its slot.
//!
//! Owns: telling apart a slot that is of no use any more, a standby that lags, a segment that is gone, a server that
//! is behind the archive; making the slot anew. Does not own: going on past missing WAL ([`super::bridge`]).

use highwater_format::LsnRange;

use super::Receiver;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::outage::LettingGo;
use crate::resume::{Resume, lagging};
use crate::segmenter::object_start;
use crate::{server, slot};

impl Receiver {
    /// What it means that a stream could not be had, or ended badly. Some refusals come only with its first message.
    pub(super) async fn refused(&mut self, error: AgentError, resume: &Resume) -> Result<()> {
        let AgentError::Postgres(refusal) = &error else {
            return Err(error);
        };
        if refusal.is_slot_invalidated() {
            return Err(self.remake_slot(refusal.to_string()).await?);
        }
        if let Some(end) = refusal.ahead_of_server().filter(|_| self.standby) {
            let at = Position {
                timeline: resume.timeline,
                lsn: resume.sealed,
            };
            return Err(lagging(at, end));
        }
        if !refusal.is_segment_removed() {
            return Err(explain(error, resume));
        }
        if self.got_on(resume) {
            return Err(AgentError::Trouble {
                what: format!("the server removed WAL while it was being streamed: {refusal}"),
                next: "The next connection shows whether what comes next is still there".into(),
            });
        }
        if self.is_only_the_overlap(resume) {
            self.removed = true;
            return Err(AgentError::Trouble {
                what: format!(
                    "the server no longer has the WAL before {}, which is archived",
                    object_start(self.context.shared.segment_size, resume.sealed)
                ),
                next: "The stream goes on from there without comparing it".into(),
            });
        }
        let cancel = self.context.cancel.clone();
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(AgentError::Cancelled),
            bridged = self.bridge(resume) => bridged,
        }
    }

    /// Whether the segment that is gone may be the archived one before the end: then the next session begins right
    /// after it, which is not compared.
    fn is_only_the_overlap(&self, resume: &Resume) -> bool {
        let begins_before = resume.start < object_start(self.context.shared.segment_size, resume.sealed);
        (begins_before || self.compares_before) && !self.removed
    }

    /// A slot that the server refuses to use any more is of no use to anybody. What was archived is not touched by
    /// making it anew; whether WAL is missing shows when the stream is asked for again.
    async fn remake_slot(&mut self, why: String) -> Result<AgentError> {
        let context = &self.context;
        let mut connection = server::connect(&context.conninfo).await?;
        let keeps = slot::remake(&mut connection, &context.conninfo, &context.slot, &why).await?;
        connection.close().await;
        self.cause = Some(why.clone());
        // Until a stream is compared it is not known that this server is the one to be archived.
        self.new_slot = Some(keeps);
        Ok(AgentError::Trouble {
            what: format!("slot {} was made anew: {why}", context.slot),
            next: "The stream goes on where the archive ends, as far as the server still has the WAL".into(),
        })
    }

    /// Makes the slot anew, so that the server may remove what it held, when the outage policy wants that.
    pub(super) async fn give_up_if_asked(&mut self) -> Result<()> {
        let context = &self.context;
        let letting_go = LettingGo {
            give_up: &context.give_up,
            conninfo: &context.conninfo,
            slot: &context.slot,
            system_id: Some(context.identity.system_id),
            standby: context.standby,
            state: &context.shared.state,
            clock: &context.clock,
        };
        if let Some(why) = letting_go.if_asked().await? {
            self.cause = Some(why);
        }
        Ok(())
    }
}

pub(super) fn is_removed(error: &AgentError) -> bool {
    matches!(error, AgentError::Postgres(error) if error.is_segment_removed())
}

/// What a refusal to stream means for the archive. Some come only with the first message of a stream.
fn explain(error: AgentError, resume: &Resume) -> AgentError {
    let AgentError::Postgres(error) = error else {
        return error;
    };
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
