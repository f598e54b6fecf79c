//! Listing a tree in the order of whole keys.
//!
//! Only directories that can hold a matching key are read. Within one, a directory sorts as its name plus
//! `/`, which makes a depth-first walk come out sorted by the bytes of the key.

use std::fs;
use std::path::Path;

use crate::key::{TMP_PART, is_key_part};
use crate::{Meta, Page};

use super::absent;
use super::faults::{At, Failure};

/// A directory that every ext file system has at its root and that only root may read.
const LOST_AND_FOUND: &str = "lost+found/";

pub(super) fn list(root: &Path, prefix: &str, after: Option<&str>, max: usize) -> Result<Page, Failure> {
    let (parts, _) = prefix
        .rsplit_once('/')
        .map_or(("", prefix), |(parts, rest)| (parts, rest));
    let mut walk = Walk {
        root,
        prefix,
        after: after.unwrap_or(""),
        max,
        page: Page::default(),
    };
    let base = if parts.is_empty() {
        String::new()
    } else {
        format!("{parts}/")
    };
    walk.dir(&base)?;
    Ok(walk.page)
}

struct Walk<'a> {
    root: &'a Path,
    prefix: &'a str,
    /// `""` is below every key.
    after: &'a str,
    max: usize,
    page: Page,
}

impl Walk<'_> {
    /// Walks the directory whose keys begin with `base` (empty, or ending in `/`).
    fn dir(&mut self, base: &str) -> Result<(), Failure> {
        for name in self.names(base)? {
            if self.page.more {
                return Ok(());
            }
            let key = format!("{base}{name}");
            if key.ends_with('/') {
                self.dir(&key)?;
            } else {
                self.file(key)?;
            }
        }
        Ok(())
    }

    /// Sorted names of one directory that can matter, directories with a slash at the end.
    fn names(&self, base: &str) -> Result<Vec<String>, Failure> {
        let path = self.root.join(base);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            // Nothing was ever written there, or the last object just went.
            Err(error) if absent(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error).at(&path),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.at(&path)?;
            // A name that can't be part of a key was put there by someone else.
            let Some(mut name) = entry
                .file_name()
                .to_str()
                .filter(|name| is_key_part(name))
                .map(str::to_owned)
            else {
                continue;
            };
            if base.is_empty() && name == TMP_PART {
                continue;
            }
            if is_dir(&entry) {
                name.push('/');
            }
            if !(base.is_empty() && name == LOST_AND_FOUND) && self.can_match(base, &name) {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn can_match(&self, base: &str, name: &str) -> bool {
        let key = format!("{base}{name}");
        let is_dir = key.ends_with('/');
        let matches = key.starts_with(self.prefix) || (is_dir && self.prefix.starts_with(&key));
        // A directory is passed over only when all of its keys are: they begin with its own.
        let is_later = key.as_str() > self.after || (is_dir && self.after.starts_with(&key));
        matches && is_later
    }

    fn file(&mut self, key: String) -> Result<(), Failure> {
        let path = self.root.join(&key);
        let size = match fs::metadata(&path) {
            Ok(meta) => meta.len(),
            // Deleted since the directory was read.
            Err(error) if absent(&error) => return Ok(()),
            Err(error) => return Err(error).at(&path),
        };
        if self.page.entries.len() == self.max {
            self.page.more = true;
        } else {
            self.page.entries.push(Meta { key, size });
        }
        Ok(())
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
