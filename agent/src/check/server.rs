//! Asking PostgreSQL for everything that `judge` looks at.
//!
//! Owns: one replication connection, one ordinary connection, and which question goes where: settings by
//! SHOW over replication (needs no grant), the rest by SQL, and settings too, for where the replication login is
//! refused. An answer that is not to be had is `None`.
//! Does not own: what the answers mean.

use std::collections::BTreeMap;

use highwater_config::{Config, Standby};
use highwater_format::{SystemId, TimelineId};
use highwater_pgwire::{ConnInfo, Connection, Mode, PgError};
use secrecy::ExposeSecret;

use crate::sql::{self, Rows};
use crate::synchronous::Manner;

/// Settings that matter, all readable with SHOW by any role.
const SETTINGS: [&str; 12] = [
    "wal_level",
    "max_wal_senders",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "wal_keep_size",
    "synchronous_standby_names",
    "synchronous_commit",
    "archive_mode",
    "data_checksums",
    "full_page_writes",
    "wal_segment_size",
    "wal_sender_timeout",
];

/// How one connection attempt ended badly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) sqlstate: Option<String>,
    pub(crate) message: String,
    /// `max_wal_senders`, where that is what was refused.
    pub(crate) walsender_limit: Option<u32>,
}

impl From<PgError> for Refusal {
    fn from(error: PgError) -> Refusal {
        Refusal {
            sqlstate: error.sqlstate().map(str::to_owned),
            walsender_limit: error.walsender_limit(),
            message: error.to_string(),
        }
    }
}

/// What IDENTIFY_SYSTEM says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct System {
    pub(crate) id: SystemId,
    pub(crate) timeline: TimelineId,
    pub(crate) version: u32,
}

/// A replication slot as the view shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) physical: bool,
    pub(crate) active_pid: Option<u32>,
    pub(crate) reserved: bool,
    pub(crate) wal_status: Option<String>,
    pub(crate) safe_wal_size: Option<i64>,
}

/// What only SQL can tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Catalog {
    pub(crate) in_recovery: Option<bool>,
    pub(crate) can_replicate: Option<bool>,
    pub(crate) walsenders: Option<u32>,
    /// All slots; `None` if the view could not be read.
    pub(crate) slots: Option<Vec<Slot>>,
}

/// Everything that was found out.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// `Err`: the connection parameters themselves are wrong.
    pub(crate) target: Result<String, String>,
    pub(crate) user: String,
    pub(crate) replication: Result<System, Refusal>,
    pub(crate) sql: Result<Catalog, Refusal>,
    pub(crate) settings: BTreeMap<&'static str, String>,
    /// What the configuration says of a server in recovery.
    pub(crate) standby: Standby,
    /// What it says of the server's commits.
    pub(crate) manner: Manner,
}

impl Facts {
    pub(crate) fn system_id(&self) -> Option<SystemId> {
        self.replication.as_ref().ok().map(|system| system.id)
    }
}

/// Asks.
pub(crate) async fn look(config: &Config) -> Facts {
    let text = config
        .cluster
        .connection
        .as_ref()
        .map(|secret| secret.expose_secret());
    let conn = match ConnInfo::resolve(text) {
        Ok(conn) => conn.with_application_name("highwater check"),
        Err(error) => return unresolved(error, config),
    };
    let mut settings = BTreeMap::new();
    let catalog = catalog(&conn, &mut settings).await.map_err(Refusal::from);
    let replication = replication(&conn, &mut settings).await.map_err(Refusal::from);
    Facts {
        target: Ok(conn.describe()),
        user: conn.user,
        replication,
        sql: catalog,
        settings,
        standby: config.cluster.standby,
        manner: Manner::from(&config.wal),
    }
}

fn unresolved(error: PgError, config: &Config) -> Facts {
    let refusal = Refusal::from(error);
    Facts {
        target: Err(refusal.message.clone()),
        user: String::new(),
        replication: Err(refusal.clone()),
        sql: Err(refusal),
        settings: BTreeMap::new(),
        standby: config.cluster.standby,
        manner: Manner::from(&config.wal),
    }
}

async fn replication(
    conn: &ConnInfo,
    settings: &mut BTreeMap<&'static str, String>,
) -> Result<System, PgError> {
    let mut connection = Connection::connect(conn, Mode::Replication).await?;
    let system = connection.identify_system().await?;
    for name in SETTINGS {
        if let Ok(value) = connection.show(name).await {
            settings.insert(name, value);
        }
    }
    let version = connection.server_version();
    connection.close().await;
    Ok(System {
        id: system.system_id,
        timeline: system.timeline,
        version,
    })
}

async fn catalog(conn: &ConnInfo, settings: &mut BTreeMap<&'static str, String>) -> Result<Catalog, PgError> {
    let mut sql = sql::connect(conn).await?;
    settings.extend(shown(&mut sql).await);
    let catalog = Catalog {
        in_recovery: one(&mut sql, "SELECT pg_catalog.pg_is_in_recovery() AS it")
            .await
            .and_then(|rows| rows.flag(0, "it")),
        can_replicate: one(
            &mut sql,
            "SELECT rolreplication OR rolsuper AS it FROM pg_catalog.pg_roles WHERE rolname = current_user",
        )
        .await
        .and_then(|rows| rows.flag(0, "it")),
        walsenders: one(
            &mut sql,
            "SELECT count(*) AS it FROM pg_catalog.pg_stat_replication",
        )
        .await
        .and_then(|rows| rows.value(0, "it")),
        slots: slots(&mut sql).await,
    };
    sql.close().await;
    Ok(catalog)
}

/// Settings in the form that SHOW gives them.
async fn shown(sql: &mut Connection) -> Vec<(&'static str, String)> {
    let query = format!(
        "SELECT name, pg_catalog.current_setting(name) AS it FROM pg_catalog.pg_settings WHERE name IN ('{}')",
        SETTINGS.join("', '")
    );
    let Some(rows) = one(sql, &query).await else {
        return Vec::new();
    };
    let setting = |row| {
        let named = rows.text(row, "name")?;
        let name = SETTINGS.into_iter().find(|name| *name == named)?;
        Some((name, rows.text(row, "it")?.into_owned()))
    };
    (0..rows.len()).filter_map(setting).collect()
}

async fn slots(sql: &mut Connection) -> Option<Vec<Slot>> {
    let query = "SELECT slot_name, slot_type, active_pid, restart_lsn IS NOT NULL AS reserved, wal_status, \
                 safe_wal_size FROM pg_catalog.pg_replication_slots";
    let rows = one(sql, query).await?;
    let slot = |row| Slot {
        name: rows.text(row, "slot_name").unwrap_or_default().into_owned(),
        physical: rows.text(row, "slot_type").as_deref() == Some("physical"),
        active_pid: rows.value(row, "active_pid"),
        reserved: rows.flag(row, "reserved").unwrap_or_default(),
        wal_status: rows.text(row, "wal_status").map(|text| text.into_owned()),
        safe_wal_size: rows.value(row, "safe_wal_size"),
    };
    Some((0..rows.len()).map(slot).collect())
}

/// A question that may be refused without anything else being wrong.
async fn one(sql: &mut Connection, query: &str) -> Option<Rows> {
    match sql.simple_query(query).await {
        Ok(result) => Some(Rows(result)),
        Err(error) => {
            tracing::debug!(%error, "not visible to this role");
            None
        }
    }
}
