//! Gaps that no base backup has ended yet, and the commits that wait for one.
//!
//! A commit that waits for the agent inside a gap is in no region until a base backup that ends the gap is, and any position behind the
//! gap that is reported lets it return. Owns: the gaps that this process has recorded, which a listing may show late; the bell for the
//! task that takes base backups; and, where commits are meant to wait, whether they may return. They may not before the regions were
//! asked for gaps, nor while one that was open then, or was recorded since, is not ended in as many regions as the policy asks for.
//! A gap that is ended anywhere when it is first heard of holds nobody up for the sake of a region that has no base backup at all: otherwise
//! every region that is emptied or added would.
//! Does not own: the records ([`crate::gap`]), asking the regions ([`ask`]), nor the base backups ([`crate::schedule`]).

pub(crate) mod ask;

use std::sync::{Mutex, MutexGuard, PoisonError};

use highwater_format::{BackupId, Gap};
use tokio::sync::{Notify, watch::Receiver};

use crate::followers::Followers;
use crate::gap::ended_by;

/// What one region tells of gaps.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Gaps on record; those that its own base backups end may be left out.
    pub(crate) gaps: Vec<Gap>,
    /// Base backups: those that end as many gaps as any do, and where some gap is not ended, the first of all.
    pub(crate) backups: Vec<BackupId>,
}

impl Told {
    fn ends(&self, gap: &Gap) -> bool {
        ended_by(gap, &self.backups).is_some()
    }

    /// Whether it was a region like the others when the gap came: one that is emptied or added has nothing from before it.
    fn waits_for_the_end_of(&self, gap: &Gap) -> bool {
        !self.backups.is_empty() && !self.ends(gap)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Unended {
    known: Mutex<Known>,
    /// Rung when a base backup has to be taken at once.
    pub(crate) bell: Notify,
    may_return: Followers<bool>,
}

#[derive(Debug, Default)]
struct Known {
    gaps: Vec<Gap>,
    /// Which gaps are open where this process goes on is known.
    is_asked: bool,
    /// How often that was not known any more: what is found then is news to the task that takes base backups.
    question: u64,
}

impl Default for Unended {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            bell: Notify::new(),
            may_return: Followers::new(false),
        }
    }
}

impl Unended {
    /// Notes a gap that the policy's regions have on record now.
    pub(crate) fn record(&self, gap: Gap) {
        let mut known = self.lock();
        known.gaps.push(gap);
        self.settle(&known);
        self.bell.notify_one();
    }

    /// The stream goes on where another region has got to, which may have a gap on record that nobody has heard of.
    pub(crate) fn ask_again(&self) {
        let mut known = self.lock();
        known.is_asked = false;
        known.question += 1;
        self.settle(&known);
    }

    /// What is asked now: the answer to an earlier question says nothing of what has come since.
    pub(crate) fn question(&self) -> u64 {
        self.lock().question
    }

    /// Takes what regions have told; whoever may have something to say on the question `all` has said it.
    pub(crate) fn learn(&self, told: &[Told], needed: usize, all: Option<u64>) {
        let mut known = self.lock();
        if all == Some(known.question) && !known.is_asked {
            let is_open = |gap: &Gap| told.iter().all(|told| !told.ends(gap));
            let before = known.gaps.len();
            for told in told {
                for gap in told
                    .gaps
                    .iter()
                    .filter(|gap| is_open(gap) || told.waits_for_the_end_of(gap))
                {
                    let is_it = |other: &Gap| (other.timeline, other.range()) == (gap.timeline, gap.range());
                    if !known.gaps.iter().any(is_it) {
                        known.gaps.push(gap.clone());
                    }
                }
            }
            known.is_asked = true;
            if known.question > 0 && known.gaps.len() > before {
                self.bell.notify_one();
            }
        }
        let regions = |gap: &Gap| told.iter().filter(|told| told.ends(gap)).count();
        known.gaps.retain(|gap| regions(gap) < needed);
        self.settle(&known);
    }

    /// The gaps that are known not to be ended in as many regions as the policy asks for.
    pub(crate) fn gaps(&self) -> Vec<Gap> {
        self.lock().gaps.clone()
    }

    /// Whether commits may return, for each stream that they wait for.
    pub(crate) fn follow(&self) -> Receiver<bool> {
        self.may_return.follow()
    }

    fn settle(&self, known: &Known) {
        let may_return = known.is_asked && known.gaps.is_empty();
        if self.may_return.value() != may_return {
            self.may_return.send(may_return);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "unended_tests.rs"]
mod tests;
