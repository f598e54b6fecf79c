//! What a base backup consists of: which file is where in which pack.
//!
//! Owns: the document and the rules that make it safe to restore from: no path leaves the data directory, no
//! entry is reached through a link except tablespaces, every extent lies within its pack. Does not own:
//! writing files. A [`Manifest`] that came from [`crate::decode`] has passed [`Manifest::validate`].

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::backup_id::BackupId;
use crate::document::{Document, parse_crc32};

/// The manifest of one base backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The backup.
    pub backup: BackupId,
    /// Its packs, by rising number.
    pub packs: Vec<PackInfo>,
    /// Its files, directories and links.
    pub entries: Vec<Entry>,
}

/// One pack of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackInfo {
    /// Its number within the backup.
    pub number: u32,
    /// Bytes after decoding.
    pub plain_len: u64,
    /// Bytes as stored.
    pub stored_len: u64,
    /// CRC-32 of the stored bytes, 8 lower-case hexadecimal digits.
    pub crc32: String,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link: a tablespace, or a directory that the operator moved.
    Symlink,
}

/// One file, directory or link of the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the data directory; files of a tablespace are under `pg_tblspc/<oid>/`.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970-01-01 UTC.
    pub mtime: i64,
    /// Bytes of a file; 0 for everything else.
    pub size: u64,
    /// Where a link pointed to on the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// The file's bytes, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extents: Vec<Extent>,
}

/// A run of plain bytes of one pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// The pack.
    pub pack: u32,
    /// Where the run begins in the pack's plain bytes.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// A manifest that must not be restored from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{at} of the manifest is not acceptable: {problem}")]
pub struct ManifestError {
    /// Which entry or pack.
    pub at: String,
    /// What is wrong with it.
    pub problem: String,
}

impl ManifestError {
    fn new(at: impl Into<String>, problem: impl Into<String>) -> ManifestError {
        ManifestError {
            at: at.into(),
            problem: problem.into(),
        }
    }
}

impl Document for Manifest {
    const KIND: &'static str = "manifest";

    fn validate(&self) -> Result<(), String> {
        Manifest::validate(self).map_err(|error| error.to_string())
    }
}

impl Manifest {
    /// Checks every rule of the format.
    pub fn validate(&self) -> Result<(), ManifestError> {
        let packs = self.check_packs()?;
        let mut kinds = HashMap::with_capacity(self.entries.len());
        for entry in &self.entries {
            let failed = |problem| ManifestError::new(format!("entry {:?}", entry.path), problem);
            check_path(&entry.path).map_err(|problem| failed(problem.to_owned()))?;
            check_entry(entry, &packs).map_err(failed)?;
            if kinds.insert(entry.path.as_str(), entry.kind).is_some() {
                return Err(failed("the path appears twice".to_owned()));
            }
        }
        self.check_parents(&kinds)
    }

    fn check_packs(&self) -> Result<HashMap<u32, u64>, ManifestError> {
        let mut packs = HashMap::with_capacity(self.packs.len());
        let mut previous = None;
        for pack in &self.packs {
            let failed = |problem: &str| ManifestError::new(format!("pack {}", pack.number), problem);
            if previous.is_some_and(|number| number >= pack.number) {
                return Err(failed("pack numbers must rise"));
            }
            if parse_crc32(&pack.crc32).is_none() || pack.plain_len == 0 {
                return Err(failed("it needs a length and a checksum of 8 hexadecimal digits"));
            }
            previous = Some(pack.number);
            packs.insert(pack.number, pack.plain_len);
        }
        Ok(packs)
    }

    /// Nothing may lie under a file, nor under a link that is not a tablespace's: whoever follows such a path
    /// would write outside the data directory.
    fn check_parents(&self, kinds: &HashMap<&str, EntryKind>) -> Result<(), ManifestError> {
        for entry in &self.entries {
            for (at, _) in entry.path.match_indices('/') {
                let parent = entry.path.get(..at).unwrap_or("");
                let good = match kinds.get(parent) {
                    None | Some(EntryKind::Directory) => true,
                    Some(EntryKind::Symlink) => is_tablespace_link(parent),
                    Some(EntryKind::File) => false,
                };
                if !good {
                    let problem = format!("it lies under {parent:?}, which is no directory");
                    return Err(ManifestError::new(format!("entry {:?}", entry.path), problem));
                }
            }
        }
        Ok(())
    }
}

/// True for `pg_tblspc/<oid>`, the only links that files may be stored under.
pub fn is_tablespace_link(path: &str) -> bool {
    path.strip_prefix("pg_tblspc/")
        .is_some_and(|oid| oid.bytes().all(|b| b.is_ascii_digit()) && oid.parse::<u32>().is_ok())
}

/// Refuses every path that is not plainly inside the data directory.
pub fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() || path.starts_with('/') {
        return Err("a path is relative to the data directory and not empty");
    }
    if path.contains('\0') {
        return Err("a path has no NUL");
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("a path has no empty part, no \".\" and no \"..\"");
    }
    Ok(())
}

fn check_entry(entry: &Entry, packs: &HashMap<u32, u64>) -> Result<(), String> {
    if entry.mode > 0o7777 {
        return Err(format!("mode {:o} has more than permission bits", entry.mode));
    }
    let bare = entry.size == 0 && entry.extents.is_empty();
    match (entry.kind, &entry.link) {
        (EntryKind::File, None) => check_extents(entry, packs),
        (EntryKind::Directory, None) if bare => Ok(()),
        (EntryKind::Symlink, Some(link)) if bare && !link.is_empty() && !link.contains('\0') => Ok(()),
        _ => Err("only files have size and extents, and links alone must say where they point".to_owned()),
    }
}

fn check_extents(entry: &Entry, packs: &HashMap<u32, u64>) -> Result<(), String> {
    let mut total = 0_u64;
    for Extent { pack, offset, len } in entry.extents.iter().copied() {
        let Some(plain_len) = packs.get(&pack) else {
            return Err(format!("there is no pack {pack}"));
        };
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > *plain_len) {
            return Err(format!(
                "{len} bytes at {offset} do not lie in pack {pack} of {plain_len} bytes"
            ));
        }
        total = total.saturating_add(len);
    }
    if total == entry.size {
        Ok(())
    } else {
        Err(format!(
            "its extents hold {total} bytes, its size is {}",
            entry.size
        ))
    }
}
