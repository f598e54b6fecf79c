//! A whole object: sealing it, and opening it with every byte checked.
//!
//! After the frames comes the frame table, one u32 per frame: its length with its header. Then the footer:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | frame count, u32 |
//! | 4 | 4 | zero |
//! | 8 | 8 | length of all frames together, u64 |
//! | 16 | 4 | magic `HWE1` |
//! | 20 | 4 | CRC-32 of every byte of the object before this field |

use bytes::Bytes;

use crate::backup_id::BackupId;
use crate::container::frame::{FRAME_HEADER, Frame, FrameRef};
use crate::container::header::{Cipher, Header, Kind};
use crate::container::{u32_at, u64_at};
use crate::error::FormatError;
use crate::lsn::{LsnRange, SegmentSize, SystemId};
use crate::timeline::TimelineId;
use crate::walname::SegmentName;

/// Bytes of the footer.
pub const FOOTER_LEN: usize = 24;

const FOOTER_MAGIC: &[u8; 4] = b"HWE1";
const TABLE_ENTRY: usize = 4;

/// A finished object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Its header, as encoded in the bytes.
    pub header: Header,
    /// All of its bytes.
    pub bytes: Bytes,
    /// CRC-32 of all of its bytes, for the store to check.
    pub crc32: u32,
}

/// Joins frames into an object. Fills in `header.plain_len`; a length that is already there must be right.
///
/// Refuses what the format cannot hold: WAL frames that do not add up to the header's range, an empty object.
pub fn seal(header: Header, frames: &[Frame]) -> Result<Sealed, FormatError> {
    let header = complete(header, frames)?;
    let frames_len: usize = frames.iter().map(|frame| frame.bytes.len()).sum();
    let table_len = frames.len() * TABLE_ENTRY;
    let mut bytes = Vec::with_capacity(Header::LEN + frames_len + table_len + FOOTER_LEN);
    bytes.extend_from_slice(&header.encode());
    for frame in frames {
        bytes.extend_from_slice(&frame.bytes);
    }
    for frame in frames {
        bytes.extend_from_slice(&u32_of(frame.bytes.len())?.to_le_bytes());
    }
    bytes.extend_from_slice(&u32_of(frames.len())?.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&(frames_len as u64).to_le_bytes());
    bytes.extend_from_slice(FOOTER_MAGIC);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes);
    let trailer = crc.clone().finalize().to_le_bytes();
    crc.update(&trailer);
    bytes.extend_from_slice(&trailer);
    Ok(Sealed {
        header,
        bytes: bytes.into(),
        crc32: crc.finalize(),
    })
}

fn complete(mut header: Header, frames: &[Frame]) -> Result<Header, FormatError> {
    let invalid = |problem: String| FormatError::Invalid {
        what: "an object",
        problem,
    };
    if header.cipher != Cipher::None {
        return Err(FormatError::Encrypted(header.cipher));
    }
    let plain_len: u64 = frames.iter().map(|frame| u64::from(frame.plain_len)).sum();
    if header.plain_len != 0 && header.plain_len != plain_len {
        return Err(invalid(format!(
            "its frames hold {plain_len} bytes, its header says {}",
            header.plain_len
        )));
    }
    if plain_len == 0 || frames.iter().any(|frame| frame.plain_len > header.frame_size) {
        return Err(invalid(
            "it is empty, or a frame is larger than its frame size".to_owned(),
        ));
    }
    header.plain_len = plain_len;
    header.check().map_err(invalid)?;
    Ok(header)
}

fn u32_of(len: usize) -> Result<u32, FormatError> {
    u32::try_from(len).map_err(|_| FormatError::Invalid {
        what: "an object",
        problem: format!("{len} does not fit its 32-bit field"),
    })
}

/// What the reader expects an object to be, from the key it was read under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expect {
    /// Segment, tail chunk or pack.
    pub kind: Kind,
    /// The lineage.
    pub system_id: SystemId,
    /// The timeline.
    pub timeline: TimelineId,
    /// The first LSN, or the pack's number.
    pub start: u64,
    /// The LSN after the last byte, or the pack's number + 1.
    pub end: u64,
}

impl Expect {
    /// The segment `name`.
    pub fn segment(system_id: SystemId, name: SegmentName, size: SegmentSize) -> Expect {
        let range = name.range(size);
        Expect {
            kind: Kind::Segment,
            system_id,
            timeline: name.timeline,
            start: range.start.0,
            end: range.end.0,
        }
    }

    /// The tail chunk of `range`.
    pub fn tail(system_id: SystemId, timeline: TimelineId, range: LsnRange) -> Expect {
        Expect {
            kind: Kind::Tail,
            system_id,
            timeline,
            start: range.start.0,
            end: range.end.0,
        }
    }

    /// A pack of the backup `id`.
    pub fn pack(system_id: SystemId, id: &BackupId, number: u32) -> Expect {
        let start = u64::from(number);
        Expect {
            kind: Kind::Pack,
            system_id,
            timeline: id.timeline(),
            start,
            end: start + 1,
        }
    }

    /// Compares a header, whole object or not, with what is expected.
    pub fn check(&self, header: &Header) -> Result<(), FormatError> {
        if header.kind != self.kind {
            return Err(FormatError::mismatch("kind", header.kind, self.kind));
        }
        if header.system_id != self.system_id {
            return Err(FormatError::mismatch(
                "system identifier",
                header.system_id,
                self.system_id,
            ));
        }
        if header.timeline != self.timeline {
            return Err(FormatError::mismatch("timeline", header.timeline, self.timeline));
        }
        if (header.start, header.end) != (self.start, self.end) {
            let found = describe(self.kind, header.start, header.end);
            return Err(FormatError::mismatch(
                "range",
                found,
                describe(self.kind, self.start, self.end),
            ));
        }
        Ok(())
    }
}

fn describe(kind: Kind, start: u64, end: u64) -> String {
    match kind {
        Kind::Pack => format!("pack {start}"),
        Kind::Segment | Kind::Tail => LsnRange::new(crate::Lsn(start), crate::Lsn(end)).to_string(),
    }
}

/// An object whose every stored byte has been checked.
#[derive(Debug, Clone)]
pub struct Object {
    bytes: Bytes,
    header: Header,
    frames: Vec<FrameRef>,
}

impl Object {
    /// Checks header, trailer and the checksum of all bytes, and finds the frames.
    pub fn open(bytes: Bytes) -> Result<Object, FormatError> {
        let header = Header::decode(&bytes)?;
        let footer = Footer::read(&bytes)?;
        if header.cipher != Cipher::None {
            return Err(FormatError::Encrypted(header.cipher));
        }
        let frames = footer.frames(&bytes, &header)?;
        Ok(Object {
            bytes,
            header,
            frames,
        })
    }

    /// The bytes as stored, for another region to get the very same object.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// What the object says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The frames, in order.
    pub fn frames(&self) -> impl ExactSizeIterator<Item = &FrameRef> {
        self.frames.iter()
    }

    /// Checks that this is the object that was asked for.
    pub fn expect(&self, expect: &Expect) -> Result<(), FormatError> {
        expect.check(&self.header)
    }

    /// All plain bytes.
    pub fn plain(&self) -> Result<Vec<u8>, FormatError> {
        // The header was checked: no object holds more than `MAX_OBJECT_PLAIN`, whatever it says.
        let mut out = Vec::with_capacity(usize::try_from(self.header.plain_len).unwrap_or(0));
        for frame in &self.frames {
            frame.decode_into(&mut out)?;
        }
        Ok(out)
    }
}

struct Footer {
    count: usize,
    table_at: usize,
}

impl Footer {
    /// Reads the footer of a whole object and checks the checksum over all of it.
    fn read(bytes: &Bytes) -> Result<Footer, FormatError> {
        let damaged = |problem: &str| FormatError::Damaged {
            what: "the trailer",
            problem: problem.to_owned(),
        };
        let least = Header::LEN + FOOTER_LEN;
        let footer_at = bytes
            .len()
            .checked_sub(FOOTER_LEN)
            .filter(|at| *at >= Header::LEN);
        let (Some(footer_at), Some(crc_at)) = (footer_at, bytes.len().checked_sub(4)) else {
            let (found, expected) = (bytes.len() as u64, least as u64);
            return Err(FormatError::Length {
                what: "the object",
                found,
                expected,
            });
        };
        if bytes.get(footer_at + 16..footer_at + 20) != Some(FOOTER_MAGIC.as_slice()) {
            return Err(FormatError::Magic { what: "the trailer" });
        }
        let computed = crc32fast::hash(bytes.get(..crc_at).unwrap_or_default());
        let stored = u32_at(bytes, crc_at).unwrap_or(!computed);
        if stored != computed {
            return Err(FormatError::Checksum {
                what: "the object".to_owned(),
                stored,
                computed,
            });
        }
        let count = u32_at(bytes, footer_at).unwrap_or(0) as usize;
        let zero = u32_at(bytes, footer_at + 4);
        let frames_len = u64_at(bytes, footer_at + 8).unwrap_or(0);
        let table_at = count
            .checked_mul(TABLE_ENTRY)
            .and_then(|table| footer_at.checked_sub(table));
        match table_at.filter(|at| at.checked_sub(Header::LEN).map(|len| len as u64) == Some(frames_len)) {
            Some(table_at) if zero == Some(0) => Ok(Footer { count, table_at }),
            _ => Err(damaged(
                "frame count, frame lengths and object length do not agree",
            )),
        }
    }

    fn frames(&self, bytes: &Bytes, header: &Header) -> Result<Vec<FrameRef>, FormatError> {
        let damaged = |problem: String| FormatError::Damaged {
            what: "the frame table",
            problem,
        };
        let mut frames = Vec::with_capacity(self.count);
        let (mut at, mut plain_offset) = (Header::LEN, 0_u64);
        for index in 0..self.count {
            let len = u32_at(bytes, self.table_at + index * TABLE_ENTRY).unwrap_or(0) as usize;
            let end = at
                .checked_add(len)
                .filter(|end| len >= FRAME_HEADER && *end <= self.table_at);
            let Some(end) = end else {
                return Err(damaged(format!("frame {index} with {len} bytes does not fit")));
            };
            let frame = FrameRef::parse(&bytes.slice(at..end), header.codec, plain_offset)?;
            if frame.plain_len > header.frame_size {
                return Err(damaged(format!(
                    "frame {index} is larger than the object's frame size"
                )));
            }
            plain_offset += u64::from(frame.plain_len);
            at = end;
            frames.push(frame);
        }
        if at != self.table_at || plain_offset != header.plain_len || self.count == 0 {
            let problem = format!(
                "its {} frames hold {plain_offset} of {} bytes",
                self.count, header.plain_len
            );
            return Err(damaged(problem));
        }
        Ok(frames)
    }
}
