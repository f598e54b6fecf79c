//! The window: order, skipping, forgetting.

use bytes::Bytes;

use super::*;

fn timeline(id: u32) -> TimelineId {
    TimelineId::new(id).unwrap()
}

fn wal(start: u64, end: u64, bytes: usize) -> Item {
    Item {
        key: format!("{start}-{end}"),
        object: Object::new(Bytes::from(vec![0; bytes])),
        what: What::Wal {
            timeline: timeline(1),
            range: LsnRange {
                start: Lsn(start),
                end: Lsn(end),
            },
            last_commit: None,
        },
        charge: None,
    }
}

fn at(lsn: u64) -> Position {
    Position {
        timeline: timeline(1),
        lsn: Lsn(lsn),
    }
}

fn key(next: &Next) -> String {
    match next {
        Next::Item(number, item) => format!("{number} {}", item.key),
        Next::Wait => "wait".into(),
        Next::Behind => "behind".into(),
    }
}

#[test]
fn chunks_that_a_later_object_covers_are_skipped() {
    let window = Window::new(1, 1000, at(0));
    assert_eq!(window.attach(0, at(0)), Some(0));
    window.push(wal(0, 10, 1));
    window.push(wal(10, 20, 1));
    assert_eq!(key(&window.next(0)), "0 0-10");
    window.push(wal(0, 30, 1));
    assert_eq!(key(&window.next(0)), "2 0-30");
    assert_eq!(key(&window.next(3)), "wait");
}

#[test]
fn what_no_region_has_is_never_forgotten() {
    let window = Window::new(2, 10, at(0));
    window.attach(0, at(0));
    window.attach(1, at(0));
    for step in 0..10 {
        window.push(wal(step * 10, step * 10 + 10, 10));
    }
    assert_eq!(key(&window.next(0)), "0 0-10");
}

#[test]
fn a_region_that_lags_is_left_behind_when_memory_is_short() {
    let window = Window::new(2, 25, at(0));
    window.attach(0, at(0));
    window.attach(1, at(0));
    for step in 0..4 {
        window.push(wal(step * 10, step * 10 + 10, 10));
    }
    window.passed(0, 1);
    assert_eq!(key(&window.next(0)), "behind");
    window.passed(0, 4);
    assert_eq!(
        key(&window.next(2)),
        "2 20-30",
        "within its share it is kept for the region that lags"
    );
    assert_eq!(window.attach(1, at(10)), None);
    assert_eq!(window.attach(1, at(20)), Some(2));
    assert_eq!(window.attach(1, at(30)), Some(3));
}

#[test]
fn a_detached_region_holds_nothing_back() {
    let window = Window::new(2, 1000, at(0));
    window.attach(0, at(0));
    window.attach(1, at(0));
    window.push(wal(0, 10, 10));
    window.passed(0, 1);
    assert_eq!(key(&window.next(0)), "0 0-10");
    window.detach(1);
    assert_eq!(key(&window.next(0)), "behind");
    assert_eq!(
        window.attach(1, at(5)),
        None,
        "an empty window does not mean that nothing was missed"
    );
    assert_eq!(window.attach(1, at(10)), Some(1));
}

#[test]
fn a_history_file_comes_before_what_follows_it() {
    let window = Window::new(1, 1000, at(0));
    window.push(wal(0, 10, 1));
    window.push(Item {
        key: "history".into(),
        object: Object::new(Bytes::from_static(b"1\t0/5\n")),
        what: What::History {
            timeline: timeline(2),
            begins: Lsn(0),
            after: at(10),
        },
        charge: None,
    });
    window.attach(0, at(0));
    window.passed(0, 1);
    assert_eq!(
        window.attach(0, at(5)),
        None,
        "the rest of the old timeline comes first"
    );
    assert_eq!(window.attach(0, at(10)), Some(1));
    assert_eq!(key(&window.next(1)), "1 history");
    assert_eq!(
        window.attach(
            0,
            Position {
                timeline: timeline(2),
                lsn: Lsn(0)
            }
        ),
        Some(2)
    );
}

fn unreplayable(after: u64) -> Item {
    Item {
        key: "unreplayable".into(),
        object: Object::new(Bytes::from_static(b"gap")),
        what: What::Unreplayable { after: at(after) },
        charge: None,
    }
}

/// It stands in the middle of an object, and a region that has everything before it may still lack it.
#[test]
fn what_cannot_be_replayed_is_on_record_before_what_follows() {
    let window = Window::new(1, 1000, at(0));
    window.push(wal(0, 10, 1));
    window.push(unreplayable(10));
    window.push(wal(0, 30, 1));
    assert_eq!(window.attach(0, at(0)), Some(0));
    assert_eq!(
        key(&window.next(0)),
        "0 0-10",
        "the object that covers it comes behind the record"
    );
    assert_eq!(key(&window.next(1)), "1 unreplayable");
    assert_eq!(
        window.attach(0, at(10)),
        Some(1),
        "nobody knows that it has the record"
    );
    assert_eq!(window.attach(0, at(11)), Some(2));
}

#[test]
fn a_region_that_lags_at_the_start_is_behind_before_the_first_item() {
    let window = Window::new(2, 1000, at(100));
    assert_eq!(window.attach(0, at(100)), Some(0));
    assert_eq!(window.attach(1, at(90)), None);
}

/// Nobody waits for what will never be here, also while nothing new comes.
#[test]
fn a_region_that_lags_is_behind_when_the_stream_leaps_over_what_another_holds() {
    for items in 0..3 {
        let window = Window::new(2, 1000, at(0));
        window.attach(0, at(0));
        for step in 0..items {
            window.push(wal(step * 10, step * 10 + 10, 1));
        }
        let mut changed = window.subscribe();
        changed.mark_unchanged();
        window.leap(at(50));
        assert!(changed.has_changed().unwrap());
        (0..=items).for_each(|number| assert_eq!(key(&window.next(number)), "behind"));
        assert_eq!(
            (window.attach(0, at(10 * items)), window.attach(1, at(50))),
            (None, Some(items + 1))
        );
        window.push(wal(50, 60, 1));
        assert_eq!(key(&window.next(items + 1)), format!("{} 50-60", items + 1));
    }
}
