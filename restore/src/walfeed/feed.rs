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
use futures::future::join_all;
use highwater_format::container::MAX_OBJECT_PLAIN;
use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::layout::Layout;
use highwater_format::lsn::{Lsn, LsnRange, SegmentSize};
use highwater_format::timeline::TimelineId;
use highwater_format::walname::SegmentName;
use highwater_store::{RegionConfig, Store, StoreError};
use tokio::time::{Instant, sleep};

use super::CANNOT_WRITE;
use super::look::Look;
use super::place::{self, Offer, PlaceError};
use super::prove::{Seen, Verdict, judge};
use super::watched::{self, Note, Watched};
use crate::catalog::{descent, read::whole_history};
use crate::fetch::source::{Nowhere, ReadError, Reject, Sources};
use crate::recovery::facts::{Facts, TimelineFacts};
use crate::regions::left_out_note;

/// What PostgreSQL is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is where PostgreSQL wants it.
    Done,
    /// It is proven to lie past the end.
    PastEnd(String),
    /// Neither; recovery must stop.
    Failed(String),
    /// The same, and trying again is of no use: every region answered, and what holds it is damaged in all of them.
    Damaged {
        /// Which WAL, and what is wrong with which object.
        reason: String,
        /// Everything before this is there.
        before: Lsn,
    },
}

/// An agent that stores several objects at once leaves holes for as long as it takes to store one.
const CLOSING: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What of a segment was tried in vain.
#[derive(Debug, Default)]
struct Tried {
    spoilt: HashSet<Offer>,
    /// What is wrong with the last of them; a missing whole segment is no trouble, the newest one never has that object.
    troubles: String,
    /// A region did not answer.
    silent: bool,
}

impl Tried {
    /// Notes an object; `false` if it was noted before.
    fn note(&mut self, offer: Offer, nowhere: &Nowhere) -> bool {
        if !nowhere.is_absent() {
            self.troubles = format!("; {nowhere}");
        }
        self.silent |= nowhere.may_pass();
        self.spoilt.insert(offer)
    }
}

/// An archive as `wal-fetch` sees it.
#[derive(Debug)]
pub struct Feed {
    facts: Facts,
    layout: Layout,
    size: SegmentSize,
    sources: Sources,
    places: Vec<Place>,
    /// What is said of regions that the restore does without, behind what the others lack; nothing where there are none.
    elsewhere: String,
    /// A standby asks.
    follows: bool,
}

/// A region as it is asked.
#[derive(Debug)]
struct Place {
    name: String,
    was_read: bool,
    store: Result<Arc<Watched>, String>,
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
    /// Opens the regions that the facts name. One that cannot be opened counts as one that does not answer. Notes about
    /// silent regions are kept in `spool`.
    pub async fn open(facts: Facts, configured: &[RegionConfig], spool: &Path) -> Self {
        let read = facts.regions.iter().filter(|region| region.was_read).count();
        let opened = facts.regions.iter().map(async |region| {
            let mut settings = region.settings(configured);
            if read > usize::from(region.was_read) {
                watched::hurry(&mut settings);
            }
            let opened = highwater_store::open(&settings).await;
            Region {
                name: region.name.clone(),
                was_read: region.was_read,
                store: opened.map_err(|error| error.to_string()),
            }
        });
        let regions = join_all(opened).await;
        Self::noting(facts, regions, spool)
    }

    /// A feed over stores that are open and do not retry by themselves.
    #[must_use]
    pub fn over(facts: Facts, regions: Vec<Region>) -> Self {
        Self::build(facts, regions, None)
    }

    /// The same, with notes about silent regions in `spool`.
    #[must_use]
    pub fn noting(facts: Facts, regions: Vec<Region>, spool: &Path) -> Self {
        Self::build(facts, regions, Some(spool))
    }

    fn build(facts: Facts, regions: Vec<Region>, spool: Option<&Path>) -> Self {
        let usable = |region: &Region| region.was_read && region.store.is_ok();
        let count = regions.iter().filter(|region| usable(region)).count();
        let place = |(index, region): (usize, Region)| {
            let has_other = count > usize::from(usable(&region));
            let note = spool.map(|spool| Note::of(spool, index));
            let watch = |store| Arc::new(Watched::new(store, region.was_read, has_other, note));
            Place {
                store: region.store.map(watch),
                name: region.name,
                was_read: region.was_read,
            }
        };
        let places: Vec<Place> = regions.into_iter().enumerate().map(place).collect();
        let note = left_out_note(facts.left_out.iter().map(String::as_str));
        Self {
            layout: facts.layout(),
            size: facts.segments(),
            facts,
            sources: sources(&places),
            places,
            elsewhere: note.map(|note| format!("; {note}")).unwrap_or_default(),
            follows: false,
        }
    }

    /// The same for a standby, if it is one.
    #[must_use]
    pub fn following(self, follows: bool) -> Self {
        Self { follows, ..self }
    }

    /// Before giving up: the regions that the plan had read and that were asked in a hurry only will be asked with all
    /// patience. `false` if there are none, so that asking again is of no use.
    #[must_use]
    pub fn wake(&self) -> bool {
        let needed = self.places.iter().filter(|place| place.was_read);
        let woken = needed.filter(|place| place.store.as_ref().is_ok_and(|store| store.wake()));
        woken.count() > 0
    }

    /// The facts it works by.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Writes the segment `name`, whole and verified, to `path`. A segment that holds a switch point may take what
    /// lies before it from the parent timeline, which is where the new one's copy came from. Of a timeline that was left,
    /// nothing behind its switch point is served: that is another history. A hole is looked at again before recovery
    /// stops for it, which it does not where a standby follows: in standby mode PostgreSQL opens nothing at an end that comes
    /// too early, but streams or asks again, and may have to be promoted although nobody is left to fill the hole. Damage
    /// stops both.
    pub async fn segment(&self, name: SegmentName, path: &Path) -> Answer {
        let since = Instant::now();
        loop {
            let may_close = since.elapsed() < CLOSING;
            match self.attempt(name, path, may_close).await {
                Some(answer) => return answer,
                None => sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// One look at a segment. `None` where a hole may close.
    async fn attempt(&self, name: SegmentName, path: &Path, may_close: bool) -> Option<Answer> {
        let range = name.range(self.size);
        let left_at = self.facts.left_at(name.timeline);
        if let Some(switch) = left_at.filter(|switch| *switch <= range.start) {
            let reason = format!("timeline {} was left at {switch}", name.timeline);
            return Some(Answer::PastEnd(reason));
        }
        let limit = left_at.map_or(range.end, |switch| switch.min(range.end));
        let mut tried = Tried::default();
        if let Some(answer) = self.whole(name, limit, path, &mut tried).await {
            return Some(answer);
        }
        let known = self.facts.timeline(name.timeline);
        let seen = self.look(name).await;
        tried.silent |= seen.iter().any(|seen| seen.listed.is_err());
        let offers = self.offers(name, &seen).await;
        let unproven = offers.iter().any(|offer| unproven(offer, range, known));
        // Each round takes at least one offer away, so this ends.
        loop {
            let left = offers
                .iter()
                .filter(|offer| !tried.spoilt.iter().any(|bad| bad.is_same_object(offer)));
            let by_range: HashMap<LsnRange, Offer> = left.map(|offer| (offer.used, *offer)).collect();
            let coverage: Coverage = by_range.values().map(Offer::as_piece).collect();
            let verdict = match judge(range, known, &seen, &coverage) {
                Verdict::PastEnd(_) if unproven => {
                    Verdict::Hole("what the regions list of it cannot be used".to_owned())
                }
                verdict => verdict,
            };
            let (pieces, until) = match verdict {
                Verdict::Serve { pieces, until } => (pieces, until),
                Verdict::PastEnd(proof) => return Some(Answer::PastEnd(proof)),
                Verdict::Hole(_) if may_close && tried.troubles.is_empty() => return None,
                Verdict::Hole(reason) if self.follows && tried.troubles.is_empty() => {
                    match up_to_the_hole(range, &coverage) {
                        Some(part) => {
                            tracing::warn!("a part of {} is served: {reason}", name.to_string(self.size));
                            part
                        }
                        None => return Some(Answer::PastEnd(reason)),
                    }
                }
                Verdict::Hole(reason) | Verdict::Refuse(reason) => {
                    return Some(self.lost(range, &coverage, reason, &tried));
                }
            };
            let chosen: Vec<Offer> = pieces
                .iter()
                .filter_map(|piece| by_range.get(&piece.range))
                .copied()
                .collect();
            match self.write(range, &chosen, until, path).await {
                Ok(()) => return Some(Answer::Done),
                Err(PlaceError::Local(error)) => return Some(Answer::Failed(error)),
                Err(PlaceError::Offer(offer, error)) => {
                    if !tried.note(*offer, &error) {
                        return Some(Answer::Failed(error.to_string()));
                    }
                }
            }
        }
    }

    /// The segment from the object that holds all of it, which is fetched without a look at any listing.
    async fn whole(&self, name: SegmentName, limit: Lsn, path: &Path, tried: &mut Tried) -> Option<Answer> {
        if self.size.bytes() > MAX_OBJECT_PLAIN {
            return None;
        }
        let range = name.range(self.size);
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
            Ok(()) => Some(Answer::Done),
            Err(PlaceError::Local(error)) => Some(Answer::Failed(error)),
            Err(PlaceError::Offer(offer, error)) => {
                tried.note(*offer, &error);
                None
            }
        }
    }

    /// Some of `range` cannot be had. Where that is proven to be damage, and the target of the restore lies before the
    /// whole segment, PostgreSQL only reads ahead: it may be told that nothing follows, because with a target it does
    /// not open the cluster at an end that comes too early.
    fn lost(&self, range: LsnRange, coverage: &Coverage, reason: String, tried: &Tried) -> Answer {
        let reason = reason + &tried.troubles;
        let elsewhere = &self.elsewhere;
        let before = coverage.contiguous_end(range.start).min(range.end);
        if tried.silent {
            return Answer::Failed(reason + elsewhere);
        }
        if tried.troubles.is_empty() {
            return Answer::Failed(format!(
                "{reason}; every region has answered: if no agent is still storing it, what there is ends at {before} \
                 (`highwater-restore run --to-lsn {before}` into another directory){elsewhere}"
            ));
        }
        if self.facts.needed_until.is_some_and(|until| until <= range.start) {
            return Answer::PastEnd(format!("the target of this restore lies before it; {reason}"));
        }
        Answer::Damaged {
            reason: reason + elsewhere,
            before,
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

    /// Writes the history file of `timeline` to `path`. Before it begins, PostgreSQL asks for those of all timelines from the
    /// one it starts on to its target (`restoreTimeLineHistoryFiles`), so that standbys and the next archive have them. The
    /// target's, which it asks for on its own, holds the whole descent; what the plan did without, recovery does without.
    pub async fn history(&self, timeline: TimelineId, path: &Path) -> Answer {
        if timeline == TimelineId::FIRST {
            return Answer::PastEnd("the first timeline has no history".to_owned());
        }
        let key = self.layout.history(timeline);
        let read = self.sources.read::<_, Infallible, _, _>(&key, |bytes: Bytes| {
            let checked = self.check_history(timeline, &bytes);
            std::future::ready(checked.map(|()| bytes).map_err(Reject::Copy))
        });
        match read.await {
            Ok(had) => match place::whole_file(path, &had.value) {
                Ok(()) => Answer::Done,
                Err(error) => Answer::Failed(format!("{CANNOT_WRITE} {}: {error}", path.display())),
            },
            Err(ReadError::Nowhere(_)) if self.facts.without_history.contains(&timeline) => {
                Answer::PastEnd(format!(
                    "no region had a usable history of timeline {timeline} when the restore was planned, and recovery does \
                     without"
                ))
            }
            Err(ReadError::Nowhere(nowhere)) if nowhere.is_absent() => self.no_history(timeline).await,
            Err(ReadError::Nowhere(nowhere)) if nowhere.may_pass() => {
                // Some region does not answer; the others and the plan may still prove that there is none.
                match self.no_history(timeline).await {
                    Answer::Failed(_) => Answer::Failed(nowhere.to_string()),
                    other => other,
                }
            }
            Err(ReadError::Nowhere(nowhere)) => Answer::Failed(format!("{nowhere}{}", self.elsewhere)),
            Err(ReadError::Fatal(never)) => match never {},
        }
    }

    /// Whether a copy of a history tells what this restore was planned with.
    fn check_history(&self, timeline: TimelineId, bytes: &[u8]) -> Result<(), String> {
        let history = whole_history(timeline, bytes)?;
        let planned = &self.facts.timelines;
        let Some(index) = planned.iter().position(|facts| facts.timeline == timeline) else {
            return Ok(());
        };
        let ancestors = planned.get(..index).unwrap_or_default();
        let left = planned.iter().skip(1).map(|next| next.begin);
        let wanted = ancestors.iter().map(|facts| facts.timeline).zip(left);
        if descent(&history).eq(wanted) {
            Ok(())
        } else {
            Err(format!(
                "it tells another descent of timeline {timeline} than this restore was planned with"
            ))
        }
    }

    /// Proves that `timeline` does not exist: no region lists anything of it, and those that do not answer had
    /// nothing of it when the restore was planned.
    async fn no_history(&self, timeline: TimelineId) -> Answer {
        if self.facts.known_timelines.contains(&timeline) {
            return Answer::Failed(format!(
                "the history of timeline {timeline}, which the plan of this restore had, is gone{}",
                self.elsewhere
            ));
        }
        let prefix = self.layout.timeline_dir(timeline);
        let planned = !self.facts.timelines.is_empty();
        let mut answered = 0_usize;
        let listed = self.ask_all(|store| store.list(&prefix, None, 1)).await;
        for (region, listed) in self.places.iter().zip(listed) {
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
        let look = Look {
            layout: &self.layout,
            size: self.size,
        };
        let listed = self.ask_all(|store| look.list(store, name)).await;
        let seen = self.places.iter().zip(listed).map(|(place, listed)| Seen {
            region: place.name.clone(),
            was_read: place.was_read,
            listed,
        });
        seen.collect()
    }

    /// Asks all regions at the same time, but for those that were silent a moment ago.
    async fn ask_all<'a, T, F>(&'a self, ask: impl Fn(&'a Watched) -> F) -> Vec<Result<T, String>>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut calls = Vec::new();
        for place in &self.places {
            let call = match &place.store {
                Err(error) => Err(error.clone()),
                Ok(store) => match store.silence() {
                    Some(error) => Err(error.to_string()),
                    None => Ok(ask(store)),
                },
            };
            calls.push(async move { call?.await.map_err(|error| error.to_string()) });
        }
        join_all(calls).await
    }
}

/// The regions in the order in which an object is looked for: those first that the plan had read and that nobody doubts.
fn sources(places: &[Place]) -> Sources {
    let (read, silent): (Vec<&Place>, Vec<&Place>) = places.iter().partition(|place| place.was_read);
    let in_order: Vec<_> = read
        .into_iter()
        .chain(silent)
        .filter_map(|place| place.store.clone().ok())
        .collect();
    let doubted: Vec<bool> = in_order.iter().map(|store| store.is_doubtful()).collect();
    let stores = in_order.into_iter().map(|store| -> Arc<dyn Store> { store });
    Sources::new(stores.collect()).asking_last(&doubted)
}

/// What there is of the segment before its first hole.
fn up_to_the_hole(range: LsnRange, coverage: &Coverage) -> Option<(Vec<Piece>, Lsn)> {
    let until = coverage.contiguous_end(range.start).min(range.end);
    let pieces = coverage.cover(LsnRange::new(range.start, until)).ok()?;
    (until > range.start).then_some((pieces, until))
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
