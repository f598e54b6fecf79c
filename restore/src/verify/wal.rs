//! Checks the WAL of every timeline: each object, bytes that overlap, and the records across objects.
//!
//! Works through a timeline in blocks that no object crosses, all regions at once, so that memory holds a block per region
//! whatever the size of the archive.

use bytes::Bytes;
use futures::{StreamExt, stream};
use highwater_format::{
    FormatError, Lsn, LsnRange, TimelineId, container::MAX_OBJECT_PLAIN, coverage::Piece, walscan::WalScanner,
};
use std::collections::{BTreeMap, BTreeSet};
use tokio::task::JoinError;

use super::{Problem, Subject, Verified, good::Good, holes::holes};
use crate::{
    catalog::{Catalog, Source},
    locate::{expectation, open_object},
    progress::Bar,
    regions::{Meaning, meaning},
};

pub(super) async fn verify(
    catalog: &Catalog,
    subjects: &[Subject<'_>],
    parallel: usize,
    bar: &Bar,
    found: &mut Verified,
) {
    // Those that a pulse names, too: all that there was of one may be lost.
    let views = subjects.iter().map(|subject| &subject.view);
    let listed = views.clone().flat_map(|view| view.timelines.keys().copied());
    let claimed = views.filter_map(|view| Some(view.pulse.as_ref()?.timeline));
    let timelines: BTreeSet<TimelineId> = listed.chain(claimed).collect();
    for timeline in timelines {
        let (mut scan, mut good) = (Scan::new(catalog, timeline), Good::default());
        let reader = Reader {
            catalog,
            subjects,
            timeline,
            parallel,
            bar,
        };
        for (_, pieces) in blocks(catalog, subjects, timeline) {
            let block = reader.read(&pieces, &mut good, found).await;
            let merged = merge(catalog, subjects, timeline, &block, found);
            scan.feed(&merged, found);
        }
        good.tell(catalog, timeline, found);
        for subject in subjects {
            holes(catalog, subject, timeline, &good, found);
        }
        history(catalog, timeline, found);
    }
}

/// A timeline whose descent is not known cannot be restored.
fn history(catalog: &Catalog, timeline: TimelineId, found: &mut Verified) {
    if let Err(broken) = catalog.chain(timeline, &catalog.readable()) {
        found.missing.push(Problem::new(
            "all",
            format!("history of timeline {timeline}"),
            broken.to_string(),
        ));
    }
}

/// Which piece, in which region (an index into the subjects).
type Place = (usize, Piece);

/// All pieces of a timeline, by the block they lie in.
fn blocks(catalog: &Catalog, subjects: &[Subject<'_>], timeline: TimelineId) -> BTreeMap<Lsn, Vec<Place>> {
    let unit = catalog.identity.segment_size.bytes().min(MAX_OBJECT_PLAIN);
    let mut blocks: BTreeMap<Lsn, Vec<Place>> = BTreeMap::new();
    for (index, subject) in subjects.iter().enumerate() {
        let Some(view) = subject.view.timelines.get(&timeline) else {
            continue;
        };
        for ((start, end, kind), size) in &view.pieces {
            let piece = Piece {
                range: LsnRange::new(*start, *end),
                kind: *kind,
                size: *size,
            };
            blocks
                .entry(start.align_down(unit))
                .or_default()
                .push((index, piece));
        }
    }
    for pieces in blocks.values_mut() {
        pieces.sort_by_key(|(index, piece)| (piece.range.start, std::cmp::Reverse(piece.range.end), *index));
    }
    blocks
}

/// Reads one timeline.
struct Reader<'a> {
    catalog: &'a Catalog,
    subjects: &'a [Subject<'a>],
    timeline: TimelineId,
    parallel: usize,
    bar: &'a Bar,
}

impl Reader<'_> {
    /// Fetches and opens the pieces of one block; what is no good is reported and left out.
    async fn read(&self, pieces: &[Place], good: &mut Good, found: &mut Verified) -> Vec<(Place, Bytes)> {
        let fetched = stream::iter(pieces).map(|place| async move {
            let (index, piece) = place;
            let store = self.subjects.get(*index)?.region.store()?;
            let key = self.catalog.piece_key(self.timeline, piece);
            let bytes = store.get(&key).await;
            Some((*place, key, bytes))
        });
        let mut fetched = fetched.buffered(self.parallel.max(1));
        let mut block = Vec::new();
        while let Some(next) = fetched.next().await {
            self.bar.add(1);
            let Some((place, key, bytes)) = next else { continue };
            let Some(subject) = self.subjects.get(place.0) else {
                continue;
            };
            let (region, range) = (subject.region.name.as_str(), place.1.range);
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(error) => {
                    found.failed(region, &key, &error);
                    if meaning(&error) == Meaning::Bad {
                        good.bad(subject.index, key, range);
                    }
                    continue;
                }
            };
            let stored = bytes.len() as u64;
            match self.open(place.1, bytes).await {
                Ok(Ok(plain)) => {
                    found.good(subject.index, stored);
                    good.whole(subject.index, place.1);
                    block.push((place, Bytes::from(plain)));
                }
                Ok(Err(error)) => {
                    found.damage.push(Problem::new(region, &key, error.to_string()));
                    good.bad(subject.index, key, range);
                }
                Err(error) => found
                    .unreadable
                    .push(Problem::new(region, key, error.to_string())),
            }
        }
        block
    }

    /// The plain bytes of an object, on a thread that may take its time.
    async fn open(&self, piece: Piece, bytes: Bytes) -> Result<Result<Vec<u8>, FormatError>, JoinError> {
        let source = Source {
            timeline: self.timeline,
            piece,
            used: piece.range,
        };
        let expect = expectation(self.catalog, &source);
        tokio::task::spawn_blocking(move || open_object(bytes, &expect)).await
    }
}

/// The bytes of a block in order, without overlaps, each overlap compared.
fn merge(
    catalog: &Catalog,
    subjects: &[Subject<'_>],
    timeline: TimelineId,
    block: &[(Place, Bytes)],
    found: &mut Verified,
) -> Vec<(LsnRange, Bytes)> {
    let mut merged: Vec<(LsnRange, Bytes, Place)> = Vec::new();
    for (place, bytes) in block {
        let range = place.1.range;
        for (known, theirs, other) in &merged {
            let Some(common) = known.intersect(range) else {
                continue;
            };
            if common.is_empty() || slice(bytes, range, common) == slice(theirs, *known, common) {
                continue;
            }
            let name = |place: &Place| {
                let region = subjects
                    .get(place.0)
                    .map_or("?", |subject| subject.region.name.as_str());
                (region.to_owned(), catalog.piece_key(timeline, &place.1))
            };
            let ((region, key), (other_region, other_key)) = (name(place), name(other));
            let problem = format!(
                "differs from {other_key} of region {other_region} within {common}: the histories diverge"
            );
            found.damage.push(Problem::new(&region, key, problem));
        }
        // Objects come sorted by start: only what reaches past the last one is new.
        let end = merged
            .iter()
            .map(|(known, ..)| known.end)
            .max()
            .unwrap_or(Lsn::ZERO);
        if range.end > end {
            merged.push((range, bytes.clone(), *place));
        }
    }
    let mut at = Lsn::ZERO;
    let mut ordered = Vec::new();
    for (range, bytes, _) in &merged {
        let fresh = LsnRange::new(range.start.max(at), range.end);
        at = range.end;
        ordered.push((fresh, slice(bytes, *range, fresh)));
    }
    ordered
}

fn slice(bytes: &Bytes, whole: LsnRange, part: LsnRange) -> Bytes {
    let offset = |lsn: Lsn| {
        usize::try_from(lsn.distance_from(whole.start))
            .unwrap_or(usize::MAX)
            .min(bytes.len())
    };
    bytes.slice(offset(part.start)..offset(part.end))
}

/// Follows the records of one timeline across objects, over what all regions hold together.
struct Scan<'a> {
    catalog: &'a Catalog,
    timeline: TimelineId,
    scanner: Option<WalScanner>,
}

impl<'a> Scan<'a> {
    fn new(catalog: &'a Catalog, timeline: TimelineId) -> Self {
        Self {
            catalog,
            timeline,
            scanner: None,
        }
    }

    fn feed(&mut self, pieces: &[(LsnRange, Bytes)], found: &mut Verified) {
        for (range, bytes) in pieces {
            let follows = self
                .scanner
                .as_ref()
                .is_some_and(|scanner| scanner.position() == range.start);
            let (scanner, bytes) = match (follows, self.scanner.take()) {
                (true, Some(scanner)) => (scanner, bytes.clone()),
                _ => self.begin(*range, bytes),
            };
            let mut scanner = scanner;
            match scanner.feed(&bytes, &mut |_| {}) {
                Ok(()) => self.scanner = Some(scanner),
                // Behind a hole, which is told by itself.
                Err(_) if scanner.behind_unseen_switch().is_some() => {}
                Err(damage) => {
                    let what = format!("WAL at {} of timeline {}", damage.lsn, self.timeline);
                    found
                        .damage
                        .push(Problem::new("all", what, damage.what.to_string()));
                }
            }
        }
    }

    /// A scanner at the first page behind a break: a record that began before it cannot be followed.
    fn begin(&self, range: LsnRange, bytes: &Bytes) -> (WalScanner, Bytes) {
        let identity = &self.catalog.identity;
        let page = u64::from(identity.wal_block_size);
        let aligned = range.start.align_down(page);
        let start = if aligned == range.start {
            aligned
        } else {
            aligned.saturating_add(page)
        };
        let start = start.min(range.end);
        let scanner = WalScanner::new(
            start,
            identity.segment_size,
            Some(self.timeline),
            Some(identity.major()),
        )
        .with_page_size(identity.wal_block_size)
        .with_system_id(identity.system_id);
        (scanner, slice(bytes, range, LsnRange::new(start, range.end)))
    }
}
