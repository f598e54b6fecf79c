//! The storage trait and the values that cross it.
//!
//! Every implementation passes [`crate::conformance`]; what is written here is what that suite checks.

use std::fmt::Debug;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

use crate::{Operation, StoreError};

/// Most bytes of one object that are read: a manifest of some millions of files stays below it. A larger one is not ours,
/// and must not cost its reader the memory.
pub(crate) const MAX_READ: u64 = 2 << 30;

/// Entries asked for per page where few are expected. S3 gives at most this many (`MaxKeys` of ListObjectsV2).
pub const LIST_PAGE: usize = 1000;

/// Entries asked for per page where all are wanted. A directory is read whole for each page, so that short pages make a
/// listing of N names cost N² / 1000; this many are about 6 MiB while the page is held.
pub const LONG_PAGE: usize = 50_000;

/// Bytes to be stored, with the CRC-32 (IEEE, as zip and S3 use it) that the store verifies on arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// The content.
    pub bytes: Bytes,
    /// CRC-32 of all of `bytes`.
    pub crc32: u32,
}

impl Object {
    /// Wraps `bytes` and computes their checksum.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let crc32 = crc32fast::hash(&bytes);
        Self { bytes, crc32 }
    }

    /// Wraps bytes whose checksum is known already, so that it travels from where they were sealed to
    /// where they are stored. A wrong value is refused by the store.
    pub fn with_crc32(bytes: impl Into<Bytes>, crc32: u32) -> Self {
        Self {
            bytes: bytes.into(),
            crc32,
        }
    }
}

/// What to do when the key is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutMode {
    /// Write nothing and answer [`Put::Exists`]; of several racing writers exactly one creates.
    Create,
    /// Replace the object.
    Overwrite,
}

/// How a put ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The object is stored and durable.
    Created,
    /// [`PutMode::Create`] only: the key was taken and nothing was written. Through
    /// [`Retrying`](crate::Retrying) this means that the bytes there are *different*: equal bytes were
    /// read back and reported as `Created`, whether they came from a lost reply, an earlier run or a peer.
    Exists,
}

/// One object as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Key relative to the region's prefix.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
}

/// One page of a listing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// Ascending by the bytes of the key.
    pub entries: Vec<Meta>,
    /// There may be keys after the last entry; ask again with it as `start_after`.
    pub more: bool,
}

/// One region.
///
/// Keys are relative to the region's prefix, parts separated by `/`, no empty part, no `.` or `..`, no
/// control characters, at most [`MAX_KEY_LEN`](crate::MAX_KEY_LEN) bytes; anything else is an
/// [`ErrorKind::Bug`](crate::ErrorKind::Bug). No method retries. Dropping a future leaves a put or delete
/// either done or not done, never half done.
#[async_trait]
pub trait Store: Debug + Send + Sync {
    /// The region's name in the configuration.
    fn region(&self) -> &str;

    /// The region's URL without secrets, for people.
    fn describe(&self) -> String;

    /// Stores a whole object atomically: readers see all of it or nothing. Durable when this returns.
    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError>;

    /// Reads a whole object; its length, and its checksum where the store knows one, are verified.
    async fn get(&self, key: &str) -> Result<Bytes, StoreError>;

    /// Reads the part of `range` that exists: shorter than asked when the object ends before, empty when
    /// the range begins at or after its end.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Size of one object.
    async fn head(&self, key: &str) -> Result<Meta, StoreError>;

    /// Keys that begin with `prefix` (a plain string, `""` for all) and are greater than `start_after`,
    /// ascending by their bytes, at most `max` (at least 1) of them. A store may return fewer and say `more`.
    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError>;

    /// Deletes an object; an absent one is fine.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;
}

/// Sorts behind every character that a key of the archive holds.
const AFTER_ALL: char = '\u{7f}';

/// Every key under `prefix` after `start_after`, page by page.
pub async fn list_all(
    store: &dyn Store,
    prefix: &str,
    start_after: Option<&str>,
) -> Result<Vec<Meta>, StoreError> {
    let mut all: Vec<Meta> = Vec::new();
    let mut after = start_after.map(str::to_owned);
    loop {
        let page = store.list(prefix, after.as_deref(), LONG_PAGE).await?;
        let more = page.more;
        all.extend(page.entries);
        if !more {
            return Ok(all);
        }
        let last = all.last().map(|meta| meta.key.clone());
        if last.is_none() || last <= after {
            // A store that says "more" without moving on would keep us here for ever.
            return Err(StoreError::corrupt(
                store.region(),
                Operation::List,
                prefix,
                "the listing claims more entries but does not advance",
            ));
        }
        after = last;
    }
}

/// The parts directly below `directory`, which ends in `/`, each with its first key: one request for each, however much
/// lies below it.
///
/// # Errors
/// Those of [`Store::list`].
pub async fn list_parts(store: &dyn Store, directory: &str) -> Result<Vec<(String, String)>, StoreError> {
    let mut parts: Vec<(String, String)> = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.list(directory, after.as_deref(), 1).await?;
        let Some(first) = page.entries.into_iter().next() else {
            return Ok(parts);
        };
        let Some(name) = first
            .key
            .strip_prefix(directory)
            .and_then(|rest| rest.split('/').next())
        else {
            return Ok(parts);
        };
        // A key that is not ours may sort behind the one that was to pass over its directory.
        let passed = parts.last().is_some_and(|(last, _)| last == name);
        after = Some(if passed || first.key.len() == directory.len() + name.len() {
            first.key.clone()
        } else {
            format!("{directory}{name}/{AFTER_ALL}")
        });
        if !passed {
            parts.push((name.to_owned(), first.key));
        }
    }
}
