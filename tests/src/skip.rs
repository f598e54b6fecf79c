//! Tests that cannot run on a machine say so, and do not look like tests that did.
//!
//! Owns: the two reasons. What a machine does not allow (a mount, a namespace) no installation cures: it is said. What
//! `scripts/setup.sh` installs is said too, and where `CI` is set, as continuous integration does behind that script, its want
//! is a failure.

use std::ffi::OsStr;

use anyhow::{Result, bail};

/// The machine does not allow what the test needs; `why` is said.
///
/// # Errors
/// None; so that a test can end with it.
#[expect(
    clippy::print_stderr,
    reason = "a test that could not run must not look like one that did"
)]
pub fn not_allowed(why: &str) -> Result<()> {
    eprintln!("SKIPPED: {why}");
    Ok(())
}

/// Something is not installed that the test, or a part of it, cannot do without.
///
/// # Errors
/// Where `CI` is set.
pub fn not_installed(what: &str) -> Result<()> {
    missing(what, std::env::var_os("CI").as_deref())
}

fn missing(what: &str, ci: Option<&OsStr>) -> Result<()> {
    if ci.is_some_and(|value| !value.is_empty() && value != "false") {
        bail!("{what} is not installed on this machine: scripts/setup.sh has to see to it");
    }
    not_allowed(&format!("{what} is not installed: run scripts/setup.sh"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_a_failure_in_continuous_integration_alone() {
        for (ci, fails) in [
            (None, false),
            (Some(""), false),
            (Some("false"), false),
            (Some("true"), true),
            (Some("1"), true),
        ] {
            let said = missing("PostgreSQL 14", ci.map(OsStr::new));
            assert_eq!(said.is_err(), fails, "{ci:?}");
        }
    }
}
