//! The physical replication slot: there is one, and it keeps WAL.
//!
//! Owns: creating it, and making it anew when it keeps nothing: never reserved (`CREATE_REPLICATION_SLOT x PHYSICAL`),
//! lost to `max_slot_wal_keep_size`, invalidated by `idle_replication_slot_timeout`. Such a slot may look alive again
//! once somebody streams from it (15, 17) without protecting anything, so it is dropped, never revived.
//! Does not own: where the stream begins. The archive's end is tried first whatever the slot says; a new slot only sees
//! to it that nothing more is removed meanwhile.

use std::time::Duration;

use highwater_format::Lsn;
use highwater_pgwire::{ConnInfo, Connection, Mode};
use tokio::time::{Instant, sleep, timeout};

use crate::error::{AgentError, Result};
use crate::sql::{self, Rows};

/// `READ_REPLICATION_SLOT` exists from this version on.
const READ_SLOT_SINCE: u32 = 150_000;

/// From this version on an invalidated slot stays one although it may have a position.
const MARKED_INVALID_SINCE: u32 = 160_000;

/// READ_REPLICATION_SLOT's answer to a logical slot.
const NOT_PHYSICAL: &str = "0A000";

/// For so long the server process of a connection that was just closed is waited for: until it notices, it holds the slot.
pub(crate) const LET_GO: Duration = Duration::from_secs(5);

/// Between two attempts to drop a slot that is held.
const PAUSE: Duration = Duration::from_millis(250);

/// How long taking a slot back may take at all.
const TAKE_BACK: Duration = Duration::from_secs(10);

/// The slot as it is now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Slot {
    /// WAL is kept from here on.
    pub keeps: Option<Lsn>,
    /// What was wrong with it, when it had to be made just now: the likely cause of a gap.
    pub event: Option<String>,
    /// It was made just now: there was none of that name, or one that kept nothing.
    pub made: bool,
}

/// Finds the slot; makes it where it is missing, anew where it keeps nothing.
pub async fn ensure(conn: &mut Connection, info: &ConnInfo, name: &str) -> Result<Slot> {
    let found = position(conn, info, name).await?;
    let event = match found {
        Some(Some(keeps)) if !is_marked_lost(conn, info, name).await => {
            return Ok(Slot {
                keeps: Some(keeps),
                event: None,
                made: false,
            });
        }
        Some(_) => {
            drop_it(conn, name).await?;
            format!(
                "slot \"{name}\" kept no WAL any more: it was lost, invalidated, or had never reserved any"
            )
        }
        None => format!("slot \"{name}\" did not exist"),
    };
    let made = create(conn, name, &event).await?;
    Ok(Slot {
        keeps: position(conn, info, name).await?.flatten(),
        event: Some(event),
        made,
    })
}

/// Drops a slot that was made for nothing: nobody reads from it, and it would keep WAL until the disk is full. One that
/// somebody uses meanwhile stays, and so does one that does not keep what it kept when it was made: the address may lead
/// to another server by now. False: it is left, because the server could not be asked or somebody holds it.
pub async fn take_back(info: &ConnInfo, name: &str, made_at: Option<Lsn>) -> bool {
    let dropped = timeout(TAKE_BACK, drop_if_unmoved(info, name, made_at)).await;
    match dropped.unwrap_or_else(|_| Err(silent())) {
        Ok(true) => tracing::info!(slot = name, "dropped the slot again that was made a moment ago"),
        Ok(false) => tracing::warn!(
            slot = name,
            "the slot that was made a moment ago is not there any more, or has moved"
        ),
        Err(error) => {
            tracing::warn!(slot = name, %error, "the slot that was made a moment ago is left: drop it");
            return false;
        }
    }
    true
}

fn silent() -> AgentError {
    AgentError::Trouble {
        what: format!("the server did not answer within {} s", TAKE_BACK.as_secs()),
        next: "Look whether it is there".into(),
    }
}

/// False: it is another one by now.
async fn drop_if_unmoved(info: &ConnInfo, name: &str, made_at: Option<Lsn>) -> Result<bool> {
    let mut conn = Connection::connect(info, Mode::Replication).await?;
    let dropped = drop_when_free(&mut conn, info, name, LET_GO, |keeps| keeps == made_at).await?;
    conn.close().await;
    Ok(dropped)
}

/// Drops the slot as soon as nobody holds it, as long as it is a physical one and where it keeps WAL from is as expected: that
/// is asked before every attempt, because another one may have taken its name meanwhile. False: there is none such.
pub(crate) async fn drop_when_free(
    conn: &mut Connection,
    info: &ConnInfo,
    name: &str,
    patience: Duration,
    is_it: impl Fn(Option<Lsn>) -> bool,
) -> Result<bool> {
    let began = Instant::now();
    loop {
        if !position(conn, info, name).await?.is_some_and(&is_it) {
            return Ok(false);
        }
        match conn.drop_replication_slot(name).await {
            Ok(()) => return Ok(true),
            Err(error) if error.is_slot_missing() => return Ok(false),
            Err(error) if error.is_slot_busy() && began.elapsed() < patience => sleep(PAUSE).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Drops the slot and makes it anew, so that the server keeps WAL only from its last checkpoint on. Nothing is
/// acknowledged by that: the stream still begins where the archive ends. Returns where it keeps WAL from.
pub async fn remake(conn: &mut Connection, info: &ConnInfo, name: &str, why: &str) -> Result<Option<Lsn>> {
    // Only a physical slot has a position here: another one of that name is somebody else's.
    if position(conn, info, name).await?.is_some() {
        drop_it(conn, name).await?;
    }
    create(conn, name, why).await?;
    Ok(position(conn, info, name).await?.flatten())
}

/// False: somebody else has made it in this moment.
async fn create(conn: &mut Connection, name: &str, why: &str) -> Result<bool> {
    match conn.create_physical_slot(name, true, false).await {
        Ok(()) => tracing::info!(slot = name, why, "created the replication slot"),
        Err(error) if error.is_slot_exists() => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    Ok(true)
}

async fn drop_it(conn: &mut Connection, name: &str) -> Result<()> {
    match conn.drop_replication_slot(name).await {
        Ok(()) => tracing::warn!(slot = name, "dropped the replication slot, to make it anew"),
        Err(error) if error.is_slot_missing() => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// None: no such slot. Some(None): it keeps no WAL. Fails for a logical slot.
pub(crate) async fn position(
    conn: &mut Connection,
    info: &ConnInfo,
    name: &str,
) -> Result<Option<Option<Lsn>>> {
    if conn.server_version() >= READ_SLOT_SINCE {
        return match conn.read_replication_slot(name).await {
            Ok(found) => Ok(found.map(|position| position.restart_lsn)),
            Err(error) if error.sqlstate() == Some(NOT_PHYSICAL) => Err(logical(name)),
            Err(error) => Err(error.into()),
        };
    }
    // The name is one that the configuration allows: [a-z0-9_].
    let query = format!(
        "SELECT slot_type, restart_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}'"
    );
    let mut sql = sql::connect(info).await?;
    let rows = Rows(sql.simple_query(&query).await?);
    sql.close().await;
    if rows.len() == 0 {
        return Ok(None);
    }
    if rows.text(0, "slot_type").as_deref() != Some("physical") {
        return Err(logical(name));
    }
    Ok(Some(rows.value(0, "restart_lsn")))
}

fn logical(name: &str) -> AgentError {
    AgentError::refused(
        format!("slot {name} is a logical slot: somebody else's"),
        "Choose another name with `slot` in [cluster]",
    )
}

/// Whether the server has given the slot up although it still shows a position. Without SQL the stream itself
/// finds out: 18 refuses it, and before that it works as long as the WAL is there.
async fn is_marked_lost(conn: &Connection, info: &ConnInfo, name: &str) -> bool {
    if conn.server_version() < MARKED_INVALID_SINCE {
        return false;
    }
    let query = format!(
        "SELECT wal_status = 'lost' AS lost FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}'"
    );
    let Ok(mut sql) = sql::connect(info).await else {
        return false;
    };
    let answer = sql.simple_query(&query).await;
    sql.close().await;
    answer.is_ok_and(|rows| Rows(rows).flag(0, "lost") == Some(true))
}
