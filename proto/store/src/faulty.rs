//! A region that fails on demand.
//!
//! Wraps any store. Faults are scripted ([`FaultyStore::inject`]: the next n matching calls), seeded
//! ([`FaultyStore::seeded`]: rates, repeatable by the seed) or standing ([`FaultyStore::freeze`],
//! [`FaultyStore::hide`]). Without any it forwards every call unchanged.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use crate::{ErrorKind, Meta, Object, Operation, Page, Put, PutMode, Store, StoreError};

/// What happens to one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The call fails and nothing was done.
    FailBefore(ErrorKind),
    /// The call is carried out and then reported as failed: a lost reply.
    FailAfter(ErrorKind),
    /// The call is carried out after this time.
    Delay(Duration),
    /// A read gives only this many bytes, without an error.
    Truncate(usize),
    /// A read has this byte (modulo its length) inverted, without an error.
    Flip(usize),
}

/// Which calls a scripted fault hits, and how many of them.
#[derive(Debug, Clone)]
pub struct Rule {
    operation: Option<Operation>,
    key_part: Option<String>,
    times: usize,
    fault: Fault,
}

impl Rule {
    /// Hits the next call of any kind, once.
    pub fn once(fault: Fault) -> Self {
        Self::times(1, fault)
    }

    /// Hits the next `times` calls.
    pub fn times(times: usize, fault: Fault) -> Self {
        Self {
            operation: None,
            key_part: None,
            times,
            fault,
        }
    }

    /// Only calls of this kind.
    #[must_use]
    pub fn on(mut self, operation: Operation) -> Self {
        self.operation = Some(operation);
        self
    }

    /// Only calls whose key or prefix contains this text.
    #[must_use]
    pub fn key(mut self, part: impl Into<String>) -> Self {
        self.key_part = Some(part.into());
        self
    }

    fn matches(&self, operation: Operation, key: &str) -> bool {
        self.times > 0
            && self.operation.is_none_or(|wanted| wanted == operation)
            && self.key_part.as_deref().is_none_or(|part| key.contains(part))
    }
}

/// Chances per call, each from 0 to 1, drawn in this order; at most one fault hits a call.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FaultRates {
    /// [`Fault::FailBefore`] with [`ErrorKind::Retry`].
    pub fail_before: f64,
    /// [`Fault::FailAfter`] with [`ErrorKind::Retry`].
    pub fail_after: f64,
    /// [`Fault::Delay`] of up to `max_delay`.
    pub delay: f64,
    /// Longest delay.
    pub max_delay: Duration,
    /// [`Fault::Flip`] or [`Fault::Truncate`] of a read.
    pub damage: f64,
}

/// A store that fails as told.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    state: Mutex<State>,
    frozen: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    rules: VecDeque<Rule>,
    seeded: Option<(FaultRates, SplitMix)>,
    hidden: Vec<String>,
    calls: BTreeMap<&'static str, u64>,
}

impl FaultyStore {
    /// Forwards everything until told otherwise.
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self {
            inner,
            state: Mutex::default(),
            frozen: watch::Sender::new(false),
        }
    }

    /// Adds random faults that repeat exactly with the same seed and the same sequence of calls.
    #[must_use]
    pub fn seeded(self, seed: u64, rates: FaultRates) -> Self {
        self.lock().seeded = Some((rates, SplitMix(seed)));
        self
    }

    /// Adds a scripted fault; the oldest matching one is used first, before any seeded fault.
    pub fn inject(&self, rule: Rule) {
        self.lock().rules.push_back(rule);
    }

    /// Drops all scripted and seeded faults and shows every key again.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.rules.clear();
        state.seeded = None;
        state.hidden.clear();
        drop(state);
        self.thaw();
    }

    /// Leaves keys that contain `key_part` out of listings; reads still find them.
    pub fn hide(&self, key_part: impl Into<String>) {
        self.lock().hidden.push(key_part.into());
    }

    /// Ends every [`FaultyStore::hide`].
    pub fn unhide(&self) {
        self.lock().hidden.clear();
    }

    /// Calls that begin from now on wait for [`FaultyStore::thaw`] before anything is done.
    pub fn freeze(&self) {
        self.frozen.send_replace(true);
    }

    /// Ends [`FaultyStore::freeze`].
    pub fn thaw(&self) {
        self.frozen.send_replace(false);
    }

    /// Calls of this kind so far, failed ones included.
    pub fn calls(&self, operation: Operation) -> u64 {
        self.lock().calls.get(operation.as_str()).copied().unwrap_or(0)
    }

    /// Scripted faults that did not strike yet.
    pub fn pending(&self) -> usize {
        self.lock().rules.iter().map(|rule| rule.times).sum()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self, operation: Operation, key: &str) -> Option<Fault> {
        let mut state = self.lock();
        *state.calls.entry(operation.as_str()).or_default() += 1;
        if let Some(at) = state.rules.iter().position(|rule| rule.matches(operation, key)) {
            let rule = &mut state.rules[at];
            rule.times -= 1;
            let (fault, spent) = (rule.fault, rule.times == 0);
            if spent {
                state.rules.remove(at);
            }
            return Some(fault);
        }
        let (rates, rng) = state.seeded.as_mut()?;
        rates.draw(rng)
    }

    /// Runs one call through the faults; the returned fault is for the caller's bytes, if it reads any.
    async fn pass<T>(
        &self,
        operation: Operation,
        key: &str,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<(T, Option<Fault>), StoreError> {
        // A dropped sender is impossible while `self` lives, so an error here means "not frozen".
        let _ = self.frozen.subscribe().wait_for(|frozen| !frozen).await;
        let fault = self.draw(operation, key);
        match fault {
            Some(Fault::FailBefore(kind)) => {
                return Err(self.failure(kind, operation, key, "before it was done"));
            }
            Some(Fault::Delay(wait)) => tokio::time::sleep(wait).await,
            _ => {}
        }
        let value = call.await;
        match fault {
            Some(Fault::FailAfter(kind)) => Err(self.failure(kind, operation, key, "after it was done")),
            _ => value.map(|value| (value, fault)),
        }
    }

    fn failure(&self, kind: ErrorKind, operation: Operation, key: &str, when: &str) -> StoreError {
        StoreError::new(
            kind,
            self.inner.region(),
            operation,
            key,
            format!("injected fault {when}"),
        )
    }
}

#[async_trait]
impl Store for FaultyStore {
    fn region(&self) -> &str {
        self.inner.region()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        self.pass(Operation::Put, key, self.inner.put(key, object, mode))
            .await
            .map(|(put, _)| put)
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        let (bytes, fault) = self.pass(Operation::Get, key, self.inner.get(key)).await?;
        Ok(damage(bytes, fault))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (bytes, fault) = self
            .pass(Operation::GetRange, key, self.inner.get_range(key, range))
            .await?;
        Ok(damage(bytes, fault))
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        self.pass(Operation::Head, key, self.inner.head(key))
            .await
            .map(|(meta, _)| meta)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        let call = self.inner.list(prefix, start_after, max);
        let (mut page, _) = self.pass(Operation::List, prefix, call).await?;
        let hidden = self.lock().hidden.clone();
        if hidden.is_empty() {
            return Ok(page);
        }
        // The last entry is what the caller goes on from, so a page must not become empty while there is more.
        let is_hidden = |key: &str| hidden.iter().any(|part| key.contains(part.as_str()));
        while page.more && page.entries.iter().all(|meta| is_hidden(&meta.key)) {
            let after = page.entries.last().map(|meta| meta.key.clone());
            page = self
                .inner
                .list(prefix, after.as_deref().or(start_after), max)
                .await?;
        }
        page.entries.retain(|meta| !is_hidden(&meta.key));
        Ok(page)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.pass(Operation::Delete, key, self.inner.delete(key))
            .await
            .map(|((), _)| ())
    }
}

fn damage(bytes: Bytes, fault: Option<Fault>) -> Bytes {
    match fault {
        Some(Fault::Truncate(len)) => bytes.slice(..len.min(bytes.len())),
        Some(Fault::Flip(at)) if !bytes.is_empty() => {
            let mut changed = bytes.to_vec();
            let at = at % changed.len();
            changed[at] = !changed[at];
            changed.into()
        }
        _ => bytes,
    }
}

impl FaultRates {
    fn draw(&self, rng: &mut SplitMix) -> Option<Fault> {
        // Both draws are always made, so that changing one rate does not shift the whole sequence.
        let (chance, detail) = (rng.unit(), rng.next());
        let mut bound = self.fail_before;
        if chance < bound {
            return Some(Fault::FailBefore(ErrorKind::Retry));
        }
        bound += self.fail_after;
        if chance < bound {
            return Some(Fault::FailAfter(ErrorKind::Retry));
        }
        bound += self.delay;
        if chance < bound {
            let micros = u64::try_from(self.max_delay.as_micros()).unwrap_or(u64::MAX);
            return Some(Fault::Delay(Duration::from_micros(detail % micros.max(1))));
        }
        bound += self.damage;
        if chance < bound {
            let at = usize::try_from(detail >> 32).unwrap_or(0);
            return Some(if detail & 1 == 0 {
                Fault::Flip(at)
            } else {
                Fault::Truncate(at % 64)
            });
        }
        None
    }
}

/// Steele, Lea and Flood's SplitMix64: enough for faults, and the same on every machine.
#[derive(Debug, Clone)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        f64::from(u32::try_from(self.next() >> 32).unwrap_or(0)) / 4_294_967_296.0
    }
}
