//! Writing the segment object that a crash prevented.
//!
//! A segment's tail chunks are stored before its segment object. When the agent stops in between, and the
//! stream then resumes exactly after that segment, nothing would ever write the object; readers would have
//! to put the segment together from its chunks for ever. So a region that (re)joins completes the segment
//! that ends at or last before its position, from its own chunks.

use std::pin::pin;

use futures::TryStreamExt;
use highwater_format::container::{FRAME_SIZE, MAX_OBJECT_PLAIN};
use highwater_format::coverage::PieceKind;
use highwater_format::{
    Codec, FrameEncoder, Header, Kind, LsnRange, SegmentName, SegmentSize, TimelineId, seal,
};

use crate::archived::{append, read_pieces};
use crate::blocking;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::inventory::coverage;
use crate::region::{Region, write_once};
use crate::uploader::Shared;

/// Stores the segment object of the last whole segment before `at`, if the region holds all its chunks but
/// not the object.
pub async fn last_segment(shared: &Shared, region: &Region, at: Position) -> Result<()> {
    let size = shared.segment_size;
    let end = size.segment_start(at.lsn);
    if size.bytes() > MAX_OBJECT_PLAIN || end.0 < size.bytes() {
        return Ok(());
    }
    let range = LsnRange {
        start: end.saturating_sub(size.bytes()),
        end,
    };
    let store = &*region.store;
    let held = coverage(store, &shared.archive.layout, size, at.timeline, range).await?;
    let Ok(pieces) = held.cover(range) else {
        return Ok(());
    };
    if pieces.iter().any(|piece| piece.kind == PieceKind::Segment) {
        return Ok(());
    }
    // Charged without waiting: this must not depend on room that only this region's uploads make.
    let mut charge = shared.budget.charge(range.len());
    let mut plain = Vec::with_capacity(usize::try_from(range.len()).unwrap_or(0));
    let (mut first_commit, mut last_commit, mut newest) = (None, None, None);
    let mut read = pin!(read_pieces(&shared.archive, store, size, at.timeline, &pieces));
    while let Some((piece, header, bytes)) = read.try_next().await? {
        append(&mut plain, range, piece.range, &bytes);
        first_commit = [first_commit, header.first_commit].into_iter().flatten().min();
        last_commit = last_commit.max(header.last_commit);
        newest = Some(header);
    }
    let Some(newest) = newest.filter(|_| plain.len() as u64 == range.len()) else {
        return Ok(());
    };
    let header = Header {
        first_commit,
        last_commit,
        ..template(&newest, at.timeline, range)
    };
    let codec = header.codec;
    let sealed = blocking::run("sealing a segment", move || encode(header, codec, &plain))
        .await?
        .map_err(|source| AgentError::Encode {
            what: format!("segment {range}"),
            source,
        })?;
    charge.resize(sealed.bytes.len() as u64);
    let key = segment_key(shared, size, at.timeline, range);
    write_once(
        store,
        &key,
        highwater_store::Object::with_crc32(sealed.bytes, sealed.crc32),
    )
    .await?;
    tracing::info!(region = region.name, key, "completed a segment from its chunks");
    Ok(())
}

/// Stamps and codec come from the chunk that completed the segment.
fn template(chunk: &Header, timeline: TimelineId, range: LsnRange) -> Header {
    Header {
        sealed_at: chunk.sealed_at,
        server_end: chunk.server_end,
        ..Header::wal(Kind::Segment, chunk.codec, chunk.system_id, timeline, range)
    }
}

fn segment_key(shared: &Shared, size: SegmentSize, timeline: TimelineId, range: LsnRange) -> String {
    let number = size.segment_number(range.start);
    shared
        .archive
        .layout
        .segment(SegmentName { timeline, number }, size)
}

fn encode(
    header: Header,
    codec: Codec,
    plain: &[u8],
) -> Result<highwater_format::Sealed, highwater_format::FormatError> {
    let mut encoder = FrameEncoder::new(codec);
    let frames = plain
        .chunks(FRAME_SIZE as usize)
        .map(|frame| encoder.encode(frame))
        .collect::<Result<Vec<_>, _>>()?;
    seal(header, &frames)
}
