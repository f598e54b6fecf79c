//! Where a region's WAL ends, when some of it is on record as lost.

use std::sync::Arc;

use highwater_format::{ClusterName, Gap, SystemId, Time};

use highwater_store::{FaultyStore, MemoryStore, Object, PutMode};

use super::*;

const MIB: u64 = 1 << 20;

struct Archive {
    store: MemoryStore,
    layout: Layout,
}

impl Archive {
    fn new() -> Self {
        Self {
            store: MemoryStore::new("a"),
            layout: Layout::new("orders".parse::<ClusterName>().unwrap(), SystemId(7)),
        }
    }

    async fn put(&self, key: String, object: Object) {
        self.store.put(&key, object, PutMode::Overwrite).await.unwrap();
    }

    async fn segments(&self, timeline: u32, numbers: std::ops::Range<u64>) {
        let timeline = TimelineId::new(timeline).unwrap();
        for number in numbers {
            let name = SegmentName { timeline, number };
            self.put(self.layout.segment(name, size()), Object::new("x"))
                .await;
        }
    }

    async fn gap(&self, timeline: u32, start: u64, end: u64) {
        let gap = Gap {
            timeline: TimelineId::new(timeline).unwrap(),
            start: Lsn(start * MIB),
            end: Lsn(end * MIB),
            reason: "slot lost".into(),
            recorded_at: Time::UNIX_EPOCH,
            unreplayable: false,
        };
        let (key, object) = crate::gap::encode(&self.layout, &gap).unwrap();
        self.put(key, object).await;
    }

    async fn pulse(&self, stored: u64) {
        let pulse = Pulse {
            timeline: TimelineId::FIRST,
            server_time: Time::UNIX_EPOCH,
            wal_end: Lsn(stored * MIB),
            durable_lsn: Lsn(stored * MIB),
            stored_lsn: Lsn(stored * MIB),
            last_commit: None,
            instance: "x".into(),
            sequence: 1,
            quorum: None,
            interval_ms: None,
            waiting_ms: None,
            answered_at: None,
        };
        self.put(self.layout.pulse(), Object::new(records::encode(&pulse).unwrap()))
            .await;
    }

    /// Timeline and megabyte.
    async fn end(&self) -> (u32, u64) {
        let end = position(&self.store, &self.layout, size())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(end.lsn.0 % MIB, 0);
        (end.timeline.get(), end.lsn.0 / MIB)
    }
}

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

#[tokio::test]
async fn i5_a_region_counts_past_a_gap_only_with_the_record() {
    let archive = Archive::new();
    archive.segments(1, 3..6).await;
    archive.segments(1, 9..11).await;
    assert_eq!(archive.end().await, (1, 6));
    archive.gap(1, 6, 9).await;
    assert_eq!(archive.end().await, (1, 11));
    // The pulse shortens the listing, wherever it points to.
    for stored in [5, 6, 8, 9, 10] {
        archive.pulse(stored).await;
        assert_eq!(archive.end().await, (1, 11), "pulse at {stored}");
    }
}

/// Uploads run in parallel: an agent that dies may have stored a later object without an earlier one.
#[tokio::test]
async fn i5_what_lies_behind_a_hole_does_not_count() {
    let archive = Archive::new();
    archive.segments(1, 3..5).await;
    archive.segments(1, 6..8).await;
    assert_eq!(archive.end().await, (1, 5));
    archive.segments(1, 5..6).await;
    assert_eq!(archive.end().await, (1, 8));
}

/// A listing that lags does not show the newest keys; what the pulse claims is looked for by name.
#[tokio::test]
async fn fault_38_segments_that_a_listing_hides_are_found_by_name() {
    let archive = Archive::new();
    archive.segments(1, 3..9).await;
    archive.pulse(9).await;
    let store = FaultyStore::new(Arc::new(archive.store));
    for number in 6..9 {
        let name = SegmentName {
            timeline: TimelineId::FIRST,
            number,
        };
        store.hide(archive.layout.segment(name, size()));
    }
    let end = position(&store, &archive.layout, size()).await.unwrap().unwrap();
    assert_eq!(end.lsn, Lsn(9 * MIB));
    // What is really gone is not found, whatever the pulse claims.
    let gone = SegmentName {
        timeline: TimelineId::FIRST,
        number: 7,
    };
    store.delete(&archive.layout.segment(gone, size())).await.unwrap();
    let end = position(&store, &archive.layout, size()).await.unwrap().unwrap();
    assert_eq!(end.lsn, Lsn(7 * MIB));
}

#[tokio::test]
async fn a_record_with_nothing_behind_it_yet_is_the_end() {
    let archive = Archive::new();
    archive.segments(1, 3..6).await;
    archive.gap(1, 6, 9).await;
    assert_eq!(archive.end().await, (1, 9));
    // The next timeline begins with a gap.
    archive.gap(2, 9, 12).await;
    assert_eq!(archive.end().await, (2, 12));
    archive.segments(2, 12..13).await;
    assert_eq!(archive.end().await, (2, 13));
}

#[tokio::test]
async fn a_file_of_somebody_else_does_not_hold_a_listing_in_one_place() {
    let archive = Archive::new();
    archive.segments(1, 3..5).await;
    archive.segments(2, 5..6).await;
    let odd = format!("{}\u{dc}.txt", archive.layout.timeline_dir(TimelineId::FIRST));
    archive.put(odd, Object::new("x")).await;
    let found = timelines(&archive.store, &archive.layout).await.unwrap();
    assert_eq!(found, [TimelineId::FIRST, TimelineId::new(2).unwrap()]);
}

/// A region that lags is compared again and again with one that holds days of chunks.
#[tokio::test]
async fn chunks_that_segments_made_superfluous_are_not_listed() {
    let archive = Archive::new();
    let timeline = TimelineId::FIRST;
    archive.segments(1, 1..4).await;
    for number in 0..5000_u64 {
        let start = MIB + number * 600;
        let range = LsnRange::new(Lsn(start), Lsn(start + 600));
        archive
            .put(archive.layout.tail(timeline, range), Object::new("x"))
            .await;
    }
    let open = LsnRange::new(Lsn(4 * MIB), Lsn(4 * MIB + 7));
    archive
        .put(archive.layout.tail(timeline, open), Object::new("x"))
        .await;
    let store = FaultyStore::new(Arc::new(archive.store));
    let held = coverage(&store, &archive.layout, size(), timeline, onward(Lsn(MIB)))
        .await
        .unwrap();
    assert_eq!(held.runs(), [LsnRange::new(Lsn(MIB), open.end)]);
    assert_eq!(held.pieces().count(), 4);
    assert_eq!(store.calls(highwater_store::Operation::List), 2);
}

/// A region that was away for long is filled from one that holds more than can be listed at once.
#[tokio::test]
async fn what_comes_next_is_listed_and_not_all_that_follows() {
    let archive = Archive::new();
    archive.segments(1, 1..3_000).await;
    let store = FaultyStore::new(Arc::new(archive.store));
    let (held, until) = held_next(
        &store,
        &archive.layout,
        size(),
        TimelineId::FIRST,
        Lsn(7 * MIB),
        100,
    )
    .await
    .unwrap();
    assert_eq!(held.contiguous_end(Lsn(7 * MIB)), Lsn(107 * MIB));
    assert_eq!(until, Lsn(107 * MIB));
    // Nothing is there before it: what is listed begins with what comes first.
    let (held, until) = held_next(&store, &archive.layout, size(), TimelineId::FIRST, Lsn::ZERO, 100)
        .await
        .unwrap();
    assert_eq!((held.next_start(Lsn::ZERO), until), (Lsn(MIB), Lsn(101 * MIB)));
    let calls = store.calls(highwater_store::Operation::List);
    assert_eq!(calls, 2 + 3, "segments and gaps, and the chunks of what is open");
}
