//! The replication commands that answer with a row.
//!
//! Owns their text and the reading of their answers. Names are checked before they are sent, because
//! the replication grammar has no parameters.

use bytes::Bytes;
use highwater_format::{Lsn, SystemId, TimelineId};

use crate::connection::{Connection, QueryResult};
use crate::error::PgError;
use crate::message::{self, Row};

/// First version with `READ_REPLICATION_SLOT`.
const READ_SLOT_SINCE: u32 = 150_000;
/// `NAMEDATALEN - 1`: the longest slot name.
const NAME_LIMIT: usize = 63;

/// Answer to `IDENTIFY_SYSTEM`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentifySystem {
    /// Identifier of the lineage; check it on every connect.
    pub system_id: SystemId,
    /// Current timeline. It can change before the next command: name it in `START_REPLICATION`.
    pub timeline: TimelineId,
    /// Flush position; on a standby what it received or replayed.
    pub xlogpos: Lsn,
    /// Database, `None` on a physical replication connection.
    pub dbname: Option<String>,
}

/// Answer to `READ_REPLICATION_SLOT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotPosition {
    /// First LSN the slot keeps; `None` if it reserves nothing, or was invalidated.
    pub restart_lsn: Option<Lsn>,
    /// Timeline of that LSN.
    pub restart_timeline: Option<TimelineId>,
}

/// A timeline history file, as the server has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryFile {
    /// File name, verified to be that of the timeline asked for.
    pub name: String,
    /// Content, verbatim.
    pub content: Bytes,
}

impl Connection {
    /// `IDENTIFY_SYSTEM`.
    pub async fn identify_system(&mut self) -> Result<IdentifySystem, PgError> {
        const DURING: &str = "IDENTIFY_SYSTEM";
        let row = single_row(self.simple_query(DURING).await?, DURING)?;
        Ok(IdentifySystem {
            system_id: message::parsed(&row, 0, "systemid", DURING)?,
            timeline: timeline(message::parsed(&row, 1, "timeline", DURING)?, DURING)?,
            xlogpos: message::parsed(&row, 2, "xlogpos", DURING)?,
            dbname: message::optional_text(&row, 3, DURING)?.map(str::to_owned),
        })
    }

    /// `SHOW name`: a setting of the server as text (`16MB`).
    pub async fn show(&mut self, name: &str) -> Result<String, PgError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(PgError::Argument {
                what: "setting name",
                value: name.to_owned(),
                reason: "letters, digits, underscores and dots only",
            });
        }
        let command = format!("SHOW {name}");
        let row = single_row(self.simple_query(&command).await?, &command)?;
        Ok(message::text(&row, 0, name, &command)?.to_owned())
    }

    /// Creates a physical slot. With `reserve` it keeps WAL from the last checkpoint's redo point on;
    /// without, nothing until it is first used. A `temporary` slot ends with the connection.
    pub async fn create_physical_slot(
        &mut self,
        slot: &str,
        reserve: bool,
        temporary: bool,
    ) -> Result<(), PgError> {
        check_slot_name(slot)?;
        let temporary = if temporary { " TEMPORARY" } else { "" };
        let reserve = if reserve { " RESERVE_WAL" } else { "" };
        // The keyword form is understood by every version, also by those with the parenthesised one.
        let command = format!("CREATE_REPLICATION_SLOT \"{slot}\"{temporary} PHYSICAL{reserve}");
        self.query_of_disk(&command).await.map(drop)
    }

    /// `READ_REPLICATION_SLOT` (15 and newer): `None` if there is no such slot.
    pub async fn read_replication_slot(&mut self, slot: &str) -> Result<Option<SlotPosition>, PgError> {
        check_slot_name(slot)?;
        self.require_version("READ_REPLICATION_SLOT", READ_SLOT_SINCE)?;
        let command = format!("READ_REPLICATION_SLOT \"{slot}\"");
        let row = single_row(self.simple_query(&command).await?, &command)?;
        if message::optional_text(&row, 0, &command)?.is_none() {
            return Ok(None);
        }
        let restart_lsn = match message::optional_text(&row, 1, &command)? {
            Some(_) => Some(message::parsed(&row, 1, "restart_lsn", &command)?),
            None => None,
        };
        let restart_timeline = match message::optional_text(&row, 2, &command)? {
            // Timeline 0 stands for "none".
            Some(_) => TimelineId::new(message::parsed(&row, 2, "restart_tli", &command)?),
            None => None,
        };
        Ok(Some(SlotPosition {
            restart_lsn,
            restart_timeline,
        }))
    }

    /// Drops a slot that nobody streams from.
    pub async fn drop_replication_slot(&mut self, slot: &str) -> Result<(), PgError> {
        check_slot_name(slot)?;
        self.query_of_disk(&format!("DROP_REPLICATION_SLOT \"{slot}\""))
            .await
            .map(drop)
    }

    /// The history file of a timeline; `None` if the server has none, as is the case for timeline 1.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<Option<HistoryFile>, PgError> {
        let command = format!("TIMELINE_HISTORY {timeline}");
        let result = match self.simple_query(&command).await {
            // undefined_file: the server has no such history file.
            Err(error) if error.sqlstate() == Some("58P01") => return Ok(None),
            other => other?,
        };
        let row = single_row(result, &command)?;
        let name = message::text(&row, 0, "filename", &command)?.to_owned();
        let wanted = format!("{}.history", timeline.hex8());
        if name != wanted {
            return Err(PgError::protocol(
                &command,
                format!("asked for {wanted}, the server sent {name:?}"),
            ));
        }
        let Some(Some(content)) = row.into_iter().nth(1) else {
            return Err(PgError::protocol(&command, "column content is missing or NULL"));
        };
        Ok(Some(HistoryFile { name, content }))
    }

    pub(crate) fn require_version(&self, what: &'static str, needs: u32) -> Result<(), PgError> {
        match self.server_version() {
            version if version < needs => Err(PgError::Version {
                what,
                needs: needs / 10_000,
                version,
            }),
            _ => Ok(()),
        }
    }
}

fn single_row(result: QueryResult, during: &str) -> Result<Row, PgError> {
    let count = result.rows.len();
    match <[Row; 1]>::try_from(result.rows) {
        Ok([row]) => Ok(row),
        Err(_) => Err(PgError::protocol(
            during,
            format!("expected one row, the server sent {count}"),
        )),
    }
}

pub(crate) fn timeline(number: u32, during: &str) -> Result<TimelineId, PgError> {
    TimelineId::new(number).ok_or_else(|| PgError::protocol(during, "timeline 0 does not exist"))
}

/// Slot names as the server allows them (`ReplicationSlotValidateName`).
pub(crate) fn check_slot_name(slot: &str) -> Result<(), PgError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if slot.is_empty() || slot.len() > NAME_LIMIT || !slot.chars().all(plain) {
        return Err(PgError::Argument {
            what: "slot name",
            value: slot.to_owned(),
            reason: "1 to 63 lower case letters, digits and underscores",
        });
    }
    Ok(())
}
