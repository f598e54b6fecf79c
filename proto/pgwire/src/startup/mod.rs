//! From connection parameters to a connection that is ready for commands.
//!
//! Owns the order in which hosts and kinds of encryption are tried, and the time limit of each try.
//! A server that answers and refuses the login ends the search, as in libpq: the next host would be
//! asked with the same wrong password.

mod auth;
mod negotiate;
mod socket;

use std::time::Duration;

use crate::connection::{Connection, Mode, Session, version_number};
use crate::conninfo::{ConnInfo, Host, HostSpec, SessionAttrs, SslMode};
use crate::error::PgError;
use crate::frame::{FrameReader, FrameWriter};
use negotiate::Encryption;

/// Connects to the first suitable host.
pub(crate) async fn connect(info: &ConnInfo, mode: Mode) -> Result<Connection, PgError> {
    let passes: &[SessionAttrs] = match &info.target_session_attrs {
        SessionAttrs::PreferStandby => &[SessionAttrs::Standby, SessionAttrs::Any],
        only => std::slice::from_ref(only),
    };
    let mut errors = Vec::new();
    for wanted in passes {
        for spec in &info.hosts {
            match connect_host(info, spec, mode, *wanted).await {
                Ok(connection) => return Ok(connection),
                Err(error) if ends_search(&error) => return Err(error),
                Err(error) => {
                    tracing::debug!(target = %spec, %error, "host not used");
                    errors.push(error);
                }
            }
        }
    }
    let count = errors.len();
    match errors.pop() {
        Some(only) if errors.is_empty() => Err(only),
        Some(last) => {
            errors.push(last);
            Err(PgError::AllHosts { count, errors })
        }
        None => Err(PgError::config("the list of hosts is empty", "give host=...")),
    }
}

fn ends_search(error: &PgError) -> bool {
    matches!(error, PgError::Auth { .. } | PgError::Config { .. })
        || error.sqlstate().is_some_and(|state| state.starts_with("28"))
}

async fn connect_host(
    info: &ConnInfo,
    spec: &HostSpec,
    mode: Mode,
    wanted: SessionAttrs,
) -> Result<Connection, PgError> {
    let addresses = with_limit(info.connect_timeout, spec, addresses(info, spec)).await?;
    let connection = connect_any(info, spec, &addresses, mode).await?;
    check_role(connection, spec, wanted)
}

/// The host with each address that its name has, in the resolver's order.
async fn addresses(info: &ConnInfo, spec: &HostSpec) -> Result<Vec<HostSpec>, PgError> {
    let name = match &spec.host {
        Host::Tcp(name) if spec.hostaddr.is_none() && info.dialer.is_none() => name,
        _ => return Ok(vec![spec.clone()]),
    };
    let failed = |source| PgError::Connect {
        target: spec.to_string(),
        source,
    };
    let found = tokio::net::lookup_host((name.as_str(), spec.port))
        .await
        .map_err(failed)?;
    let with = |address: std::net::SocketAddr| HostSpec {
        hostaddr: Some(address.ip()),
        ..spec.clone()
    };
    let found: Vec<HostSpec> = found.map(with).collect();
    match found.is_empty() {
        true => Err(failed(std::io::ErrorKind::NotFound.into())),
        false => Ok(found),
    }
}

/// Connects to the first address that answers. As in libpq, each has the time limit for itself: one that is dead must
/// not use up the time of the others.
async fn connect_any(
    info: &ConnInfo,
    spec: &HostSpec,
    addresses: &[HostSpec],
    mode: Mode,
) -> Result<Connection, PgError> {
    let mut failure = PgError::config("the list of addresses is empty", "give host=...");
    for address in addresses {
        let attempt = Box::pin(try_encryptions(info, address, mode));
        match with_limit(info.connect_timeout, spec, attempt).await {
            Err(error @ (PgError::Connect { .. } | PgError::ConnectTimeout { .. })) => {
                tracing::debug!(target = %spec, address = ?address.hostaddr, %error, "address not used");
                failure = error;
            }
            result => return result,
        }
    }
    Err(failure)
}

async fn with_limit<T>(
    limit: Option<Duration>,
    spec: &HostSpec,
    attempt: impl Future<Output = Result<T, PgError>>,
) -> Result<T, PgError> {
    let Some(limit) = limit else { return attempt.await };
    match tokio::time::timeout(limit, attempt).await {
        Ok(result) => result,
        Err(_) => Err(PgError::ConnectTimeout {
            target: spec.to_string(),
            after: limit,
        }),
    }
}

/// Tries what `sslmode` allows, in its order.
async fn try_encryptions(info: &ConnInfo, spec: &HostSpec, mode: Mode) -> Result<Connection, PgError> {
    let (first, second) = match (&spec.host, info.tls.mode) {
        (Host::Unix(_), _) | (_, SslMode::Disable) => (Encryption::Plain, None),
        (_, SslMode::Allow) => (Encryption::Plain, Some(Encryption::Tls)),
        // To another machine in clear only if somebody chose the mode (`negotiate`).
        (_, SslMode::Prefer) => (Encryption::TlsIfOffered, Some(Encryption::Plain)),
        (_, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => (Encryption::Tls, None),
    };
    let error = match log_in(info, spec, mode, first).await {
        Ok(connection) => return Ok(connection),
        Err(error) => error,
    };
    let Some(second) = second.filter(|_| other_encryption_may_help(&error)) else {
        return Err(error);
    };
    tracing::warn!(target = %spec, %error, sslmode = %info.tls.mode, "trying again with other encryption");
    // If neither works the first error says more about what was asked for.
    log_in(info, spec, mode, second).await.map_err(|_| error)
}

/// TLS itself failed, or `pg_hba.conf` has no line for this kind of connection. A wrong password is
/// wrong either way, and is not sent a second time in clear.
fn other_encryption_may_help(error: &PgError) -> bool {
    matches!(error, PgError::Tls { .. }) || error.is_not_authorized()
}

async fn log_in(
    info: &ConnInfo,
    spec: &HostSpec,
    mode: Mode,
    encryption: Encryption,
) -> Result<Connection, PgError> {
    let channel = negotiate::open(info, spec, encryption).await?;
    let (read, write) = channel.transport.split();
    let mut reader = FrameReader::new(read);
    let mut writer = FrameWriter::new(write);
    let mut session = Session {
        target: spec.to_string(),
        parameters: std::collections::HashMap::new(),
        version: 0,
        pid: 0,
        notices: Vec::new(),
    };
    let login = auth::Login {
        info,
        mode,
        password: info.password_for(spec, mode).await,
        encrypted: channel.encrypted,
        local: matches!(spec.host, Host::Unix(_)),
        binding: channel.binding,
    };
    auth::log_in(&login, &mut reader, &mut writer, &mut session).await?;
    session.version = session
        .parameters
        .get("server_version")
        .and_then(|text| version_number(text))
        .ok_or_else(|| {
            PgError::protocol("connecting", "the server did not report a usable server_version")
        })?;
    Ok(Connection::assemble(reader, writer, session))
}

/// `target_session_attrs`, from what the server reports (14 and newer). Older servers do not report
/// it and are taken as suitable.
fn check_role(connection: Connection, spec: &HostSpec, wanted: SessionAttrs) -> Result<Connection, PgError> {
    let on = |name: &str| connection.parameter(name).map(|value| value == "on");
    let standby = on("in_hot_standby");
    let read_only = standby
        .zip(on("default_transaction_read_only"))
        .map(|(standby, read)| standby || read);
    let suitable = match wanted {
        SessionAttrs::Any | SessionAttrs::PreferStandby => true,
        SessionAttrs::Primary => standby != Some(true),
        SessionAttrs::Standby => standby != Some(false),
        SessionAttrs::ReadWrite => read_only != Some(true),
        SessionAttrs::ReadOnly => read_only != Some(false),
    };
    match suitable {
        true => Ok(connection),
        false => Err(PgError::WrongRole {
            target: spec.to_string(),
            wanted: wanted.as_str(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_dead_address_does_not_use_up_the_time_of_the_next() {
        let info =
            ConnInfo::resolve(Some("host=db.example user=x sslmode=disable connect_timeout=2")).unwrap();
        let silent = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let port = silent.local_addr().unwrap().port();
        let alive = TcpListener::bind(("127.0.0.3", port)).await.unwrap();
        let at = |address: &str| HostSpec {
            hostaddr: Some(address.parse().unwrap()),
            port,
            ..info.hosts[0].clone()
        };
        let addresses = [at("127.0.0.2"), at("127.0.0.3")];
        let answers = async {
            let (stream, _) = alive.accept().await.unwrap();
            drop(stream);
        };
        let attempt = connect_any(&info, &info.hosts[0], &addresses, Mode::Sql);
        let (failed, ()) = tokio::join!(attempt, answers);
        assert!(
            !matches!(failed, Err(PgError::ConnectTimeout { .. })),
            "the second address has the last word"
        );
        drop(silent);
    }
}
