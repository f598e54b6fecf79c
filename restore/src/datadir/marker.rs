//! The mark of a restore that is not finished: a file `highwater.restore` in every directory it writes to.
//!
//! Owns: how an interrupted restore is recognised, so that the same command can start over, and the lock that keeps
//! two of them apart. A directory is cleared only if it carries this file, no server runs on it and none has ever
//! been started on it: the control file is put in place last, and the mark says which bytes it had then.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::error::DataDirError;
use super::paths::CONTROL;

/// The file's name, in the data directory and in each tablespace.
pub const NAME: &str = "highwater.restore";

/// The name under which the mark is written before it is renamed; a crash in between leaves it.
pub(super) const UNFINISHED: &str = "highwater.restore.new";

/// What the mark says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// For the one who finds it.
    pub note: String,
    /// Which backup was being restored.
    pub backup: String,
    /// Of which system.
    pub system_id: String,
    /// The data directory that the restore builds; in a tablespace, the one that it belongs to. Absent in the
    /// first marks that were ever written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
    /// The tablespace directories that the restore wrote to, besides the data directory.
    pub tablespaces: Vec<PathBuf>,
    /// CRC-32 of the control file, once it is about to be put in place.
    pub control_crc32: Option<String>,
}

impl Marker {
    pub(crate) fn new(backup: String, system_id: String, root: PathBuf, tablespaces: Vec<PathBuf>) -> Self {
        let note = "An unfinished restore by highwater-restore. Run the same command again to start it over.";
        Self {
            note: note.to_owned(),
            backup,
            system_id,
            root: Some(root),
            tablespaces,
            control_crc32: None,
        }
    }

    pub(crate) fn read(directory: &Path) -> Result<Self, DataDirError> {
        let path = directory.join(NAME);
        let bytes = fs::read(&path).map_err(DataDirError::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|error| DataDirError::Unusable {
            path: directory.to_owned(),
            problem: format!(
                "its mark {NAME} cannot be read ({error}); if it is the leftover of an interrupted restore, remove the directory"
            ),
        })
    }

    /// Writes the mark whole or not at all, and makes it durable.
    pub(crate) fn write(&self, directory: &Path) -> Result<(), DataDirError> {
        let path = directory.join(NAME);
        let temporary = directory.join(UNFINISHED);
        let io = DataDirError::io("write", &temporary);
        let text = serde_json::to_vec_pretty(self).map_err(|error| DataDirError::Unusable {
            path: path.clone(),
            problem: format!("its name cannot be written down: {error}"),
        })?;
        write_durably(&temporary, &text).map_err(io)?;
        fs::rename(&temporary, &path).map_err(DataDirError::io("rename", &temporary))?;
        sync_directory(directory)
    }

    /// Whether the control file is in place and is no longer the one that was put there.
    pub(crate) fn was_started(&self, directory: &Path) -> Result<bool, DataDirError> {
        Ok(match control_crc(&directory.join(CONTROL))? {
            None => false,
            found => found != self.control_crc32,
        })
    }
}

/// CRC-32 of a control file; `None` when there is none.
pub(crate) fn control_crc(path: &Path) -> Result<Option<String>, DataDirError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(format!("{:08x}", crc32fast::hash(&bytes)))),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(DataDirError::io("read", path)(error)),
    }
}

/// Held for as long as a restore writes; gone with the process.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, never read: dropping it gives the lock up")] Flock<File>);

/// Takes the lock of `directory`, which must exist.
pub(crate) fn lock(directory: &Path) -> Result<Lock, DataDirError> {
    let file = File::open(directory).map_err(DataDirError::io("open", directory))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Lock(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(DataDirError::Busy {
            path: directory.to_owned(),
        }),
        Err((_, errno)) => Err(DataDirError::io("lock", directory)(errno.into())),
    }
}

/// Removes everything in `directory` except its mark. Links are removed, never followed. The control file goes first and
/// for good: what an interruption leaves of a finished restore cannot be started.
pub(crate) fn clear(directory: &Path) -> Result<(), DataDirError> {
    remove_control(directory)?;
    let entries = fs::read_dir(directory).map_err(DataDirError::io("look into", directory))?;
    for entry in entries {
        let entry = entry.map_err(DataDirError::io("look into", directory))?;
        if entry.file_name() == NAME {
            continue;
        }
        let path = entry.path();
        let kind = entry.file_type().map_err(DataDirError::io("look at", &path))?;
        let removed = if kind.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(DataDirError::io("remove", &path))?;
    }
    Ok(())
}

fn remove_control(directory: &Path) -> Result<(), DataDirError> {
    let path = directory.join(CONTROL);
    match fs::remove_file(&path) {
        Ok(()) => sync_directory(path.parent().unwrap_or(directory)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(()),
        Err(error) => Err(DataDirError::io("remove", &path)(error)),
    }
}

pub(crate) fn remove(directory: &Path) -> Result<(), DataDirError> {
    let path = directory.join(NAME);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(DataDirError::io("remove", &path)(error)),
        _ => sync_directory(directory),
    }
}

pub(crate) fn sync_directory(path: &Path) -> Result<(), DataDirError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(DataDirError::io("sync", path))
}

fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marker() -> Marker {
        Marker::new("b".to_owned(), "7".to_owned(), PathBuf::from("/data"), Vec::new())
    }

    #[test]
    fn it_survives_a_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        marker().write(dir.path()).unwrap();
        assert_eq!(Marker::read(dir.path()).unwrap(), marker());
    }

    #[test]
    fn a_control_file_that_changed_means_that_a_server_ran() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        let mut marker = marker();
        assert!(!marker.was_started(dir.path()).unwrap());
        fs::write(dir.path().join(CONTROL), b"as restored").unwrap();
        assert!(
            marker.was_started(dir.path()).unwrap(),
            "put there by someone else"
        );
        marker.control_crc32 = control_crc(&dir.path().join(CONTROL)).unwrap();
        assert!(!marker.was_started(dir.path()).unwrap());
        fs::write(dir.path().join(CONTROL), b"after a start").unwrap();
        assert!(marker.was_started(dir.path()).unwrap());
    }

    #[test]
    fn clearing_keeps_the_mark_and_does_not_follow_links() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("keep"), "").unwrap();
        marker().write(dir.path()).unwrap();
        fs::create_dir_all(dir.path().join("base/1")).unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("link")).unwrap();
        clear(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(outside.path().join("keep").exists());
    }

    #[test]
    fn the_control_file_is_the_first_to_go() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        fs::write(dir.path().join(CONTROL), "").unwrap();
        remove_control(dir.path()).unwrap();
        assert!(dir.path().join("global").exists() && !dir.path().join(CONTROL).exists());
        remove_control(dir.path()).unwrap();
    }

    #[test]
    fn two_restores_are_kept_apart() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        assert!(matches!(lock(dir.path()), Err(DataDirError::Busy { .. })));
        drop(held);
        lock(dir.path()).unwrap();
    }
}
