//! Tests that cannot run on a machine say so, and do not look like tests that did.
//!
//! Owns: the two reasons, and that the test is named, on standard error and in the file `HIGHWATER_TEST_SKIPPED`, which
//! `scripts/test.sh` shows at its end. What a machine does not allow (a mount, a namespace) no installation
//! cures: it is said. What `scripts/setup.sh` installs is said too, and where `CI` is set, as continuous integration does
//! behind that script, its want is a failure.

use std::ffi::OsStr;
use std::io::Write as _;

use anyhow::{Result, bail};

/// The machine does not allow what the test needs; which test that was, and `why`, is said.
///
/// # Errors
/// None; so that a test can end with it.
pub fn not_allowed(why: &str) -> Result<()> {
    let line = format!("SKIPPED {}: {why}\n", test_name());
    drop(std::io::stderr().write_all(line.as_bytes()));
    // A runner keeps to itself what a test says that passes.
    let Some(file) = std::env::var_os("HIGHWATER_TEST_SKIPPED") else {
        return Ok(());
    };
    let shown = std::fs::OpenOptions::new().append(true).open(file);
    drop(shown.and_then(|mut file| file.write_all(line.as_bytes())));
    Ok(())
}

/// The thread of a test has its name; one that runs on the main thread is the one that was asked for.
fn test_name() -> String {
    let thread = std::thread::current();
    let named = thread.name().filter(|name| *name != "main").map(str::to_owned);
    let asked = || {
        std::env::args()
            .skip_while(|argument| argument != "--exact")
            .nth(1)
    };
    named.or_else(asked).unwrap_or_default()
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
