//! What one region lists of a segment.
//!
//! Owns: which listings are enough: of whole segments the one and the next, of tail chunks those that reach into it and
//! the first behind it. Does not own: what follows from them.

use highwater_format::container::MAX_OBJECT_PLAIN;
use highwater_format::coverage::{Piece, PieceKind};
use highwater_format::layout::{Key, Layout};
use highwater_format::lsn::{Lsn, LsnRange, SegmentSize};
use highwater_format::timeline::TimelineId;
use highwater_format::walname::SegmentName;
use highwater_store::{Store, StoreError};

use super::prove::Listed;

/// Lists segments of one archive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look<'a> {
    pub(super) layout: &'a Layout,
    pub(super) size: SegmentSize,
}

impl Look<'_> {
    /// What `store` has for the segment `name`.
    pub(super) async fn list(&self, store: &dyn Store, name: SegmentName) -> Result<Listed, StoreError> {
        let range = name.range(self.size);
        let mut listed = Listed::default();
        self.list_segments(store, name, &mut listed).await?;
        self.list_tails(store, name.timeline, range, range.start, &mut listed)
            .await?;
        if !listed
            .pieces
            .iter()
            .any(|piece| piece.range.contains(range.start))
        {
            // A chunk that began in an earlier segment: looked for only when it can matter.
            let from = range.start.saturating_sub(MAX_OBJECT_PLAIN);
            self.list_tails(store, name.timeline, range, from, &mut listed)
                .await?;
        }
        Ok(listed)
    }

    async fn list_segments(
        &self,
        store: &dyn Store,
        name: SegmentName,
        into: &mut Listed,
    ) -> Result<(), StoreError> {
        let directory = self.layout.segment_dir(name.timeline);
        let before = name
            .number
            .checked_sub(1)
            .map(|number| SegmentName { number, ..name });
        let mut after = before.map(|before| self.layout.segment(before, self.size));
        loop {
            let page = store.list(&directory, after.as_deref(), 2).await?;
            let last = page.entries.last().map(|meta| meta.key.clone());
            for meta in page.entries {
                let Some(Key::Segment(found)) = self.layout.parse(&meta.key) else {
                    continue;
                };
                let Some(found) = found.resolve(self.size) else {
                    continue;
                };
                if found.number != name.number {
                    into.note_later(found.start(self.size));
                    return Ok(());
                }
                let range = found.range(self.size);
                into.pieces.push(Piece {
                    range,
                    kind: PieceKind::Segment,
                    size: meta.size,
                });
            }
            if !page.more || last.is_none() {
                return Ok(());
            }
            after = last;
        }
    }

    async fn list_tails(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        range: LsnRange,
        from: Lsn,
        into: &mut Listed,
    ) -> Result<(), StoreError> {
        let directory = self.layout.tail_dir(timeline);
        let mut after = format!("{directory}{}", from.hex16());
        loop {
            let page = store
                .list(&directory, Some(&after), highwater_store::LIST_PAGE)
                .await?;
            let Some(last) = page.entries.last() else {
                return Ok(());
            };
            after.clone_from(&last.key);
            for meta in page.entries {
                let Some(Key::Tail(_, found)) = self.layout.parse(&meta.key) else {
                    continue;
                };
                if found.start >= range.end {
                    into.note_later(found.start);
                    return Ok(());
                }
                if found.end > range.end {
                    into.note_later(range.end);
                }
                if found.end > range.start {
                    into.pieces.push(Piece {
                        range: found,
                        kind: PieceKind::Tail,
                        size: meta.size,
                    });
                }
            }
            if !page.more {
                return Ok(());
            }
        }
    }
}

impl Listed {
    fn note_later(&mut self, at: Lsn) {
        self.later = Some(self.later.map_or(at, |later| later.min(at)));
    }
}
