//! Which timeline is followed by default, where the newest one may be no more than a history.

use highwater_config::Exit;
use highwater_format::coverage::{Piece, PieceKind};
use highwater_format::{LsnRange, TimelineId};

use crate::plan::{
    Plan, Reason, Refusal,
    model::{Branch, Model, lsn, tli},
};
use crate::target::{Request, Target};

/// Timeline 1 up to `end`, with a backup from 4 to 6, and timeline 2, which left it at slot 22 and has nothing of its own.
fn model(end: u64) -> Model {
    let mut model = Model::default();
    model.branches.insert(1, Branch { parent: None, end });
    branch(&mut model, 2, (1, 22), 22);
    model.backups = vec![(1, 4, 6)];
    model.pulses.insert(1, 1000);
    model
}

fn branch(model: &mut Model, timeline: u32, parent: (u32, u64), end: u64) {
    let parent = Some(parent);
    model.branches.insert(timeline, Branch { parent, end });
}

fn latest(model: &Model) -> Result<Plan, Refusal> {
    model.plan(&Request::latest())
}

/// Nothing was passed over for it.
fn followed(model: &Model) -> TimelineId {
    let plan = latest(model).unwrap();
    assert!(!is_told(&plan), "{:?}", plan.notes);
    plan.timeline
}

fn is_told(plan: &Plan) -> bool {
    plan.notes.iter().any(|note| note.contains("is passed over"))
}

fn hole(refusal: &Refusal) -> LsnRange {
    match refusal.reason {
        Reason::Hole { range, .. } => range,
        _ => panic!("{refusal}"),
    }
}

/// The promoted server and its agent died at once; the old primary came back and was archived further.
#[test]
fn a_history_alone_is_passed_over_where_its_parent_goes_on() {
    let mut model = model(40);
    // With the copy of what the parent wrote in the segment of the switch, and without it.
    for lost in [None, Some([(2, 20), (2, 21)])] {
        model.lost.extend(lost.into_iter().flatten());
        let plan = latest(&model).unwrap();
        assert_eq!((plan.timeline, plan.wal.end), (tli(1), lsn(40)));
        // By its number: "latest" would be timeline 2 to PostgreSQL.
        let settings = [("recovery_target_timeline", "1".to_owned())];
        assert_eq!(plan.target.settings, settings);
        let told = |note: &&String| note.contains("timeline 2 is passed over");
        let note = plan.notes.iter().find(told).unwrap();
        assert!(note.contains("--timeline 2 "), "{note}");
    }
    let asked = Request {
        timeline: Some(tli(2)),
        ..Request::latest()
    };
    let plan = model.plan(&asked).unwrap();
    assert_eq!((plan.timeline, plan.wal.end), (tli(2), lsn(22)));
    assert!(!is_told(&plan), "{:?}", plan.notes);
}

/// A clean promotion a moment ago: both hold the same, and only the new one is not about to be left behind.
#[test]
fn a_history_alone_is_followed_where_its_parent_ends_at_the_switch() {
    let mut model = model(22);
    assert_eq!(followed(&model), tli(2));
    // Not back to a branch that was abandoned long ago either.
    model.branches.remove(&2);
    branch(&mut model, 2, (1, 10), 15);
    branch(&mut model, 3, (1, 22), 22);
    assert_eq!(followed(&model), tli(3));
}

#[test]
fn a_history_alone_shows_a_hole_before_its_switch() {
    let mut model = model(40);
    model.pulses.clear();
    model.lost.extend([(2, 20), (2, 21)]);
    model.lost.extend((18..24).map(|slot| (1, slot)));
    let refusal = latest(&model).unwrap_err();
    assert_eq!(hole(&refusal), LsnRange::new(lsn(18), lsn(22)));
    // A newer backup of the old timeline leads past it.
    model.backups.push((1, 28, 30));
    let plan = latest(&model).unwrap();
    assert_eq!((plan.timeline, plan.wal.end), (tli(1), lsn(40)));
}

/// A restore to a point of timeline 1, of which no more than the history was archived, beside the timeline in use.
#[test]
fn the_highest_number_of_those_left_is_followed() {
    let mut model = model(30);
    branch(&mut model, 2, (1, 28), 50);
    branch(&mut model, 3, (1, 12), 12);
    let plan = latest(&model).unwrap();
    assert_eq!((plan.timeline, plan.wal.end), (tli(2), lsn(50)));
    assert!(is_told(&plan), "{:?}", plan.notes);
}

#[test]
fn a_timeline_of_which_there_was_more_is_not_passed_over() {
    let mut model = model(40);
    branch(&mut model, 2, (1, 22), 24);
    let mut catalog = model.catalog();
    for slot in [22, 23] {
        let piece = Piece {
            range: LsnRange::new(lsn(slot), lsn(slot + 1)),
            kind: PieceKind::Tail,
            size: 100,
        };
        catalog.spoil(tli(2), &piece, "rotten".to_owned());
    }
    let refusal = model.plan_for(&catalog, &Request::latest()).unwrap_err();
    assert_eq!(hole(&refusal), LsnRange::new(lsn(22), lsn(24)));
    assert_eq!(refusal.exit, Exit::Damage);

    model.lost.extend((20..24).map(|slot| (2, slot)));
    model.pulses.insert(2, 1000);
    let refusal = latest(&model).unwrap_err();
    assert_eq!(
        hole(&refusal),
        LsnRange::new(lsn(22), lsn(24)),
        "claimed by the pulse"
    );
}

#[test]
fn a_history_alone_is_passed_over_only_where_everything_was_read() {
    let mut model = model(40);
    model.silent = true;
    let refusal = model.plan(&Request::to(Target::Lsn(lsn(30)))).unwrap_err();
    assert_eq!(refusal.exit, Exit::Trouble);
    assert!(refusal.next.contains("--timeline 1"), "{refusal}");

    model.silent = false;
    model.forgotten.insert(2);
    let refusal = latest(&model).unwrap_err();
    assert_eq!(refusal.reason, Reason::BrokenHistory { timeline: tli(2) });
}
