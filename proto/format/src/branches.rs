//! Branches: WAL that the archive holds and that is not part of its newest timeline's history.
//!
//! After a failover to a standby that lacked the last WAL, the old timeline reaches past the place where the new one
//! left it. What lies behind that place was acknowledged and may be the only copy of committed data, so it is kept
//! and named. Owns the rule what counts as such; does not own where histories and ends are read from. Pure.

use std::fmt;

use serde::Serialize;

use crate::lsn::{Lsn, LsnRange};
use crate::timeline::{History, TimelineId};

/// A stretch of WAL that the newest timeline never had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Branch {
    /// The timeline that it lies on.
    pub timeline: TimelineId,
    /// From where the newest timeline's line of descent left it.
    pub start: Lsn,
    /// To the end of what is held without a hole.
    pub end: Lsn,
    /// The newest timeline.
    pub newest: TimelineId,
}

impl Branch {
    /// The bytes.
    pub fn range(&self) -> LsnRange {
        LsnRange::new(self.start, self.end)
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "WAL {} of timeline {} is not in the history of timeline {}; `highwater-restore run --timeline {}` restores it",
            self.range(),
            self.timeline,
            self.newest,
            self.timeline
        )
    }
}

/// Where the line of descent of the newest of `histories` left each of the others: from there on what they hold is a
/// branch. Timelines that are wholly in that line, the newest among them, are left out.
pub fn forks(histories: &[History]) -> Vec<(TimelineId, Lsn)> {
    let Some(newest) = histories.iter().max_by_key(|history| history.timeline) else {
        return Vec::new();
    };
    let others = histories
        .iter()
        .filter(|history| history.timeline != newest.timeline);
    others
        .map(|history| {
            // A sibling has nothing in common with the newest line but what it copied from its parent.
            let own = history.begin_of(history.timeline).unwrap_or(Lsn::ZERO);
            (
                history.timeline,
                newest.switch_of(history.timeline).unwrap_or(own),
            )
        })
        .collect()
}

/// The branches of an archive: `end_after(timeline, lsn)` says where the WAL that is held of a timeline without a hole
/// from `lsn` on ends.
pub fn branches(histories: &[History], end_after: impl Fn(TimelineId, Lsn) -> Lsn) -> Vec<Branch> {
    let Some(newest) = histories.iter().map(|history| history.timeline).max() else {
        return Vec::new();
    };
    let branch = |(timeline, start)| Branch {
        timeline,
        start,
        end: end_after(timeline, start),
        newest,
    };
    let mut found: Vec<Branch> = forks(histories).into_iter().map(branch).collect();
    found.retain(|branch| branch.end > branch.start);
    found.sort_unstable_by_key(|branch| branch.timeline);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(timeline: u32, text: &str) -> History {
        History::parse(TimelineId::new(timeline).unwrap(), text.as_bytes()).unwrap()
    }

    fn found(histories: &[History], ends: &[(u32, u64)]) -> Vec<(u32, u64, u64)> {
        let end = |timeline: TimelineId, _: Lsn| {
            let held = ends.iter().find(|(of, _)| *of == timeline.get());
            Lsn(held.map_or(0, |(_, end)| *end))
        };
        let all = branches(histories, end);
        all.iter()
            .map(|branch| (branch.timeline.get(), branch.start.0, branch.end.0))
            .collect()
    }

    #[test]
    fn a_clean_promotion_leaves_no_branch() {
        let histories = [history(1, ""), history(2, "1\t0/500\tx\n")];
        assert_eq!(found(&histories, &[(1, 0x500), (2, 0x900)]), []);
        assert_eq!(found(&histories[..1], &[(1, 0x500)]), []);
        assert_eq!(found(&[], &[]), []);
    }

    #[test]
    fn what_lies_past_the_switch_is_one() {
        let histories = [history(1, ""), history(2, "1\t0/500\tx\n")];
        let past = found(&histories, &[(1, 0x580), (2, 0x900)]);
        assert_eq!(past, [(1, 0x500, 0x580)]);
    }

    #[test]
    fn a_sibling_is_a_branch_from_its_own_beginning() {
        let histories = [
            history(1, ""),
            history(2, "1\t0/500\tx\n"),
            history(3, "1\t0/400\tx\n"),
        ];
        let both = found(&histories, &[(1, 0x500), (2, 0x700), (3, 0x900)]);
        assert_eq!(both, [(1, 0x400, 0x500), (2, 0x500, 0x700)]);
    }
}
