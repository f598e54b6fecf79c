//! What a refusal says, and that what it offers works: the words of an operator's next step.

use highwater_config::Exit;
use highwater_format::{Gap, LsnRange};

use super::{
    Missing, Reason,
    model::{Branch, Model, lsn, time, tli},
};
use crate::target::{Request, Target};

/// One timeline of 40 slots with a commit in every third, and backups from 4 to 6 and from 20 to 24.
fn model() -> Model {
    let mut model = Model::default();
    let branch = Branch {
        parent: None,
        end: 40,
    };
    model.branches.insert(1, branch);
    let commits = (0..40).step_by(3);
    model.commits = commits
        .map(|slot| ((1, slot), i64::try_from(slot).unwrap() * 10))
        .collect();
    model.backups = vec![(1, 4, 6), (1, 20, 24)];
    model.pulses.insert(1, 1000);
    model
}

#[test]
fn a_target_before_the_backup_that_was_asked_for_names_that_backup_and_both_ways_out() {
    let model = model();
    let (older, newer) = (model.backup(0), model.backup(1));
    for (target, said) in [
        (Target::Lsn(lsn(15)), format!("LSN {}", lsn(15))),
        (Target::Time(time(150)), format!("time {}", time(150))),
    ] {
        let request = Request {
            backup: Some(newer.id.clone()),
            ..Request::to(target)
        };
        let refusal = model.plan(&request).unwrap_err();
        let (id, start, finished) = (&newer.id, lsn(24), newer.finished_at);
        assert_eq!(
            refusal.to_string(),
            format!(
                "{said} lies before the earliest state that can be restored from backup {id}, {start} ({finished}); leave out \
                 --backup for older ones; the earliest choice with this one is --to-lsn {start}"
            )
        );
        assert_eq!(refusal.exit, Exit::No);
        let without = Request {
            backup: None,
            ..request.clone()
        };
        assert_eq!(model.plan(&without).unwrap().backup.id, older.id);
        let earliest = Request {
            target: Target::Lsn(start),
            ..request
        };
        assert_eq!(model.plan(&earliest).unwrap().backup.id, newer.id);
    }
}

/// There is no older backup to fall back to: leaving out `--backup` is not what helps.
#[test]
fn a_target_before_every_backup_names_the_earliest_choice() {
    let refusal = model().plan(&Request::to(Target::Lsn(lsn(3)))).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        format!(
            "LSN {} lies before the earliest state that can be restored, {} ({}); the earliest choice is --to-lsn {}",
            lsn(3),
            lsn(6),
            time(30),
            lsn(6)
        )
    );
}

/// Slots 16 and 17 are lost for good, and 18 is the target. `--to-lsn` was given: a second one beside it would be refused.
#[test]
fn a_hole_before_an_lsn_is_told_with_the_lsn_to_ask_for_instead() {
    let mut model = model();
    model.lost.extend([(1, 16), (1, 17)]);
    let hole = LsnRange::new(lsn(16), lsn(18));
    let told = |why: &str| {
        format!(
            "LSN {} cannot be reached: the WAL {hole} of timeline 1 is missing{why}; what is before it can be restored up to \
             {end}; to accept that, ask for --to-lsn {end} instead; `highwater-restore list` shows all windows",
            lsn(18),
            end = lsn(16)
        )
    };
    let request = Request::to(Target::Lsn(lsn(18)));
    let refusal = model.plan(&request).unwrap_err();
    assert_eq!((refusal.to_string(), refusal.exit), (told(""), Exit::No));

    let mut catalog = model.catalog();
    let view = catalog.regions[0].timelines.get_mut(&tli(1)).unwrap();
    view.gaps.push(Gap {
        timeline: tli(1),
        start: hole.start,
        end: hole.end,
        reason: "the slot was lost".to_owned(),
        recorded_at: time(200),
        unreplayable: false,
    });
    let refusal = model.plan_for(&catalog, &request).unwrap_err();
    assert_eq!(refusal.to_string(), told(" (recorded: the slot was lost)"));

    let instead = model.plan(&Request::to(Target::Lsn(lsn(16)))).unwrap();
    assert_eq!(instead.wal.end, lsn(16));
}

/// What may come back by itself is told apart from what does not: a pulse tells of WAL that no listing shows.
#[test]
fn only_a_hole_that_may_be_a_lagging_listing_is_worth_another_try() {
    for (lost, may_pass) in [(38..40, true), (37..39, false)] {
        let mut model = model();
        model.lost.extend(lost.map(|slot| (1, slot)));
        let refusal = model.plan(&Request::to(Target::Lsn(lsn(40)))).unwrap_err();
        assert!(matches!(refusal.reason, Reason::Hole { .. }), "{refusal}");
        assert_eq!(refusal.next.contains("try again"), may_pass, "{refusal}");
    }
}

/// The WAL that was searched has gaps, each ended by a backup: the target may have been in one of them.
#[test]
fn what_was_looked_for_in_vain_may_lie_in_a_gap_on_record() {
    let mut model = model();
    model.lost.extend([(1, 16), (1, 17)]);
    let hole = LsnRange::new(lsn(16), lsn(18));
    let mut catalog = model.catalog();
    let view = catalog.regions[0].timelines.get_mut(&tli(1)).unwrap();
    view.gaps.push(Gap {
        timeline: tli(1),
        start: hole.start,
        end: hole.end,
        reason: "the slot was lost".to_owned(),
        recorded_at: time(200),
        unreplayable: false,
    });
    let request = Request::to(Target::Name("release".to_owned()));
    let refusal = model.plan_for(&catalog, &request).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        format!(
            "restore point \"release\" is not in the WAL {searched} of timeline 1; the WAL {hole} of timeline 1 is missing \
             (recorded: the slot was lost); it may lie there, or between there and the end of the base backup that follows, and \
             cannot be reached then; to accept that, ask for --to-lsn {end} instead, the end of what is before it \
             (`highwater-restore list` shows all windows); if it does not lie there: check the spelling; restore points are \
             made with pg_create_restore_point()",
            searched = LsnRange::new(lsn(6), lsn(40)),
            end = lsn(16)
        )
    );
    let missing = vec![Missing {
        timeline: tli(1),
        range: hole,
        recorded: Some("the slot was lost".to_owned()),
        damaged: None,
    }];
    assert_eq!(
        (refusal.reason, refusal.exit),
        (Reason::NotFound { missing }, Exit::No)
    );
    let instead = model
        .plan_for(&catalog, &Request::to(Target::Lsn(lsn(16))))
        .unwrap();
    assert_eq!(instead.wal.end, lsn(16));
}

#[test]
fn of_many_gaps_the_first_three_are_named_and_the_others_counted() {
    let mut model = model();
    model.backups = vec![(1, 0, 2), (1, 8, 10), (1, 16, 18), (1, 24, 26), (1, 32, 34)];
    let lost = [4, 12, 13, 20, 28, 36];
    model.lost.extend(lost.map(|slot| (1, slot)));
    let refusal = model.plan(&Request::to(Target::Xid(1))).unwrap_err();
    let gaps = [(4, 5), (12, 14), (20, 21), (28, 29), (36, 37)];
    for (index, (start, end)) in gaps.into_iter().enumerate() {
        let is_named = index < 3;
        let range = LsnRange::new(lsn(start), lsn(end));
        let told = format!("the WAL {range} of timeline 1 is missing");
        assert_eq!(refusal.message.contains(&told), is_named, "{refusal}");
        let edge = Request::to(Target::Lsn(lsn(start)));
        assert_eq!(model.plan(&edge).unwrap().wal.end, lsn(start));
        let choice = format!("--to-lsn {}", lsn(start));
        assert_eq!(refusal.next.contains(&choice), is_named, "{refusal}");
    }
    assert!(
        refusal
            .message
            .contains("; 2 more ranges of WAL are missing; it may lie there"),
        "{refusal}"
    );
    let Reason::NotFound { missing } = &refusal.reason else {
        panic!("{refusal}")
    };
    assert_eq!(missing.len(), 5, "programs are told of all");
}

/// With no gap in what was searched there is nothing to add.
#[test]
fn what_is_not_in_whole_wal_is_not_there() {
    let refusal = model().plan(&Request::to(Target::Xid(1))).unwrap_err();
    assert_eq!(refusal.reason, Reason::NotFound { missing: vec![] });
    assert_eq!(
        refusal.to_string(),
        format!(
            "transaction 1 is not in the WAL {} of timeline 1; a transaction that wrote nothing leaves no trace; use --to-time or \
             --to-lsn instead",
            LsnRange::new(lsn(6), lsn(40))
        )
    );
}
