//! Which gap lies between an archive and a server, and that one record is as good as another.

use highwater_format::{ClusterName, History, SystemId, Time};
use highwater_store::MemoryStore;

use super::*;

const MIB: u64 = 1 << 20;

fn id(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn at(timeline: u32, lsn: u64) -> Position {
    Position {
        timeline: id(timeline),
        lsn: Lsn(lsn),
    }
}

fn server(timeline: u32, slot: Option<u64>, end: u64, history: &str) -> ServerView {
    ServerView {
        timeline: id(timeline),
        end: Lsn(end),
        history: History::parse(id(timeline), history.as_bytes()).unwrap(),
        slot: slot.map(Lsn),
        slot_event: None,
        slot_is_new: false,
        in_recovery: false,
    }
}

fn found(frontier: Position, server: &ServerView) -> Vec<(u64, u64, Ends)> {
    let spans = spans(frontier, server, SegmentSize::new(MIB).unwrap());
    assert!(spans.iter().all(|span| span.timeline == frontier.timeline));
    spans
        .iter()
        .map(|span| (span.range.start.0, span.range.end.0, span.ends))
        .collect()
}

#[test]
fn a_gap_ends_with_the_segment_that_the_slot_keeps() {
    let server = server(1, Some(9 * MIB + 40), 12 * MIB + 7, "");
    let frontier = at(1, 3 * MIB + 100);
    assert_eq!(
        found(frontier, &server),
        [
            (frontier.lsn.0, 9 * MIB, Ends::Stream),
            (frontier.lsn.0, 12 * MIB, Ends::Stream)
        ]
    );
}

#[test]
fn a_slot_that_claims_to_keep_what_is_gone_is_passed_over() {
    // Segments were deleted by hand: the slot still points before the archive's end.
    let server = server(1, Some(2 * MIB), 12 * MIB + 7, "");
    assert_eq!(
        found(at(1, 3 * MIB), &server),
        [(3 * MIB, 12 * MIB, Ends::Stream)]
    );
    // Nothing sensible can be said when even the segment being written is the one that is gone.
    assert_eq!(found(at(1, 12 * MIB + 3), &server), []);
}

#[test]
fn a_gap_does_not_go_past_the_end_of_its_timeline() {
    let switch = "1\t0/700100\tx\n";
    let frontier = at(1, 3 * MIB);
    let all_gone = server(2, Some(9 * MIB), 12 * MIB, switch);
    let s = 7 * MIB + 0x100;
    assert_eq!(found(frontier, &all_gone), [(3 * MIB, s, Ends::Switch)]);
    let rest_is_there = server(2, Some(5 * MIB + 9), 12 * MIB, switch);
    assert_eq!(
        found(frontier, &rest_is_there),
        [(3 * MIB, 5 * MIB, Ends::Stream), (3 * MIB, s, Ends::Switch)]
    );
    // The segment of the switch point itself is still there, under the new timeline's name.
    let last_segment = server(2, Some(7 * MIB + 0x200), 12 * MIB, switch);
    assert_eq!(
        found(frontier, &last_segment)[0],
        (3 * MIB, 7 * MIB, Ends::Stream)
    );
    assert_eq!(
        found(at(2, 7 * MIB), &all_gone)[0],
        (7 * MIB, 9 * MIB, Ends::Stream)
    );
    assert_eq!(found(at(5, 3 * MIB), &all_gone), []);
}

/// What is found on a server that has everything from segment `first` on, and how often it was asked.
fn searched(span: Span, first: u64) -> (Span, u32) {
    let mut search = Search::new(span, SegmentSize::new(MIB).unwrap());
    let mut asked = 0;
    while let Some(smaller) = search.next() {
        assert!(smaller.range.len() < search.found().range.len(), "{smaller:?}");
        search.tried(smaller, smaller.range.end.0 >= first * MIB);
        asked += 1;
        assert!(asked < 20);
    }
    (search.found(), asked)
}

#[test]
fn i5_a_gap_covers_only_what_the_server_lacks() {
    let span = |start: u64, end: u64, ends| Span {
        timeline: id(1),
        range: LsnRange::new(Lsn(start), Lsn(end)),
        ends,
    };
    let start = 3 * MIB + 100;
    for first in 4..=200 {
        let (found, asked) = searched(span(start, 200 * MIB, Ends::Stream), first);
        assert_eq!(found, span(start, first * MIB, Ends::Stream));
        assert!(asked <= 10, "{first}: {asked}");
    }
    assert_eq!(searched(span(start, 200 * MIB, Ends::Stream), 200).1, 1);
    // Nothing lies between: nobody is asked.
    assert_eq!(searched(span(start, 4 * MIB, Ends::Stream), 4).1, 0);
    assert_eq!(searched(span(3 * MIB, 4 * MIB, Ends::Stream), 4).1, 0);
    // A timeline was left at 7.5: its last segment may be there under the name of the next one.
    let left = 7 * MIB + MIB / 2;
    let all = span(start, left, Ends::Switch);
    assert_eq!(searched(all, 8).0, all);
    assert_eq!(searched(all, 7).0, span(start, 7 * MIB, Ends::Stream));
    assert_eq!(searched(all, 5).0, span(start, 5 * MIB, Ends::Stream));
    let exactly = span(start, 7 * MIB, Ends::Switch);
    assert_eq!(searched(exactly, 7).0, exactly);
}

fn gap(start: u64, end: u64, reason: &str) -> Gap {
    Gap {
        timeline: id(1),
        start: Lsn(start),
        end: Lsn(end),
        reason: reason.into(),
        recorded_at: Time::from_unix_micros(7),
        unreplayable: false,
    }
}

#[tokio::test]
async fn the_first_record_of_a_hole_stays_and_the_second_writer_agrees() {
    let layout = Layout::new("orders".parse::<ClusterName>().unwrap(), SystemId(7));
    let store = MemoryStore::new("a");
    let (key, first) = encode(&layout, &gap(MIB, 2 * MIB, "slot lost")).unwrap();
    let (same, second) = encode(&layout, &gap(MIB, 2 * MIB, "found by another agent")).unwrap();
    assert_eq!(key, same);
    write(&store, &layout, &key, first).await.unwrap();
    write(&store, &layout, &key, second).await.unwrap();
    assert_eq!(
        read_all(&store, &layout).await.unwrap(),
        [gap(MIB, 2 * MIB, "slot lost")]
    );
    // Something else under that key is damage, not agreement.
    let (_, other) = encode(&layout, &gap(MIB, 3 * MIB, "")).unwrap();
    let key = layout.gap(id(1), LsnRange::new(Lsn(0), Lsn(5)));
    write(&store, &layout, &key, other.clone()).await.unwrap();
    let error = write(&store, &layout, &key, other).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Damage);
    // What cannot be read is a hole all the same.
    let read = read_all(&store, &layout).await.unwrap();
    let holes: Vec<_> = read.iter().map(|gap| gap.range().to_string()).collect();
    let expected = [
        LsnRange::new(Lsn(0), Lsn(5)),
        LsnRange::new(Lsn(MIB), Lsn(2 * MIB)),
    ];
    assert_eq!(holes, expected.map(|range| range.to_string()));
    assert!(read[0].reason.contains("cannot be read"), "{}", read[0].reason);
}

#[test]
fn a_gap_is_ended_by_the_first_base_backup_that_begins_behind_it() {
    let backup = |timeline, lsn, second: i64| {
        BackupId::new(id(timeline), Lsn(lsn), Time::from_unix_micros(second * 1_000_000))
    };
    let gap = gap(MIB, 2 * MIB, "");
    let before = backup(1, MIB - 8, 1);
    let (first, later) = (backup(1, 2 * MIB + 40, 2), backup(2, 3 * MIB, 3));
    assert_eq!(ended_by(&gap, [&before]), None);
    assert_eq!(ended_by(&gap, [&later, &before, &first]), Some(&first));
    // The cluster was restored to before the gap and went on from there.
    let elsewhere = backup(2, MIB, 4);
    assert_eq!(ended_by(&gap, [&before, &elsewhere]), Some(&elsewhere));
}
