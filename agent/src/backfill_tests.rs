//! A region is filled only from what another one really holds.

use highwater_config::Policy;
use highwater_format::{Identity, SegmentSize, SystemId};
use highwater_store::{MemoryStore, PutMode, Store};

use super::*;
use crate::budget::Budget;
use crate::places::Places;
use crate::progress::Progress;
use crate::region::Archive;
use crate::state::State;
use crate::window::Window;

const MIB: u64 = 1 << 20;

fn at(timeline: u32, megabyte: u64) -> Position {
    Position {
        timeline: TimelineId::new(timeline).unwrap(),
        lsn: Lsn(megabyte * MIB),
    }
}

/// Two regions; the first has got to 6 MiB on timeline 2, which left timeline 1 at 4 MiB.
fn shared(stores: [&Arc<MemoryStore>; 2]) -> Shared {
    let segment_size = SegmentSize::new(MIB).unwrap();
    let identity = Identity {
        system_id: SystemId(7),
        server_version: 150_020,
        segment_size,
        wal_block_size: 8192,
        block_size: 8192,
    };
    let names = ["a", "b"];
    let region = |index: usize| {
        Arc::new(Region {
            name: names[index].into(),
            index,
            store: stores[index].clone(),
            quick: stores[index].clone(),
        })
    };
    let state = State::new(names.map(str::to_owned));
    let shared = Shared {
        archive: Archive::new("orders".parse().unwrap(), identity, vec![region(0), region(1)]),
        segment_size,
        window: Arc::new(Window::new(2, 100 * MIB, at(2, 6))),
        progress: Arc::new(Progress::new(Policy::Any, 2, state.clone())),
        state,
        uploads: 4,
        in_flight: 100 * MIB,
        server_timeline: TimelineId::new(2).unwrap(),
        budget: Budget::new(100 * MIB),
        origin: at(2, 6),
        acknowledged: None,
        histories: Arc::new([]),
        places: Places::new("orders/7/", "this"),
    };
    shared.progress.stored(0, at(2, 6));
    shared
}

async fn put(store: &MemoryStore, key: String, content: &'static str) {
    store
        .put(&key, Object::new(content), PutMode::Create)
        .await
        .unwrap();
}

/// The other region has lost the end of timeline 1: its history says where timeline 2 begins, and that must not carry
/// anybody over what is missing.
#[tokio::test(start_paused = true)]
async fn i5_no_region_enters_a_timeline_before_the_end_of_the_one_before_is_there() {
    let (a, b) = (Arc::new(MemoryStore::new("a")), Arc::new(MemoryStore::new("b")));
    let shared = shared([&a, &b]);
    let (layout, region) = (&shared.archive.layout, &shared.archive.regions[1]);
    let two = TimelineId::new(2).unwrap();
    put(&a, layout.history(two), "1\t0/400000\tpromoted\n").await;
    let range = LsnRange::new(at(2, 4).lsn, at(2, 6).lsn);
    put(&a, layout.tail(two, range), "wal").await;

    let reached = advance(&shared, region, at(1, 3)).await.unwrap();
    assert_eq!(reached, at(1, 3));
    assert_eq!(shared.progress.position(1), None);
    assert!(b.keys().is_empty(), "{:?}", b.keys());

    // With all of timeline 1 it goes on, history first.
    let reached = advance(&shared, region, at(1, 4)).await.unwrap();
    assert_eq!(reached, at(2, 4));
    assert_eq!(b.keys(), [layout.history(two)]);
}
