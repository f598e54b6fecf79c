//! Follows records through WAL and says where each one begins: pure, fed with bytes.
//!
//! The scanner reports where a record ends, and where the last one of a page begins. To learn that of the others without
//! slowing down the scan, the scanner's state before the page is kept, and the page is read again in steps of eight bytes
//! (no record is shorter than its 24 byte header) when somebody wants to know.

use bytes::Bytes;
use highwater_format::{
    Identity, Lsn, Time, TimelineId,
    walscan::{WalDamage, WalEvent, WalScanner},
};

use crate::plan::Mark;

/// A step in which at most one record can end.
const STEP: usize = 8;

/// Whether the reader has enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Continue,
    Stop,
}

/// An event, and what is needed to find where its record begins.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) event: WalEvent,
    before: WalScanner,
    page: Bytes,
}

impl Seen {
    /// The end of the record.
    pub(super) fn end(&self) -> Lsn {
        end_of(&self.event)
    }

    /// The record.
    pub(super) fn mark(&self) -> Mark {
        let end = self.end();
        let record = record_ending(&self.before, &self.page, end);
        Mark {
            start: record.map_or_else(|| self.before.last_record_end(), |record| record.start),
            end,
            time: time_of(&self.event),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Trace {
    scanner: WalScanner,
    page_size: u64,
    around: Option<Around>,
}

/// The search for the records around an LSN.
#[derive(Debug)]
struct Around {
    lsn: Lsn,
    /// The latest page in which a record ended before the search became exact.
    last: Option<(WalScanner, Bytes, Lsn)>,
    before: Option<Mark>,
    at_or_after: Option<Mark>,
}

impl Trace {
    pub(super) fn new(start: Lsn, identity: &Identity, timeline: TimelineId) -> Self {
        let scanner = WalScanner::new(
            start,
            identity.segment_size,
            Some(timeline),
            Some(identity.major()),
        )
        .with_page_size(identity.wal_block_size)
        .with_system_id(identity.system_id);
        Self {
            scanner,
            page_size: u64::from(identity.wal_block_size),
            around: None,
        }
    }

    /// Also finds the records around `lsn`, and stops when they are known.
    pub(super) fn look_around(&mut self, lsn: Lsn) {
        self.around = Some(Around {
            lsn,
            last: None,
            before: None,
            at_or_after: None,
        });
    }

    /// What [`Trace::look_around`] asked for.
    pub(super) fn around(&self) -> (Option<Mark>, Option<Mark>) {
        let Some(around) = &self.around else {
            return (None, None);
        };
        let earlier = around.last.as_ref();
        let earlier = earlier.and_then(|(before, page, end)| record_ending(before, page, *end));
        (around.before.or(earlier), around.at_or_after)
    }

    /// Reads on.
    pub(super) fn feed(
        &mut self,
        data: &Bytes,
        on: &mut impl FnMut(Seen) -> Flow,
    ) -> Result<Flow, WalDamage> {
        let mut at = 0;
        while at < data.len() {
            let position = self.scanner.position();
            let page_end = position.align_down(self.page_size).saturating_add(self.page_size);
            let length = usize::try_from(page_end.distance_from(position)).unwrap_or(usize::MAX);
            let page = data.slice(at..data.len().min(at.saturating_add(length)));
            at += page.len();
            let flow = if self.around.as_ref().is_some_and(|around| page_end > around.lsn) {
                self.read_exactly(&page)?
            } else {
                self.read_page(&page, on)?
            };
            if flow == Flow::Stop {
                return Ok(flow);
            }
        }
        Ok(Flow::Continue)
    }

    fn read_page(&mut self, page: &Bytes, on: &mut impl FnMut(Seen) -> Flow) -> Result<Flow, WalDamage> {
        let before = self.scanner.clone();
        let mut events = Vec::new();
        let outcome = self.scanner.feed(page, &mut |event| events.push(event));
        let end = self.scanner.last_record_end();
        if let Some(around) = self.around.as_mut().filter(|_| end > before.last_record_end()) {
            around.last = Some((before.clone(), page.clone(), end));
        }
        for event in events {
            if on(Seen {
                event,
                before: before.clone(),
                page: page.clone(),
            }) == Flow::Stop
            {
                return Ok(Flow::Stop);
            }
        }
        outcome.map(|()| Flow::Continue)
    }

    /// Reads a page record by record.
    fn read_exactly(&mut self, page: &[u8]) -> Result<Flow, WalDamage> {
        for step in page.chunks(STEP) {
            let (record, outcome) = step_on(&mut self.scanner, step);
            outcome?;
            let (Some(mark), Some(around)) = (record, self.around.as_mut()) else {
                continue;
            };
            if mark.start >= around.lsn {
                around.at_or_after = Some(mark);
                return Ok(Flow::Stop);
            }
            around.before = Some(mark);
        }
        Ok(Flow::Continue)
    }
}

/// Feeds a step in which at most one record can end; that record, with its time if it ends a transaction.
fn step_on(scanner: &mut WalScanner, step: &[u8]) -> (Option<Mark>, Result<(), WalDamage>) {
    let before = scanner.last_record_end();
    let mut time = None;
    let outcome = scanner.feed(step, &mut |event| time = end_time_of(&event));
    let end = scanner.last_record_end();
    let start = scanner.last_record_start().filter(|_| end != before);
    (start.map(|start| Mark { start, end, time }), outcome)
}

/// The record that ends at `end`.
fn record_ending(before: &WalScanner, page: &[u8], end: Lsn) -> Option<Mark> {
    let mut scanner = before.clone();
    for step in page.chunks(STEP) {
        let (record, outcome) = step_on(&mut scanner, step);
        if let Some(record) = record.filter(|record| record.end == end) {
            return Some(record);
        }
        outcome.ok()?;
    }
    None
}

fn end_of(event: &WalEvent) -> Lsn {
    match event {
        WalEvent::Commit { end, .. }
        | WalEvent::RestorePoint { end, .. }
        | WalEvent::ParameterChange { end, .. }
        | WalEvent::Switch { end }
        | WalEvent::Checkpoint { end, .. }
        | WalEvent::EndOfRecovery { end, .. } => *end,
    }
}

fn time_of(event: &WalEvent) -> Option<Time> {
    match event {
        WalEvent::RestorePoint { time, .. } => Some(*time),
        event => end_time_of(event),
    }
}

/// Of transaction ends.
fn end_time_of(event: &WalEvent) -> Option<Time> {
    match event {
        WalEvent::Commit { time, .. } => Some(*time),
        _ => None,
    }
}
