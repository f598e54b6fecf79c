//! Where a stream resumes.

use super::*;
use crate::error::Kind;

fn id(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn at(timeline: u32, lsn: u64) -> Option<Position> {
    Some(Position {
        timeline: id(timeline),
        lsn: Lsn(lsn),
    })
}

const MIB: u64 = 1 << 20;

fn server(timeline: u32, end: u64, history: &str) -> ServerView {
    let history = History::parse(id(timeline), history.as_bytes()).unwrap();
    ServerView {
        timeline: id(timeline),
        end: Lsn(end),
        in_recovery: false,
        history,
        slot: Some(Lsn(35 * MIB)),
        slot_event: None,
        slot_is_new: false,
    }
}

fn size() -> SegmentSize {
    SegmentSize::new(16 * MIB).unwrap()
}

#[test]
fn an_empty_archive_begins_with_the_slots_segment() {
    let resume = resume(None, &server(1, 40 * MIB, ""), size()).unwrap();
    assert_eq!((resume.start, resume.sealed), (Lsn(32 * MIB), Lsn(32 * MIB)));
}

#[test]
fn an_archive_goes_on_at_its_own_end_whatever_the_slot_says() {
    let resume = resume(at(1, 100 * MIB + 5), &server(1, 101 * MIB, ""), size()).unwrap();
    assert_eq!((resume.start, resume.sealed), (Lsn(96 * MIB), Lsn(100 * MIB + 5)));
}

#[test]
fn a_server_behind_the_archive_is_refused() {
    let error = resume(at(1, 100 * MIB), &server(1, 90 * MIB, ""), size()).unwrap_err();
    assert_eq!(error.kind(), Kind::Damage);
}

#[test]
fn a_standby_behind_the_archive_is_waited_for() {
    let standby = ServerView {
        in_recovery: true,
        ..server(1, 90 * MIB, "")
    };
    let error = resume(at(1, 100 * MIB), &standby, size()).unwrap_err();
    assert_eq!(error.kind(), Kind::Retry);
    assert!(error.to_string().contains("standby"), "{error}");
    let caught_up = resume(at(1, 90 * MIB), &standby, size()).unwrap();
    assert_eq!(caught_up.sealed, Lsn(90 * MIB));
}

#[test]
fn an_old_primary_is_refused() {
    let error = resume(at(2, 100 * MIB), &server(1, 190 * MIB, ""), size()).unwrap_err();
    assert_eq!(error.kind(), Kind::Refused);
}

#[test]
fn the_rest_of_the_old_timeline_comes_before_the_new_one() {
    let server = server(3, 200 * MIB, "1\t0/6400000\tx\n2\t0/7000000\tx\n");
    let rest = resume(at(1, 90 * MIB), &server, size()).unwrap();
    assert_eq!(
        (rest.timeline, rest.start, rest.after),
        (id(1), Lsn(80 * MIB), None)
    );
    let next = resume(at(1, 100 * MIB), &server, size()).unwrap();
    assert_eq!((next.timeline, next.start), (id(2), Lsn(96 * MIB)));
    assert_eq!(next.after, at(1, 100 * MIB));
    let past = resume(at(2, 120 * MIB), &server, size()).unwrap();
    assert_eq!(past.timeline, id(3));
}

#[test]
fn a_standby_that_lags_is_waited_for() {
    let mut standby = server(1, 90 * MIB, "");
    standby.in_recovery = true;
    for archived in [at(1, 100 * MIB), at(2, 80 * MIB)] {
        assert_eq!(
            resume(archived, &standby, size()).unwrap_err().kind(),
            Kind::Retry
        );
    }
    assert!(resume(at(1, 90 * MIB), &standby, size()).is_ok());
}

#[test]
fn an_archive_past_the_switch_goes_on_with_the_next_timeline() {
    let server = server(3, 200 * MIB, "1\t0/6400000\tx\n2\t0/7000000\tx\n");
    let next = resume(at(1, 107 * MIB), &server, size()).unwrap();
    assert_eq!(
        (next.timeline, next.start, next.after),
        (id(2), Lsn(96 * MIB), at(1, 107 * MIB))
    );
    let next = resume(at(2, 130 * MIB), &server, size()).unwrap();
    assert_eq!((next.timeline, next.start), (id(3), Lsn(112 * MIB)));
}

#[test]
fn a_stranger_is_refused() {
    let server = server(5, 200 * MIB, "4\t0/6400000\tx\n");
    assert_eq!(
        resume(at(3, 90 * MIB), &server, size()).unwrap_err().kind(),
        Kind::Refused
    );
}
