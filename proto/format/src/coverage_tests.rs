//! Coverage against a model that keeps one flag per byte.

use proptest::prelude::*;

use super::*;

const SPACE: u64 = 48;

fn range(start: u64, end: u64) -> LsnRange {
    LsnRange {
        start: Lsn(start),
        end: Lsn(end),
    }
}

fn piece(start: u64, end: u64, kind: PieceKind) -> Piece {
    Piece {
        range: range(start, end),
        kind,
        size: end.saturating_sub(start),
    }
}

fn held(pieces: &[Piece]) -> Vec<bool> {
    let mut bytes = vec![false; SPACE as usize];
    for piece in pieces {
        for byte in piece.range.start.0..piece.range.end.0 {
            bytes[byte as usize] = true;
        }
    }
    bytes
}

/// Maximal runs of bytes for which `wanted` holds, inside `within`.
fn model_runs(bytes: &[bool], within: LsnRange, wanted: bool) -> Vec<LsnRange> {
    let mut runs: Vec<LsnRange> = Vec::new();
    for at in within.start.0..within.end.0 {
        if bytes[at as usize] != wanted {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end.0 == at => run.end = Lsn(at + 1),
            _ => runs.push(range(at, at + 1)),
        }
    }
    runs
}

/// Fewest pieces for a range, by trying every reach from every byte.
fn model_fewest(pieces: &[Piece], wanted: LsnRange) -> Option<usize> {
    let mut steps = vec![None; SPACE as usize + 1];
    steps[wanted.start.0 as usize] = Some(0_usize);
    for at in wanted.start.0..wanted.end.0 {
        let Some(count) = steps[at as usize] else { continue };
        for piece in pieces
            .iter()
            .filter(|piece| piece.range.start.0 <= at && piece.range.end.0 > at)
        {
            for reach in at + 1..=piece.range.end.0 {
                let known = &mut steps[reach as usize];
                *known = Some(known.map_or(count + 1, |best| best.min(count + 1)));
            }
        }
    }
    steps[wanted.end.0 as usize]
}

fn any_piece() -> impl Strategy<Value = Piece> {
    (0..SPACE, 0..=14_u64, any::<bool>()).prop_map(|(start, len, segment)| {
        let kind = if segment {
            PieceKind::Segment
        } else {
            PieceKind::Tail
        };
        piece(start, (start + len).min(SPACE), kind)
    })
}

fn any_range() -> impl Strategy<Value = LsnRange> {
    (0..=SPACE, 0..=SPACE).prop_map(|(a, b)| range(a.min(b), a.max(b)))
}

proptest! {
    #[test]
    fn agrees_with_a_set_of_bytes(
        pieces in prop::collection::vec(any_piece(), 0..24),
        excluded in prop::collection::vec(any_range(), 0..3),
        wanted in any_range(),
        from in 0..SPACE,
    ) {
        let mut coverage: Coverage = pieces.iter().copied().collect();
        let mut bytes = held(&pieces);
        let last = bytes.iter().rposition(|held| *held).map(|at| Lsn(at as u64 + 1));
        for range in &excluded {
            coverage.exclude(*range);
            bytes[range.start.0 as usize..range.end.0 as usize].fill(false);
        }
        let everything = range(0, SPACE);

        prop_assert_eq!(coverage.runs(), model_runs(&bytes, everything, true));
        prop_assert_eq!(coverage.holes(wanted), model_runs(&bytes, wanted, false));
        let end = (from..SPACE).find(|at| !bytes[*at as usize]).unwrap_or(SPACE);
        prop_assert_eq!(coverage.contiguous_end(Lsn(from)), Lsn(end));
        prop_assert_eq!(coverage.end(), last);
        if let Err(Hole(hole)) = coverage.cover(wanted) {
            prop_assert_eq!(Some(hole), coverage.holes(wanted).first().copied());
        } else {
            prop_assert!(coverage.holes(wanted).is_empty());
        }
    }

    #[test]
    fn a_cover_is_real_ordered_and_as_small_as_can_be(
        pieces in prop::collection::vec(any_piece(), 0..24),
        wanted in any_range(),
    ) {
        let coverage: Coverage = pieces.iter().copied().collect();
        match coverage.cover(wanted) {
            Ok(chosen) => {
                prop_assert_eq!(Some(chosen.len()), model_fewest(&pieces, wanted));
                let mut at = wanted.start;
                for one in &chosen {
                    prop_assert!(pieces.contains(one));
                    prop_assert!(one.range.start <= at && at < one.range.end);
                    at = one.range.end;
                }
                prop_assert!(at >= wanted.end);
            }
            Err(Hole(hole)) => {
                prop_assert_eq!(Some(hole), coverage.holes(wanted).first().copied());
                prop_assert_eq!(model_fewest(&pieces, wanted), None);
            }
        }
    }

    #[test]
    fn the_order_of_a_listing_does_not_matter(
        (pieces, shuffled) in prop::collection::vec(any_piece(), 0..24)
            .prop_flat_map(|pieces| (Just(pieces.clone()), Just(pieces).prop_shuffle())),
    ) {
        // The size stands for the object's identity; here it follows from the range, as in a real archive.
        let one: Coverage = pieces.into_iter().collect();
        let other: Coverage = shuffled.into_iter().collect();
        prop_assert_eq!(one, other);
    }
}

#[test]
fn a_segment_object_is_preferred_to_a_tail_chunk_of_the_same_range() {
    for kinds in [
        [PieceKind::Segment, PieceKind::Tail],
        [PieceKind::Tail, PieceKind::Segment],
    ] {
        let coverage: Coverage = kinds.map(|kind| piece(0, 16, kind)).into_iter().collect();
        assert_eq!(
            coverage.cover(range(3, 9)),
            Ok(vec![piece(0, 16, PieceKind::Segment)])
        );
    }
}

#[test]
fn the_hole_named_is_the_missing_part_of_what_was_asked() {
    let coverage: Coverage = [piece(0, 8, PieceKind::Tail), piece(12, 16, PieceKind::Tail)]
        .into_iter()
        .collect();
    assert_eq!(coverage.cover(range(4, 16)), Err(Hole(range(8, 12))));
    assert_eq!(coverage.cover(range(4, 10)), Err(Hole(range(8, 10))));
    assert_eq!(coverage.cover(range(20, 30)), Err(Hole(range(20, 30))));
    assert_eq!(coverage.cover(range(5, 5)), Ok(Vec::new()));
}
