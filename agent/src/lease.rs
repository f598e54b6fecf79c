//! How long a look at the writer claim is good for: a writer stores nothing in a region that it has not looked at lately.
//!
//! Owns: the term in one region, and the store that keeps to it. Does not own what a look finds
//! ([`crate::writer`]), nor when it is taken (the pulse, which is told when somebody waits).
//!
//! A process that was stopped, or a machine that was suspended, wakes with WAL in its hands and does not know that another one
//! has taken its place meanwhile. Who takes a place that may not be empty lets pass, after it has claimed, what an earlier look
//! is good for; what is to be stored later waits for the next look. A request that was under way
//! when the process fell asleep is beyond reach.

use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use highwater_store::{Meta, Object, Page, Put, PutMode, Store, StoreError};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// For how many intervals of the pulse a look is good: fewer than the silence after which another writer takes over.
const TERM: u32 = 2;

/// How long a look is good for a writer with this interval of the pulse.
pub(crate) fn term(interval: Duration) -> Duration {
    interval * TERM
}

/// A moment by the runtime's clock, which stands still while a machine is suspended, and for how long it was suspended so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    ran: Instant,
    suspended: Duration,
}

/// The two clocks are not read in the same instant: less than this is no suspension.
const LEAST_SUSPENSION: Duration = Duration::from_millis(500);

/// Between two looks at the clocks while somebody looks at a claim.
const TICK: Duration = Duration::from_millis(250);

impl Moment {
    pub(crate) fn now() -> Self {
        let read = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
        let (ran, booted) = (read(ClockId::Monotonic), read(ClockId::Boottime));
        Self {
            ran: Instant::now(),
            suspended: booted.saturating_sub(ran),
        }
    }

    pub(crate) fn since(self, earlier: Self) -> Duration {
        let suspended = self.suspended.saturating_sub(earlier.suspended);
        let ran = self.ran.saturating_duration_since(earlier.ran);
        match suspended >= LEAST_SUSPENSION {
            true => ran + suspended,
            false => ran,
        }
    }
}

/// Asks `question`, and says when it was begun. None if this process did not run for longer than `limit` meanwhile: what it
/// hears then may have been said before it fell asleep.
pub(crate) async fn asked_awake<T>(
    limit: Duration,
    question: impl Future<Output = T>,
) -> (T, Option<Moment>) {
    let began = Moment::now();
    let mut last = began;
    let mut slept = false;
    let mut notice = || {
        let now = Moment::now();
        slept |= now.since(last) > limit + TICK;
        last = now;
        slept
    };
    tokio::pin!(question);
    loop {
        tokio::select! {
            biased;
            answer = &mut question => return (answer, (!notice()).then_some(began)),
            () = tokio::time::sleep(TICK) => {
                notice();
            }
        }
    }
}

/// What a writer may do in one region.
#[derive(Clone, Copy, Debug, Default)]
enum Terms {
    /// Nothing is claimed: by a command, or beside a standby.
    #[default]
    Free,
    /// A look is good for so long.
    Claimed { term: Duration, looked: Option<Moment> },
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    terms: Mutex<Terms>,
    /// Wakes writes in the order in which they began to wait.
    changed: Notify,
    /// Writes that wait for a look.
    waiting: watch::Sender<usize>,
}

impl Lease {
    /// From now on only what a look allows. An earlier look stays good; `interval` is that of the pulse.
    pub(crate) fn claim(&self, interval: Duration) {
        self.change(|terms| {
            let looked = match *terms {
                Terms::Claimed { looked, .. } => looked,
                Terms::Free => None,
            };
            *terms = Terms::Claimed {
                term: term(interval),
                looked,
            };
        });
    }

    /// Nothing is claimed any more.
    pub(crate) fn free(&self) {
        self.change(|terms| *terms = Terms::Free);
    }

    /// A look that began at `began` has found the claim to hold.
    pub(crate) fn looked(&self, began: Moment) {
        self.set_look(Some(began));
    }

    /// Another writer has taken the place: nothing more is stored.
    pub(crate) fn revoke(&self) {
        self.set_look(None);
    }

    /// Whether something may be stored now.
    pub(crate) fn is_good(&self) -> bool {
        self.is_good_at(Moment::now())
    }

    /// Something may be stored that is asked for at `asked`: a look was taken lately or, where looks take longer than that,
    /// begun since.
    fn is_good_at(&self, asked: Moment) -> bool {
        match *self.terms() {
            Terms::Free => true,
            Terms::Claimed { term, looked } => {
                looked.is_some_and(|looked| looked.ran >= asked.ran || asked.since(looked) <= term)
            }
        }
    }

    /// Returns when another writer has taken the place, or may have.
    async fn revoked(&self) {
        loop {
            let changed = self.changed.notified();
            if matches!(*self.terms(), Terms::Claimed { looked: None, .. }) {
                return;
            }
            changed.await;
        }
    }

    fn set_look(&self, look: Option<Moment>) {
        self.change(|terms| {
            if let Terms::Claimed { looked, .. } = terms {
                *looked = look;
            }
        });
    }

    fn terms(&self) -> MutexGuard<'_, Terms> {
        self.terms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Terms)) {
        change(&mut self.terms());
        self.changed.notify_waiters();
    }

    /// Returns when something waits for a look.
    pub(crate) async fn wanted(&self) {
        let mut waiting = self.waiting.subscribe();
        // The sender is ours.
        let _ = waiting.wait_for(|waiting| *waiting > 0).await;
    }

    /// Returns when a look is good.
    async fn may_write(&self) {
        let asked = Moment::now();
        if self.is_good_at(asked) {
            return;
        }
        let _waits = Waits::begin(&self.waiting);
        loop {
            let changed = self.changed.notified();
            if self.is_good_at(asked) {
                return;
            }
            changed.await;
        }
    }
}

/// Counted as long as it lives: a write may be given up.
struct Waits<'a>(&'a watch::Sender<usize>);

impl<'a> Waits<'a> {
    fn begin(waiting: &'a watch::Sender<usize>) -> Self {
        waiting.send_modify(|waiting| *waiting += 1);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

/// A store whose every attempt to write waits for a good look.
#[derive(Debug)]
pub(crate) struct Leased {
    inner: Arc<dyn Store>,
    lease: Arc<Lease>,
}

impl Leased {
    pub(crate) fn new(inner: Arc<dyn Store>, lease: Arc<Lease>) -> Self {
        Self { inner, lease }
    }
}

#[async_trait]
impl Store for Leased {
    fn region(&self) -> &str {
        self.inner.region()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        loop {
            self.lease.may_write().await;
            tokio::select! {
                biased;
                put = self.inner.put(key, object.clone(), mode) => return put,
                () = self.lease.revoked() => {}
            }
        }
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.inner.get(key).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        self.inner.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        self.inner.list(prefix, start_after, max).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }
}

#[cfg(test)]
mod tests {
    use highwater_store::{Fault, FaultyStore, MemoryStore, Rule};
    use tokio::time::{advance, timeout};

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);
    const AT_ONCE: Duration = Duration::from_millis(1);

    fn leased() -> (Arc<Lease>, Leased) {
        let lease = Arc::<Lease>::default();
        let store = Leased::new(Arc::new(MemoryStore::new("a")), lease.clone());
        (lease, store)
    }

    async fn writes(store: &Leased, key: &str) -> bool {
        let put = store.put(key, Object::new("x"), PutMode::Create);
        timeout(AT_ONCE, put).await.is_ok_and(|put| put.is_ok())
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_stored_on_a_look_that_is_too_old() {
        let (lease, store) = leased();
        assert!(writes(&store, "free").await);
        lease.claim(INTERVAL);
        assert!(!writes(&store, "never looked").await);
        lease.looked(Moment::now());
        assert!(writes(&store, "looked").await);
        advance(INTERVAL * TERM - AT_ONCE * 10).await;
        assert!(writes(&store, "lately").await);
        advance(AT_ONCE * 20).await;
        assert!(!writes(&store, "too long ago").await);
        lease.looked(Moment::now());
        // The next timeline is claimed.
        lease.claim(INTERVAL);
        assert!(writes(&store, "looked again").await);
        lease.revoke();
        assert!(!writes(&store, "another one writes").await);
        lease.free();
        assert!(writes(&store, "beside a standby").await);
    }

    /// In a region so slow that every look is too old when it is over.
    #[tokio::test(start_paused = true)]
    async fn a_look_that_was_begun_meanwhile_is_good_however_long_it_took() {
        let (lease, store) = leased();
        lease.claim(INTERVAL);
        let before = Moment::now();
        advance(INTERVAL * TERM * 2).await;
        let write = store.put("slow", Object::new("x"), PutMode::Create);
        tokio::pin!(write);
        assert!(timeout(AT_ONCE, &mut write).await.is_err());
        lease.wanted().await;
        lease.looked(before);
        assert!(timeout(AT_ONCE, &mut write).await.is_err());
        let during = Moment::now();
        advance(INTERVAL * TERM * 2).await;
        lease.looked(during);
        assert_eq!(write.await.unwrap(), Put::Created);
        assert!(timeout(AT_ONCE, lease.wanted()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn time_passes_while_a_machine_is_suspended() {
        let before = Moment::now();
        advance(INTERVAL).await;
        let after = |suspended| Moment {
            ran: Instant::now(),
            suspended: before.suspended + suspended,
        };
        assert_eq!(after(Duration::ZERO).since(before), INTERVAL);
        assert_eq!(after(AT_ONCE).since(before), INTERVAL, "two clocks, read in turn");
        assert_eq!(after(INTERVAL * 9).since(before), INTERVAL * 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_during_which_the_process_slept_says_nothing() {
        let slow = tokio::time::sleep(INTERVAL * 9);
        let ((), began) = asked_awake(INTERVAL, slow).await;
        assert!(began.is_some(), "an answer may take its time");
        let asleep = async {
            advance(INTERVAL + TICK * 2).await;
        };
        let ((), began) = asked_awake(INTERVAL, asleep).await;
        assert!(began.is_none());
    }

    /// What is on its way when another writer takes the place is not waited for, and not done again before a look.
    #[tokio::test(start_paused = true)]
    async fn a_write_that_is_under_way_is_dropped_with_the_lease() {
        let lease = Arc::<Lease>::default();
        let hangs = Arc::new(FaultyStore::new(Arc::new(MemoryStore::new("a"))));
        hangs.inject(Rule::times(1, Fault::Delay(INTERVAL * 1000)));
        let store = Leased::new(hangs, lease.clone());
        lease.claim(INTERVAL);
        lease.looked(Moment::now());
        let write = store.put("slow", Object::new("x"), PutMode::Create);
        tokio::pin!(write);
        assert!(timeout(AT_ONCE, &mut write).await.is_err());
        assert!(timeout(AT_ONCE, lease.wanted()).await.is_err());
        lease.revoke();
        assert!(timeout(AT_ONCE, &mut write).await.is_err());
        lease.wanted().await;
        lease.looked(Moment::now());
        assert_eq!(write.await.unwrap(), Put::Created);
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_was_given_up_wants_nothing() {
        let (lease, store) = leased();
        lease.claim(INTERVAL);
        assert!(!writes(&store, "given up").await);
        assert!(timeout(AT_ONCE, lease.wanted()).await.is_err());
    }
}
