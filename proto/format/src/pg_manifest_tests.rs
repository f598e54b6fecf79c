//! Manifests that PostgreSQL 15 wrote, the same sealed as version 2, and what must be refused.

use super::*;
use crate::error::FormatErrorKind;

const CRC32C: &[u8] = include_bytes!("../testdata/pg/backup_manifest_15_crc32c.json");
const SHA256: &[u8] = include_bytes!("../testdata/pg/backup_manifest_15_sha256_encoded.json");
const VERSION_2: &[u8] = include_bytes!("../testdata/pg/backup_manifest_v2.json");
const BACKUP_LABEL: &[u8] = include_bytes!("../testdata/pg/backup_label_15");

fn find<'a>(manifest: &'a PgManifest, path: &str) -> &'a PgFile {
    manifest
        .files
        .iter()
        .find(|file| file.path == path.as_bytes())
        .unwrap()
}

fn sum(algorithm: ChecksumAlgorithm, bytes: &[u8]) -> Checksum {
    let mut summer = Checksummer::new(algorithm);
    for piece in bytes.chunks(7) {
        summer.update(piece);
    }
    summer.finish()
}

/// Puts the right checksum under a text that was changed.
fn sealed(text: &str) -> Vec<u8> {
    let (covered, _) = text.split_once("\"Manifest-Checksum\"").unwrap();
    let hex: String = Sha256::digest(covered.as_bytes())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{covered}\"Manifest-Checksum\": \"{hex}\"}}\n").into_bytes()
}

#[test]
fn postgresql_15_with_crc32c() {
    let manifest = PgManifest::parse(CRC32C).unwrap();
    assert_eq!((manifest.version, manifest.system_id), (1, None));
    assert_eq!(
        manifest.files.len(),
        CRC32C.windows(8).filter(|part| part == b"\"Path\": ").count()
    );
    let range = LsnRange {
        start: "0/9000D8".parse().unwrap(),
        end: "0/9001B0".parse().unwrap(),
    };
    assert_eq!(
        manifest.wal_ranges,
        [PgWalRange {
            timeline: TimelineId::new(2).unwrap(),
            range
        }]
    );

    // What PostgreSQL computed over these files, computed here.
    let label = find(&manifest, "backup_label");
    assert_eq!(label.size, BACKUP_LABEL.len() as u64);
    assert_eq!(label.checksum, Some(sum(ChecksumAlgorithm::Crc32c, BACKUP_LABEL)));
    let version = find(&manifest, "PG_VERSION");
    assert_eq!(version.checksum, Some(sum(ChecksumAlgorithm::Crc32c, b"15\n")));
    assert_ne!(version.checksum, Some(sum(ChecksumAlgorithm::Crc32c, b"16\n")));
}

#[test]
fn postgresql_15_with_sha256_and_encoded_paths() {
    let manifest = PgManifest::parse(SHA256).unwrap();
    assert_eq!(manifest.files.len(), 6);
    let version = manifest
        .files
        .iter()
        .find(|file| file.path.ends_with(b"PG_VERSION"))
        .unwrap();
    assert_eq!(version.checksum, Some(sum(ChecksumAlgorithm::Sha256, b"15\n")));
}

#[test]
fn version_2_names_the_cluster() {
    let manifest = PgManifest::parse(VERSION_2).unwrap();
    assert_eq!(
        (manifest.version, manifest.system_id),
        (2, Some(SystemId(7_560_123_456_789_012_345)))
    );
    assert_eq!(manifest.files, PgManifest::parse(SHA256).unwrap().files);
}

#[test]
fn a_later_version_asks_for_a_newer_program() {
    let text = String::from_utf8(VERSION_2.to_vec()).unwrap();
    let error = PgManifest::parse(&sealed(&text.replace("-Version\": 2", "-Version\": 3"))).unwrap_err();
    assert_eq!(error.kind(), FormatErrorKind::NewerVersion);
}

#[test]
fn any_changed_byte_is_noticed() {
    for at in (0..SHA256.len()).chain([0, SHA256.len() - 1]) {
        let mut text = SHA256.to_vec();
        text[at] ^= 1;
        assert!(PgManifest::parse(&text).is_err(), "byte {at} changed");
        assert!(PgManifest::parse(&SHA256[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn without_checksums_there_are_none() {
    let text = String::from_utf8(SHA256.to_vec()).unwrap();
    let with = |fields: &str| {
        let lines: Vec<_> = text
            .lines()
            .map(|line| match line.split_once(", \"Checksum-Algorithm\"") {
                Some((before, after)) => {
                    format!(
                        "{before}{fields} }}{}",
                        if after.ends_with(',') { "," } else { "" }
                    )
                }
                None => line.to_owned(),
            })
            .collect();
        PgManifest::parse(&sealed(&lines.join("\n")))
    };
    assert!(with("").unwrap().files.iter().all(|file| file.checksum.is_none()));
    assert!(with(", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"00000000\"").is_ok());
    for wrong in [
        ", \"Checksum-Algorithm\": \"CRC32C\"",
        ", \"Checksum\": \"00000000\"",
        ", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"000000\"",
        ", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"0000000x\"",
        ", \"Checksum-Algorithm\": \"MD5\", \"Checksum\": \"00000000\"",
        ", \"Path\": \"two names\"",
    ] {
        assert_eq!(
            with(wrong).unwrap_err().kind(),
            FormatErrorKind::Corrupt,
            "{wrong}"
        );
    }
}

#[test]
fn checksums_are_those_of_their_standards() {
    let cases = [
        (ChecksumAlgorithm::None, "NONE "),
        // Little-endian: the usual check value is E3069283.
        (ChecksumAlgorithm::Crc32c, "CRC32C 839206e3"),
        (
            ChecksumAlgorithm::Sha224,
            "SHA224 9b3e61bf29f17c75572fae2e86e17809a4513d07c8a18152acf34521",
        ),
    ];
    for (algorithm, expected) in cases {
        assert_eq!(sum(algorithm, b"123456789").to_string(), expected);
    }
    for (algorithm, bytes) in [
        (ChecksumAlgorithm::Sha256, 32),
        (ChecksumAlgorithm::Sha384, 48),
        (ChecksumAlgorithm::Sha512, 64),
    ] {
        assert_eq!(sum(algorithm, b"").value.len(), bytes);
        assert_eq!(algorithm.to_string().to_lowercase().parse(), Ok(algorithm));
    }
}
