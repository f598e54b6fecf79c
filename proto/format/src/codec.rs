//! How the bytes of a frame are compressed, and under which number a header says so.
//!
//! Owns: codec ids and the two libraries behind them. Does not own: frames (see [`crate::container`]).

use std::fmt;
use std::str::FromStr;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use crate::error::{FormatError, ParseError};
use crate::text::serde_as_text;

/// Level 1: on WAL a third smaller than lz4 at about its speed; higher levels cost far more than they save.
const ZSTD_LEVEL: i32 = 1;

/// The compression of an object's frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Codec {
    /// As is.
    None = 0,
    /// LZ4 block format without a size prefix. The default for WAL.
    Lz4 = 1,
    /// One zstd frame (RFC 8878), written at level 1. The default for base backups.
    Zstd = 2,
}

impl Codec {
    /// Every codec, in the order of their ids.
    pub const ALL: [Codec; 3] = [Codec::None, Codec::Lz4, Codec::Zstd];

    /// The number in the header.
    pub fn id(self) -> u8 {
        self as u8
    }

    /// The codec with this number.
    pub fn from_id(id: u8) -> Result<Codec, FormatError> {
        Codec::ALL
            .into_iter()
            .find(|codec| codec.id() == id)
            .ok_or(FormatError::UnknownCodec(id))
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Codec::None => "none",
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
        })
    }
}

impl FromStr for Codec {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Codec, ParseError> {
        Codec::ALL
            .into_iter()
            .find(|codec| codec.to_string() == text)
            .ok_or_else(|| ParseError::new("a compression", text, "none, lz4 or zstd"))
    }
}

serde_as_text!(Codec);

/// A compressor that keeps its tables from one frame to the next.
pub(crate) enum Compressor {
    None,
    Lz4(CompressTable),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    pub(crate) fn new(codec: Codec) -> Result<Compressor, FormatError> {
        Ok(match codec {
            Codec::None => Compressor::None,
            Codec::Lz4 => Compressor::Lz4(CompressTable::large()),
            Codec::Zstd => Compressor::Zstd(
                zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(|error| failed(Codec::Zstd, &error))?,
            ),
        })
    }

    /// The most bytes that [`Compressor::compress`] may need for `len` plain bytes.
    pub(crate) fn bound(&self, len: usize) -> usize {
        match self {
            Compressor::None => 0,
            Compressor::Lz4(_) => get_maximum_output_size(len),
            Compressor::Zstd(_) => zstd::zstd_safe::compress_bound(len),
        }
    }

    /// Compresses `plain` into the beginning of `out`; `None` where there is nothing to do or no gain.
    pub(crate) fn compress(&mut self, plain: &[u8], out: &mut [u8]) -> Result<Option<usize>, FormatError> {
        let len = match self {
            Compressor::None => return Ok(None),
            Compressor::Lz4(table) => {
                compress_into_with_table(plain, out, table).map_err(|error| failed(Codec::Lz4, &error))?
            }
            Compressor::Zstd(context) => context
                .compress_to_buffer(plain, out)
                .map_err(|error| failed(Codec::Zstd, &error))?,
        };
        Ok((len < plain.len()).then_some(len))
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compressor::None => "Compressor::None",
            Compressor::Lz4(_) => "Compressor::Lz4",
            Compressor::Zstd(_) => "Compressor::Zstd",
        })
    }
}

/// Fills `out` exactly from a compressed payload; the problem as text where it does not fit.
pub(crate) fn decompress(codec: Codec, payload: &[u8], out: &mut [u8]) -> Result<(), String> {
    let len = match codec {
        Codec::None => return Err("the frame is marked compressed, the object is not".to_owned()),
        Codec::Lz4 => decompress_into(payload, out).map_err(|error| error.to_string())?,
        Codec::Zstd => zstd::bulk::decompress_to_buffer(payload, out).map_err(|error| error.to_string())?,
    };
    if len == out.len() {
        Ok(())
    } else {
        Err(format!("it holds {len} bytes, not {}", out.len()))
    }
}

fn failed(codec: Codec, error: &dyn fmt::Display) -> FormatError {
    FormatError::Compress {
        codec,
        problem: error.to_string(),
    }
}
