//! The few ordinary SQL questions that the agent asks, beside the replication connection.
//!
//! Owns: their text and the reading of the answers. Everything the agent must have works without SQL; what
//! is asked here makes answers better (`check`, `status`, the server's clock).

use std::borrow::Cow;

use highwater_format::Time;
use highwater_pgwire::{ConnInfo, Connection, Mode, PgError, QueryResult};

use crate::error::{AgentError, Result};

/// The database that every cluster has (unless somebody took pains).
const MAINTENANCE: &str = "postgres";

/// No such database.
const NO_DATABASE: &str = "3D000";

/// No login: without a line for that database in `pg_hba.conf` the server does not say whether there is one.
const NO_LOGIN: &str = "28000";

/// Connects for ordinary SQL: to the database of the connection parameters, or to `postgres` where that is
/// only the role's name and no such database exists or may be used, as is usual for a role that replicates.
pub(crate) async fn connect(conn: &ConnInfo) -> Result<Connection, PgError> {
    let first = match Connection::connect(conn, Mode::Sql).await {
        Err(error) if conn.dbname == conn.user && asks_for_another(&error) => error,
        other => return other,
    };
    let mut conn = conn.clone();
    MAINTENANCE.clone_into(&mut conn.dbname);
    match Connection::connect(&conn, Mode::Sql).await {
        // That there is no such database is no reason why the other one was refused.
        Err(error) if error.sqlstate() == Some(NO_DATABASE) => Err(first),
        other => other,
    }
}

fn asks_for_another(error: &PgError) -> bool {
    matches!(error.sqlstate(), Some(NO_DATABASE | NO_LOGIN))
}

/// The server's clock.
pub(crate) async fn server_time(sql: &mut Connection) -> Result<Time> {
    let result = sql
        .simple_query("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now")
        .await?;
    Rows(result)
        .text(0, "now")
        .and_then(|micros| micros.parse().ok())
        .map(Time::from_unix_micros)
        .ok_or_else(|| AgentError::Bug("the server's clock could not be read".into()))
}

/// An answer, read by column name.
#[derive(Debug)]
pub(crate) struct Rows(pub(crate) QueryResult);

impl Rows {
    pub(crate) fn len(&self) -> usize {
        self.0.rows.len()
    }

    /// One value as text; `None` for NULL and for what is not there.
    pub(crate) fn text(&self, row: usize, column: &str) -> Option<Cow<'_, str>> {
        let place = self.0.columns.iter().position(|name| name == column)?;
        self.0
            .rows
            .get(row)?
            .get(place)?
            .as_deref()
            .map(String::from_utf8_lossy)
    }

    /// One value, parsed; `None` also for what does not parse.
    pub(crate) fn value<T: std::str::FromStr>(&self, row: usize, column: &str) -> Option<T> {
        self.text(row, column)?.parse().ok()
    }

    /// One boolean.
    pub(crate) fn flag(&self, row: usize, column: &str) -> Option<bool> {
        self.text(row, column).map(|text| text == "t")
    }
}
