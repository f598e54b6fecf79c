//! The values that connection parameters take.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// Name or address.
    Tcp(String),
    /// Directory of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Tcp(name) => f.write_str(name),
            Host::Unix(dir) => write!(f, "{}", dir.display()),
        }
    }
}

/// One server to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSpec {
    /// Name; checked against the certificate with `verify-full`.
    pub host: Host,
    /// Address to connect to instead of resolving the name. A socket has none.
    pub hostaddr: Option<IpAddr>,
    /// TCP port, or the number in the socket's file name.
    pub port: u16,
}

impl fmt::Display for HostSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Tcp(name) => write!(f, "{name} port {}", self.port),
            Host::Unix(dir) => write!(f, "{}/.s.PGSQL.{}", dir.display(), self.port),
        }
    }
}

/// TCP keepalives; `None` is the system's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalives {
    /// Whether they are sent at all.
    pub enabled: bool,
    /// Silence before the first.
    pub idle: Option<Duration>,
    /// Time between two.
    pub interval: Option<Duration>,
    /// How many may be lost.
    pub count: Option<u32>,
}

macro_rules! value_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            pub(super) const VALUES: &'static [&'static str] = &[$($text),*];
            /// As written in a connection string.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }

        impl FromStr for $name {
            type Err = &'static [&'static str];
            fn from_str(text: &str) -> Result<$name, Self::Err> {
                match text { $($text => Ok($name::$variant),)* _ => Err($name::VALUES) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

value_enum! {
    /// How much TLS is wanted. Unix sockets never use it.
    SslMode {
        /// Never.
        Disable = "disable",
        /// Only if the server refuses a plain connection.
        Allow = "allow",
        /// If the server has it.
        Prefer = "prefer",
        /// Always; the certificate is checked only if there are trusted roots.
        Require = "require",
        /// Always, with a trusted certificate of any name.
        VerifyCa = "verify-ca",
        /// Always, with a trusted certificate of this host.
        VerifyFull = "verify-full",
    }
}

value_enum! {
    /// How TLS begins.
    SslNegotiation {
        /// By asking the server first.
        Postgres = "postgres",
        /// At once (PostgreSQL 17 and newer).
        Direct = "direct",
    }
}

value_enum! {
    /// Whether SCRAM is bound to the TLS connection.
    ChannelBinding {
        /// Never.
        Disable = "disable",
        /// Where both sides can.
        Prefer = "prefer",
        /// Otherwise the login fails.
        Require = "require",
    }
}

value_enum! {
    /// Which kind of server is wanted.
    SessionAttrs {
        /// Any.
        Any = "any",
        /// One that accepts writes.
        ReadWrite = "read-write",
        /// One that does not.
        ReadOnly = "read-only",
        /// Not in recovery.
        Primary = "primary",
        /// In recovery.
        Standby = "standby",
        /// In recovery if there is one, else any.
        PreferStandby = "prefer-standby",
    }
}

value_enum! {
    /// A way of authentication that this crate can take part in.
    AuthMethod {
        /// The server asked for nothing.
        None = "none",
        /// Password in clear text.
        Password = "password",
        /// MD5 hash.
        Md5 = "md5",
        /// SCRAM-SHA-256, bound to TLS or not.
        ScramSha256 = "scram-sha-256",
    }
}

/// Accepted ways of authentication (`require_auth`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthMethods(Vec<AuthMethod>);

impl AuthMethods {
    const ALL: [AuthMethod; 4] = [
        AuthMethod::None,
        AuthMethod::Password,
        AuthMethod::Md5,
        AuthMethod::ScramSha256,
    ];
    /// Known to libpq and impossible here; they may be listed or excluded.
    const FOREIGN: [&'static str; 3] = ["gss", "sspi", "oauth"];

    /// Whether a method is accepted.
    pub fn accepts(&self, method: AuthMethod) -> bool {
        self.0.contains(&method)
    }
}

impl FromStr for AuthMethods {
    type Err = &'static str;

    /// A comma-separated list of methods, either all plain or all negated with `!`.
    fn from_str(text: &str) -> Result<AuthMethods, &'static str> {
        let negated = text.starts_with('!');
        let mut listed = Vec::new();
        for item in text.split(',').map(str::trim) {
            if item.starts_with('!') != negated {
                return Err("list either methods to accept or, with !, methods to refuse");
            }
            let name = item.trim_start_matches('!');
            match name.parse() {
                Ok(method) => listed.push(method),
                Err(_) if Self::FOREIGN.contains(&name) => {}
                Err(_) => return Err("known methods: none, password, md5, scram-sha-256, gss, sspi, oauth"),
            }
        }
        let accepted = Self::ALL
            .into_iter()
            .filter(|method| listed.contains(method) != negated);
        Ok(AuthMethods(accepted.collect()))
    }
}

/// Whose certificates are trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrustRoots {
    /// Nobody's: certificates are not checked.
    None,
    /// Those of the operating system.
    System,
    /// Those in a PEM file. A certificate in it that the server itself presents is trusted too.
    File(PathBuf),
}

/// Encryption and certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsOptions {
    /// How much TLS is wanted.
    pub mode: SslMode,
    /// Whether somebody asked for that mode. If nobody did, nothing goes to another machine in clear.
    pub chosen: bool,
    /// How it begins.
    pub negotiation: SslNegotiation,
    /// Who is trusted.
    pub roots: TrustRoots,
    /// Client certificate (PEM).
    pub cert: Option<PathBuf>,
    /// Its key (PEM, not encrypted).
    pub key: Option<PathBuf>,
    /// Whether the host name is sent in clear text when TLS begins (SNI).
    pub sni: bool,
    /// Whether TLS 1.2 may be used.
    pub tls12: bool,
    /// Whether TLS 1.3 may be used.
    pub tls13: bool,
}
