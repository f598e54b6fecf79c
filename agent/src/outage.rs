//! While no region takes WAL: how much the slot holds, when the disk is full, and when to give up.
//!
//! Owns: the outlook and the decision (pure), and the wish to give up, which the receiver carries out between two
//! streams. Does not own: the settings ([`highwater_config::OutageConfig`]), the slot ([`crate::slot`]), or the gap that
//! follows if the server removes WAL that no region has.
//!
//! Giving up acknowledges nothing: the slot is dropped and made anew, so that the server may remove what it held. If
//! storage is back before that happens, nothing is lost; what one region has already got is not lost either.

mod watch;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use highwater_config::{ByteSize, OutageConfig, OutagePolicy};
use tokio::sync::watch as channel;

pub(crate) use watch::{Watcher, ask};

/// Looks that the growth is taken from: a minute.
const LOOKS: usize = 12;
/// After giving up the new slot holds WAL from the last checkpoint on. It is given up again only when that has doubled,
/// at least by this much.
const AGAIN: u64 = 1 << 20;

/// What was seen at one moment.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Look {
    /// On a monotonic clock.
    pub at: Duration,
    /// WAL that the server keeps for the slot, in bytes.
    pub held: u64,
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
    /// Since when the backlog has not shrunk; one that is being worked off is no outage, however large.
    stalled_since: Option<Duration>,
    /// What the slot held first after it was given up.
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
        if self.looks.back().is_some_and(|before| look.held < before.held) {
            self.stalled_since = None;
        }
        let since = *self.stalled_since.get_or_insert(look.at);
        if self.looks.len() == LOOKS {
            self.looks.pop_front();
        }
        self.looks.push_back(look);
        if let Some(base @ None) = &mut self.after_giving_up {
            *base = Some(look.held);
        }
        let is_stalled = look.at.saturating_sub(since) >= self.config.patience;
        if self.config.policy == OutagePolicy::Hold || !is_stalled || !self.may_again(look.held) {
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

    fn may_again(&self, held: u64) -> bool {
        match self.after_giving_up.flatten() {
            Some(base) => held >= base.saturating_mul(2).max(base.saturating_add(AGAIN)),
            None => true,
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

/// The wish to give the slot up, and why. Whoever wishes sets it, the receiver grants it.
#[derive(Clone, Debug)]
pub struct GiveUp(Arc<channel::Sender<Option<String>>>);

impl Default for GiveUp {
    fn default() -> Self {
        Self(Arc::new(channel::Sender::new(None)))
    }
}

impl GiveUp {
    /// Asks for it.
    pub fn ask(&self, why: String) {
        self.0.send_replace(Some(why));
    }

    /// Why it is asked for, if it is.
    pub fn asked(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Waits until it is asked for.
    pub async fn when_asked(&self) {
        // The sender lives as long as this.
        drop(self.0.subscribe().wait_for(Option::is_some).await);
    }

    /// It is done.
    pub fn done(&self) {
        self.0.send_replace(None);
    }

    /// Waits until nobody asks for it.
    pub async fn when_done(&self) {
        drop(self.0.subscribe().wait_for(Option::is_none).await);
    }
}

#[cfg(test)]
#[path = "outage_tests.rs"]
mod tests;
