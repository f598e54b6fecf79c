use highwater_format::coverage::PieceKind;

use super::*;
use crate::test_world::piece;

#[test]
fn what_reaches_furthest_is_tried_first_and_what_is_bad_no_more() {
    let (segment, chunk) = (piece(PieceKind::Segment, 0, 100), piece(PieceKind::Tail, 0, 40));
    let mut offers = Offers::default();
    offers.add(0, [chunk, segment]);
    offers.add(1, [segment, piece(PieceKind::Tail, 60, 100)]);
    let at = |offers: &Offers, lsn| {
        offers
            .at(Lsn(lsn))
            .map(|(source, piece)| (source, piece.range.end.0))
    };
    assert_eq!(at(&offers, 0), Some((0, 100)));
    offers.spoil(0, &segment);
    assert_eq!(
        at(&offers, 0),
        Some((1, 100)),
        "the other region's copy is another object"
    );
    offers.spoil(1, &segment);
    assert_eq!(at(&offers, 0), Some((0, 40)));
    assert_eq!(
        (at(&offers, 40), offers.next_start(Lsn(40))),
        (None, Some(Lsn(60)))
    );
    offers.silence(1);
    assert_eq!(offers.next_start(Lsn(40)), None);
}
