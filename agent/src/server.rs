//! What the agent asks PostgreSQL over a replication connection, besides WAL.
//!
//! Owns: the facts that identify a server, the history files. Does not own: the slot ([`crate::slot`]). Every fact comes from the server
//! itself at each connection; nothing is remembered from an earlier one.

use std::time::Duration;

use bytes::Bytes;
use highwater_config::Standby;
use highwater_format::{History, Identity, Lsn, SegmentSize, SystemId, TimelineId};
use highwater_pgwire::{ConnInfo, Connection, IdentifySystem, Mode};

use crate::error::{AgentError, Result};
use crate::resume::ServerView;
use crate::slot;

/// How long a probe of the server may take.
const PROBE_PATIENCE: Duration = Duration::from_secs(3);

/// SQLSTATE of an answer to SHOW.
const NO_SUCH_SETTING: &str = "42704";

/// Opens a replication connection.
pub async fn connect(info: &ConnInfo) -> Result<Connection> {
    Ok(Connection::connect(info, Mode::Replication).await?)
}

/// The facts that are fixed for a lineage.
pub async fn identity(conn: &mut Connection) -> Result<Identity> {
    let system = conn.identify_system().await?;
    let segment_size = conn.show("wal_segment_size").await?;
    Ok(Identity {
        system_id: system.system_id,
        server_version: conn.server_version(),
        segment_size: SegmentSize::from_show(&segment_size)
            .map_err(|error| unexpected("wal_segment_size", &error))?,
        wal_block_size: number(conn, "wal_block_size").await?,
        block_size: number(conn, "block_size").await?,
    })
}

async fn number(conn: &mut Connection, setting: &str) -> Result<u32> {
    let text = conn.show(setting).await?;
    text.parse().map_err(|error| unexpected(setting, &error))
}

fn unexpected(setting: &str, error: &dyn std::fmt::Display) -> AgentError {
    AgentError::refused(
        format!("the server's {setting} cannot be used: {error}"),
        "Check that this is PostgreSQL 14 to 18",
    )
}

/// Where the server stands, as [`facts`] says; only then sees to it that there is a slot that keeps WAL ([`crate::slot`]): on
/// a server that is not archived it would fill the disk.
pub async fn view(
    conn: &mut Connection,
    info: &ConnInfo,
    slot: &str,
    identity: &Identity,
    standby: Standby,
) -> Result<ServerView> {
    let facts = facts(conn, identity, standby).await?;
    let slot = slot::ensure(conn, info, slot).await?;
    Ok(ServerView {
        slot: slot.keeps,
        slot_event: slot.event,
        slot_is_new: slot.made,
        ..facts
    })
}

/// Where the server stands, without a look at its slots. Refuses a standby where none is allowed.
pub async fn facts(conn: &mut Connection, identity: &Identity, standby: Standby) -> Result<ServerView> {
    let (system, in_recovery) = admit(conn, Some(identity.system_id), standby).await?;
    let history = history_of(conn, system.timeline).await?;
    Ok(ServerView {
        timeline: system.timeline,
        end: system.xlogpos,
        history,
        slot: None,
        slot_event: None,
        slot_is_new: false,
        in_recovery,
    })
}

/// Refuses the server of another cluster, and a standby where none is allowed. Says whether it is one.
pub async fn admit(
    conn: &mut Connection,
    system_id: Option<SystemId>,
    standby: Standby,
) -> Result<(IdentifySystem, bool)> {
    let system = conn.identify_system().await?;
    if let Some(before) = system_id.filter(|before| *before != system.system_id) {
        return Err(AgentError::ServerChanged {
            before,
            now: system.system_id,
        });
    }
    let in_recovery = in_recovery(conn).await?;
    if in_recovery && standby == Standby::Refuse {
        return Err(refused_standby(system.timeline, system.xlogpos));
    }
    Ok((system, in_recovery))
}

/// Whether the server is a standby now: follows its state even while a connection stays open. Older ones than 14 do
/// not say; one that does not answer has not said that it is none.
pub async fn in_recovery(conn: &mut Connection) -> Result<bool> {
    match conn.show("in_hot_standby").await {
        Ok(answer) => Ok(answer == "on"),
        Err(error) if error.sqlstate() == Some(NO_SUCH_SETTING) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn refused_standby(timeline: TimelineId, end: Lsn) -> AgentError {
    AgentError::refused(
        format!(
            "the server is in recovery: it is a standby, or is being restored (timeline {timeline}, WAL up to {end}). Its WAL \
             comes later than the primary's, and what it has not received cannot be archived"
        ),
        "Point the agent at the primary, for instance with target_session_attrs=primary and all hosts in the connection \
         string. To run one agent beside every node, set standby = \"stream\" in [cluster]",
    )
}

/// A history file, verbatim; none if the server has none (the first timeline has none).
pub async fn history(conn: &mut Connection, timeline: TimelineId) -> Result<Option<Bytes>> {
    if timeline == TimelineId::FIRST {
        return Ok(None);
    }
    Ok(conn.timeline_history(timeline).await?.map(|file| file.content))
}

/// The history of a timeline, as the server knows it.
pub async fn history_of(conn: &mut Connection, timeline: TimelineId) -> Result<History> {
    match history(conn, timeline).await? {
        Some(content) => parse_history(timeline, &content),
        None => Ok(History::root(timeline)),
    }
}

/// The history file of a timeline that must have one.
pub async fn required_history(conn: &mut Connection, timeline: TimelineId) -> Result<Bytes> {
    history(conn, timeline).await?.ok_or_else(|| {
        AgentError::refused(
            format!("the server has no history file for timeline {timeline}"),
            "Copy the file into its pg_wal directory from the server that was promoted",
        )
    })
}

/// Reads a history file.
pub fn parse_history(timeline: TimelineId, content: &[u8]) -> Result<History> {
    History::parse(timeline, content).map_err(|error| {
        AgentError::refused(
            format!("the server's history file of timeline {timeline} cannot be read: {error}"),
            "Restore the file in its pg_wal directory",
        )
    })
}

/// The history files that lead to `timeline`, oldest first; files of long gone ancestors may be missing.
pub async fn histories(conn: &mut Connection, timeline: TimelineId) -> Result<Vec<(TimelineId, Bytes)>> {
    let Some(content) = history(conn, timeline).await? else {
        return Ok(Vec::new());
    };
    let mut files = Vec::new();
    for entry in parse_history(timeline, &content)?.entries {
        if let Some(ancestor) = history(conn, entry.timeline).await? {
            files.push((entry.timeline, ancestor));
        }
    }
    files.push((timeline, content));
    Ok(files)
}

/// Whether the server is shutting down: asked with a connection of its own, for when nothing is read from the
/// stream.
pub async fn is_stopping(info: &ConnInfo) -> bool {
    match tokio::time::timeout(PROBE_PATIENCE, Connection::connect(info, Mode::Replication)).await {
        Ok(Ok(conn)) => {
            conn.close().await;
            false
        }
        Ok(Err(error)) => error.is_shutting_down(),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use highwater_pgwire::{ByteStream, Dialer, Environment};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const WELCOME: &[u8] =
        b"R\0\0\0\x08\0\0\0\0S\0\0\0\x18server_version\x0014.9\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x01Z\0\0\0\x05I";

    /// What is made of a server that lets everybody in, answers with these bytes and goes away.
    async fn in_recovery_after(answer: &'static [u8]) -> Result<bool> {
        let text = "host=nowhere.invalid user=hw sslmode=disable";
        let info = ConnInfo::resolve_in(Some(text), &Environment::empty()).unwrap();
        let info = info.with_dialer(Dialer::new(move |_| {
            let (ours, mut theirs) = tokio::io::duplex(4096);
            tokio::spawn(async move {
                let mut said = [0; 1024];
                for bytes in [WELCOME, answer] {
                    assert!(theirs.read(&mut said).await.unwrap() > 0);
                    theirs.write_all(bytes).await.unwrap();
                }
            });
            Box::pin(async move { Ok(Box::new(ours) as Box<dyn ByteStream>) })
        }));
        in_recovery(&mut connect(&info).await.unwrap()).await
    }

    #[tokio::test]
    async fn a_server_that_goes_away_has_not_said_that_it_is_a_primary() {
        let unknown = b"E\0\0\0\x1eSERROR\0VERROR\0C42704\0Mno\0\0Z\0\0\0\x05I";
        assert!(!in_recovery_after(unknown).await.unwrap());
        let gone = in_recovery_after(b"").await;
        assert!(
            matches!(&gone, Err(AgentError::Postgres(error)) if error.is_connection_lost()),
            "{gone:?}"
        );
    }
}
