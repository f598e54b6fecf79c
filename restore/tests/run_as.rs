//! The server that a restore by root starts has every group of its account, as if its user had started it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, also in the functions that its cases share"
)]

use std::ffi::CString;
use std::process::Command;

use nix::unistd::{Gid, Uid, User, getgrouplist};

/// A user of this machine with the groups that it has besides its own.
fn member_of_further_groups() -> Option<(User, Vec<Gid>)> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    let members = groups
        .lines()
        .filter_map(|line| line.rsplit(':').next())
        .flat_map(|names| names.split(','));
    let user = members
        .filter(|name| !name.is_empty())
        .filter_map(|name| User::from_name(name).ok().flatten())
        .find(|user| !user.uid.is_root())?;
    let name = CString::new(user.name.as_str()).ok()?;
    let groups = getgrouplist(&name, user.gid).ok()?;
    (groups.len() > 1).then_some((user, groups))
}

fn run_as(user: &User, program: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_highwater-restore"))
        .arg("run-as")
        .args([user.uid.to_string(), user.gid.to_string()])
        .args([&user.name, "--"])
        .args(program)
        .output()
        .unwrap()
}

fn numbers(text: &[u8]) -> Vec<u32> {
    let text = String::from_utf8_lossy(text);
    let mut numbers: Vec<u32> = text
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    numbers.sort_unstable();
    numbers
}

#[test]
fn the_account_has_all_its_groups() {
    if !Uid::effective().is_root() {
        return;
    }
    // Debian's PostgreSQL makes its user a member of `ssl-cert`.
    let Some((user, groups)) = member_of_further_groups() else {
        return;
    };
    let output = run_as(&user, &["id", "-G"]);
    let mut wanted: Vec<u32> = groups.into_iter().map(Gid::as_raw).collect();
    wanted.sort_unstable();
    wanted.dedup();
    assert_eq!(numbers(&output.stdout), wanted, "{output:?}");
    let output = run_as(&user, &["id", "-u"]);
    assert_eq!(numbers(&output.stdout), [user.uid.as_raw()]);
}

#[test]
fn a_program_that_is_not_there_is_named_as_trouble() {
    if !Uid::effective().is_root() {
        return;
    }
    let nobody = User::from_name("nobody").unwrap().unwrap();
    let output = run_as(&nobody, &["/not/there"]);
    assert_eq!(output.status.code(), Some(3));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("cannot start the server"), "{said}");
}
