//! What the endpoint holds: buckets of objects behind one mutex, so that a conditional PUT is
//! atomic and a snapshot is one moment.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;

use super::versions::{self, Past, Version};
use crate::clock;

/// One stored object. Its bytes are shared by every reader and snapshot.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The content.
    pub bytes: Bytes,
    /// CRC-32 (IEEE) of the content.
    pub crc32: u32,
    /// When the PUT took effect, by the machine's clock.
    pub at: SystemTime,
    /// Position of this write in the order of all writes to the endpoint, from 1.
    pub sequence: u64,
}

impl Stored {
    /// The entity tag: it names the content, as S3's does, but is not its MD5.
    #[must_use]
    pub fn etag(&self) -> String {
        format!("{:08x}{:016x}", self.crc32, self.bytes.len())
    }
}

pub(super) type Bucket = BTreeMap<String, Arc<Stored>>;

/// All buckets of an endpoint at one moment.
#[derive(Clone, Debug, Default)]
pub struct S3Snapshot {
    pub(super) buckets: BTreeMap<String, Bucket>,
    /// Of the buckets that keep versions.
    pub(super) past: BTreeMap<String, Past>,
    pub(super) writes: u64,
}

impl S3Snapshot {
    /// The keys of `bucket`, sorted.
    #[must_use]
    pub fn keys(&self, bucket: &str) -> Vec<String> {
        self.buckets
            .get(bucket)
            .map(|bucket| bucket.keys().cloned().collect())
            .unwrap_or_default()
    }

    /// One object.
    #[must_use]
    pub fn get(&self, bucket: &str, key: &str) -> Option<Arc<Stored>> {
        self.buckets.get(bucket)?.get(key).cloned()
    }

    /// The same without the objects for which `keep` says no. Older versions stay.
    #[must_use]
    pub fn filtered(mut self, keep: impl Fn(&str, &Stored) -> bool) -> Self {
        for bucket in self.buckets.values_mut() {
            bucket.retain(|key, stored| keep(key, stored));
        }
        self
    }
}

/// Why a write was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    NoSuchBucket,
    Precondition,
}

/// The condition of a PUT.
#[derive(Clone, Debug)]
pub(super) enum Condition {
    Always,
    Absent,
    Matches(String),
}

#[derive(Clone, Debug, Default)]
pub(super) struct Shared(Arc<Mutex<S3Snapshot>>);

impl Shared {
    pub(super) fn new(snapshot: S3Snapshot) -> Self {
        Self(Arc::new(Mutex::new(snapshot)))
    }

    fn lock(&self) -> MutexGuard<'_, S3Snapshot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn snapshot(&self) -> S3Snapshot {
        self.lock().clone()
    }

    pub(super) fn create_bucket(&self, name: &str) {
        self.lock().buckets.entry(name.to_owned()).or_default();
    }

    pub(super) fn has_bucket(&self, name: &str) -> bool {
        self.lock().buckets.contains_key(name)
    }

    pub(super) fn put(
        &self,
        bucket: &str,
        key: &str,
        bytes: Bytes,
        condition: &Condition,
    ) -> Result<Arc<Stored>, Refused> {
        let crc32 = crc32fast::hash(&bytes);
        let state = &mut *self.lock();
        state.writes += 1;
        let stored = Arc::new(Stored {
            bytes,
            crc32,
            at: clock::now(),
            sequence: state.writes,
        });
        let past = state.past.get_mut(bucket);
        let bucket = state.buckets.get_mut(bucket).ok_or(Refused::NoSuchBucket)?;
        let allowed = match (condition, bucket.get(key)) {
            (Condition::Always, _) | (Condition::Absent, None) => true,
            (Condition::Matches(etag), Some(there)) => there.etag() == *etag,
            (Condition::Absent, Some(_)) | (Condition::Matches(_), None) => false,
        };
        if !allowed {
            return Err(Refused::Precondition);
        }
        bucket.insert(key.to_owned(), Arc::clone(&stored));
        if let Some(past) = past {
            past.add(key, stored.at, Some(Arc::clone(&stored)));
        }
        Ok(stored)
    }

    /// `None` for a missing bucket, `Some(None)` for a missing key.
    pub(super) fn get(&self, bucket: &str, key: &str) -> Option<Option<Arc<Stored>>> {
        self.lock()
            .buckets
            .get(bucket)
            .map(|bucket| bucket.get(key).cloned())
    }

    pub(super) fn delete(&self, bucket: &str, key: &str) -> Result<bool, Refused> {
        let state = &mut *self.lock();
        // A key that holds nothing gets a delete marker, too.
        if let Some(past) = state.past.get_mut(bucket) {
            past.add(key, clock::now(), None);
        }
        let bucket = state.buckets.get_mut(bucket).ok_or(Refused::NoSuchBucket)?;
        Ok(bucket.remove(key).is_some())
    }

    /// From now on the bucket keeps older versions.
    pub(super) fn keep_versions(&self, bucket: &str) {
        let state = &mut *self.lock();
        if let Some(present) = state.buckets.get(bucket) {
            let past = || Past::of(present);
            state.past.entry(bucket.to_owned()).or_insert_with(past);
        }
    }

    /// One version; `None` where there is none of that name.
    pub(super) fn version(&self, bucket: &str, key: &str, id: &str) -> Option<Version> {
        self.with_past(bucket, |past| past.get(key, id).cloned())?
    }

    /// A page of versions; `None` for a missing bucket.
    pub(super) fn versions(
        &self,
        bucket: &str,
        query: &versions::Query<'_>,
    ) -> Option<(Vec<versions::Entry>, bool)> {
        self.with_past(bucket, |past| past.list(query))
    }

    fn with_past<T>(&self, bucket: &str, ask: impl FnOnce(&Past) -> T) -> Option<T> {
        let state = self.lock();
        match state.past.get(bucket) {
            Some(past) => Some(ask(past)),
            None => state.buckets.get(bucket).map(|present| ask(&Past::of(present))),
        }
    }

    /// Up to `max` objects with `prefix` after the key `after`, and after which key there may be more. As S3 may, it gives a
    /// page with less, or nothing, where it has passed over keys that hold nothing but a delete marker.
    pub(super) fn list(&self, bucket: &str, query: &Query<'_>) -> Option<(Listed, Option<String>)> {
        let state = self.lock();
        let past = state.past.get(bucket);
        let bucket = state.buckets.get(bucket)?;
        let newest_shown = state.writes.saturating_sub(query.hide_newest);
        let from = match query.after {
            Some(after) if after >= query.prefix => Bound::Excluded(after),
            _ => Bound::Included(query.prefix),
        };
        let names: Box<dyn Iterator<Item = &String>> = match past {
            Some(past) => Box::new(past.keys_from(from)),
            None => Box::new(
                bucket
                    .range::<str, _>((from, Bound::Unbounded))
                    .map(|(key, _)| key),
            ),
        };
        let hidden = |stored: &Stored| query.hide_newest > 0 && stored.sequence > newest_shown;
        let known = names
            .take_while(|key| key.starts_with(query.prefix))
            .map(|key| (key, bucket.get(key)))
            .filter(|(_, stored)| stored.is_none_or(|stored| !hidden(stored)));
        let (mut found, mut passed, mut last) = (Listed::new(), 0, None);
        for (key, stored) in known {
            if found.len() == query.max || passed == MARKERS_PASSED {
                return Some((found, last));
            }
            last = Some(key.clone());
            match stored {
                Some(stored) => found.push((key.clone(), Arc::clone(stored))),
                None => passed += 1,
            }
        }
        Some((found, None))
    }
}

/// A page passes over this many keys that hold nothing but a delete marker. S3 says no number; this one is small enough to be
/// met in tests.
const MARKERS_PASSED: usize = 20;

/// A page of a LIST: keys and their objects, sorted.
pub(super) type Listed = Vec<(String, Arc<Stored>)>;

/// What a LIST asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Query<'a> {
    pub(super) prefix: &'a str,
    pub(super) after: Option<&'a str>,
    pub(super) max: usize,
    pub(super) hide_newest: u64,
}
