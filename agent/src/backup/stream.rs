//! One `BASE_BACKUP`, from its first message to its last.
//!
//! Owns: reading PostgreSQL's messages in order, taking the archives apart into entries, checksums and packs,
//! and collecting what the backup's record needs (positions, backup_label, tablespaces, pg_manifest).
//! Keeps: the reader does per byte only what must be done there (one checksum, one copy into a frame);
//! compression and storage run beside it.
//! Does not own: whether the result may be published (`verify`, `publish`).

use std::pin::pin;

use bytes::Bytes;
use highwater_format::manifest::Entry;
use highwater_format::manifest::PackInfo;
use highwater_format::pg_manifest::{ChecksumAlgorithm, Checksummer};
use highwater_format::{Lsn, TimelineId};
use highwater_pgwire::{BackupMessage, BaseBackup, Tablespace};
use tokio_util::sync::CancellationToken;

use super::entries::Entries;
use super::packs::Packs;
use super::progress::Progress;
use super::tar::{TarEntry, TarError, TarEvent, TarKind, TarParser};
use crate::error::{AgentError, Result};

/// backup_label is a dozen short lines; the label itself is ours.
const LABEL_LIMIT: usize = 64 * 1024;
/// About two million files. The pg_manifest is held in memory until it has been compared.
const PG_MANIFEST_LIMIT: usize = 256 << 20;

/// A place in the WAL as `BASE_BACKUP` reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) lsn: Lsn,
    pub(crate) timeline: TimelineId,
}

/// Everything that a base backup consisted of. All packs are stored.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) stop: Position,
    pub(crate) tablespaces: Vec<Tablespace>,
    pub(crate) entries: Entries,
    pub(crate) packs: Vec<PackInfo>,
    pub(crate) backup_label: String,
    pub(crate) pg_manifest: Vec<u8>,
}

/// Reads up to the start position, which comes before any content.
pub(crate) async fn start(stream: &mut BaseBackup, cancel: &CancellationToken) -> Result<Position> {
    let next = async { stream.next().await.map_err(AgentError::from) };
    let message = tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(AgentError::Cancelled),
        message = next => message?,
    };
    match message {
        Some(BackupMessage::Start { lsn, timeline }) => Ok(Position { lsn, timeline }),
        _ => Err(unexpected("something before the start position")),
    }
}

/// Reads everything after the start position, up to PostgreSQL's statement that the backup is complete.
pub(crate) async fn receive(
    stream: &mut BaseBackup,
    packs: Packs,
    started_seconds: i64,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<Received> {
    let mut receiver = Receiver::new(packs, started_seconds, progress.clone());
    while let Some(message) = receiver.next(stream, cancel).await? {
        receiver.take(message).await?;
    }
    receiver.finish().await
}

#[derive(Debug)]
struct Receiver {
    packs: Packs,
    progress: Progress,
    started_seconds: i64,
    entries: Entries,
    archive: Option<Archive>,
    tablespaces: Vec<Tablespace>,
    backup_label: Vec<u8>,
    pg_manifest: Option<Vec<u8>>,
    stop: Option<Position>,
}

/// The tar archive that is being read.
#[derive(Debug)]
struct Archive {
    parser: TarParser,
    /// Where its members belong, relative to the data directory; empty for the base archive.
    root: String,
    checksummer: Checksummer,
    is_label: bool,
}

impl Receiver {
    fn new(packs: Packs, started_seconds: i64, progress: Progress) -> Receiver {
        Receiver {
            packs,
            progress,
            started_seconds,
            entries: Entries::default(),
            archive: None,
            tablespaces: Vec::new(),
            backup_label: Vec::new(),
            pg_manifest: None,
            stop: None,
        }
    }

    /// The next message. Fails early when a pack cannot be stored, even while PostgreSQL is silent.
    async fn next(
        &mut self,
        stream: &mut BaseBackup,
        cancel: &CancellationToken,
    ) -> Result<Option<BackupMessage>> {
        let mut message = pin!(stream.next());
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(AgentError::Cancelled),
                message = &mut message => return message.map_err(AgentError::from),
                stored = self.packs.watch() => stored?,
            }
        }
    }

    async fn take(&mut self, message: BackupMessage) -> Result<()> {
        match message {
            BackupMessage::Start { .. } => return Err(unexpected("a second start position")),
            BackupMessage::Tablespaces(all) => {
                self.progress
                    .expect(all.iter().filter_map(|space| space.size_kb).sum::<u64>() * 1024);
                // The row without an oid stands for the data directory itself.
                self.tablespaces = all.into_iter().filter(|space| space.oid.is_some()).collect();
            }
            BackupMessage::Archive { oid, .. } => {
                self.close_archive()?;
                self.archive = Some(Archive {
                    parser: TarParser::new(),
                    root: oid.map(|oid| format!("pg_tblspc/{oid}")).unwrap_or_default(),
                    checksummer: Checksummer::new(ChecksumAlgorithm::Crc32c),
                    is_label: false,
                });
            }
            BackupMessage::Data(data) => self.content(&data).await?,
            BackupMessage::ManifestBegin => {
                self.close_archive()?;
                self.begin_pg_manifest();
            }
            BackupMessage::ManifestData(data) => self.pg_manifest_data(&data).await?,
            BackupMessage::Progress(_) => {}
            BackupMessage::Stop { lsn, timeline } => {
                self.close_archive()?;
                self.stop = Some(Position { lsn, timeline });
            }
        }
        Ok(())
    }

    async fn content(&mut self, data: &Bytes) -> Result<()> {
        self.progress.add_received(data.len() as u64);
        let Some(archive) = &mut self.archive else {
            return Err(unexpected("content outside an archive"));
        };
        let mut input: &[u8] = data;
        while let Some(event) = archive
            .parser
            .next(&mut input)
            .map_err(|error| unreadable(&error))?
        {
            match event {
                TarEvent::Entry(member) => {
                    archive.is_label = archive.root.is_empty() && member.path == "backup_label";
                    self.entries.begin(&archive.root, member);
                }
                TarEvent::Data(content) => {
                    archive.checksummer.update(content);
                    if archive.is_label && self.backup_label.len() + content.len() <= LABEL_LIMIT {
                        self.backup_label.extend_from_slice(content);
                    }
                    let entries = &mut self.entries;
                    self.packs
                        .append(content, |extent| entries.extend(extent))
                        .await?;
                }
                TarEvent::FileEnd => {
                    let next = Checksummer::new(ChecksumAlgorithm::Crc32c);
                    let finished = std::mem::replace(&mut archive.checksummer, next);
                    self.entries.checked(finished.finish());
                }
            }
        }
        Ok(())
    }

    fn close_archive(&mut self) -> Result<()> {
        match self.archive.take() {
            Some(archive) => archive.parser.finish().map_err(|error| unreadable(&error)),
            None => Ok(()),
        }
    }

    /// The pg_manifest comes last and without a length; it is kept like a file of the data directory.
    fn begin_pg_manifest(&mut self) {
        self.pg_manifest = Some(Vec::new());
        let member = TarEntry {
            path: "backup_manifest".into(),
            kind: TarKind::File,
            mode: 0o600,
            mtime: self.started_seconds,
            size: 0,
            link: None,
        };
        self.entries.begin("", member);
    }

    async fn pg_manifest_data(&mut self, data: &Bytes) -> Result<()> {
        let Some(manifest) = &mut self.pg_manifest else {
            return Err(unexpected("a manifest without a beginning"));
        };
        manifest.extend_from_slice(data);
        if manifest.len() > PG_MANIFEST_LIMIT {
            return Err(unexpected(&format!(
                "a backup_manifest of more than {PG_MANIFEST_LIMIT} bytes"
            )));
        }
        self.entries.resize(manifest.len() as u64);
        let entries = &mut self.entries;
        self.packs.append(data, |extent| entries.extend(extent)).await
    }

    async fn finish(self) -> Result<Received> {
        let stop = self.stop.ok_or_else(|| unexpected("no stop position"))?;
        let pg_manifest = self.pg_manifest.ok_or_else(|| unexpected("no backup_manifest"))?;
        let backup_label = String::from_utf8(self.backup_label)
            .map_err(|_| unexpected("a backup_label that is not UTF-8"))?;
        if backup_label.is_empty() {
            return Err(unexpected("no backup_label"));
        }
        let packs = self.packs.finish().await?;
        let (tablespaces, entries) = (self.tablespaces, self.entries);
        Ok(Received {
            stop,
            tablespaces,
            entries,
            packs,
            backup_label,
            pg_manifest,
        })
    }
}

impl Received {
    /// The entries' table, for the manifest.
    pub(crate) fn into_manifest_parts(self) -> (Vec<PackInfo>, Vec<Entry>) {
        (self.packs, self.entries.into_list())
    }
}

fn unexpected(what: &str) -> AgentError {
    AgentError::Trouble {
        what: format!("PostgreSQL's answer to BASE_BACKUP cannot be used: {what}. Nothing was published"),
        next: "Try again; if it stays, check that the server is PostgreSQL 14 to 18 without a proxy between"
            .into(),
    }
}

fn unreadable(error: &TarError) -> AgentError {
    AgentError::Trouble {
        what: format!("{error}. Nothing was published"),
        next: "Mend it and back up again".into(),
    }
}
