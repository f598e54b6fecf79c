//! Reads a stream of WAL as it arrives: checks every record and reports the few that matter.
//!
//! Owns: following records across pages and segments, the checks that PostgreSQL itself would make when it replays
//! (page headers, lengths, back links, CRC), and the events. Does not own: the bytes; nothing is kept of a record
//! but a small head, and nothing is allocated per record, because every WAL byte passes through here.
//!
//! Invariants: the same bytes cut in any way give the same events and the same end; after damage the scanner stays
//! stopped and repeats it.
//!
//! Zeros where a record should begin are reported as damage that [`WalDamage::is_end_of_wal`] tells apart: in a
//! stream they are wrong, in a segment that was padded to its full size they are where the WAL ends.

use crate::lsn::{Lsn, LsnRange, SegmentSize, SystemId};
use crate::timeline::TimelineId;
use crate::walpage::{
    DEFAULT_PAGE_SIZE, LONG_HEADER, MAX_RECORD, PageHeader, RECORD_HEADER, RECORD_HEADER_IN_CRC,
    RECORD_HEADER_LEN, RecordHeader, major_of_magic, page_magic,
};

mod batch;
#[cfg(test)]
mod build;
mod damage;
mod event;
mod interest;
mod page;

use batch::Batch;
pub use damage::{Damage, WalDamage};
pub use event::WalEvent;
use interest::{Interest, event_of, is_switch};

/// Records begin at multiples of this, `MAXALIGN` on every 64-bit server.
const ALIGNMENT: u8 = 8;

#[derive(Debug, Clone)]
enum State {
    /// A record begins here, after padding.
    Boundary,
    /// Part of a record's header is here.
    Header {
        start: Lsn,
        bytes: [u8; RECORD_HEADER],
        filled: usize,
    },
    /// A record's body arrives.
    Body(Record),
    /// The rest of a record whose beginning was not seen.
    Unseen { left: u32 },
    /// The rest of a segment after a switch.
    Unused { until: Lsn },
}

/// A record of which not everything has arrived.
#[derive(Debug, Clone)]
struct Record {
    start: Lsn,
    bytes: [u8; RECORD_HEADER],
    left: u32,
    crc: u32,
    interest: Option<Interest>,
}

/// An incremental reader of WAL. See the module.
#[derive(Debug, Clone)]
pub struct WalScanner {
    segment_size: SegmentSize,
    page_size: u32,
    highest_timeline: Option<TimelineId>,
    system_id: Option<SystemId>,
    magic: Option<u16>,
    /// Of the last page; timelines never go back.
    timeline: Option<TimelineId>,
    position: Lsn,
    /// Bytes of the current page still to come after its header; 0 means that a header comes next.
    page_left: usize,
    page_header: [u8; LONG_HEADER],
    page_header_filled: usize,
    first_page: bool,
    state: State,
    previous: Option<Lsn>,
    last_record_end: Lsn,
    unused: Option<LsnRange>,
    batch: Batch,
    /// Records before this were found wrong together; which one is found by taking them singly.
    one_by_one_until: Lsn,
    damage: Option<WalDamage>,
}

impl WalScanner {
    /// Begins at `start`: the beginning of a page, where the rest of a record from an earlier page is passed over
    /// unchecked, or any place where a record begins.
    ///
    /// `timeline`: the timeline being read; pages copied from its ancestors are accepted, later ones are not.
    /// `major`: the server's major version; without it the first page decides.
    #[must_use]
    pub fn new(
        start: Lsn,
        segment_size: SegmentSize,
        timeline: Option<TimelineId>,
        major: Option<u32>,
    ) -> Self {
        let mut scanner = Self {
            segment_size,
            page_size: DEFAULT_PAGE_SIZE,
            highest_timeline: timeline,
            system_id: None,
            magic: major.and_then(page_magic),
            timeline: None,
            position: start,
            page_left: 0,
            page_header: [0; LONG_HEADER],
            page_header_filled: 0,
            first_page: true,
            state: State::Boundary,
            previous: None,
            last_record_end: start,
            unused: None,
            batch: Batch::new(DEFAULT_PAGE_SIZE),
            one_by_one_until: Lsn::ZERO,
            damage: None,
        };
        scanner.at_start();
        scanner
    }

    /// What follows the last switch that was read, up to the end of its segment. PostgreSQL never reads it.
    #[must_use]
    pub fn unused(&self) -> Option<LsnRange> {
        self.unused
    }

    /// The rest of a segment that holds zeros where reading began, or right behind a record whose beginning was not seen: behind a
    /// switch before that, PostgreSQL never reads it. Only who knows that nothing is missing there can tell it from damage.
    #[must_use]
    pub fn behind_unseen_switch(&self) -> Option<LsnRange> {
        let damage = self.damage.as_ref()?;
        let (start, end) = (damage.lsn, self.segment_size.segment_end(damage.lsn));
        let begins_segment = self.segment_size.segment_start(start) == start;
        let may_be = damage.is_end_of_wal() && self.previous.is_none() && !begins_segment;
        may_be.then(|| LsnRange::new(start, end))
    }

    /// For servers built with another `wal_block_size` (1 to 64 KiB); the default is 8192. Call it before feeding.
    #[must_use]
    pub fn with_page_size(mut self, bytes: u32) -> Self {
        self.page_size = bytes.clamp(1024, 65_536).next_power_of_two();
        self.batch = Batch::new(self.page_size);
        self.at_start();
        self
    }

    /// Only a page can begin inside a record that was not seen; elsewhere the caller vouches for a record.
    fn at_start(&mut self) {
        self.page_left = self.left_on_page();
        self.first_page = self.page_left == 0;
    }

    /// Also refuses segments of another cluster.
    #[must_use]
    pub fn with_system_id(mut self, system_id: SystemId) -> Self {
        self.system_id = Some(system_id);
        self
    }

    /// The next byte to be fed.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The end of the last whole and checked record, where the next one begins: at most 7 bytes of padding beyond
    /// [`position`](Self::position). The start until a record was seen.
    #[must_use]
    pub fn last_record_end(&self) -> Lsn {
        self.last_record_end
    }

    /// Where that record begins, behind a page header: what PostgreSQL calls its `ReadRecPtr`. `None` until a record was seen.
    #[must_use]
    pub fn last_record_start(&self) -> Option<Lsn> {
        self.previous
    }

    /// The timeline that the last page header names.
    #[must_use]
    pub fn timeline(&self) -> Option<TimelineId> {
        self.timeline
    }

    /// The server's major version: as given, or by the pages seen.
    #[must_use]
    pub fn major(&self) -> Option<u32> {
        self.magic.and_then(major_of_magic)
    }

    /// Reads on. `data` are the bytes right after those fed before.
    ///
    /// # Errors
    /// [`WalDamage`] when the bytes are not WAL that PostgreSQL would replay. Events before it were reported.
    pub fn feed(&mut self, data: &[u8], on: &mut impl FnMut(WalEvent)) -> Result<(), WalDamage> {
        if let Some(damage) = &self.damage {
            return Err(damage.clone());
        }
        let outcome = self.read(data, on);
        if let Err(damage) = &outcome {
            self.damage = Some(damage.clone());
        }
        outcome
    }

    fn read(&mut self, mut data: &[u8], on: &mut impl FnMut(WalEvent)) -> Result<(), WalDamage> {
        while !data.is_empty() {
            if let State::Unused { until } = self.state {
                data = self.pass_unused(data, until);
            } else if self.page_left == 0 {
                let used = self.read_page_header(data)?;
                data = &data[used..];
            } else {
                let (page, rest) = data.split_at(data.len().min(self.page_left));
                let left = self.page_left - page.len();
                self.read_page(page, on)?;
                self.page_left = left;
                data = rest;
            }
        }
        Ok(())
    }

    /// Reads bytes that lie within one page. The position moves with every piece taken.
    fn read_page(&mut self, mut page: &[u8], on: &mut impl FnMut(WalEvent)) -> Result<(), WalDamage> {
        while !page.is_empty() {
            let used = match &mut self.state {
                State::Boundary => self.begin_record(page, on)?,
                State::Header { bytes, filled, .. } => {
                    let wanted = page.len().min(RECORD_HEADER - *filled);
                    bytes[*filled..*filled + wanted].copy_from_slice(&page[..wanted]);
                    *filled += wanted;
                    self.advance(wanted);
                    self.header_complete(on)?;
                    wanted
                }
                State::Body(record) => {
                    let used = record.take(page);
                    self.advance(used);
                    self.body_complete(on)?;
                    used
                }
                State::Unseen { left } => {
                    let used = bounded(*left, page.len());
                    *left -= u32::try_from(used).unwrap_or(*left);
                    if *left == 0 {
                        self.state = State::Boundary;
                    }
                    self.advance(used);
                    used
                }
                State::Unused { .. } => {
                    self.advance(page.len());
                    page.len()
                }
            };
            page = &page[used..];
        }
        Ok(())
    }

    /// At a place where a record begins: passes padding, and takes the record at once when all of it is here.
    #[inline]
    fn begin_record(&mut self, page: &[u8], on: &mut impl FnMut(WalEvent)) -> Result<usize, WalDamage> {
        let padding = padding_after(self.position);
        if padding > 0 {
            let used = padding.min(page.len());
            self.advance(used);
            return Ok(used);
        }
        let batch = self.read_batch(page, on);
        if batch > 0 {
            return Ok(batch);
        }
        let start = self.position;
        let Some(bytes) = page.first_chunk::<RECORD_HEADER>() else {
            self.state = State::Header {
                start,
                bytes: [0; RECORD_HEADER],
                filled: 0,
            };
            return Ok(0);
        };
        let header = RecordHeader::read(bytes);
        self.check_record_header(start, &header)?;
        let length = header.total_len as usize;
        let Some(body) = page.get(RECORD_HEADER..length) else {
            self.state = State::Body(self.open_record(start, *bytes, &header));
            self.advance(RECORD_HEADER);
            return Ok(RECORD_HEADER);
        };
        self.advance(length);
        let end = self.finish_record(start, bytes, crc32c::crc32c(body))?;
        if let Some(event) = event_of(&header, self.layout(), body, end) {
            on(event);
        }
        Ok(length)
    }

    fn header_complete(&mut self, on: &mut impl FnMut(WalEvent)) -> Result<(), WalDamage> {
        let State::Header {
            start,
            bytes,
            filled: RECORD_HEADER,
        } = self.state
        else {
            return Ok(());
        };
        let header = RecordHeader::read(&bytes);
        self.check_record_header(start, &header)?;
        self.state = State::Body(self.open_record(start, bytes, &header));
        self.body_complete(on)
    }

    fn open_record(&self, start: Lsn, bytes: [u8; RECORD_HEADER], header: &RecordHeader) -> Record {
        let left = header.total_len - RECORD_HEADER_LEN;
        Record {
            start,
            bytes,
            left,
            crc: 0,
            interest: Interest::new(header, self.layout()),
        }
    }

    fn body_complete(&mut self, on: &mut impl FnMut(WalEvent)) -> Result<(), WalDamage> {
        if !matches!(&self.state, State::Body(record) if record.left == 0) {
            return Ok(());
        }
        if let State::Body(record) = std::mem::replace(&mut self.state, State::Boundary) {
            let end = self.finish_record(record.start, &record.bytes, record.crc)?;
            if let Some(event) = record.interest.and_then(|interest| interest.event(end)) {
                on(event);
            }
        }
        Ok(())
    }

    /// All of a record has passed: its CRC decides. The position is where it ended.
    fn finish_record(
        &mut self,
        start: Lsn,
        bytes: &[u8; RECORD_HEADER],
        body_crc: u32,
    ) -> Result<Lsn, WalDamage> {
        let header = RecordHeader::read(bytes);
        let crc = crc32c::crc32c_append(body_crc, &bytes[..RECORD_HEADER_IN_CRC]);
        if crc != header.crc {
            return Err(Damage::Checksum {
                stored: header.crc,
                computed: crc,
            }
            .at(start));
        }
        self.previous = Some(start);
        let mut end = self.position + padding_after(self.position) as u64;
        if is_switch(&header) {
            if end.align_down(self.segment_size.bytes()) != end {
                end = self.segment_size.segment_end(end);
            }
            self.unused = Some(LsnRange::new(self.position, end));
            self.state = State::Unused { until: end };
        }
        self.last_record_end = end;
        Ok(end)
    }

    #[inline]
    fn check_record_header(&self, start: Lsn, header: &RecordHeader) -> Result<(), WalDamage> {
        check_length(header.total_len).map_err(|damage| damage.at(start))?;
        let found = header.previous;
        match self.previous {
            Some(expected) if found != expected => Err(Damage::BackLink { found, expected }.at(start)),
            None if found >= start => Err(Damage::BackLinkAhead { found }.at(start)),
            _ => Ok(()),
        }
    }

    /// Which record layouts apply; those of the newest version differ least from what may come.
    fn layout(&self) -> u32 {
        self.major().unwrap_or(18)
    }

    #[inline]
    fn advance(&mut self, bytes: usize) {
        self.position = self.position + bytes as u64;
    }

    fn left_on_page(&self) -> usize {
        let page = u64::from(self.page_size);
        let into = self.position.distance_from(self.position.align_down(page));
        if into == 0 {
            0
        } else {
            usize::try_from(page - into).unwrap_or(0)
        }
    }

    /// Passes what follows a switch. Its pages are zeros without headers.
    fn pass_unused<'a>(&mut self, data: &'a [u8], until: Lsn) -> &'a [u8] {
        let left = until.distance_from(self.position);
        let used = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
        self.advance(used);
        if self.position == until {
            self.state = State::Boundary;
            self.page_left = 0;
        }
        &data[used..]
    }
}

impl Record {
    fn take(&mut self, page: &[u8]) -> usize {
        let used = bounded(self.left, page.len());
        let bytes = &page[..used];
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        if let Some(interest) = &mut self.interest {
            interest.take(bytes);
        }
        self.left -= u32::try_from(used).unwrap_or(self.left);
        used
    }
}

#[inline]
fn check_length(total_len: u32) -> Result<(), Damage> {
    match total_len {
        0 => Err(Damage::Zeros),
        RECORD_HEADER_LEN..=MAX_RECORD => Ok(()),
        found => Err(Damage::RecordLength { found }),
    }
}

/// Bytes from a position to where the next record may begin.
#[inline]
fn padding_after(position: Lsn) -> usize {
    let [lowest, ..] = position.0.to_le_bytes();
    usize::from((ALIGNMENT - lowest % ALIGNMENT) % ALIGNMENT)
}

/// The smaller of a record's count and a slice's length.
fn bounded(count: u32, length: usize) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX).min(length)
}

#[cfg(test)]
#[path = "walscan_tests.rs"]
mod tests;
