//! From a verified pack to bytes in files.
//!
//! Owns: decoding frame by frame and writing each slice to its place. Blocking; runs on a blocking thread. Memory: one
//! frame. Writing a pack twice (from two regions, the first of which turned out bad) ends with the same bytes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use highwater_format::container::{FRAME_SIZE, Object};
use nix::fcntl::OFlag;

use super::FetchError;
use super::checksums::Part;
use super::source::Reject;
use super::spread::Slice;
use crate::datadir::FileToWrite;
use crate::datadir::tree::Access;

/// Writes the slices of one pack.
///
/// # Errors
/// A frame is damaged (another copy may help), or the file system refuses.
pub(crate) fn unpack(
    object: &Object,
    slices: &[Slice],
    files: &[FileToWrite],
    access: &Access,
) -> Result<Vec<Part>, Reject<FetchError>> {
    let mut writer = Writer {
        files,
        access,
        open: None,
        parts: Vec::with_capacity(slices.len()),
    };
    let mut plain = Vec::with_capacity(FRAME_SIZE as usize);
    let mut remaining = slices;
    for frame in object.frames() {
        plain.clear();
        frame
            .decode_into(&mut plain)
            .map_err(|error| Reject::Copy(error.to_string()))?;
        let start = frame.plain_offset;
        let end = start + plain.len() as u64;
        while let Some(slice) = remaining.first().filter(|slice| slice.offset < end) {
            let from = slice.offset.max(start);
            let to = (slice.offset + slice.len).min(end);
            let bytes = range(&plain, from - start, to - start);
            writer
                .write(slice, from - slice.offset, bytes)
                .map_err(Reject::Fatal)?;
            if to < slice.offset + slice.len {
                break;
            }
            remaining = remaining.get(1..).unwrap_or_default();
        }
    }
    match remaining.first() {
        // The pack's length was compared with the manifest, so this cannot happen unless both are wrong.
        Some(slice) => Err(Reject::Copy(format!(
            "it ends before byte {}",
            slice.offset + slice.len
        ))),
        None => Ok(writer.parts),
    }
}

fn range(plain: &[u8], from: u64, to: u64) -> &[u8] {
    let index = |at| usize::try_from(at).unwrap_or(usize::MAX);
    plain.get(index(from)..index(to)).unwrap_or_default()
}

struct Writer<'a> {
    files: &'a [FileToWrite],
    access: &'a Access,
    open: Option<(usize, File)>,
    parts: Vec<Part>,
}

impl Writer<'_> {
    fn write(&mut self, slice: &Slice, done: u64, bytes: &[u8]) -> Result<(), FetchError> {
        let Some(target) = self.files.get(slice.file) else {
            return Ok(());
        };
        let io = |source| FetchError::Write {
            path: target.path.clone(),
            source,
        };
        let file = match self.open.take() {
            Some((index, file)) if index == slice.file => file,
            _ => self.open(target, slice.at == 0 && done == 0).map_err(io)?,
        };
        file.write_all_at(bytes, slice.at + done).map_err(io)?;
        self.open = Some((slice.file, file));
        if done == 0 {
            self.parts.push(Part {
                file: slice.file,
                at: slice.at,
                len: 0,
                crc32c: 0,
            });
        }
        if let Some(part) = self.parts.last_mut() {
            part.crc32c = crc32c::crc32c_append(part.crc32c, bytes);
            part.len += bytes.len() as u64;
        }
        Ok(())
    }

    /// Files are created by whoever comes first; mode, owner and length are set by the writer of the first byte (packs are
    /// written side by side, so nothing is cut off that another one wrote, and nothing is left behind the end). Every
    /// directory above was made by this restore; a link in the file's place is refused all the same.
    fn open(&self, target: &FileToWrite, first: bool) -> std::io::Result<File> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(&target.path)?;
        if first {
            file.set_len(target.size)?;
            self.access.apply(&file, target.mode)?;
        }
        Ok(file)
    }
}
