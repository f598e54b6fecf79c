//! Whether the server's account can use what `restore_command` names: this program, and files of the configuration.
//!
//! A restore by root is carried on by PostgreSQL under another account. What that one cannot read is found out here,
//! before anything is written, and not at the first segment.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use highwater_config::{Config, Exit};
use nix::unistd::{Gid, getgrouplist};

use crate::datadir::Owner;
use crate::error::RestoreError;
use crate::recovery::facts::Facts;

const READ: u32 = 0o4;
const EXECUTE: u32 = 0o1;

/// Checks that the owner can get to the directories that are restored into. Missing ones are made so that it can.
///
/// # Errors
/// The first directory that it cannot get to, with the cure.
pub fn check_way<'a>(owner: &Owner, directories: impl Iterator<Item = &'a Path>) -> Result<(), RestoreError> {
    if !owner.give {
        return Ok(());
    }
    let account = Account::of(owner);
    for directory in directories {
        let parents: Vec<&Path> = directory.ancestors().skip(1).collect();
        let closed = parents.into_iter().rev().find(|at| !account.may_one(at, EXECUTE));
        if let Some(closed) = closed {
            let cure = format!(
                "{} lies in it: open it with chmod o+x or give it to a group of that user, or name another directory",
                directory.display()
            );
            return Err(refuse(owner, closed, "pass through", &cure));
        }
    }
    Ok(())
}

/// Checks the program, the configuration file if it holds keys that are needed, certificate files and `file://` regions.
///
/// # Errors
/// The first thing that the owner cannot use, with the cure.
pub fn check(owner: &Owner, program: &Path, facts: &Facts, config: &Config) -> Result<(), RestoreError> {
    if !owner.give {
        return Ok(());
    }
    let account = Account::of(owner);
    if !account.may(program, EXECUTE) {
        return Err(refuse(
            owner,
            program,
            "run",
            "copy it to a directory such as /usr/local/bin",
        ));
    }
    let holds_keys = config
        .regions
        .iter()
        .any(|region| region.secret_access_key.is_some());
    if let Some(path) = facts
        .config
        .as_deref()
        .filter(|path| holds_keys && !account.may(path, READ))
    {
        let cure = "it holds access keys that restore_command needs: make it root's own with mode 0640 and a group that \
                    this user is in, and the agent's too where it reads the same file, or put the keys into this user's \
                    own AWS profile";
        return Err(refuse(owner, path, "read", cure));
    }
    for region in &facts.regions {
        // One object stands for all: an archive in a directory is written by one account.
        let object = region
            .url
            .strip_prefix("file://")
            .map(|at| Path::new(at).join(facts.layout().identity()));
        for path in region.ca_file.iter().chain(&object) {
            if !account.may(path, READ) {
                return Err(refuse(
                    owner,
                    path,
                    "read",
                    "give it and what lies beside it to a group of that user",
                ));
            }
        }
    }
    Ok(())
}

fn refuse(owner: &Owner, path: &Path, verb: &str, cure: &str) -> RestoreError {
    let name = &owner.name;
    let text = format!(
        "{name}, who will run the server, cannot {verb} {}: nothing was written; {cure}",
        path.display()
    );
    RestoreError::failed(Exit::Usage, text)
}

/// A user with its groups.
struct Account {
    uid: u32,
    groups: Vec<u32>,
}

impl Account {
    fn of(owner: &Owner) -> Self {
        let mut groups = vec![owner.gid];
        if let Ok(name) = std::ffi::CString::new(owner.name.as_str()) {
            let listed = getgrouplist(&name, Gid::from_raw(owner.gid)).unwrap_or_default();
            groups.extend(listed.into_iter().map(Gid::as_raw));
        }
        Self {
            uid: owner.uid,
            groups,
        }
    }

    /// By mode bits, along the whole path. A path that cannot be looked at is left to whoever uses it.
    fn may(&self, path: &Path, what: u32) -> bool {
        let parents = path
            .ancestors()
            .skip(1)
            .all(|parent| self.may_one(parent, EXECUTE));
        parents && self.may_one(path, what)
    }

    fn may_one(&self, path: &Path, what: u32) -> bool {
        let Ok(meta) = fs::metadata(path) else { return true };
        let shift = if meta.uid() == self.uid {
            6
        } else if self.groups.contains(&meta.gid()) {
            3
        } else {
            0
        };
        meta.mode() >> shift & what == what
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_closed_directory_on_the_way_is_named() {
        let dir = tempfile::Builder::new().tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let owner = |give| Owner {
            uid: 64_321,
            gid: 64_321,
            name: "stranger".to_owned(),
            give,
        };
        let into = dir.path().join("not/there/yet");
        let error = check_way(&owner(true), std::iter::once(into.as_path())).unwrap_err();
        let closed = dir.path().display().to_string();
        assert!(
            error.to_string().contains(&format!("pass through {closed}:")),
            "{error}"
        );
        check_way(&owner(false), std::iter::once(into.as_path())).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        check_way(&owner(true), std::iter::once(into.as_path())).unwrap();
    }

    #[test]
    fn mode_bits_are_read_along_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        let file = inner.join("file");
        fs::create_dir(&inner).unwrap();
        fs::write(&file, "").unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let stranger = Account {
            uid: 64_321,
            groups: vec![64_321],
        };
        set(dir.path(), 0o755);
        set(&inner, 0o755);
        set(&file, 0o644);
        assert!(stranger.may(&file, READ));
        set(&file, 0o640);
        assert!(!stranger.may(&file, READ));
        let member = Account {
            uid: 64_321,
            groups: vec![fs::metadata(&file).unwrap().gid()],
        };
        assert!(member.may(&file, READ));
        set(&inner, 0o700);
        assert!(!member.may(&file, READ), "the directory is closed");
    }
}
