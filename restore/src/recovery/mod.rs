//! Setting up recovery in a restored data directory, and clearing up after it.
//!
//! Owns: `recovery.signal`, this program's blocks in `postgresql.auto.conf`, the facts for `wal-fetch`, configuration
//! files where the backup has none. Does not own: which target is set (the plan says) and starting a server.
//!
//! All of it is written before the control file is put in place, so a directory that can be started is also one that
//! knows where to get its WAL.

pub mod facts;
pub mod inherited;
pub mod limits;
pub mod settings;

use std::fs;
use std::path::{Path, PathBuf};

use crate::datadir::tree::Access;
use crate::datadir::{DataDir, DataDirError};
use crate::target::Action;
use facts::Facts;

/// What recovery needs.
#[derive(Debug)]
pub struct Setup<'a> {
    /// This program; absolute.
    pub program: &'a Path,
    /// For `wal-fetch`.
    pub facts: &'a Facts,
    /// `recovery_target*`.
    pub target: &'a [(&'static str, String)],
    /// What happens at the target.
    pub action: Action,
    /// Limits that the server must not go below while it recovers; see [`limits`].
    pub limits: &'a [(&'static str, u32)],
    /// Write configuration files that the backup lacks, so that a server can be started.
    pub generate_configuration: bool,
}

/// Where the facts lie in the data directory `root`.
#[must_use]
pub fn facts_path(root: &Path) -> PathBuf {
    root.join(facts::NAME)
}

/// Writes everything.
///
/// # Errors
/// A file cannot be read or written.
pub fn write(into: &DataDir, setup: &Setup<'_>) -> Result<(), DataDirError> {
    let (root, access) = (into.root(), into.access());
    put(access, &facts_path(root), &setup.facts.to_json())?;
    if setup.generate_configuration {
        for name in into.missing_configuration() {
            put(access, &root.join(name), settings::generated(name).as_bytes())?;
        }
    }
    let path = auto_conf(root);
    let existing = read_if_there(&path)?;
    let text = settings::with_blocks(&existing, &settings::blocks(root, setup));
    put(access, &path, &text)?;
    put(access, &root.join("recovery.signal"), b"")
}

/// After a promotion: the recovery settings would be obeyed again if the server ever became a standby, and the
/// facts are of no more use. What protects a copy stays.
///
/// # Errors
/// A file cannot be read, written or removed.
pub fn clear(root: &Path, access: &Access) -> Result<(), DataDirError> {
    let path = auto_conf(root);
    let existing = read_if_there(&path)?;
    put(access, &path, &settings::without_recovery(&existing))?;
    let facts = facts_path(root);
    fs::remove_file(&facts).map_err(DataDirError::io("remove", &facts))?;
    // A prefetcher that is just leaving removes its spool itself.
    let _ = crate::walfeed::spool::Spool::of(root).remove();
    Ok(())
}

/// What the restored configuration sets `name` to, by its files in `root`.
///
/// # Errors
/// A file cannot be read.
pub fn configured(root: &Path, name: &str) -> Result<Option<String>, DataDirError> {
    for path in [auto_conf(root), root.join("postgresql.conf")] {
        // What is asked for here is ASCII, whatever else the file holds.
        let text = read_if_there(&path)?;
        if let Some(value) = inherited::value_of(&String::from_utf8_lossy(&text), name) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn auto_conf(root: &Path) -> PathBuf {
    root.join("postgresql.auto.conf")
}

fn put(access: &Access, path: &Path, content: &[u8]) -> Result<(), DataDirError> {
    access
        .replace(path, 0o600, content)
        .map_err(DataDirError::io("write", path))
}

fn read_if_there(path: &Path) -> Result<Vec<u8>, DataDirError> {
    match fs::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(DataDirError::io("read", path)(error)),
    }
}
