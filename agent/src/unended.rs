//! Gaps that no base backup has ended yet, and who is concerned by that.
//!
//! Owns: the gaps that this process has recorded, which a listing may show late; the bell for the task that takes base backups;
//! and whether every gap is ended, in as many regions as the policy asks for. Commits that wait for the agent inside a gap are in
//! no region until it is, and to report any position behind the gap would let them return.
//! Does not own: the records ([`crate::gap`]), nor the base backups ([`crate::schedule`]).

use std::sync::{Mutex, MutexGuard, PoisonError};

use highwater_format::Gap;
use tokio::sync::{Notify, watch};

use crate::followers::Followers;

/// See the module.
#[derive(Debug)]
pub struct Unended {
    recorded: Mutex<Vec<Gap>>,
    /// Rung when a base backup has to be taken at once.
    pub(crate) bell: Notify,
    all_ended: Followers<bool>,
}

impl Default for Unended {
    /// Nothing counts as ended before the regions were asked.
    fn default() -> Self {
        Self {
            recorded: Mutex::default(),
            bell: Notify::new(),
            all_ended: Followers::new(false),
        }
    }
}

impl Unended {
    /// Notes a gap that the policy's regions have on record.
    pub(crate) fn record(&self, gap: Gap) {
        let mut recorded = self.lock();
        recorded.push(gap);
        self.all_ended.send(false);
        self.bell.notify_one();
    }

    /// Judges what the regions told together with what this process has recorded, none of which can be recorded meanwhile. The
    /// second answer is whether every gap is ended.
    pub(crate) fn judge<T>(&self, judge: impl FnOnce(&[Gap]) -> (T, bool)) -> T {
        let mut recorded = self.lock();
        let (told, all_ended) = judge(&recorded);
        if all_ended {
            recorded.clear();
        }
        if self.all_ended.value() != all_ended {
            self.all_ended.send(all_ended);
        }
        told
    }

    /// Whether every gap is ended, as far as this process knows.
    pub(crate) fn all_ended(&self) -> bool {
        self.all_ended.value()
    }

    /// Follows [`Unended::all_ended`].
    pub(crate) fn follow(&self) -> watch::Receiver<bool> {
        self.all_ended.follow()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Gap>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use highwater_format::{Lsn, Time, TimelineId};

    use super::*;

    #[test]
    fn a_recorded_gap_stays_until_it_is_ended_whatever_the_regions_show() {
        let gap = Gap {
            timeline: TimelineId::FIRST,
            start: Lsn(1),
            end: Lsn(2),
            reason: "slot lost".into(),
            recorded_at: Time::UNIX_EPOCH,
            unreplayable: false,
        };
        let unended = Unended::default();
        let known = |all_ended| unended.judge(|recorded| (recorded.to_vec(), all_ended));
        assert!(!unended.all_ended(), "nobody was asked");
        assert_eq!(known(true), []);
        let follower = unended.follow();
        assert!(*follower.borrow());

        unended.record(gap.clone());
        assert!(!*follower.borrow());
        assert_eq!(known(false), std::slice::from_ref(&gap));
        assert_eq!(known(true), [gap]);
        assert!(*follower.borrow());
        assert_eq!(known(true), []);
    }
}
