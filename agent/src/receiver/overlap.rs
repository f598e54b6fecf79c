//! Comparing what the server sends again with what was sealed before (I6).
//!
//! Every stream begins at the start of an object of which a part is already sealed: in the window, or in
//! the regions. Those bytes must come again unchanged, but for what follows a switch, which nobody reads ([`crate::unused`]). Any other
//! difference means that the server was rolled back.

use std::sync::Arc;

use bytes::Bytes;
use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::{Identity, Lsn, LsnRange, TimelineId};
use highwater_store::ErrorKind;

use crate::archived::{ReadBack, append, read_back};
use crate::budget::Charge;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::inventory::{coverage, onward};
use crate::region::Region;
use crate::unused::{Rest, Unused};
use crate::uploader::Shared;
use crate::window::{Item, What};

/// What was compared is let go of in steps of so many bytes: the object that it belongs to grows meanwhile.
const STEP: usize = 1 << 20;

/// The bytes that a stream must begin with.
#[derive(Debug)]
pub(super) struct Overlap {
    timeline: TimelineId,
    range: LsnRange,
    /// What is left of it, from `next` less `compared` on.
    plain: Vec<u8>,
    compared: usize,
    /// Bytes of the stream that come before `range` and that nobody holds any more: they pass uncompared.
    unheld: u64,
    /// Bytes at the beginning that are only compared, and do not pass.
    only_compared: u64,
    next: Lsn,
    /// What in it need not come again unchanged.
    unused: Unused,
    /// Memory that `plain`, and what is withheld, stand for.
    charge: Option<Charge>,
    /// Whether nothing passes before all of it was compared; then it is `equal`.
    withholds: bool,
    equal: Bytes,
}

impl Overlap {
    /// Nothing is to be compared.
    pub(super) fn nothing(timeline: TimelineId, at: Lsn) -> Self {
        Self::of(timeline, LsnRange { start: at, end: at }, Vec::new(), None)
    }

    fn of(timeline: TimelineId, range: LsnRange, plain: Vec<u8>, charge: Option<Charge>) -> Self {
        Self {
            timeline,
            range,
            plain,
            compared: 0,
            unheld: 0,
            only_compared: 0,
            next: range.start,
            unused: Unused::default(),
            charge,
            withholds: false,
            equal: Bytes::new(),
        }
    }

    /// Reads the sealed bytes of `range` from the window and the regions; none if the regions answered that they do not
    /// hold all of it.
    pub(super) async fn load_if_held(
        shared: &Shared,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<Option<Self>> {
        match Self::load(shared, timeline, range).await? {
            Ok(overlap) => Ok(Some(overlap)),
            Err(unread) if unread.is_unheld() => Ok(None),
            Err(unread) => Err(unread.into_error(timeline)),
        }
    }

    /// The same; where it is not to be had, with what the regions said.
    pub(super) async fn load(
        shared: &Shared,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<std::result::Result<Self, Unread>> {
        // Charged without waiting: it is at most one object, and nothing is received before it is there.
        let charge = shared.budget.charge(range.len());
        let mut plain = Vec::new();
        let window = in_window(shared, timeline, range);
        while (plain.len() as u64) < range.len() {
            let next = range.start + plain.len() as u64;
            if let Some((held, item)) = window.iter().find(|(held, _)| held.contains(next)) {
                let _decoded = shared.budget.charge(held.len());
                append(&mut plain, range, *held, &item.plain()?);
                continue;
            }
            let until = window
                .iter()
                .map(|(held, _)| held.start)
                .filter(|start| *start > next)
                .min();
            let missing = LsnRange {
                start: next,
                end: until.map_or(range.end, |until| until.min(range.end)),
            };
            match from_regions(shared, timeline, missing).await {
                Ok(read) => plain.extend_from_slice(&read.plain),
                Err(unread) => return Ok(Err(unread)),
            }
        }
        Ok(Ok(Self::of(timeline, range, plain, Some(charge))))
    }

    /// What is left of `range`, of which the regions answered that they do not hold all: the longest run of WAL that ends
    /// with it. The bytes before that run pass uncompared.
    pub(super) async fn load_rest(shared: &Shared, timeline: TimelineId, range: LsnRange) -> Result<Self> {
        let mut starts = starts_of_rest(shared, timeline, range).await?;
        starts.sort_unstable();
        for start in starts {
            let end = range.end;
            if let Some(mut rest) = Self::load_if_held(shared, timeline, LsnRange { start, end }).await? {
                rest.unheld = start.distance_from(range.start);
                return Ok(rest);
            }
        }
        let mut nothing = Self::nothing(timeline, range.end);
        nothing.unheld = range.len();
        Ok(nothing)
    }

    /// Where the stream stands, or has to begin, of which what follows `archived` is archived next.
    pub(super) fn asks_from(&self, archived: Lsn) -> Lsn {
        archived.saturating_sub(self.only_compared)
    }

    /// This, only to be compared, and then what lies right behind it.
    pub(super) fn followed_by(mut self, next: Self) -> Self {
        debug_assert!(
            self.range.end == next.range.start && next.unheld == 0 && self.next == self.range.start
        );
        self.only_compared = self.range.len();
        self.range.end = next.range.end;
        self.plain.extend_from_slice(&next.plain);
        match (&mut self.charge, next.charge) {
            (Some(charge), Some(next)) => charge.join(next),
            (charge, next) => *charge = next,
        }
        self
    }

    /// Finds out what need not come again unchanged: by the archive's own records, so that nothing that is read is among it.
    #[must_use]
    pub(super) fn but_for_what_is_unused(mut self, identity: &Identity) -> Self {
        self.unused = Unused::of(identity, self.timeline, self.range.start, &self.plain);
        self
    }

    /// What the archive says that nobody reads where it begins, or goes on, at `lsn`.
    pub(super) fn unused_at(&self, lsn: Lsn) -> Option<Rest> {
        self.unused.around(lsn)
    }

    /// What is compared.
    pub(super) fn range(&self) -> LsnRange {
        self.range
    }

    /// Whether the archive has lost WAL before what is compared, which the stream brings once more.
    pub(super) fn lacks_its_front(&self) -> bool {
        self.unheld > 0
    }

    /// Whether nothing is left to compare.
    pub(super) fn is_over(&self) -> bool {
        self.compared == self.plain.len()
    }

    /// Where the comparison ends.
    pub(super) fn end(&self) -> Lsn {
        self.range.end
    }

    /// Lets nothing of the stream through before all of the overlap has come again: for bytes that would be archived
    /// anew, on a timeline that has only begun.
    #[must_use]
    pub(super) fn withholding(mut self) -> Self {
        self.withholds = true;
        self
    }

    /// Compares the next bytes of the stream, and gives those that may be archived now, in order.
    pub(super) fn pass(&mut self, data: Bytes) -> Result<[Bytes; 2]> {
        let expected = self.plain.len() - self.compared;
        if expected == 0 {
            // What was withheld has been passed on by now, and is charged where it went.
            self.charge = None;
            return Ok([Bytes::new(), data]);
        }
        self.compare(&data)?;
        if !self.withholds {
            return Ok([Bytes::new(), self.passes(data)]);
        }
        if data.len() < expected {
            return Ok([Bytes::new(), Bytes::new()]);
        }
        // They are equal: what was held back need not have been kept.
        Ok([std::mem::take(&mut self.equal), data.slice(expected..)])
    }

    /// What is left of `data` for the archive.
    fn passes(&mut self, mut data: Bytes) -> Bytes {
        let only = self.only_compared.min(data.len() as u64);
        self.only_compared -= only;
        data.split_off(usize::try_from(only).unwrap_or(data.len()))
    }

    /// What lies before the overlap, or past it, is not looked at.
    fn compare(&mut self, data: &[u8]) -> Result<()> {
        let before = self.unheld.min(data.len() as u64);
        self.unheld -= before;
        let data = data
            .get(usize::try_from(before).unwrap_or(usize::MAX)..)
            .unwrap_or_default();
        let expected = self.plain.get(self.compared..).unwrap_or_default();
        let length = expected.len().min(data.len());
        let (expected, data) = (&expected[..length], &data[..length]);
        if let Some(same) = self.unused.first_difference(self.next, expected, data) {
            return Err(AgentError::Diverged {
                timeline: self.timeline,
                at: self.next + same as u64,
                range: self.range,
            });
        }
        self.compared += length;
        self.next = self.next + length as u64;
        if self.compared == self.plain.len() && !self.plain.is_empty() {
            tracing::debug!(range = %self.range, "the server's WAL equals the archive's");
            let equal = std::mem::take(&mut self.plain);
            self.compared = 0;
            if self.withholds {
                self.equal = Bytes::from(equal);
            } else {
                self.charge = None;
            }
        } else if self.compared >= STEP && !self.withholds {
            self.let_go();
        }
        Ok(())
    }

    /// Frees what was compared.
    fn let_go(&mut self) {
        self.plain.drain(..self.compared);
        self.plain.shrink_to_fit();
        self.compared = 0;
        if let Some(charge) = &mut self.charge {
            charge.resize(self.plain.len() as u64);
        }
    }
}

/// The objects in memory that reach into `range`, and what they cover.
fn in_window(shared: &Shared, timeline: TimelineId, range: LsnRange) -> Vec<(LsnRange, Arc<Item>)> {
    let items = shared.window.overlapping(timeline, range).into_iter();
    let covers = |item: Arc<Item>| match item.what {
        What::Wal { range, .. } => Some((range, item)),
        What::History { .. } | What::Gap { .. } | What::Unreplayable { .. } => None,
    };
    items.filter_map(covers).collect()
}

/// Where the run of WAL begins that ends with `range`, in each region together with what is in memory.
async fn starts_of_rest(shared: &Shared, timeline: TimelineId, range: LsnRange) -> Result<Vec<Lsn>> {
    let in_memory: Coverage = in_window(shared, timeline, range)
        .into_iter()
        .map(|(range, item)| Piece {
            range,
            kind: PieceKind::Tail,
            size: item.object.bytes.len() as u64,
        })
        .collect();
    let start_in = |held: &Coverage| {
        let last = |run: &LsnRange| run.start < range.end && run.end >= range.end;
        let run = held.runs().into_iter().find(last)?;
        Some(run.start.max(range.start))
    };
    let stored = start_in(&in_memory).unwrap_or(range.end);
    let mut starts = Vec::new();
    for region in reaching(shared, timeline, stored) {
        let (layout, size) = (&shared.archive.layout, shared.segment_size);
        let mut held = coverage(&*region.quick, layout, size, timeline, onward(range.start)).await?;
        held.extend(in_memory.pieces().copied());
        starts.extend(start_in(&held));
    }
    Ok(starts)
}

/// The regions that should hold what comes before `end`. One that was not read yet, or has less, is not waited for.
fn reaching(shared: &Shared, timeline: TimelineId, end: Lsn) -> impl Iterator<Item = &Arc<Region>> {
    let wanted = Position { timeline, lsn: end };
    let reaches = move |region: &&Arc<Region>| {
        let at = shared.progress.position(region.index);
        at.is_some_and(|at| at >= wanted)
    };
    shared.archive.regions.iter().filter(reaches)
}

/// Reads `range` from whichever region holds it.
async fn from_regions(
    shared: &Shared,
    timeline: TimelineId,
    range: LsnRange,
) -> std::result::Result<ReadBack, Unread> {
    let mut unread = Unread::of(range);
    for region in reaching(shared, timeline, range.end) {
        match read_back(shared, &*region.quick, timeline, range).await {
            Ok(Some(read)) => return Ok(read),
            Ok(None) => unread.without += 1,
            Err(error) => {
                unread.is_damaged |= is_damage(&error);
                unread.reasons.push(format!("{}: {error}", region.name));
            }
        }
    }
    Err(unread)
}

/// What the regions said that should hold some sealed WAL, and did not give it.
#[derive(Debug)]
pub(super) struct Unread {
    range: LsnRange,
    /// So many answered that they do not hold all of it.
    without: usize,
    /// What the others failed with.
    reasons: Vec<String>,
    /// One of them holds an object that cannot be used.
    is_damaged: bool,
}

impl Unread {
    fn of(range: LsnRange) -> Self {
        Self {
            range,
            without: 0,
            reasons: Vec::new(),
            is_damaged: false,
        }
    }

    /// All answered that they do not hold it.
    pub(super) fn is_unheld(&self) -> bool {
        self.without > 0 && self.reasons.is_empty()
    }

    /// There was none to be asked.
    pub(super) fn is_nobodys(&self) -> bool {
        self.without == 0 && self.reasons.is_empty()
    }

    /// Some answered, and the others did not: what those hold is not known.
    pub(super) fn is_silence_beside_answers(&self) -> bool {
        self.without > 0 && !self.is_damaged
    }

    pub(super) fn into_error(self, timeline: TimelineId) -> AgentError {
        let next = match self.is_damaged {
            true => {
                "The stream begins when a region gives it. Put an intact version of what is damaged in its place; or stop the \
                 agent, remove it, and start the agent again: the server sends it once more, as far as it keeps it"
            }
            false => "The stream begins when a region that holds it answers",
        };
        cannot_read(timeline, self.range, &self.reasons.join("; "), next)
    }
}

/// Whether a region answered, with an object that is of no use.
fn is_damage(error: &AgentError) -> bool {
    match error {
        AgentError::Object { .. } => true,
        AgentError::Store(error) => error.kind() == ErrorKind::Corrupt,
        _ => false,
    }
}

pub(super) fn cannot_read(timeline: TimelineId, range: LsnRange, why: &str, next: &str) -> AgentError {
    AgentError::Trouble {
        what: format!(
            "timeline {timeline}: cannot read {range} back to compare it with the server's WAL ({why})"
        ),
        next: next.into(),
    }
}

#[cfg(test)]
#[path = "overlap_tests.rs"]
mod tests;
