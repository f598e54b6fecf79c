//! The oracle of "acknowledged means stored": at every status message, before PostgreSQL reads it,
//! what do the regions hold?
//!
//! Owns: the comparison, and the frozen copies of both regions at the highest position ever reported. What a
//! region holds is read from the names of its objects ([`crate::archive`]), without the product's code; that
//! the bytes behind the names are right is shown by restoring the copies.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::archive;
use crate::lsn;
use crate::s3::S3Snapshot;
use crate::site::{BUCKET, REGIONS, Site};
use crate::tap::{Feedback, FeedbackTap};

/// What is asked of the reported position.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// In how many regions what is reported must be: 2 for the policy `all`, 1 for `any`.
    pub regions: usize,
    /// The position must not go back between connections either. A server that has crashed knows an older
    /// position of its slot; a new connection may begin there.
    pub across: bool,
}

impl Rules {
    /// Policy `all`, and servers that do not crash.
    #[must_use]
    pub fn all() -> Self {
        Self {
            regions: 2,
            across: true,
        }
    }
}

/// What was promised, and the regions at that moment.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The highest position that was reported.
    pub flush: u64,
    /// Both regions at the message that reported it first.
    pub regions: [S3Snapshot; 2],
    /// The first breach of the rules, in words.
    pub violation: Option<String>,
    last: u64,
    connection: u32,
    /// The first timeline that counts, and where it began: 0 as long as no server has lost anything.
    line: (u32, u64),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Witness(Arc<Mutex<Seen>>);

impl Witness {
    /// Watches the stream of a site's primary from now on.
    #[must_use]
    pub fn of(site: &Site, rules: Rules) -> Self {
        Self::at(site, &site.tap, rules)
    }

    /// Watches the stream of another server into a site's regions from now on. What is reported beside a standby it keeps no
    /// longer for the day it is promoted, so that the same is asked there.
    #[must_use]
    pub fn at(site: &Site, tap: &FeedbackTap, rules: Rules) -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let (noted, regions, segment) = (Arc::clone(&seen), site.regions.clone(), site.segment_size());
        tap.on_feedback(move |feedback| {
            let mut noted = lock(&noted);
            if noted.hear(feedback, rules) {
                noted.regions = [regions[0].snapshot(), regions[1].snapshot()];
                noted.compare(feedback, rules, segment);
            }
        });
        Self(seen)
    }

    /// What was seen so far.
    #[must_use]
    pub fn seen(&self) -> Seen {
        lock(&self.0).clone()
    }

    /// A server has taken over that lacks what lies behind `switch`, and goes on from there on `timeline`. What was promised of
    /// the other line behind that place is not this one's.
    pub fn moves_on(&self, timeline: u32, switch: u64) {
        let mut seen = lock(&self.0);
        seen.flush = seen.flush.min(switch);
        seen.last = 0;
        seen.line = (timeline, switch);
    }

    /// Fails when the rules were breached.
    ///
    /// # Errors
    /// The first breach.
    pub fn satisfied(&self) -> anyhow::Result<Seen> {
        let seen = self.seen();
        match &seen.violation {
            Some(violation) => anyhow::bail!("{violation}"),
            None => Ok(seen),
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seen {
    /// Takes note of a message; whether it promises more than any before.
    fn hear(&mut self, feedback: &Feedback, rules: Rules) -> bool {
        if feedback.flush == 0 {
            return false; // no opinion: PostgreSQL does not move the slot for it
        }
        if feedback.flush < self.last && (rules.across || self.connection == feedback.connection) {
            self.breach(format!(
                "the reported position went back to {}",
                lsn::show(feedback.flush)
            ));
        }
        if feedback.apply != 0 && feedback.apply != feedback.flush {
            self.breach(format!(
                "applied {} beside flushed {}",
                lsn::show(feedback.apply),
                lsn::show(feedback.flush)
            ));
        }
        (self.last, self.connection) = (feedback.flush, feedback.connection);
        let more = feedback.flush > self.flush;
        self.flush = self.flush.max(feedback.flush);
        more
    }

    fn compare(&mut self, feedback: &Feedback, rules: Rules, segment: u64) {
        let (first, switch) = self.line;
        let held = |snapshot: &S3Snapshot| {
            let timelines = archive::wal(snapshot, BUCKET, segment);
            // Without a hole since the timeline began: nothing behind a hole counts.
            let ends = timelines
                .range(first..)
                .filter_map(|(_, wal)| wal.start().map(|start| wal.contiguous_end(start)));
            ends.max().unwrap_or(0).max(switch)
        };
        let ends = [held(&self.regions[0]), held(&self.regions[1])];
        let enough = ends.iter().filter(|end| **end >= feedback.flush).count();
        if enough < rules.regions {
            let (flush, [north, south]) = (lsn::show(feedback.flush), ends.map(lsn::show));
            let [first, second] = REGIONS;
            self.breach(format!(
                "{flush} was reported; {first} holds {north}, {second} {south}"
            ));
        }
    }

    fn breach(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }
}
