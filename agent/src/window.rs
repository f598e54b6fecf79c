//! Sealed objects that are still in memory, in stream order, and how far each region has got with them.
//!
//! Owns: the order in which every region stores things, and what may be forgotten. Does not own: the
//! stores (uploader) or what durable means (frontier).
//!
//! Each region takes [`Item`]s in order. It may skip a chunk that a later item in the window covers: so a
//! region that fell a little behind stores whole segments instead of their chunks. An item is forgotten
//! when every region is past it; when the window is over its share of memory, as soon as one region is.
//! A region that finds its next item forgotten is told so ([`Next::Behind`]) and is filled from another.
//! What no region holds is never forgotten: the receiver's budget stops the stream instead. History files, which are small,
//! are kept for good: the only region that was past one may lose it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use highwater_format::{Lsn, LsnRange, Object as Container, Time, TimelineId};
use highwater_store::Object;
use tokio::sync::watch;

use crate::budget::Charge;
use crate::error::{AgentError, Result};
use crate::followers::Followers;
use crate::frontier::Position;

/// Something that every region has to store.
#[derive(Debug)]
pub struct Item {
    /// Key within the region.
    pub key: String,
    /// The sealed bytes.
    pub object: Object,
    /// What it is.
    pub what: What,
    /// Memory it stands for.
    pub charge: Option<Charge>,
}

impl Item {
    /// The plain bytes of WAL that was sealed here.
    pub(crate) fn plain(&self) -> Result<Vec<u8>> {
        Container::open(self.object.bytes.clone())
            .and_then(|object| object.plain())
            .map_err(|error| AgentError::Bug(format!("{} cannot be read back: {error}", self.key)))
    }
}

/// What an [`Item`] is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum What {
    /// A run of WAL.
    Wal {
        /// Timeline it was streamed on.
        timeline: TimelineId,
        /// What it covers.
        range: LsnRange,
        /// Time of its newest commit.
        last_commit: Option<Time>,
    },
    /// A timeline's history file: nothing of the timeline may be stored before it.
    History {
        /// The timeline that it begins.
        timeline: TimelineId,
        /// Where the timeline's own WAL begins in the archive.
        begins: Lsn,
        /// Everything that was streamed before the switch: what a region must hold first.
        after: Position,
    },
    /// The record of WAL that can no longer be had: nothing behind it may be stored before it.
    Gap {
        /// The timeline.
        timeline: TimelineId,
        /// What is missing.
        range: LsnRange,
    },
    /// The record of WAL that cannot be replayed: what follows may not be stored before it. It moves no position. A region that is
    /// filled beyond it from another one gets it when the archive is compared.
    Unreplayable {
        /// Everything that was streamed before it.
        after: Position,
    },
}

impl What {
    /// Whether a region must hold this before it stores anything that follows.
    pub fn is_barrier(self) -> bool {
        match self {
            Self::Wal { .. } => false,
            Self::History { .. } | Self::Gap { .. } | Self::Unreplayable { .. } => true,
        }
    }

    /// Where a region stands that had everything before this and now has this too.
    pub fn end(self) -> Position {
        match self {
            Self::Wal { timeline, range, .. } | Self::Gap { timeline, range } => Position {
                timeline,
                lsn: range.end,
            },
            Self::History { timeline, begins, .. } => Position {
                timeline,
                lsn: begins,
            },
            Self::Unreplayable { after } => after,
        }
    }

    /// Where a region must stand so that this continues what it has.
    pub fn start(self) -> Position {
        match self {
            Self::Wal { timeline, range, .. } | Self::Gap { timeline, range } => Position {
                timeline,
                lsn: range.start,
            },
            Self::History { after, .. } | Self::Unreplayable { after } => after,
        }
    }

    /// Whether a region that holds everything before `at` has this. What moves no position may be lacking right there.
    fn is_done_at(self, at: Position) -> bool {
        match self {
            Self::Unreplayable { after } => after < at,
            _ => self.end() <= at,
        }
    }

    fn covers(self, other: Self) -> bool {
        match (self, other) {
            (
                Self::Wal { timeline, range, .. },
                Self::Wal {
                    timeline: other_timeline,
                    range: other_range,
                    ..
                },
            ) => {
                timeline == other_timeline && range.start <= other_range.start && range.end >= other_range.end
            }
            _ => false,
        }
    }
}

/// What a region should do next.
#[derive(Debug)]
pub enum Next {
    /// Store this; its number is where to ask from afterwards.
    Item(u64, Arc<Item>),
    /// Nothing yet.
    Wait,
    /// What should come next is no longer in memory.
    Behind,
}

/// See the module.
#[derive(Debug)]
pub struct Window {
    inner: Mutex<Inner>,
    changed: Followers<u64>,
    share: u64,
}

#[derive(Debug)]
struct Inner {
    items: VecDeque<Arc<Item>>,
    first: u64,
    bytes: u64,
    /// Where a region must stand to lack nothing of what was forgotten.
    forgotten: Position,
    /// Per region: every item before this number is stored there. None: it takes nothing at present.
    passed: Vec<Option<u64>>,
    /// Every history file that was ever here.
    histories: BTreeMap<TimelineId, Bytes>,
}

impl Window {
    /// A window for `regions` regions that keeps at most about `share` bytes for those that lag. `begins` is
    /// where the first item continues: a region that holds less lacks something that will never be here.
    pub fn new(regions: usize, share: u64, begins: Position) -> Self {
        let inner = Inner {
            items: VecDeque::new(),
            first: 0,
            bytes: 0,
            forgotten: begins,
            passed: vec![None; regions],
            histories: BTreeMap::new(),
        };
        Self {
            inner: Mutex::new(inner),
            changed: Followers::new(0),
            share,
        }
    }

    /// Adds the next object.
    pub fn push(&self, item: Item) {
        let end = {
            let mut inner = self.lock();
            inner.bytes += item.object.bytes.len() as u64;
            if let What::History { timeline, .. } = item.what {
                inner.histories.insert(timeline, item.object.bytes.clone());
            }
            inner.items.push_back(Arc::new(item));
            inner.forget(self.share);
            inner.end()
        };
        self.changed.send(end);
    }

    /// The stream goes on at `to`, up to where some region holds everything: what others lack before that will never be here.
    pub fn leap(&self, to: Position) {
        let end = {
            let mut inner = self.lock();
            // The number of what is passed over, so that nobody waits for it.
            inner.first = inner.end() + 1;
            inner.items.clear();
            inner.bytes = 0;
            inner.forgotten = inner.forgotten.max(to);
            inner.end()
        };
        self.changed.send(end);
    }

    /// Follows additions; the value is the number of the next item.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.follow()
    }

    /// Makes `region`, which holds everything before `at`, take part. Returns the number to ask from, or
    /// none if the window does not reach back that far.
    pub fn attach(&self, region: usize, at: Position) -> Option<u64> {
        let mut inner = self.lock();
        let from = inner.continues(at)?;
        if let Some(passed) = inner.passed.get_mut(region) {
            *passed = Some(from);
        }
        Some(from)
    }

    /// Whether a region that holds everything before `at` would find here all it lacks.
    pub fn reaches(&self, at: Position) -> bool {
        self.lock().continues(at).is_some()
    }

    /// Takes `region` out: nothing is kept for its sake any more.
    pub fn detach(&self, region: usize) {
        let mut inner = self.lock();
        if let Some(passed) = inner.passed.get_mut(region) {
            *passed = None;
        }
        inner.forget(self.share);
    }

    /// What comes at or after `number` for a region, leaving out what a later item covers, unless something stands between the
    /// two that may only follow the first.
    pub fn next(&self, number: u64) -> Next {
        let inner = self.lock();
        if number < inner.first {
            return Next::Behind;
        }
        let Some(mut index) = usize::try_from(number - inner.first).ok() else {
            return Next::Wait;
        };
        while let Some(item) = inner.items.get(index) {
            if !inner
                .items
                .iter()
                .skip(index + 1)
                .take_while(|later| !later.what.is_barrier())
                .any(|later| later.what.covers(item.what))
            {
                return Next::Item(inner.first + index as u64, item.clone());
            }
            index += 1;
        }
        Next::Wait
    }

    /// Notes that `region` has stored (or needs nothing of) every item before `number`.
    pub fn passed(&self, region: usize, number: u64) {
        let mut inner = self.lock();
        if let Some(Some(passed)) = inner.passed.get_mut(region) {
            *passed = (*passed).max(number);
        }
        inner.forget(self.share);
    }

    /// WAL items of `timeline` that reach into `range`, for comparing what the server sends again.
    pub fn overlapping(&self, timeline: TimelineId, range: LsnRange) -> Vec<Arc<Item>> {
        let reaches = |item: &&Arc<Item>| match item.what {
            What::Wal {
                timeline: of,
                range: covered,
                ..
            } => of == timeline && covered.start < range.end && range.start < covered.end,
            What::History { .. } | What::Gap { .. } | What::Unreplayable { .. } => false,
        };
        self.lock().items.iter().filter(reaches).cloned().collect()
    }

    /// The history files of all timelines that began in this stream.
    pub fn histories(&self) -> BTreeMap<TimelineId, Bytes> {
        self.lock().histories.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn end(&self) -> u64 {
        self.first + self.items.len() as u64
    }

    /// The number from which a region at `at` finds all it lacks; none if something before is forgotten.
    fn continues(&self, at: Position) -> Option<u64> {
        let oldest = self.items.front().map(|item| item.what.start());
        let reaches_back = oldest.is_some_and(|start| start <= at) || self.forgotten <= at;
        if !reaches_back {
            return None;
        }
        let done = self
            .items
            .iter()
            .take_while(|item| item.what.is_done_at(at))
            .count();
        Some(self.first + done as u64)
    }

    fn forget(&mut self, share: u64) {
        let all = self.passed.iter().flatten().min().copied();
        let one = self.passed.iter().flatten().max().copied();
        while let Some(item) = self.items.front() {
            let by_all = all.is_some_and(|passed| self.first < passed);
            let by_one = one.is_some_and(|passed| self.first < passed) && self.bytes > share;
            if !by_all && !by_one {
                break;
            }
            self.bytes -= item.object.bytes.len() as u64;
            self.forgotten = self.forgotten.max(item.what.end());
            self.items.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
