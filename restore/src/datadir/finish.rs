//! The end of a restore: everything on disk first, the control file last.
//!
//! Owns: this order. Each step may be the last one before a power cut, and after none of them can a server start on
//! an unfinished directory:
//! 1. `tablespace_map` names the places that were chosen (the server makes its links from it);
//! 2. one `syncfs` per file system that was written to;
//! 3. the mark notes the control file's checksum, so that an untouched restore can be told from a started one;
//! 4. the control file gets its name; its directory is synced;
//! 5. the marks go.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::error::DataDirError;
use super::paths::{CONTROL, CONTROL_PENDING};
use super::{DataDir, marker};

impl DataDir {
    /// Makes the restore durable and startable.
    ///
    /// # Errors
    /// The operating system refuses. The directory stays marked as unfinished.
    pub fn finish(&self) -> Result<(), DataDirError> {
        self.write_tablespace_map()?;
        self.sync()?;
        let root = self.paths.root();
        let pending = root.join(CONTROL_PENDING);
        let mut mark = self.marker.clone();
        mark.control_crc32 = marker::control_crc(&pending)?;
        mark.write(root)?;
        fs::rename(&pending, root.join(CONTROL)).map_err(DataDirError::io("put in place", &pending))?;
        marker::sync_directory(&root.join("global"))?;
        for placed in self.paths.tablespaces().outside() {
            marker::remove(&placed.directory)?;
        }
        marker::remove(root)
    }

    fn write_tablespace_map(&self) -> Result<(), DataDirError> {
        let text = self.paths.tablespaces().map_text();
        let path = self.paths.root().join("tablespace_map");
        if text.is_empty() {
            // Nothing is linked. A map that names something anyway would make the server link to it.
            return match fs::remove_file(&path) {
                Err(error) if self.names.tablespace_map => Err(DataDirError::io("remove", &path)(error)),
                _ => Ok(()),
            };
        }
        let io = DataDirError::io("write", &path);
        self.access
            .replace(&path, tree_mode(&path), text.as_bytes())
            .map_err(io)
    }

    /// One `syncfs` for each file system: cheaper than a thousand `fsync`s, and it reports write errors too.
    fn sync(&self) -> Result<(), DataDirError> {
        let mut devices = BTreeMap::new();
        let outside = self
            .paths
            .tablespaces()
            .outside()
            .map(|placed| placed.directory.as_path());
        for path in std::iter::once(self.paths.root()).chain(outside) {
            let device = fs::metadata(path)
                .map_err(DataDirError::io("look at", path))?
                .dev();
            devices.entry(device).or_insert(path);
        }
        devices.into_values().try_for_each(sync_file_system)
    }
}

/// The mode of the file that is replaced.
fn tree_mode(path: &Path) -> u32 {
    fs::metadata(path).map_or(0o600, |meta| meta.mode())
}

fn sync_file_system(path: &Path) -> Result<(), DataDirError> {
    let directory = File::open(path).map_err(DataDirError::io("open", path))?;
    nix::unistd::syncfs(&directory)
        .map_err(|errno| DataDirError::io("sync the file system of", path)(errno.into()))
}
