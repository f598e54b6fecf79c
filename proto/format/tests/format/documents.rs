//! Documents: read back, strict where safety needs it, lenient to additions, and damage is always seen.

use highwater_format::*;
use proptest::prelude::*;

use crate::keys::{any_range, any_time, any_timeline};
use crate::samples;

fn envelope(format: u32, kind: &str, body: &str) -> Vec<u8> {
    let crc = crc32_hex(crc32fast::hash(body.as_bytes()));
    format!(r#"{{"format":{format},"kind":"{kind}","crc32":"{crc}","body":{body}}}"#).into_bytes()
}

fn body(document: &[u8]) -> String {
    let text = std::str::from_utf8(document).unwrap();
    text.split_once("\"body\":")
        .unwrap()
        .1
        .strip_suffix('}')
        .unwrap()
        .to_owned()
}

/// Decodes as whatever the golden file's name says.
fn decode_named(name: &str, bytes: &[u8]) -> Result<(), FormatError> {
    match name {
        "identity.json" => decode::<Identity>(bytes).map(drop),
        "gap.json" => decode::<Gap>(bytes).map(drop),
        "writer.json" => decode::<Writer>(bytes).map(drop),
        "pulse.json" => decode::<Pulse>(bytes).map(drop),
        "backup.json" => decode::<Backup>(bytes).map(drop),
        "manifest.json" => decode::<Manifest>(bytes).map(drop),
        _ => panic!("{name} is no document"),
    }
}

#[test]
fn every_flipped_bit_is_seen() {
    for (name, bytes) in samples::documents() {
        for at in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            assert!(decode_named(name, &damaged).is_err(), "bit {at} of {name}");
        }
    }
}

#[test]
fn every_truncation_is_seen() {
    for (name, bytes) in samples::documents() {
        for len in 0..bytes.len() {
            let kind = decode_named(name, &bytes[..len]).unwrap_err().kind();
            assert_eq!(kind, FormatErrorKind::Corrupt, "{name} cut to {len}");
        }
    }
}

#[test]
fn a_newer_format_is_told_from_damage() {
    let body = body(&encode(&samples::pulse()).unwrap());
    let error = decode::<Pulse>(&envelope(2, "pulse", &body)).unwrap_err();
    assert_eq!(error.kind(), FormatErrorKind::NewerVersion);
    assert!(
        error.to_string().contains("pulse") && error.to_string().contains('2'),
        "{error}"
    );
    // A newer body need not look like ours at all.
    let error = decode::<Pulse>(&envelope(2, "pulse", "[1]")).unwrap_err();
    assert_eq!(error.kind(), FormatErrorKind::NewerVersion);
    assert_eq!(
        decode::<Pulse>(&envelope(0, "pulse", &body)).unwrap_err().kind(),
        FormatErrorKind::Corrupt
    );
}

#[test]
fn another_kind_is_a_mismatch() {
    let error = decode::<Gap>(&encode(&samples::pulse()).unwrap()).unwrap_err();
    assert_eq!(error.kind(), FormatErrorKind::Mismatch);
    assert!(
        error.to_string().contains("pulse") && error.to_string().contains("gap"),
        "{error}"
    );
}

#[test]
fn unknown_fields_are_skipped() {
    let body = body(&encode(&samples::writer()).unwrap());
    let extended = format!(r#"{{"later":{{"a":[1]}},{}"#, body.strip_prefix('{').unwrap());
    assert_eq!(
        decode::<Writer>(&envelope(1, "writer", &extended)).unwrap(),
        samples::writer()
    );
    let text = String::from_utf8(envelope(1, "writer", &body)).unwrap();
    let extended = text.replacen("{\"format\"", "{\"later\":null,\"format\"", 1);
    assert_eq!(decode::<Writer>(extended.as_bytes()).unwrap(), samples::writer());
}

#[test]
fn a_missing_field_is_damage() {
    let body = body(&encode(&samples::writer()).unwrap()).replace(r#""epoch":3,"#, "");
    assert_eq!(
        decode::<Writer>(&envelope(1, "writer", &body))
            .unwrap_err()
            .kind(),
        FormatErrorKind::Corrupt
    );
}

#[test]
fn a_human_may_lay_out_the_envelope_but_not_the_body() {
    let body = body(&encode(&samples::gap()).unwrap());
    let text = String::from_utf8(envelope(1, "gap", &body)).unwrap();
    let spaced = text.replacen(",\"body\":", " ,\n \"body\" : ", 1) + "\n";
    assert_eq!(decode::<Gap>(spaced.as_bytes()).unwrap(), samples::gap());
    let respaced = text.replacen("\"timeline\":1", "\"timeline\": 1", 1);
    assert!(matches!(
        decode::<Gap>(respaced.as_bytes()),
        Err(FormatError::Checksum { .. })
    ));
}

#[test]
fn an_identity_says_which_field_differs() {
    let ours = samples::identity();
    let minor = Identity {
        server_version: 150_021,
        ..ours.clone()
    };
    ours.expect(&minor).unwrap();
    let others = [
        (
            Identity {
                system_id: SystemId(1),
                ..ours.clone()
            },
            "system identifier",
        ),
        (
            Identity {
                server_version: 160_001,
                ..ours.clone()
            },
            "major version",
        ),
        (
            Identity {
                segment_size: SegmentSize::from_show("1MB").unwrap(),
                ..ours.clone()
            },
            "WAL segment size",
        ),
        (
            Identity {
                wal_block_size: 4096,
                ..ours.clone()
            },
            "WAL block size",
        ),
        (
            Identity {
                block_size: 4096,
                ..ours.clone()
            },
            "block size",
        ),
    ];
    for (other, field) in others {
        let error = ours.expect(&other).unwrap_err();
        assert_eq!(error.kind(), FormatErrorKind::Mismatch);
        assert!(error.to_string().contains(field), "{error}");
    }
}

#[test]
fn impossible_records_are_neither_written_nor_read() {
    fn refused<T: Document>(document: &T) {
        let error = encode(document).unwrap_err();
        assert_eq!(error.kind(), FormatErrorKind::Invalid, "{error}");
        let body = serde_json::to_string(document).unwrap();
        let error = decode::<T>(&envelope(1, T::KIND, &body)).map(drop).unwrap_err();
        assert_eq!(error.kind(), FormatErrorKind::Corrupt, "{error}");
    }
    refused(&Identity {
        server_version: 15,
        ..samples::identity()
    });
    refused(&Identity {
        block_size: 8000,
        ..samples::identity()
    });
    refused(&Gap {
        end: samples::gap().start,
        ..samples::gap()
    });
    refused(&Writer {
        epoch: 0,
        ..samples::writer()
    });
    refused(&Backup {
        stop_lsn: Lsn(1),
        ..samples::backup()
    });
    refused(&Backup {
        start_lsn: Lsn(1),
        ..samples::backup()
    });
    let moved = samples::timeline(2);
    refused(&Backup {
        timeline: moved,
        stop_timeline: moved,
        ..samples::backup()
    });
    refused(&Backup {
        id: BackupId::new(moved, samples::backup().start_lsn, samples::backup().started_at),
        timeline: moved,
        ..samples::backup()
    });
    refused(&Backup {
        manifest_crc32: "0A1B2C3D".to_owned(),
        ..samples::backup()
    });
    refused(&manifest_with(|entry| entry.path = "../outside".to_owned()));
}

fn manifest_with(change: impl FnOnce(&mut Entry)) -> Manifest {
    let mut manifest = samples::manifest();
    change(&mut manifest.entries[1]);
    manifest
}

#[test]
fn no_path_leaves_the_data_directory() {
    for path in [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "base/../../x",
        "base/..",
        "./x",
        "base//x",
        "base/",
        "a\0b",
        ".",
    ] {
        assert!(
            manifest_with(|entry| entry.path = path.to_owned())
                .validate()
                .is_err(),
            "{path:?}"
        );
    }
    for path in [
        "a",
        "..a",
        "a..",
        ".hidden",
        "base/1/2",
        "ä",
        "with space",
        "back\\slash",
    ] {
        manifest_with(|entry| entry.path = path.to_owned())
            .validate()
            .unwrap();
    }
}

#[test]
fn nothing_lies_under_a_file_or_a_foreign_link() {
    let mut manifest = samples::manifest();
    manifest.entries[3].path = "base/link".to_owned();
    manifest.entries[4].path = "base/link/x".to_owned();
    assert!(manifest.validate().unwrap_err().to_string().contains("base/link"));
    for parent in [
        "pg_tblspc/x",
        "pg_tblspc/1/2",
        "pg_tblspc/",
        "pg_tblspc/99999999999",
        "pg_wal",
    ] {
        manifest.entries[3].path = parent.to_owned();
        manifest.entries[4].path = format!("{parent}/x");
        assert!(manifest.validate().is_err(), "{parent}");
    }
    let mut manifest = samples::manifest();
    manifest.entries[2].path = "PG_VERSION/x".to_owned();
    assert!(manifest.validate().is_err());
}

#[test]
fn entries_and_packs_add_up() {
    let bad: [fn(&mut Manifest); 13] = [
        |m| m.entries[2].path = "PG_VERSION".to_owned(),
        |m| m.entries[1].size = 4,
        |m| m.entries[1].mode = 0o10_000,
        |m| m.entries[1].link = Some("x".to_owned()),
        |m| m.entries[1].extents[0].pack = 9,
        |m| m.entries[1].extents[0].offset = 8198,
        |m| m.entries[1].extents[0].offset = u64::MAX,
        |m| {
            m.entries[2].extents.push(Extent {
                pack: 0,
                offset: 0,
                len: 0,
            })
        },
        |m| m.entries[0].size = 1,
        |m| m.entries[3].link = None,
        |m| m.entries[3].link = Some(String::new()),
        |m| m.packs[1].number = 0,
        |m| m.packs[0].crc32 = "xyz".to_owned(),
    ];
    for (index, change) in bad.into_iter().enumerate() {
        let mut manifest = samples::manifest();
        change(&mut manifest);
        assert!(manifest.validate().is_err(), "change {index}");
    }
    samples::manifest().validate().unwrap();
}

proptest! {
    #[test]
    fn a_gap_is_read_back(tli in any_timeline(), range in any_range(), reason in ".*", at in any_time(), unreplayable: bool) {
        let gap = Gap { timeline: tli, start: range.start, end: range.end, reason, recorded_at: at, unreplayable };
        let bytes = encode(&gap).unwrap();
        prop_assert_eq!(decode::<Gap>(&bytes).unwrap(), gap);
    }

    #[test]
    fn a_pulse_is_read_back(tli in any_timeline(), lsns in any::<[u64; 3]>(), at in any_time(),
        commit in proptest::option::of(any_time()), instance in ".*", sequence in any::<u64>(),
        quorum in proptest::option::of(any::<(u32, u32)>()), interval_ms in proptest::option::of(any::<u64>()),
        waiting_ms in proptest::option::of(any::<u64>()), answered_at in proptest::option::of(any_time())) {
        let quorum = quorum.map(|(needed, regions)| Quorum { needed, regions });
        let [wal_end, durable_lsn, stored_lsn] = lsns.map(Lsn);
        let pulse = Pulse { timeline: tli, server_time: at, wal_end, durable_lsn, stored_lsn, last_commit: commit, instance, sequence, quorum, interval_ms, waiting_ms, answered_at };
        prop_assert_eq!(decode::<Pulse>(&encode(&pulse).unwrap()).unwrap(), pulse);
    }

    #[test]
    fn a_writer_is_read_back(epoch in 1..=u64::MAX, instance in ".+", host in ".*", pid in any::<u32>(), tli in any_timeline(), at in any_time(),
        begins in proptest::option::of(any::<u64>().prop_map(Lsn)), machine in proptest::option::of(".*"),
        interval_ms in proptest::option::of(any::<u64>())) {
        let writer = Writer { epoch, instance, host, pid, timeline: tli, claimed_at: at, begins, machine, interval_ms };
        prop_assert_eq!(decode::<Writer>(&encode(&writer).unwrap()).unwrap(), writer);
    }

    #[test]
    fn an_identity_is_read_back(system_id in any::<u64>(), version in 10_000..=u32::MAX, size in 20_u32..=30, pages in 10_u32..=16) {
        let identity = Identity {
            system_id: SystemId(system_id), server_version: version, segment_size: SegmentSize::new(1 << size).unwrap(),
            wal_block_size: 1 << pages, block_size: 1 << pages,
        };
        prop_assert_eq!(decode::<Identity>(&encode(&identity).unwrap()).unwrap(), identity);
    }

    #[test]
    fn a_backup_is_read_back(label in ".*", location in ".*", oid in any::<u32>(), numbers in any::<[u64; 3]>(), packs in any::<u32>(), length in any::<u32>()) {
        let mut backup = samples::backup();
        backup.label = label;
        backup.tablespaces = vec![Tablespace { oid, location }];
        [backup.files, backup.plain_bytes, backup.stored_bytes] = numbers;
        backup.packs = packs;
        backup.stop_lsn = backup.start_lsn + u64::from(length);
        prop_assert_eq!(decode::<Backup>(&encode(&backup).unwrap()).unwrap(), backup);
    }

    #[test]
    fn a_manifest_is_read_back(name in "[^/\0]{1,20}", link in "[^\0]{1,20}", mtime in any::<i64>(), cut in 1..8190_u64) {
        prop_assume!(!matches!(name.as_str(), "." | ".."));
        let mut manifest = samples::manifest();
        manifest.entries[1].path = format!("base/new/{name}");
        manifest.entries[1].mtime = mtime;
        manifest.entries[3].link = Some(link);
        manifest.entries[4].extents[1].len = cut;
        manifest.entries[4].size = 8197 + cut;
        prop_assert_eq!(decode::<Manifest>(&encode(&manifest).unwrap()).unwrap(), manifest);
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), body in "\\PC{0,200}") {
        prop_assert!(decode::<Manifest>(&bytes).is_err());
        let _ = decode::<Manifest>(&envelope(1, "manifest", &body));
        let _ = decode::<Pulse>(&envelope(1, "pulse", &body));
    }
}

#[test]
fn a_region_vouches_for_what_was_reported_when_the_policy_needs_it() {
    let quorum = |needed, regions| Quorum { needed, regions };
    assert!(quorum(2, 2).is_vouched_for_by(1));
    assert!(!quorum(1, 2).is_vouched_for_by(1));
    assert!(quorum(1, 2).is_vouched_for_by(2));
    assert!(!quorum(2, 3).is_vouched_for_by(1));
    assert!(quorum(2, 3).is_vouched_for_by(2));
    assert!(!quorum(0, 1).is_vouched_for_by(1));
}
