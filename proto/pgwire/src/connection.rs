//! An established connection: its parameters, and the simple query protocol.
//!
//! Owns the order of request and answer. A call that is dropped half way, or that fails in a way
//! that leaves the protocol out of step, marks the connection unusable, so that a later call cannot
//! read an earlier call's answer.
//!
//! Owns too how long an answer is waited for: a host that has lost its power says no good-bye, and TCP by itself notices that
//! after two hours. The checkpoint that a base backup begins with is exempt, and so is what follows in a stream: its reader
//! knows what may be silent there, and for how long.

use std::collections::HashMap;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::time::timeout;

use crate::conninfo::ConnInfo;
use crate::error::{Notice, PgError, ServerError};
use crate::frame::{Frame, FrameReader, FrameWriter, LIMIT_QUERY};
use crate::message::{self, Row, tag};
use crate::startup;

/// Most bytes one query's rows may take together.
const RESULT_LIMIT: usize = 64 * 1024 * 1024;
/// Most parameters a server may report, far above the dozen that PostgreSQL reports.
const PARAMETER_LIMIT: usize = 1000;
/// Longest such report, as in libpq.
const PARAMETER_LEN: usize = 30_000;
/// Most warnings kept of one command; further ones are only logged.
const NOTICE_LIMIT: usize = 1000;
/// Longest warning shown or kept; its length is logged.
const NOTICE_LEN: usize = 16 * 1024;
/// How long the server may take over the next message of an answer: far longer than a plain question needs on a machine that is
/// merely busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same for commands that write to the server's disk before they answer.
const PATIENCE_WITH_DISK: Duration = Duration::from_secs(300);
/// How much of a statement an error repeats.
const SHOWN_SQL: usize = 80;

/// What the connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Ordinary SQL in the database of the connection parameters.
    Sql,
    /// Physical replication (`replication=true`): replication commands and `SHOW`, no SQL.
    Replication,
}

/// Result of a simple query: the last result set, in text format.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QueryResult {
    /// Column names.
    pub columns: Vec<String>,
    /// Rows; `None` is NULL. Values are slices of the read buffer: copy what is kept for long.
    pub rows: Vec<Vec<Option<Bytes>>>,
}

/// What is known about the other side, and what it says between answers.
#[derive(Debug)]
pub(crate) struct Session {
    /// Host and port as the operator named them.
    pub(crate) target: String,
    pub(crate) parameters: HashMap<String, String>,
    pub(crate) version: u32,
    pub(crate) pid: u32,
    /// Warnings of the command that runs.
    pub(crate) notices: Vec<Notice>,
}

impl Session {
    /// Takes what a server may send at any time; anything else is returned.
    pub(crate) fn absorb(&mut self, frame: Frame, during: &str) -> Result<Option<Frame>, PgError> {
        match frame.tag {
            tag::PARAMETER_STATUS if frame.body.len() > PARAMETER_LEN => Err(PgError::protocol(
                during,
                format!("a parameter of {} bytes reported", frame.body.len()),
            )),
            tag::PARAMETER_STATUS => {
                let (name, value) = message::parameter(frame.body)
                    .ok_or_else(|| message::short("ParameterStatus", during))?;
                self.set_parameter(name, value, during)?;
                Ok(None)
            }
            tag::NOTICE => {
                let len = frame.body.len();
                if len > NOTICE_LEN {
                    tracing::warn!(server = %self.target, during, bytes = len, "a server notice too long to show");
                    return Ok(None);
                }
                let notice = Notice::parse(&frame.body);
                tracing::info!(server = %self.target, during, notice = %notice, "server notice");
                if self.notices.len() < NOTICE_LIMIT {
                    self.notices.push(notice);
                }
                Ok(None)
            }
            tag::NOTIFICATION => Ok(None),
            _ => Ok(Some(frame)),
        }
    }

    fn set_parameter(&mut self, name: String, value: String, during: &str) -> Result<(), PgError> {
        if self.parameters.len() >= PARAMETER_LIMIT && !self.parameters.contains_key(&name) {
            return Err(PgError::protocol(
                during,
                format!("more than {PARAMETER_LIMIT} parameters reported"),
            ));
        }
        self.parameters.insert(name, value);
        Ok(())
    }
}

/// A connection that is ready for a command.
#[derive(Debug)]
pub struct Connection {
    pub(crate) reader: FrameReader,
    pub(crate) writer: FrameWriter,
    pub(crate) session: Session,
    /// Set while an answer is outstanding.
    busy: bool,
    /// How long the next message of an answer may take; for ever without.
    patience: Option<Duration>,
}

impl Connection {
    /// Connects and authenticates. Hosts are tried in order; each attempt is bounded by
    /// `connect_timeout`.
    pub async fn connect(info: &ConnInfo, mode: Mode) -> Result<Connection, PgError> {
        Box::pin(startup::connect(info, mode)).await
    }

    pub(crate) fn assemble(mut reader: FrameReader, writer: FrameWriter, session: Session) -> Connection {
        reader.set_limit(LIMIT_QUERY);
        reader.set_gathering(false);
        Connection {
            reader,
            writer,
            session,
            busy: false,
            patience: Some(PATIENCE),
        }
    }

    /// The server's version as `server_version_num` has it: 150020 is 15.20.
    pub fn server_version(&self) -> u32 {
        self.session.version
    }

    /// A parameter as the server last reported it (`server_version`, `in_hot_standby`, ...).
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.session.parameters.get(name).map(String::as_str)
    }

    /// Process id of the server process behind this connection.
    pub fn backend_pid(&self) -> u32 {
        self.session.pid
    }

    /// Host and port, as the operator named them.
    pub fn target(&self) -> &str {
        &self.session.target
    }

    /// Warnings that came with the last command.
    pub fn notices(&self) -> &[Notice] {
        &self.session.notices
    }

    /// Says goodbye to the server. Dropping a connection works too; the server then logs a lost
    /// connection.
    pub async fn close(self) {
        self.writer.close().await;
    }

    /// Runs one statement in the simple query protocol and returns its last result set. On a
    /// replication connection only replication commands and `SHOW` are understood.
    ///
    /// After a server error the connection is usable again.
    pub async fn simple_query(&mut self, sql: &str) -> Result<QueryResult, PgError> {
        let during = shown(sql);
        self.send_query(sql, &during).await?;
        let mut result = QueryResult::default();
        let mut size = 0;
        loop {
            let frame = self.next(&during).await?;
            match frame.tag {
                tag::ROW_DESCRIPTION => {
                    let columns = message::columns(frame.body)
                        .ok_or_else(|| message::short("RowDescription", &during))?;
                    result = QueryResult {
                        columns,
                        rows: Vec::new(),
                    };
                }
                tag::DATA_ROW => {
                    // A row costs more than its bytes; count what the vectors take as well.
                    size += frame.body.len() * 8 + 64;
                    if size / 8 > RESULT_LIMIT {
                        return Err(PgError::protocol(
                            &during,
                            format!("more than {RESULT_LIMIT} bytes of rows"),
                        ));
                    }
                    result.rows.push(read_row(frame.body, &during)?);
                }
                tag::COMMAND_COMPLETE | tag::EMPTY_QUERY => {}
                tag::READY => {
                    self.busy = false;
                    return Ok(result);
                }
                tag::ERROR => return Err(self.recover(&during, &frame).await),
                _ => return Err(message::unexpected(&frame, &during)),
            }
        }
    }

    /// The same for a command that the server answers only when its disk has taken what it wrote.
    pub(crate) async fn query_of_disk(&mut self, sql: &str) -> Result<QueryResult, PgError> {
        self.patience = Some(PATIENCE_WITH_DISK);
        let result = self.simple_query(sql).await;
        self.patience = Some(PATIENCE);
        result
    }

    /// From now on an answer may take as long as it likes.
    pub(crate) fn wait_for_ever(&mut self) {
        self.patience = None;
    }

    /// From now on each message may take as long as the server's disk.
    pub(crate) fn wait_for_disk(&mut self) {
        self.patience = Some(PATIENCE_WITH_DISK);
    }

    /// Sends one statement; from here until [`Self::done`] the connection is busy.
    pub(crate) async fn send_query(&mut self, sql: &str, during: &str) -> Result<(), PgError> {
        if self.busy {
            return Err(PgError::Unusable {
                why: "an earlier command was not read to its end",
            });
        }
        frontend::query(sql, &mut self.writer.pending).map_err(|_| PgError::Argument {
            what: "statement",
            value: during.to_owned(),
            reason: "it contains a NUL byte",
        })?;
        self.busy = true;
        self.session.notices.clear();
        self.writer.flush(during).await
    }

    /// The next message that is not a notice or the like. A server that says nothing for too long leaves the connection
    /// unusable.
    pub(crate) async fn next(&mut self, during: &str) -> Result<Frame, PgError> {
        loop {
            let expected = self.reader.expect(during);
            let frame = match self.patience {
                None => expected.await?,
                Some(after) => timeout(after, expected).await.map_err(|_| PgError::Silent {
                    during: during.to_owned(),
                    after,
                })??,
            };
            if let Some(frame) = self.session.absorb(frame, during)? {
                return Ok(frame);
            }
        }
    }

    /// Marks the answer as read to its end.
    pub(crate) fn done(&mut self) {
        self.busy = false;
    }

    /// Turns an `ErrorResponse` into an error, after reading to `ReadyForQuery` so that the connection
    /// stays usable. After a FATAL error there is none, and the server's words are still what counts.
    pub(crate) async fn recover(&mut self, during: &str, frame: &Frame) -> PgError {
        let error = ServerError::parse(during, &frame.body);
        if error.severity == "ERROR" {
            while let Ok(frame) = self.next(during).await {
                if frame.tag == tag::READY {
                    self.busy = false;
                    break;
                }
            }
        }
        PgError::Server(Box::new(error))
    }
}

pub(crate) fn read_row(body: Bytes, during: &str) -> Result<Row, PgError> {
    message::row(body).ok_or_else(|| message::short("DataRow", during))
}

/// A statement as errors show it.
fn shown(sql: &str) -> String {
    match sql.char_indices().nth(SHOWN_SQL) {
        Some((end, _)) => format!("{}...", &sql[..end]),
        None => sql.to_owned(),
    }
}

/// `server_version` (`15.20 (Debian ...)`, `18beta1`, `9.6.2`) as `server_version_num`.
pub(crate) fn version_number(text: &str) -> Option<u32> {
    let mut parts = text
        .split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .next()?
        .split('.')
        .map(|part| part.parse::<u32>().ok().filter(|number| *number < 10_000));
    let major = parts.next()??;
    let minor = parts.next().flatten().unwrap_or(0);
    if major >= 10 {
        return Some(major * 10_000 + minor);
    }
    let patch = parts.next().flatten().unwrap_or(0);
    Some(major * 10_000 + minor * 100 + patch)
}

/// Puts one `CopyData` message around `payload`.
pub(crate) fn put_copy_data(out: &mut BytesMut, payload: &[u8]) {
    use bytes::BufMut;
    // Only status messages are sent this way: a few dozen bytes.
    let len = u32::try_from(payload.len() + 4).unwrap_or(u32::MAX);
    out.put_u8(tag::COPY_DATA);
    out.put_u32(len);
    out.put(payload.chunk());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_servers_report_them() {
        for (text, number) in [
            ("15.20 (Debian 15.20-0+deb12u1)", Some(150_020)),
            ("14.23", Some(140_023)),
            ("18beta1", Some(180_000)),
            ("17devel", Some(170_000)),
            ("9.6.2", Some(90_602)),
            ("", None),
            ("x", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(version_number(text), number, "{text}");
        }
    }

    #[test]
    fn long_statements_are_cut_between_characters() {
        let sql = "é".repeat(200);
        assert!(shown(&sql).ends_with("..."));
        assert_eq!(shown("SHOW x"), "SHOW x");
    }
}
