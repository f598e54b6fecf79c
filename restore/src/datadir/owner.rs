//! Who owns the restored files.
//!
//! PostgreSQL refuses to run as root and refuses a data directory that its user does not own, so a restore by root
//! must know whose it is before it writes: `--owner`, or the owner of the target directory (or of the directory it
//! will be created in). Another user restores as itself.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{Gid, Uid, User};

use super::error::DataDirError;

/// Who owns the restored files, and as whom the server is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The user's number.
    pub uid: u32,
    /// The number of the user's group.
    pub gid: u32,
    /// The user's name, or its number where it has none.
    pub name: String,
    /// Files must be given to it; this program runs as root.
    pub give: bool,
}

impl Owner {
    /// Decides the owner for `target`, which may not exist yet.
    ///
    /// # Errors
    /// Root is left as the only candidate, or `wanted` cannot be had.
    pub fn decide(target: &Path, wanted: Option<&str>) -> Result<Self, DataDirError> {
        let me = Uid::effective();
        match (me.is_root(), wanted) {
            (false, None) => Ok(Self::of(me.as_raw(), Gid::effective().as_raw(), false)),
            (false, Some(name)) => {
                let user = look_up(name)?;
                if user.uid == me {
                    return Ok(Self::of(me.as_raw(), Gid::effective().as_raw(), false));
                }
                Err(DataDirError::Owner(format!(
                    "--owner {name}: only root can give files to another user; run this as root or as {name}"
                )))
            }
            (true, Some(name)) => {
                let user = look_up(name)?;
                refuse_root(user.uid.as_raw(), target)?;
                Ok(Self::of(user.uid.as_raw(), user.gid.as_raw(), true))
            }
            (true, None) => {
                let (uid, gid) = owner_of_nearest(target)?;
                refuse_root(uid, target)?;
                Ok(Self::of(uid, gid, true))
            }
        }
    }

    fn of(uid: u32, gid: u32, give: bool) -> Self {
        let name = User::from_uid(Uid::from_raw(uid))
            .ok()
            .flatten()
            .map_or_else(|| uid.to_string(), |user| user.name);
        Self { uid, gid, name, give }
    }
}

fn look_up(name: &str) -> Result<User, DataDirError> {
    let found = match name.parse::<u32>() {
        Ok(uid) => User::from_uid(Uid::from_raw(uid)),
        Err(_) => User::from_name(name),
    };
    found
        .ok()
        .flatten()
        .ok_or_else(|| DataDirError::Owner(format!("--owner {name}: this machine knows no such user")))
}

fn refuse_root(uid: u32, target: &Path) -> Result<(), DataDirError> {
    if uid != 0 {
        return Ok(());
    }
    Err(DataDirError::Owner(format!(
        "{} would belong to root, and PostgreSQL does not run as root: give --owner USER (usually postgres), or \
         create the directory first and give it to that user",
        target.display()
    )))
}

fn owner_of_nearest(target: &Path) -> Result<(u32, u32), DataDirError> {
    let nearest = target
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let meta = std::fs::metadata(nearest).map_err(DataDirError::io("look at", nearest))?;
    Ok((meta.uid(), meta.gid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_user_is_named() {
        let error = Owner::decide(Path::new("/nowhere"), Some("no-such-user-here")).unwrap_err();
        assert!(error.to_string().contains("no-such-user-here"), "{error}");
    }

    #[test]
    fn root_never_becomes_the_owner() {
        if !Uid::effective().is_root() {
            return;
        }
        let error = Owner::decide(Path::new("/not-there-yet"), None).unwrap_err();
        assert!(error.to_string().contains("--owner"), "{error}");
        assert!(Owner::decide(Path::new("/not-there-yet"), Some("root")).is_err());
        let given = Owner::decide(Path::new("/not-there-yet"), Some("nobody")).unwrap();
        assert!(given.give && given.name == "nobody");
    }
}
