//! Connection parameters, understood as libpq understands them.
//!
//! [`ConnInfo::resolve`] takes a connection string or URI and fills in, in this order, the service
//! file, libpq's environment variables and the defaults. Passwords in `~/.pgpass` and certificate
//! files are read later, at every connect, so that replacing them needs no restart.
//!
//! Differences from libpq, all on purpose: an absent `connect_timeout` means 30 s; unknown keywords
//! name the nearest known one; `sslcrl`, `sslcrldir` and `sslpassword` are refused rather than
//! ignored; a socket directory beside a `hostaddr` counts for nothing, also in the password file and as the name in a
//! certificate: the address stands in its place; GSSAPI does not exist here, so `gssencmode=require` is refused. The password
//! never appears in `Debug`, `Display` or a log line.

mod env;
mod keyword;
mod parse;
mod passfile;
mod resolve;
mod service;
mod types;
mod uri;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;

use crate::connection::Mode;
use crate::dial::Dialer;
use crate::error::PgError;

pub use env::Environment;
pub use types::{
    AuthMethod, AuthMethods, ChannelBinding, Host, HostSpec, Keepalives, SessionAttrs, SslMode,
    SslNegotiation, TlsOptions, TrustRoots,
};

/// Socket directories that count as "localhost" in a password file, and are tried in this order when
/// no host is given: Debian's, and PostgreSQL's own default.
const SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// Everything needed to connect.
#[derive(Clone)]
pub struct ConnInfo {
    /// Hosts to try, in order; never empty.
    pub hosts: Vec<HostSpec>,
    /// Role to log in as.
    pub user: String,
    /// Database for SQL connections. Replication connections have none.
    pub dbname: String,
    /// How the connection appears in `pg_stat_activity` and `synchronous_standby_names`.
    pub application_name: String,
    /// Settings for the server process, as `options` of libpq.
    pub options: Option<String>,
    /// Limit per host for name resolution, connection, TLS and login together; `None` waits for ever.
    pub connect_timeout: Option<Duration>,
    /// TCP keepalives.
    pub keepalives: Keepalives,
    /// How long sent data may stay unacknowledged (`TCP_USER_TIMEOUT`); `None` is the system's choice.
    pub tcp_user_timeout: Option<Duration>,
    /// Encryption and certificates.
    pub tls: TlsOptions,
    /// Whether the login is bound to the TLS connection.
    pub channel_binding: ChannelBinding,
    /// Which kind of server is wanted.
    pub target_session_attrs: SessionAttrs,
    /// Ways of authentication that are accepted; `None` accepts all.
    pub require_auth: Option<AuthMethods>,
    /// Operating system user that the server at a Unix socket must run as.
    pub require_peer: Option<String>,
    /// Password file.
    pub passfile: Option<PathBuf>,
    password: Option<SecretString>,
    pub(crate) dialer: Option<Dialer>,
}

impl ConnInfo {
    /// Resolves a connection string (or none: then the environment decides) in this process's
    /// surroundings.
    pub fn resolve(conninfo: Option<&str>) -> Result<ConnInfo, PgError> {
        ConnInfo::resolve_in(conninfo, &Environment::process())
    }

    /// As [`ConnInfo::resolve`], in given surroundings.
    pub fn resolve_in(conninfo: Option<&str>, env: &Environment) -> Result<ConnInfo, PgError> {
        resolve::resolve(conninfo, env)
    }

    /// The same with another application name.
    #[must_use]
    pub fn with_application_name(mut self, name: &str) -> ConnInfo {
        name.clone_into(&mut self.application_name);
        self
    }

    /// The same, but every connection goes over a stream that `dialer` opens.
    #[must_use]
    pub fn with_dialer(mut self, dialer: Dialer) -> ConnInfo {
        self.dialer = Some(dialer);
        self
    }

    /// Where this leads, without secrets: `host=... port=... user=...`.
    pub fn describe(&self) -> String {
        let list = |item: fn(&HostSpec) -> String| self.hosts.iter().map(item).collect::<Vec<_>>().join(",");
        format!(
            "host={} port={} user={}",
            list(|spec| spec.host.to_string()),
            list(|spec| spec.port.to_string()),
            self.user
        )
    }

    /// The password for one host: given explicitly, or from the password file.
    pub(crate) async fn password_for(&self, spec: &HostSpec, mode: Mode) -> Option<SecretString> {
        if let Some(password) = &self.password {
            return Some(password.clone());
        }
        let host = match &spec.host {
            Host::Unix(dir) if SOCKET_DIRS.iter().any(|default| dir.as_os_str() == *default) => {
                "localhost".into()
            }
            host => host.to_string(),
        };
        let databases: &[&str] = match mode {
            Mode::Sql => &[&self.dbname],
            Mode::Replication => &["replication", &self.dbname],
        };
        let login = passfile::Login {
            host: &host,
            port: spec.port,
            databases,
            user: &self.user,
        };
        passfile::lookup(self.passfile.as_deref()?, login).await
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnInfo")
            .field("hosts", &self.hosts)
            .field("user", &self.user)
            .field("dbname", &self.dbname)
            .field("application_name", &self.application_name)
            .field("password", &self.password.as_ref().map(|_| "[hidden]"))
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

#[cfg(test)]
mod tests;
