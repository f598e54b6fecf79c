//! The planner against the model: known cases by hand, everything else at random.

use highwater_config::Exit;
use highwater_format::Lsn;
use proptest::prelude::*;

use super::{
    Plan, Reason,
    model::{Branch, Model, SEGMENT, SLOT, lsn, time, tli},
};
use crate::target::{Action, Request, Target};

/// One timeline of 40 slots with a commit in every third, and a backup from 4 to 6.
fn simple() -> Model {
    let mut model = Model::default();
    model.branches.insert(
        1,
        Branch {
            parent: None,
            end: 40,
        },
    );
    model.commits = (0..40)
        .step_by(3)
        .map(|slot| ((1, slot), i64::try_from(slot).unwrap() * 10))
        .collect();
    model.backups = vec![(1, 4, 6)];
    model.pulses.insert(1, 1000);
    model
}

fn to(target: Target) -> Request {
    Request::to(target)
}

fn setting<'p>(plan: &'p Plan, name: &str) -> Option<&'p str> {
    plan.target
        .settings
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, value)| value.as_str())
}

#[test]
fn the_end_of_the_archive() {
    let plan = simple().plan(&Request::latest()).unwrap();
    assert_eq!(plan.target.stop.lsn, lsn(40));
    assert_eq!(plan.wal.end, lsn(40));
    assert_eq!(
        plan.target.settings,
        [("recovery_target_timeline", "1".to_owned())]
    );
}

#[test]
fn a_time_becomes_the_lsn_of_the_last_transaction_to_keep() {
    let plan = simple().plan(&to(Target::Time(time(95)))).unwrap();
    assert_eq!(
        setting(&plan, "recovery_target_lsn"),
        Some(lsn(9).to_string().as_str())
    );
    assert_eq!(setting(&plan, "recovery_target_inclusive"), Some("true"));
    assert_eq!(plan.target.stop.lsn, lsn(10));
    assert_eq!(plan.target.stop.last_commit, Some(time(90)));
}

#[test]
fn a_time_is_inclusive_unless_asked_otherwise() {
    let model = simple();
    let inclusive = model.plan(&to(Target::Time(time(90)))).unwrap();
    assert_eq!(inclusive.target.stop.lsn, lsn(10));
    let exclusive = model
        .plan(&Request {
            exclusive: true,
            ..to(Target::Time(time(90)))
        })
        .unwrap();
    // The last transaction before the excluded one lies within the backup: its end is the state wanted.
    assert_eq!(exclusive.target.stop.lsn, lsn(7).min(exclusive.target.stop.lsn));
    assert_eq!(exclusive.target.stop.last_commit, Some(time(60)));
}

#[test]
fn an_idle_stretch_is_reachable_as_far_as_it_is_proven() {
    let model = simple();
    let plan = model.plan(&to(Target::Time(time(900)))).unwrap();
    assert_eq!(plan.target.stop.last_commit, Some(time(390)));
    let refusal = model.plan(&to(Target::Time(time(1001)))).unwrap_err();
    assert_eq!(
        refusal.reason,
        Reason::TooLate {
            end: lsn(40),
            time: Some(time(1000))
        }
    );
    assert_eq!(refusal.exit, Exit::No);
}

#[test]
fn a_time_before_the_backups_end_is_refused_and_not_rounded_up() {
    let refusal = simple().plan(&to(Target::Time(time(10)))).unwrap_err();
    assert!(
        matches!(refusal.reason, Reason::TooEarly { earliest, .. } if earliest == lsn(6)),
        "{refusal}"
    );
}

#[test]
fn an_older_backup_is_taken_for_an_earlier_target() {
    let mut model = simple();
    model.backups.push((1, 20, 24));
    assert_eq!(model.plan(&Request::latest()).unwrap().backup.start_lsn, lsn(20));
    assert_eq!(
        model.plan(&to(Target::Time(time(150)))).unwrap().backup.start_lsn,
        lsn(4)
    );
    assert_eq!(
        model.plan(&to(Target::Lsn(lsn(23)))).unwrap().backup.start_lsn,
        lsn(4)
    );
    assert_eq!(
        model.plan(&to(Target::Lsn(lsn(24)))).unwrap().backup.start_lsn,
        lsn(20)
    );
    assert_eq!(model.plan(&to(Target::Xid(15))).unwrap().backup.start_lsn, lsn(4));
}

#[test]
fn the_end_of_the_archive_is_an_lsn_that_can_be_asked_for() {
    let plan = simple().plan(&to(Target::Lsn(lsn(40)))).unwrap();
    // No record begins there, so PostgreSQL is told to stop behind the last one.
    assert_eq!(
        setting(&plan, "recovery_target_lsn"),
        Some(lsn(39).to_string().as_str())
    );
    let refusal = simple().plan(&to(Target::Lsn(lsn(41)))).unwrap_err();
    assert!(matches!(refusal.reason, Reason::TooLate { end, .. } if end == lsn(40)));
}

#[test]
fn a_hole_is_named_with_what_can_still_be_had() {
    let mut model = simple();
    model.lost.insert((1, 20));
    model.lost.insert((1, 21));
    let refusal = model.plan(&Request::latest()).unwrap_err();
    let Reason::Hole { range, .. } = &refusal.reason else {
        panic!("{refusal}")
    };
    assert_eq!((range.start, range.end), (lsn(20), lsn(22)));
    assert_eq!(refusal.exit, Exit::No);
    assert!(
        refusal.to_string().contains(&format!("--to-lsn {}", lsn(20))),
        "{refusal}"
    );
    assert!(
        model.plan(&to(Target::Lsn(lsn(20)))).is_ok(),
        "what the message offers must work"
    );
    assert!(model.plan(&to(Target::Time(time(170)))).is_ok());
    assert!(model.plan(&to(Target::Time(time(300)))).is_err());
}

#[test]
fn a_backup_behind_the_hole_reaches_the_end() {
    let mut model = simple();
    model.lost.insert((1, 20));
    model.backups.push((1, 24, 26));
    assert_eq!(model.plan(&Request::latest()).unwrap().backup.start_lsn, lsn(24));
}

/// PostgreSQL reads ahead of its target, past a break close behind it.
#[test]
fn fault_53_a_target_before_a_hole_takes_the_hole_for_the_end() {
    let mut model = simple();
    model.lost.insert((1, 20));
    let plan = model.plan(&to(Target::Lsn(lsn(19)))).unwrap();
    assert_eq!((plan.wal_end, plan.ragged), (lsn(20), true));
    assert!(setting(&plan, "recovery_target_lsn").is_some());
    assert!(!simple().plan(&to(Target::Lsn(lsn(19)))).unwrap().ragged);
}

#[test]
fn the_ragged_end_of_a_crash_is_an_end_and_not_a_hole() {
    let mut model = simple();
    model.lost.insert((1, 38));
    assert!(
        model.plan(&Request::latest()).is_err(),
        "the pulse says that slot 38 was stored"
    );
    let mut catalog = model.catalog();
    let pulse = catalog.regions[0].pulse.as_mut().unwrap();
    (pulse.stored_lsn, pulse.durable_lsn) = (lsn(37), lsn(37));
    let super::Step::Ask(question) =
        super::plan(&catalog, &Request::latest(), &super::Answers::new()).unwrap()
    else {
        panic!("planned without a look at the WAL")
    };
    assert!(matches!(question, super::Question::Records { lsn: at, .. } if at == lsn(38)));
    let plan = model.plan_for(&catalog, &Request::latest()).unwrap();
    assert_eq!((plan.wal_end, plan.ragged), (lsn(38), true));
    assert!(!simple().plan(&Request::latest()).unwrap().ragged);
}

#[test]
fn a_silent_region_makes_no_answer_final() {
    let mut model = simple();
    model.silent = true;
    let refusal = model.plan(&Request::latest()).unwrap_err();
    assert_eq!(
        (&refusal.reason, refusal.exit),
        (&Reason::RegionUnreadable, Exit::Trouble)
    );
    assert!(refusal.next.contains("--without-region b"), "{refusal}");
    let refusal = model.plan(&to(Target::Lsn(lsn(41)))).unwrap_err();
    assert_eq!(refusal.exit, Exit::Trouble, "the other region may hold it");
    let plan = model.plan(&to(Target::Lsn(lsn(30)))).unwrap();
    assert!(
        plan.notes
            .iter()
            .any(|note| note.contains("region b cannot be read")),
        "{:?}",
        plan.notes
    );
}

/// Timeline 2 leaves 1 at slot 22, in the middle of a segment; 3 leaves 2 at 30.
fn tree() -> Model {
    let mut model = simple();
    model.branches.insert(
        2,
        Branch {
            parent: Some((1, 22)),
            end: 36,
        },
    );
    model.branches.insert(
        3,
        Branch {
            parent: Some((2, 30)),
            end: 50,
        },
    );
    model.commits.insert((2, 25), 260);
    model.commits.insert((3, 31), 400);
    model.pulses.insert(3, 1000);
    model
}

#[test]
fn the_latest_timeline_is_followed_through_its_ancestors() {
    let plan = tree().plan(&Request::latest()).unwrap();
    assert_eq!((plan.timeline, plan.target.stop.lsn), (tli(3), lsn(50)));
    assert_eq!(plan.histories(), [tli(2), tli(3)]);
    let names: Vec<u32> = plan.segments().map(|segment| segment.timeline.get()).collect();
    // Slots 4 to 49 are segments 2 to 13; a segment that holds a switch point is asked for under the newer timeline.
    assert_eq!(names, [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]);
}

#[test]
fn a_target_on_an_ancestor_is_recovered_on_that_ancestor() {
    assert_eq!(tree().plan(&to(Target::Lsn(lsn(15)))).unwrap().timeline, tli(1));
    assert_eq!(tree().plan(&to(Target::Lsn(lsn(25)))).unwrap().timeline, tli(2));
    let exclusive = |slot| Request {
        exclusive: true,
        ..to(Target::Lsn(lsn(slot)))
    };
    // The record to stop before is the first one of timeline 2.
    assert_eq!(tree().plan(&exclusive(22)).unwrap().timeline, tli(2));
    assert_eq!(tree().plan(&exclusive(21)).unwrap().timeline, tli(1));
    let mut only_copied = tree();
    only_copied.lost.insert((1, 20));
    assert_eq!(
        only_copied.plan(&to(Target::Lsn(lsn(21)))).unwrap().timeline,
        tli(3),
        "only later timelines have slot 20"
    );
}

/// A region that was away gets the history of the new timeline first. Alone, it knows that there was more WAL.
#[test]
fn an_end_before_the_newest_timeline_begins_is_a_hole() {
    let mut model = tree();
    model.branches.remove(&3);
    model.pulses.clear();
    model.lost.extend((20..36).map(|slot| (2, slot)));
    model.lost.extend((18..40).map(|slot| (1, slot)));
    let refusal = model.plan(&Request::latest()).unwrap_err();
    let Reason::Hole { timeline, range, .. } = &refusal.reason else {
        panic!("{refusal}");
    };
    assert_eq!((*timeline, range.start, range.end), (tli(1), lsn(18), lsn(22)));
    let plan = model.plan(&to(Target::Lsn(lsn(18)))).unwrap();
    assert_eq!((plan.timeline, plan.wal.end), (tli(1), lsn(18)));
}

/// Its `pg_control` may be consistent before the end of the backup: what lies between is named as the end.
#[test]
fn a_standbys_backup_is_replayed_to_its_end() {
    let mut model = simple();
    model.standby = true;
    for target in [Target::Immediate, Target::Time(time(55))] {
        let plan = model.plan(&to(target)).unwrap();
        assert_eq!(plan.target.stop.lsn, lsn(6));
        assert_eq!(setting(&plan, "recovery_target"), None);
        let last = lsn(5).to_string();
        assert_eq!(setting(&plan, "recovery_target_lsn"), Some(last.as_str()));
        assert_eq!(setting(&plan, "recovery_target_inclusive"), Some("true"));
    }
}

#[test]
fn bytes_before_a_switch_may_come_from_either_timeline() {
    let mut model = tree();
    // Slots 20 and 21 were copied from timeline 1 into the segment of timeline 2.
    model.lost.insert((1, 20));
    assert!(model.plan(&Request::latest()).is_ok());
    model.lost.insert((2, 20));
    assert!(model.plan(&Request::latest()).is_err());
    model.lost.remove(&(1, 20));
    assert!(model.plan(&Request::latest()).is_ok());
}

#[test]
fn a_missing_history_is_not_a_shorter_history() {
    let mut model = tree();
    model.forgotten.insert(3);
    let refusal = model.plan(&Request::latest()).unwrap_err();
    assert_eq!(
        (&refusal.reason, refusal.exit),
        (&Reason::BrokenHistory { timeline: tli(3) }, Exit::Damage)
    );
    model.forgotten = [2].into();
    let on_first = Request {
        timeline: Some(tli(1)),
        ..to(Target::Lsn(lsn(39)))
    };
    // A server promoted from the first one would ask for that file too, to find a free number.
    let refusal = model.plan(&on_first).unwrap_err();
    assert_eq!(
        (&refusal.reason, refusal.exit),
        (&Reason::BrokenHistory { timeline: tli(2) }, Exit::Damage)
    );
    let look = Request {
        action: Action::Pause,
        ..on_first.clone()
    };
    assert!(model.plan(&look).is_ok(), "what needs no history can be had");
    // Numbers behind a free one are not asked for, nor those before the target's.
    model.branches.remove(&2);
    model.forgotten = [3].into();
    model.branches.get_mut(&3).unwrap().parent = Some((1, 30));
    assert_eq!(model.plan(&on_first).unwrap().timeline, tli(1));
}

/// PostgreSQL needs the history of its target only, and that names every ancestor.
#[test]
fn a_descendants_history_stands_in_for_that_of_an_ancestor() {
    let mut model = tree();
    let whole = model.plan(&Request::latest()).unwrap();
    model.forgotten.insert(2);
    let plan = model.plan(&Request::latest()).unwrap();
    assert_eq!((plan.timeline, plan.wal), (tli(3), whole.wal));
    assert_eq!(plan.chain.history, whole.chain.history);
    // What timeline 2 has behind slot 30 is told of as before.
    assert_eq!(plan.notes, whole.notes);
    assert!(
        plan.notes
            .iter()
            .any(|note| note.contains("of timeline 2 is not in"))
    );

    // The archive was begun on timeline 3: of the others there is nothing at all.
    model.backups = vec![(3, 32, 34)];
    let mut catalog = model.catalog();
    for timeline in [1, 2] {
        catalog.regions[0].timelines.remove(&tli(timeline));
    }
    for target in [Target::Latest, Target::Lsn(lsn(40)), Target::Immediate] {
        let plan = model.plan_for(&catalog, &to(target)).unwrap();
        assert_eq!(plan.timeline, tli(3));
        assert_eq!(setting(&plan, "recovery_target_timeline"), Some("3"));
    }
}

/// The new timeline would be noted as one that leaves timeline 3 before that began.
#[test]
fn a_target_on_an_ancestor_without_a_history_is_no_place_to_promote() {
    let mut model = tree();
    model.forgotten.insert(2);
    let refusal = model.plan(&to(Target::Lsn(lsn(25)))).unwrap_err();
    assert_eq!(
        (&refusal.reason, refusal.exit),
        (&Reason::BrokenHistory { timeline: tli(2) }, Exit::Damage)
    );
    assert!(refusal.next.contains("--action pause"), "{refusal}");
    let look = Request {
        action: Action::Pause,
        ..to(Target::Lsn(lsn(25)))
    };
    let plan = model.plan(&look).unwrap();
    assert_eq!((plan.timeline, plan.target.stop.lsn), (tli(3), lsn(26)));
}

#[test]
fn another_timeline_is_offered_when_it_reaches_the_target() {
    let request = Request {
        timeline: Some(tli(2)),
        ..to(Target::Lsn(lsn(45)))
    };
    let refusal = tree().plan(&request).unwrap_err();
    assert!(refusal.next.contains("--timeline 3"), "{refusal}");
    let unknown = Request {
        timeline: Some(tli(9)),
        ..Request::latest()
    };
    assert_eq!(
        tree().plan(&unknown).unwrap_err().reason,
        Reason::UnknownTimeline { timeline: tli(9) }
    );
}

prop_compose! {
    fn branches()(
        ends in prop::collection::vec(8u64..48, 1..5),
        parents in prop::collection::vec((0usize..4, 1u64..48), 4),
    ) -> Vec<(Option<(u32, u64)>, u64)> {
        let mut built: Vec<(Option<(u32, u64)>, u64)> = Vec::new();
        for (index, end) in ends.iter().enumerate() {
            if index == 0 {
                built.push((None, *end));
                continue;
            }
            let (parent, at) = parents[index - 1];
            let parent = parent % index;
            let begin = built[parent].0.map_or(0, |(_, switch)| switch);
            let switch = begin + at % (built[parent].1 - begin + 1);
            built.push((Some((u32::try_from(parent).unwrap() + 1, switch)), switch + end / 2));
        }
        built
    }
}

prop_compose! {
    fn models()(
        branches in branches(),
        commits in prop::collection::btree_set((1u32..5, 0u64..64), 0..60),
        lost in prop::collection::btree_set((1u32..5, 0u64..64), 0..4),
        backups in prop::collection::vec((1u32..5, 0u64..40, 1u64..4), 0..4),
        steps in prop::collection::vec(0i64..30, 64),
        pulse in 0i64..2000,
        silent in prop::bool::weighted(0.1),
        standby: bool,
    ) -> Model {
        let mut model = Model { lost, silent, standby, ..Model::default() };
        for (index, (parent, end)) in branches.into_iter().enumerate() {
            model.branches.insert(u32::try_from(index).unwrap() + 1, Branch { parent, end });
        }
        // Times rise with the slot; the same slot has the same time on every timeline, so branches never go back.
        let seconds: Vec<i64> = steps.iter().scan(0, |sum, step| { *sum += step; Some(*sum) }).collect();
        model.commits = commits.into_iter().map(|(timeline, slot)| ((timeline, slot), seconds[usize::try_from(slot).unwrap()])).collect();
        for (timeline, start, length) in backups {
            let Some(branch) = model.branches.get(&timeline) else { continue };
            let begin = branch.parent.map_or(0, |(_, switch)| switch);
            let start = begin + start;
            let taken = model.backups.iter().any(|(other, at, _)| (*other, *at) == (timeline, start));
            if start + length <= branch.end && !taken {
                model.backups.push((timeline, start, start + length));
            }
        }
        let newest = *model.branches.keys().last().unwrap();
        model.pulses.insert(newest, seconds[63] + pulse);
        model
    }
}

/// What the model says by trying everything: can recovery that ends on `timeline` replay exactly the slots before `stop`?
fn reachable(model: &Model, timeline: u32, stop: u64) -> bool {
    model.backups.iter().any(|(of, start, end)| {
        let path = model.ancestry(timeline);
        let on_path = path
            .iter()
            .any(|(id, switch)| id == of && lsn(*end) <= lsn((*switch).min(1 << 20)));
        let first = start - start % (SEGMENT / SLOT);
        on_path && *end <= stop && (first..stop).all(|slot| model.readable(timeline, slot))
    })
}

/// No slot of the plan is missing, and the backup's own WAL is in it.
fn check_sound(model: &Model, plan: &Plan) -> Result<(), TestCaseError> {
    let slot = |lsn: Lsn| (lsn.0 - SEGMENT) / SLOT;
    let timeline = plan.timeline.get();
    for at in slot(plan.wal.start)..slot(plan.wal.end) {
        prop_assert!(model.readable(timeline, at), "slot {at} of the plan is not there");
    }
    prop_assert!(plan.backup.stop_lsn <= plan.target.stop.lsn);
    prop_assert!(plan.target.stop.lsn <= plan.wal.end);
    // What a standby's copy says of its own consistency is earlier than the end of its backup.
    prop_assert!(!model.standby || setting(plan, "recovery_target").is_none());
    let catalog = model.catalog();
    for segment in plan.segments() {
        let need = plan
            .need(&catalog, segment)
            .map_err(|hole| TestCaseError::fail(hole.to_string()))?;
        prop_assert!(need.pieces.iter().all(|piece| !piece.regions.is_empty()));
        let held: u64 = need.pieces.iter().map(|piece| piece.used.len()).sum();
        prop_assert_eq!(held, need.range.len());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Every LSN is planned exactly when the model can reach it.
    #[test]
    fn lsns_are_planned_exactly_when_they_are_reachable(model in models(), slot in 0u64..64, pick in 0u32..4) {
        let timelines: Vec<u32> = model.branches.keys().copied().collect();
        let timeline = timelines[pick as usize % timelines.len()];
        let request = Request { timeline: Some(tli(timeline)), ..to(Target::Lsn(lsn(slot))) };
        match model.plan(&request) {
            Ok(plan) => {
                check_sound(&model, &plan)?;
                prop_assert!(reachable(&model, timeline, slot));
                prop_assert!(plan.target.stop.lsn >= lsn(slot));
            }
            Err(refusal) => {
                prop_assert!(!reachable(&model, timeline, slot), "refused: {}", refusal);
                prop_assert_eq!(refusal.exit, if model.silent { Exit::Trouble } else { Exit::No });
            }
        }
    }

    /// The end of the archive is planned only when nothing that exists on the chain is left behind.
    #[test]
    fn latest_never_stops_short(model in models()) {
        let newest = *model.branches.keys().last().unwrap();
        let end = model.branches[&newest].end;
        match model.plan(&Request::latest()) {
            Ok(plan) => {
                check_sound(&model, &plan)?;
                prop_assert!(!model.silent);
                prop_assert_eq!(plan.timeline, tli(newest));
                prop_assert_eq!(plan.wal.end, lsn(end));
            }
            Err(refusal) => prop_assert!(model.silent || !reachable(&model, newest, end), "refused: {}", refusal),
        }
    }

    /// A time keeps every transaction up to it and none after it, by brute force over the model.
    #[test]
    fn times_keep_exactly_what_is_not_later(model in models(), second in 0i64..2000, exclusive: bool) {
        let newest = *model.branches.keys().last().unwrap();
        let request = Request { exclusive, ..to(Target::Time(time(second))) };
        let Ok(plan) = model.plan(&request) else { return Ok(()) };
        check_sound(&model, &plan)?;
        let keeps = |at: i64| at < second || (!exclusive && at == second);
        let stop = (plan.target.stop.lsn.0 - SEGMENT) / SLOT;
        for slot in 0..model.branches[&newest].end {
            let Some(at) = model.commits.get(&(model.timeline_of(newest, slot), slot)) else { continue };
            prop_assert_eq!(slot < stop, keeps(*at), "slot {} at {}", slot, at);
        }
    }

    /// A time within reach is not refused: one between a backup's end and what the pulse proves.
    #[test]
    fn times_are_planned_when_they_are_reachable(model in models(), second in 0i64..2000) {
        let newest = *model.branches.keys().last().unwrap();
        let end = model.branches[&newest].end;
        let proven = model.pulses[&newest];
        let consistent = model.backups.iter().enumerate().any(|(index, (of, _, stop))| {
            let whole = Model { backups: vec![model.backups[index]], ..model.clone() };
            model.ancestry(newest).iter().any(|(id, switch)| id == of && stop <= switch)
                && model.backup(index).finished_at <= time(second)
                && reachable(&whole, newest, end)
        });
        let outcome = model.plan(&to(Target::Time(time(second))));
        if consistent && second <= proven {
            prop_assert!(outcome.is_ok(), "refused: {}", outcome.unwrap_err());
        }
        if second > proven {
            let refusal = outcome.unwrap_err();
            prop_assert!(refusal.exit == Exit::No || model.silent);
        }
    }

    /// A transaction is found, and kept or left out as asked, whenever some backup before it reaches it.
    #[test]
    fn transactions_are_found_when_they_are_reachable(model in models(), pick: prop::sample::Index, exclusive: bool) {
        let newest = *model.branches.keys().last().unwrap();
        let on_chain: Vec<u64> = (0..model.branches[&newest].end)
            .filter(|slot| *slot >= 3 && model.commits.contains_key(&(model.timeline_of(newest, *slot), *slot)))
            .collect();
        prop_assume!(!on_chain.is_empty());
        let slot = *pick.get(&on_chain);
        let request = Request { exclusive, ..to(Target::Xid(u32::try_from(slot).unwrap())) };
        // The transaction's own record is looked at to find it, so it must be readable even when it is left out.
        let backup_before = |stop: u64| model.backups.iter().any(|(_, _, end)| *end <= stop) ;
        match model.plan(&request) {
            Ok(plan) => {
                check_sound(&model, &plan)?;
                prop_assert_eq!(plan.target.stop.lsn, lsn(if exclusive { slot } else { slot + 1 }));
            }
            Err(_) => {
                let before = reachable(&model, newest, slot) && reachable(&model, newest, slot + 1);
                prop_assert!(!before || !backup_before(slot));
            }
        }
    }

    /// Both ends of every window shown can be restored, and nothing behind it can.
    #[test]
    fn windows_are_what_can_be_restored(model in models()) {
        let catalog = model.catalog();
        for (timeline, windows) in super::windows(&catalog, &catalog.readable()) {
            for window in windows.map_err(|broken| TestCaseError::fail(broken.to_string()))? {
                let slot = |lsn: Lsn| (lsn.0 - SEGMENT) / SLOT;
                for at in slot(window.from)..=slot(window.to) {
                    prop_assert!(reachable(&model, timeline.get(), at), "slot {} of timeline {}", at, timeline);
                }
                let next = slot(window.to);
                prop_assert!(!model.readable(timeline.get(), next), "it goes on behind {}", window.to);
            }
        }
    }
}
