//! WAL that nobody reads: behind a segment switch, up to the end of the segment.
//!
//! Only there two courses of one history may differ. A primary sends zeros; a standby that has replayed the switch sends the whole segment
//! at once, with what its recycled file held before where the zeros have not come yet, and keeps that when it is promoted or loses its
//! primary then. The archive holds zeros. Owns: where that is, by the archive's own bytes, and comparing a server's WAL with them.
//!
//! Where the switch itself lies before what is compared, the server may have taken another course there: what it sends is left over
//! only as long as no page of it names its own address on the timeline. The pages of a recycled file name other addresses, or
//! these on the timeline before, where a standby has left that.

use std::ops::Range;

use highwater_format::walpage::PageHeader;
use highwater_format::walscan::WalScanner;
use highwater_format::{Identity, Lsn, LsnRange, TimelineId};

/// The parts of some archived WAL that nobody reads, in order. The last may reach beyond it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unused(Vec<Rest>);

/// What follows one switch, up to the end of its segment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Rest {
    pub(crate) range: LsnRange,
    /// Where the switch itself was not read.
    pub(crate) unseen: Option<Unseen>,
}

/// How WAL would look that a server has written behind a switch which nobody saw.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Unseen {
    pub(crate) timeline: TimelineId,
    /// Bytes per page.
    pub(crate) page: u32,
}

impl Rest {
    /// Where `sent`, from `at` on, holds WAL that the server has written here: it has not switched where the archive has.
    pub(crate) fn first_wal(&self, at: Lsn, sent: &[u8]) -> Option<Lsn> {
        let unseen = self.unseen?;
        let page = u64::from(unseen.page);
        let sent_range = LsnRange::new(at, at + sent.len() as u64);
        let here = self.range.intersect(sent_range)?;
        let pages = (here.start.0.next_multiple_of(page)..here.end.0).step_by(usize::try_from(page).ok()?);
        let names_itself = |start: &Lsn| {
            let offset = usize::try_from(start.distance_from(at)).ok();
            let header = offset.and_then(|offset| PageHeader::read(sent.get(offset..)?));
            header.is_some_and(|header| header.address == *start && header.timeline == unseen.timeline.get())
        };
        pages.map(Lsn).find(names_itself)
    }
}

impl Unused {
    /// Reads what the archive has from `start` on. Where that cannot be read as WAL, all of it counts as used.
    pub(crate) fn of(identity: &Identity, timeline: TimelineId, start: Lsn, archived: &[u8]) -> Self {
        let size = identity.segment_size;
        let (mut at, mut rest) = first_page(identity, start, archived);
        let mut ranges = Vec::new();
        let mut scanner = scanner(identity, timeline, at);
        while !rest.is_empty() {
            let end = size.segment_end(at);
            let length =
                usize::try_from(end.distance_from(at)).map_or(rest.len(), |left| left.min(rest.len()));
            let (segment, next) = rest.split_at(length);
            let is_read = scanner.feed(segment, &mut |_| {}).is_ok();
            let unseen = (!is_read).then_some(Unseen {
                timeline,
                page: identity.wal_block_size,
            });
            let unused = match is_read {
                true => scanner.unused().filter(|unused| unused.end > at),
                false => scanner.behind_unseen_switch(),
            };
            match unused {
                Some(unused) if is_read || is_zeros_from(segment, at, unused.start) => {
                    ranges.push(Rest {
                        range: unused,
                        unseen,
                    });
                }
                None if is_read => {}
                _ => break,
            }
            if !is_read {
                scanner = self::scanner(identity, timeline, end);
            }
            (at, rest) = (end, next);
        }
        Self(ranges)
    }

    /// The part that `at` lies in.
    pub(crate) fn around(&self, at: Lsn) -> Option<Rest> {
        self.0.iter().copied().find(|unused| unused.range.contains(at))
    }

    /// Where these, both from `at` on and of one length, first differ in what is used.
    pub(crate) fn first_difference(&self, at: Lsn, archived: &[u8], sent: &[u8]) -> Option<usize> {
        let length = archived.len().min(sent.len());
        let offset = |lsn: Lsn| {
            usize::try_from(lsn.0.saturating_sub(at.0)).map_or(length, |offset| offset.min(length))
        };
        let differs = |used: Range<usize>| {
            let (archived, sent) = (&archived[used.clone()], &sent[used.clone()]);
            let same = || archived.iter().zip(sent).take_while(|(a, b)| a == b).count();
            (archived != sent).then(|| used.start + same())
        };
        let mut from = 0;
        for unused in &self.0 {
            let (start, end) = (offset(unused.range.start), offset(unused.range.end));
            let written = || unused.first_wal(at, &sent[..length]).map(offset);
            if let Some(place) = differs(from..start.max(from)).or_else(written) {
                return Some(place);
            }
            from = end.max(from);
        }
        differs(from..length)
    }
}

/// A reader of this server's records from `start` on.
pub(crate) fn scanner(identity: &Identity, timeline: TimelineId, start: Lsn) -> WalScanner {
    WalScanner::new(
        start,
        identity.segment_size,
        Some(timeline),
        Some(identity.major()),
    )
    .with_page_size(identity.wal_block_size)
    .with_system_id(identity.system_id)
}

/// Nobody knows where a record begins inside a page.
fn first_page<'a>(identity: &Identity, start: Lsn, archived: &'a [u8]) -> (Lsn, &'a [u8]) {
    let page = u64::from(identity.wal_block_size);
    let skipped = start.0.next_multiple_of(page) - start.0;
    let rest = usize::try_from(skipped)
        .ok()
        .and_then(|skipped| archived.get(skipped..));
    (start + skipped, rest.unwrap_or_default())
}

/// A switch that was not seen leaves nothing but zeros.
fn is_zeros_from(segment: &[u8], at: Lsn, from: Lsn) -> bool {
    let offset = usize::try_from(from.distance_from(at)).unwrap_or(usize::MAX);
    segment
        .get(offset..)
        .is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
#[path = "unused_tests.rs"]
mod tests;
