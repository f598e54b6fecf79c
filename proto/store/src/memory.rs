//! A region in memory, for tests and simulations.
//!
//! Keeps the same promises as the others except durability. Clones of the [`Arc`](std::sync::Arc) share
//! content; [`MemoryStore::snapshot`] makes a frozen copy, as if the region had been copied at an instant.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use crate::key::{check_key, check_prefix};
use crate::{ErrorKind, Meta, Object, Operation, Page, Put, PutMode, Store, StoreError};

/// An in-memory region.
#[derive(Debug)]
pub struct MemoryStore {
    region: String,
    objects: Mutex<BTreeMap<String, Bytes>>,
}

impl MemoryStore {
    /// An empty region.
    pub fn new(region: impl Into<String>) -> Self {
        Self {
            region: region.into(),
            objects: Mutex::default(),
        }
    }

    /// An independent region with the same objects.
    pub fn snapshot(&self) -> Self {
        Self {
            region: self.region.clone(),
            objects: Mutex::new(self.lock().clone()),
        }
    }

    /// All keys, ascending.
    pub fn keys(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Replaces an object's bytes behind the store's back, as bit rot would. False if there is none.
    pub fn corrupt(&self, key: &str, change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut objects = self.lock();
        let Some(bytes) = objects.get_mut(key) else {
            return false;
        };
        let mut content = bytes.to_vec();
        change(&mut content);
        *bytes = content.into();
        true
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
        // Every critical section leaves the map whole, so a panic elsewhere does not spoil it.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, operation: Operation, key: &str) -> Result<Bytes, StoreError> {
        check_key(&self.region, operation, key)?;
        self.lock().get(key).cloned().ok_or_else(|| {
            StoreError::new(
                ErrorKind::NotFound,
                &self.region,
                operation,
                key,
                "no such object",
            )
        })
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn region(&self) -> &str {
        &self.region
    }

    fn describe(&self) -> String {
        format!("memory:{}", self.region)
    }

    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        check_key(&self.region, Operation::Put, key)?;
        verify_upload(&self.region, key, &object)?;
        let mut objects = self.lock();
        if mode == PutMode::Create && objects.contains_key(key) {
            return Ok(Put::Exists);
        }
        objects.insert(key.to_owned(), object.bytes);
        Ok(Put::Created)
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.find(Operation::Get, key)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let bytes = self.find(Operation::GetRange, key)?;
        Ok(clamp(&bytes, &range))
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        let bytes = self.find(Operation::Head, key)?;
        Ok(Meta {
            key: key.to_owned(),
            size: bytes.len() as u64,
        })
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        check_prefix(&self.region, Operation::List, prefix)?;
        let objects = self.lock();
        let from = match start_after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let mut matching = objects
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, bytes)| Meta {
                key: key.clone(),
                size: bytes.len() as u64,
            });
        let entries = matching.by_ref().take(max.max(1)).collect();
        Ok(Page {
            entries,
            more: matching.next().is_some(),
        })
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key(&self.region, Operation::Delete, key)?;
        self.lock().remove(key);
        Ok(())
    }
}

/// The part of `bytes` that lies in `range`.
pub(crate) fn clamp(bytes: &Bytes, range: &Range<u64>) -> Bytes {
    let limit = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
    let (start, end) = (limit(range.start), limit(range.end));
    bytes.slice(start..end.max(start))
}

/// What S3 does with the checksum header: bytes that are not the announced ones are refused.
pub(crate) fn verify_upload(region: &str, key: &str, object: &Object) -> Result<(), StoreError> {
    let actual = crc32fast::hash(&object.bytes);
    if actual == object.crc32 {
        return Ok(());
    }
    Err(StoreError::corrupt(
        region,
        Operation::Put,
        key,
        format!(
            "the bytes have CRC-32 {actual:08x} but {:08x} was announced; nothing was written",
            object.crc32
        ),
    )
    .with_next_step("the bytes changed in this machine's memory after sealing: check the memory"))
}
