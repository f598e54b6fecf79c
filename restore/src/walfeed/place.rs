//! Verified bytes into the file that PostgreSQL will read.
//!
//! Owns: writing a segment from its pieces. A file appears under the asked name only when it is whole (temporary name,
//! then rename); PostgreSQL syncs it before it relies on it. Memory: one stored object and one frame.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use highwater_format::container::{Expect, FRAME_SIZE, Object};
use highwater_format::coverage::{Piece, PieceKind};
use highwater_format::layout::Layout;
use highwater_format::lsn::{Lsn, LsnRange, SegmentSize};
use highwater_format::timeline::TimelineId;
use highwater_format::walname::SegmentName;

use super::CANNOT_WRITE;
use crate::fetch::source::{Nowhere, ReadError, Reject, Sources};

/// What follows the name of a file until it is whole; then come the process and a number.
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
    let local = |error: io::Error| PlaceError::Local(format!("{CANNOT_WRITE} {}: {error}", path.display()));
    let temporary = Temporary::beside(path).map_err(local)?;
    let file = temporary.file.clone();
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
            "{CANNOT_WRITE} {}: {error}",
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
    let temporary = Temporary::beside(path)?;
    io::Write::write_all(&mut &*temporary.file, content)?;
    temporary.keep_as(path)
}

/// Copies a file, for where it cannot be renamed.
pub(super) fn copied(from: &Path, to: &Path) -> io::Result<()> {
    let temporary = Temporary::beside(to)?;
    io::copy(&mut File::open(from)?, &mut &*temporary.file)?;
    temporary.keep_as(to)
}

/// A file under a name of its own, removed unless it is kept.
///
/// The `wal-fetch` of a killed server may still run when the new server's asks for the same path, and each of them must
/// give what it wrote itself: so no two share a name, and none touches the file of another that lives. The lock on it,
/// which ends with the process, tells what a dead one left.
struct Temporary {
    path: PathBuf,
    file: Arc<File>,
    kept: bool,
}

impl Temporary {
    fn beside(path: &Path) -> io::Result<Self> {
        let mut prefix = path.file_name().unwrap_or_default().to_owned();
        prefix.push(TEMPORARY);
        remove_abandoned(path, &prefix);
        loop {
            let mut name = prefix.clone();
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            name.push(format!("-{}-{number}", std::process::id()));
            let path = path.with_file_name(name);
            let opened = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path);
            let file = match opened {
                // Of a process of the same number in another container, or one that could not be locked.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other?,
            };
            // Where a file system knows no locks, nothing is taken for abandoned either.
            let _ = file.lock();
            // Somebody who clears up may have had the lock first.
            if file.metadata()?.nlink() > 0 {
                return Ok(Self {
                    path,
                    file: Arc::new(file),
                    kept: false,
                });
            }
        }
    }

    fn keep_as(mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Tells the temporary files of one process apart.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Removes what killed calls for `path` left. It is only in the way, so that it cannot be removed is no trouble.
fn remove_abandoned(path: &Path, prefix: &OsStr) {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let Ok(entries) = fs::read_dir(directory.unwrap_or(Path::new("."))) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_name().as_bytes().starts_with(prefix.as_bytes()) {
            remove_if_abandoned(&entry.path());
        }
    }
}

fn remove_if_abandoned(path: &Path) {
    let Ok(file) = File::open(path) else { return };
    if file.try_lock().is_err() {
        return;
    }
    // Under the lock: the name is still that of the file that nobody holds.
    let same =
        |named: fs::Metadata, held: fs::Metadata| (named.dev(), named.ino()) == (held.dev(), held.ino());
    if let (Ok(named), Ok(held)) = (fs::symlink_metadata(path), file.metadata())
        && same(named, held)
    {
        let _ = fs::remove_file(path);
    }
}
