//! A region in a directory.
//!
//! A key is a path below the root. An object appears whole or not at all: it is written to a file of its own
//! under `<root>/.tmp`, made durable, and only then linked (create: the link fails if the name is taken) or
//! renamed (overwrite) into place; then the directory is made durable too. What a crash leaves under `.tmp`
//! is never listed, can't be addressed by a key, and is removed by a later writer once it is an hour old.
//!
//! The root's last component is created by the first write, nothing above it: a mount point that is missing
//! is an error and not a new directory on the wrong disk. A root that disappears or moves to another file
//! system while the store is open (a volume unmounted) is an error as well and never reads as "no such object".
//!
//! Owns: the mapping of keys to paths, atomicity, durability. Does not own: checksums, which stand in the
//! objects themselves; this store checks that what it wrote has the announced one.

mod faults;
mod list;
mod root;
mod write;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Semaphore;

use crate::key::{check_key, check_prefix};
use crate::memory::verify_upload;
use crate::store::MAX_READ;
use crate::{ErrorKind, Meta, Object, Operation, Page, Put, PutMode, RegionConfig, Store, StoreError};

use faults::{At, Failure};
use root::Root;

/// Calls that may be inside the file system at once. A dead network mount holds its callers for ever; this
/// bounds how many threads it can take.
const MAX_CALLS: usize = 32;

/// A page of a listing ends early after this part of the time that a call may take.
const PAGE_SHARE: u32 = 8;

/// A region in a directory.
#[derive(Debug)]
pub(crate) struct FileStore {
    region: String,
    root: Arc<Root>,
    calls: Arc<Semaphore>,
    timeout: Duration,
}

impl FileStore {
    /// Asks nothing of the file system, which may hang: a region that is away is found out by its first call, and
    /// holds up no other.
    pub(crate) fn open(config: &RegionConfig, path: PathBuf) -> Self {
        Self {
            region: config.display_name().to_owned(),
            root: Arc::new(Root::new(path)),
            calls: Arc::new(Semaphore::new(MAX_CALLS)),
            timeout: config.operation_timeout,
        }
    }

    /// Runs blocking work with a bound on its time. Work that outlives it goes on unseen, as a request
    /// whose reply is lost would, and keeps its permit until the file system lets it go.
    async fn run<T: Send + 'static>(
        &self,
        operation: Operation,
        key: &str,
        work: impl FnOnce(&Root) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        let root = Arc::clone(&self.root);
        let calls = Arc::clone(&self.calls);
        let job = async move {
            let permit = calls.acquire_owned().await.map_err(io::Error::other)?;
            tokio::task::spawn_blocking(move || {
                let outcome = work(&root);
                drop(permit);
                outcome
            })
            .await
            .map_err(io::Error::other)
        };
        match tokio::time::timeout(self.timeout, job).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(failure))) => Err(failure.into_error(&self.region, operation, key)),
            Ok(Err(error)) => Err(StoreError::new(
                ErrorKind::Bug,
                &self.region,
                operation,
                key,
                format!("the worker thread ended early: {error}"),
            )),
            Err(_) => Err(StoreError::new(
                ErrorKind::Retry,
                &self.region,
                operation,
                key,
                format!(
                    "{} did not answer within {:?}",
                    self.root.path().display(),
                    self.timeout
                ),
            )
            .with_next_step("check the disk or the network mount behind the directory")),
        }
    }
}

#[async_trait]
impl Store for FileStore {
    fn region(&self) -> &str {
        &self.region
    }

    fn describe(&self) -> String {
        format!("file://{}", self.root.path().display())
    }

    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        check_key(&self.region, Operation::Put, key)?;
        let (region, name) = (self.region.clone(), key.to_owned());
        self.run(Operation::Put, key, move |root| {
            verify_upload(&region, &name, &object).map_err(Failure::Known)?;
            write::put(root, &name, &object.bytes, mode)
        })
        .await
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        check_key(&self.region, Operation::Get, key)?;
        let name = key.to_owned();
        self.run(Operation::Get, key, move |root| read(root, &name, 0..u64::MAX))
            .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        check_key(&self.region, Operation::GetRange, key)?;
        let name = key.to_owned();
        self.run(Operation::GetRange, key, move |root| read(root, &name, range))
            .await
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        check_key(&self.region, Operation::Head, key)?;
        let name = key.to_owned();
        self.run(Operation::Head, key, move |root| {
            let path = root.path().join(&name);
            let (_, size) = open(root, &path)?;
            Ok(Meta { key: name, size })
        })
        .await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        check_prefix(&self.region, Operation::List, prefix)?;
        let (wanted, after) = (prefix.to_owned(), start_after.map(str::to_owned));
        let patience = self.timeout / PAGE_SHARE;
        self.run(Operation::List, prefix, move |root| {
            listed(root, |path| {
                list::list(path, &wanted, after.as_deref(), max.max(1), patience)
            })
        })
        .await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key(&self.region, Operation::Delete, key)?;
        let name = key.to_owned();
        self.run(Operation::Delete, key, move |root| {
            let path = root.path().join(&name);
            match std::fs::remove_file(&path) {
                Ok(()) => {
                    let parent = path.parent().unwrap_or(root.path());
                    write::sync_dir(parent)
                }
                Err(error) if absent(&error) => root.look().map(|_| ()),
                // A directory is a common prefix of keys, not an object.
                Err(_) if path.is_dir() => Ok(()),
                Err(error) => Err(error).at(&path),
            }
        })
        .await
    }
}

/// A page of a listing. To a walk a volume that goes meanwhile looks like directories without anything in them, and its page
/// like the last one: that is believed only where the root is still the directory that it was.
fn listed(root: &Root, walk: impl FnOnce(&Path) -> Result<Page, Failure>) -> Result<Page, Failure> {
    if !root.look()? {
        return Ok(Page::default());
    }
    let page = walk(root.path())?;
    root.look()?;
    Ok(page)
}

/// Neither the name nor, perhaps, a directory above it exists.
fn absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Opens an object. "Absent" is believed only while the root is the directory that it was.
fn open(root: &Root, path: &Path) -> Result<(File, u64), Failure> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if absent(&error) => {
            root.look()?;
            return Err(Failure::NotFound);
        }
        Err(error) => return Err(error).at(path),
    };
    let meta = file.metadata().at(path)?;
    // A directory is a common prefix of keys, not an object.
    if meta.is_dir() {
        Err(Failure::NotFound)
    } else {
        Ok((file, meta.len()))
    }
}

fn read(root: &Root, key: &str, range: Range<u64>) -> Result<Bytes, Failure> {
    let path = root.path().join(key);
    let (mut file, size) = open(root, &path)?;
    let (start, end) = (range.start.min(size), range.end.min(size));
    let len = end.saturating_sub(start);
    if len > MAX_READ {
        return Err(Failure::TooLarge { path, len });
    }
    if start > 0 {
        file.seek(SeekFrom::Start(start)).at(&path)?;
    }
    let mut content = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    file.take(len).read_to_end(&mut content).at(&path)?;
    if content.len() as u64 != len {
        return Err(Failure::Short {
            path,
            expected: len,
            got: content.len() as u64,
        });
    }
    Ok(content.into())
}

#[cfg(test)]
mod tests;
