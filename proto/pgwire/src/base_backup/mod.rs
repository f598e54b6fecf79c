//! `BASE_BACKUP`: one message sequence over both framings that servers use.
//!
//! PostgreSQL 15 and newer send one copy stream whose messages carry a type byte; 13 and 14 send one
//! copy stream per archive and one more for the manifest. [`BaseBackup`] hides the difference, except
//! for one: 13 and 14 leave out the two zero blocks at the end of each tar archive, so an archive is
//! over when the next message that is not [`BackupMessage::Data`] arrives.
//!
//! Owns the order of what arrives. Does not read tar, and does not check the manifest.

mod options;
mod read;

use bytes::Bytes;
use highwater_format::{Lsn, TimelineId};

use crate::connection::Connection;
use crate::error::{Notice, PgError};
use crate::frame::LIMIT_COPY;

pub use options::{BaseBackupOptions, ManifestOption};
use read::Progress;

/// First version that sends one copy stream with type bytes.
const TYPED_SINCE: u32 = 150_000;

/// One tablespace of the backup. The last one, without an oid, is the data directory itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// `None` for the data directory.
    pub oid: Option<u32>,
    /// Where the server has it; `None` for the data directory.
    pub location: Option<String>,
    /// The server's estimate in kB, if progress was asked for.
    pub size_kb: Option<u64>,
}

/// What a base backup delivers, in this order: `Start`, `Tablespaces`, then per archive `Archive` and
/// its `Data`, then the manifest if asked for, then `Stop`. `Progress` may come anywhere between
/// `Tablespaces` and `Stop`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupMessage {
    /// Where the WAL that the backup needs begins, and on which timeline.
    Start {
        /// The checkpoint's redo point.
        lsn: Lsn,
        /// Its timeline.
        timeline: TimelineId,
    },
    /// Every tablespace, in the order in which their archives come: the data directory last.
    Tablespaces(Vec<Tablespace>),
    /// A tar archive begins.
    Archive {
        /// `base.tar`, or `<oid>.tar` for a tablespace.
        name: String,
        /// `None` for the data directory.
        oid: Option<u32>,
        /// Where the server has the tablespace.
        location: Option<String>,
    },
    /// Bytes of the current archive, cut anywhere. Small pieces keep a 256 KiB block alive.
    Data(Bytes),
    /// The pg_manifest begins.
    ManifestBegin,
    /// Bytes of the pg_manifest.
    ManifestData(Bytes),
    /// How many bytes of archives have been read so far (15 and newer).
    Progress(u64),
    /// Everything was sent. Not yet success: an error may still follow.
    Stop {
        /// Where the WAL that the backup needs ends.
        lsn: Lsn,
        /// The timeline at the end.
        timeline: TimelineId,
    },
}

/// A running base backup. Dropping it ends the connection, and with it the backup.
#[derive(Debug)]
pub struct BaseBackup {
    connection: Connection,
    command: String,
    progress: Progress,
    /// The server waits at the end for its `archive_command`, for which nobody knows a limit.
    waits_for_archive: bool,
    finished: bool,
}

impl Connection {
    /// Starts a base backup. The server first makes a checkpoint: the first message may take as long
    /// as `checkpoint_timeout` unless a fast one is asked for. From the content on a silent server is given up.
    pub async fn base_backup(mut self, options: BaseBackupOptions) -> Result<BaseBackup, PgError> {
        let typed = self.server_version() >= TYPED_SINCE;
        let command = options.command(typed)?;
        self.send_query(&command, "BASE_BACKUP").await?;
        self.wait_for_ever();
        self.reader.set_limit(LIMIT_COPY);
        self.reader.set_gathering(true);
        let progress = Progress::new(typed, options.manifest != ManifestOption::None);
        Ok(BaseBackup {
            connection: self,
            command: "BASE_BACKUP".to_owned(),
            progress,
            waits_for_archive: options.wait_wal,
            finished: false,
        })
    }
}

impl BaseBackup {
    /// The next message. `None` means success, and comes only after the server has said that no error
    /// followed. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<BackupMessage>, PgError> {
        while !self.finished {
            let frame = self.connection.next(&self.command).await?;
            if frame.tag == crate::message::tag::ERROR {
                return Err(self.connection.recover(&self.command, &frame).await);
            }
            match self.progress.take(frame, &self.command)? {
                read::Step::Message(message) => {
                    self.limit_silence(&message);
                    return Ok(Some(message));
                }
                read::Step::Nothing => {}
                read::Step::Finished => {
                    self.connection.done();
                    self.finished = true;
                }
            }
        }
        Ok(None)
    }

    /// The checkpoint and the estimate of the size are over when the tablespaces come; then there is always something to
    /// send. Only waiting for a message counts: a caller that is busy elsewhere does not use its time up.
    fn limit_silence(&mut self, message: &BackupMessage) {
        if matches!(message, BackupMessage::Tablespaces(_)) && !self.waits_for_archive {
            self.connection.wait_for_disk();
        }
    }

    /// Warnings so far: files that could not be read as expected, failed page checksums.
    pub fn warnings(&self) -> &[Notice] {
        self.connection.notices()
    }

    /// The connection, for another command; an error unless the backup was read to its end.
    pub fn into_connection(self) -> Result<Connection, PgError> {
        match self.finished {
            true => {
                let Connection {
                    reader,
                    writer,
                    session,
                    ..
                } = self.connection;
                Ok(Connection::assemble(reader, writer, session))
            }
            false => Err(PgError::Unusable {
                why: "the base backup was not read to its end",
            }),
        }
    }
}

#[cfg(test)]
mod tests;
