//! Starting a program under another account, with all groups of that account.
//!
//! The standard library can set a user and a group, and then drops every other group. A server that may read a region or a
//! key file by one of those would find out at the first segment. So this program is started in between: still root, it takes
//! the account on with its groups and then becomes the other program.

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::unistd::{Gid, Uid, User, initgroups, setgid, setuid};

use crate::cli::RunAsArgs;
use crate::datadir::Owner;

/// A command that runs `program` as `owner`, by way of `this` program; its arguments are still to be added.
pub(super) fn command(this: &Path, owner: &Owner, program: &Path) -> Command {
    let mut command = Command::new(this);
    command
        .arg("run-as")
        .args([owner.uid.to_string(), owner.gid.to_string()])
        .args([&owner.name, "--"])
        .arg(program)
        .env("USER", &owner.name)
        .env("LOGNAME", &owner.name);
    if let Ok(Some(user)) = User::from_uid(Uid::from_raw(owner.uid)) {
        command.env("HOME", user.dir);
    }
    command
}

/// Becomes the program; returns only what went wrong.
#[must_use]
pub fn become_program(args: &RunAsArgs) -> io::Error {
    if let Err(error) = take_on(args) {
        return error;
    }
    match args.program.split_first() {
        None => io::Error::other("no program is named"),
        Some((program, arguments)) => Command::new(program).args(arguments).exec(),
    }
}

/// The groups first: the user may no longer change them.
fn take_on(args: &RunAsArgs) -> io::Result<()> {
    let name = CString::new(args.name.as_str()).map_err(io::Error::other)?;
    let group = Gid::from_raw(args.gid);
    initgroups(&name, group)?;
    setgid(group)?;
    setuid(Uid::from_raw(args.uid))?;
    Ok(())
}
