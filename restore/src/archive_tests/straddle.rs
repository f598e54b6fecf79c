//! A transaction end that began in one segment and ends in the next.

use std::sync::Arc;

use highwater_format::{Backup, Kind, Lsn, LsnRange, SegmentName, Time, TimelineId, encode};
use highwater_store::{MemoryStore, Store};

use crate::target::{Request, Target};

use super::archive::*;
use super::assert_stops_at;

const PAGE: u64 = 8192;

/// Writes pages and records as a server does, from the start of a segment on.
struct Writer {
    bytes: Vec<u8>,
    previous: Lsn,
}

impl Writer {
    fn new() -> Self {
        let mut writer = Self {
            bytes: Vec::new(),
            previous: Lsn(START.0 - 32),
        };
        writer.page(0);
        writer
    }

    fn at(&self) -> Lsn {
        START.saturating_add(self.bytes.len() as u64)
    }

    /// The headers of the first page of a segment, and of the others.
    fn page(&mut self, rest: usize) {
        let at = self.at();
        let long = at.0.is_multiple_of(SEGMENT);
        self.bytes.extend(&FIRST[..2]);
        let info = u16::from(rest > 0) | u16::from(long) << 1 | 1 << 2;
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(1u32.to_le_bytes());
        self.bytes.extend(at.0.to_le_bytes());
        self.bytes.extend(u32::try_from(rest).unwrap().to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend(&FIRST[24..40]);
        }
    }

    fn record(&mut self, manager: u8, info: u8, xid: u32, body: &[u8]) -> Line {
        let (lsn, prev) = (self.at(), self.previous);
        let mut record = u32::try_from(24 + body.len()).unwrap().to_le_bytes().to_vec();
        record.extend(xid.to_le_bytes());
        record.extend(prev.0.to_le_bytes());
        record.extend([info, manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(body);
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            if self.at().0.is_multiple_of(PAGE) {
                self.page(rest.len());
            }
            let room = usize::try_from(PAGE - self.at().0 % PAGE).unwrap();
            let (now, later) = rest.split_at(rest.len().min(room));
            self.bytes.extend(now);
            rest = later;
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.previous = lsn;
        Line {
            lsn,
            prev,
            time: None,
            xid: Some(xid),
        }
    }

    fn commit(&mut self, xid: u32, time: Time) -> Line {
        let mut body = vec![255, 8];
        body.extend(time.to_pg().to_le_bytes());
        self.record(1, 0, xid, &body)
    }

    /// Records that mean nothing, up to exactly `until`, which lies on none of the first 64 bytes of a page.
    fn fill(&mut self, until: Lsn) {
        while self.at() < until {
            if self.at().0.is_multiple_of(PAGE) {
                self.page(0);
            }
            let page_end = self.at().0 - self.at().0 % PAGE + PAGE;
            let room = until.0.min(page_end) - self.at().0;
            // Never leaves less than a record needs.
            let length = if room > 4096 { 2048 } else { room };
            self.record(10, 0x80, 900, &vec![7; usize::try_from(length - 24).unwrap()]);
        }
        assert_eq!(self.at(), until);
    }
}

/// Region `a` alone: the first segment as one object, what follows it in chunks of `chunk` bytes.
async fn archive_of(wal: &[u8], commits: &[(Lsn, Time)], stop_lsn: Lsn, chunk: u64) -> Archive {
    let archive = Archive {
        a: Arc::new(MemoryStore::new("a")),
        b: Arc::new(MemoryStore::new("b")),
        end: START.saturating_add(wal.len() as u64),
    };
    let store = &archive.a;
    archive.documents(store).await;
    store.delete(&layout().history(second_timeline())).await.unwrap();
    store.delete(&layout().pulse()).await.unwrap();
    let backup = Backup { stop_lsn, ..backup() };
    put(store, &layout().backup(&backup.id), encode(&backup).unwrap()).await;
    let second = Lsn(8 * SEGMENT);
    let name = SegmentName {
        timeline: TimelineId::FIRST,
        number: 7,
    };
    let whole = container(
        Kind::Segment,
        TimelineId::FIRST,
        LsnRange::new(START, second),
        wal,
        commits,
    );
    put(store, &layout().segment(name, size()), whole).await;
    let mut at = second;
    while at < archive.end {
        let range = LsnRange::new(at, at.saturating_add(chunk).min(archive.end));
        let sealed = container(Kind::Tail, TimelineId::FIRST, range, wal, commits);
        put(store, &layout().tail(TimelineId::FIRST, range), sealed).await;
        at = range.end;
    }
    archive
}

/// Wherever the first transaction that is too late lies behind it, and however many objects its own record spans.
#[tokio::test]
async fn the_last_transaction_in_time_is_kept_though_it_began_in_the_segment_before() {
    let (kept, late) = (at("2026-11-20T15:22:31Z"), at("2026-11-20T15:22:35Z"));
    let boundary = Lsn(8 * SEGMENT);
    for (chunk, objects) in [(1000_u64, 2..14), (16, 6..20)] {
        for object in objects {
            let mut writer = Writer::new();
            writer.fill(Lsn(START.0 + 4096));
            let stop_lsn = writer.at();
            writer.fill(Lsn(boundary.0 - 8));
            let last = writer.commit(742, kept);
            let kept_end = writer.at();
            let place = boundary.0 + (object * chunk).next_multiple_of(8);
            if place < kept_end.0 + 24 {
                continue;
            }
            writer.fill(Lsn(place));
            writer.commit(743, late);
            let commits = [(kept_end, kept), (writer.at(), late)];
            let archive = archive_of(&writer.bytes, &commits, stop_lsn, chunk).await;
            let target = Target::Time(at("2026-11-20T15:22:33Z"));
            let plan = archive.plan(&Request::to(target)).await.unwrap();
            let case = format!("object {object} of {chunk} bytes");
            assert_eq!(plan.target.stop.last_commit, Some(kept), "{case}");
            assert_stops_at(&plan, &last);
        }
    }
}
