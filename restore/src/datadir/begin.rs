//! The first writes of a restore.
//!
//! Owns: taking every directory for this restore, and clearing what an interrupted one left. Each directory, the data
//! directory and every tablespace outside it, is made, locked, looked at again under its lock, and only then
//! cleared and marked; nothing is removed before all of them were taken. Does not own: what may be cleared at all (see
//! [`super::occupied`] and [`super::marker`]).

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::error::DataDirError;
use super::marker::{self, Lock, Marker};
use super::occupied::{self, Found};
use super::paths::CONTROL;
use super::{DataDir, Owner};

/// Parents that this program makes can be passed by the server's user, whatever the umask says.
const PARENT_MODE: u32 = 0o755;

/// Held for as long as a restore writes: one lock for each directory.
#[derive(Debug)]
pub struct Locks(#[expect(dead_code, reason = "held, never read: dropping it gives the locks up")] Vec<Lock>);

impl DataDir {
    /// The first write: directories, marks, links and empty files. An earlier, interrupted restore is cleared.
    ///
    /// # Errors
    /// The operating system refuses, or somebody else was faster.
    pub fn begin(&self) -> Result<Locks, DataDirError> {
        let root = self.paths.root();
        let system_id = &self.marker.system_id;
        let mut locks = vec![self.take(root)?];
        let leftover = look(root, system_id)?;
        let mut dirty = Vec::new();
        for directory in self.directories().skip(1) {
            locks.push(self.take(directory)?);
            if look_outside(directory, root, system_id, leftover.as_ref())?.is_some() {
                dirty.push(directory);
            }
        }
        // One that lost its mark in the end of a restore is known by the control file only, which goes now.
        for directory in &dirty {
            self.marker.write(directory)?;
        }
        // The data directory first: with its control file gone, no half-cleared restore can be started.
        if let Some(leftover) = leftover {
            marker::clear(root)?;
            self.clear_abandoned(&leftover)?;
        }
        dirty.into_iter().try_for_each(marker::clear)?;
        self.directories()
            .try_for_each(|directory| self.marker.write(directory))?;
        self.tree.create(&self.access)?;
        Ok(Locks(locks))
    }

    fn take(&self, directory: &Path) -> Result<Lock, DataDirError> {
        if let Some(parent) = directory.parent() {
            make_parents(parent, self.access.owner())?;
        }
        self.access
            .directory(directory, self.root_mode)
            .map_err(DataDirError::io("create the directory", directory))?;
        marker::lock(directory)
    }

    /// Tablespace directories of the interrupted restore that this one does not use. One that another restore has
    /// taken since, or works on right now, is left alone.
    fn clear_abandoned(&self, leftover: &Marker) -> Result<(), DataDirError> {
        let root = self.paths.root();
        for directory in &leftover.tablespaces {
            if self.directories().any(|ours| ours == directory) {
                continue;
            }
            let Ok(_lock) = marker::lock(directory) else {
                continue;
            };
            if let Ok(Found::Leftover(mark)) = occupied::look(directory)
                && mark.root.as_deref().is_none_or(|home| same(home, root))
            {
                marker::clear(directory)?;
                marker::remove(directory)?;
            }
        }
        Ok(())
    }
}

/// Looks at a directory; a leftover must be of the same system.
pub(super) fn look(directory: &Path, system_id: &str) -> Result<Option<Marker>, DataDirError> {
    let found = match occupied::look(directory)? {
        Found::Empty => return Ok(None),
        Found::Leftover(marker) => marker,
    };
    if found.system_id != system_id {
        return Err(DataDirError::OtherSystem {
            path: directory.to_owned(),
            found: found.system_id,
            wanted: system_id.to_owned(),
        });
    }
    Ok(Some(found))
}

/// Looks at a tablespace's directory; a leftover must not belong to another restore that still counts. `leftover` is what
/// `root` holds.
pub(super) fn look_outside(
    directory: &Path,
    root: &Path,
    system_id: &str,
    leftover: Option<&Marker>,
) -> Result<Option<Marker>, DataDirError> {
    let found = match look(directory, system_id) {
        Err(DataDirError::NotEmpty { .. })
            if leftover.is_some_and(|mark| lost_its_mark(directory, root, mark)) =>
        {
            return Ok(leftover.cloned());
        }
        other => other?,
    };
    let home = found.as_ref().and_then(|mark| mark.root.as_deref());
    let Some(home) = home.filter(|home| !same(home, root)) else {
        return Ok(found);
    };
    match in_use(home)? {
        None => Ok(found),
        Some(problem) => Err(DataDirError::OfAnother {
            path: directory.to_owned(),
            root: home.to_owned(),
            problem,
        }),
    }
}

/// Whether a tablespace without a mark belongs to the restore that `mark` in `root` tells of: [`DataDir::finish`] removes the
/// marks last and those of tablespaces first. It had put the control file in place by then, nobody has started a server on
/// it since (or `root` would have been refused), its link leads here, and here is nothing that it did not write.
fn lost_its_mark(directory: &Path, root: &Path, mark: &Marker) -> bool {
    let finished = mark.control_crc32.is_some() && root.join(CONTROL).exists();
    let listed = mark.tablespaces.iter().any(|listed| same(listed, directory));
    finished && listed && is_linked(directory, root) && holds_versions_only(directory)
}

fn is_linked(directory: &Path, root: &Path) -> bool {
    let Ok(links) = fs::read_dir(root.join("pg_tblspc")) else {
        return false;
    };
    links.flatten().any(|link| same(&link.path(), directory))
}

/// A server writes into a tablespace only in a directory of its version, as in `PG_15_202209061`.
fn holds_versions_only(directory: &Path) -> bool {
    let is_version = |entry: &fs::DirEntry| {
        entry.file_name().to_string_lossy().starts_with("PG_")
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
    };
    fs::read_dir(directory)
        .is_ok_and(|mut entries| entries.all(|entry| entry.is_ok_and(|entry| is_version(&entry))))
}

/// Whether two paths name one directory; links may have been made or followed in between.
fn same(one: &Path, other: &Path) -> bool {
    one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// Whether the restore in `home` runs, or came far enough to be started.
fn in_use(home: &Path) -> Result<Option<&'static str>, DataDirError> {
    if !home.is_dir() {
        return Ok(None);
    }
    if occupied::running_server(home).is_some() {
        return Ok(Some("a server runs on it"));
    }
    match marker::lock(home) {
        Err(DataDirError::Busy { .. }) => return Ok(Some("it is being written")),
        other => drop(other?),
    }
    Ok(home.join(CONTROL).exists().then_some("it can be started"))
}

fn make_parents(path: &Path, owner: &Owner) -> Result<(), DataDirError> {
    let missing: Vec<PathBuf> = path
        .ancestors()
        .take_while(|at| !at.exists())
        .map(Path::to_owned)
        .collect();
    missing
        .iter()
        .rev()
        .try_for_each(|at| make_parent(at, owner).map_err(DataDirError::io("create the directory", at)))
}

fn make_parent(path: &Path, owner: &Owner) -> std::io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Ok(()) if owner.give => fs::set_permissions(path, Permissions::from_mode(PARENT_MODE)),
        other => other,
    }
}
