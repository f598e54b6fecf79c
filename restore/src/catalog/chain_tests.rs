//! Lines of descent of which not every timeline has its own history file in the archive.

use highwater_format::HistoryEntry;

use super::*;
use crate::plan::model::{Branch, Model, lsn, tli};

/// Timeline 2 leaves 1 at slot 22, in the middle of a segment; 3 leaves 2 at 30.
fn model() -> Model {
    let mut model = Model::default();
    for (timeline, parent, end) in [(1, None, 40), (2, Some((1, 22)), 36), (3, Some((2, 30)), 50)] {
        model.branches.insert(timeline, Branch { parent, end });
    }
    model
}

#[test]
fn an_ancestor_without_a_history_is_taken_from_that_of_its_descendant() {
    let mut model = model();
    let range = LsnRange::new(lsn(0), lsn(50));
    let sources = |model: &Model| {
        let chain = model.catalog().chain(tli(3), &[0]).unwrap();
        chain.cover(range).unwrap()
    };
    let told = sources(&model);
    model.forgotten.insert(2);
    assert_eq!(sources(&model), told);
}

/// The archive was begun on a server that a base backup of timeline 3 was made into.
#[test]
fn ancestors_of_which_nothing_was_ever_archived_are_no_break() {
    let model = model();
    let mut catalog = model.catalog();
    for timeline in [1, 2] {
        catalog.regions[0].timelines.remove(&tli(timeline));
    }
    let chain = catalog.chain(tli(3), &[0]).unwrap();
    assert_eq!(chain.history, model.history(3));
    // Timeline 3 has a copy of the segment in which it begins, from slot 28 on.
    assert_eq!(chain.contiguous_end(lsn(28)), lsn(50));
    assert_eq!(chain.contiguous_end(lsn(27)), lsn(27));
    assert!(chain.holds(tli(2), lsn(25)) && !chain.holds(tli(1), lsn(25)));
}

#[test]
fn the_history_of_the_timeline_itself_must_be_there() {
    let mut model = model();
    model.forgotten.insert(3);
    let broken = model.catalog().chain(tli(3), &[0]).unwrap_err();
    assert_eq!(broken, BrokenChain::HistoryMissing { missing: tli(3) });
}

#[test]
fn an_ancestors_history_that_is_there_must_tell_the_same() {
    let model = model();
    let mut catalog = model.catalog();
    let other = History {
        timeline: tli(2),
        entries: vec![HistoryEntry {
            timeline: tli(1),
            switch: lsn(21),
            reason: "another".to_owned(),
        }],
    };
    let view = catalog.regions[0].timelines.get_mut(&tli(2)).unwrap();
    view.history = Some((other, Vec::new()));
    let broken = catalog.chain(tli(3), &[0]).unwrap_err();
    let (timeline, ancestor) = (tli(3), tli(2));
    assert_eq!(broken, BrokenChain::Contradiction { timeline, ancestor });
}
