//! Listing a tree in the order of whole keys.
//!
//! Only directories that can hold a matching key are read. Within one, a directory sorts as its name plus
//! `/`, which makes a depth-first walk come out sorted by the bytes of the key.
//!
//! A file system gives names in no order, so that each page reads a whole directory: that is why pages may be long.
//! Of those names only as many are held as the page can take, the smallest, however many millions there are.

use std::collections::BinaryHeap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::key::{TMP_PART, is_key_part};
use crate::{Meta, Page};

use super::absent;
use super::faults::{At, Failure};

/// A directory that every ext file system has at its root and that only root may read.
const LOST_AND_FOUND: &str = "lost+found/";

/// Names of a directory that are held at least, because of directories without an object many fit on a page; and the
/// entries of a page that are waited for.
const NAMES: usize = 1000;

/// One page. A long one ends early where it takes longer than `patience`: on a slow mount it would else never come.
pub(super) fn list(
    root: &Path,
    prefix: &str,
    after: Option<&str>,
    max: usize,
    patience: Duration,
) -> Result<Page, Failure> {
    let mut walk = Walk::new(root, prefix, after, max, patience);
    walk.run()?;
    Ok(walk.page)
}

struct Walk<'a> {
    root: &'a Path,
    prefix: &'a str,
    /// `""` is below every key.
    after: &'a str,
    max: usize,
    began: Instant,
    patience: Duration,
    /// How often a directory was read.
    readings: usize,
    page: Page,
}

impl<'a> Walk<'a> {
    fn new(root: &'a Path, prefix: &'a str, after: Option<&'a str>, max: usize, patience: Duration) -> Self {
        Self {
            root,
            prefix,
            after: after.unwrap_or(""),
            max,
            began: Instant::now(),
            patience,
            readings: 0,
            page: Page::default(),
        }
    }

    fn run(&mut self) -> Result<(), Failure> {
        let directory = self.prefix.rfind('/').map_or(0, |slash| slash + 1);
        self.dir(self.prefix.get(..directory).unwrap_or_default())
    }

    /// Walks the directory whose keys begin with `base` (empty, or ending in `/`).
    fn dir(&mut self, base: &str) -> Result<(), Failure> {
        let mut past = String::new();
        loop {
            let (names, cut) = self.names(base, &past)?;
            for name in &names {
                let key = format!("{base}{name}");
                if key.ends_with('/') {
                    self.dir(&key)?;
                } else {
                    self.file(key)?;
                }
                if self.page.more {
                    return Ok(());
                }
            }
            // Objects that went meanwhile and directories without any leave room for names that were not held.
            match names.into_iter().next_back().filter(|_| cut) {
                Some(last) => past = last,
                None => return Ok(()),
            }
        }
    }

    /// The smallest names of one directory behind `past` that can matter, sorted, directories with a slash at the
    /// end; and whether there are more.
    fn names(&mut self, base: &str, past: &str) -> Result<(Vec<String>, bool), Failure> {
        self.readings += 1;
        let path = self.root.join(base);
        // One more than fits says that there is more.
        let room = self.max.saturating_sub(self.page.entries.len()).saturating_add(1);
        let mut smallest = Smallest::new(room.max(NAMES));
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            // Nothing was ever written there, or the last object just went.
            Err(error) if absent(&error) => return Ok(smallest.sorted()),
            Err(error) => return Err(error).at(&path),
        };
        let wanted = Wanted::in_directory(base, self.prefix, self.after);
        for entry in entries {
            let entry = entry.at(&path)?;
            // A name that can't be part of a key was put there by someone else.
            let Some(mut name) = entry
                .file_name()
                .into_string()
                .ok()
                .filter(|name| is_key_part(name))
            else {
                continue;
            };
            if base.is_empty() && name == TMP_PART {
                continue;
            }
            if is_dir(&entry) {
                name.push('/');
            }
            let foreign = base.is_empty() && name == LOST_AND_FOUND;
            if !foreign && name.as_str() > past && wanted.can_match(&name) {
                smallest.offer(name);
            }
        }
        Ok(smallest.sorted())
    }

    fn file(&mut self, key: String) -> Result<(), Failure> {
        let path = self.root.join(&key);
        let size = match fs::metadata(&path) {
            Ok(meta) => meta.len(),
            // Deleted since the directory was read.
            Err(error) if absent(&error) => return Ok(()),
            Err(error) => return Err(error).at(&path),
        };
        let late = self.page.entries.len() >= NAMES && self.began.elapsed() > self.patience;
        if late || self.page.entries.len() == self.max {
            self.page.more = true;
        } else {
            self.page.entries.push(Meta { key, size });
        }
        Ok(())
    }
}

/// What of the prefix and the place to start after is left within one directory.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    prefix: &'a str,
    /// None: every key here comes before it.
    after: Option<&'a str>,
}

impl<'a> Wanted<'a> {
    fn in_directory(base: &str, prefix: &'a str, after: &'a str) -> Self {
        let behind = (base > after).then_some("");
        Self {
            // Only directories that can hold a matching key are walked: one or the other begins with the other.
            prefix: prefix.strip_prefix(base).unwrap_or_default(),
            after: after.strip_prefix(base).or(behind),
        }
    }

    /// A directory is passed over only when all of its keys are: they begin with its own.
    fn can_match(&self, name: &str) -> bool {
        let is_dir = name.ends_with('/');
        let matches = name.starts_with(self.prefix) || (is_dir && self.prefix.starts_with(name));
        let is_later = |after: &str| name > after || (is_dir && after.starts_with(name));
        matches && self.after.is_some_and(is_later)
    }
}

/// The smallest of all names that are offered.
struct Smallest {
    held: BinaryHeap<String>,
    room: usize,
    /// There were more than are held.
    cut: bool,
}

impl Smallest {
    fn new(room: usize) -> Self {
        Self {
            held: BinaryHeap::new(),
            room,
            cut: false,
        }
    }

    fn offer(&mut self, name: String) {
        if self.held.len() < self.room {
            self.held.push(name);
            return;
        }
        self.cut = true;
        if let Some(mut largest) = self.held.peek_mut()
            && name < *largest
        {
            *largest = name;
        }
    }

    fn sorted(self) -> (Vec<String>, bool) {
        (self.held.into_sorted_vec(), self.cut)
    }
}

fn is_dir(entry: &fs::DirEntry) -> bool {
    match entry.file_type() {
        // An operator may have moved a part of the tree and left a link.
        Ok(kind) if kind.is_symlink() => fs::metadata(entry.path()).is_ok_and(|meta| meta.is_dir()),
        Ok(kind) => kind.is_dir(),
        Err(_) => false,
    }
}

#[cfg(test)]
#[path = "list_tests.rs"]
mod tests;
