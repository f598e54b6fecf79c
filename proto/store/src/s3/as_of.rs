//! A bucket as it was at a moment, by the versions that it keeps. For reading only.
//!
//! Owns: the requests for listings of versions, and that nothing is written. Does not own: which version counts (`versions`), and
//! the reading of one (the store).
//!
//! Each read of an object first lists the versions of its key, one page in the usual case. Ids from an earlier listing are
//! not kept: an archive has as many as it has objects, and `wal-fetch` is a new process for every segment. A second request for
//! each object is cheap beside the object.

use std::fmt;
use std::ops::Range;
use std::time::SystemTime;

use async_trait::async_trait;
use aws_sdk_s3::operation::list_object_versions::ListObjectVersionsOutput;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use aws_sdk_s3::types::{DeleteMarkerEntry, ObjectVersion};
use bytes::Bytes;

use super::S3Store;
use super::versions::{Choice, Version};
use crate::key::{check_key, check_prefix};
use crate::{ErrorKind, LIST_PAGE, Meta, Object, Operation, Page, Put, PutMode, Store, StoreError};

/// Versions asked for at first: most keys have one and a delete marker.
const FIRST_PAGE: usize = 16;

/// Pages that one call follows: ten million versions. A store that never gets to the end must not keep us.
const MOST_PAGES: usize = 10_000;

/// S3's name for the one version of an object in a bucket that keeps no others.
const ONLY_VERSION: &str = "null";

/// A region in a bucket at a moment.
#[derive(Debug)]
pub(crate) struct AsOf {
    bucket: S3Store,
    time: SystemTime,
}

/// Where a page begins: behind a key, or behind one version of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Marker {
    key: Option<String>,
    version: Option<String>,
}

/// Versions of ascending keys, and where the next page begins if there is one.
struct Versions {
    all: Vec<Version>,
    next: Option<Marker>,
}

impl AsOf {
    pub(crate) fn new(bucket: S3Store, time: SystemTime) -> Self {
        Self { bucket, time }
    }

    /// One page of what happened to keys that begin with `prefix`.
    async fn page(
        &self,
        operation: Operation,
        prefix: &str,
        from: &Marker,
        max: usize,
    ) -> Result<Versions, StoreError> {
        let bucket = &self.bucket;
        let call = bucket
            .sdk
            .client()
            .list_object_versions()
            .bucket(&bucket.bucket)
            .prefix(bucket.full(prefix))
            .set_key_marker(from.key.clone())
            .set_version_id_marker(from.version.clone())
            .max_keys(i32::try_from(max.min(LIST_PAGE)).unwrap_or(i32::MAX));
        let output = bucket
            .answer(operation, prefix, 0, call.send())
            .await?
            .map_err(|error| bucket.failed(operation, prefix, error))?;
        let next = self.next(operation, prefix, from, &output)?;
        let mut all = Vec::new();
        for version in output.versions() {
            all.push(self.version(operation, prefix, &Listed::from(version))?);
        }
        for marker in output.delete_markers() {
            all.push(self.version(operation, prefix, &Listed::from(marker))?);
        }
        Ok(Versions { all, next })
    }

    fn next(
        &self,
        operation: Operation,
        prefix: &str,
        from: &Marker,
        output: &ListObjectVersionsOutput,
    ) -> Result<Option<Marker>, StoreError> {
        if !output.is_truncated().unwrap_or(false) {
            return Ok(None);
        }
        let next = Marker {
            key: output.next_key_marker().map(str::to_owned),
            version: output
                .next_version_id_marker()
                .filter(|id| !id.is_empty())
                .map(str::to_owned),
        };
        // Behind the one before: a later key, or another version of the same one.
        if next.key.is_none() || next.key < from.key || next == *from {
            return Err(self.endless(operation, prefix));
        }
        Ok(Some(next))
    }

    fn version(
        &self,
        operation: Operation,
        prefix: &str,
        listed: &Listed<'_>,
    ) -> Result<Version, StoreError> {
        let made = listed.made.and_then(|made| SystemTime::try_from(*made).ok());
        let made = made.ok_or_else(|| self.bucket.foreign(operation, prefix, "a version without a time"))?;
        Ok(Version {
            key: self.bucket.relative(listed.key.unwrap_or_default(), prefix)?,
            id: listed.id.unwrap_or(ONLY_VERSION).to_owned(),
            size: listed.size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
            made,
            deleted: listed.deleted,
            newest: listed.newest,
        })
    }

    fn endless(&self, operation: Operation, prefix: &str) -> StoreError {
        let what = "a listing of versions that claims more and does not lead to it";
        self.bucket.foreign(operation, prefix, what)
    }

    /// The version of `key` that was there.
    async fn find(&self, operation: Operation, key: &str) -> Result<Version, StoreError> {
        let (mut from, mut max) = (Marker::default(), FIRST_PAGE);
        let mut choice = Choice::at(self.time);
        for _ in 0..MOST_PAGES {
            let mut page = self.page(operation, key, &from, max).await?;
            // Longer keys begin with this one, too, and sort behind it.
            let passed = page.all.iter().any(|version| version.key != key);
            page.all.retain(|version| version.key == key);
            let replaced = |version: &Version| version.id == ONLY_VERSION && version.made > self.time;
            if page.all.iter().any(replaced) {
                return Err(self.unversioned(operation, key));
            }
            if let Some(found) = choice.of_page(page.all).pop() {
                return Ok(found);
            }
            match page.next {
                Some(next) if !passed && !choice.has_decided(key) => (from, max) = (next, LIST_PAGE),
                _ => {
                    let message = format!("no version of it was there at {}", shown(self.time));
                    return Err(self.bucket.error(ErrorKind::NotFound, operation, key, message));
                }
            }
        }
        Err(self.endless(operation, key))
    }

    /// What was there before may have been another object, or none.
    fn unversioned(&self, operation: Operation, key: &str) -> StoreError {
        let message = format!(
            "the bucket kept no versions when it was written, after {}: what was there then is not known",
            shown(self.time)
        );
        self.bucket
            .error(ErrorKind::Config, operation, key, message)
            .with_next_step("leave the region out, or read it as it is now")
    }

    fn refuse(&self, operation: Operation, key: &str) -> StoreError {
        let message = format!(
            "the region is open as of {} and cannot be written to",
            shown(self.time)
        );
        self.bucket
            .error(ErrorKind::Config, operation, key, message)
            .with_next_step("open it as it is now to write")
    }
}

/// What both lists of an answer have.
struct Listed<'a> {
    key: Option<&'a str>,
    id: Option<&'a str>,
    size: Option<i64>,
    made: Option<&'a DateTime>,
    deleted: bool,
    newest: bool,
}

impl<'a> From<&'a ObjectVersion> for Listed<'a> {
    fn from(version: &'a ObjectVersion) -> Self {
        Self {
            key: version.key(),
            id: version.version_id(),
            size: version.size(),
            made: version.last_modified(),
            deleted: false,
            newest: version.is_latest().unwrap_or(false),
        }
    }
}

impl<'a> From<&'a DeleteMarkerEntry> for Listed<'a> {
    fn from(marker: &'a DeleteMarkerEntry) -> Self {
        Self {
            key: marker.key(),
            id: marker.version_id(),
            size: None,
            made: marker.last_modified(),
            deleted: true,
            newest: marker.is_latest().unwrap_or(false),
        }
    }
}

fn shown(time: SystemTime) -> impl fmt::Display {
    // Only years that RFC 3339 cannot name have no text.
    DateTime::from(time)
        .fmt(DateTimeFormat::DateTime)
        .unwrap_or_default()
}

#[async_trait]
impl Store for AsOf {
    fn region(&self) -> &str {
        self.bucket.region()
    }

    fn describe(&self) -> String {
        format!("{} as of {}", self.bucket.describe(), shown(self.time))
    }

    async fn put(&self, key: &str, _object: Object, _mode: PutMode) -> Result<Put, StoreError> {
        Err(self.refuse(Operation::Put, key))
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        check_key(self.region(), Operation::Get, key)?;
        let read = async {
            let version = self.find(Operation::Get, key).await?;
            self.bucket.read_whole(key, Some(&version.id)).await
        };
        self.bucket.within(Operation::Get, key, read).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        check_key(self.region(), Operation::GetRange, key)?;
        let read = async {
            let version = self.find(Operation::GetRange, key).await?;
            if range.is_empty() {
                return Ok(Bytes::new());
            }
            self.bucket.read_range(key, range, Some(&version.id)).await
        };
        self.bucket.within(Operation::GetRange, key, read).await
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        check_key(self.region(), Operation::Head, key)?;
        let found = self.find(Operation::Head, key);
        let version = self.bucket.within(Operation::Head, key, found).await?;
        Ok(Meta {
            key: version.key,
            size: version.size,
        })
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        check_prefix(self.region(), Operation::List, prefix)?;
        let after = start_after.unwrap_or_default();
        let behind = Some(self.bucket.full(after)).filter(|key| !key.is_empty());
        let mut from = Marker {
            key: behind,
            version: None,
        };
        let max = max.max(1);
        let mut ask = max.saturating_mul(2).max(FIRST_PAGE);
        let mut choice = Choice::at(self.time);
        for _ in 0..MOST_PAGES {
            let mut page = self.page(Operation::List, prefix, &from, ask).await?;
            page.all.retain(|version| version.key.as_str() > after);
            let there = choice.of_page(page.all);
            let more = page.next.is_some() || there.len() > max;
            match page.next {
                // What was made later, or was deleted before, may fill pages.
                Some(next) if there.is_empty() => (from, ask) = (next, LIST_PAGE),
                _ => {
                    let meta = |version: Version| Meta {
                        key: version.key,
                        size: version.size,
                    };
                    let entries = there.into_iter().take(max).map(meta).collect();
                    return Ok(Page { entries, more });
                }
            }
        }
        Err(self.endless(Operation::List, prefix))
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        Err(self.refuse(Operation::Delete, key))
    }
}
