//! First and last commit time of a run of WAL.

use highwater_format::Time;

/// The span of the commit times seen in a run of WAL; both or neither are known.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CommitSpan {
    /// Earliest commit time.
    pub first: Option<Time>,
    /// Latest commit time.
    pub last: Option<Time>,
}

impl CommitSpan {
    /// Takes in one commit.
    pub fn add(&mut self, time: Time) {
        self.first = Some(self.first.map_or(time, |first| first.min(time)));
        self.last = Some(self.last.map_or(time, |last| last.max(time)));
    }

    /// Takes in another span.
    pub fn merge(&mut self, other: Self) {
        if let (Some(first), Some(last)) = (other.first, other.last) {
            self.add(first);
            self.add(last);
        }
    }
}
