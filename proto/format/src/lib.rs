//! The archive format of Highwater: what agent and restore must agree on to the byte.
//!
//! Owns: positions, timelines, file names, keys, the container of bulk bytes, the JSON documents, and the
//! reading of what PostgreSQL itself writes (WAL records, history files, `backup_label`, `backup_manifest`).
//! Does not own: sockets, files, threads, clocks. Everything here takes bytes and returns values.
//!
//! `FORMAT.md` beside this crate's manifest is the norm; the code follows it.

#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        reason = "tests index small arrays with WAL positions"
    )
)]

pub mod backup_id;
pub mod backup_label;
pub mod branches;
pub mod codec;
pub mod container;
pub mod coverage;
pub mod document;
pub mod error;
pub mod layout;
pub mod lsn;
pub mod manifest;
pub mod pg_manifest;
pub mod records;
mod text;
pub mod time;
pub mod timeline;
pub mod walname;
pub mod walpage;
pub mod walscan;

pub use backup_id::BackupId;
pub use branches::Branch;
pub use codec::Codec;
pub use container::{Cipher, Expect, Frame, FrameEncoder, FrameRef, Header, Kind, Object, Sealed, seal};
pub use document::{Document, crc32_hex, decode, encode, parse_crc32};
pub use error::{FormatError, FormatErrorKind, ParseError};
pub use layout::{ClusterName, Key, Layout};
pub use lsn::{Lsn, LsnRange, SegmentSize, SystemId};
pub use manifest::{Entry, EntryKind, Extent, Manifest, ManifestError, PackInfo};
pub use records::{Backup, Beginning, Gap, Identity, Pulse, Quorum, Tablespace, Writer};
pub use time::Time;
pub use timeline::{History, HistoryEntry, HistoryError, TimelineId};
pub use walname::{SegmentName, WalFile, WalName};
