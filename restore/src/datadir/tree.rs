//! Directories, links and empty files of the restored cluster.
//!
//! Owns: their creation with mode and owner. Does not own: files with content (see [`crate::fetch`]), which use
//! [`Access`] for theirs.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown, fchown, symlink};
use std::path::{Path, PathBuf};

use super::error::DataDirError;
use super::owner::Owner;

/// Mode bits a file may keep: PostgreSQL wants its files closed to others and not writable by the group.
const FILE_BITS: u32 = 0o750;
/// The least a file needs.
const FILE_LEAST: u32 = 0o600;
/// The least a directory needs.
const DIRECTORY_LEAST: u32 = 0o700;

/// The mode a file gets for the mode it had.
#[must_use]
pub fn file_mode(mode: u32) -> u32 {
    (mode & FILE_BITS) | FILE_LEAST
}

/// The mode a directory gets for the mode it had.
#[must_use]
pub fn directory_mode(mode: u32) -> u32 {
    (mode & FILE_BITS) | DIRECTORY_LEAST
}

/// Gives files and directories their mode and owner, whatever the umask and the user.
#[derive(Debug, Clone)]
pub struct Access {
    owner: Owner,
}

impl Access {
    pub(crate) fn new(owner: Owner) -> Self {
        Self { owner }
    }

    /// As whom the server will run.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Sets mode and owner of an open file.
    ///
    /// # Errors
    /// As the operating system says.
    pub fn apply(&self, file: &File, mode: u32) -> io::Result<()> {
        file.set_permissions(Permissions::from_mode(file_mode(mode)))?;
        if self.owner.give {
            fchown(file, Some(self.owner.uid), Some(self.owner.gid))?;
        }
        Ok(())
    }

    /// Creates a file that must not exist yet, with mode and owner.
    ///
    /// # Errors
    /// As the operating system says.
    pub fn create(&self, path: &Path, mode: u32) -> io::Result<File> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(FILE_LEAST)
            .open(path)?;
        self.apply(&file, mode)?;
        Ok(file)
    }

    /// Writes a file whole under a temporary name, makes it durable and puts it in place.
    ///
    /// # Errors
    /// As the operating system says.
    pub fn replace(&self, path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".highwater");
        let temporary = path.with_file_name(name);
        let _ = fs::remove_file(&temporary);
        let mut file = self.create(&temporary, mode)?;
        io::Write::write_all(&mut file, content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    }

    /// Creates a directory (its parent exists), or takes one that is there, with mode and owner.
    ///
    /// # Errors
    /// As the operating system says; a link or file in its place is one.
    pub fn directory(&self, path: &Path, mode: u32) -> io::Result<()> {
        match fs::create_dir(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                if !fs::symlink_metadata(path)?.is_dir() {
                    return Err(error);
                }
            }
            other => other?,
        }
        fs::set_permissions(path, Permissions::from_mode(directory_mode(mode)))?;
        if self.owner.give {
            chown(path, Some(self.owner.uid), Some(self.owner.gid))?;
        }
        Ok(())
    }
}

/// The directories and links to make, parents first.
#[derive(Debug, Default)]
pub struct Tree {
    /// Path to mode, in an order in which parents come before what lies in them.
    directories: BTreeMap<PathBuf, u32>,
    links: Vec<(PathBuf, PathBuf)>,
    empty_files: Vec<(PathBuf, u32)>,
}

impl Tree {
    pub(crate) fn add_directory(&mut self, path: PathBuf, mode: u32) {
        self.directories.insert(path, mode);
    }

    /// Makes sure that the directories between `root` and `file` are there; the manifest may not name them all.
    pub(crate) fn add_parents(&mut self, root: &Path, file: &Path, mode: u32) {
        let parents = file
            .ancestors()
            .skip(1)
            .take_while(|path| path.starts_with(root) && *path != root);
        for parent in parents {
            if self.directories.contains_key(parent) {
                break;
            }
            self.directories.insert(parent.to_owned(), mode);
        }
    }

    pub(crate) fn add_link(&mut self, at: PathBuf, to: PathBuf) {
        self.links.push((at, to));
    }

    pub(crate) fn add_empty_file(&mut self, path: PathBuf, mode: u32) {
        self.empty_files.push((path, mode));
    }

    /// Creates everything.
    ///
    /// # Errors
    /// The first thing that cannot be created.
    pub fn create(&self, access: &Access) -> Result<(), DataDirError> {
        for (path, mode) in &self.directories {
            access
                .directory(path, *mode)
                .map_err(DataDirError::io("create the directory", path))?;
        }
        for (at, to) in &self.links {
            symlink(to, at).map_err(DataDirError::io("create the link", at))?;
            if access.owner.give {
                std::os::unix::fs::lchown(at, Some(access.owner.uid), Some(access.owner.gid))
                    .map_err(DataDirError::io("give away the link", at))?;
            }
        }
        for (path, mode) in &self.empty_files {
            access
                .create(path, *mode)
                .map_err(DataDirError::io("create", path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_62_modes_are_closed_to_others_and_usable_by_the_owner() {
        assert_eq!(
            [0o100600, 0o640, 0o777, 0].map(file_mode),
            [0o600, 0o640, 0o750, 0o600]
        );
        assert_eq!(
            [0o40700, 0o750, 0o777, 0].map(directory_mode),
            [0o700, 0o750, 0o750, 0o700]
        );
    }

    #[test]
    fn missing_parents_are_made_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let access = Access::new(Owner {
            uid: 0,
            gid: 0,
            name: String::new(),
            give: false,
        });
        let mut tree = Tree::default();
        tree.add_parents(dir.path(), &dir.path().join("a/b/c/file"), 0o700);
        tree.add_empty_file(dir.path().join("a/b/c/file"), 0o600);
        tree.create(&access).unwrap();
        assert!(dir.path().join("a/b/c/file").is_file());
    }
}
