//! What counts as held, against one flag per byte.

use highwater_format::coverage::PieceKind;
use proptest::prelude::*;

use super::*;

const SPACE: u64 = 40;

fn range(start: u64, end: u64) -> LsnRange {
    LsnRange {
        start: Lsn(start),
        end: Lsn(end),
    }
}

fn piece(start: u64, end: u64) -> Piece {
    Piece {
        range: range(start, end),
        kind: PieceKind::Tail,
        size: end - start,
    }
}

fn held(wal: &[(u64, u64)], gaps: &[(u64, u64)]) -> Held {
    Held::new(
        wal.iter().map(|(start, end)| piece(*start, *end)).collect(),
        gaps.iter().map(|(start, end)| range(*start, *end)).collect(),
    )
}

#[test]
fn i5_only_a_recorded_gap_is_stepped_over() {
    let wal = [(0, 10), (20, 30)];
    assert_eq!(held(&wal, &[]).contiguous_end(Lsn(0)), Lsn(10));
    assert_eq!(held(&wal, &[(10, 20)]).contiguous_end(Lsn(0)), Lsn(30));
    // A record that leaves one byte unexplained explains nothing.
    assert_eq!(held(&wal, &[(11, 20)]).contiguous_end(Lsn(0)), Lsn(10));
    assert_eq!(held(&wal, &[(10, 19)]).contiguous_end(Lsn(0)), Lsn(19));
    // Two records in a row, as after two outages; the last with nothing behind it yet.
    assert_eq!(
        held(&wal, &[(10, 15), (15, 20), (30, 35)]).contiguous_end(Lsn(4)),
        Lsn(35)
    );
}

#[test]
fn the_record_is_copied_between_what_it_lies_between() {
    let held = held(&[(0, 10), (20, 30)], &[(10, 20)]);
    let parts = held.parts(range(4, 30)).unwrap();
    assert_eq!(
        parts,
        [
            Part::Wal(piece(0, 10)),
            Part::Gap(range(10, 20)),
            Part::Wal(piece(20, 30))
        ]
    );
    assert_eq!(held.parts(range(4, 35)), Err(Hole(range(30, 35))));
}

#[test]
fn a_record_that_wal_covers_is_not_needed() {
    let held = held(&[(0, 30)], &[(10, 20)]);
    assert_eq!(held.parts(range(0, 30)).unwrap(), [Part::Wal(piece(0, 30))]);
}

#[test]
fn a_record_far_from_any_wal_is_no_run_unless_there_is_nothing_else() {
    assert_eq!(held(&[(20, 30)], &[(0, 10)]).runs(), [range(20, 30)]);
    assert_eq!(held(&[(20, 30)], &[(0, 20)]).runs(), [range(0, 30)]);
    assert_eq!(held(&[], &[(0, 20)]).runs(), [range(0, 20)]);
}

fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let one = (0..SPACE, 1..=10_u64).prop_map(|(start, len)| (start, (start + len).min(SPACE)));
    prop::collection::vec(one, 0..8)
}

proptest! {
    #[test]
    fn agrees_with_a_set_of_bytes(wal in ranges(), gaps in ranges(), from in 0..SPACE, to in 0..=SPACE) {
        let marked = |of: &[(u64, u64)], at: u64| of.iter().any(|(start, end)| (*start..*end).contains(&at));
        let known = |at: u64| marked(&wal, at) || marked(&gaps, at);
        let held = held(&wal, &gaps);
        let end = (from..SPACE).find(|at| !known(*at)).unwrap_or(SPACE);
        prop_assert_eq!(held.contiguous_end(Lsn(from)), Lsn(end));
        match held.parts(range(from, to.max(from))) {
            Ok(parts) => {
                prop_assert!(end >= to.max(from));
                let mut at = from;
                for part in parts {
                    prop_assert!(part.range().start.0 <= at && at < part.range().end.0);
                    // A record stands only where WAL does not.
                    prop_assert!(matches!(part, Part::Wal(_)) || !marked(&wal, at));
                    at = part.range().end.0;
                }
                prop_assert!(at >= to.max(from));
            }
            Err(Hole(hole)) => {
                prop_assert_eq!(hole.start, Lsn(end));
                prop_assert!(!(hole.start.0..hole.end.0).any(known));
            }
        }
    }
}
