//! What can go wrong between us and a PostgreSQL server, and what the caller should do about it.
//!
//! Owns the one error type of this crate and the mapping from SQLSTATE to [`PgErrorKind`]. Does not
//! own any retry: it only says whether one can help. Every error names what was being done; a
//! server's own message, detail and hint are kept verbatim and never used for control flow where a
//! SQLSTATE exists.

mod server;

use std::io;
use std::time::Duration;

use highwater_format::{Lsn, TimelineId};

pub use server::{Notice, ServerError};

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PgErrorKind {
    /// The connection or the server is gone or busy for now: the same call may succeed later.
    Retry,
    /// Somebody must change something at the server (password, `pg_hba.conf`, a grant). The same
    /// call succeeds after that, without a change here.
    Operator,
    /// The connection parameters or arguments given to this crate are wrong.
    Config,
    /// The peer does not speak the protocol, or broke a promise of it.
    Protocol,
    /// The server understood the request and will not do it: no such slot, WAL removed, start ahead
    /// of the server, not in its history. The same request gets the same answer.
    Refused,
    /// This server version, or this crate, lacks what was asked for.
    Unsupported,
}

/// Where a server's history left the timeline that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForkPoint {
    /// The timeline that was left, if the server named it.
    pub timeline: Option<TimelineId>,
    /// The LSN at which it was left.
    pub lsn: Lsn,
}

/// Any failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PgError {
    /// The connection parameters cannot be used.
    #[error("connection parameters: {message}; {next_step}")]
    Config {
        /// What is wrong, naming the parameter and where it came from.
        message: String,
        /// How to mend it.
        next_step: String,
    },
    /// An argument of a call cannot be sent.
    #[error("{what} {value:?} is not valid: {reason}")]
    Argument {
        /// Which argument.
        what: &'static str,
        /// Its value.
        value: String,
        /// What it must look like.
        reason: &'static str,
    },
    /// No connection could be made at the network level.
    #[error("cannot connect to {target}: {source}; check that PostgreSQL runs and listens there")]
    Connect {
        /// Address, as the operator named it.
        target: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The server did not finish the connection in time.
    #[error("{target} did not complete the connection within {after:?} (connect_timeout)")]
    ConnectTimeout {
        /// Address, as the operator named it.
        target: String,
        /// The limit that passed.
        after: Duration,
    },
    /// TLS could not be set up.
    #[error("TLS with {target}: {message}")]
    Tls {
        /// Address, as the operator named it.
        target: String,
        /// What failed and what to check.
        message: String,
        /// Who must act.
        kind: PgErrorKind,
    },
    /// Authentication failed on our side of the exchange.
    #[error("authentication as {user:?} at {target}: {message}")]
    Auth {
        /// Address, as the operator named it.
        target: String,
        /// User that was presented.
        user: String,
        /// What failed and what to check.
        message: String,
        /// Who must act.
        kind: PgErrorKind,
    },
    /// Every host was tried and none could be used.
    #[error("none of {count} hosts could be used: {}", .errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    AllHosts {
        /// How many hosts were tried.
        count: usize,
        /// One error per attempt.
        errors: Vec<PgError>,
    },
    /// The server is not of the kind that `target_session_attrs` asks for.
    #[error("{target} is not {wanted} (target_session_attrs)")]
    WrongRole {
        /// Address, as the operator named it.
        target: String,
        /// The role asked for.
        wanted: &'static str,
    },
    /// The server answered with an error.
    #[error(transparent)]
    Server(Box<ServerError>),
    /// The connection broke.
    #[error("connection lost during {during}: {source}")]
    Io {
        /// What was being done.
        during: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The server closed the connection without saying why.
    #[error("the server closed the connection during {during} without giving a reason; its log may have one")]
    Closed {
        /// What was being done.
        during: String,
    },
    /// The server does not answer.
    #[error(
        "the server has said nothing for {after:?} during {during}: it hangs, or the way to it is gone without a word"
    )]
    Silent {
        /// What was being done.
        during: String,
        /// The limit that passed.
        after: Duration,
    },
    /// The peer broke the protocol.
    #[error("protocol violation during {during}: {message}; is this a PostgreSQL server?")]
    Protocol {
        /// What was being done.
        during: String,
        /// What was seen.
        message: String,
    },
    /// The WAL stream does not continue where it ended.
    #[error(
        "WAL stream jumped: expected data at {expected}, the server sent {found}; reconnect from {expected}"
    )]
    Jump {
        /// Where the next message had to start.
        expected: Lsn,
        /// Where it started.
        found: Lsn,
    },
    /// Not possible with this server version.
    #[error("{what} needs PostgreSQL {needs} or newer, the server is {}", version_text(*.version))]
    Version {
        /// The command.
        what: &'static str,
        /// First major version that has it.
        needs: u32,
        /// What the server said, as `server_version_num`.
        version: u32,
    },
    /// The connection was left in the middle of something by an earlier error or a dropped call.
    #[error("this connection cannot be used any more: {why}; open a new one")]
    Unusable {
        /// What left it that way.
        why: &'static str,
    },
}

fn version_text(number: u32) -> String {
    format!("{}.{}", number / 10_000, number % 10_000)
}

impl PgError {
    /// What the caller can do about this error.
    pub fn kind(&self) -> PgErrorKind {
        match self {
            PgError::Config { .. } | PgError::Argument { .. } => PgErrorKind::Config,
            PgError::Connect { .. }
            | PgError::ConnectTimeout { .. }
            | PgError::Io { .. }
            | PgError::Closed { .. }
            | PgError::Silent { .. }
            | PgError::WrongRole { .. }
            | PgError::Unusable { .. } => PgErrorKind::Retry,
            PgError::Tls { kind, .. } | PgError::Auth { kind, .. } => *kind,
            PgError::AllHosts { errors, .. } => kind_of_all(errors),
            PgError::Server(error) => error.kind(),
            PgError::Protocol { .. } | PgError::Jump { .. } => PgErrorKind::Protocol,
            PgError::Version { .. } => PgErrorKind::Unsupported,
        }
    }

    /// The server's error, if a server answered.
    pub fn server(&self) -> Option<&ServerError> {
        match self {
            PgError::Server(error) => Some(error),
            PgError::AllHosts { errors, .. } => errors.iter().rev().find_map(PgError::server),
            _ => None,
        }
    }

    /// SQLSTATE of the server's error, if a server answered.
    pub fn sqlstate(&self) -> Option<&str> {
        self.server().map(|error| error.code.as_str())
    }

    fn has_state(&self, state: &str) -> bool {
        self.sqlstate() == Some(state)
    }

    /// The WAL that was asked for is no longer on the server (58P01 to `START_REPLICATION`). Of a segment that goes while it is
    /// being sent the state is that of whatever went wrong before (`CheckXLogRemoved` in xlog.c), mostly XX000, and the words
    /// tell, unless the server speaks another language; then the next request meets 58P01.
    pub fn is_segment_removed(&self) -> bool {
        let told = |error: &ServerError| {
            error.message.starts_with("requested WAL segment ")
                && error.message.ends_with(" has already been removed")
        };
        self.server().is_some_and(|error| {
            error.request.starts_with("START_REPLICATION") && (error.code == "58P01" || told(error))
        })
    }

    /// The user name or password is wrong (28P01).
    pub fn is_wrong_password(&self) -> bool {
        self.has_state("28P01")
    }

    /// The server does not let this user in this way (28000): no `pg_hba.conf` line, or no right to
    /// replicate.
    pub fn is_not_authorized(&self) -> bool {
        self.has_state("28000")
    }

    /// No connection or WAL sender slot is free (53300).
    pub fn is_too_many_connections(&self) -> bool {
        self.has_state("53300")
    }

    /// The server's `max_wal_senders`, where it refuses one more walsender (53300) and says so: 0 where they are switched off.
    pub fn walsender_limit(&self) -> Option<u32> {
        self.server().and_then(ServerError::walsender_limit)
    }

    /// The replication slot does not exist (42704).
    pub fn is_slot_missing(&self) -> bool {
        self.has_state("42704")
    }

    /// The replication slot exists already (42710).
    pub fn is_slot_exists(&self) -> bool {
        self.has_state("42710")
    }

    /// The slot was invalidated or cannot be used (55000 to `START_REPLICATION SLOT`; elsewhere it says nothing of a slot).
    pub fn is_slot_invalidated(&self) -> bool {
        self.server().is_some_and(ServerError::is_slot_invalidated)
    }

    /// Somebody else streams from the slot (55006).
    pub fn is_slot_busy(&self) -> bool {
        self.has_state("55006")
    }

    /// Process id of the server process that holds the slot, where the server names it.
    pub fn slot_busy_pid(&self) -> Option<u32> {
        self.server()
            .filter(|_| self.is_slot_busy())
            .and_then(ServerError::last_number)
    }

    /// The start asked for is ahead of what the server has flushed: the server lost WAL that was
    /// received, or is another one. Returns the server's flush position.
    pub fn ahead_of_server(&self) -> Option<Lsn> {
        self.server().and_then(ServerError::ahead_of)
    }

    /// The start asked for lies past the point where the server's history left that timeline.
    pub fn fork_point(&self) -> Option<ForkPoint> {
        self.server().and_then(ServerError::fork_point)
    }

    /// The server's history has no such timeline, or left it before the LSN asked for.
    pub fn is_not_in_history(&self) -> bool {
        self.fork_point().is_some() || self.server().is_some_and(ServerError::is_unknown_timeline)
    }

    /// The server is starting up, shutting down or was told to end this session (57Pxx).
    pub fn is_shutting_down(&self) -> bool {
        self.sqlstate().is_some_and(|state| state.starts_with("57P"))
    }

    /// The connection is gone, whatever the reason; a new one may work.
    pub fn is_connection_lost(&self) -> bool {
        matches!(
            self,
            PgError::Io { .. } | PgError::Closed { .. } | PgError::Silent { .. }
        ) || self.is_shutting_down()
    }

    pub(crate) fn io(during: &str, source: io::Error) -> PgError {
        PgError::Io {
            during: during.to_owned(),
            source,
        }
    }

    pub(crate) fn protocol(during: &str, message: impl Into<String>) -> PgError {
        PgError::Protocol {
            during: during.to_owned(),
            message: message.into(),
        }
    }

    pub(crate) fn config(message: impl Into<String>, next_step: impl Into<String>) -> PgError {
        PgError::Config {
            message: message.into(),
            next_step: next_step.into(),
        }
    }
}

/// Of several hosts' errors the one that gives most hope decides: as long as one host may come back,
/// trying again makes sense.
fn kind_of_all(errors: &[PgError]) -> PgErrorKind {
    let kinds: Vec<PgErrorKind> = errors.iter().map(PgError::kind).collect();
    [PgErrorKind::Retry, PgErrorKind::Operator]
        .into_iter()
        .find(|kind| kinds.contains(kind))
        .or_else(|| kinds.last().copied())
        .unwrap_or(PgErrorKind::Config)
}

#[cfg(test)]
mod tests;
