//! From the sources of parameters to one [`ConnInfo`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;

use super::env::Environment;
use super::keyword::{self, Fate, KEYWORDS};
use super::types::{
    ChannelBinding, Host, HostSpec, Keepalives, SessionAttrs, SslMode, SslNegotiation, TlsOptions, TrustRoots,
};
use super::{ConnInfo, SOCKET_DIRS, parse, service, uri};
use crate::error::PgError;

/// PostgreSQL's port.
const DEFAULT_PORT: u16 = 5432;
/// Limit for connecting when none is given: a receiver that hangs for ever is worse than one that
/// tries again.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// libpq's smallest timeout: below it a slow network never connects.
const MIN_CONNECT_TIMEOUT: u64 = 2;

pub(super) fn resolve(conninfo: Option<&str>, env: &Environment) -> Result<ConnInfo, PgError> {
    Settings::collect(conninfo, env)?.build(env)
}

/// Parameters with their origin, strongest source first.
#[derive(Default)]
struct Settings {
    values: BTreeMap<&'static str, (String, String)>,
}

impl Settings {
    fn collect(conninfo: Option<&str>, env: &Environment) -> Result<Settings, PgError> {
        let mut settings = Settings::default();
        let text = conninfo.unwrap_or_default().trim();
        let pairs = match uri::strip_scheme(text) {
            Some(rest) => uri::parse(rest)?,
            None => parse::parse(text)?,
        };
        // Within one string the last of several equal keywords counts.
        settings.add(pairs.into_iter().rev(), "the connection string")?;
        settings.add_service(env)?;
        settings.add_environment(env)?;
        Ok(settings)
    }

    /// Adds what is not set yet. Empty values count as not set.
    fn add(&mut self, pairs: impl Iterator<Item = (String, String)>, origin: &str) -> Result<(), PgError> {
        for (name, value) in pairs {
            let keyword = keyword::find(&name, origin)?;
            if keyword.fate == Fate::Used && !value.is_empty() {
                self.values
                    .entry(keyword.name)
                    .or_insert((value, origin.to_owned()));
            }
        }
        Ok(())
    }

    fn add_service(&mut self, env: &Environment) -> Result<(), PgError> {
        let Some(name) = self.get("service").or_else(|| env.variable("PGSERVICE")) else {
            return Ok(());
        };
        let file = self.get("servicefile").or_else(|| env.variable("PGSERVICEFILE"));
        let (pairs, origin) = service::load(name, file, env)?;
        self.add(pairs.into_iter(), &origin)
    }

    fn add_environment(&mut self, env: &Environment) -> Result<(), PgError> {
        for keyword in KEYWORDS {
            let Some(variable) = keyword.env else { continue };
            if let Some(value) = env.variable(variable) {
                let pair = (keyword.name.to_owned(), value.to_owned());
                self.add([pair].into_iter(), &format!("environment variable {variable}"))?;
            }
        }
        Ok(())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|(value, _)| value.as_str())
    }

    fn bad(&self, name: &str, expected: &str) -> PgError {
        let (value, origin) = self.values.get(name).map_or(("", ""), |(v, o)| (v, o));
        PgError::config(
            format!("{name} = {value:?} (from {origin}) is not valid"),
            expected,
        )
    }

    fn choice<T: FromStr<Err = &'static [&'static str]>>(
        &self,
        name: &str,
        default: T,
    ) -> Result<T, PgError> {
        match self.get(name) {
            Some(value) => value
                .parse()
                .map_err(|known: &[&str]| self.bad(name, &format!("use one of: {}", known.join(", ")))),
            None => Ok(default),
        }
    }

    fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>, PgError> {
        self.get(name)
            .map(|value| {
                value
                    .trim()
                    .parse()
                    .map_err(|_| self.bad(name, "use a whole number that is not negative"))
            })
            .transpose()
    }

    fn flag(&self, name: &str) -> Result<bool, PgError> {
        match self.get(name) {
            None | Some("1") => Ok(true),
            Some("0") => Ok(false),
            Some(_) => Err(self.bad(name, "use 0 or 1")),
        }
    }

    /// Seconds; zero means the system's default.
    fn seconds(&self, name: &str) -> Result<Option<Duration>, PgError> {
        Ok(self
            .number::<u32>(name)?
            .filter(|seconds| *seconds > 0)
            .map(|s| Duration::from_secs(s.into())))
    }

    fn build(&self, env: &Environment) -> Result<ConnInfo, PgError> {
        if self
            .get("load_balance_hosts")
            .is_some_and(|value| value != "disable")
        {
            return Err(self.bad("load_balance_hosts", "hosts are tried in order: remove it"));
        }
        self.refuse_gss()?;
        let user = self.get("user").or(env.user()).ok_or_else(|| {
            PgError::config(
                "no user name is given and this process's user has none",
                "give user=...",
            )
        })?;
        let application_name = self
            .get("application_name")
            .or(self.get("fallback_application_name"));
        let require_auth = match self.get("require_auth") {
            Some(value) => Some(
                value
                    .parse()
                    .map_err(|expected| self.bad("require_auth", expected))?,
            ),
            None => None,
        };
        Ok(ConnInfo {
            hosts: self.hosts()?,
            user: user.to_owned(),
            dbname: self.get("dbname").unwrap_or(user).to_owned(),
            application_name: application_name.unwrap_or("highwater").to_owned(),
            options: self.get("options").map(str::to_owned),
            connect_timeout: self.connect_timeout()?,
            keepalives: Keepalives {
                enabled: self.flag("keepalives")?,
                idle: self.seconds("keepalives_idle")?,
                interval: self.seconds("keepalives_interval")?,
                count: self.number("keepalives_count")?.filter(|count| *count > 0),
            },
            tcp_user_timeout: self
                .number::<u32>("tcp_user_timeout")?
                .filter(|millis| *millis > 0)
                .map(|millis| Duration::from_millis(millis.into())),
            tls: self.tls(env)?,
            channel_binding: self.choice("channel_binding", ChannelBinding::Prefer)?,
            target_session_attrs: self.choice("target_session_attrs", SessionAttrs::Any)?,
            require_auth,
            require_peer: self.get("requirepeer").map(str::to_owned),
            passfile: self
                .get("passfile")
                .map(PathBuf::from)
                .or_else(|| env.home_file(".pgpass")),
            password: self.get("password").map(SecretString::from),
            dialer: None,
        })
    }

    /// Who asks for encryption by GSSAPI must not get a connection in clear. To prefer it is to do without where there is none.
    fn refuse_gss(&self) -> Result<(), PgError> {
        match self.get("gssencmode") {
            None | Some("disable" | "prefer") => Ok(()),
            Some(_) => Err(self.bad(
                "gssencmode",
                "there is no GSSAPI encryption here: use disable or prefer, and sslmode=verify-full for TLS",
            )),
        }
    }

    fn connect_timeout(&self) -> Result<Option<Duration>, PgError> {
        Ok(match self.number::<u32>("connect_timeout")? {
            None => Some(DEFAULT_CONNECT_TIMEOUT),
            Some(0) => None,
            Some(seconds) => Some(Duration::from_secs(u64::from(seconds).max(MIN_CONNECT_TIMEOUT))),
        })
    }

    fn hosts(&self) -> Result<Vec<HostSpec>, PgError> {
        let list = |name: &str| {
            self.get(name)
                .map(|text| text.split(',').map(str::trim).collect::<Vec<_>>())
        };
        let names = list("host");
        let addresses = list("hostaddr");
        let count = names.as_ref().or(addresses.as_ref()).map_or(1, Vec::len);
        if addresses
            .as_ref()
            .is_some_and(|addresses| addresses.len() != count)
        {
            return Err(self.bad("hostaddr", "give one address for each host"));
        }
        let ports = self.ports(count)?;
        let at = |list: &Option<Vec<&str>>, index: usize| {
            list.as_ref()
                .and_then(|list| list.get(index).copied())
                .unwrap_or_default()
                .to_owned()
        };
        (0..count)
            .zip(ports)
            .map(|(index, port)| self.host_spec(&at(&names, index), &at(&addresses, index), port))
            .collect()
    }

    fn ports(&self, count: usize) -> Result<Vec<u16>, PgError> {
        let Some(text) = self.get("port") else {
            return Ok(vec![DEFAULT_PORT; count]);
        };
        let ports = text
            .split(',')
            .map(|port| match port.trim() {
                "" => Ok(DEFAULT_PORT),
                port => port.parse().ok().filter(|port| *port > 0).ok_or(()),
            })
            .collect::<Result<Vec<u16>, ()>>()
            .map_err(|()| self.bad("port", "use 1 to 65535"))?;
        match ports.as_slice() {
            [port] => Ok(vec![*port; count]),
            _ if ports.len() == count => Ok(ports),
            _ => Err(self.bad("port", "give one port, or one for each host")),
        }
    }

    fn host_spec(&self, name: &str, address: &str, port: u16) -> Result<HostSpec, PgError> {
        let hostaddr = match address {
            "" => None,
            address => Some(
                address
                    .parse()
                    .map_err(|_| self.bad("hostaddr", "use a numeric IP address"))?,
            ),
        };
        let host = match (name, hostaddr) {
            ("", None) => Host::Unix(default_socket_dir()),
            // As in libpq the address decides: a directory beside it, which may only be that of `PGHOST`, makes no socket of
            // it, and what `sslmode` asks for is kept.
            (name, Some(_)) if name.is_empty() || name.starts_with('/') => Host::Tcp(address.to_owned()),
            (name, None) if name.starts_with('/') => Host::Unix(PathBuf::from(name)),
            (name, _) if name.starts_with('@') => {
                return Err(self.bad(
                    "host",
                    "abstract sockets are not supported: use a socket directory or TCP",
                ));
            }
            (name, _) => Host::Tcp(name.to_owned()),
        };
        Ok(HostSpec { host, hostaddr, port })
    }

    fn tls(&self, env: &Environment) -> Result<TlsOptions, PgError> {
        let roots = self.roots(env);
        let default_mode = if roots == TrustRoots::System {
            SslMode::VerifyFull
        } else {
            SslMode::Prefer
        };
        let mode = self.choice("sslmode", default_mode)?;
        if roots == TrustRoots::System && mode != SslMode::VerifyFull {
            return Err(self.bad(
                "sslmode",
                "sslrootcert=system trusts many: it needs sslmode=verify-full",
            ));
        }
        if mode >= SslMode::VerifyCa && roots == TrustRoots::None {
            return Err(self.bad(
                "sslmode",
                "it needs trusted roots: give sslrootcert=FILE or sslrootcert=system",
            ));
        }
        let negotiation = self.choice("sslnegotiation", SslNegotiation::Postgres)?;
        if negotiation == SslNegotiation::Direct && mode < SslMode::Require {
            return Err(self.bad("sslnegotiation", "direct TLS needs sslmode=require or stronger"));
        }
        let (cert, key) = self.client_certificate(env)?;
        let (tls12, tls13) = self.tls_versions()?;
        Ok(TlsOptions {
            mode,
            chosen: self.get("sslmode").is_some(),
            negotiation,
            roots,
            cert,
            key,
            sni: self.flag("sslsni")?,
            tls12,
            tls13,
        })
    }

    fn roots(&self, env: &Environment) -> TrustRoots {
        match self.get("sslrootcert") {
            Some("system") => TrustRoots::System,
            Some(file) => TrustRoots::File(PathBuf::from(file)),
            None => default_file(env, "root.crt").map_or(TrustRoots::None, TrustRoots::File),
        }
    }

    fn client_certificate(&self, env: &Environment) -> Result<(Option<PathBuf>, Option<PathBuf>), PgError> {
        match self.get("sslcertmode") {
            Some("disable") => return Ok((None, None)),
            None | Some("allow") => {}
            Some(_) => return Err(self.bad("sslcertmode", "use allow or disable")),
        }
        let cert = self
            .get("sslcert")
            .map(PathBuf::from)
            .or_else(|| default_file(env, "postgresql.crt"));
        let key = self
            .get("sslkey")
            .map(PathBuf::from)
            .or_else(|| default_file(env, "postgresql.key"));
        match (&cert, &key) {
            (Some(_), None) => Err(self.bad("sslcert", "give sslkey as well")),
            (None, _) => Ok((None, None)),
            _ => Ok((cert, key)),
        }
    }

    fn tls_versions(&self) -> Result<(bool, bool), PgError> {
        let rank = |name: &str, default: u8| match self.get(name) {
            None => Ok(default),
            Some("TLSv1" | "TLSv1.1") => Ok(1),
            Some("TLSv1.2") => Ok(2),
            Some("TLSv1.3") => Ok(3),
            Some(_) => Err(self.bad(name, "use TLSv1.2 or TLSv1.3")),
        };
        let least = rank("ssl_min_protocol_version", 2)?;
        let most = rank("ssl_max_protocol_version", 3)?;
        let (tls12, tls13) = (least <= 2 && most >= 2, most >= 3);
        if !tls12 && !tls13 || least > most {
            return Err(self.bad(
                "ssl_max_protocol_version",
                "TLS 1.2 and 1.3 are offered, nothing older",
            ));
        }
        Ok((tls12, tls13))
    }
}

fn default_socket_dir() -> PathBuf {
    let [debian, upstream] = SOCKET_DIRS.map(Path::new);
    if debian.is_dir() {
        debian.to_owned()
    } else {
        upstream.to_owned()
    }
}

/// A file in `~/.postgresql`, if it exists.
fn default_file(env: &Environment, name: &str) -> Option<PathBuf> {
    env.home()
        .map(|home| home.join(".postgresql").join(name))
        .filter(|path| path.exists())
}
