//! What can go wrong at an endpoint, on order of the test.
//!
//! A fault concerns requests that arrive after it was set; [`Faults::clear`] ends all of them.
//! Counted faults (`fail_next`, `lose_replies`, `strike`) count only the requests that their filter admits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// The kind of a request, as far as faults and counters tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// GET of an object.
    Get,
    /// HEAD of an object.
    Head,
    /// PUT of an object.
    Put,
    /// LIST of a bucket.
    List,
    /// DELETE of one or many.
    Delete,
    /// Anything else, for instance of buckets.
    Other,
}

impl Operation {
    /// What a request is, by its method and path.
    #[must_use]
    pub(super) fn of(method: &http::Method, path: &str, query: &str) -> Self {
        let object = path
            .trim_start_matches('/')
            .split_once('/')
            .is_some_and(|(_, key)| !key.is_empty());
        match (method.as_str(), object) {
            ("GET", true) => Self::Get,
            ("HEAD", true) => Self::Head,
            ("PUT", true) => Self::Put,
            ("DELETE", true) => Self::Delete,
            ("POST", false) if query.split('&').any(|part| part == "delete" || part == "delete=") => {
                Self::Delete
            }
            ("GET", false) if path.len() > 1 => Self::List,
            _ => Self::Other,
        }
    }
}

/// Damage done to what a GET returns. The checksum header then still names the stored content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Announce the whole length, send only the first bytes, then break the connection.
    CutAfter(u64),
    /// Return a shorter object as if it were whole.
    Shorten(u64),
    /// Flip the lowest bit of the byte at this offset.
    FlipAt(u64),
}

/// What happens to the one request that [`Faults::strike`] picks out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// It is answered with this status and has no effect.
    Fail(u16),
    /// It takes effect, but the connection breaks instead of a reply.
    LoseReply,
    /// It hangs and never takes effect.
    HoldBefore,
    /// It takes effect and then hangs.
    HoldAfter,
}

/// A strike that waits for its request.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    left: u64,
    strike: Strike,
}

#[derive(Clone, Debug, Default)]
struct Script {
    delay: Option<Duration>,
    refuse: bool,
    fail_always: Option<u16>,
    fail_next: Option<(u64, u16)>,
    fail_every: Option<(u64, u16)>,
    lose_replies: u64,
    damage: Option<Damage>,
    hide_newest: u64,
    only: Option<Vec<Operation>>,
    only_keys: Option<String>,
    seen: u64,
    waiting: Option<Waiting>,
    ignore_conditions: bool,
    archived: Option<String>,
}

/// What happens to one request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Verdict {
    pub(super) refuse: bool,
    pub(super) delay: Option<Duration>,
    pub(super) status: Option<u16>,
    pub(super) lose_reply: bool,
    pub(super) hold_before: bool,
    pub(super) hold_after: bool,
    pub(super) damage: Option<Damage>,
    pub(super) archived: bool,
}

/// The switchboard of an endpoint's faults. Clones share it.
#[derive(Clone, Debug)]
pub struct Faults {
    script: Arc<Mutex<Script>>,
    frozen: watch::Sender<bool>,
    struck: watch::Sender<bool>,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            script: Arc::default(),
            frozen: watch::Sender::new(false),
            struck: watch::Sender::new(false),
        }
    }
}

impl Faults {
    fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all faults and forgets filters; frozen requests go on.
    pub fn clear(&self) {
        self.change(|script| *script = Script::default());
        self.thaw();
    }

    /// Requests hang before they take effect, until [`Faults::thaw`]; one whose client gives up never does.
    pub fn freeze(&self) {
        self.frozen.send_replace(true);
    }

    /// Ends [`Faults::freeze`].
    pub fn thaw(&self) {
        self.frozen.send_replace(false);
    }

    /// Every connection is reset: the endpoint is down, but keeps its port and its objects.
    pub fn refuse(&self, refuse: bool) {
        self.change(|script| script.refuse = refuse);
    }

    /// Every request takes at least this much longer.
    pub fn delay(&self, delay: Option<Duration>) {
        self.change(|script| script.delay = delay);
    }

    /// Every request is answered with `status` and has no effect.
    pub fn fail_always(&self, status: Option<u16>) {
        self.change(|script| script.fail_always = status);
    }

    /// The next `count` requests are answered with `status` and have no effect.
    pub fn fail_next(&self, count: u64, status: u16) {
        self.change(|script| script.fail_next = Some((count, status)));
    }

    /// One of `nth` requests on average is answered with `status` and has no effect; 0 ends it. Which ones
    /// does not depend on chance, but has no period that a client's own rhythm could fall in with.
    pub fn fail_every(&self, nth: u64, status: u16) {
        self.change(|script| script.fail_every = (nth > 0).then_some((nth, status)));
    }

    /// The next `count` requests take effect, but the connection breaks instead of a reply.
    pub fn lose_replies(&self, count: u64) {
        self.change(|script| script.lose_replies = count);
    }

    /// Picks out the `nth` request from now on, counted from 1, and only that one.
    pub fn strike(&self, nth: u64, strike: Strike) {
        self.struck.send_replace(false);
        self.change(|script| script.waiting = Some(Waiting { left: nth, strike }));
    }

    /// Whether the request that [`Faults::strike`] picks out has come. One that takes effect has done so.
    #[must_use]
    pub fn struck(&self) -> bool {
        *self.struck.borrow()
    }

    /// Waits for [`Faults::struck`].
    pub async fn until_struck(&self) {
        let mut struck = self.struck.subscribe();
        drop(struck.wait_for(|struck| *struck).await);
    }

    pub(super) fn strikes(&self) {
        self.struck.send_replace(true);
    }

    /// Conditions of writes (`If-None-Match`, `If-Match`) are accepted and not heeded.
    pub fn ignore_conditions(&self, ignore: bool) {
        self.change(|script| script.ignore_conditions = ignore);
    }

    pub(super) fn ignores_conditions(&self) -> bool {
        self.lock().ignore_conditions
    }

    /// Objects whose keys contain `part` are in an archive tier, as a lifecycle rule puts them there: they are listed, and
    /// GET is refused.
    pub fn archive_tier(&self, part: &str) {
        self.change(|script| script.archived = Some(part.to_owned()));
    }

    /// What GET returns is damaged.
    pub fn damage(&self, damage: Option<Damage>) {
        self.change(|script| script.damage = damage);
    }

    /// LIST does not show the `count` newest writes.
    pub fn hide_newest(&self, count: u64) {
        self.change(|script| script.hide_newest = count);
    }

    /// Faults other than freezing and refusing concern only these operations.
    pub fn only(&self, operations: &[Operation]) {
        self.change(|script| script.only = Some(operations.to_vec()));
    }

    /// Faults other than freezing and refusing concern only keys that contain `part`.
    pub fn only_keys(&self, part: &str) {
        self.change(|script| script.only_keys = Some(part.to_owned()));
    }

    pub(super) fn hidden(&self) -> u64 {
        self.lock().hide_newest
    }

    pub(super) fn refusing(&self) -> bool {
        self.lock().refuse
    }

    pub(super) async fn until_thawed(&self) {
        let mut frozen = self.frozen.subscribe();
        drop(frozen.wait_for(|frozen| !frozen).await);
    }

    pub(super) fn verdict(&self, operation: Operation, path: &str) -> Verdict {
        let mut script = self.lock();
        if script.refuse {
            return Verdict {
                refuse: true,
                ..Verdict::default()
            };
        }
        let concerned = script.only.as_ref().is_none_or(|only| only.contains(&operation))
            && script.only_keys.as_ref().is_none_or(|part| path.contains(part));
        let in_tier = |part: &String| path.contains(part.as_str());
        let archived = operation == Operation::Get && script.archived.as_ref().is_some_and(in_tier);
        if !concerned {
            return Verdict {
                archived,
                ..Verdict::default()
            };
        }
        script.seen += 1;
        let strike = script.strike();
        let status = match strike {
            Some(Strike::Fail(status)) => Some(status),
            Some(_) => None,
            None => script.status(),
        };
        let unlucky = status.is_none() && strike.is_none() && script.lose_replies > 0;
        script.lose_replies -= u64::from(unlucky);
        if matches!(strike, Some(Strike::Fail(_))) {
            self.strikes();
        }
        Verdict {
            refuse: false,
            delay: script.delay,
            status,
            lose_reply: unlucky || strike == Some(Strike::LoseReply),
            hold_before: strike == Some(Strike::HoldBefore),
            hold_after: strike == Some(Strike::HoldAfter),
            damage: script.damage.filter(|_| operation == Operation::Get),
            archived,
        }
    }
}

impl Script {
    /// The strike, if this is the request it waits for.
    fn strike(&mut self) -> Option<Strike> {
        let waiting = self.waiting.as_mut()?;
        waiting.left = waiting.left.saturating_sub(1);
        let strike = waiting.strike;
        if waiting.left == 0 {
            self.waiting = None;
            return Some(strike);
        }
        None
    }

    fn status(&mut self) -> Option<u16> {
        if self.fail_always.is_some() {
            return self.fail_always;
        }
        if let Some((left, status)) = self.fail_next.filter(|(left, _)| *left > 0) {
            self.fail_next = Some((left - 1, status));
            return Some(status);
        }
        self.fail_every
            .filter(|(nth, _)| scatter(self.seen).is_multiple_of(*nth))
            .map(|(_, status)| status)
    }
}

/// The finalizer of the SplitMix64 generator: neighbouring numbers come out unrelated.
fn scatter(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
