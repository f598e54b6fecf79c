//! A replication login that was refused: which setting, right or file it is, and the line that mends it.
//!
//! Pure. Owns the wording of that one finding, and of the cure for too few walsenders. Does not own: what is judged of a
//! server that lets the agent in (see `judge`).

use super::Finding;
use super::server::{Facts, Refusal};

/// The setting.
pub(super) const WALSENDERS: &str = "max_wal_senders";
/// PostgreSQL's own default.
const ENOUGH: u32 = 10;

pub(super) const CONNECTION_HELP: &str =
    "[cluster]\nconnection = \"host=/var/run/postgresql user=highwater\"";

/// Why the replication connection was refused. SQLSTATE decides; where one has several causes, what else is known of the
/// server tells them apart.
pub(super) fn refused(facts: &Facts, refusal: &Refusal) -> Finding {
    let user = quoted(&facts.user);
    let plain = &facts.user;
    let sql_works = facts.sql.is_ok();
    let (what, mend) = match refusal.sqlstate.as_deref() {
        Some("28P01") => (
            "password",
            format!(
                "put the role's password into ~/.pgpass or PGPASSFILE, or change it:\nALTER ROLE {user} PASSWORD '...';"
            ),
        ),
        Some("28000") if sql_works => ("pg_hba.conf", hba("replication", plain)),
        Some("28000") => (
            "login",
            format!(
                "CREATE ROLE {user} LOGIN REPLICATION PASSWORD '...';\nand in pg_hba.conf:\n{}",
                hba("replication", plain)
            ),
        ),
        Some("42501") => ("replication right", format!("ALTER ROLE {user} REPLICATION;")),
        Some("53300") => return full(facts, refusal),
        Some("57P03") => (
            "connection",
            "PostgreSQL is starting or stopping: try again".into(),
        ),
        None if refusal.at_login => (
            "login",
            "put the role's password into ~/.pgpass (mode 0600) or PGPASSFILE, or let the role in without one (peer, cert) in \
             pg_hba.conf"
                .into(),
        ),
        _ => (
            "connection",
            format!("check that PostgreSQL runs and listens where the connection leads:\n{CONNECTION_HELP}"),
        ),
    };
    Finding::fail(what, &refusal.message, mend)
}

/// 53300 is told of walsenders with the setting's name, and of connections without.
fn full(facts: &Facts, refusal: &Refusal) -> Finding {
    let seen = &refusal.message;
    let Some(limit) = refusal.walsender_limit else {
        let mend = format!(
            "end connections that are not needed, or raise the role's own limit, if it has one:\n\
             ALTER ROLE {} CONNECTION LIMIT -1;\nor with a restart of PostgreSQL:\nALTER SYSTEM SET max_connections = 200;",
            quoted(&facts.user)
        );
        return Finding::fail("max_connections", seen, mend);
    };
    let what = match limit {
        0 => "walsenders are switched off; switch them on:",
        _ => "every walsender is taken; end one that is not needed, or:",
    };
    Finding::fail(
        WALSENDERS,
        seen,
        format!("{what}\n{}", more_walsenders(facts, limit)),
    )
}

/// The lines that give PostgreSQL more walsenders than `limit`. With `wal_level = minimal` it starts with none and with none
/// only, so that where there are none the level belongs to it: one line without the other would stop the server.
pub(super) fn more_walsenders(facts: &Facts, limit: u32) -> String {
    let level = match facts.settings.get("wal_level").map(String::as_str) {
        Some("minimal") => "ALTER SYSTEM SET wal_level = 'replica';\n",
        None if limit == 0 => {
            "ALTER SYSTEM SET wal_level = 'replica';  -- where it is minimal, not logical\n"
        }
        _ => "",
    };
    let enough = match limit {
        0..ENOUGH => ENOUGH,
        more => more.saturating_add(ENOUGH),
    };
    format!("{level}ALTER SYSTEM SET max_wal_senders = {enough};\nthen restart PostgreSQL")
}

/// The lines that let the role into `database`.
pub(super) fn hba(database: &str, user: &str) -> String {
    format!(
        "local  {database:<11}  {user}                 scram-sha-256\n\
         host   {database:<11}  {user}  samenet        scram-sha-256\n\
         then: SELECT pg_reload_conf();"
    )
}

pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
