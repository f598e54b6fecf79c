//! Segments and history files out of the regions.
//!
//! Owns: which objects are read for a name PostgreSQL asks for, and gathering what [`super::prove`] needs for an answer.
//! Does not own: the answer's rule, and the spool. A whole segment object is tried first and without listing; the
//! newest segment, and any that is damaged or missing, is put together from tail chunks of all regions.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use highwater_format::container::MAX_OBJECT_PLAIN;
use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::layout::{Key, Layout};
use highwater_format::lsn::{Lsn, LsnRange, SegmentSize};
use highwater_format::timeline::{History, TimelineId};
use highwater_format::walname::SegmentName;
use highwater_store::{NoObserver, RegionConfig, RetryPolicy, Retrying, Store, StoreError};

use super::place::{self, Offer, PlaceError};
use super::prove::{Listed, Seen, Verdict, judge};
use crate::fetch::source::{ReadError, Reject, Sources};
use crate::recovery::facts::{Facts, TimelineFacts};

/// Passing failures of one call are retried for this long. Recovery stops when it is spent and resumes when the
/// server is started again; PostgreSQL itself would wait for ever.
const RETRY_BUDGET: Duration = Duration::from_secs(20);

/// The plan does without a region that could not be read then: it may be back, but is not waited for.
const SILENT_BUDGET: Duration = Duration::from_millis(500);

/// What PostgreSQL is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is where PostgreSQL wants it.
    Done,
    /// It is proven to lie past the end.
    PastEnd(String),
    /// Neither; recovery must stop.
    Failed(String),
}

/// An archive as `wal-fetch` sees it.
#[derive(Debug)]
pub struct Feed {
    facts: Facts,
    layout: Layout,
    size: SegmentSize,
    sources: Sources,
    regions: Vec<Region>,
}

/// One region, open or not.
#[derive(Debug, Clone)]
pub struct Region {
    /// Its name.
    pub name: String,
    /// It was read completely when the restore was planned.
    pub was_read: bool,
    /// The store, or why there is none.
    pub store: Result<Arc<dyn Store>, String>,
}

impl Feed {
    /// Opens the regions that the facts name. One that cannot be opened counts as one that does not answer.
    pub async fn open(facts: Facts, configured: &[RegionConfig]) -> Self {
        let mut regions = Vec::new();
        for region in &facts.regions {
            let opened = highwater_store::open(&region.settings(configured)).await;
            regions.push(Region {
                name: region.name.clone(),
                was_read: region.was_read,
                store: opened.map_err(|error| error.to_string()),
            });
        }
        Self::over(facts, regions)
    }

    /// A feed over stores that are open, with the retry layer put around each.
    #[must_use]
    pub fn over(facts: Facts, mut regions: Vec<Region>) -> Self {
        for region in &mut regions {
            if let Ok(store) = &mut region.store {
                let budget = if region.was_read {
                    RETRY_BUDGET
                } else {
                    SILENT_BUDGET
                };
                let policy = RetryPolicy::interactive().with_budget(Some(budget));
                *store = Arc::new(Retrying::new(store.clone(), policy, Arc::new(NoObserver)));
            }
        }
        let (read, silent): (Vec<&Region>, Vec<&Region>) = regions.iter().partition(|region| region.was_read);
        let in_order = read.into_iter().chain(silent);
        let sources = Sources::new(in_order.filter_map(|region| region.store.clone().ok()).collect());
        Self {
            layout: facts.layout(),
            size: facts.segments(),
            facts,
            sources,
            regions,
        }
    }

    /// The facts it works by.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Writes the segment `name`, whole and verified, to `path`. A segment that holds a switch point may take what
    /// lies before it from the parent timeline, which is where the new one's copy came from. Of a timeline that was left,
    /// nothing behind its switch point is served: that is another history.
    pub async fn segment(&self, name: SegmentName, path: &Path) -> Answer {
        let range = name.range(self.size);
        let left_at = self.facts.left_at(name.timeline);
        if let Some(switch) = left_at.filter(|switch| *switch <= range.start) {
            return Answer::PastEnd(format!("timeline {} was left at {switch}", name.timeline));
        }
        let limit = left_at.map_or(range.end, |switch| switch.min(range.end));
        let mut spoilt: HashSet<Offer> = HashSet::new();
        // Why objects could not be used; a missing whole segment is no trouble, the newest one never has that object.
        let mut troubles = String::new();
        if self.size.bytes() <= MAX_OBJECT_PLAIN {
            let piece = Piece {
                range,
                kind: PieceKind::Segment,
                size: 0,
            };
            let whole = Offer {
                timeline: name.timeline,
                piece,
                used: range,
            };
            match self.write(range, &[whole], limit, path).await {
                Ok(()) => return Answer::Done,
                Err(PlaceError::Local(error)) => return Answer::Failed(error),
                Err(PlaceError::Offer(offer, error)) => {
                    if !error.is_absent() {
                        troubles = format!("; {error}");
                    }
                    spoilt.insert(*offer)
                }
            };
        }
        let known = self.facts.timeline(name.timeline);
        let seen = self.look(name).await;
        let offers = self.offers(name, &seen).await;
        // Each round takes at least one offer away, so this ends.
        loop {
            let left = offers
                .iter()
                .filter(|offer| !spoilt.iter().any(|bad| bad.is_same_object(offer)));
            let by_range: HashMap<LsnRange, Offer> = left.map(|offer| (offer.used, *offer)).collect();
            let coverage: Coverage = by_range.values().map(Offer::as_piece).collect();
            let (pieces, until) = match judge(range, known, &seen, &coverage) {
                Verdict::Serve { pieces, until } => (pieces, until),
                Verdict::PastEnd(_) if offers.iter().any(|offer| unproven(offer, range, known)) => {
                    return Answer::Failed(format!("what the regions list of it cannot be used{troubles}"));
                }
                Verdict::PastEnd(proof) => return Answer::PastEnd(proof),
                Verdict::Refuse(reason) => return Answer::Failed(reason + &troubles),
            };
            let chosen: Vec<Offer> = pieces
                .iter()
                .filter_map(|piece| by_range.get(&piece.range))
                .copied()
                .collect();
            match self.write(range, &chosen, until, path).await {
                Ok(()) => return Answer::Done,
                Err(PlaceError::Local(error)) => return Answer::Failed(error),
                Err(PlaceError::Offer(offer, error)) => {
                    if !spoilt.insert(*offer) {
                        return Answer::Failed(error.to_string());
                    }
                    troubles = format!("; {error}");
                }
            }
        }
    }

    async fn write(
        &self,
        segment: LsnRange,
        offers: &[Offer],
        until: Lsn,
        path: &Path,
    ) -> Result<(), PlaceError> {
        let work = place::Work {
            sources: &self.sources,
            layout: &self.layout,
            segment,
            size: self.size,
            until,
        };
        place::segment(&work, offers, path).await
    }

    /// What the regions list of the segment, and of the parent's segment where that can stand in for its beginning.
    async fn offers(&self, name: SegmentName, seen: &[Seen]) -> Vec<Offer> {
        let range = name.range(self.size);
        let end = self.facts.left_at(name.timeline).unwrap_or(range.end);
        let own = LsnRange::new(range.start, range.end.min(end));
        let mut offers = offers_of(name.timeline, seen, own);
        let Some((parent, switch)) = self.parent_within(name) else {
            return offers;
        };
        let seen = self
            .look(SegmentName {
                timeline: parent,
                ..name
            })
            .await;
        offers.extend(offers_of(parent, &seen, LsnRange::new(range.start, switch)));
        offers
    }

    /// The parent timeline, if it was left within this segment.
    fn parent_within(&self, name: SegmentName) -> Option<(TimelineId, Lsn)> {
        let index = self
            .facts
            .timelines
            .iter()
            .position(|facts| facts.timeline == name.timeline)?;
        let begin = self.facts.timelines.get(index)?.begin;
        let parent = self.facts.timelines.get(index.checked_sub(1)?)?.timeline;
        let range = name.range(self.size);
        (range.start < begin && begin < range.end).then_some((parent, begin))
    }

    /// Writes the history file of `timeline` to `path`.
    pub async fn history(&self, timeline: TimelineId, path: &Path) -> Answer {
        if timeline == TimelineId::FIRST {
            return Answer::PastEnd("the first timeline has no history".to_owned());
        }
        let key = self.layout.history(timeline);
        let read = self.sources.read::<_, Infallible, _, _>(&key, |bytes: Bytes| {
            let parsed = History::parse(timeline, &bytes);
            std::future::ready(
                parsed
                    .map(|_| bytes)
                    .map_err(|error| Reject::Copy(error.to_string())),
            )
        });
        match read.await {
            Ok(had) => match place::whole_file(path, &had.value) {
                Ok(()) => Answer::Done,
                Err(error) => Answer::Failed(error.to_string()),
            },
            Err(ReadError::Nowhere(nowhere)) if nowhere.is_absent() => self.no_history(timeline).await,
            Err(ReadError::Nowhere(nowhere)) if nowhere.may_pass() => {
                // Some region does not answer; the others and the plan may still prove that there is none.
                match self.no_history(timeline).await {
                    Answer::Failed(_) => Answer::Failed(nowhere.to_string()),
                    other => other,
                }
            }
            Err(ReadError::Nowhere(nowhere)) => Answer::Failed(nowhere.to_string()),
            Err(ReadError::Fatal(never)) => match never {},
        }
    }

    /// Proves that `timeline` does not exist: no region lists anything of it, and those that do not answer had
    /// nothing of it when the restore was planned.
    async fn no_history(&self, timeline: TimelineId) -> Answer {
        if self.facts.known_timelines.contains(&timeline) {
            return Answer::Failed(format!(
                "the history of timeline {timeline}, which the plan of this restore had, is gone"
            ));
        }
        let prefix = self.layout.timeline_dir(timeline);
        let planned = !self.facts.timelines.is_empty();
        let mut answered = 0_usize;
        for region in &self.regions {
            let listed = match &region.store {
                Ok(store) => store
                    .list(&prefix, None, 1)
                    .await
                    .map_err(|error| error.to_string()),
                Err(error) => Err(error.clone()),
            };
            match listed {
                Ok(page) if page.entries.is_empty() => answered += 1,
                Ok(_) => {
                    let name = &region.name;
                    return Answer::Failed(format!(
                        "region {name} has WAL of timeline {timeline} but not its history"
                    ));
                }
                Err(_) if planned => {}
                Err(error) => {
                    return Answer::Failed(format!("region {} cannot be read: {error}", region.name));
                }
            }
        }
        if answered == 0 {
            return Answer::Failed("no region can be read".to_owned());
        }
        Answer::PastEnd(format!("no region has timeline {timeline}"))
    }

    async fn look(&self, name: SegmentName) -> Vec<Seen> {
        let mut seen = Vec::new();
        for region in &self.regions {
            let listed = match &region.store {
                Ok(store) => self
                    .list(store.as_ref(), name)
                    .await
                    .map_err(|error| error.to_string()),
                Err(error) => Err(error.clone()),
            };
            seen.push(Seen {
                region: region.name.clone(),
                was_read: region.was_read,
                listed,
            });
        }
        seen
    }

    async fn list(&self, store: &dyn Store, name: SegmentName) -> Result<Listed, StoreError> {
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
        let after = before.map(|before| self.layout.segment(before, self.size));
        for meta in store.list(&directory, after.as_deref(), 2).await?.entries {
            let Some(Key::Segment(found)) = self.layout.parse(&meta.key) else {
                continue;
            };
            let Some(found) = found.resolve(self.size) else {
                continue;
            };
            if found.number == name.number {
                let range = found.range(self.size);
                into.pieces.push(Piece {
                    range,
                    kind: PieceKind::Segment,
                    size: meta.size,
                });
            } else {
                into.note_later(found.start(self.size));
            }
        }
        Ok(())
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

/// Whether an object of the segment contradicts that it lies past the end: any does, but behind a ragged end only one
/// that goes on where the plan ended.
fn unproven(offer: &Offer, range: LsnRange, known: Option<&TimelineFacts>) -> bool {
    !known.is_some_and(|known| known.ragged) || offer.used.start <= range.start
}

/// The listed pieces, as far as they lie in `range`.
fn offers_of(timeline: TimelineId, seen: &[Seen], range: LsnRange) -> Vec<Offer> {
    let pieces = seen
        .iter()
        .filter_map(|seen| seen.listed.as_ref().ok())
        .flat_map(|listed| &listed.pieces);
    let used = pieces.filter_map(|piece| {
        Some((
            piece,
            piece.range.intersect(range).filter(|used| !used.is_empty())?,
        ))
    });
    used.map(|(piece, used)| Offer {
        timeline,
        piece: *piece,
        used,
    })
    .collect()
}
