//! Whether a directory may be written into.
//!
//! Owns: the refusals that come before the first byte: not empty, a server runs on it, another restore writes to it.
//! A directory with this program's own unfinished work counts as empty (see [`super::marker`]).

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::error::DataDirError;
use super::marker::{self, Marker};

/// What was found where the restore will write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing, or an empty directory.
    Empty,
    /// The leftover of an interrupted restore, which may be cleared.
    Leftover(Marker),
}

/// Looks at `directory` and changes nothing.
///
/// # Errors
/// It may not be written into; the error says why and what to do.
pub fn look(directory: &Path) -> Result<Found, DataDirError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound && fs::symlink_metadata(directory).is_ok() => {
            return Err(DataDirError::Unusable {
                path: directory.to_owned(),
                problem: "it is a link that leads to nothing; make the directory that it names".to_owned(),
            });
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Empty),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            let problem = "it is not a directory; name an empty or a new one".to_owned();
            return Err(DataDirError::Unusable {
                path: directory.to_owned(),
                problem,
            });
        }
        Err(error) => return Err(DataDirError::io("look into", directory)(error)),
    };
    if let Some(pid) = running_server(directory) {
        return Err(DataDirError::InUse {
            path: directory.to_owned(),
            pid,
        });
    }
    let mut example = None;
    for entry in entries {
        let name = entry
            .map_err(DataDirError::io("look into", directory))?
            .file_name();
        if name == marker::NAME {
            return leftover(directory);
        }
        if name != marker::UNFINISHED {
            example.get_or_insert(name);
        }
    }
    match example {
        None => Ok(Found::Empty),
        Some(name) => Err(DataDirError::NotEmpty {
            path: directory.to_owned(),
            example: name.to_string_lossy().into_owned(),
        }),
    }
}

fn leftover(directory: &Path) -> Result<Found, DataDirError> {
    let marker = Marker::read(directory)?;
    if marker.was_started(directory)? {
        return Err(DataDirError::Started {
            path: directory.to_owned(),
            backup: marker.backup,
        });
    }
    Ok(Found::Leftover(marker))
}

/// The process id of a server that runs on `directory`.
#[must_use]
pub fn running_server(directory: &Path) -> Option<i32> {
    let pid = postmaster_pid(directory).ok().flatten()?;
    // EPERM also means that the process is there.
    (!matches!(kill(Pid::from_raw(pid), None), Err(nix::errno::Errno::ESRCH))).then_some(pid)
}

/// The first line of `postmaster.pid`. A single-user server writes its number negated.
pub(crate) fn postmaster_pid(directory: &Path) -> io::Result<Option<i32>> {
    match fs::read_to_string(directory.join("postmaster.pid")) {
        Ok(text) => Ok(text
            .lines()
            .next()
            .and_then(|line| line.trim().parse::<i32>().ok())
            .map(i32::abs)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_and_empty_directories_are_free() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path()).unwrap(), Found::Empty);
        assert_eq!(look(&dir.path().join("new")).unwrap(), Found::Empty);
    }

    #[test]
    fn a_mark_that_was_not_finished_does_not_bar_the_next_try() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(marker::UNFINISHED), "{").unwrap();
        assert_eq!(look(dir.path()).unwrap(), Found::Empty);
    }

    #[test]
    fn fault_59_anything_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("lost+found"), "").unwrap();
        assert!(matches!(look(dir.path()), Err(DataDirError::NotEmpty { .. })));
        assert!(matches!(
            look(&dir.path().join("lost+found")),
            Err(DataDirError::Unusable { .. })
        ));
    }

    #[test]
    fn a_running_server_is_named_and_a_dead_one_is_just_a_full_directory() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("postmaster.pid");
        fs::write(&pid, format!("{}\n/data\n", std::process::id())).unwrap();
        assert!(matches!(look(dir.path()), Err(DataDirError::InUse { .. })));
        fs::write(&pid, "4194000\n/data\n").unwrap();
        assert!(matches!(look(dir.path()), Err(DataDirError::NotEmpty { .. })));
    }
}
