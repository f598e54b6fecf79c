use highwater_format::lsn::{Lsn, SystemId};
use highwater_format::timeline::TimelineId;

use super::*;
use crate::recovery::facts::TimelineFacts;

const MIB: u64 = 1 << 20;

fn timeline(number: u32, begin: u64, end: u64) -> TimelineFacts {
    TimelineFacts {
        timeline: TimelineId::new(number).unwrap(),
        begin: Lsn(begin),
        end: Lsn(end),
        ragged: false,
    }
}

fn facts(timelines: Vec<TimelineFacts>) -> Facts {
    let (format, note) = Facts::format_and_note();
    Facts {
        format,
        note,
        cluster: "orders".parse().unwrap(),
        system_id: SystemId(7),
        segment_size: 16 * MIB,
        config: None,
        regions: Vec::new(),
        left_out: Vec::new(),
        known_timelines: timelines.iter().map(|timeline| timeline.timeline).collect(),
        without_history: Vec::new(),
        timelines,
        needed_until: None,
        prefetch_bytes: 128 * MIB,
    }
}

fn segment(timeline: u32, number: u64) -> SegmentName {
    SegmentName {
        timeline: TimelineId::new(timeline).unwrap(),
        number,
    }
}

#[test]
fn recovery_goes_over_to_the_new_timeline_with_the_segment_that_holds_the_switch() {
    let facts = facts(vec![timeline(1, 0, 88 * MIB), timeline(2, 88 * MIB, 120 * MIB)]);
    assert_eq!(following(&facts, segment(1, 3)), Some(segment(1, 4)));
    assert_eq!(
        following(&facts, segment(1, 4)),
        Some(segment(2, 5)),
        "88 MiB lies in segment 5"
    );
    assert_eq!(following(&facts, segment(2, 6)), Some(segment(2, 7)));
    assert_eq!(
        following(&facts, segment(2, 7)),
        None,
        "120 MiB ends in segment 7"
    );
}

#[test]
fn nothing_is_fetched_behind_the_target() {
    let mut facts = facts(vec![timeline(1, 0, 1000 * MIB)]);
    facts.needed_until = Some(Lsn(80 * MIB));
    assert_eq!(following(&facts, segment(1, 3)), Some(segment(1, 4)));
    assert_eq!(following(&facts, segment(1, 4)), None);
}

#[test]
fn an_unknown_timeline_is_not_guessed_at() {
    assert_eq!(following(&facts(Vec::new()), segment(1, 3)), None);
    assert_eq!(
        following(&facts(vec![timeline(1, 0, 1000 * MIB)]), segment(2, 3)),
        None
    );
}

#[test]
fn the_window_is_bounded_by_bytes_and_never_below_two() {
    let sized = |mib| SegmentSize::new(mib * MIB).unwrap();
    assert_eq!(
        Window::of(128 * MIB, sized(16)),
        Window {
            ahead: 8,
            parallel: 6
        }
    );
    assert_eq!(
        Window::of(128 * MIB, sized(1024)),
        Window {
            ahead: 2,
            parallel: 2
        }
    );
    assert_eq!(
        Window::of(128 * MIB, sized(1)),
        Window {
            ahead: 64,
            parallel: 6
        }
    );
}
