//! Reading WAL back from the archive: to compare it with what the server sends, and to copy it between
//! regions. Every object is verified before a byte of it is used.

use std::pin::pin;

use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::{Expect, FormatError, Header, LsnRange, Object, SegmentName, SegmentSize, TimelineId};
use highwater_store::{ErrorKind, Store};

use crate::blocking;
use crate::budget::Charge;
use crate::error::{AgentError, Result};
use crate::heal::listing::Listing;
use crate::inventory::{coverage, piece_key};
use crate::region::Archive;
use crate::uploader::Shared;

/// Reads one piece from a region and checks that it is what its key says.
pub async fn read_piece(
    archive: &Archive,
    store: &dyn Store,
    size: SegmentSize,
    timeline: TimelineId,
    piece: &Piece,
) -> Result<(String, Bytes, Object)> {
    let key = piece_key(&archive.layout, size, timeline, piece);
    let bytes = store.get(&key).await?;
    let system_id = archive.identity.system_id;
    let expect = match piece.kind {
        PieceKind::Segment => {
            let number = size.segment_number(piece.range.start);
            Expect::segment(system_id, SegmentName { timeline, number }, size)
        }
        PieceKind::Tail => Expect::tail(system_id, timeline, piece.range),
    };
    let object = Object::open(bytes.clone())
        .and_then(|object| object.expect(&expect).map(|()| object))
        .map_err(|source| AgentError::Object {
            region: store.region().to_owned(),
            key: key.clone(),
            source,
        })?;
    Ok((key, bytes, object))
}

/// Requests in flight at once while many small objects are read: a segment may consist of hundreds of chunks, and
/// a commit may wait for the stream that they are compared with.
const AT_ONCE: usize = 16;

/// Reads pieces from a region, several at once, and gives each in its turn with its header and its plain bytes.
pub fn read_pieces<'a>(
    archive: &'a Archive,
    store: &'a dyn Store,
    size: SegmentSize,
    timeline: TimelineId,
    pieces: &'a [Piece],
) -> impl Stream<Item = Result<(&'a Piece, Header, Vec<u8>)>> {
    let read = move |piece: &'a Piece| async move {
        let (key, _, object) = read_piece(archive, store, size, timeline, piece).await?;
        let header = object.header().clone();
        let plain = blocking::run("decoding an object", move || object.plain()).await?;
        let plain = plain.map_err(|source| AgentError::Object {
            region: store.region().to_owned(),
            key,
            source,
        })?;
        Ok((piece, header, plain))
    };
    stream::iter(pieces).map(read).buffered(AT_ONCE)
}

/// Decodes every frame, so that damage is not copied.
pub fn verify(object: &Object) -> Result<(), FormatError> {
    let mut plain = Vec::new();
    object.frames().try_for_each(|frame| {
        plain.clear();
        frame.decode_into(&mut plain)
    })
}

/// The plain bytes of `range` as one region holds them; none if it does not hold all of them. An object that cannot be
/// used is passed over where others hold the same bytes: chunks that a larger object made superfluous are still there.
pub async fn read_range(
    archive: &Archive,
    store: &dyn Store,
    size: SegmentSize,
    timeline: TimelineId,
    range: LsnRange,
) -> Result<Option<Vec<u8>>> {
    let layout = &archive.layout;
    let Ok(mut pieces) = coverage(store, layout, size, timeline, range).await?.cover(range) else {
        return Ok(None);
    };
    let mut left: Option<Vec<Piece>> = None;
    loop {
        let error = match read_whole(archive, store, size, timeline, range, &pieces).await {
            Err(error) => error,
            done => return done,
        };
        let Some(bad) = unusable(&error) else {
            return Err(error);
        };
        let mut others = match left.take() {
            Some(others) => others,
            None => Listing { layout, size }.around(store, timeline, range).await?,
        };
        others.retain(|piece| piece_key(layout, size, timeline, piece) != bad);
        let Ok(next) = others.iter().copied().collect::<Coverage>().cover(range) else {
            return Err(error);
        };
        tracing::warn!(region = store.region(), %error, "an object cannot be used; others hold the same WAL and are read");
        (pieces, left) = (next, Some(others));
    }
}

/// The key of an object that is of no use, so that others may be tried.
fn unusable(error: &AgentError) -> Option<&str> {
    match error {
        AgentError::Object { key, .. } => Some(key),
        AgentError::Store(error) => {
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound).then(|| error.key())
        }
        _ => None,
    }
}

async fn read_whole(
    archive: &Archive,
    store: &dyn Store,
    size: SegmentSize,
    timeline: TimelineId,
    range: LsnRange,
    pieces: &[Piece],
) -> Result<Option<Vec<u8>>> {
    let mut plain = Vec::with_capacity(usize::try_from(range.len()).unwrap_or(0));
    let mut read = pin!(read_pieces(archive, store, size, timeline, pieces));
    while let Some((piece, _, bytes)) = read.try_next().await? {
        append(&mut plain, range, piece.range, &bytes);
    }
    Ok((plain.len() as u64 == range.len()).then_some(plain))
}

/// Appends to `plain`, which holds `range` from its start, what `bytes` (all of `held`) adds to it.
pub fn append(plain: &mut Vec<u8>, range: LsnRange, held: LsnRange, bytes: &[u8]) {
    let next = range.start + plain.len() as u64;
    let from = usize::try_from(next.distance_from(held.start)).unwrap_or(usize::MAX);
    let to = usize::try_from(range.end.min(held.end).distance_from(held.start)).unwrap_or(0);
    if held.start <= next {
        plain.extend_from_slice(bytes.get(from..to).unwrap_or_default());
    }
}

/// Plain bytes that were read back, and the memory that they stand for.
#[derive(Debug)]
pub struct ReadBack {
    /// All of the range that was asked for.
    pub plain: Vec<u8>,
    /// As many bytes.
    pub charge: Charge,
}

/// As [`read_range`], charged to the budget from before the first byte is read.
pub async fn read_back(
    shared: &Shared,
    store: &dyn Store,
    timeline: TimelineId,
    range: LsnRange,
) -> Result<Option<ReadBack>> {
    // While it is read: the bytes themselves, and the objects that they are taken from.
    let mut charge = shared.budget.charge(2 * range.len());
    let plain = read_range(&shared.archive, store, shared.segment_size, timeline, range).await?;
    charge.resize(range.len());
    Ok(plain.map(|plain| ReadBack { plain, charge }))
}

#[cfg(test)]
mod tests {
    use highwater_config::Policy;

    use super::*;
    use crate::test_world::{MIB, piece, wal, world};

    #[tokio::test]
    async fn what_a_damaged_object_holds_is_read_from_the_chunks_it_covered() {
        let world = world(Policy::All);
        let (segment, middle) = (piece(PieceKind::Segment, MIB, 2 * MIB), MIB + 700);
        let key = world.put_wal(0, segment).await;
        world.damage(0, &key).await;
        let read = async || {
            let (archive, size) = (&world.shared.archive, world.shared.segment_size);
            read_range(
                archive,
                &*world.region(0).quick,
                size,
                TimelineId::FIRST,
                segment.range,
            )
            .await
        };
        world.put_wal(0, piece(PieceKind::Tail, MIB, middle)).await;
        assert!(matches!(read().await, Err(AgentError::Object { .. })));
        world.put_wal(0, piece(PieceKind::Tail, middle, 2 * MIB)).await;
        assert!(read().await.unwrap().unwrap() == wal(segment.range));
    }
}
