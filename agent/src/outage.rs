//! While no region takes WAL: how much the slot holds, when the disk is full, and when to give up.
//!
//! Owns: the outlook and the decision (pure), the wish to give up, and granting it, which is done while nothing streams:
//! by the start until there is a receiver, and by that between two streams. Does not own: the settings
//! ([`highwater_config::OutageConfig`]), the slot ([`crate::slot`]), or the gap that follows if the server removes WAL that
//! no region has.
//!
//! Giving up acknowledges nothing: the slot is dropped and made anew, so that the server may remove what it held. If
//! storage is back before that happens, nothing is lost; what one region has already got is not lost either.

mod grant;
mod watch;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use highwater_config::{ByteSize, OutageConfig, OutagePolicy};
use tokio::sync::watch as channel;

use crate::error::{AgentError, Kind};

pub(crate) use grant::LettingGo;
pub(crate) use watch::{Watcher, ask};

/// Looks that the growth is taken from: a minute.
const LOOKS: usize = 12;
/// Less WAL than this is not worth a slot.
const WORTH: u64 = 1 << 20;
/// A look that comes so much later than the one before it, and by more than `patience`, says nothing of the time between:
/// PostgreSQL was away, and what waited had no chance to be worked off. More than two slow looks in a row take, so that a
/// server that is only busy is watched all the same.
const UNSEEN: Duration = Duration::from_secs(90);

/// What was seen at one moment.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Look {
    /// On a monotonic clock.
    pub at: Duration,
    /// WAL that the server keeps for the slot, in bytes.
    pub held: u64,
    /// How much of that is from before the last checkpoint, so that a slot made now would not hold it. None: not known.
    pub gain: Option<u64>,
    /// WAL that may still be written before something gives, in bytes: the server's limit or the disk, whichever comes
    /// first. None: nothing is known of either.
    pub room: Option<u64>,
}

/// What follows from the looks.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Outlook {
    /// By how much the backlog grows; 0 while it does not.
    pub bytes_per_second: u64,
    /// When the room is used up at that rate. None: never, or not known.
    pub full_in: Option<Duration>,
}

/// See the module.
#[derive(Debug)]
pub struct Judge {
    config: OutageConfig,
    looks: VecDeque<Look>,
    /// Since when the backlog has not shrunk and would be worth giving up; one that is being worked off is no outage,
    /// however large.
    stalled_since: Option<Duration>,
    /// What the slot held first after it was given up, until most of it has been worked off.
    after_giving_up: Option<Option<u64>>,
}

impl Judge {
    /// A judge of an agent that has just started.
    pub fn new(config: OutageConfig) -> Self {
        Self {
            config,
            looks: VecDeque::with_capacity(LOOKS),
            stalled_since: None,
            after_giving_up: None,
        }
    }

    /// Takes in what was seen. The answer is why the slot is to be given up, if it is.
    pub fn take(&mut self, look: Look) -> Option<String> {
        if let Some(base @ None) = &mut self.after_giving_up {
            *base = Some(look.held);
        }
        let base = self.after_giving_up.flatten();
        if base.is_some_and(|base| look.held < base / 2) {
            self.after_giving_up = None;
        }
        let worth_it = self.is_worth_it(look);
        if self.has_moved(look) || !worth_it {
            self.stalled_since = None;
        }
        let since = worth_it.then(|| *self.stalled_since.get_or_insert(look.at));
        if self.looks.len() == LOOKS {
            self.looks.pop_front();
        }
        self.looks.push_back(look);
        let is_stalled = since.is_some_and(|since| look.at.saturating_sub(since) >= self.config.patience);
        if self.config.policy == OutagePolicy::Hold || !is_stalled {
            return None;
        }
        self.limit_passed(look)
    }

    /// Notes that the slot was given up: the looks from before say nothing any more.
    pub fn gave_up(&mut self) {
        self.looks.clear();
        self.stalled_since = None;
        self.after_giving_up = Some(None);
    }

    /// Growth and time left.
    pub fn outlook(&self) -> Outlook {
        let (Some(first), Some(last)) = (self.looks.front(), self.looks.back()) else {
            return Outlook::default();
        };
        let grown = u128::from(last.held.saturating_sub(first.held));
        let millis = last.at.saturating_sub(first.at).as_millis().max(1);
        let bytes_per_second = u64::try_from(grown * 1000 / millis).unwrap_or(u64::MAX);
        let full_in = last
            .room
            .filter(|_| bytes_per_second > 0)
            .map(|room| Duration::from_secs(room / bytes_per_second));
        Outlook {
            bytes_per_second,
            full_in,
        }
    }

    /// Whether the backlog has shrunk since the last look, or may have while nobody looked.
    fn has_moved(&self, look: Look) -> bool {
        self.looks.back().is_some_and(|before| {
            let unseen = look.at.saturating_sub(before.at);
            look.held < before.held || unseen > self.config.patience.max(UNSEEN)
        })
    }

    /// Whether giving up would free anything. A new slot holds WAL from the last checkpoint on: it is worth giving up again
    /// when there has been another one since, however little room that left. Where checkpoints cannot be seen, or one is on
    /// its way, a backlog that has doubled is worth it.
    fn is_worth_it(&self, look: Look) -> bool {
        match self.after_giving_up.flatten() {
            None => look.held >= WORTH,
            Some(base) => {
                let doubled = base.saturating_mul(2).max(base.saturating_add(WORTH));
                look.gain.is_some_and(|gain| gain >= WORTH) || look.held >= doubled
            }
        }
    }

    fn limit_passed(&self, look: Look) -> Option<String> {
        let shown = |bytes: u64| ByteSize(bytes - bytes % (1 << 10));
        if let Some(limit) = self.config.max_backlog.filter(|limit| look.held > *limit) {
            let limit = ByteSize(limit);
            return Some(format!(
                "it held {} of WAL, more than outage.max_backlog = {limit}",
                shown(look.held)
            ));
        }
        let (limit, room) = (self.config.keep_free?, look.room?);
        (room < limit).then(|| {
            let (room, limit) = (shown(room), ByteSize(limit));
            format!("there was room for {room} of WAL, less than outage.keep_free = {limit}")
        })
    }
}

/// The wish to give the slot up, and why. Whoever watches asks for it or withdraws it, and whoever knows that nothing
/// streams grants it.
#[derive(Clone, Debug)]
pub struct GiveUp(Arc<channel::Sender<Wish>>);

#[derive(Debug, Default)]
struct Wish {
    why: Option<String>,
    granted: u64,
}

impl Default for GiveUp {
    fn default() -> Self {
        Self(Arc::new(channel::Sender::new(Wish::default())))
    }
}

impl GiveUp {
    /// Asks for it, or for nothing any more: what has not been granted by now is withdrawn then.
    pub fn ask(&self, why: Option<String>) {
        self.0.send_if_modified(|wish| {
            let changed = wish.why != why;
            wish.why = why;
            changed
        });
    }

    /// Why it is asked for, if it is.
    pub fn asked(&self) -> Option<String> {
        self.0.borrow().why.clone()
    }

    /// Waits until it is asked for.
    pub async fn when_asked(&self) {
        // The sender lives as long as this.
        drop(self.0.subscribe().wait_for(|wish| wish.why.is_some()).await);
    }

    /// It is done.
    pub fn grant(&self) {
        self.0.send_modify(|wish| {
            wish.why = None;
            wish.granted += 1;
        });
    }

    /// How often it was granted.
    pub fn granted(&self) -> u64 {
        self.0.borrow().granted
    }
}

/// Whether a start that meets this waits for better times. An agent that ends watches over nothing: where the slot may be
/// given up it also waits for what only somebody else can mend in a region, as an agent does that streams already.
pub(crate) fn is_waited_for(policy: OutagePolicy, error: &AgentError) -> bool {
    match error.kind() {
        Kind::Retry => true,
        Kind::Operator => policy == OutagePolicy::GiveUp && matches!(error, AgentError::Store(_)),
        _ => false,
    }
}

#[cfg(test)]
#[path = "outage_tests.rs"]
mod tests;
