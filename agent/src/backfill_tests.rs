use bytes::Bytes;
use highwater_config::Policy;
use highwater_format::TimelineId;
use highwater_format::coverage::PieceKind;

use super::*;
use crate::test_world::{MIB, World, piece, world};
use crate::window::{Item, What};

fn at(mib: u64) -> Position {
    Position {
        timeline: TimelineId::FIRST,
        lsn: Lsn(mib * MIB),
    }
}

/// The same place on timeline 2.
fn on_two(mib: u64) -> Position {
    Position {
        timeline: TimelineId::new(2).unwrap(),
        ..at(mib)
    }
}

/// The second region holds three segments, of which the second is damaged; the first holds one of them.
async fn lagging(policy: Policy) -> World {
    let world = world(policy);
    for number in 1..4 {
        let segment = piece(PieceKind::Segment, number * MIB, (number + 1) * MIB);
        let key = world.put_wal(1, segment).await;
        match number {
            1 => drop(world.put_wal(0, segment).await),
            2 => world.damage(1, &key).await,
            _ => {}
        }
    }
    world.shared.progress.stored(0, at(2));
    world.shared.progress.stored(1, at(4));
    world
}

async fn step(world: &World, from: Position) -> Position {
    let mut absent = Absent::default();
    let reached = advance(&world.shared, world.region(0), from, &mut absent).await;
    reached.unwrap()
}

async fn advanced(world: &World) -> Position {
    let mut position = at(2);
    for _ in 0..3 {
        position = step(world, position).await;
    }
    position
}

/// Where the region is after `seconds` of trying.
async fn after(world: &World, seconds: u64) -> Position {
    let (mut position, mut absent) = (at(2), Absent::default());
    let until = tokio::time::Instant::now() + Duration::from_secs(seconds);
    while tokio::time::Instant::now() < until {
        let reached = advance(&world.shared, world.region(0), position, &mut absent).await;
        position = reached.unwrap();
        if position == at(4) {
            break;
        }
    }
    position
}

fn view(world: &World) -> crate::state::RegionView {
    world.shared.state.snapshot().regions[0].clone()
}

#[tokio::test(start_paused = true)]
async fn a_damaged_segment_is_filled_from_the_chunks_of_any_region() {
    let world = lagging(Policy::All).await;
    let half = 2 * MIB + MIB / 2;
    world.put_wal(1, piece(PieceKind::Tail, 2 * MIB, half)).await;
    world.put_wal(2, piece(PieceKind::Tail, half, 3 * MIB)).await;
    assert_eq!(advanced(&world).await, at(4));
    assert_eq!(
        (view(&world).blocked, view(&world).lacks.damaged_bytes),
        (None, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_region_in_the_middle_of_a_damaged_segment_needs_only_the_rest_of_it() {
    let world = lagging(Policy::All).await;
    let half = Lsn(2 * MIB + MIB / 2);
    world.put_wal(1, piece(PieceKind::Tail, half.0, 3 * MIB)).await;
    let from = Position { lsn: half, ..at(2) };
    world.shared.progress.stored(0, from);
    let reached = step(&world, from).await;
    assert_eq!(reached, at(4));
}

#[tokio::test(start_paused = true)]
async fn damage_that_was_not_acknowledged_keeps_the_position_and_says_so() {
    let world = lagging(Policy::All).await;
    world
        .put_wal(1, piece(PieceKind::Tail, 2 * MIB, 2 * MIB + 700))
        .await;
    let edge = Position {
        lsn: Lsn(2 * MIB + 700),
        ..at(2)
    };
    assert_eq!(advanced(&world).await, edge);
    assert_eq!(world.shared.progress.position(0), Some(edge));
    let blocked = view(&world).blocked.unwrap();
    for part in ["[0/2002BC, 0/300000)", "region b", "base backup"] {
        assert!(blocked.contains(part), "{part}: {blocked}");
    }
    // What is advised first keeps PostgreSQL's copy, which may be the last one.
    let (keeps, gives_up) = ("only this region configured", "\"any\"");
    assert!(
        blocked.find(keeps).unwrap() < blocked.find(gives_up).unwrap(),
        "{blocked}"
    );
    // An intact version is put back.
    world
        .put_wal(1, piece(PieceKind::Segment, 2 * MIB, 3 * MIB))
        .await;
    let reached = step(&world, edge).await;
    assert_eq!((reached, view(&world).blocked), (at(4), None));
}

#[tokio::test(start_paused = true)]
async fn a_region_goes_on_behind_damage_that_was_acknowledged_and_lacks_it() {
    let world = lagging(Policy::Any).await;
    assert_eq!(advanced(&world).await, at(4));
    let view = view(&world);
    assert_eq!((view.blocked, view.lacks.damaged_bytes), (None, MIB));
    assert!(view.lacks.detail.unwrap().contains("[0/200000, 0/300000)"));
    assert!(
        !world
            .has(0, &world.key(piece(PieceKind::Segment, 2 * MIB, 3 * MIB)))
            .await
    );
    assert!(
        world
            .has(0, &world.key(piece(PieceKind::Segment, 3 * MIB, 4 * MIB)))
            .await
    );
}

#[tokio::test(start_paused = true)]
async fn a_region_that_does_not_answer_may_have_a_good_copy() {
    let world = lagging(Policy::Any).await;
    world.silence(2);
    assert_eq!(advanced(&world).await, at(2));
    assert_eq!(view(&world).blocked, None);
}

fn second() -> Piece {
    piece(PieceKind::Segment, 2 * MIB, 3 * MIB)
}

/// As [`lagging`], but the second segment is gone and not damaged: a lifecycle rule, or somebody has removed it.
async fn robbed(policy: Policy) -> World {
    let world = lagging(policy).await;
    world.remove(1, &world.key(second())).await;
    world
}

#[tokio::test(start_paused = true)]
async fn missing_wal_that_was_not_acknowledged_keeps_the_position_and_says_so() {
    let world = robbed(Policy::All).await;
    assert_eq!(after(&world, 80).await, at(2));
    assert_eq!(view(&world).blocked, None, "its listing may lag");
    assert_eq!(after(&world, 120).await, at(2));
    let blocked = view(&world).blocked.unwrap();
    for part in [
        "[0/200000, 0/300000)",
        "in no other region",
        "only this region configured",
    ] {
        assert!(blocked.contains(part), "{part}: {blocked}");
    }
    // The object is put back.
    world.put_wal(1, second()).await;
    assert_eq!((step(&world, at(2)).await, view(&world).blocked), (at(4), None));
}

#[tokio::test(start_paused = true)]
async fn a_region_goes_on_behind_missing_wal_that_was_acknowledged_and_lacks_it() {
    let world = robbed(Policy::Any).await;
    assert_eq!(after(&world, 80).await, at(2), "its listing may lag");
    assert_eq!(after(&world, 120).await, at(4));
    let view = view(&world);
    assert_eq!(
        (view.blocked, view.lacks.wal_bytes, view.lacks.damaged_bytes),
        (None, MIB, 0)
    );
    assert!(view.lacks.detail.unwrap().contains("[0/200000, 0/300000)"));
}

/// What the server still has is not passed over with what it was told to be safe.
#[tokio::test(start_paused = true)]
async fn of_missing_wal_only_what_was_acknowledged_is_passed() {
    let mut world = robbed(Policy::All).await;
    let told = Position {
        lsn: Lsn(2 * MIB + 700),
        ..at(2)
    };
    world.shared.acknowledged = Some(told);
    assert_eq!(after(&world, 300).await, told);
    let view = view(&world);
    assert!(view.blocked.unwrap().contains("[0/2002BC, 0/300000)"));
    assert_eq!(view.lacks.wal_bytes, 700);
}

#[tokio::test(start_paused = true)]
async fn what_one_region_has_lost_is_taken_from_one_that_lags_itself() {
    let world = robbed(Policy::All).await;
    world.put_wal(2, second()).await;
    assert_eq!(after(&world, 10).await, at(4));
}

#[tokio::test(start_paused = true)]
async fn a_region_that_does_not_answer_may_have_what_the_others_lack() {
    let world = robbed(Policy::Any).await;
    world.silence(2);
    assert_eq!(after(&world, 150).await, at(2));
    assert_eq!(view(&world).blocked, None);
}

/// The end of timeline 1 is gone everywhere: the region goes on behind what was acknowledged of it, on timeline 2.
#[tokio::test(start_paused = true)]
async fn a_lost_end_of_a_timeline_that_was_acknowledged_does_not_keep_a_region_from_the_next() {
    let world = world(Policy::Any);
    let (shared, layout) = (&world.shared, &world.shared.archive.layout);
    let two = on_two(0).timeline;
    shared.progress.stored(0, at(2));
    shared.progress.stored(1, on_two(6));
    let history = layout.history(two);
    world.put(1, &history, "1\t0/400000\tpromoted\n").await;
    assert_eq!(after(&world, 120).await, at(4));
    assert_eq!(view(&world).lacks.wal_bytes, 2 * MIB);
    assert_eq!(step(&world, at(4)).await, on_two(4));
    assert!(world.has(0, &history).await);
}

/// The other region has lost the end of timeline 1: its history says where timeline 2 begins, and that must not carry
/// anybody over what is missing.
#[tokio::test(start_paused = true)]
async fn i5_no_region_enters_a_timeline_before_the_end_of_the_one_before_is_there() {
    let world = world(Policy::Any);
    let (shared, layout) = (&world.shared, &world.shared.archive.layout);
    let two = on_two(0).timeline;
    shared.progress.stored(1, on_two(6));
    let history = layout.history(two);
    world.put(1, &history, "1\t0/400000\tpromoted\n").await;
    let range = LsnRange::new(at(4).lsn, at(6).lsn);
    world.put(1, &layout.tail(two, range), "wal").await;

    let reached = step(&world, at(3)).await;
    assert_eq!(reached, at(3));
    assert_eq!(shared.progress.position(0), None);
    assert!(!world.has(0, &history).await);

    // With all of timeline 1 it goes on, history first.
    let reached = step(&world, at(4)).await;
    assert_eq!(reached, on_two(4));
    assert!(world.has(0, &history).await);
    assert!(!world.has(0, &layout.tail(two, range)).await);
}

/// A promotion that came to nothing: the old primary went on, and was followed by timeline 3. A region that lags does not go to where
/// nothing follows.
#[tokio::test(start_paused = true)]
async fn a_timeline_that_was_given_up_keeps_no_region_from_the_one_that_goes_on() {
    let world = world(Policy::All);
    let (shared, layout) = (&world.shared, &world.shared.archive.layout);
    let (two, three) = (on_two(0).timeline, TimelineId::new(3).unwrap());
    let on_three = |mib| Position {
        timeline: three,
        ..at(mib)
    };
    shared.progress.stored(1, on_three(9));
    world
        .put(1, &layout.history(two), "1\t0/400000\tgiven up\n")
        .await;
    world
        .put(1, &layout.history(three), "1\t0/600000\tpromoted\n")
        .await;
    for (timeline, from, to) in [(TimelineId::FIRST, 4, 6), (two, 4, 5), (three, 6, 9)] {
        let range = LsnRange::new(at(from).lsn, at(to).lsn);
        world.put(1, &layout.tail(timeline, range), "wal").await;
    }
    assert_eq!(step(&world, at(6)).await, on_three(6));
    assert!(world.has(0, &layout.history(three)).await);
    assert!(!world.has(0, &layout.history(two)).await);
}

/// The only region that had stored the history has lost it, and the window has forgotten it: another one that is still on
/// the timeline before gets it all the same.
#[tokio::test(start_paused = true)]
async fn a_history_that_was_lost_where_it_was_stored_comes_from_the_stream() {
    let world = world(Policy::Any);
    let (shared, layout) = (&world.shared, &world.shared.archive.layout);
    let two = on_two(0).timeline;
    shared.progress.stored(1, on_two(6));
    let range = LsnRange::new(at(4).lsn, at(6).lsn);
    world.put(1, &layout.tail(two, range), "wal").await;
    assert_eq!(step(&world, at(4)).await, at(4), "nothing says where it began");

    shared.window.attach(1, at(4)).unwrap();
    let (key, content) = (
        layout.history(two),
        Bytes::from_static(b"1\t0/400000\tpromoted\n"),
    );
    shared.window.push(Item {
        key: key.clone(),
        object: Object::new(content),
        what: What::History {
            timeline: two,
            begins: at(4).lsn,
            after: at(4),
        },
        charge: None,
    });
    shared.window.passed(1, 1);
    assert!(!shared.window.reaches(at(4)), "it is forgotten");
    assert_eq!(step(&world, at(4)).await, on_two(4));
    assert!(world.has(0, &key).await);
}

/// What is left of a history file may tell another switch: nothing is begun with it.
#[tokio::test(start_paused = true)]
async fn a_region_does_not_enter_a_timeline_by_what_is_left_of_its_history() {
    let world = world(Policy::Any);
    let (shared, layout) = (&world.shared, &world.shared.archive.layout);
    let two = on_two(0).timeline;
    shared.progress.stored(1, on_two(6));
    world.put(1, &layout.history(two), "1\t0/40").await;
    assert_eq!(step(&world, at(3)).await, at(3));
    let origin = origin(shared, world.region(0));
    let begun = tokio::time::timeout(Duration::from_secs(5), origin).await;
    assert!(begun.is_err(), "{begun:?}");
    assert!(!world.has(0, &layout.history(two)).await);
}

/// What became of a region at `at(2)` after two minutes in which the one that alone is further could not be listed.
async fn beside_a_dead_region(told: Option<Position>, dead: &[usize]) -> Result<Position> {
    let mut world = lagging(Policy::All).await;
    world.shared.acknowledged = told;
    dead.iter().for_each(|region| world.silence(*region));
    let mut absent = Absent::default();
    let until = tokio::time::Instant::now() + Duration::from_secs(120);
    while tokio::time::Instant::now() < until {
        let reached = advance(&world.shared, world.region(0), at(2), &mut absent).await?;
        assert_eq!(reached, at(2));
    }
    Ok(at(2))
}

/// The server has what the dead region alone holds, and would send it to an agent that starts now.
#[tokio::test(start_paused = true)]
async fn a_region_that_only_a_dead_one_could_fill_makes_the_agent_begin_anew() {
    for told in [None, Some(at(2))] {
        let ended = beside_a_dead_region(told, &[1]).await;
        assert!(matches!(ended, Err(AgentError::Restart { .. })), "{ended:?}");
    }
}

/// The server may have let it go: an agent that starts now would find a gap.
#[tokio::test(start_paused = true)]
async fn what_was_acknowledged_is_waited_for_however_long_its_region_is_away() {
    assert_eq!(beside_a_dead_region(Some(at(3)), &[1]).await.unwrap(), at(2));
}

/// An agent that starts now could read neither.
#[tokio::test(start_paused = true)]
async fn where_all_regions_are_away_nothing_is_gained_by_beginning_anew() {
    assert_eq!(beside_a_dead_region(None, &[0, 1]).await.unwrap(), at(2));
}
