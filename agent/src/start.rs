//! Where the first stream begins, and the right to store it.
//!
//! Owns the order of the questions: is the server one that may be archived, does the archive know its timeline as the
//! same one, where does the archive end, may this agent write. Nothing is stored before all are answered. Does not own
//! the answers ([`crate::resume`], [`crate::writer`]).

use highwater_config::Config;
use highwater_format::Identity;
use highwater_pgwire::{ConnInfo, Connection};

use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::resume::{Resume, ServerView, resume};
use crate::run::wait_or_fail;
use crate::server;
use crate::writer::Claims;
use crate::writer::judge::Line;

/// Where the stream begins, and the right to write it. Waits for a standby that has yet to receive what is archived.
pub(crate) async fn beginning(
    config: &Config,
    conninfo: &ConnInfo,
    identity: &Identity,
    claims: &Claims,
    furthest: Option<Position>,
    connection: Connection,
) -> Result<(Connection, ServerView, Resume)> {
    let mut open = Some(connection);
    loop {
        let attempt = async {
            let mut connection = match open.take() {
                Some(connection) => connection,
                None => server::connect(conninfo).await?,
            };
            let view = server::view(&mut connection, conninfo, &config.cluster.slot, identity).await?;
            server::refuse_standby(&view, config.cluster.standby)?;
            claims.compare(&view.history).await?;
            let resume = match resume(furthest, &view, identity.segment_size) {
                Err(AgentError::Refused { what, next }) => return Err(held_by(claims, what, next).await),
                other => other?,
            };
            claims.enter(Line::of(&view.history), view.in_recovery).await?;
            Ok((connection, view, resume))
        };
        match attempt.await {
            Ok(begun) => return Ok(begun),
            Err(error) => wait_or_fail(claims.name_rival(error).await, "not streaming yet").await?,
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
