//! One independently compressed run of at most 1 MiB.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | stored length of the payload, u32; bit 31 set: the payload is not compressed |
//! | 4 | 4 | plain length, u32 |
//! | 8 | 4 | CRC-32 of the plain bytes |
//! | 12 | | payload |
//!
//! A payload that would not shrink is stored as it is, so a frame never costs more than its 12 bytes.

use bytes::Bytes;

use crate::codec::{Codec, Compressor, decompress};
use crate::container::u32_at;
use crate::error::FormatError;

/// The most plain bytes in one frame: 1 MiB. Loses under 1 % against one stream and bounds what a reader holds.
pub const FRAME_SIZE: u32 = 1 << 20;

pub(super) const FRAME_HEADER: usize = 12;
const RAW: u32 = 1 << 31;

/// An encoded frame: header and payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The bytes as they are stored.
    pub bytes: Bytes,
    /// How many bytes they decode to.
    pub plain_len: u32,
}

/// Encodes frames one after the other; its tables and its scratch buffer are kept between them.
#[derive(Debug)]
pub struct FrameEncoder {
    codec: Codec,
    /// Made at the first frame, so that an encoder that is never used costs nothing.
    compressor: Option<Compressor>,
    scratch: Vec<u8>,
}

impl FrameEncoder {
    /// An encoder for one codec.
    pub fn new(codec: Codec) -> FrameEncoder {
        FrameEncoder {
            codec,
            compressor: None,
            scratch: Vec::new(),
        }
    }

    /// The codec to name in the header of an object made of these frames.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Encodes 1 to [`FRAME_SIZE`] bytes.
    pub fn encode(&mut self, plain: &[u8]) -> Result<Frame, FormatError> {
        let plain_len = u32::try_from(plain.len())
            .ok()
            .filter(|len| (1..=FRAME_SIZE).contains(len));
        let Some(plain_len) = plain_len else {
            let problem = format!("{} bytes are not 1 to {FRAME_SIZE}", plain.len());
            return Err(FormatError::Invalid {
                what: "a frame",
                problem,
            });
        };
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            empty => empty.insert(Compressor::new(self.codec)?),
        };
        let need = compressor.bound(plain.len());
        if self.scratch.len() < need {
            self.scratch.resize(need, 0);
        }
        let compressed = compressor.compress(plain, &mut self.scratch)?;
        let (payload, flag) = match compressed.and_then(|len| self.scratch.get(..len)) {
            Some(payload) => (payload, 0),
            None => (plain, RAW),
        };
        // Not longer than plain, so it fits the 31 bits.
        let stored_len = u32::try_from(payload.len()).unwrap_or(plain_len);
        let mut bytes = Vec::with_capacity(FRAME_HEADER + payload.len());
        bytes.extend_from_slice(&(stored_len | flag).to_le_bytes());
        bytes.extend_from_slice(&plain_len.to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(plain).to_le_bytes());
        bytes.extend_from_slice(payload);
        Ok(Frame {
            bytes: bytes.into(),
            plain_len,
        })
    }
}

/// A frame of an opened object. Its plain bytes are reached only through their checksum.
#[derive(Debug, Clone)]
pub struct FrameRef {
    /// Where the frame's plain bytes begin within the object's.
    pub plain_offset: u64,
    /// How many plain bytes it holds.
    pub plain_len: u32,
    codec: Codec,
    raw: bool,
    crc32: u32,
    payload: Bytes,
}

impl FrameRef {
    /// Reads the header of a whole frame; the payload is looked at only by [`FrameRef::decode_into`].
    pub(super) fn parse(bytes: &Bytes, codec: Codec, plain_offset: u64) -> Result<FrameRef, FormatError> {
        let damaged = |problem: String| FormatError::Damaged {
            what: "a frame",
            problem,
        };
        let short = || damaged(format!("{} bytes cannot hold its header", bytes.len()));
        let stored = u32_at(bytes, 0).ok_or_else(short)?;
        let plain_len = u32_at(bytes, 4).ok_or_else(short)?;
        let crc32 = u32_at(bytes, 8).ok_or_else(short)?;
        let payload = bytes.slice(FRAME_HEADER..);
        let (raw, stored_len) = (stored & RAW != 0, stored & !RAW);
        if payload.len() as u64 != u64::from(stored_len) {
            return Err(damaged(format!(
                "{} payload bytes where it says {stored_len}",
                payload.len()
            )));
        }
        if plain_len == 0 || plain_len > FRAME_SIZE || (raw && plain_len != stored_len) {
            return Err(damaged(format!(
                "plain length {plain_len} with stored length {stored_len}"
            )));
        }
        Ok(FrameRef {
            plain_offset,
            plain_len,
            codec,
            raw,
            crc32,
            payload,
        })
    }

    /// Appends the plain bytes, after checking them; on an error `out` is as it was.
    pub fn decode_into(&self, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let before = out.len();
        let result = self.decode_at_end(out, before);
        if result.is_err() {
            out.truncate(before);
        }
        result
    }

    fn decode_at_end(&self, out: &mut Vec<u8>, before: usize) -> Result<(), FormatError> {
        if self.raw {
            out.extend_from_slice(&self.payload);
        } else {
            out.resize(before + self.plain_len as usize, 0);
            let place = out.get_mut(before..).unwrap_or_default();
            decompress(self.codec, &self.payload, place).map_err(|problem| FormatError::Damaged {
                what: "a frame",
                problem,
            })?;
        }
        let computed = crc32fast::hash(out.get(before..).unwrap_or_default());
        if computed != self.crc32 {
            let what = format!("the frame at plain offset {}", self.plain_offset);
            return Err(FormatError::Checksum {
                what,
                stored: self.crc32,
                computed,
            });
        }
        Ok(())
    }
}
