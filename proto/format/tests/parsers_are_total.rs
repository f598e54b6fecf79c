//! No parser panics, hangs or asks for the world, whatever bytes it is given: the fuzz targets' functions over random
//! bytes and over changed copies of good ones, in every test run and without a fuzzer.

#[path = "../fuzz/parsers.rs"]
mod parsers;

use std::path::Path;

use proptest::prelude::*;
use proptest::sample::Index;

type Parser = fn(&[u8]);

/// Each parser with the directory or file of good bytes that it is given changed.
const PARSERS: [(Parser, &str); 8] = [
    (parsers::container, "v1"),
    (parsers::documents, "v1"),
    (parsers::history, "v1/history"),
    (parsers::walscan, "wal/pg15"),
    (parsers::pg_manifest, "pg"),
    (parsers::backup_label, "pg/backup_label_15"),
    (parsers::keys, "v1/keys.txt"),
    (parsers::names, "v1/keys.txt"),
];

fn good_bytes(under: &str) -> std::io::Result<Vec<Vec<u8>>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(under);
    let mut files: Vec<_> = if path.is_dir() {
        std::fs::read_dir(&path)?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>()?
    } else {
        vec![path]
    };
    files.sort();
    files.iter().map(std::fs::read).collect()
}

/// What is done to good bytes.
#[derive(Debug, Clone)]
enum Change {
    Flip(Index, u8),
    Set(Index, Vec<u8>),
    Cut(Index),
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
}

fn any_change() -> impl Strategy<Value = Change> {
    let few = || prop::collection::vec(any::<u8>(), 1..12);
    prop_oneof![
        (any::<Index>(), 0..8_u8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        (
            any::<Index>(),
            prop_oneof![few(), Just(vec![0xFF; 8]), Just(vec![0; 8])]
        )
            .prop_map(|(at, bytes)| Change::Set(at, bytes)),
        any::<Index>().prop_map(Change::Cut),
        (any::<Index>(), 1..20_usize).prop_map(|(at, count)| Change::Remove(at, count)),
        (any::<Index>(), few()).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    if bytes.is_empty() {
        return;
    }
    let length = bytes.len();
    match change {
        Change::Flip(at, bit) => bytes[at.index(length)] ^= 1 << bit,
        Change::Set(at, new) => {
            let at = at.index(length);
            let count = new.len().min(length - at);
            bytes[at..at + count].copy_from_slice(&new[..count]);
        }
        Change::Cut(at) => bytes.truncate(at.index(length)),
        Change::Remove(at, count) => {
            let at = at.index(length);
            bytes.drain(at..length.min(at + count));
        }
        Change::Insert(at, new) => {
            let at = at.index(length);
            bytes.splice(at..at, new.iter().copied());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn of_random_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        text in "\\PC{0,60}",
        digits in "[0-9A-F/.:TZ+-]{0,40}",
    ) {
        for (parse, _) in PARSERS {
            parse(&bytes);
            parse(text.as_bytes());
            parse(digits.as_bytes());
        }
    }

    #[test]
    fn of_good_bytes_that_were_changed(
        which in any::<Index>(),
        file in any::<Index>(),
        line in any::<Option<Index>>(),
        changes in prop::collection::vec(any_change(), 0..4),
    ) {
        let (parse, under) = PARSERS[which.index(PARSERS.len())];
        let files = good_bytes(under).unwrap();
        let mut bytes = files[file.index(files.len())].clone();
        // Names and keys are one to a line.
        if let (true, Some(line)) = (under.ends_with(".txt"), line) {
            let lines: Vec<_> = bytes.split(|byte| *byte == b'\n').collect();
            bytes = lines[line.index(lines.len())].to_vec();
        }
        for change in &changes {
            apply(&mut bytes, change);
        }
        parse(&bytes);
    }
}

#[test]
fn the_good_bytes_are_there() {
    for (_, under) in PARSERS {
        let files = good_bytes(under).unwrap();
        assert!(
            !files.is_empty() && files.iter().all(|file| !file.is_empty()),
            "{under}"
        );
    }
}
