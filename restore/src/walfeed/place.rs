//! Verified bytes into the file that PostgreSQL will read.
//!
//! Owns: writing a segment from its pieces. A file appears under the asked name only when it is whole (temporary name,
//! then rename); PostgreSQL syncs it before it relies on it. Memory: one stored object and one frame.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use highwater_format::container::{Expect, FRAME_SIZE, Object};
use highwater_format::coverage::{Piece, PieceKind};
use highwater_format::layout::Layout;
use highwater_format::lsn::{Lsn, LsnRange, SegmentSize};
use highwater_format::timeline::TimelineId;
use highwater_format::walname::SegmentName;

use crate::fetch::source::{Nowhere, ReadError, Reject, Sources};

/// What the name of a file ends with until it is whole.
pub(super) const TEMPORARY: &str = ".highwater";

/// What a segment is written from and how far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) sources: &'a Sources,
    pub(crate) layout: &'a Layout,
    pub(crate) segment: LsnRange,
    pub(crate) size: SegmentSize,
    /// Zeros from here on.
    pub(crate) until: Lsn,
}

/// An object and the part of a segment that it can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Offer {
    /// The timeline under whose keys the object lies.
    pub(crate) timeline: TimelineId,
    /// The object.
    pub(crate) piece: Piece,
    /// What is taken from it.
    pub(crate) used: LsnRange,
}

impl Offer {
    /// As the coverage sees it.
    pub(crate) fn as_piece(&self) -> Piece {
        Piece {
            range: self.used,
            ..self.piece
        }
    }

    /// The same object, whatever is taken from it and whatever size a region lists.
    pub(crate) fn is_same_object(&self, other: &Self) -> bool {
        (self.timeline, self.piece.kind, self.piece.range)
            == (other.timeline, other.piece.kind, other.piece.range)
    }
}

/// Why a segment could not be written.
#[derive(Debug)]
pub(crate) enum PlaceError {
    /// No region has a good copy of this object.
    Offer(Box<Offer>, Nowhere),
    /// The file system refuses.
    Local(String),
}

/// Writes the segment to `path`.
pub(crate) async fn segment(work: &Work<'_>, offers: &[Offer], path: &Path) -> Result<(), PlaceError> {
    let local = |error: io::Error| PlaceError::Local(format!("cannot write {}: {error}", path.display()));
    let temporary = Temporary::beside(path);
    let file = Arc::new(temporary.create().map_err(local)?);
    file.set_len(work.segment.len()).map_err(local)?;
    for offer in offers {
        read_offer(work, offer, &file, path).await?;
    }
    temporary.keep_as(path).map_err(local)
}

async fn read_offer(work: &Work<'_>, offer: &Offer, file: &Arc<File>, path: &Path) -> Result<(), PlaceError> {
    let system = work.layout.system_id();
    let (timeline, piece) = (offer.timeline, offer.piece);
    let (key, expect) = match piece.kind {
        PieceKind::Segment => {
            let name = SegmentName::of(timeline, piece.range.start, work.size);
            (
                work.layout.segment(name, work.size),
                Expect::segment(system, name, work.size),
            )
        }
        PieceKind::Tail => {
            let expect = Expect::tail(system, timeline, piece.range);
            (work.layout.tail(timeline, piece.range), expect)
        }
    };
    let wanted = LsnRange::new(offer.used.start, offer.used.end.min(work.until));
    let segment = work.segment;
    let read = work.sources.read(&key, |bytes| {
        let (file, expect) = (file.clone(), expect.clone());
        let written =
            tokio::task::spawn_blocking(move || write_piece(bytes, &expect, wanted, segment, &file));
        async {
            written
                .await
                .map_err(|error| Reject::Fatal(io::Error::other(error)))?
        }
    });
    match read.await {
        Ok(_) => Ok(()),
        Err(ReadError::Nowhere(nowhere)) => Err(PlaceError::Offer(Box::new(*offer), nowhere)),
        Err(ReadError::Fatal(error)) => Err(PlaceError::Local(format!(
            "cannot write {}: {error}",
            path.display()
        ))),
    }
}

/// Decodes an object and writes the part of it that lies in `wanted`.
fn write_piece(
    bytes: Bytes,
    expect: &Expect,
    wanted: LsnRange,
    segment: LsnRange,
    file: &File,
) -> Result<(), Reject<io::Error>> {
    let object = Object::open(bytes).map_err(|error| Reject::Copy(error.to_string()))?;
    object
        .expect(expect)
        .map_err(|error| Reject::Copy(error.to_string()))?;
    let mut plain = Vec::with_capacity(FRAME_SIZE as usize);
    for frame in object.frames() {
        let start = Lsn(expect.start).saturating_add(frame.plain_offset);
        let range = LsnRange::new(start, start.saturating_add(u64::from(frame.plain_len)));
        let Some(part) = range.intersect(wanted).filter(|part| !part.is_empty()) else {
            continue;
        };
        plain.clear();
        frame
            .decode_into(&mut plain)
            .map_err(|error| Reject::Copy(error.to_string()))?;
        let index = |lsn: Lsn| usize::try_from(lsn.distance_from(start)).unwrap_or(usize::MAX);
        let part_bytes = plain.get(index(part.start)..index(part.end)).unwrap_or_default();
        file.write_all_at(part_bytes, part.start.distance_from(segment.start))
            .map_err(Reject::Fatal)?;
    }
    Ok(())
}

/// Writes a small file whole.
pub(crate) fn whole_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = Temporary::beside(path);
    io::Write::write_all(&mut temporary.create()?, content)?;
    temporary.keep_as(path)
}

/// Copies a file, for where it cannot be renamed.
pub(super) fn copied(from: &Path, to: &Path) -> io::Result<()> {
    let temporary = Temporary::beside(to);
    io::copy(&mut File::open(from)?, &mut temporary.create()?)?;
    temporary.keep_as(to)
}

/// A file under another name, removed unless it is kept.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    /// The name is fixed, so that what a killed call left is overwritten by the next.
    fn beside(path: &Path) -> Self {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(TEMPORARY);
        Self {
            path: path.with_file_name(name),
        }
    }

    fn create(&self) -> io::Result<File> {
        let _ = fs::remove_file(&self.path);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path)
    }

    fn keep_as(self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing under this name.
        let _ = fs::remove_file(&self.path);
    }
}
