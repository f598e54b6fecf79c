//! One region's order: what must be there before anything that follows is stored.

use highwater_config::Policy;
use highwater_format::{
    Codec, Gap, Header, History, Identity, Kind, Lsn, LsnRange, SystemId, Time, TimelineId,
};
use highwater_store::{Fault, FaultyStore, MemoryStore, Operation, PutMode, Rule, Store as _};

use super::*;

pub(super) const MIB: u64 = 1 << 20;

pub(super) fn range(start: u64, end: u64) -> LsnRange {
    LsnRange {
        start: Lsn(start * MIB),
        end: Lsn(end * MIB),
    }
}

pub(super) fn at(megabyte: u64) -> Position {
    Position {
        timeline: TimelineId::FIRST,
        lsn: Lsn(megabyte * MIB),
    }
}

/// One region over `store`, and everything around its pipeline.
pub(super) fn shared(store: Arc<FaultyStore>) -> (Shared, Arc<Region>) {
    let segment_size = SegmentSize::new(MIB).unwrap();
    let identity = Identity {
        system_id: SystemId(7),
        server_version: 150_020,
        segment_size,
        wal_block_size: 8192,
        block_size: 8192,
    };
    let region = Arc::new(Region::bare("a", 0, store));
    let state = State::new(["a".to_owned()]);
    let shared = Shared {
        archive: Archive::new("orders".parse().unwrap(), identity, vec![region.clone()]),
        segment_size,
        window: Arc::new(Window::new(1, 100 * MIB, at(1))),
        progress: Arc::new(Progress::new(Policy::All, 1, state.clone())),
        state,
        uploads: 4,
        in_flight: 100 * MIB,
        server: History::root(TimelineId::FIRST),
        budget: Budget::new(100 * MIB),
        origin: at(1),
        acknowledged: None,
        kept_from: None,
        histories: Arc::new([]),
        places: Places::new("orders/7/", "this"),
    };
    (shared, region)
}

pub(super) fn wal(shared: &Shared, range: LsnRange) -> Item {
    Item {
        key: shared.archive.layout.tail(TimelineId::FIRST, range),
        object: Object::new("wal"),
        what: What::Wal {
            timeline: TimelineId::FIRST,
            range,
            last_commit: None,
        },
        charge: None,
    }
}

fn gap(shared: &Shared, range: LsnRange) -> Item {
    let gap = Gap {
        timeline: TimelineId::FIRST,
        start: range.start,
        end: range.end,
        reason: "slot lost".into(),
        recorded_at: Time::UNIX_EPOCH,
        unreplayable: false,
    };
    let (key, object) = gap::encode(&shared.archive.layout, &gap).unwrap();
    Item {
        key,
        object,
        what: What::Gap {
            timeline: TimelineId::FIRST,
            range,
        },
        charge: None,
    }
}

/// What a region lacks before the next item has to come from another one, be the window ever so sure.
#[tokio::test(start_paused = true)]
async fn i5_nothing_behind_a_hole_in_the_window_is_stored_or_counts() {
    let memory = Arc::new(MemoryStore::new("a"));
    let (shared, region) = shared(Arc::new(FaultyStore::new(memory.clone())));
    let before = range(1, 2);
    for item in [wal(&shared, before), wal(&shared, range(3, 4))] {
        shared.window.push(item);
    }
    let uploader = Uploader::new(shared.clone(), region);
    let running = tokio::spawn(uploader.run(Some(Some(at(1))), CancellationToken::new()));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(
        memory.keys(),
        [shared.archive.layout.tail(TimelineId::FIRST, before)]
    );
    assert_eq!(shared.progress.position(0), Some(at(2)));
    assert!(!running.is_finished());
    running.abort();
}

/// A region that takes its time over the record holds nothing behind the gap meanwhile, and does not count as further.
#[tokio::test(start_paused = true)]
async fn i5_nothing_behind_a_gap_is_stored_before_its_record() {
    let memory = Arc::new(MemoryStore::new("a"));
    let store = Arc::new(FaultyStore::new(memory.clone()));
    store.inject(
        Rule::once(Fault::Delay(Duration::from_secs(60)))
            .on(Operation::Put)
            .key("/gap/"),
    );
    let (shared, region) = shared(store);
    let (before, lost, behind) = (range(1, 2), range(2, 5), range(5, 6));
    for item in [wal(&shared, before), gap(&shared, lost), wal(&shared, behind)] {
        shared.window.push(item);
    }
    let cancel = CancellationToken::new();
    let uploader = Uploader::new(shared.clone(), region);
    let running = tokio::spawn(uploader.run(Some(Some(at(1))), cancel.clone()));

    tokio::time::sleep(Duration::from_secs(30)).await;
    let layout = &shared.archive.layout;
    assert_eq!(memory.keys(), [layout.tail(TimelineId::FIRST, before)]);
    assert_eq!(shared.progress.position(0), Some(at(2)));

    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(
        memory.keys(),
        [
            layout.gap(TimelineId::FIRST, lost),
            layout.tail(TimelineId::FIRST, before),
            layout.tail(TimelineId::FIRST, behind),
        ]
    );
    assert_eq!(shared.progress.position(0), Some(at(6)));
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// Whoever lists a region takes its first object for the beginning: while that is on its way nothing else is stored.
#[tokio::test(start_paused = true)]
async fn i5_the_first_object_of_a_region_is_stored_alone() {
    let memory = Arc::new(MemoryStore::new("a"));
    let store = Arc::new(FaultyStore::new(memory.clone()));
    let (shared, region) = shared(store.clone());
    let (first, second) = (range(1, 2), range(2, 3));
    let layout = &shared.archive.layout;
    let key = layout.tail(TimelineId::FIRST, first);
    store.inject(
        Rule::once(Fault::Delay(Duration::from_secs(60)))
            .on(Operation::Put)
            .key(&key),
    );
    shared.window.push(wal(&shared, first));
    shared.window.push(wal(&shared, second));
    let cancel = CancellationToken::new();
    let running = tokio::spawn(Uploader::new(shared.clone(), region).run(Some(None), cancel.clone()));

    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(memory.keys().is_empty(), "{:?}", memory.keys());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(memory.keys(), [key, layout.tail(TimelineId::FIRST, second)]);
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// An object of the same WAL that lies behind a hole, and says something else than the stream: a chunk beside it has
/// another key, and is not stored.
#[tokio::test(start_paused = true)]
async fn i6_what_lies_behind_a_hole_is_compared_before_anything_is_stored_beside_it() {
    let memory = Arc::new(MemoryStore::new("a"));
    let store = Arc::new(FaultyStore::new(memory.clone()));
    let (shared, region) = shared(store.clone());
    let stray = tail(
        &shared,
        LsnRange::new(Lsn(2 * MIB), Lsn(2 * MIB + 8)),
        b"rollback",
    );
    memory
        .put(&stray.key, stray.object.clone(), PutMode::Create)
        .await
        .unwrap();
    let range = |from, to| LsnRange::new(Lsn(2 * MIB + from), Lsn(2 * MIB + to));
    let strays = Strays::find(&shared, &region, at(1)).await.unwrap();
    let same = tail(&shared, range(0, 4), b"roll");
    strays.agree(&shared, &region, &Arc::new(same)).await.unwrap();
    let beyond = tail(&shared, range(8, 12), b"else");
    strays.agree(&shared, &region, &Arc::new(beyond)).await.unwrap();
    let other = tail(&shared, range(2, 6), b"ld u");
    let error = strays
        .agree(&shared, &region, &Arc::new(other))
        .await
        .unwrap_err();
    assert!(matches!(error, AgentError::Conflict { .. }), "{error}");
    assert!(error.to_string().contains("0/200003"), "{error}");

    // What follows is stored faster than the object that is there already is read: nothing may lie behind that one then.
    let slow = Rule::times(1_000, Fault::Delay(Duration::from_secs(5)));
    store.inject(slow.on(Operation::Get));
    let next = tail(&shared, range(10, 14), b"next");
    let behind = next.key.clone();
    shared
        .window
        .push(wal(&shared, LsnRange::new(Lsn(MIB), Lsn(2 * MIB))));
    shared.window.push(tail(&shared, range(0, 10), b"rolled bac"));
    shared.window.push(next);
    let uploader = Uploader::new(shared.clone(), region);
    let run = uploader.run(Some(Some(at(1))), CancellationToken::new());
    let ended = tokio::time::timeout(Duration::from_secs(60), run)
        .await
        .expect("it stored beside the other course and went on");
    assert!(matches!(ended, Err(AgentError::Conflict { .. })), "{ended:?}");
    assert_eq!(shared.progress.position(0), Some(at(2)));
    assert!(
        !memory.keys().contains(&behind),
        "a listing carries over the other course"
    );
}

/// A store that checks what it reads says of a damaged object that it is corrupt, and of one that is gone that it is not there.
#[tokio::test]
async fn what_lies_behind_and_cannot_be_read_is_no_evidence() {
    let memory = Arc::new(MemoryStore::new("a"));
    let store = Arc::new(FaultyStore::new(memory.clone()));
    let (shared, region) = shared(store.clone());
    let range = |from, to| LsnRange::new(Lsn(2 * MIB + from), Lsn(2 * MIB + to));
    let stray = tail(&shared, range(0, 8), b"rollback");
    let put = memory.put(&stray.key, stray.object, PutMode::Create);
    put.await.unwrap();
    for kind in [
        highwater_store::ErrorKind::Corrupt,
        highwater_store::ErrorKind::NotFound,
    ] {
        let strays = Strays::find(&shared, &region, at(1)).await.unwrap();
        store.inject(Rule::once(Fault::FailBefore(kind)).on(Operation::Get));
        let item = Arc::new(tail(&shared, range(2, 6), b"ld u"));
        strays.agree(&shared, &region, &item).await.unwrap();
        assert_eq!(store.pending(), 0);
    }
}

/// An object that is damaged stands in the way: calls succeed, and the region fails all the same until it is removed.
#[tokio::test(start_paused = true)]
async fn a_pipeline_that_fails_is_not_well_because_a_call_succeeds() {
    let memory = Arc::new(MemoryStore::new("a"));
    let (mut shared, _) = shared(Arc::new(FaultyStore::new(memory.clone())));
    let region = Region::over(memory.clone(), "a".into(), 0, &shared.state, Some(1));
    let region = Arc::new(region);
    shared.archive.regions = vec![region.clone()];
    let item = wal(&shared, range(1, 2));
    let (key, damaged) = (item.key.clone(), Object::new(vec![0; 2]));
    memory.put(&key, damaged, PutMode::Create).await.unwrap();
    shared.window.push(item);
    let cancel = CancellationToken::new();
    let uploader = Uploader::new(shared.clone(), region.clone());
    let running = tokio::spawn(uploader.run(Some(None), cancel.clone()));
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        region.quick.head(&key).await.unwrap();
        let view = shared.state.snapshot().regions[0].clone();
        assert_eq!(view.state, RegionState::Failing);
        assert!(view.last_error.unwrap().contains(&key));
    }
    memory.delete(&key).await.unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let view = shared.state.snapshot().regions[0].clone();
    assert_eq!((view.state, view.last_error), (RegionState::Ok, None));
    assert_eq!(shared.progress.position(0), Some(at(2)));
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// A region that holds what the server has lost joins, and is slow: until it counts it waits, so that nobody takes the WAL
/// for lost.
#[tokio::test(start_paused = true)]
async fn i5_a_region_that_joins_waits_until_it_counts() {
    let memory = Arc::new(MemoryStore::new("a"));
    let store = Arc::new(FaultyStore::new(memory.clone()));
    let (mut shared, region) = shared(store.clone());
    let held = tail(&shared, LsnRange::new(Lsn(MIB), Lsn(MIB + 8)), b"the last");
    let put = memory.put(&held.key, held.object, PutMode::Create);
    put.await.unwrap();
    let end = Position {
        lsn: Lsn(MIB + 8),
        ..at(1)
    };
    let content = Bytes::from("1\t0/400000\tpromoted\n");
    shared.histories = Arc::new([(TimelineId::new(2).unwrap(), content)]);
    let slow = Rule::once(Fault::Delay(Duration::from_secs(60)));
    store.inject(slow.on(Operation::Put).key("/history"));
    shared.progress.server_lost(Some(at(1)));
    let cancel = CancellationToken::new();
    let uploader = Uploader::new(shared.clone(), region);
    let running = tokio::spawn(uploader.run(None, cancel.clone()));

    // It has been compared, as far as that is possible, and its histories are on their way.
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(store.pending(), 0);
    assert_eq!(shared.progress.position(0), None);
    assert_eq!(shared.progress.furthest_waiting(), Some(end));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(shared.progress.position(0), Some(end));
    assert_eq!(shared.progress.furthest_waiting(), None);
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// A history file that is cut off is the trouble of its region: the agent goes on, and that region does not count.
#[tokio::test(start_paused = true)]
async fn a_damaged_history_in_one_region_does_not_end_the_agent() {
    let memory = Arc::new(MemoryStore::new("a"));
    let (mut shared, region) = shared(Arc::new(FaultyStore::new(memory.clone())));
    let two = TimelineId::new(2).unwrap();
    let content = Bytes::from("1\t0/400000\tpromoted\n");
    let key = shared.archive.layout.history(two);
    let cut = Object::new(content.slice(..7));
    memory.put(&key, cut, PutMode::Create).await.unwrap();
    shared.histories = Arc::new([(two, content.clone())]);
    let uploader = Uploader::new(shared.clone(), region);
    let run = uploader.run(Some(Some(at(1))), CancellationToken::new());
    let ended = tokio::time::timeout(Duration::from_secs(60), run).await;
    assert!(ended.is_err(), "{ended:?}");
    let view = shared.state.snapshot().regions[0].clone();
    assert_eq!(view.state, RegionState::Failing);
    assert!(view.last_error.unwrap().contains(&key));
    assert_eq!(shared.progress.position(0), None);
    assert_eq!(memory.get(&key).await.unwrap(), content.slice(..7));
}

pub(super) fn tail(shared: &Shared, range: LsnRange, plain: &[u8]) -> Item {
    use highwater_format::{Codec, FrameEncoder, Header, Kind, seal};
    let system_id = shared.archive.identity.system_id;
    let header = Header::wal(Kind::Tail, Codec::None, system_id, TimelineId::FIRST, range);
    let frame = FrameEncoder::new(Codec::None).encode(plain).unwrap();
    Item {
        object: Object::new(seal(header, &[frame]).unwrap().bytes),
        ..wal(shared, range)
    }
}

/// Beside every node runs an agent: what another one has stored counts once the region is read again.
#[tokio::test(start_paused = true)]
async fn a_region_that_is_read_again_counts_for_what_others_have_stored_there() {
    let memory = Arc::new(MemoryStore::new("a"));
    let (shared, region) = shared(Arc::new(FaultyStore::new(memory.clone())));
    let part = |from, to, bytes| tail(&shared, LsnRange::new(Lsn(MIB + from), Lsn(MIB + to)), bytes);
    let place = |offset| Position {
        timeline: TimelineId::FIRST,
        lsn: Lsn(MIB + offset),
    };
    shared.window.push(part(0, 4, b"ours"));
    let cancel = CancellationToken::new();
    let uploader = Uploader::new(shared.clone(), region);
    let running = tokio::spawn(uploader.run(Some(Some(at(1))), cancel.clone()));
    let settled = || tokio::time::sleep(Duration::from_secs(30));
    settled().await;
    assert_eq!(shared.progress.position(0), Some(place(4)));

    for theirs in [part(4, 10, b"theirs"), part(10, 14, b"more")] {
        memory
            .put(&theirs.key, theirs.object, PutMode::Create)
            .await
            .unwrap();
    }
    settled().await;
    assert_eq!(shared.progress.position(0), Some(place(4)));
    // The stream cannot bring it: nobody waits for it to get there.
    shared.progress.server_lost(Some(place(4)));
    shared.progress.read_again();
    settled().await;
    assert_eq!(shared.progress.position(0), Some(place(14)));

    shared.window.push(part(14, 18, b"next"));
    settled().await;
    assert_eq!(shared.progress.position(0), Some(place(18)));
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// Two standbys were promoted at the same place to the same number; the agent of the other one has stored something already.
#[tokio::test(start_paused = true)]
async fn another_course_of_a_timeline_that_begins_is_a_conflict() {
    for same in [true, false] {
        let memory = Arc::new(MemoryStore::new("a"));
        let (shared, region) = shared(Arc::new(FaultyStore::new(memory.clone())));
        let (timeline, begins) = (TimelineId::new(2).unwrap(), Lsn(MIB));
        let object = |range: LsnRange, byte: u8| {
            let header = Header::wal(Kind::Tail, Codec::Lz4, SystemId(7), timeline, range);
            let plain = vec![byte; usize::try_from(range.len()).unwrap()];
            Object::new(crate::test_world::sealed(header, &plain))
        };
        let tail = |length: u64| LsnRange::new(begins, begins + length);
        let key = |range| shared.archive.layout.tail(timeline, range);
        let theirs = object(tail(100), 1);
        memory
            .put(&key(tail(100)), theirs, PutMode::Create)
            .await
            .unwrap();
        shared.window.push(Item {
            key: shared.archive.layout.history(timeline),
            object: Object::new("1\t0/100000\tx\n"),
            what: What::History {
                timeline,
                begins,
                after: at(1),
            },
            charge: None,
        });
        shared.window.push(Item {
            key: key(tail(300)),
            object: object(tail(300), if same { 1 } else { 2 }),
            what: What::Wal {
                timeline,
                range: tail(300),
                last_commit: None,
            },
            charge: None,
        });
        let cancel = CancellationToken::new();
        let uploader = Uploader::new(shared.clone(), region);
        let running = uploader.run(Some(Some(at(1))), cancel.clone());
        let ended = tokio::time::timeout(Duration::from_secs(30), running).await;
        let stored = memory.keys().contains(&key(tail(300)));
        assert_eq!(stored, same);
        match ended {
            Ok(ended) => assert!(
                !same && matches!(ended, Err(AgentError::Conflict { .. })),
                "{ended:?}"
            ),
            Err(_) => assert!(same, "the other course was not noticed"),
        }
    }
}
