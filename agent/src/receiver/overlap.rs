//! Comparing what the server sends again with what was sealed before (I6).
//!
//! Every stream begins at the start of an object of which a part is already sealed: in the window, or in
//! the regions. Those bytes must come again unchanged. A difference means that the server was rolled back.

use std::sync::Arc;

use bytes::Bytes;
use highwater_format::{Lsn, LsnRange, TimelineId};

use crate::archived::{ReadBack, append, read_back};
use crate::budget::Charge;
use crate::error::{AgentError, Result};
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
    next: Lsn,
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
            next: range.start,
            charge,
            withholds: false,
            equal: Bytes::new(),
        }
    }

    /// Reads the sealed bytes of `range` from the window and the regions.
    pub(super) async fn load(shared: &Shared, timeline: TimelineId, range: LsnRange) -> Result<Self> {
        let held = Self::load_if_held(shared, timeline, range).await?;
        held.ok_or_else(|| cannot_read(timeline, range, "no region that was asked holds it"))
    }

    /// The same; none if the regions answered that they do not hold all of it.
    pub(super) async fn load_if_held(
        shared: &Shared,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<Option<Self>> {
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
            match from_regions(shared, timeline, missing).await? {
                Some(read) => plain.extend_from_slice(&read.plain),
                None => return Ok(None),
            }
        }
        Ok(Some(Self::of(timeline, range, plain, Some(charge))))
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
            return Ok([Bytes::new(), data]);
        }
        if data.len() < expected {
            return Ok([Bytes::new(), Bytes::new()]);
        }
        // They are equal: what was held back need not have been kept.
        Ok([std::mem::take(&mut self.equal), data.slice(expected..)])
    }

    /// What lies past the overlap is not looked at.
    fn compare(&mut self, data: &[u8]) -> Result<()> {
        let expected = self.plain.get(self.compared..).unwrap_or_default();
        let length = expected.len().min(data.len());
        let (expected, got) = (&expected[..length], &data[..length]);
        if expected != got {
            let same = expected.iter().zip(got).take_while(|(a, b)| a == b).count();
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
        What::History { .. } | What::Gap { .. } => None,
    };
    items.filter_map(covers).collect()
}

/// Reads `range` from whichever region holds it; none if those that should answered that they do not.
async fn from_regions(shared: &Shared, timeline: TimelineId, range: LsnRange) -> Result<Option<ReadBack>> {
    let (mut asked, mut reasons) = (0, Vec::new());
    // One that was not read yet, or has less, is not waited for.
    let reaches = |index| {
        let at = shared.progress.position(index);
        at.is_some_and(|at| at.timeline > timeline || (at.timeline == timeline && at.lsn >= range.end))
    };
    for region in shared
        .archive
        .regions
        .iter()
        .filter(|region| reaches(region.index))
    {
        match read_back(shared, &*region.quick, timeline, range).await {
            Ok(Some(read)) => return Ok(Some(read)),
            Ok(None) => asked += 1,
            Err(error) => reasons.push(format!("{}: {error}", region.name)),
        }
    }
    match reasons.is_empty() && asked > 0 {
        true => Ok(None),
        false => Err(cannot_read(timeline, range, &reasons.join("; "))),
    }
}

fn cannot_read(timeline: TimelineId, range: LsnRange, why: &str) -> AgentError {
    AgentError::Trouble {
        what: format!(
            "timeline {timeline}: cannot read {range} back to compare it with the server's WAL ({why})"
        ),
        next: "The stream begins when a region that holds it answers".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;

    fn overlap(plain: &[u8]) -> Overlap {
        let range = LsnRange {
            start: Lsn(100),
            end: Lsn(100 + plain.len() as u64),
        };
        Overlap::of(TimelineId::FIRST, range, plain.to_vec(), None)
    }

    fn charged(plain: &[u8], budget: &Arc<Budget>) -> Overlap {
        let charge = Some(budget.charge(plain.len() as u64));
        Overlap {
            charge,
            ..overlap(plain)
        }
    }

    #[test]
    fn what_was_compared_is_no_longer_charged() {
        let (budget, plain) = (Budget::new(1 << 30), vec![7; 3 * STEP + 5]);
        let mut plainly = charged(&plain, &budget);
        for left in [2 * STEP + 5, STEP + 5, 5] {
            plainly.pass(Bytes::from(vec![7; STEP])).unwrap();
            assert_eq!(budget.used(), left as u64);
        }
        plainly.pass(Bytes::from_static(&[7; 9])).unwrap();
        assert_eq!(budget.used(), 0);
        // The place of a difference counts what was let go of.
        let mut other = charged(&plain, &budget);
        other.pass(Bytes::from(vec![7; 2 * STEP])).unwrap();
        let Err(AgentError::Diverged { at, .. }) = other.pass(Bytes::from_static(b"\x07x")) else {
            panic!("must differ")
        };
        assert_eq!(at, Lsn(100 + 2 * STEP as u64 + 1));
        drop(other);
        // What is withheld is charged until it has been passed on.
        let mut withheld = charged(&plain, &budget).withholding();
        let [equal, rest] = withheld.pass(Bytes::from(vec![7; plain.len() + 1])).unwrap();
        assert_eq!((equal.len(), rest.len()), (plain.len(), 1));
        assert_eq!(budget.used(), plain.len() as u64);
        withheld.pass(Bytes::from_static(b"more")).unwrap();
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn equal_bytes_pass_in_any_pieces() {
        let mut overlap = overlap(b"abcdef");
        overlap.compare(b"ab").unwrap();
        overlap.compare(b"cdefgh").unwrap();
        overlap.compare(b"anything").unwrap();
    }

    #[test]
    fn the_first_differing_byte_is_named() {
        let mut overlap = overlap(b"abcdef");
        overlap.compare(b"abc").unwrap();
        let Err(AgentError::Diverged { at, .. }) = overlap.compare(b"dXf") else {
            panic!("must differ")
        };
        assert_eq!(at, Lsn(104));
    }

    #[test]
    fn nothing_of_a_new_timeline_passes_before_all_it_shares_was_compared() {
        let bytes = Bytes::from_static;
        let mut common = overlap(b"abcdef").withholding();
        for piece in [b"ab", b"cd"] {
            assert_eq!(common.pass(bytes(piece)).unwrap(), [bytes(b""), bytes(b"")]);
        }
        assert_eq!(
            common.pass(bytes(b"efgh")).unwrap(),
            [bytes(b"abcdef"), bytes(b"gh")]
        );
        assert_eq!(common.pass(bytes(b"ij")).unwrap(), [bytes(b""), bytes(b"ij")]);
        let mut rolled_back = overlap(b"abcdef").withholding();
        rolled_back.pass(bytes(b"abc")).unwrap();
        assert!(rolled_back.pass(bytes(b"dXf")).is_err());
        let mut nothing = overlap(b"").withholding();
        assert_eq!(nothing.pass(bytes(b"ab")).unwrap(), [bytes(b""), bytes(b"ab")]);
    }
}
