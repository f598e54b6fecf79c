//! `tests/FAULTS.md` names what is shown by which test: neither may the table promise a test that is not there, nor
//! may a scenario be shown and not be in the table.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Every scenario of agent, storage, restore, operation and security, but for those of retention, which does not exist yet. Other
/// numbers that are missing were never given.
const NUMBERS: [&[u32]; 5] = [
    &[
        1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24, 25, 26, 27, 28, 29,
        30, 31, 33,
    ],
    &[34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49],
    &[
        50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 67, 68, 70, 71, 72, 73,
    ],
    &[78, 80, 81, 83, 84, 85, 86],
    &[87, 88, 89, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100],
];

/// The names of all tests in the sources below `dir`.
fn tests(dir: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            if !path.ends_with("target") {
                tests(&path, found)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path)?;
            found.extend(tests_in(&text));
        }
    }
    Ok(())
}

/// Functions behind an attribute that makes a test of them.
fn tests_in(text: &str) -> Vec<String> {
    let (mut names, mut is_test) = (Vec::new(), false);
    for line in text.lines().map(str::trim_start) {
        is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        let rest = line.trim_start_matches("async ");
        let Some(rest) = rest.strip_prefix("fn ") else {
            continue;
        };
        if std::mem::take(&mut is_test) {
            names.extend(rest.split(['(', '<']).next().map(str::to_owned));
        }
    }
    names
}

#[test]
fn the_table_of_faults_is_complete() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no workspace")?;
    let mut there = BTreeSet::new();
    for member in ["agent", "restore", "proto", "tests"] {
        tests(&root.join(member), &mut there)?;
    }
    let table = std::fs::read_to_string(root.join("tests/FAULTS.md"))?;
    let quoted: BTreeSet<&str> = table.split('`').skip(1).step_by(2).collect();
    let is_test = |name: &&str| {
        let plain = name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        plain && name.matches('_').count() >= 3 && !name.starts_with("max_slot_wal")
    };
    let named: BTreeSet<&str> = quoted.into_iter().filter(is_test).collect();
    let absent: Vec<_> = named.iter().filter(|name| !there.contains(**name)).collect();
    ensure!(
        absent.is_empty(),
        "the table names tests that are not there: {absent:#?}"
    );
    let shown = there.iter().filter(|name| name.starts_with("fault_"));
    let missing: Vec<_> = shown.filter(|name| !named.contains(name.as_str())).collect();
    ensure!(
        missing.is_empty(),
        "tests of faults that the table does not name: {missing:#?}"
    );
    let rows: BTreeSet<u32> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(' ').next()?.parse().ok())
        .collect();
    let unnamed: Vec<_> = NUMBERS
        .iter()
        .copied()
        .flatten()
        .filter(|number| !rows.contains(number))
        .collect();
    ensure!(unnamed.is_empty(), "scenarios without a row: {unnamed:?}");
    Ok(())
}
