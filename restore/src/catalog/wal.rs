//! Lists the pieces of one timeline in one region.
//!
//! Segment objects first; then tail chunks, but only where they can add something. Chunks that a segment object has made
//! superfluous stay until retention takes them, and there may be one for every second of a month.

use highwater_format::{
    Key, Layout, Lsn, LsnRange, SegmentSize, TimelineId,
    container::MAX_OBJECT_PLAIN,
    coverage::{Piece, PieceKind},
};
use highwater_store::{LIST_PAGE, LONG_PAGE, Store, StoreError, list_all};

use super::{TimelineView, read::open_ranges};

/// How often a listing that ends before what the region's pulse claims is asked for again: a store whose listings lag
/// shows new keys late.
const LISTINGS: usize = 3;

/// Every piece that matters.
pub(super) async fn pieces(
    store: &dyn Store,
    layout: &Layout,
    timeline: TimelineId,
    size: SegmentSize,
    claimed: Lsn,
) -> Result<TimelineView, StoreError> {
    let mut view = TimelineView::default();
    for _ in 0..LISTINGS {
        segments(store, layout, timeline, size, &mut view).await?;
        for range in open_ranges(&view.coverage.runs()) {
            tails(store, layout, timeline, range, &mut view).await?;
        }
        let end = view.coverage.end().unwrap_or(Lsn::ZERO);
        if end >= claimed {
            break;
        }
    }
    Ok(view)
}

async fn segments(
    store: &dyn Store,
    layout: &Layout,
    timeline: TimelineId,
    size: SegmentSize,
    view: &mut TimelineView,
) -> Result<(), StoreError> {
    for meta in list_all(store, &layout.segment_dir(timeline), None).await? {
        let Some(Key::Segment(name)) = layout.parse(&meta.key) else {
            continue;
        };
        let Some(segment) = name.resolve(size) else {
            continue;
        };
        view.insert(Piece {
            range: segment.range(size),
            kind: PieceKind::Segment,
            size: meta.size,
        });
    }
    Ok(())
}

/// The tail chunks that hold some of `range`, those that a segment object makes superfluous included.
pub(crate) async fn chunks(
    store: &dyn Store,
    layout: &Layout,
    timeline: TimelineId,
    range: LsnRange,
) -> Result<Vec<Piece>, StoreError> {
    let mut view = TimelineView::default();
    tails(store, layout, timeline, range, &mut view).await?;
    let all = view.pieces.into_iter().map(|((start, end, kind), size)| Piece {
        range: LsnRange::new(start, end),
        kind,
        size,
    });
    Ok(all.filter(|piece| piece.range.end > range.start).collect())
}

/// Tail chunks that reach into `open`. One that begins before it may, but by no more than an object holds.
async fn tails(
    store: &dyn Store,
    layout: &Layout,
    timeline: TimelineId,
    open: LsnRange,
    view: &mut TimelineView,
) -> Result<(), StoreError> {
    let directory = layout.tail_dir(timeline);
    let from = open.start.saturating_sub(MAX_OBJECT_PLAIN);
    let mut after = (from > Lsn::ZERO).then(|| format!("{directory}{}", from.hex16()));
    let mut wanted = LIST_PAGE;
    loop {
        let page = store.list(&directory, after.as_deref(), wanted).await?;
        wanted = LONG_PAGE;
        let Some(last) = page.entries.last().map(|meta| meta.key.clone()) else {
            return Ok(());
        };
        for meta in page.entries {
            let Some(Key::Tail(_, range)) = layout.parse(&meta.key) else {
                continue;
            };
            if range.start >= open.end {
                return Ok(());
            }
            view.insert(Piece {
                range,
                kind: PieceKind::Tail,
                size: meta.size,
            });
        }
        if !page.more || after.as_ref() == Some(&last) {
            return Ok(());
        }
        after = Some(last);
    }
}
