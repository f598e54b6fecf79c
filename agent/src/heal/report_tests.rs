use std::time::Duration;

use highwater_config::Policy;
use highwater_format::Lsn;
use highwater_format::coverage::PieceKind;

use super::*;
use crate::clock::Clock;
use crate::frontier::Position;
use crate::heal::Outcome;
use crate::test_world::{MIB, piece, world};

fn position() -> Position {
    Position {
        timeline: TimelineId::FIRST,
        lsn: Lsn(4 * MIB),
    }
}

async fn compare(healer: &mut Healer) {
    let mut outcome = Outcome::default();
    let found = healer.compare(position(), &mut outcome).await.unwrap();
    healer.note(&found.ours, &found.theirs, &found.lack, outcome.partial);
}

/// WAL that was acknowledged is listed nowhere any more, and the region went on behind it: no comparison finds it missing here.
#[tokio::test(start_paused = true)]
async fn what_a_region_went_on_behind_stays_reported() {
    let world = world(Policy::Any);
    let segment = |number| piece(PieceKind::Segment, number * MIB, (number + 1) * MIB);
    for region in 0..3 {
        for number in [1, 3] {
            world.put_wal(region, segment(number)).await;
        }
        world.shared.progress.stored(region, position());
    }
    let (shared, region) = (world.shared.clone(), world.shared.archive.regions[0].clone());
    let lacks = || shared.state.snapshot().regions[0].lacks.clone();
    let mut healer = Healer::new(shared.clone(), region, Duration::from_secs(900), Clock::system());
    compare(&mut healer).await;
    assert_eq!(lacks(), Lacks::default(), "nobody knows of it");
    shared.state.update_region(0, |view| {
        view.passed.push((TimelineId::FIRST, segment(2).range));
    });
    for _ in 0..2 {
        compare(&mut healer).await;
        let lacks = lacks();
        assert!(lacks.lost && lacks.wal_bytes == MIB, "{lacks:?}");
        assert!(lacks.detail.unwrap().contains("take a base backup"));
    }
    world.put_wal(1, segment(2)).await;
    world.put_wal(0, segment(2)).await;
    compare(&mut healer).await;
    assert_eq!(
        lacks(),
        Lacks::default(),
        "an intact copy has turned up, and was copied"
    );
}
