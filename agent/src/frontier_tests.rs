//! The frontier against a model that counts.

use highwater_config::Policy;
use highwater_format::{Lsn, TimelineId};
use proptest::prelude::*;

use super::*;

fn at(timeline: u32, lsn: u64) -> Position {
    Position {
        timeline: TimelineId::new(timeline).unwrap(),
        lsn: Lsn(lsn),
    }
}

#[test]
fn all_waits_for_the_last_region() {
    let mut frontier = Frontier::new(Policy::All, 2);
    assert_eq!(frontier.stored(0, at(1, 100)), None);
    assert_eq!(frontier.durable(), None);
    assert_eq!(
        frontier.stored(1, at(1, 60)).map(DurableLsn::position),
        Some(at(1, 60))
    );
    assert_eq!(
        frontier.stored(1, at(1, 200)).map(DurableLsn::position),
        Some(at(1, 100))
    );
}

#[test]
fn any_follows_the_first_region() {
    let mut frontier = Frontier::new(Policy::Any, 2);
    assert_eq!(
        frontier.stored(1, at(1, 60)).map(DurableLsn::position),
        Some(at(1, 60))
    );
    assert_eq!(frontier.stored(0, at(1, 50)), None);
}

fn history(timeline: u32, text: &str) -> History {
    History::parse(TimelineId::new(timeline).unwrap(), text.as_bytes()).unwrap()
}

#[test]
fn an_ancestor_counts_up_to_where_it_was_left() {
    let mut frontier = Frontier::new(Policy::All, 1);
    let durable = frontier.stored(0, at(1, 0x500)).unwrap();
    assert_eq!(durable.reportable(&history(1, "")), Lsn(0x500));
    assert_eq!(durable.reportable(&history(2, "1\t0/400\tx\n")), Lsn(0x400));
    let grandchild = history(3, "1\t0/100\tx\n2\t0/200\tx\n");
    assert_eq!(
        durable.reportable(&grandchild),
        Lsn(0x100),
        "the nearest fork is not the one that counts"
    );
    let newer = frontier.stored(0, at(2, 0x450)).unwrap();
    assert_eq!(newer.reportable(&history(1, "")), Lsn::ZERO);
    assert_eq!(
        newer.reportable(&history(3, "1\t0/100\tx\n")),
        Lsn::ZERO,
        "no ancestor"
    );
}

proptest! {
    #[test]
    fn durable_is_held_by_enough_regions_and_never_moves_back(
        policy in prop_oneof![Just(Policy::All), Just(Policy::Any), (1usize..4).prop_map(|n| Policy::Count(n.try_into().unwrap()))],
        events in proptest::collection::vec((0usize..3, 1u32..3, 0u64..1000), 1..60),
    ) {
        let mut frontier = Frontier::new(policy, 3);
        let mut model: [Option<Position>; 3] = [None; 3];
        let mut last = None;
        let wanted = match policy { Policy::All => 3, Policy::Any => 1, Policy::Count(n) => n.get() };
        for (region, timeline, lsn) in events {
            let position = at(timeline, lsn);
            frontier.stored(region, position);
            model[region] = model[region].max(Some(position));
            if let Some(durable) = frontier.durable() {
                let holders = model.iter().flatten().filter(|held| **held >= durable.position()).count();
                prop_assert!(holders >= wanted);
                prop_assert!(last.is_none_or(|before| before <= durable));
                last = Some(durable);
            } else {
                prop_assert!(model.iter().flatten().count() < wanted);
            }
        }
    }
}
