//! What one region lists: the WAL of a timeline, the objects of base backups.
//!
//! Owns: listing no more than can matter. Tail chunks stay for a long time after their segment object was
//! stored, so they are listed only where segment objects leave something open. A range is listed to its end and no
//! further, and a long one in slices, because an archive only grows. Reads keys, never content.

use std::collections::BTreeMap;

use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::{BackupId, Key, Layout, Lsn, LsnRange, SegmentName, SegmentSize, TimelineId};
use highwater_store::{ErrorKind, LIST_PAGE, LONG_PAGE, Meta, Operation, Store, StoreError};

use crate::error::{AgentError, Result};
use crate::segmenter::object_start;

/// Objects of WAL that a part of a timeline may consist of.
const ALL: usize = usize::MAX;

/// A part of one timeline in one region.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slice {
    /// Every piece that begins before `until`, those hidden by others too.
    pub(crate) pieces: Vec<Piece>,
    /// The part ends here. Where it was cut short, an object begins here.
    pub(crate) until: Lsn,
}

/// The objects of one base backup in one region.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Base {
    /// The commit mark is there.
    pub(crate) visible: bool,
    /// The manifest is there.
    pub(crate) manifest: bool,
    /// Stored size of each pack that is there.
    pub(crate) packs: BTreeMap<u32, u64>,
}

/// Where and in which sizes WAL is listed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listing<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) size: SegmentSize,
}

impl Listing<'_> {
    /// What the pieces of `timeline` cover that begin before the end of `range`, from the object on that holds its start.
    pub(crate) async fn coverage(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<Coverage> {
        let all = self.slice(store, timeline, range, ALL).await?;
        Ok(all.pieces.into_iter().collect())
    }

    /// The pieces of `timeline` that begin before the end of `range`, from the object on that holds its start; where they
    /// are more than about `limit`, the first of them.
    pub(crate) async fn slice(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        range: LsnRange,
        limit: usize,
    ) -> Result<Slice> {
        let mut range = LsnRange {
            start: object_start(self.size, range.start),
            end: range.end,
        };
        let mut pieces = Vec::new();
        range.end = self.segments(store, timeline, range, limit, &mut pieces).await?;
        let segments = pieces.len();
        for open in open_ranges(range, &pieces) {
            let left = limit.saturating_sub(pieces.len() - segments);
            let end = self.tails(store, timeline, open, left, &mut pieces).await?;
            if end < open.end {
                range.end = end;
                break;
            }
        }
        pieces.retain(|piece| piece.range.start < range.end);
        Ok(Slice {
            pieces,
            until: range.end,
        })
    }

    /// Everything that holds a byte of `range`, chunks that a segment object hides included.
    pub(crate) async fn around(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        self.segments(store, timeline, range, ALL, &mut pieces).await?;
        self.tails(store, timeline, range, ALL, &mut pieces).await?;
        Ok(pieces)
    }

    /// At most `limit` segment objects from the one on that holds the start of `range`. Gives the end of the range, or
    /// where the first one begins that was too many.
    async fn segments(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        range: LsnRange,
        limit: usize,
        into: &mut Vec<Piece>,
    ) -> Result<Lsn> {
        let before = self.size.segment_number(range.start).checked_sub(1);
        let before = before.map(|number| self.layout.segment(SegmentName { timeline, number }, self.size));
        // So many can be in the range, and one more ends it.
        let fit = usize::try_from(range.len() / self.size.bytes()).unwrap_or(ALL);
        let wanted = limit.min(fit.saturating_add(2)).saturating_add(1);
        let directory = self.layout.segment_dir(timeline);
        let mut pages = Pages::new(store, directory, before, wanted, limit);
        while let Some(page) = pages.next().await? {
            for Meta { key, size } in page {
                let Some(Key::Segment(name)) = self.layout.parse(&key) else {
                    continue;
                };
                let Some(segment) = name.resolve(self.size).map(|name| name.range(self.size)) else {
                    continue;
                };
                if segment.start >= range.end {
                    return Ok(range.end);
                }
                if into.len() >= limit {
                    return Ok(segment.start);
                }
                into.push(Piece {
                    range: segment,
                    kind: PieceKind::Segment,
                    size,
                });
            }
        }
        Ok(range.end)
    }

    /// Tail chunks that reach into `open`: those of at least one object, and of no more when they are `limit`. Gives the
    /// end of what was listed. No chunk begins before the object that holds its start.
    async fn tails(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        open: LsnRange,
        limit: usize,
        into: &mut Vec<Piece>,
    ) -> Result<Lsn> {
        let directory = self.layout.tail_dir(timeline);
        // A chunk that begins there sorts after this: its key goes on.
        let after = format!("{directory}{}", object_start(self.size, open.start).hex16());
        let (mut found, mut last) = (0, None::<Lsn>);
        // Where there are no segment objects everything is in chunks.
        let first = match into.is_empty() && limit < ALL {
            true => limit.saturating_add(1),
            false => LIST_PAGE,
        };
        let mut pages = Pages::new(store, directory, Some(after), first, limit);
        while let Some(page) = pages.next().await? {
            for Meta { key, size } in page {
                let Some(Key::Tail(_, range)) = self.layout.parse(&key) else {
                    continue;
                };
                if range.start >= open.end {
                    return Ok(open.end);
                }
                if range.end <= open.start {
                    continue;
                }
                let object = object_start(self.size, range.start);
                if found >= limit && last != Some(object) {
                    return Ok(object);
                }
                (found, last) = (found + 1, Some(object));
                into.push(Piece {
                    range,
                    kind: PieceKind::Tail,
                    size,
                });
            }
        }
        Ok(open.end)
    }

    /// Every base backup of which the region holds anything.
    pub(crate) async fn backups(&self, store: &dyn Store) -> Result<BTreeMap<BackupId, Base>> {
        let directory = self.layout.base_dir();
        let mut found = BTreeMap::<BackupId, Base>::new();
        let mut pages = Pages::new(store, directory, None, LIST_PAGE, ALL);
        while let Some(page) = pages.next().await? {
            for Meta { key, size } in page {
                match self.layout.parse(&key) {
                    Some(Key::Backup(id)) => found.entry(id).or_default().visible = true,
                    Some(Key::Manifest(id)) => found.entry(id).or_default().manifest = true,
                    Some(Key::Pack(id, number)) => {
                        found.entry(id).or_default().packs.insert(number, size);
                    }
                    _ => {}
                }
            }
        }
        Ok(found)
    }
}

/// One timeline in one region, from one place on, slice by slice.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    listing: Listing<'a>,
    store: &'a dyn Store,
    timeline: TimelineId,
    /// What was listed and not yet taken.
    ahead: Slice,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(listing: Listing<'a>, store: &'a dyn Store, timeline: TimelineId, from: Lsn) -> Self {
        Self {
            listing,
            store,
            timeline,
            ahead: Slice {
                pieces: Vec::new(),
                until: from,
            },
        }
    }

    /// Lists on, by about `limit` objects, unless what follows `at` is known. Gives the end of what is known.
    pub(crate) async fn look(&mut self, at: Lsn, limit: usize) -> Result<Lsn> {
        if self.ahead.until <= at && at < Lsn::MAX {
            let rest = LsnRange {
                start: self.ahead.until,
                end: Lsn::MAX,
            };
            let next = self.listing.slice(self.store, self.timeline, rest, limit).await?;
            self.ahead.pieces.extend(next.pieces);
            self.ahead.until = next.until;
        }
        Ok(self.ahead.until)
    }

    /// The pieces that begin before `until`, and have not ended before what was taken last.
    pub(crate) fn take(&mut self, until: Lsn) -> Vec<Piece> {
        let pieces = self.ahead.pieces.iter();
        let taken = pieces
            .filter(|piece| piece.range.start < until)
            .copied()
            .collect();
        self.ahead.pieces.retain(|piece| piece.range.end > until);
        taken
    }
}

/// The keys and sizes below a directory, page by page.
struct Pages<'a> {
    store: &'a dyn Store,
    directory: String,
    after: Option<String>,
    first: usize,
    later: usize,
    ended: bool,
}

impl<'a> Pages<'a> {
    /// Asks for `first` entries, which are most often enough, and then for as many as `limit` asks for at once.
    fn new(
        store: &'a dyn Store,
        directory: String,
        after: Option<String>,
        first: usize,
        limit: usize,
    ) -> Self {
        Self {
            store,
            directory,
            after,
            first: first.clamp(1, LONG_PAGE),
            // One more ends it.
            later: limit.saturating_add(1).clamp(LIST_PAGE, LONG_PAGE),
            ended: false,
        }
    }

    async fn next(&mut self) -> Result<Option<Vec<Meta>>> {
        if self.ended {
            return Ok(None);
        }
        let page = self
            .store
            .list(&self.directory, self.after.as_deref(), self.first)
            .await?;
        let last = page.entries.last().map(|meta| meta.key.clone());
        if page.more && (last.is_none() || last <= self.after) {
            return Err(stuck(self.store, &self.directory));
        }
        (self.after, self.ended, self.first) = (last, !page.more, self.later);
        Ok(Some(page.entries))
    }
}

/// A listing that ends early would be taken for a hole.
fn stuck(store: &dyn Store, directory: &str) -> AgentError {
    let what = "the listing claims more entries but does not advance";
    StoreError::new(
        ErrorKind::Corrupt,
        store.region(),
        Operation::List,
        directory,
        what,
    )
    .into()
}

/// What these segment objects, in order, leave open of `range`.
fn open_ranges(range: LsnRange, segments: &[Piece]) -> Vec<LsnRange> {
    let (mut open, mut at) = (Vec::new(), range.start);
    for segment in segments {
        if segment.range.start > at {
            open.push(LsnRange::new(at, segment.range.start));
        }
        at = at.max(segment.range.end);
    }
    if at < range.end {
        open.push(LsnRange::new(at, range.end));
    }
    open
}

#[cfg(test)]
#[path = "listing_tests.rs"]
mod tests;
