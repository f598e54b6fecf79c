//! Where a region goes on that was read after the start.

use std::sync::Arc;

use highwater_config::Policy;
use highwater_format::coverage::PieceKind;
use highwater_format::{Lsn, LsnRange, TimelineId};
use highwater_store::{
    ErrorKind, Fault, FaultyStore, MemoryStore, Object, Operation, PutMode, Rule, Store as _,
};
use tokio_util::sync::CancellationToken;

use super::super::tests::{MIB, at, range, shared, tail, wal};
use super::*;
use crate::test_world::{piece, wal as bytes, world};
use crate::window::{Item, What, Window};

/// The next WAL or history is refused in a way that no store tries again by itself, so that the region is read anew.
fn fails_once(store: &FaultyStore) {
    let refused = Fault::FailBefore(ErrorKind::Config);
    store.inject(Rule::once(refused).on(Operation::Put).key("/wal/"));
}

/// An agent that died has left zeros behind a hole, and a good object behind those. A listing counts both by their names.
#[tokio::test(start_paused = true)]
async fn i1_trouble_does_not_carry_a_region_over_an_object_that_nobody_can_read() {
    let memory = Arc::new(MemoryStore::new("a"));
    let (shared, region) = shared(Arc::new(FaultyStore::new(memory.clone())));
    let object = |number| {
        let range = range(number, number + 1);
        tail(&shared, range, &bytes(range))
    };
    let (torn, behind) = (object(2), object(3));
    let zeros = memory.put(&torn.key, Object::new(vec![0; 100]), PutMode::Create);
    zeros.await.unwrap();
    let put = memory.put(&behind.key, behind.object.clone(), PutMode::Create);
    put.await.unwrap();
    let key = torn.key.clone();
    for item in [wal(&shared, range(1, 2)), torn, behind] {
        shared.window.push(item);
    }
    let cancel = CancellationToken::new();
    let uploader = Uploader::new(shared.clone(), region);
    let running = tokio::spawn(uploader.run(Some(Some(at(1))), cancel.clone()));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(shared.progress.position(0), Some(at(2)));
    let view = shared.state.snapshot().regions[0].clone();
    assert!(view.last_error.unwrap().contains(&key));
    // Somebody removes it.
    memory.delete(&key).await.unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(shared.progress.position(0), Some(at(4)));
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// A listing that lags where a call has failed for good: nobody else has what it does not show.
#[tokio::test(start_paused = true)]
async fn a_region_that_lists_less_than_it_has_goes_on_after_trouble() {
    let memory = Arc::new(MemoryStore::new("a"));
    let store = Arc::new(FaultyStore::new(memory.clone()));
    let (shared, region) = shared(store.clone());
    let last = wal(&shared, range(2, 3));
    store.hide(last.key.clone());
    shared.window.push(wal(&shared, range(1, 2)));
    shared.window.push(last);
    let cancel = CancellationToken::new();
    let running = tokio::spawn(Uploader::new(shared.clone(), region).run(Some(None), cancel.clone()));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(shared.progress.position(0), Some(at(3)));

    fails_once(&store);
    shared.window.push(wal(&shared, range(3, 4)));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!((store.pending(), shared.progress.position(0)), (0, Some(at(4))));

    // The same where the last that was stored is a history: no WAL of its timeline is there to be listed.
    let two = TimelineId::new(2).unwrap();
    let begun = Position {
        timeline: two,
        ..at(4)
    };
    shared.window.push(Item {
        key: shared.archive.layout.history(two),
        object: Object::new("1\t0/400000\tx\n"),
        what: What::History {
            timeline: two,
            begins: begun.lsn,
            after: at(4),
        },
        charge: None,
    });
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(shared.progress.position(0), Some(begun));
    fails_once(&store);
    let what = What::Wal {
        timeline: two,
        range: range(4, 5),
        last_commit: None,
    };
    shared.window.push(Item {
        key: shared.archive.layout.tail(two, range(4, 5)),
        what,
        ..wal(&shared, range(4, 5))
    });
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(
        (store.pending(), shared.progress.position(0)),
        (0, Some(what.end()))
    );
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// What was read at the start has no name here that could be asked for: it is listed again.
#[tokio::test(start_paused = true)]
async fn a_listing_that_ends_its_lag_is_seen_where_nothing_else_fills_the_region() {
    let memory = Arc::new(MemoryStore::new("a"));
    let store = Arc::new(FaultyStore::new(memory.clone()));
    let (mut shared, region) = shared(store.clone());
    shared.window = Arc::new(Window::new(1, 100 * MIB, at(3)));
    for item in [wal(&shared, range(1, 2)), wal(&shared, range(2, 3))] {
        let put = memory.put(&item.key, item.object, PutMode::Create);
        put.await.unwrap();
    }
    store.hide(shared.archive.layout.tail(TimelineId::FIRST, range(2, 3)));
    fails_once(&store);
    shared.window.push(wal(&shared, range(3, 4)));
    let cancel = CancellationToken::new();
    let uploader = Uploader::new(shared.clone(), region);
    let running = tokio::spawn(uploader.run(Some(Some(at(3))), cancel.clone()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((store.pending(), shared.progress.position(0)), (0, Some(at(3))));
    store.unhide();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(shared.progress.position(0), Some(at(4)));
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// A region that counts and whose content is gone: what another one holds beyond what was acknowledged comes from there at
/// once.
#[tokio::test(start_paused = true)]
async fn a_region_that_was_emptied_and_then_fails_is_filled_again() {
    let mut world = world(Policy::All);
    world.shared.kept_from = Some(at(2));
    let segment = |number| piece(PieceKind::Segment, number * MIB, (number + 1) * MIB);
    for number in 1..4 {
        world.put_wal(1, segment(number)).await;
    }
    let (shared, region) = (world.shared.clone(), world.shared.archive.regions[0].clone());
    shared.progress.stored(1, at(4));
    let item = |number| tail(&shared, range(number, number + 1), &bytes(segment(number).range));
    let cancel = CancellationToken::new();
    let uploader = Uploader::new(shared.clone(), region);
    (1..4).for_each(|number| shared.window.push(item(number)));
    let running = tokio::spawn(uploader.run(Some(Some(at(1))), cancel.clone()));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(shared.progress.position(0), Some(at(4)));

    for number in 1..4 {
        world.remove(0, &item(number).key).await;
    }
    fails_once(world.faulty(0));
    shared.window.push(item(4));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(shared.progress.position(0), Some(at(5)));
    for number in 2..4 {
        assert!(world.has(0, &world.key(segment(number))).await, "{number}");
    }
    cancel.cancel();
    running.await.unwrap().unwrap();
}

/// The stream may take hours to get to where a region ends that joins ahead of it.
#[tokio::test(start_paused = true)]
async fn a_region_that_joins_ahead_of_the_stream_is_not_read_over_and_over() {
    // The only one; and beside another one that says it has got there, and does not hold it.
    for beside in [false, true] {
        let world = world(Policy::All);
        let segment = piece(PieceKind::Segment, MIB, 2 * MIB);
        world.put_wal(0, segment).await;
        let (shared, region) = (world.shared.clone(), world.shared.archive.regions[0].clone());
        if beside {
            let lsn = Lsn(MIB + 100);
            shared.progress.stored(1, Position { lsn, ..at(1) });
        }
        let cancel = CancellationToken::new();
        let running = tokio::spawn(Uploader::new(shared.clone(), region).run(None, cancel.clone()));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(shared.progress.position(0), None);
        let read = world.faulty(0).calls(Operation::Get);
        assert!(read < 20, "{read} reads in a minute");
        // The stream gets there.
        let plain = bytes(segment.range);
        let half = LsnRange::new(Lsn(MIB), Lsn(MIB + MIB / 2));
        shared.window.push(tail(&shared, half, &plain[..plain.len() / 2]));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(shared.progress.position(0), Some(at(2)));
        cancel.cancel();
        running.await.unwrap().unwrap();
    }
}
