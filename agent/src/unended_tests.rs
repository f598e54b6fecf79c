//! Which gaps hold commits back, and until when.

use highwater_format::{Lsn, Time, TimelineId};

use super::*;

fn gap(start: u64, end: u64) -> Gap {
    Gap {
        timeline: TimelineId::FIRST,
        start: Lsn(start),
        end: Lsn(end),
        reason: "slot lost".into(),
        recorded_at: Time::UNIX_EPOCH,
        unreplayable: false,
    }
}

/// A region with these gaps on record and a base backup that begins there.
fn told(gaps: &[Gap], backup: Option<u64>) -> Told {
    let id = |lsn| BackupId::new(TimelineId::FIRST, Lsn(lsn), Time::UNIX_EPOCH);
    Told {
        gaps: gaps.to_vec(),
        backups: backup.map(id).into_iter().collect(),
    }
}

fn may_return(unended: &Unended) -> bool {
    *unended.follow().borrow()
}

#[test]
fn nothing_returns_before_the_regions_were_asked() {
    let unended = Unended::default();
    assert!(!may_return(&unended));
    unended.learn(&[told(&[], None)], 2, None);
    assert!(!may_return(&unended), "the other region may know of a gap");
    unended.learn(&[told(&[], None)], 2, Some(0));
    assert!(may_return(&unended));
}

#[test]
fn a_recorded_gap_holds_commits_until_as_many_regions_as_are_needed_have_a_base_backup_behind_it() {
    let (unended, ours) = (Unended::default(), gap(100, 200));
    unended.learn(&[], 2, Some(0));
    unended.record(ours.clone());
    let none = told(&[], None);
    // A listing that lags shows nothing of it.
    unended.learn(&[none, told(std::slice::from_ref(&ours), Some(50))], 2, Some(0));
    assert!(!may_return(&unended) && unended.gaps() == [ours]);
    unended.learn(&[told(&[], Some(200)), told(&[], None)], 2, Some(0));
    assert!(!may_return(&unended), "one of two");
    unended.learn(&[told(&[], Some(200)), told(&[], Some(250))], 2, Some(0));
    assert!(may_return(&unended) && unended.gaps().is_empty());
}

#[test]
fn a_gap_that_is_open_at_the_start_holds_commits_and_is_not_forgotten_when_a_region_is_silent() {
    let (unended, open) = (Unended::default(), gap(100, 200));
    unended.learn(&[told(&[open], None), told(&[], None)], 1, Some(0));
    unended.learn(&[told(&[], None)], 1, Some(0));
    assert!(!may_return(&unended), "the region that told of it is away");
    unended.learn(&[told(&[], Some(300))], 1, Some(0));
    assert!(may_return(&unended));
}

/// Otherwise every region that is emptied or added would hold all commits up until it is filled.
#[test]
fn a_gap_that_some_region_has_ended_long_ago_holds_nobody_up() {
    let (unended, old) = (Unended::default(), gap(100, 200));
    let regions = [told(&[], Some(300)), told(&[old], None)];
    unended.learn(&regions, 2, Some(0));
    assert!(may_return(&unended));
    unended.learn(&regions[1..], 2, Some(0));
    assert!(may_return(&unended), "nor when the one that has ended it is away");
}

/// The agent has ended while the base backup was complete in one region only.
#[test]
fn a_gap_that_only_one_of_two_regions_has_ended_holds_commits_until_the_other_has() {
    let (unended, ours) = (Unended::default(), gap(100, 200));
    let [done, other] = [told(&[], Some(300)), told(std::slice::from_ref(&ours), Some(50))];
    unended.learn(&[done, other], 2, Some(0));
    assert!(!may_return(&unended) && unended.gaps() == [ours]);
    unended.learn(&[told(&[], Some(300)), told(&[], Some(300))], 2, Some(0));
    assert!(may_return(&unended));
    let any = Unended::default();
    any.learn(
        &[told(&[], Some(300)), told(&[gap(100, 200)], Some(50))],
        1,
        Some(0),
    );
    assert!(may_return(&any), "where one is enough");
}

#[test]
fn where_another_region_goes_on_its_gaps_are_asked_for() {
    let (unended, theirs) = (Unended::default(), gap(100, 200));
    unended.learn(&[told(&[], None)], 1, Some(0));
    assert!(may_return(&unended));
    unended.ask_again();
    assert!(!may_return(&unended));
    unended.learn(&[told(&[], None)], 1, Some(0));
    assert!(!may_return(&unended), "that was asked before");
    unended.learn(&[told(&[theirs], None)], 1, Some(1));
    assert!(!may_return(&unended));
    unended.learn(&[told(&[], Some(200))], 1, Some(1));
    assert!(may_return(&unended));
}
