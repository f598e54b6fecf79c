//! WAL as a server writes it: pages with headers, records with checksums and back links, commits.
//!
//! A [`Version`] is one course that a timeline took: its bytes from the start of a segment on. Only the server's
//! current one grows; a server that was rolled back goes on with a copy, so that the bytes that were sent are
//! all still here to be compared with.

use std::ops::Range;

use crate::rng::Rng;

pub(crate) const PAGE: u64 = 8192;
pub(crate) const VERSION: u32 = 170_002;
const MAGIC: u16 = 0xD116;
const RECORD_HEADER: usize = 24;
/// `PAGE` header flags and record fields as in `access/xlog_internal.h` and `access/xlogrecord.h`.
const CONTINUES: u16 = 1;
const LONG: u16 = 2;
const XACT: u8 = 1;
const HEAP: u8 = 10;
const XLOG: u8 = 0;
const SWITCH: u8 = 0x40;
/// Bodies are slices of a block of noise: cheap to write, and neither all equal nor incompressible.
const NOISE: usize = 64 * 1024;

/// The end of a record: where a crash, a promotion or a snapshot can cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) at: u64,
    /// Start of the record that ends here.
    previous: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Version {
    pub(crate) timeline: u32,
    /// LSN of the first byte; the start of a segment.
    pub(crate) start: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) cuts: Vec<Cut>,
    /// What follows each switch, up to the end of its segment.
    unused: Vec<Range<u64>>,
    system_id: u64,
    segment: u64,
    previous: u64,
    noise: Vec<u8>,
}

impl Version {
    /// The first timeline that a server has, with nothing on it yet.
    pub(crate) fn new(timeline: u32, start: u64, segment: u64, system_id: u64, rng: &mut Rng) -> Self {
        Self {
            timeline,
            start,
            bytes: Vec::new(),
            cuts: Vec::new(),
            unused: Vec::new(),
            system_id,
            segment,
            previous: start - 64,
            noise: noise(rng),
        }
    }

    /// The same up to `cut`, to be continued differently, on the same timeline or on a new one, which begins
    /// with the segment that holds the place.
    pub(crate) fn branch(&self, timeline: u32, cut: Cut, rng: &mut Rng) -> Self {
        let start = match timeline == self.timeline {
            true => self.start,
            false => cut.at - cut.at % self.segment,
        };
        let (from, to) = ((start - self.start) as usize, (cut.at - self.start) as usize);
        Self {
            timeline,
            start,
            bytes: self.bytes[from..to].to_vec(),
            cuts: self
                .cuts
                .iter()
                .filter(|at| at.at <= cut.at && at.at > start)
                .copied()
                .collect(),
            unused: self
                .unused
                .iter()
                .filter(|unused| unused.end <= cut.at && unused.end > start)
                .cloned()
                .collect(),
            system_id: self.system_id,
            segment: self.segment,
            previous: cut.previous,
            noise: noise(rng),
        }
    }

    pub(crate) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// What nobody reads of the segment of `lsn`, if it lies behind a switch.
    pub(crate) fn unused_at(&self, lsn: u64) -> Option<Range<u64>> {
        self.unused.iter().find(|unused| unused.contains(&lsn)).cloned()
    }

    /// The same, if the server has written nothing since the switch.
    pub(crate) fn unused_at_its_end(&self) -> Option<Range<u64>> {
        let last = self.unused.last()?;
        (last.end == self.end() && !last.is_empty()).then(|| last.clone())
    }

    /// The bytes from `from` to `to`, as far as this version has them.
    pub(crate) fn slice(&self, from: u64, to: u64) -> &[u8] {
        let at = |lsn: u64| (lsn.saturating_sub(self.start) as usize).min(self.bytes.len());
        &self.bytes[at(from)..at(to).max(at(from))]
    }

    /// Writes records of `bytes` altogether, and a commit.
    pub(crate) fn write(&mut self, bytes: u64, micros: i64, rng: &mut Rng) {
        let end = self.end() + bytes;
        while self.end() < end {
            let length = (end - self.end()).min(rng.pick(&[40, 300, 4000, 9000, 20_000]));
            let mut body = rng.next().to_le_bytes().to_vec();
            let from = rng.index(NOISE - length as usize);
            body.extend_from_slice(&self.noise[from..from + length as usize]);
            self.record(HEAP, 0, &body);
        }
        let mut body = vec![255, 8];
        body.extend_from_slice(&micros.to_le_bytes());
        self.record(XACT, 0, &body);
    }

    /// `pg_switch_wal()`: the rest of the segment is zeros.
    pub(crate) fn switch(&mut self) {
        self.record(XLOG, SWITCH, &[]);
        let end = self.end().next_multiple_of(self.segment);
        self.unused.push(self.end()..end);
        self.bytes.resize((end - self.start) as usize, 0);
        if let Some(cut) = self.cuts.last_mut() {
            cut.at = end;
        }
    }

    fn record(&mut self, manager: u8, info: u8, body: &[u8]) {
        let padded = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(padded, 0);
        if self.end().is_multiple_of(PAGE) {
            self.page_header(0);
        }
        let start = self.end();
        let length = (RECORD_HEADER + body.len()) as u32;
        let mut record = Vec::with_capacity(length as usize);
        record.extend_from_slice(&length.to_le_bytes());
        record.extend_from_slice(&7_u32.to_le_bytes());
        record.extend_from_slice(&self.previous.to_le_bytes());
        record.extend_from_slice(&[info, manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend_from_slice(&crc.to_le_bytes());
        record.extend_from_slice(body);
        self.emit(&record);
        let padded = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(padded, 0);
        self.previous = start;
        self.cuts.push(Cut {
            at: self.end(),
            previous: start,
        });
    }

    fn emit(&mut self, mut record: &[u8]) {
        while !record.is_empty() {
            if self.end().is_multiple_of(PAGE) {
                self.page_header(record.len() as u32);
            }
            let room = (PAGE - self.end() % PAGE) as usize;
            let (now, later) = record.split_at(room.min(record.len()));
            self.bytes.extend_from_slice(now);
            record = later;
        }
    }

    fn page_header(&mut self, remaining: u32) {
        let address = self.end();
        let long = address.is_multiple_of(self.segment);
        let flags = if remaining > 0 { CONTINUES } else { 0 } | if long { LONG } else { 0 };
        self.bytes.extend_from_slice(&MAGIC.to_le_bytes());
        self.bytes.extend_from_slice(&flags.to_le_bytes());
        self.bytes.extend_from_slice(&self.timeline.to_le_bytes());
        self.bytes.extend_from_slice(&address.to_le_bytes());
        self.bytes.extend_from_slice(&remaining.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        if long {
            self.bytes.extend_from_slice(&self.system_id.to_le_bytes());
            self.bytes.extend_from_slice(&(self.segment as u32).to_le_bytes());
            self.bytes.extend_from_slice(&(PAGE as u32).to_le_bytes());
        }
    }
}

fn noise(rng: &mut Rng) -> Vec<u8> {
    let mut noise = Vec::with_capacity(NOISE);
    while noise.len() < NOISE {
        let word = rng.next().to_le_bytes();
        for _ in 0..16 {
            noise.extend_from_slice(&word);
        }
    }
    noise
}

#[cfg(test)]
mod tests {
    use highwater_format::walscan::WalScanner;
    use highwater_format::{Lsn, SegmentSize, TimelineId};

    use super::*;

    #[test]
    fn what_is_written_is_wal() {
        let mut rng = Rng::new(1);
        let size = SegmentSize::new(1 << 20).unwrap();
        let mut first = Version::new(1, 1 << 24, 1 << 20, 42, &mut rng);
        for _ in 0..40 {
            first.write(60_000, 1_000_000, &mut rng);
        }
        first.switch();
        first.write(100_000, 2_000_000, &mut rng);
        let cut = first.cuts[first.cuts.len() - 3];
        let mut second = first.branch(4, cut, &mut rng);
        second.write(50_000, 3_000_000, &mut rng);
        for version in [first, second] {
            let timeline = TimelineId::new(version.timeline);
            let mut scanner = WalScanner::new(Lsn(version.start), size, timeline, Some(17));
            let mut events = 0;
            scanner.feed(&version.bytes, &mut |_| events += 1).unwrap();
            assert_eq!(scanner.last_record_end(), Lsn(version.end()));
            assert!(events >= 1);
        }
    }
}
