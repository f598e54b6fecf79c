//! A region of the feed, asked with the patience that it deserves.
//!
//! Owns: how long a call may take. Recovery waits for every answer, and a new process gives most of them: a region that
//! died after the plan would cost its time-out again and again. So a region beside which another one can be asked is
//! given up soon; one that did not answer before, in this process or by the note of another, is only looked at. Whoever
//! cannot do without it asks again after [`Watched::wake`], with all patience.
//! Does not own: the order in which regions are asked, and what their silence means for the answer.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use highwater_format::Time;
use highwater_store::{
    ErrorKind, Meta, NoObserver, Object, Operation, Page, Put, PutMode, RegionConfig, RetryPolicy, Retrying,
    Store, StoreError,
};

use crate::clock::Clock;

/// Passing failures of one call are retried for this long where nothing else helps. Recovery stops when it is spent and
/// resumes when the server is started again; PostgreSQL itself would wait for ever.
const FULL_BUDGET: Duration = Duration::from_secs(20);
/// The same while another region can be asked.
const BRIEF_BUDGET: Duration = Duration::from_secs(3);
/// A listing is short, so while another region can be asked it may take this long in all.
const BRIEF_LISTING: Duration = Duration::from_secs(5);
/// The same for a region that did not answer before.
const HURRIED_BUDGET: Duration = Duration::from_millis(500);
/// And all that a call to it may take.
const HURRIED_LIMIT: Duration = Duration::from_millis(1500);
/// A region is not asked properly for this long after it did not answer.
const SILENCE: Duration = Duration::from_secs(30);

/// The head of an answer is there within this, or another region is asked; bodies may take as long as they need.
const BRIEF_ATTEMPT: Duration = Duration::from_secs(5);
/// The same for a file system, which gives head and body in one.
const BRIEF_FILE: Duration = Duration::from_secs(30);

/// Shortens the time-outs of a region beside which another one can be asked.
pub(crate) fn hurry(settings: &mut RegionConfig) {
    settings.attempt_timeout = settings.attempt_timeout.min(BRIEF_ATTEMPT);
    if settings.url.starts_with("file:") {
        settings.operation_timeout = settings.operation_timeout.min(BRIEF_FILE);
    }
}

/// A region and how it has behaved.
#[derive(Debug)]
pub(crate) struct Watched {
    store: Arc<dyn Store>,
    /// Another region that the plan had read can be asked.
    has_other: bool,
    note: Option<Note>,
    standing: Mutex<Standing>,
}

#[derive(Debug, Clone)]
enum Standing {
    /// No reason to doubt it.
    Answers,
    /// It did not answer another process, or the plan.
    Doubtful,
    /// It did not answer this process.
    Silent { until: Instant, error: StoreError },
    /// It must answer: nothing else helped.
    Needed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Patience {
    Full,
    Brief,
    Hurried,
}

impl Watched {
    /// Watches `store`. `was_read`: the plan had read it.
    pub(crate) fn new(store: Arc<dyn Store>, was_read: bool, has_other: bool, note: Option<Note>) -> Self {
        let noted = note.as_ref().is_some_and(Note::is_silent);
        let standing = if has_other && (noted || !was_read) {
            Standing::Doubtful
        } else {
            Standing::Answers
        };
        Self {
            store,
            has_other,
            note,
            standing: Mutex::new(standing),
        }
    }

    /// Whether it should be asked last.
    pub(crate) fn is_doubtful(&self) -> bool {
        matches!(self.standing(), Standing::Doubtful)
    }

    /// Why it is not worth asking now although another region cannot answer for it: it was asked a moment ago.
    pub(crate) fn silence(&self) -> Option<StoreError> {
        match self.standing() {
            Standing::Silent { until, error } if self.has_other && Instant::now() < until => Some(error),
            _ => None,
        }
    }

    /// Nothing helps but this region: it will be asked with all patience. `false` if it was, or has always answered.
    pub(crate) fn wake(&self) -> bool {
        let sleeps =
            self.has_other && matches!(self.standing(), Standing::Doubtful | Standing::Silent { .. });
        if sleeps {
            self.set(Standing::Needed);
        }
        sleeps
    }

    fn standing(&self) -> Standing {
        self.standing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, standing: Standing) {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
    }

    fn patience(&self) -> Patience {
        match self.standing() {
            _ if !self.has_other => Patience::Full,
            Standing::Needed => Patience::Full,
            Standing::Doubtful => Patience::Hurried,
            Standing::Silent { until, .. } if Instant::now() < until => Patience::Hurried,
            Standing::Answers | Standing::Silent { .. } => Patience::Brief,
        }
    }

    async fn call<T, F, C>(&self, operation: Operation, key: &str, call: C) -> Result<T, StoreError>
    where
        C: FnOnce(Retrying) -> F + Send,
        F: Future<Output = Result<T, StoreError>> + Send,
        T: Send,
    {
        let (budget, limit) = match self.patience() {
            Patience::Full => (FULL_BUDGET, None),
            Patience::Brief => (
                BRIEF_BUDGET,
                (operation == Operation::List).then_some(BRIEF_LISTING),
            ),
            Patience::Hurried => (HURRIED_BUDGET, Some(HURRIED_LIMIT)),
        };
        let policy = RetryPolicy::interactive().with_budget(Some(budget));
        let answer = call(Retrying::new(self.store.clone(), policy, Arc::new(NoObserver)));
        let result = match limit {
            None => answer.await,
            Some(limit) => tokio::time::timeout(limit, answer)
                .await
                .unwrap_or_else(|_| Err(self.no_answer(operation, key, limit))),
        };
        self.judge(&result);
        result
    }

    fn no_answer(&self, operation: Operation, key: &str, limit: Duration) -> StoreError {
        let message = format!("no answer within {} ms", limit.as_millis());
        StoreError::new(ErrorKind::Retry, self.store.region(), operation, key, message)
    }

    fn judge<T>(&self, result: &Result<T, StoreError>) {
        match result {
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => {
                let (until, error) = (Instant::now() + SILENCE, error.clone());
                self.set(Standing::Silent { until, error });
                if let Some(note) = self.note.as_ref().filter(|_| self.has_other) {
                    note.set();
                }
            }
            _ => {
                let doubted = !matches!(self.standing(), Standing::Answers);
                self.set(Standing::Answers);
                if let Some(note) = self.note.as_ref().filter(|_| doubted) {
                    note.clear();
                }
            }
        }
    }
}

#[async_trait]
impl Store for Watched {
    fn region(&self) -> &str {
        self.store.region()
    }

    fn describe(&self) -> String {
        self.store.describe()
    }

    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        self.store.put(key, object, mode).await
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.call(Operation::Get, key, |store| async move { store.get(key).await })
            .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.call(Operation::GetRange, key, |store| async move {
            store.get_range(key, range).await
        })
        .await
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        self.call(Operation::Head, key, |store| async move { store.head(key).await })
            .await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        self.call(Operation::List, prefix, |store| async move {
            store.list(prefix, start_after, max).await
        })
        .await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.store.delete(key).await
    }
}

/// A note for the next process that a region did not answer: a file in the spool that says until when to believe it. It
/// only saves time, so that it cannot be written or read is no trouble.
#[derive(Debug, Clone)]
pub(crate) struct Note {
    path: PathBuf,
    clock: Clock,
}

/// How long a note holds.
const NOTED: Duration = Duration::from_secs(60);

impl Note {
    /// The note of the region in this place of the list.
    pub(crate) fn of(spool: &Path, region: usize) -> Self {
        Self {
            path: spool.join(format!("silent-{region}")),
            clock: Clock::System,
        }
    }

    fn is_silent(&self) -> bool {
        let until = std::fs::read_to_string(&self.path)
            .ok()
            .and_then(|text| text.parse::<Time>().ok());
        let now = self.clock.now();
        // A note from the far future is from a clock that was wrong.
        until.is_some_and(|until| now < until && until <= now.saturating_add(NOTED))
    }

    fn set(&self) {
        let until = self.clock.now().saturating_add(NOTED);
        let _ = std::fs::write(&self.path, until.to_string());
    }

    fn clear(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
#[path = "watched_tests.rs"]
mod tests;
