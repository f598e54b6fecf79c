//! What one region holds, as far as listing tells.
//!
//! Owns: turning keys into coverage, and the question "where does this region's WAL end?". Reads only.
//! [`coverage`] is what there is to read; [`held`] also counts the holes that the region has a record of.
//! The pulse shortens the listing: it names a position that was true when it was written, so only what
//! comes after it needs to be listed. It is a hint: the listing decides.

use std::time::Duration;

use highwater_format::container::MAX_OBJECT_PLAIN;
use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::{Key, Layout, Lsn, LsnRange, Pulse, SegmentName, SegmentSize, TimelineId, records};
use highwater_store::{ErrorKind, Store, list_all, list_parts};

use crate::error::{AgentError, Kind, Result};
use crate::frontier::Position;
use crate::heal::listing::Listing;
use crate::held::Held;
use crate::region::get_optional;

/// For so long a listing that lacks WAL may only lag. After that the WAL is gone.
pub(crate) const LISTING_LAG: Duration = Duration::from_secs(90);

/// The timelines of which the region holds anything, ascending.
pub async fn timelines(store: &dyn Store, layout: &Layout) -> Result<Vec<TimelineId>> {
    let parts = list_parts(store, &layout.wal_dir()).await?;
    let timeline = |(name, _): &(String, String)| TimelineId::from_hex8(name);
    Ok(parts.iter().filter_map(timeline).collect())
}

/// The pieces of `timeline` from the object on that holds the start of `range`, up to its end: those that begin before that.
/// To list an archive to its end costs more the longer it gets. Chunks are never removed, so that there may be millions of
/// them: only those are listed, and held in memory, that no segment object made superfluous.
pub async fn coverage(
    store: &dyn Store,
    layout: &Layout,
    size: SegmentSize,
    timeline: TimelineId,
    range: LsnRange,
) -> Result<Coverage> {
    Listing { layout, size }.coverage(store, timeline, range).await
}

/// As [`coverage`], and every gap that is on record.
pub async fn held(
    store: &dyn Store,
    layout: &Layout,
    size: SegmentSize,
    timeline: TimelineId,
    range: LsnRange,
) -> Result<Held> {
    let wal = coverage(store, layout, size, timeline, range).await?;
    Ok(Held::new(wal, gaps(store, layout, timeline).await?))
}

/// All that may follow `from`.
pub fn onward(from: Lsn) -> LsnRange {
    LsnRange::new(from, Lsn::MAX)
}

/// The next `limit` pieces or so of `timeline` from the object on that holds `from`, and every gap: to follow a region
/// that is far ahead, which may hold millions. Pieces that begin at the LSN given with it, or later, are not among them.
pub async fn held_next(
    store: &dyn Store,
    layout: &Layout,
    size: SegmentSize,
    timeline: TimelineId,
    from: Lsn,
    limit: usize,
) -> Result<(Held, Lsn)> {
    let next = Listing { layout, size }
        .slice(store, timeline, onward(from), limit)
        .await?;
    let wal = next.pieces.into_iter().collect();
    let held = Held::new(wal, gaps(store, layout, timeline).await?);
    Ok((held, next.until))
}

/// The gaps of `timeline` that are on record, by their keys.
pub async fn gaps(store: &dyn Store, layout: &Layout, timeline: TimelineId) -> Result<Vec<LsnRange>> {
    let listed = list_all(store, &layout.gap_dir(timeline), None).await?;
    let range = |key: &str| match layout.parse(key) {
        Some(Key::Gap(_, range)) => Some(range),
        _ => None,
    };
    Ok(listed.iter().filter_map(|meta| range(&meta.key)).collect())
}

/// The key of a piece.
pub fn piece_key(layout: &Layout, size: SegmentSize, timeline: TimelineId, piece: &Piece) -> String {
    match piece.kind {
        PieceKind::Segment => {
            let number = size.segment_number(piece.range.start);
            layout.segment(SegmentName { timeline, number }, size)
        }
        PieceKind::Tail => layout.tail(timeline, piece.range),
    }
}

/// The region's pulse; none if there is none yet.
pub async fn pulse(store: &dyn Store, layout: &Layout) -> Result<Option<Pulse>> {
    let key = layout.pulse();
    let Some(bytes) = get_optional(store, &key).await? else {
        return Ok(None);
    };
    records::decode(&bytes)
        .map(Some)
        .map_err(|source| AgentError::Object {
            region: store.region().to_owned(),
            key,
            source,
        })
}

/// Where the region's WAL ends on its newest timeline; none if it holds no WAL. A gap that the region has a
/// record of is stepped over.
///
/// Uploads run in parallel, so that after a crash a later object may be there without an earlier one. What
/// lies behind such a hole does not count: it is stored again.
pub async fn position(store: &dyn Store, layout: &Layout, size: SegmentSize) -> Result<Option<Position>> {
    let hint = match pulse(store, layout).await {
        Err(error) if error.kind() == Kind::Damage => {
            tracing::warn!(region = store.region(), %error, "the pulse cannot be read; listing everything instead");
            None
        }
        other => other?,
    };
    for timeline in timelines(store, layout).await?.into_iter().rev() {
        let hint = hint
            .as_ref()
            .filter(|pulse| pulse.timeline == timeline)
            .map(|pulse| pulse.stored_lsn);
        let end = match end_from_hint(store, layout, size, timeline, hint).await? {
            Some(end) => Some(end),
            None => {
                let held = held(store, layout, size, timeline, onward(Lsn::ZERO)).await?;
                held.runs().first().map(|run| run.end)
            }
        };
        if let Some(lsn) = end {
            let lsn = match hint.filter(|claimed| *claimed > lsn) {
                Some(claimed) => beyond_listing(store, layout, size, timeline, lsn, claimed).await?,
                None => lsn,
            };
            return Ok(Some(Position { timeline, lsn }));
        }
    }
    Ok(None)
}

/// The pulse claims more than the listing shows: either something is gone, or the listing lags behind. Segment
/// objects have names that need no listing, so they are asked for directly.
async fn beyond_listing(
    store: &dyn Store,
    layout: &Layout,
    size: SegmentSize,
    timeline: TimelineId,
    listed: Lsn,
    claimed: Lsn,
) -> Result<Lsn> {
    let mut end = listed;
    while end < claimed && size.bytes() <= MAX_OBJECT_PLAIN {
        let number = size.segment_number(end);
        match store
            .head(&layout.segment(SegmentName { timeline, number }, size))
            .await
        {
            Ok(_) => end = size.segment_start(end) + size.bytes(),
            Err(error) if error.kind() == ErrorKind::NotFound => break,
            Err(error) => return Err(error.into()),
        }
    }
    if end < claimed {
        tracing::warn!(
            region = store.region(), %timeline, claimed = %claimed, found = %end,
            "the region holds less than its pulse says: objects are gone, or its listing lags"
        );
    }
    if end == listed {
        return Ok(end);
    }
    Ok(held(store, layout, size, timeline, onward(end))
        .await?
        .contiguous_end(end))
}

/// The end of the WAL that goes on from what the pulse claims; none if the claim does not hold.
async fn end_from_hint(
    store: &dyn Store,
    layout: &Layout,
    size: SegmentSize,
    timeline: TimelineId,
    hint: Option<Lsn>,
) -> Result<Option<Lsn>> {
    let Some(last_byte) = hint
        .filter(|lsn| *lsn > Lsn::ZERO)
        .map(|lsn| lsn.saturating_sub(1))
    else {
        return Ok(None);
    };
    let end = held(store, layout, size, timeline, onward(last_byte))
        .await?
        .contiguous_end(last_byte);
    Ok((end > last_byte).then_some(end))
}

#[cfg(test)]
#[path = "inventory_tests.rs"]
mod tests;
