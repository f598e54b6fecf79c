//! The frontier, shared: regions report what they hold, the receiver follows what is durable.
//!
//! A thin shell around [`Frontier`]: one lock, never held across an await, and a channel to each follower.

use std::sync::{Mutex, MutexGuard, PoisonError};

use highwater_config::Policy;
use highwater_format::Time;
use tokio::sync::watch;

use crate::followers::Followers;
use crate::frontier::{DurableLsn, Frontier, Position};
use crate::state::State;

/// See the module.
#[derive(Debug)]
pub struct Progress {
    inner: Mutex<Inner>,
    durable: Followers<Option<DurableLsn>>,
    /// How often all regions had to be read again.
    readings: watch::Sender<u64>,
    state: State,
}

#[derive(Debug)]
struct Inner {
    frontier: Frontier,
    /// Per region: what it holds, while it waits to be compared before it counts.
    waiting: Vec<Option<Position>>,
    /// The server no longer has the WAL from here on.
    lost_from: Option<Position>,
    /// Commit times by the position that makes them durable, oldest first.
    commits: std::collections::VecDeque<(Position, Time)>,
}

impl Progress {
    /// Nothing is known of any region yet.
    pub fn new(policy: Policy, regions: usize, state: State) -> Self {
        let inner = Inner {
            frontier: Frontier::new(policy, regions),
            waiting: vec![None; regions],
            lost_from: None,
            commits: std::collections::VecDeque::new(),
        };
        Self {
            inner: Mutex::new(inner),
            durable: Followers::new(None),
            readings: watch::Sender::new(0),
            state,
        }
    }

    /// Notes that `region` holds everything before `at`.
    pub fn stored(&self, region: usize, at: Position) {
        // Told under the lock: of two regions that move it at once, the later position is told last.
        let mut inner = self.lock();
        let moved = inner.frontier.stored(region, at);
        let commit = moved.and_then(|durable| inner.durable_commit(durable));
        self.state.update_region(region, |view| {
            view.stored = at.lsn;
            view.timeline = Some(at.timeline);
        });
        if let Some(durable) = moved {
            self.state.update(|snapshot| {
                snapshot.durable = durable.position().lsn;
                snapshot.durable_timeline = Some(durable.position().timeline);
                snapshot.durable_commit = commit.or(snapshot.durable_commit);
            });
            self.durable.send(Some(durable));
        }
    }

    /// Notes that the newest commit before `at` was made at `time`.
    pub fn commit(&self, at: Position, time: Time) {
        let mut inner = self.lock();
        if inner.commits.len() >= COMMITS_KEPT {
            inner.commits.pop_front();
        }
        inner.commits.push_back((at, time));
    }

    /// Follows the durable position.
    pub fn subscribe(&self) -> watch::Receiver<Option<DurableLsn>> {
        self.durable.follow()
    }

    /// The durable position now.
    pub fn durable(&self) -> Option<DurableLsn> {
        self.durable.value()
    }

    /// A region's position.
    pub fn position(&self, region: usize) -> Option<Position> {
        self.lock().frontier.position(region)
    }

    /// The furthest position of any region.
    pub fn furthest(&self) -> Option<Position> {
        self.lock().frontier.furthest()
    }

    /// Notes what a region holds that does not count yet because it has to be compared first; none when it counts.
    pub fn waits(&self, region: usize, at: Option<Position>) {
        if let Some(place) = self.lock().waiting.get_mut(region) {
            *place = at;
        }
    }

    /// The furthest position of any region that waits to be compared.
    pub fn furthest_waiting(&self) -> Option<Position> {
        self.lock().waiting.iter().copied().flatten().max()
    }

    /// Whether there is a region of which it is not known yet what it holds.
    pub fn has_unread(&self) -> bool {
        let inner = self.lock();
        (0..inner.waiting.len())
            .any(|region| inner.waiting[region].is_none() && inner.frontier.position(region).is_none())
    }

    /// Notes that the server no longer has the WAL from `at` on; none when the stream goes on.
    pub fn server_lost(&self, at: Option<Position>) {
        self.lock().lost_from = at;
    }

    /// Has every region's pipeline read again what its region holds: somebody else has stored more than this process.
    pub fn read_again(&self) {
        self.readings.send_modify(|count| *count += 1);
    }

    /// Follows [`Progress::read_again`].
    pub fn readings(&self) -> watch::Receiver<u64> {
        self.readings.subscribe()
    }

    /// Where the stream cannot go on, because the server no longer has what comes next.
    pub fn lost_from(&self) -> Option<Position> {
        self.lock().lost_from
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bound of the commit times remembered while regions are away; the oldest are given up, which only
/// makes the reported age of the newest durable commit look older than it is.
const COMMITS_KEPT: usize = 4096;

impl Inner {
    fn durable_commit(&mut self, durable: DurableLsn) -> Option<Time> {
        let mut newest = None;
        while self
            .commits
            .front()
            .is_some_and(|(at, _)| *at <= durable.position())
        {
            newest = self.commits.pop_front().map(|(_, time)| time);
        }
        newest
    }
}
