//! Bytes of every released version, read for ever and written the same for as long as the version is current.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use highwater_format::*;

use crate::samples::{self, Sample};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/v1")
}

fn read(name: &str) -> Bytes {
    fs::read(directory().join(name))
        .unwrap_or_else(|error| panic!("{name}: {error}"))
        .into()
}

fn object_file(sample: &Sample) -> String {
    format!("{}.object", sample.name)
}

fn key_list() -> String {
    samples::keys()
        .iter()
        .map(|(kind, key)| format!("{kind} {key}\n"))
        .collect()
}

/// Everything that must be there: name and bytes as this release writes them.
fn expected() -> Vec<(String, Bytes)> {
    let objects = samples::objects()
        .into_iter()
        .map(|sample| (object_file(&sample), sample.bytes()));
    let documents = samples::documents()
        .into_iter()
        .map(|(name, bytes)| (name.to_owned(), bytes.into()));
    let others = [
        ("history".to_owned(), Bytes::from_static(samples::HISTORY)),
        ("keys.txt".to_owned(), key_list().into()),
    ];
    objects.chain(documents).chain(others).collect()
}

#[test]
fn every_golden_object_decodes_to_what_was_sealed() {
    for sample in samples::objects() {
        let object = Object::open(read(&object_file(&sample))).unwrap();
        let mut header = sample.header.clone();
        header.plain_len = sample.plain().len() as u64;
        assert_eq!(object.header(), &header, "{}", sample.name);
        assert_eq!(object.plain().unwrap(), sample.plain(), "{}", sample.name);
        assert_eq!(object.frames().len(), sample.frames.len(), "{}", sample.name);
    }
}

/// A compressor may choose other bytes in its next release; what is not compressed may not.
#[test]
fn what_is_not_compressed_is_written_byte_for_byte_as_before() {
    for sample in samples::objects() {
        let (now, golden) = (sample.bytes(), read(&object_file(&sample)));
        assert_eq!(
            now[..Header::LEN],
            golden[..Header::LEN],
            "header of {}",
            sample.name
        );
        if sample.header.codec == Codec::None {
            assert_eq!(now, golden, "{}", sample.name);
        }
    }
}

#[test]
fn documents_and_keys_are_written_byte_for_byte_as_before() {
    for (name, now) in samples::documents() {
        assert_eq!(
            String::from_utf8(now).unwrap(),
            String::from_utf8(read(name).to_vec()).unwrap(),
            "{name}"
        );
    }
    assert_eq!(key_list().as_bytes(), read("keys.txt"));
}

#[test]
fn every_golden_document_decodes_to_what_was_encoded() {
    assert_eq!(
        decode::<Identity>(&read("identity.json")).unwrap(),
        samples::identity()
    );
    assert_eq!(decode::<Gap>(&read("gap.json")).unwrap(), samples::gap());
    assert_eq!(decode::<Writer>(&read("writer.json")).unwrap(), samples::writer());
    assert_eq!(decode::<Pulse>(&read("pulse.json")).unwrap(), samples::pulse());
    assert_eq!(decode::<Backup>(&read("backup.json")).unwrap(), samples::backup());
    assert_eq!(
        decode::<Manifest>(&read("manifest.json")).unwrap(),
        samples::manifest()
    );
}

#[test]
fn every_golden_key_is_understood() {
    let layout = Layout::new("orders".parse().unwrap(), samples::SYSTEM);
    let list = String::from_utf8(read("keys.txt").to_vec()).unwrap();
    for line in list.lines() {
        let (_, key) = line.split_once(' ').unwrap();
        let parsed = layout
            .parse(key)
            .unwrap_or_else(|| panic!("{key} is not understood"));
        assert_eq!(layout.key(&parsed), key);
    }
}

#[test]
fn the_golden_history_says_which_timeline_holds_an_lsn() {
    let history = History::parse(samples::timeline(3), &read("history")).unwrap();
    assert_eq!(history.timeline_at(Lsn(0xA00_0177)), samples::timeline(1));
    assert_eq!(history.timeline_at(Lsn(0xA00_0178)), samples::timeline(2));
    assert_eq!(history.timeline_at(Lsn(0x1_0200_0000)), samples::timeline(3));
}

/// A file that nothing reads would prove nothing.
#[test]
fn every_file_of_the_directory_is_tested() {
    let expected: Vec<String> = expected().into_iter().map(|(name, _)| name).collect();
    for file in fs::read_dir(directory()).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        assert!(
            name == "README.md" || expected.contains(&name),
            "{name} is read by no test"
        );
    }
}

/// For a new kind of object within this version: writes what is missing and touches nothing that is there.
#[test]
#[ignore = "writes test data; run by hand after adding a sample"]
fn write_missing_files() {
    for (name, bytes) in expected() {
        let path = directory().join(name);
        if !path.exists() {
            fs::write(path, bytes).unwrap();
        }
    }
}
