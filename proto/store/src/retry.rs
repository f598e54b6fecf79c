//! The one retry layer of the product.
//!
//! Owns: when a failed call is tried again and how long it waits, and what a refused create means after a
//! lost reply. Does not own: the classification of failures (each store), time budgets of single calls
//! (`RegionConfig`), or what a caller does when this layer gives up.
//!
//! A put whose reply is lost may have been applied. So a create that finds its key taken reads the object
//! back and compares: equal bytes are success, other bytes are [`Put::Exists`].

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use tokio::time::Instant;

use crate::{ErrorKind, Meta, Object, Operation, Page, Put, PutMode, Store, StoreError};

/// How often a damaged read is tried again before it is reported: transit damage heals, rot does not.
const CORRUPT_RETRIES: u32 = 2;

/// When to try again, and for how long.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    first_wait: Duration,
    longest_wait: Duration,
    budget: Option<Duration>,
    waits_for_operator: bool,
    seed: Option<u64>,
}

impl RetryPolicy {
    /// For a person or a `restore_command` that waits: failures that someone must mend end at once, passing
    /// ones are retried for about 30 s.
    pub fn interactive() -> Self {
        Self {
            first_wait: Duration::from_millis(100),
            longest_wait: Duration::from_secs(3),
            budget: Some(Duration::from_secs(30)),
            waits_for_operator: false,
            seed: None,
        }
    }

    /// For uploads: passing failures and those that an operator must mend are retried for ever, at most
    /// about ten seconds apart, so that a region that is back is used at once. A wrong configuration still ends at once.
    pub fn patient() -> Self {
        Self {
            first_wait: Duration::from_millis(100),
            longest_wait: Duration::from_secs(5),
            budget: None,
            waits_for_operator: true,
            seed: None,
        }
    }

    /// Gives up when this much time has passed since the call began; `None` never does.
    #[must_use]
    pub fn with_budget(mut self, budget: Option<Duration>) -> Self {
        self.budget = budget;
        self
    }

    /// First wait and the cap that doubling stops at; jitter adds up to once the wait.
    #[must_use]
    pub fn with_waits(mut self, first: Duration, longest: Duration) -> Self {
        self.first_wait = first;
        self.longest_wait = longest;
        self
    }

    /// Makes the jitter repeatable.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    fn waits(&self) -> impl Iterator<Item = Duration> + Send + use<> {
        let builder = ExponentialBuilder::new()
            .with_min_delay(self.first_wait)
            .with_max_delay(self.longest_wait)
            .without_max_times()
            .with_jitter();
        match self.seed {
            Some(seed) => builder.with_jitter_seed(seed).build(),
            None => builder.build(),
        }
    }

    /// Whether there is time to try again `after` the call began. Damage is read again however late it shows: after an
    /// outage that took all the time one damaged read would be called rot.
    fn has_time(&self, error: &StoreError, after: Duration) -> bool {
        error.kind() == ErrorKind::Corrupt || self.budget.is_none_or(|budget| after <= budget)
    }

    /// May an error of this kind be tried again? `damaged` counts the attempts whose bytes were damaged.
    fn allows(&self, error: &StoreError, damaged: u32) -> bool {
        match error.kind() {
            ErrorKind::Retry => true,
            ErrorKind::Operator => self.waits_for_operator,
            ErrorKind::Corrupt => error.operation() != Operation::Put && damaged <= CORRUPT_RETRIES,
            ErrorKind::NotFound | ErrorKind::Config | ErrorKind::Conflict | ErrorKind::Bug => false,
        }
    }
}

/// Hears about retries, for metrics, logs and status.
pub trait RetryObserver: Send + Sync {
    /// `error` ended attempt number `attempt` (from 1); the next begins after `wait`.
    fn on_retry(&self, error: &StoreError, attempt: u32, wait: Duration);
    /// A call succeeded (or was answered: an absent object is an answer too).
    fn on_success(&self);
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoObserver;

impl RetryObserver for NoObserver {
    fn on_retry(&self, _error: &StoreError, _attempt: u32, _wait: Duration) {}
    fn on_success(&self) {}
}

/// A store whose calls are retried by a policy.
pub struct Retrying {
    inner: Arc<dyn Store>,
    policy: RetryPolicy,
    observer: Arc<dyn RetryObserver>,
}

impl fmt::Debug for Retrying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retrying")
            .field("inner", &self.inner)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl Retrying {
    /// Wraps `inner`, which must not retry by itself.
    pub fn new(inner: Arc<dyn Store>, policy: RetryPolicy, observer: Arc<dyn RetryObserver>) -> Self {
        Self {
            inner,
            policy,
            observer,
        }
    }

    async fn run<T, F>(&self, call: impl Fn() -> F + Send) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        let began = Instant::now();
        let mut waits = self.policy.waits();
        let (mut attempt, mut damaged) = (1, 0);
        loop {
            let error = match call().await {
                Ok(value) => {
                    self.observer.on_success();
                    return Ok(value);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    self.observer.on_success();
                    return Err(error);
                }
                Err(error) => error,
            };
            let wait = waits.next().unwrap_or(self.policy.longest_wait);
            damaged += u32::from(error.kind() == ErrorKind::Corrupt);
            if !self.policy.allows(&error, damaged) || !self.policy.has_time(&error, began.elapsed() + wait) {
                return Err(error);
            }
            self.observer.on_retry(&error, attempt, wait);
            tokio::time::sleep(wait).await;
            attempt = attempt.saturating_add(1);
        }
    }

    /// One attempt at a create, told apart from a rival's object. A read-back that fails fails the attempt,
    /// which makes the whole create run again.
    async fn create(&self, key: &str, object: &Object) -> Result<Put, StoreError> {
        match self.inner.put(key, object.clone(), PutMode::Create).await? {
            Put::Created => Ok(Put::Created),
            Put::Exists => match self.holds(key, object).await {
                Ok(true) => Ok(Put::Created),
                Ok(false) => Ok(Put::Exists),
                // Deleted between the refusal and the look: the create may simply run again.
                Err(error) if error.kind() == ErrorKind::NotFound => Err(StoreError::new(
                    ErrorKind::Retry,
                    self.inner.region(),
                    Operation::Put,
                    key,
                    "the key was taken and then free again",
                )
                .with_source(error)),
                Err(error) => Err(error),
            },
        }
    }

    async fn holds(&self, key: &str, object: &Object) -> Result<bool, StoreError> {
        // The size alone settles most rivals, without reading them.
        if self.inner.head(key).await?.size != object.bytes.len() as u64 {
            return Ok(false);
        }
        Ok(self.inner.get(key).await? == object.bytes)
    }
}

#[async_trait]
impl Store for Retrying {
    fn region(&self) -> &str {
        self.inner.region()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        match mode {
            PutMode::Create => self.run(|| self.create(key, &object)).await,
            PutMode::Overwrite => self.run(|| self.inner.put(key, object.clone(), mode)).await,
        }
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.run(|| self.inner.get(key)).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.run(|| self.inner.get_range(key, range.clone())).await
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        self.run(|| self.inner.head(key)).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        self.run(|| self.inner.list(prefix, start_after, max)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.run(|| self.inner.delete(key)).await
    }
}
