//! The first 128 bytes of an object: what it is, without reading the rest.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `89 48 57 41 52 0D 0A 1A` |
//! | 8 | 2 | version, u16 |
//! | 10 | 1 | kind |
//! | 11 | 1 | codec |
//! | 12 | 1 | cipher |
//! | 13 | 3 | zero |
//! | 16 | 4 | frame size: the most plain bytes in a frame, u32 |
//! | 20 | 4 | timeline, u32 |
//! | 24 | 8 | system id, u64 |
//! | 32 | 8 | start, u64: LSN, or the pack's number |
//! | 40 | 8 | end, u64: LSN, or the pack's number + 1 |
//! | 48 | 8 | plain length in bytes, u64 |
//! | 56 | 8 | first commit, i64 Unix microseconds, lowest i64 for none |
//! | 64 | 8 | last commit, likewise |
//! | 72 | 8 | server time at sealing, i64 Unix microseconds |
//! | 80 | 8 | the server's end of WAL at sealing, u64 LSN |
//! | 88 | 16 | key id; zero without a cipher |
//! | 104 | 12 | nonce; zero without a cipher |
//! | 116 | 8 | zero |
//! | 124 | 4 | CRC-32 of bytes 0 to 123 |
//!
//! Little-endian throughout. Magic, version and the checksum's place are the same in every version.

use std::fmt;

use crate::codec::Codec;
use crate::container::frame::FRAME_SIZE;
use crate::error::FormatError;
use crate::lsn::{Lsn, LsnRange, SegmentSize, SystemId};
use crate::time::Time;
use crate::timeline::TimelineId;

/// The container version that this release writes, and the newest that it reads.
pub const VERSION: u16 = 1;

/// The most WAL bytes in one object: 64 MiB. Larger segments are stored as tail chunks. A reader that looks
/// for what covers an LSN need not look further back than this.
pub const MAX_OBJECT_PLAIN: u64 = 64 << 20;

/// Not text (high bit), broken by line-end conversion (CR LF) and by seven-bit transport, stops a DOS `type`.
const MAGIC: [u8; 8] = *b"\x89HWAR\r\n\x1a";
const NO_COMMIT: i64 = i64::MIN;

/// What an object holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// One whole WAL segment.
    Segment = 1,
    /// A run of WAL bytes.
    Tail = 2,
    /// Base-backup file bytes.
    Pack = 3,
}

impl Kind {
    fn from_id(id: u8) -> Result<Kind, FormatError> {
        [Kind::Segment, Kind::Tail, Kind::Pack]
            .into_iter()
            .find(|kind| *kind as u8 == id)
            .ok_or(FormatError::UnknownKind(id))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Segment => "segment",
            Kind::Tail => "tail",
            Kind::Pack => "pack",
        })
    }
}

/// How an object is encrypted. The numbers are reserved; this release writes and reads only `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cipher {
    /// Not encrypted.
    None = 0,
    /// AES-256-GCM per frame, the header as additional data.
    Aes256Gcm = 1,
}

impl Cipher {
    fn from_id(id: u8) -> Result<Cipher, FormatError> {
        [Cipher::None, Cipher::Aes256Gcm]
            .into_iter()
            .find(|cipher| *cipher as u8 == id)
            .ok_or(FormatError::UnknownCipher(id))
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Cipher::None => "none",
            Cipher::Aes256Gcm => "aes-256-gcm",
        })
    }
}

/// What an object says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What the object holds.
    pub kind: Kind,
    /// How its frames are compressed.
    pub codec: Codec,
    /// How its frames are encrypted.
    pub cipher: Cipher,
    /// Which key encrypted it; zero without a cipher.
    pub key_id: [u8; 16],
    /// The most plain bytes in one frame.
    pub frame_size: u32,
    /// The timeline of the WAL, or the one the backup started on.
    pub timeline: TimelineId,
    /// The lineage.
    pub system_id: SystemId,
    /// The first LSN, or the pack's number.
    pub start: u64,
    /// The LSN after the last byte, or the pack's number + 1.
    pub end: u64,
    /// Bytes after decoding. [`super::seal`] fills it in.
    pub plain_len: u64,
    /// The earliest time of a commit or abort record that ends in this object.
    pub first_commit: Option<Time>,
    /// The latest time of such a record.
    pub last_commit: Option<Time>,
    /// The server's time when the object was sealed; of a pack: when its backup started.
    pub sealed_at: Time,
    /// The server's end of WAL at that time.
    pub server_end: Lsn,
}

impl Header {
    /// Bytes of an encoded header.
    pub const LEN: usize = 128;
    const CRC_AT: usize = 124;

    /// The header of a WAL object without commits, for the caller to complete.
    pub fn wal(
        kind: Kind,
        codec: Codec,
        system_id: SystemId,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Header {
        Header {
            kind,
            codec,
            cipher: Cipher::None,
            key_id: [0; 16],
            frame_size: FRAME_SIZE,
            timeline,
            system_id,
            start: range.start.0,
            end: range.end.0,
            plain_len: 0,
            first_commit: None,
            last_commit: None,
            sealed_at: Time::UNIX_EPOCH,
            server_end: Lsn::ZERO,
        }
    }

    /// The header of a pack, for the caller to complete with server time and position.
    pub fn pack(codec: Codec, system_id: SystemId, timeline: TimelineId, number: u32) -> Header {
        let range = LsnRange::new(Lsn(u64::from(number)), Lsn(u64::from(number) + 1));
        Header::wal(Kind::Pack, codec, system_id, timeline, range)
    }

    /// The WAL bytes held; meaningful for segments and tail chunks.
    pub fn range(&self) -> LsnRange {
        LsnRange::new(Lsn(self.start), Lsn(self.end))
    }

    /// The bytes of the header.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let commit = |time: Option<Time>| time.map_or(NO_COMMIT, Time::unix_micros).to_le_bytes();
        let mut bytes = [0; Self::LEN];
        let mut put = |at: usize, field: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + field.len()) {
                place.copy_from_slice(field);
            }
        };
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(10, &[self.kind as u8, self.codec.id(), self.cipher as u8]);
        put(16, &self.frame_size.to_le_bytes());
        put(20, &self.timeline.get().to_le_bytes());
        put(24, &self.system_id.0.to_le_bytes());
        put(32, &self.start.to_le_bytes());
        put(40, &self.end.to_le_bytes());
        put(48, &self.plain_len.to_le_bytes());
        put(56, &commit(self.first_commit));
        put(64, &commit(self.last_commit));
        put(72, &self.sealed_at.unix_micros().to_le_bytes());
        put(80, &self.server_end.0.to_le_bytes());
        put(88, &self.key_id);
        let crc = crc32fast::hash(&bytes[..Self::CRC_AT]);
        bytes[Self::CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header from the beginning of `bytes`, which may go on after it.
    ///
    /// Damage is told from novelty: only a header whose checksum is right is called too new.
    pub fn decode(bytes: &[u8]) -> Result<Header, FormatError> {
        let Some(bytes) = bytes.first_chunk::<{ Self::LEN }>() else {
            let (found, expected) = (bytes.len() as u64, Self::LEN as u64);
            return Err(FormatError::Length {
                what: "the header",
                found,
                expected,
            });
        };
        check_frame(bytes)?;
        let header = Header {
            kind: Kind::from_id(bytes[10])?,
            codec: Codec::from_id(bytes[11])?,
            cipher: Cipher::from_id(bytes[12])?,
            key_id: field(bytes, 88),
            frame_size: u32::from_le_bytes(field(bytes, 16)),
            timeline: TimelineId::new(u32::from_le_bytes(field(bytes, 20)))
                .ok_or_else(|| damaged("it names timeline 0"))?,
            system_id: SystemId(u64::from_le_bytes(field(bytes, 24))),
            start: u64::from_le_bytes(field(bytes, 32)),
            end: u64::from_le_bytes(field(bytes, 40)),
            plain_len: u64::from_le_bytes(field(bytes, 48)),
            first_commit: optional_time(i64::from_le_bytes(field(bytes, 56)))?,
            last_commit: optional_time(i64::from_le_bytes(field(bytes, 64)))?,
            sealed_at: time(i64::from_le_bytes(field(bytes, 72)))?,
            server_end: Lsn(u64::from_le_bytes(field(bytes, 80))),
        };
        header.check().map_err(|problem| FormatError::Damaged {
            what: "the header",
            problem,
        })?;
        if header.cipher == Cipher::None && bytes[88..124].iter().any(|byte| *byte != 0) {
            return Err(damaged(
                "key id, nonce or reserved bytes are set without a cipher",
            ));
        }
        Ok(header)
    }

    /// The rules between fields, for writer and reader alike.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.frame_size == 0 || self.frame_size > FRAME_SIZE {
            return Err(format!(
                "frame size {} is not in 1 to {FRAME_SIZE}",
                self.frame_size
            ));
        }
        if self.first_commit.is_some() != self.last_commit.is_some() {
            return Err("it has only one of first and last commit time".to_owned());
        }
        if self.end <= self.start {
            return Err(format!(
                "its end {} is not after its start {}",
                self.end, self.start
            ));
        }
        let len = self.end - self.start;
        match self.kind {
            Kind::Pack if len != 1 || u32::try_from(self.start).is_err() => {
                Err(format!("{} to {} is not one pack's number", self.start, self.end))
            }
            Kind::Pack if self.plain_len > MAX_OBJECT_PLAIN => Err(format!(
                "a pack of {} bytes is longer than {MAX_OBJECT_PLAIN}",
                self.plain_len
            )),
            Kind::Segment | Kind::Tail if len != self.plain_len => Err(format!(
                "{} holds {len} bytes, but its plain length is {}",
                self.range(),
                self.plain_len
            )),
            Kind::Segment | Kind::Tail if len > MAX_OBJECT_PLAIN => Err(format!(
                "{} is longer than {MAX_OBJECT_PLAIN} bytes",
                self.range()
            )),
            Kind::Segment if SegmentSize::new(len).is_err() || !self.start.is_multiple_of(len) => {
                Err(format!("{} is not one whole segment", self.range()))
            }
            _ => Ok(()),
        }
    }
}

/// Magic, checksum, version, reserved bytes: what comes before any field may be believed.
fn check_frame(bytes: &[u8; Header::LEN]) -> Result<(), FormatError> {
    if !bytes.starts_with(&MAGIC) {
        return Err(FormatError::Magic { what: "the header" });
    }
    let stored = u32::from_le_bytes(field(bytes, Header::CRC_AT));
    let computed = crc32fast::hash(&bytes[..Header::CRC_AT]);
    if stored != computed {
        return Err(FormatError::Checksum {
            what: "the header".to_owned(),
            stored,
            computed,
        });
    }
    let version = u16::from_le_bytes(field(bytes, 8));
    if version > VERSION {
        let (found, known) = (u32::from(version), u32::from(VERSION));
        return Err(FormatError::NewerVersion {
            what: "the container".to_owned(),
            found,
            known,
        });
    }
    if version == 0 || bytes[13..16] != [0; 3] || bytes[116..124] != [0; 8] {
        return Err(damaged("reserved bytes are set, or the version is 0"));
    }
    Ok(())
}

fn field<const N: usize>(bytes: &[u8; Header::LEN], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn optional_time(micros: i64) -> Result<Option<Time>, FormatError> {
    if micros == NO_COMMIT {
        Ok(None)
    } else {
        time(micros).map(Some)
    }
}

fn time(micros: i64) -> Result<Time, FormatError> {
    let time = Time::from_unix_micros(micros);
    if time.unix_micros() == micros {
        Ok(time)
    } else {
        Err(damaged("a time is out of range"))
    }
}

fn damaged(problem: &str) -> FormatError {
    FormatError::Damaged {
        what: "the header",
        problem: problem.to_owned(),
    }
}
