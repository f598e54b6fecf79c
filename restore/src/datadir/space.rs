//! Whether there is room, asked before the first byte.
//!
//! Owns: how much each file system must hold. Sizes are rounded up to whole blocks of 4 KiB, and the file system of
//! the data directory also needs room for WAL while it is replayed.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use super::error::DataDirError;

/// The block that file systems commonly allocate by.
const BLOCK: u64 = 4096;

/// Collects what is needed per file system.
#[derive(Debug, Default)]
pub struct Space {
    by_device: BTreeMap<u64, Need>,
}

#[derive(Debug)]
struct Need {
    at: PathBuf,
    files: u64,
    wal: u64,
}

impl Space {
    /// Counts a file of `size` bytes below `directory`.
    ///
    /// # Errors
    /// The directory's file system cannot be found.
    pub fn add_files(&mut self, directory: &Path, bytes: u64) -> Result<(), DataDirError> {
        self.need(directory)?.files += bytes;
        Ok(())
    }

    /// Counts WAL that lies in the data directory while it is replayed.
    ///
    /// # Errors
    /// The directory's file system cannot be found.
    pub fn add_wal(&mut self, directory: &Path, bytes: u64) -> Result<(), DataDirError> {
        self.need(directory)?.wal += bytes;
        Ok(())
    }

    fn need(&mut self, directory: &Path) -> Result<&mut Need, DataDirError> {
        let existing = directory
            .ancestors()
            .find(|path| path.exists())
            .unwrap_or(Path::new("/"));
        let device = std::fs::metadata(existing)
            .map_err(DataDirError::io("look at", existing))?
            .dev();
        Ok(self.by_device.entry(device).or_insert_with(|| Need {
            at: existing.to_owned(),
            files: 0,
            wal: 0,
        }))
    }

    /// Compares with what is free. `reusable` bytes are about to be freed by clearing a leftover.
    ///
    /// # Errors
    /// The first file system that is too small.
    pub fn check(&self) -> Result<(), DataDirError> {
        for need in self.by_device.values() {
            let free = free(&need.at)?;
            let needed = need.files.saturating_add(need.wal);
            if free < needed {
                return Err(DataDirError::NoRoom {
                    path: need.at.clone(),
                    needed,
                    files: need.files,
                    free,
                });
            }
        }
        Ok(())
    }
}

/// The room that a file of `size` bytes takes.
#[must_use]
pub fn rounded(size: u64) -> u64 {
    size.div_ceil(BLOCK).saturating_mul(BLOCK)
}

fn free(path: &Path) -> Result<u64, DataDirError> {
    let stats =
        statvfs(path).map_err(|errno| DataDirError::io("ask for free space on", path)(errno.into()))?;
    Ok(stats.blocks_available().saturating_mul(stats.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_71_too_little_room_is_told_with_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let mut space = Space::default();
        space.add_files(&dir.path().join("not/there/yet"), 10).unwrap();
        space.check().unwrap();
        space.add_wal(dir.path(), 1 << 60).unwrap();
        let error = space.check().unwrap_err();
        assert!(matches!(error, DataDirError::NoRoom { files: 10, .. }), "{error}");
    }

    #[test]
    fn sizes_are_rounded_to_blocks() {
        assert_eq!([0, 1, 4096, 4097].map(rounded), [0, 4096, 4096, 8192]);
    }
}
