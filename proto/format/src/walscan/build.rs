//! Writes WAL for tests, the way a server would: pages, records across them, switches, torn records.
//!
//! What it writes was not produced by the scanner's code; only the layout constants are shared.

use crate::lsn::Lsn;
use crate::time::Time;
use crate::walpage::page_magic;

use super::WalEvent;

pub(super) const PAGE: u64 = 8192;
pub(super) const SEGMENT: u64 = 1 << 20;
pub(super) const SYSTEM_ID: u64 = 7_560_123_456_789_012_345;

/// A record to be written.
pub(super) struct Plan {
    pub(super) manager: u8,
    pub(super) info: u8,
    pub(super) xid: u32,
    pub(super) body: Vec<u8>,
}

pub(super) struct WalBuilder {
    pub(super) start: Lsn,
    pub(super) bytes: Vec<u8>,
    pub(super) timeline: u32,
    pub(super) major: u32,
    /// What a reader must report.
    pub(super) events: Vec<WalEvent>,
    /// Start and end of every record, the end without padding.
    pub(super) records: Vec<(Lsn, Lsn)>,
    previous: u64,
    torn: bool,
}

impl WalBuilder {
    pub(super) fn new(start: u64, major: u32) -> Self {
        assert_eq!(start % PAGE, 0);
        Self {
            start: Lsn(start),
            bytes: Vec::new(),
            timeline: 1,
            major,
            events: Vec::new(),
            records: Vec::new(),
            previous: start - 32,
            torn: false,
        }
    }

    pub(super) fn at(&self) -> u64 {
        self.start.0 + self.bytes.len() as u64
    }

    fn page_header(&mut self, remaining: u32) {
        let at = self.at();
        let long = at.is_multiple_of(SEGMENT);
        let torn = std::mem::take(&mut self.torn);
        // As a server without a running base backup: bit 2 on every page.
        let info = u16::from(remaining > 0) | u16::from(long) << 1 | 1 << 2 | u16::from(torn) << 3;
        self.bytes.extend(page_magic(self.major).unwrap().to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend(at.to_le_bytes());
        self.bytes.extend(remaining.to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend(SYSTEM_ID.to_le_bytes());
            self.bytes.extend((SEGMENT as u32).to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    /// Pads to where a record may begin, with a page header if that is the start of a page.
    pub(super) fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        if self.at().is_multiple_of(PAGE) {
            self.page_header(0);
        }
    }

    fn encode(&self, plan: &Plan) -> Vec<u8> {
        let mut record = Vec::new();
        record.extend((24 + plan.body.len() as u32).to_le_bytes());
        record.extend(plan.xid.to_le_bytes());
        record.extend(self.previous.to_le_bytes());
        record.extend([plan.info, plan.manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&plan.body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(&plan.body);
        record
    }

    /// Writes a record; returns where PostgreSQL says that it ends.
    pub(super) fn record(&mut self, plan: &Plan) -> Lsn {
        self.align();
        let start = self.at();
        let record = self.encode(plan);
        let mut rest = &record[..];
        while !rest.is_empty() {
            if self.at().is_multiple_of(PAGE) {
                self.page_header(rest.len() as u32);
            }
            let room = (PAGE - self.at() % PAGE) as usize;
            let (now, later) = rest.split_at(rest.len().min(room));
            self.bytes.extend(now);
            rest = later;
        }
        self.previous = start;
        self.records.push((Lsn(start), Lsn(self.at())));
        Lsn(self.at().next_multiple_of(8))
    }

    /// A record without meaning, of this many bytes.
    pub(super) fn filler(&mut self, length: usize) {
        let body = (0..length.saturating_sub(24))
            .map(|i| (i * 7 + length) as u8)
            .collect();
        self.record(&Plan {
            manager: 10,
            info: 0x80,
            xid: 900,
            body,
        });
    }

    pub(super) fn commit(&mut self, xid: u32, pg_micros: i64, abort: bool) {
        let mut body = vec![255, 8];
        body.extend(pg_micros.to_le_bytes());
        let end = self.record(&Plan {
            manager: 1,
            info: if abort { 0x20 } else { 0 },
            xid,
            body,
        });
        self.events.push(WalEvent::Commit {
            end,
            time: Time::from_pg(pg_micros),
            xid,
            abort,
        });
    }

    /// `COMMIT PREPARED` with lists of these lengths before the transaction id.
    pub(super) fn commit_prepared(&mut self, xid: u32, pg_micros: i64, counts: [u32; 4]) {
        let stats = if self.major >= 18 { 16 } else { 12 };
        let mut main = pg_micros.to_le_bytes().to_vec();
        let flags = [1 << 1, 1 << 2, 1 << 8, 1 << 3];
        let present = flags
            .iter()
            .zip(counts)
            .filter(|(_, count)| *count > 0)
            .fold(0, |all, (flag, _)| all | flag);
        main.extend((present | 1_u32 | 1 << 4 | 1 << 7).to_le_bytes());
        main.extend([0xAA; 8]);
        for (count, item) in counts
            .into_iter()
            .zip([4, 12, stats, 16])
            .filter(|(count, _)| *count > 0)
        {
            main.extend(count.to_le_bytes());
            main.extend((0..count * item).map(|i| i as u8));
        }
        main.extend(xid.to_le_bytes());
        main.extend(b"a global id\0");
        let mut body = vec![253, 1, 0];
        match u8::try_from(main.len()) {
            Ok(short) => body.extend([255, short]),
            Err(_) => {
                body.push(254);
                body.extend((main.len() as u32).to_le_bytes());
            }
        }
        body.extend(main);
        let end = self.record(&Plan {
            manager: 1,
            info: 0x80 | 0x30,
            xid: 0,
            body,
        });
        self.events.push(WalEvent::Commit {
            end,
            time: Time::from_pg(pg_micros),
            xid,
            abort: false,
        });
    }

    /// `pg_switch_wal()`: the rest of the segment stays zero.
    pub(super) fn switch(&mut self) {
        self.record(&Plan {
            manager: 0,
            info: 0x40,
            xid: 0,
            body: Vec::new(),
        });
        let end = self.at().next_multiple_of(8).next_multiple_of(SEGMENT);
        self.bytes.resize((end - self.start.0) as usize, 0);
        self.events.push(WalEvent::Switch { end: Lsn(end) });
    }

    /// The server crashed when it had written only the first page of a long record, and went on after it.
    pub(super) fn torn_record(&mut self) {
        self.align();
        let body = vec![3; PAGE as usize * 2];
        let record = self.encode(&Plan {
            manager: 10,
            info: 0,
            xid: 1,
            body,
        });
        let room = (PAGE - self.at() % PAGE) as usize;
        self.bytes.extend(&record[..room]);
        self.torn = true;
    }

    /// Until everything written is followed by the padding that belongs to it.
    pub(super) fn finish(mut self) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self
    }

    pub(super) fn end(&self) -> Lsn {
        Lsn(self.at())
    }
}
