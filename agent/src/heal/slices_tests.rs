use std::time::Duration;

use highwater_config::Policy;
use highwater_format::{BackupId, SegmentName, Time};
use proptest::prelude::*;

use super::*;
use crate::clock::Clock;
use crate::heal::lack::Step;
use crate::test_world::{MIB, World, world};

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn at(number: u32, lsn: u64) -> Position {
    Position {
        timeline: timeline(number),
        lsn: Lsn(lsn),
    }
}

fn healer(world: &World, position: Position) -> Healer {
    for region in 0..3 {
        world.shared.progress.stored(region, position);
    }
    let region = world.shared.archive.regions[0].clone();
    Healer::new(
        world.shared.clone(),
        region,
        Duration::from_secs(900),
        Clock::system(),
    )
}

/// A segment, or the part of one that begins and ends after so many sixteenths.
#[derive(Clone, Copy, Debug)]
struct Stored {
    region: usize,
    timeline: u32,
    segment: u64,
    part: Option<(u64, u64)>,
    size: usize,
}

impl Stored {
    fn key(&self, world: &World) -> String {
        let (layout, size) = (&world.shared.archive.layout, world.shared.segment_size);
        let (timeline, number) = (timeline(self.timeline), self.segment);
        let start = number * MIB;
        match self.part {
            None => layout.segment(SegmentName { timeline, number }, size),
            Some((from, to)) => {
                let at = |part| Lsn(start + part * MIB / 16);
                layout.tail(timeline, LsnRange::new(at(from), at(to)))
            }
        }
    }
}

fn stored() -> impl Strategy<Value = Stored> {
    let part =
        proptest::option::of((0..15_u64, 1..16_u64).prop_map(|(from, len)| (from, (from + len).min(16))));
    (0..3_usize, 1..3_u32, 1..9_u64, part, 1..3_usize).prop_map(|(region, timeline, segment, part, size)| {
        Stored {
            region,
            timeline,
            segment,
            part,
            size,
        }
    })
}

/// All of a region at once.
async fn whole(healer: &Healer, region: &Region, timeline: TimelineId, from: Lsn) -> Vec<Piece> {
    let range = LsnRange::new(from, Lsn::MAX);
    let listing = healer.listing();
    let all = listing.slice(&*region.quick, timeline, range, usize::MAX);
    all.await.unwrap().pieces
}

/// What the region lacks, in ranges and in pieces: the plain comparison of everything with everything.
async fn expected(
    healer: &Healer,
    world: &World,
    position: Position,
    floor: Option<Position>,
) -> (
    Vec<(TimelineId, LsnRange)>,
    BTreeSet<(TimelineId, Lsn, Lsn, usize)>,
) {
    let (mut ranges, mut pieces) = (Vec::new(), BTreeSet::new());
    let mut known = BTreeMap::<TimelineId, Coverage>::new();
    for (peer, region) in world.peers.iter().enumerate() {
        for number in 1..=position.timeline.get() {
            let timeline = timeline(number);
            let from = match floor {
                Some(floor) if floor.timeline > timeline => continue,
                Some(floor) if floor.timeline == timeline => floor.lsn,
                _ => Lsn::ZERO,
            };
            let end = if timeline == position.timeline {
                position.lsn
            } else {
                Lsn::MAX
            };
            let ours = whole(healer, world.region(0), timeline, from).await;
            let theirs: Coverage = whole(healer, region, timeline, from).await.into_iter().collect();
            let covered = known
                .entry(timeline)
                .or_insert_with(|| ours.into_iter().collect());
            let mut chosen = Vec::new();
            for run in theirs.runs() {
                let Some(run) = run.intersect(LsnRange::new(Lsn::ZERO, end)) else {
                    continue;
                };
                for hole in covered.holes(run) {
                    chosen.extend(theirs.cover(hole).unwrap());
                    ranges.push((timeline, hole));
                }
            }
            pieces.extend(
                chosen
                    .iter()
                    .map(|piece| (timeline, piece.range.start, piece.range.end, peer)),
            );
            covered.extend(chosen);
        }
    }
    (ranges, pieces)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn slices_say_what_everything_at_once_says(
        objects in proptest::collection::vec(stored(), 0..70),
        limit in 1..6_usize,
        last in (1..3_u32, 1..9 * 16_u64),
        oldest in proptest::option::of((1..3_u32, 1..6 * 16_u64)),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let world = world(Policy::All);
            for object in &objects {
                world.put(object.region, &object.key(&world), vec![b'x'; object.size]).await;
            }
            if let Some((number, start)) = oldest {
                let id = BackupId::new(timeline(number), Lsn(start * MIB / 16), Time::from_unix_micros(1));
                for region in 0..3 {
                    world.put(region, &world.shared.archive.layout.backup(&id), "x").await;
                }
            }
            let position = at(last.0, last.1 * MIB / 16);
            let healer = healer(&world, position);
            let mut outcome = Outcome::default();
            let found = healer.compare_by(position, &mut outcome, limit, usize::MAX).await.unwrap();
            let floor = oldest.map(|(number, start)| at(number, start * MIB / 16));
            let (ranges, pieces) = expected(&healer, &world, position, floor).await;
            prop_assert_eq!(&found.lack.wal, &ranges);
            let needed = |(timeline, _, end, _): &(TimelineId, Lsn, Lsn, usize)| {
                floor.is_none_or(|floor| floor < Position { timeline: *timeline, lsn: *end })
            };
            let mut steps = Vec::new();
            for step in &found.lack.steps {
                if let Step::Wal(timeline, piece, peer) = step {
                    steps.push((*timeline, piece.range.start, piece.range.end, *peer));
                }
            }
            let in_order: Vec<_> = pieces.into_iter().filter(needed).collect();
            prop_assert_eq!(steps, in_order);
            // What the report compares with the time before.
            for (number, region, held) in [(0, world.region(0), &found.ours), (1, &*world.peers[0], &found.theirs[0])] {
                for (timeline, wal) in &held.wal {
                    let from = floor.filter(|floor| floor.timeline == *timeline).map_or(Lsn::ZERO, |floor| floor.lsn);
                    let all: Coverage = whole(&healer, region, *timeline, from).await.into_iter().collect();
                    prop_assert_eq!(&wal.runs, &all.runs(), "region {}", number);
                }
            }
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn no_page_and_no_slice_grows_with_the_archive() {
    let world = world(Policy::All);
    for region in 0..2 {
        for segment in 1..400 {
            let object = Stored {
                region,
                timeline: 1,
                segment,
                part: None,
                size: 1,
            };
            world.put(region, &object.key(&world), "x").await;
        }
    }
    let position = at(1, 400 * MIB);
    let healer = healer(&world, position);
    let region = &world.shared.archive.regions[0];
    let mut cursor = Cursor::new(healer.listing(), &*region.quick, timeline(1), Lsn::ZERO);
    let (mut at, mut slices) = (Lsn::ZERO, 0);
    while at < Lsn::MAX {
        at = cursor.look(at, 50).await.unwrap();
        assert!(cursor.take(at).len() <= 50);
        slices += 1;
    }
    assert_eq!(slices, 8);
    let mut outcome = Outcome::default();
    let found = healer.compare_by(position, &mut outcome, 50, 10).await.unwrap();
    assert!(found.lack.is_empty() && !found.lack.more);
    assert_eq!(
        found.ours.wal[&timeline(1)].runs,
        [LsnRange::new(Lsn(MIB), Lsn(400 * MIB))]
    );
}

#[tokio::test]
async fn a_peer_that_fails_leaves_the_others_compared() {
    let world = world(Policy::All);
    let object = Stored {
        region: 2,
        timeline: 1,
        segment: 3,
        part: None,
        size: 1,
    };
    world.put(2, &object.key(&world), "x").await;
    let position = at(1, 9 * MIB);
    let healer = healer(&world, position);
    world.silence(1);
    let mut outcome = Outcome::default();
    let found = healer.compare(position, &mut outcome).await.unwrap();
    assert!(outcome.partial);
    assert_eq!(
        found.lack.wal,
        [(timeline(1), LsnRange::new(Lsn(3 * MIB), Lsn(4 * MIB)))]
    );
}
