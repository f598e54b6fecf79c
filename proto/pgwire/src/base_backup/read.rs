//! The order of a base backup's messages, as a state machine without I/O.
//!
//! Every transition that the protocol does not have is an error: a server that leaves out the stop
//! position, an archive or the manifest must not look like a finished backup.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{BackupMessage, Tablespace};
use crate::commands;
use crate::connection::read_row;
use crate::error::PgError;
use crate::frame::Frame;
use crate::message::{self, Row, tag, take_cstr, take_u8, take_u64};

/// Most tablespaces a server may list.
const TABLESPACE_LIMIT: usize = 100_000;

/// What one protocol message came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Message(BackupMessage),
    Nothing,
    Finished,
}

/// The result set or copy stream being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// First result set: where the backup starts.
    Start,
    /// Second result set: the tablespaces.
    Tablespaces,
    /// Between the tablespaces and the stop position, outside a copy stream.
    Archives,
    /// Inside a copy stream, before anything in it began (15 and newer).
    Copy,
    /// Inside an archive.
    Archive,
    /// Inside the manifest.
    Manifest,
    /// After the stop position.
    Stopped,
}

/// How far a base backup has come.
#[derive(Debug)]
pub(super) struct Progress {
    typed: bool,
    wants_manifest: bool,
    part: Part,
    started: bool,
    tablespaces: Vec<Tablespace>,
    /// Archives still to come.
    awaited: VecDeque<Tablespace>,
    manifest_seen: bool,
}

impl Progress {
    pub(super) fn new(typed: bool, wants_manifest: bool) -> Progress {
        Progress {
            typed,
            wants_manifest,
            part: Part::Start,
            started: false,
            tablespaces: Vec::new(),
            awaited: VecDeque::new(),
            manifest_seen: false,
        }
    }

    /// Takes one message other than `ErrorResponse`.
    pub(super) fn take(&mut self, frame: Frame, during: &str) -> Result<Step, PgError> {
        match (frame.tag, self.part) {
            (tag::ROW_DESCRIPTION, Part::Start | Part::Tablespaces | Part::Archives) => Ok(Step::Nothing),
            (tag::DATA_ROW, Part::Start) if !self.started => self.start(frame.body, during),
            (tag::DATA_ROW, Part::Tablespaces) => self.tablespace(frame.body, during),
            (tag::DATA_ROW, Part::Archives) => self.stop(frame.body, during),
            (tag::COMMAND_COMPLETE, Part::Start) if self.started => {
                self.part = Part::Tablespaces;
                Ok(Step::Nothing)
            }
            (tag::COMMAND_COMPLETE, Part::Tablespaces) => Ok(self.end_tablespaces()),
            (tag::COMMAND_COMPLETE, Part::Archives | Part::Stopped) => Ok(Step::Nothing),
            (tag::COPY_OUT, Part::Archives) => self.begin_copy(during),
            (tag::COPY_DATA, Part::Copy | Part::Archive | Part::Manifest) if self.typed => {
                self.typed_data(frame.body, during)
            }
            (tag::COPY_DATA, Part::Archive) => Ok(Step::Message(BackupMessage::Data(frame.body))),
            (tag::COPY_DATA, Part::Manifest) => Ok(Step::Message(BackupMessage::ManifestData(frame.body))),
            (tag::COPY_DONE, Part::Copy | Part::Archive | Part::Manifest) => {
                self.part = Part::Archives;
                Ok(Step::Nothing)
            }
            (tag::READY, Part::Stopped) => Ok(Step::Finished),
            (tag::READY, _) => Err(PgError::protocol(
                during,
                "the server ended the backup without a stop position",
            )),
            _ => Err(message::unexpected(&frame, during)),
        }
    }

    fn start(&mut self, body: Bytes, during: &str) -> Result<Step, PgError> {
        let (lsn, timeline) = position(&read_row(body, during)?, during)?;
        self.started = true;
        Ok(Step::Message(BackupMessage::Start { lsn, timeline }))
    }

    fn tablespace(&mut self, body: Bytes, during: &str) -> Result<Step, PgError> {
        if self.tablespaces.len() >= TABLESPACE_LIMIT {
            return Err(PgError::protocol(
                during,
                format!("more than {TABLESPACE_LIMIT} tablespaces listed"),
            ));
        }
        self.tablespaces
            .push(read_tablespace(&read_row(body, during)?, during)?);
        Ok(Step::Nothing)
    }

    fn end_tablespaces(&mut self) -> Step {
        self.part = Part::Archives;
        self.awaited = self.tablespaces.iter().cloned().collect();
        Step::Message(BackupMessage::Tablespaces(std::mem::take(&mut self.tablespaces)))
    }

    /// A copy stream begins: the only one, or that of the next archive or of the manifest.
    fn begin_copy(&mut self, during: &str) -> Result<Step, PgError> {
        if self.typed {
            self.part = Part::Copy;
            return Ok(Step::Nothing);
        }
        match self.awaited.pop_front() {
            Some(tablespace) => {
                self.part = Part::Archive;
                let Tablespace { oid, location, .. } = tablespace;
                let name = oid.map_or_else(|| "base.tar".to_owned(), |oid| format!("{oid}.tar"));
                Ok(Step::Message(BackupMessage::Archive { name, oid, location }))
            }
            None => self.begin_manifest(during),
        }
    }

    fn begin_manifest(&mut self, during: &str) -> Result<Step, PgError> {
        if !self.wants_manifest || self.manifest_seen {
            return Err(PgError::protocol(
                during,
                "the server sent an archive or manifest nobody asked for",
            ));
        }
        self.manifest_seen = true;
        self.part = Part::Manifest;
        Ok(Step::Message(BackupMessage::ManifestBegin))
    }

    /// A copy message of 15 and newer: its first byte says what it is.
    fn typed_data(&mut self, mut body: Bytes, during: &str) -> Result<Step, PgError> {
        match (take_u8(&mut body), self.part) {
            (Some(b'n'), Part::Copy | Part::Archive) => self.typed_archive(body, during),
            (Some(b'm'), Part::Copy | Part::Archive) => self.begin_manifest(during),
            (Some(b'd'), Part::Archive) => Ok(Step::Message(BackupMessage::Data(body))),
            (Some(b'd'), Part::Manifest) => Ok(Step::Message(BackupMessage::ManifestData(body))),
            (Some(b'p'), _) => {
                let done = take_u64(&mut body).ok_or_else(|| message::short("progress message", during))?;
                Ok(Step::Message(BackupMessage::Progress(done)))
            }
            (Some(kind), _) => Err(PgError::protocol(
                during,
                format!(
                    "backup message {:?} (0x{kind:02x}) has no place here",
                    char::from(kind)
                ),
            )),
            (None, _) => Err(message::short("backup message", during)),
        }
    }

    fn typed_archive(&mut self, mut body: Bytes, during: &str) -> Result<Step, PgError> {
        let mut text = || take_cstr(&mut body).and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
        let (Some(name), Some(path)) = (text(), text()) else {
            return Err(message::short("archive name", during));
        };
        let oid = archive_oid(&name).ok_or_else(|| {
            PgError::protocol(
                during,
                format!("archive name {name:?} is not base.tar or <oid>.tar"),
            )
        })?;
        let Some(place) = self.awaited.iter().position(|tablespace| tablespace.oid == oid) else {
            return Err(PgError::protocol(
                during,
                format!("archive {name:?} is of no listed tablespace, or repeated"),
            ));
        };
        self.awaited.remove(place);
        self.part = Part::Archive;
        let location = Some(path).filter(|path| !path.is_empty());
        Ok(Step::Message(BackupMessage::Archive { name, oid, location }))
    }

    fn stop(&mut self, body: Bytes, during: &str) -> Result<Step, PgError> {
        if !self.awaited.is_empty() {
            return Err(PgError::protocol(
                during,
                format!(
                    "the server ended the backup with {} archives missing",
                    self.awaited.len()
                ),
            ));
        }
        if self.wants_manifest && !self.manifest_seen {
            return Err(PgError::protocol(
                during,
                "the server ended the backup without the manifest",
            ));
        }
        let (lsn, timeline) = position(&read_row(body, during)?, during)?;
        self.part = Part::Stopped;
        Ok(Step::Message(BackupMessage::Stop { lsn, timeline }))
    }
}

/// `Some(None)` for the data directory, `Some(Some(oid))` for a tablespace.
#[expect(
    clippy::option_option,
    reason = "the inner option is the oid as the rest of the module has it"
)]
fn archive_oid(name: &str) -> Option<Option<u32>> {
    match name.strip_suffix(".tar")? {
        "base" => Some(None),
        oid => oid.parse().ok().map(Some),
    }
}

fn position(
    row: &Row,
    during: &str,
) -> Result<(highwater_format::Lsn, highwater_format::TimelineId), PgError> {
    let lsn = message::parsed(row, 0, "recptr", during)?;
    let timeline = commands::timeline(message::parsed(row, 1, "tli", during)?, during)?;
    Ok((lsn, timeline))
}

fn read_tablespace(row: &Row, during: &str) -> Result<Tablespace, PgError> {
    let oid = match message::optional_text(row, 0, during)? {
        Some(_) => Some(message::parsed(row, 0, "spcoid", during)?),
        None => None,
    };
    let location = message::optional_text(row, 1, during)?.map(str::to_owned);
    let size_kb = match message::optional_text(row, 2, during)? {
        Some(_) => Some(message::parsed(row, 2, "size", during)?),
        None => None,
    };
    Ok(Tablespace {
        oid,
        location,
        size_kb,
    })
}
