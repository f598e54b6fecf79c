//! The connection keywords of libpq (PostgreSQL 18), and what becomes of each here.
//!
//! A keyword is used, harmlessly ignored, or refused because ignoring it would weaken what its author
//! asked for. Anything else is unknown, and an error that names the nearest known keyword.

use crate::error::PgError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Used,
    /// Changes nothing that matters to this crate.
    Ignored,
    /// Cannot be honoured, and must not be dropped silently.
    Refused(&'static str),
}

pub(super) struct Keyword {
    pub(super) name: &'static str,
    /// Environment variable that gives it a default.
    pub(super) env: Option<&'static str>,
    pub(super) fate: Fate,
}

const fn used(name: &'static str, env: &'static str) -> Keyword {
    Keyword {
        name,
        env: Some(env),
        fate: Fate::Used,
    }
}

const fn only(name: &'static str) -> Keyword {
    Keyword {
        name,
        env: None,
        fate: Fate::Used,
    }
}

const fn ignored(name: &'static str) -> Keyword {
    Keyword {
        name,
        env: None,
        fate: Fate::Ignored,
    }
}

const fn refused(name: &'static str, env: Option<&'static str>, why: &'static str) -> Keyword {
    Keyword {
        name,
        env,
        fate: Fate::Refused(why),
    }
}

const NO_CRL: &str = "revocation lists are not checked by this program";

pub(super) const KEYWORDS: &[Keyword] = &[
    used("application_name", "PGAPPNAME"),
    used("channel_binding", "PGCHANNELBINDING"),
    used("connect_timeout", "PGCONNECT_TIMEOUT"),
    used("dbname", "PGDATABASE"),
    used("gssencmode", "PGGSSENCMODE"),
    used("host", "PGHOST"),
    used("hostaddr", "PGHOSTADDR"),
    used("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    used("options", "PGOPTIONS"),
    used("passfile", "PGPASSFILE"),
    used("password", "PGPASSWORD"),
    used("port", "PGPORT"),
    used("require_auth", "PGREQUIREAUTH"),
    used("requirepeer", "PGREQUIREPEER"),
    used("service", "PGSERVICE"),
    used("servicefile", "PGSERVICEFILE"),
    used("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    used("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    used("sslcert", "PGSSLCERT"),
    used("sslcertmode", "PGSSLCERTMODE"),
    used("sslkey", "PGSSLKEY"),
    used("sslmode", "PGSSLMODE"),
    used("sslnegotiation", "PGSSLNEGOTIATION"),
    used("sslrootcert", "PGSSLROOTCERT"),
    used("sslsni", "PGSSLSNI"),
    used("target_session_attrs", "PGTARGETSESSIONATTRS"),
    used("user", "PGUSER"),
    only("fallback_application_name"),
    only("keepalives"),
    only("keepalives_count"),
    only("keepalives_idle"),
    only("keepalives_interval"),
    only("tcp_user_timeout"),
    ignored("client_encoding"),
    ignored("gssdelegation"),
    ignored("gsslib"),
    ignored("krbsrvname"),
    ignored("max_protocol_version"),
    ignored("min_protocol_version"),
    ignored("replication"),
    ignored("sslcompression"),
    refused("sslcrl", Some("PGSSLCRL"), NO_CRL),
    refused("sslcrldir", Some("PGSSLCRLDIR"), NO_CRL),
    refused(
        "sslpassword",
        None,
        "encrypted client keys are not supported: decrypt the key file",
    ),
];

/// Finds a keyword, or says which one was probably meant.
pub(super) fn find(name: &str, origin: &str) -> Result<&'static Keyword, PgError> {
    let found = KEYWORDS.iter().find(|keyword| keyword.name == name);
    match found {
        Some(Keyword {
            fate: Fate::Refused(why),
            ..
        }) => Err(PgError::config(
            format!("{name} (from {origin}) cannot be honoured: {why}"),
            "remove it",
        )),
        Some(keyword) => Ok(keyword),
        None => Err(unknown(name, origin)),
    }
}

fn unknown(name: &str, origin: &str) -> PgError {
    let nearest = KEYWORDS
        .iter()
        .map(|keyword| {
            (
                strsim::damerau_levenshtein(&name.to_ascii_lowercase(), keyword.name),
                keyword.name,
            )
        })
        .min();
    let next_step = match nearest {
        Some((distance, near)) if distance <= 1 + near.len() / 3 => format!("did you mean {near:?}?"),
        _ => "see libpq's list of connection keywords".to_owned(),
    };
    PgError::config(format!("unknown keyword {name:?} in {origin}"), next_step)
}
