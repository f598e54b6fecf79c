//! `ErrorResponse` and `NoticeResponse`: their fields, and what the walsender's errors mean.
//!
//! Messages are translated by the server (`lc_messages`), so SQLSTATE decides wherever there is a
//! distinct one. The walsender raises its position errors as plain XX000; those are recognised by
//! the numbers in them, which survive translation, together with the request they answer.

use std::fmt;

use highwater_format::{Lsn, TimelineId};

use super::{ForkPoint, PgErrorKind};

/// A warning or notice of the server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Notice {
    /// `WARNING`, `NOTICE`, ... untranslated where the server sends it so.
    pub severity: String,
    /// SQLSTATE.
    pub code: String,
    /// Primary message.
    pub message: String,
    /// Secondary message, empty if there is none.
    pub detail: String,
    /// The server's advice, empty if there is none.
    pub hint: String,
}

impl Notice {
    /// Reads the fields; unknown field types are skipped, as the protocol asks for.
    pub(crate) fn parse(body: &[u8]) -> Notice {
        let mut notice = Notice::default();
        let mut localized_severity = String::new();
        for field in body.split(|byte| *byte == 0) {
            let Some((tag, value)) = field.split_first() else {
                break;
            };
            let value = || String::from_utf8_lossy(value).into_owned();
            match tag {
                b'S' => localized_severity = value(),
                b'V' => notice.severity = value(),
                b'C' => notice.code = value(),
                b'M' => notice.message = value(),
                b'D' => notice.detail = value(),
                b'H' => notice.hint = value(),
                _ => {}
            }
        }
        if notice.severity.is_empty() {
            notice.severity = localized_severity;
        }
        notice
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.message)?;
        if !self.detail.is_empty() {
            write!(f, " DETAIL: {}", self.detail)?;
        }
        if !self.hint.is_empty() {
            write!(f, " HINT: {}", self.hint)?;
        }
        Ok(())
    }
}

/// An error of the server, with the request it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    /// What was asked: a command without secrets, or `connecting to ...`.
    pub request: String,
    /// `ERROR`, `FATAL` or `PANIC`.
    pub severity: String,
    /// SQLSTATE.
    pub code: String,
    /// Primary message.
    pub message: String,
    /// Secondary message, empty if there is none.
    pub detail: String,
    /// The server's advice, empty if there is none.
    pub hint: String,
}

impl ServerError {
    pub(crate) fn parse(request: &str, body: &[u8]) -> ServerError {
        let Notice {
            severity,
            code,
            message,
            detail,
            hint,
        } = Notice::parse(body);
        let message = if message.is_empty() {
            "the server gave no message".to_owned()
        } else {
            message
        };
        ServerError {
            request: request.to_owned(),
            severity,
            code,
            message,
            detail,
            hint,
        }
    }

    pub(crate) fn kind(&self) -> PgErrorKind {
        match self.code.as_str() {
            "53300" | "55006" | "57014" => PgErrorKind::Retry,
            "0A000" => PgErrorKind::Unsupported,
            "08P01" => PgErrorKind::Protocol,
            "42501" => PgErrorKind::Operator,
            "3D000" => PgErrorKind::Config,
            code => match code.get(..2) {
                Some("57" | "08" | "53" | "40") => PgErrorKind::Retry,
                Some("28") => PgErrorKind::Operator,
                Some("58") if code != "58P01" => PgErrorKind::Operator,
                _ => PgErrorKind::Refused,
            },
        }
    }

    /// What to do, where the SQLSTATE alone says it.
    fn next_step(&self) -> Option<&'static str> {
        let text = match self.code.as_str() {
            "28P01" => "check the user name and password (.pgpass, PGPASSWORD)",
            "28000" => {
                "give the role REPLICATION, and pg_hba.conf a line for it: for streaming its database \
                 column must say replication"
            }
            "53300" => self.room(),
            "42704" if self.request.contains("SLOT") => "create the slot, or correct its name",
            "55006" => "stop the other receiver of this slot, or wait for wal_sender_timeout to end it",
            "58P01" if self.request.starts_with("START_REPLICATION") => {
                "the WAL is gone from this server: take it from another archive, or record a gap and take a \
                 new base backup"
            }
            _ if self.is_slot_invalidated() => {
                "the slot cannot be used any more: drop it, create it again and take a base backup"
            }
            "3D000" => "correct dbname",
            "42501" => "give the role REPLICATION",
            _ if self.ahead_of().is_some() => {
                "this server lost WAL that was already received, or is another one: check which server it is"
            }
            _ if self.fork_point().is_some() || self.is_unknown_timeline() => {
                "this server followed another timeline: check which server is the primary"
            }
            _ => return None,
        };
        Some(text)
    }

    /// What to do about 53300. The limit 0 is no crowd: with `wal_level = minimal` PostgreSQL starts with no other.
    fn room(&self) -> &'static str {
        match self.walsender_limit() {
            Some(0) => {
                "walsenders are switched off on this server: set max_wal_senders = 10, and wal_level = replica where that is \
                 minimal (otherwise it does not start), and restart it"
            }
            Some(_) => {
                "every walsender is taken: end one that is not needed, or raise max_wal_senders and restart PostgreSQL"
            }
            None => {
                "end connections that are not needed, or raise what limits them: max_connections, or the connection limit of \
                 the role or the database"
            }
        }
    }

    /// "number of requested standby connections exceeds max_wal_senders (currently 10)", in any language: the limit. What
    /// else is full says 53300 too, and does not name this setting in front of a number.
    pub(super) fn walsender_limit(&self) -> Option<u32> {
        let named = self.code == "53300" && self.message.contains("max_wal_senders");
        named.then(|| self.last_number()).flatten()
    }

    /// 55000 is "not in the state that it has to be in" of anything: `wal_level`, a server that recovers, a sequence.
    pub(super) fn is_slot_invalidated(&self) -> bool {
        self.code == "55000" && self.request.starts_with("START_REPLICATION SLOT")
    }

    fn answers_start_replication(&self) -> bool {
        self.code == "XX000" && self.request.starts_with("START_REPLICATION")
    }

    /// "requested starting point X/X is ahead of the WAL flush position of this server Y/Y".
    pub(super) fn ahead_of(&self) -> Option<Lsn> {
        if !self.answers_start_replication() || !self.detail.is_empty() {
            return None;
        }
        match lsns(&self.message).as_slice() {
            [asked, flushed] if asked > flushed => Some(*flushed),
            _ => None,
        }
    }

    /// "requested starting point X/X on timeline N is not in this server's history", whose detail
    /// is "This server's history forked from timeline N at Y/Y."
    pub(super) fn fork_point(&self) -> Option<ForkPoint> {
        if !self.answers_start_replication() {
            return None;
        }
        let [lsn] = lsns(&self.detail)[..] else {
            return None;
        };
        let timeline = numbers(&self.detail).next().and_then(|n| u32::try_from(n).ok());
        Some(ForkPoint {
            timeline: timeline.and_then(TimelineId::new),
            lsn,
        })
    }

    /// "requested timeline N is not in this server's history": one number, no LSN.
    pub(super) fn is_unknown_timeline(&self) -> bool {
        self.answers_start_replication()
            && self.detail.is_empty()
            && lsns(&self.message).is_empty()
            && numbers(&self.message).count() == 1
    }

    /// The last whole number of the message: the PID in `slot "x" is active for PID 4711`.
    pub(super) fn last_number(&self) -> Option<u32> {
        let unquoted = self.message.rsplit('"').next().unwrap_or(&self.message);
        numbers(unquoted).last().and_then(|n| u32::try_from(n).ok())
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '/'))
        .filter(|word| !word.is_empty())
}

fn lsns(text: &str) -> Vec<Lsn> {
    words(text)
        .filter(|word| word.contains('/'))
        .filter_map(|word| word.parse().ok())
        .collect()
}

fn numbers(text: &str) -> impl Iterator<Item = u64> {
    words(text).filter_map(|word| word.parse().ok())
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} {}: {}",
            self.request, self.severity, self.code, self.message
        )?;
        if !self.detail.is_empty() {
            write!(f, " DETAIL: {}", self.detail)?;
        }
        if !self.hint.is_empty() {
            write!(f, " HINT: {}", self.hint)?;
        }
        match self.next_step() {
            Some(step) => write!(f, "; next: {step}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ServerError {}
