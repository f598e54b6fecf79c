use std::time::Duration;

use highwater_config::Policy;
use highwater_format::coverage::PieceKind;

use super::*;
use crate::test_world::{MIB, World, piece, world};

/// The archive ends with a whole object, which the first region holds; the first `count` regions count for it.
async fn at_a_boundary(count: usize) -> World {
    let world = world(Policy::Any);
    world.put_wal(0, last()).await;
    for index in 0..count {
        let at = Position {
            timeline: TimelineId::FIRST,
            lsn: Lsn(2 * MIB),
        };
        world.shared.progress.stored(index, at);
    }
    world
}

fn last() -> highwater_format::coverage::Piece {
    piece(PieceKind::Segment, MIB, 2 * MIB)
}

async fn looked(world: &World, lacking: &mut Option<Instant>) -> Before {
    let looked = read_before(&world.shared, TimelineId::FIRST, last().range, lacking);
    looked.await.unwrap()
}

/// The stream may begin uncompared only where there is nothing to compare it with.
#[tokio::test(start_paused = true)]
async fn i6_a_stream_that_begins_with_an_object_waits_for_what_comes_before_it() {
    let mut lacking = None;
    let held = at_a_boundary(1).await;
    assert!(
        matches!(looked(&held, &mut lacking).await, Before::Held(overlap) if overlap.range() == last().range)
    );
    assert!(matches!(
        looked(&at_a_boundary(0).await, &mut lacking).await,
        Before::Unheld
    ));

    held.silence(0);
    for _ in 0..5 {
        assert!(matches!(looked(&held, &mut lacking).await, Before::Unread(_)));
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    held.faulty(0).heal();
    assert!(matches!(looked(&held, &mut lacking).await, Before::Held(_)));
    held.remove(0, &held.key(last())).await;
    assert!(matches!(looked(&held, &mut lacking).await, Before::Unheld));
}

/// Its name alone makes it count, and PostgreSQL may have the only copy that can be read.
#[tokio::test(start_paused = true)]
async fn i1_a_stream_does_not_begin_behind_an_object_that_nobody_can_read() {
    let world = at_a_boundary(2).await;
    world.damage(0, &world.key(last())).await;
    let mut lacking = None;
    for _ in 0..5 {
        let Before::Unread(error) = looked(&world, &mut lacking).await else {
            panic!("it would begin")
        };
        assert!(error.to_string().contains("stop the agent, remove it"), "{error}");
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    // Another region has it.
    world.put_wal(1, last()).await;
    assert!(matches!(looked(&world, &mut lacking).await, Before::Held(_)));
}

/// A region that is away for long does not hold up the stream where another one answers.
#[tokio::test(start_paused = true)]
async fn a_region_that_stays_away_is_waited_for_as_long_as_a_listing_may_lag() {
    let world = at_a_boundary(2).await;
    world.silence(0);
    let mut lacking = None;
    assert!(matches!(looked(&world, &mut lacking).await, Before::Unread(_)));
    tokio::time::sleep(LISTING_LAG - Duration::from_secs(1)).await;
    assert!(matches!(looked(&world, &mut lacking).await, Before::Unread(_)));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(matches!(looked(&world, &mut lacking).await, Before::Unheld));
    // One that holds it ends the wait.
    world.put_wal(1, last()).await;
    assert!(matches!(looked(&world, &mut lacking).await, Before::Held(_)));
    assert!(lacking.is_none());
}

/// The open segment holds next to nothing, and the object before it can be read nowhere: what there is is compared, and nothing waits.
#[tokio::test(start_paused = true)]
async fn what_lies_before_the_open_segment_holds_nothing_up() {
    let end = last().range.end;
    let held = at_a_boundary(2).await;
    let before = || readable_before(&held.shared, TimelineId::FIRST, end);
    assert!(
        before()
            .await
            .unwrap()
            .is_some_and(|before| before.range() == last().range)
    );
    held.damage(0, &held.key(last())).await;
    assert!(before().await.unwrap().is_none());
    held.silence(1);
    assert!(before().await.unwrap().is_none());
}
