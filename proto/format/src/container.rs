//! The container that holds all bulk bytes: whole segments, tail chunks, packs.
//!
//! Owns: the byte layout (`FORMAT.md`, chapter "Container"), sealing and verified opening. Does not own:
//! keys, and whether an object should exist. Bytes are reached only through [`Object`], which has checked
//! the whole object, and [`FrameRef`], which checks each frame's plain bytes.
//!
//! ```text
//! header 128 | frame ... frame | frame table 4 x n | footer 24
//! ```

mod frame;
mod header;
mod object;

pub use frame::{FRAME_SIZE, Frame, FrameEncoder, FrameRef};
pub use header::{Cipher, Header, Kind, MAX_OBJECT_PLAIN, VERSION};
pub use object::{Expect, FOOTER_LEN, Object, Sealed, seal};

/// Reads a little-endian field; `None` past the end.
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|field| u32::from_le_bytes(*field))
}

/// Reads a little-endian field; `None` past the end.
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|field| u64::from_le_bytes(*field))
}
