use std::sync::Arc;

use highwater_format::{ClusterName, SystemId, Time};
use highwater_store::{FaultyStore, MemoryStore, Object, PutMode};

use super::*;

const MIB: u64 = 1 << 20;

fn layout() -> Layout {
    Layout::new("orders".parse::<ClusterName>().unwrap(), SystemId(7))
}

async fn put(store: &MemoryStore, key: String) {
    store.put(&key, Object::new("xy"), PutMode::Create).await.unwrap();
}

fn range(start: u64, end: u64) -> LsnRange {
    LsnRange::new(Lsn(start), Lsn(end))
}

#[tokio::test]
async fn chunks_are_listed_only_where_segments_leave_something_open() {
    let (layout, store) = (layout(), MemoryStore::new("a"));
    let (timeline, size) = (TimelineId::FIRST, SegmentSize::new(MIB).unwrap());
    for number in [3, 5] {
        put(&store, layout.segment(SegmentName { timeline, number }, size)).await;
    }
    for chunk in [
        range(3 * MIB, 3 * MIB + 10),
        range(4 * MIB, 4 * MIB + 7),
        range(4 * MIB + 7, 5 * MIB),
        range(5 * MIB, 5 * MIB + 9),
        range(6 * MIB, 6 * MIB + 9),
    ] {
        put(&store, layout.tail(timeline, chunk)).await;
    }
    put(&store, layout.gap(timeline, range(MIB, 2 * MIB))).await;
    let listing = Listing {
        layout: &layout,
        size,
    };
    let all = async |from: u64, until: u64| {
        let slice = listing.slice(&store, timeline, range(from, until), ALL);
        slice.await.unwrap().pieces
    };
    let runs = |pieces: &[Piece]| pieces.iter().copied().collect::<Coverage>().runs();
    let wal = all(0, u64::MAX).await;
    assert_eq!(runs(&wal), [range(3 * MIB, 6 * MIB + 9)]);
    assert_eq!(wal.len(), 5, "{wal:?}");
    assert_eq!(
        runs(&all(5 * MIB + 3, u64::MAX).await),
        [range(5 * MIB, 6 * MIB + 9)]
    );
    assert_eq!(
        runs(&all(3 * MIB + 3, 4 * MIB + 7).await),
        [range(3 * MIB, 4 * MIB + 7)]
    );
    assert_eq!(runs(&all(4 * MIB, 5 * MIB + 1).await), [range(4 * MIB, 6 * MIB)]);
    // Where the segment object cannot be used its chunks count.
    let hidden = listing
        .around(&store, timeline, range(3 * MIB, 4 * MIB))
        .await
        .unwrap();
    let hidden: Vec<LsnRange> = hidden.iter().map(|piece| piece.range).collect();
    assert_eq!(hidden, [range(3 * MIB, 4 * MIB), range(3 * MIB, 3 * MIB + 10)]);
}

#[tokio::test]
async fn objects_of_base_backups_are_told_apart() {
    let (layout, store) = (layout(), MemoryStore::new("a"));
    let id = |seconds: i64| {
        BackupId::new(
            TimelineId::FIRST,
            Lsn(0x200_0028),
            Time::from_unix_micros(seconds * 1_000_000),
        )
    };
    for key in [
        layout.pack(&id(1), 0),
        layout.pack(&id(1), 2),
        layout.manifest(&id(1)),
        layout.backup(&id(1)),
        layout.pack(&id(2), 0),
    ] {
        put(&store, key).await;
    }
    let listing = Listing {
        layout: &layout,
        size: SegmentSize::DEFAULT,
    };
    let found = listing.backups(&store).await.unwrap();
    let first = Base {
        visible: true,
        manifest: true,
        packs: BTreeMap::from([(0, 2), (2, 2)]),
    };
    assert_eq!(found.get(&id(1)), Some(&first));
    assert!(
        found
            .get(&id(2))
            .is_some_and(|base| !base.visible && !base.manifest)
    );
}

/// A long archive, of which a region that is read again and again needs little.
#[tokio::test]
async fn a_range_costs_what_it_holds_and_not_what_follows() {
    let (layout, inner) = (layout(), MemoryStore::new("a"));
    let (timeline, size) = (TimelineId::FIRST, SegmentSize::new(MIB).unwrap());
    for number in (10..9_000).filter(|number| *number != 21) {
        put(&inner, layout.segment(SegmentName { timeline, number }, size)).await;
        let start = number * MIB;
        put(&inner, layout.tail(timeline, range(start, start + 9))).await;
    }
    put(&inner, layout.tail(timeline, range(21 * MIB, 22 * MIB))).await;
    let store = FaultyStore::new(Arc::new(inner));
    let listing = Listing {
        layout: &layout,
        size,
    };
    let lists = || store.calls(Operation::List);
    let few = listing.coverage(&store, timeline, range(20 * MIB + 5, 22 * MIB + 9));
    assert_eq!(few.await.unwrap().runs(), [range(20 * MIB, 23 * MIB)]);
    assert_eq!(lists(), 2);
    let around = listing
        .around(&store, timeline, range(20 * MIB + 5, 21 * MIB))
        .await;
    assert_eq!(around.unwrap().len(), 2);
    assert_eq!(lists(), 4);
    let slice = listing
        .slice(&store, timeline, range(15 * MIB, u64::MAX), 10)
        .await
        .unwrap();
    assert_eq!((slice.pieces.len(), slice.until), (11, Lsn(26 * MIB)));
    assert_eq!(lists(), 6);
}

/// Where segments are too large for an object everything is in chunks.
#[tokio::test]
async fn a_slice_ends_between_objects() {
    let (layout, store) = (layout(), MemoryStore::new("a"));
    let (timeline, size) = (TimelineId::FIRST, SegmentSize::new(128 * MIB).unwrap());
    for number in 0..1_000 {
        let start = 70 * MIB + number * MIB;
        put(&store, layout.tail(timeline, range(start, start + MIB))).await;
    }
    let listing = Listing {
        layout: &layout,
        size,
    };
    let mut cursor = Cursor::new(listing, &store, timeline, Lsn(64 * MIB));
    let (mut at, mut seen) = (Lsn(64 * MIB), Vec::new());
    while at < Lsn::MAX {
        let until = cursor.look(at, 7).await.unwrap();
        assert!(until > at && until.0.is_multiple_of(64 * MIB) || until == Lsn::MAX);
        let taken = cursor.take(until);
        assert!(taken.len() <= 64);
        assert!(
            taken
                .iter()
                .all(|piece| piece.range.start >= at && piece.range.end <= until)
        );
        seen.extend(taken);
        at = until;
    }
    assert_eq!(seen.len(), 1_000);
    assert_eq!(
        seen.into_iter().collect::<Coverage>().runs(),
        [range(70 * MIB, 1_070 * MIB)]
    );
}
