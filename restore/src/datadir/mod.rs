//! The data directory that a restore builds.
//!
//! Owns: the refusals before the first byte, where every file goes, directories, modes, owners, links, the mark of an
//! unfinished restore, and the order at the end. Does not own: the content of files (see [`crate::fetch`]) and
//! recovery settings (see [`crate::recovery`]).
//!
//! The invariant it keeps: **a directory that is not finished cannot be started.** `global/pg_control` is written under
//! another name and renamed when everything else is on disk; a server finds no cluster before that. Until then
//! the directory carries a mark by which the same command recognises it and starts over.
//!
//! Use: [`DataDir::prepare`] (looks, decides, refuses, writes nothing), [`DataDir::begin`], then the content,
//! then [`DataDir::finish`].

pub mod begin;
pub mod error;
pub mod finish;
pub mod marker;
pub mod occupied;
pub mod owner;
pub mod paths;
pub mod space;
pub mod tablespace;
pub mod tree;

use std::path::{Path, PathBuf};

use highwater_format::manifest::{Entry, EntryKind, Extent, Manifest};
use highwater_format::records::Backup;

pub use error::DataDirError;
pub use owner::Owner;
pub use tablespace::Remap;

use marker::Marker;
use paths::{Paths, Place};
use space::Space;
use tablespace::Tablespaces;
use tree::{Access, Tree};

/// Files without which a backup must not be restored: without the label a server starts from the wrong checkpoint
/// and is corrupt without a word.
const INDISPENSABLE: [&str; 3] = ["backup_label", paths::CONTROL, "PG_VERSION"];

/// What the operator asked for.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The data directory to build.
    pub into: &'a Path,
    /// The backup to build it from.
    pub backup: &'a Backup,
    /// Tablespaces that go elsewhere.
    pub tablespaces: &'a [Remap],
    /// `--owner`.
    pub owner: Option<&'a str>,
    /// Bytes of WAL that lie in the directory at once while it is replayed.
    pub wal_bytes: u64,
}

/// A file with content, and where its content lies in the packs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileToWrite {
    /// Its path in the manifest.
    pub name: String,
    /// Where it is written.
    pub path: PathBuf,
    /// Its mode on the source.
    pub mode: u32,
    /// Its length.
    pub size: u64,
    /// In order; together `size` bytes.
    pub extents: Vec<Extent>,
}

/// A data directory that has been looked at and decided on.
#[derive(Debug)]
pub struct DataDir {
    paths: Paths,
    access: Access,
    tree: Tree,
    files: Vec<FileToWrite>,
    marker: Marker,
    leftover: Option<Marker>,
    root_mode: u32,
    names: Names,
}

/// Which of the files that matter later are in the backup.
#[derive(Debug, Default)]
struct Names {
    configuration: Vec<&'static str>,
    pg_manifest: bool,
    tablespace_map: bool,
}

impl DataDir {
    /// Decides where everything goes. Looks and refuses; writes nothing.
    ///
    /// # Errors
    /// The directory or a tablespace may not be written, the owner is unknown, there is no room, or the manifest
    /// asks for something that is never done.
    pub fn prepare(request: &Request<'_>, manifest: Manifest) -> Result<Self, DataDirError> {
        let root = resolved(request.into)?;
        let system_id = request.backup.system_id.to_string();
        let leftover = begin::look(&root, &system_id)?;
        let owner = Owner::decide(&root, request.owner)?;
        let tablespaces = Tablespaces::place(&root, &request.backup.tablespaces, request.tablespaces)?;
        for placed in tablespaces.outside() {
            begin::look_outside(&placed.directory, &root, &system_id, leftover.as_ref())?;
        }
        let marker = Marker::new(
            request.backup.id.to_string(),
            system_id,
            root.clone(),
            tablespaces
                .outside()
                .map(|placed| placed.directory.clone())
                .collect(),
        );
        let mut this = Self {
            paths: Paths::new(root, tablespaces),
            access: Access::new(owner),
            tree: Tree::default(),
            files: Vec::with_capacity(manifest.entries.len()),
            marker,
            leftover,
            root_mode: root_mode(&manifest.entries),
            names: Names::default(),
        };
        this.refuse_incomplete(&manifest.entries)?;
        for placed in this.paths.tablespaces().outside() {
            let link = this.paths.root().join("pg_tblspc").join(placed.oid.to_string());
            this.tree.add_link(link, placed.named.clone());
        }
        for entry in manifest.entries {
            this.add(entry)?;
        }
        // Room is asked for only when there is no leftover: clearing it gives back what it took.
        if this.leftover.is_none() {
            this.space(request.wal_bytes)?.check()?;
        }
        Ok(this)
    }

    fn refuse_incomplete(&self, entries: &[Entry]) -> Result<(), DataDirError> {
        for name in INDISPENSABLE {
            if !entries
                .iter()
                .any(|entry| entry.path == name && entry.kind == EntryKind::File)
            {
                return Err(self.hostile(name, "it is missing, and a cluster without it is not restored"));
            }
        }
        Ok(())
    }

    fn hostile(&self, path: &str, problem: impl Into<String>) -> DataDirError {
        DataDirError::Hostile {
            backup: self.marker.backup.clone(),
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    fn add(&mut self, entry: Entry) -> Result<(), DataDirError> {
        let place = self
            .paths
            .place(&entry.path)
            .map_err(|problem| self.hostile(&entry.path, problem))?;
        self.names.note(&entry.path);
        match (place, entry.kind) {
            (Place::LeftOut, _) | (Place::Link(_), EntryKind::Symlink | EntryKind::Directory) => Ok(()),
            (Place::At(path), EntryKind::Directory) => {
                if path != self.paths.root() {
                    self.tree.add_directory(path, entry.mode);
                }
                Ok(())
            }
            (Place::At(path), EntryKind::File) => self.add_file(path, entry),
            (Place::At(_) | Place::Link(_), _) => {
                Err(self.hostile(&entry.path, "links and files are not restored there"))
            }
        }
    }

    fn add_file(&mut self, path: PathBuf, entry: Entry) -> Result<(), DataDirError> {
        let held = entry
            .extents
            .iter()
            .try_fold(0u64, |sum, extent| sum.checked_add(extent.len));
        if held != Some(entry.size) {
            let problem = format!(
                "it has {} bytes and its extents do not add up to that",
                entry.size
            );
            return Err(self.hostile(&entry.path, problem));
        }
        let root = self.root_of(&path).to_owned();
        self.tree.add_parents(&root, &path, self.root_mode);
        if entry.size == 0 {
            self.tree.add_empty_file(path, entry.mode);
            return Ok(());
        }
        let Entry {
            path: name,
            mode,
            size,
            extents,
            ..
        } = entry;
        self.files.push(FileToWrite {
            name,
            path,
            mode,
            size,
            extents,
        });
        Ok(())
    }

    /// The data directory or tablespace that `path` lies in.
    fn root_of(&self, path: &Path) -> &Path {
        let mut outside = self.paths.tablespaces().outside();
        outside
            .find(|placed| path.starts_with(&placed.directory))
            .map_or(self.paths.root(), |placed| &placed.directory)
    }

    fn space(&self, wal_bytes: u64) -> Result<Space, DataDirError> {
        let mut space = Space::default();
        for (root, bytes) in self.bytes_per_root() {
            space.add_files(root, bytes)?;
        }
        space.add_wal(self.paths.root(), wal_bytes)?;
        Ok(space)
    }

    fn bytes_per_root(&self) -> std::collections::BTreeMap<&Path, u64> {
        let mut bytes = std::collections::BTreeMap::new();
        for file in &self.files {
            *bytes.entry(self.root_of(&file.path)).or_default() += space::rounded(file.size);
        }
        bytes
    }

    /// The data directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.paths.root()
    }

    /// Modes and owner for files written later.
    #[must_use]
    pub fn access(&self) -> &Access {
        &self.access
    }

    /// The files whose content is to be written.
    #[must_use]
    pub fn files(&self) -> &[FileToWrite] {
        &self.files
    }

    /// The bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// Whether an interrupted restore is about to be started over.
    #[must_use]
    pub fn starts_over(&self) -> bool {
        self.leftover.is_some()
    }

    /// Whether the backup brings PostgreSQL's own manifest to check against.
    #[must_use]
    pub fn has_pg_manifest(&self) -> bool {
        self.names.pg_manifest
    }

    /// Configuration files that the backup does not have, because they lay outside the data directory.
    #[must_use]
    pub fn missing_configuration(&self) -> Vec<&'static str> {
        let had = &self.names.configuration;
        CONFIGURATION
            .into_iter()
            .filter(|name| !had.contains(name))
            .collect()
    }

    /// Where the control file waits until [`DataDir::finish`] puts it in place.
    #[must_use]
    pub fn pending_control(&self) -> PathBuf {
        self.paths.root().join(paths::CONTROL_PENDING)
    }

    /// The data directory and the tablespaces outside it.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        let outside = self.paths.tablespaces().outside();
        std::iter::once(self.paths.root()).chain(outside.map(|placed| placed.directory.as_path()))
    }
}

const CONFIGURATION: [&str; 3] = ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"];

impl Names {
    fn note(&mut self, path: &str) {
        self.configuration
            .extend(CONFIGURATION.iter().filter(|name| **name == path));
        self.pg_manifest |= path == crate::fetch::PG_MANIFEST;
        self.tablespace_map |= path == "tablespace_map";
    }
}

/// The absolute path. Links on the way to the target, and the target itself, are followed once, here; none inside it ever
/// is. What does not exist yet gets the same name that it has once it is there.
fn resolved(path: &Path) -> Result<PathBuf, DataDirError> {
    let absolute = std::path::absolute(path).map_err(DataDirError::io("find", path))?;
    for existing in absolute.ancestors() {
        if let (Ok(found), Ok(rest)) = (existing.canonicalize(), absolute.strip_prefix(existing)) {
            return Ok(found.components().chain(rest.components()).collect());
        }
    }
    Ok(absolute)
}

/// 0750 when the source's files could be read by the group, else 0700.
fn root_mode(entries: &[Entry]) -> u32 {
    let group = entries
        .iter()
        .any(|entry| entry.path == "PG_VERSION" && entry.mode & 0o040 != 0);
    if group { 0o750 } else { 0o700 }
}
