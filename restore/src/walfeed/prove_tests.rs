use highwater_format::coverage::PieceKind;
use highwater_format::timeline::TimelineId;

use super::*;

const SEGMENT: LsnRange = LsnRange {
    start: Lsn(0x200),
    end: Lsn(0x300),
};

fn tail(start: u64, end: u64) -> Piece {
    Piece {
        range: LsnRange::new(Lsn(start), Lsn(end)),
        kind: PieceKind::Tail,
        size: 1,
    }
}

fn lists(pieces: &[Piece], later: Option<u64>) -> Seen {
    Seen {
        region: "a".to_owned(),
        was_read: true,
        listed: Ok(Listed {
            pieces: pieces.to_vec(),
            later: later.map(Lsn),
        }),
    }
}

fn silent(was_read: bool) -> Seen {
    Seen {
        region: "b".to_owned(),
        was_read,
        listed: Err("time-out".to_owned()),
    }
}

fn planned(end: u64) -> Option<TimelineFacts> {
    Some(TimelineFacts {
        timeline: TimelineId::FIRST,
        begin: Lsn(0),
        end: Lsn(end),
        ragged: false,
    })
}

fn verdict(known: Option<TimelineFacts>, seen: &[Seen]) -> Verdict {
    let pieces = seen
        .iter()
        .filter_map(|seen| seen.listed.as_ref().ok())
        .flat_map(|listed| listed.pieces.clone());
    judge(SEGMENT, known.as_ref(), seen, &pieces.collect())
}

fn served_until(verdict: &Verdict) -> Option<u64> {
    match verdict {
        Verdict::Serve { until, .. } => Some(until.0),
        _ => None,
    }
}

#[test]
fn the_newest_segment_is_served_up_to_the_proven_end() {
    let seen = [lists(&[tail(0x200, 0x210), tail(0x210, 0x280)], None)];
    assert_eq!(served_until(&verdict(planned(0x280), &seen)), Some(0x280));
    assert_eq!(
        served_until(&verdict(planned(0x250), &seen)),
        Some(0x280),
        "the archive has grown"
    );
    assert_eq!(served_until(&verdict(None, &seen)), Some(0x280));
}

#[test]
fn two_regions_fill_each_others_holes() {
    let seen = [
        lists(&[tail(0x200, 0x240)], None),
        lists(&[tail(0x230, 0x300)], None),
    ];
    assert_eq!(served_until(&verdict(planned(0x900), &seen)), Some(0x300));
}

#[test]
fn a_segment_that_the_plan_had_is_never_past_the_end() {
    for seen in [
        vec![lists(&[], None)],
        vec![lists(&[], None), silent(true)],
        vec![silent(true)],
    ] {
        assert!(
            matches!(verdict(planned(0x280), &seen), Verdict::Refuse(_)),
            "{seen:?}"
        );
    }
    let short = [lists(&[tail(0x200, 0x240)], None)];
    assert!(
        matches!(verdict(planned(0x280), &short), Verdict::Refuse(_)),
        "an end before the proven one"
    );
    let holed = [lists(&[tail(0x210, 0x300)], None)];
    assert!(
        matches!(verdict(planned(0x900), &holed), Verdict::Refuse(_)),
        "a hole at its start"
    );
}

#[test]
fn past_the_end_needs_every_region_or_the_plan() {
    let nothing = [lists(&[], None)];
    assert!(matches!(verdict(planned(0x200), &nothing), Verdict::PastEnd(_)));
    assert!(matches!(verdict(None, &nothing), Verdict::PastEnd(_)));
    let one_silent = [lists(&[], None), silent(true)];
    assert!(
        matches!(verdict(planned(0x200), &one_silent), Verdict::PastEnd(_)),
        "the plan read it"
    );
    assert!(
        matches!(verdict(None, &one_silent), Verdict::Refuse(_)),
        "nobody read it"
    );
    assert!(
        matches!(verdict(planned(0x200), &[silent(true)]), Verdict::Refuse(_)),
        "no region answers at all"
    );
}

#[test]
fn something_newer_anywhere_is_a_hole_and_not_the_end() {
    let newer = [lists(&[], None), lists(&[], Some(0x400))];
    assert!(matches!(verdict(planned(0x200), &newer), Verdict::Hole(_)));
    assert!(matches!(verdict(None, &newer), Verdict::Hole(_)));
    let half = [lists(&[tail(0x200, 0x240)], Some(0x400))];
    assert!(matches!(verdict(None, &half), Verdict::Hole(_)));
    // A lost chunk inside the newest segment is no other hole.
    let lost = [lists(&[tail(0x200, 0x240), tail(0x280, 0x300)], None)];
    assert!(matches!(verdict(None, &lost), Verdict::Hole(_)));
    let lost_first = [lists(&[tail(0x280, 0x300)], None)];
    assert!(matches!(verdict(None, &lost_first), Verdict::Hole(_)));
    assert!(
        matches!(verdict(planned(0x200), &lost_first), Verdict::PastEnd(_)),
        "it came behind the end of the plan"
    );
}

#[test]
fn what_lies_behind_a_ragged_end_is_not_newer() {
    let ragged = |end| {
        planned(end).map(|facts| TimelineFacts {
            ragged: true,
            ..facts
        })
    };
    let behind = [lists(&[], Some(0x400)), silent(true)];
    assert!(matches!(verdict(ragged(0x200), &behind), Verdict::PastEnd(_)));
    let broken = [lists(&[tail(0x280, 0x300)], None)];
    assert!(matches!(verdict(ragged(0x200), &broken), Verdict::PastEnd(_)));
    assert!(
        matches!(verdict(ragged(0x240), &behind), Verdict::Refuse(_)),
        "what the plan had is never past the end"
    );
    assert!(
        matches!(verdict(ragged(0x200), &[silent(true)]), Verdict::Refuse(_)),
        "no region answers at all"
    );
    let part = [lists(&[tail(0x200, 0x240), tail(0x280, 0x300)], Some(0x400))];
    assert_eq!(served_until(&verdict(ragged(0x240), &part)), Some(0x240));
}

#[test]
fn a_timeline_without_wal_of_its_own_sends_postgresql_to_its_parent() {
    let known = Some(TimelineFacts {
        timeline: TimelineId::FIRST,
        begin: Lsn(0x280),
        end: Lsn(0x280),
        ragged: false,
    });
    assert!(matches!(verdict(known, &[lists(&[], None)]), Verdict::PastEnd(_)));
}
