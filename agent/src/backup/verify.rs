//! PostgreSQL's own list of what it sent against what arrived.
//!
//! Owns: the comparison of the pg_manifest with the entries and checksums taken while streaming; every file
//! must be in both, with the same size and checksum. Any difference voids the base backup: something between
//! PostgreSQL's disk and us changed, dropped or added bytes.
//! Does not own: parsing the pg_manifest and its own checksum (the format does).

use std::collections::HashMap;

use highwater_format::SystemId;
use highwater_format::pg_manifest::PgManifest;

use super::entries::Entries;
use crate::error::{AgentError, Result};

/// How many differences an error lists.
const SHOWN: usize = 5;

/// Compares; the error names the first few differing files.
pub(crate) fn against_pg_manifest(text: &[u8], entries: &Entries, system_id: SystemId) -> Result<()> {
    let manifest =
        PgManifest::parse(text).map_err(|error| voided(&format!("its backup_manifest: {error}")))?;
    if let Some(theirs) = manifest.system_id.filter(|theirs| *theirs != system_id) {
        return Err(voided(&format!(
            "its backup_manifest is of system {theirs}, the server is {system_id}"
        )));
    }
    let differences = differences(&manifest, entries);
    if differences.is_empty() {
        return Ok(());
    }
    let more = differences.len().saturating_sub(SHOWN);
    let mut text = differences.into_iter().take(SHOWN).collect::<Vec<_>>().join("; ");
    if more > 0 {
        text.push_str(&format!("; and {more} more"));
    }
    Err(voided(&text))
}

fn differences(manifest: &PgManifest, entries: &Entries) -> Vec<String> {
    let mut differences = Vec::new();
    let mut arrived: HashMap<&[u8], _> = entries
        .checked_files()
        .map(|(entry, sum)| (entry.path.as_bytes(), (entry.size, sum)))
        .collect();
    for file in &manifest.files {
        let name = String::from_utf8_lossy(&file.path);
        match arrived.remove(file.path.as_slice()) {
            None => differences.push(format!("{name} is listed and did not arrive")),
            Some((size, _)) if size != file.size => {
                differences.push(format!(
                    "{name} is listed with {} bytes, {size} arrived",
                    file.size
                ));
            }
            Some((_, sum)) if file.checksum.as_ref().is_some_and(|listed| listed != sum) => {
                differences.push(format!("{name} arrived with another checksum"));
            }
            Some(_) => {}
        }
    }
    let mut unlisted: Vec<_> = arrived.into_keys().map(String::from_utf8_lossy).collect();
    unlisted.sort_unstable();
    differences.extend(
        unlisted
            .into_iter()
            .map(|name| format!("{name} arrived and is not listed")),
    );
    differences
}

fn voided(what: &str) -> AgentError {
    AgentError::Trouble {
        what: format!("the base backup is not what PostgreSQL says it sent: {what}. It was not published"),
        next:
            "Older base backups are untouched. Back up again; if it stays, look for faulty memory or network"
                .into(),
    }
}

#[cfg(test)]
mod tests {
    use highwater_format::pg_manifest::{ChecksumAlgorithm, Checksummer, PgFile};

    use super::*;
    use crate::backup::tar::{TarEntry, TarKind};

    fn sum(content: &[u8]) -> highwater_format::pg_manifest::Checksum {
        let mut checksummer = Checksummer::new(ChecksumAlgorithm::Crc32c);
        checksummer.update(content);
        checksummer.finish()
    }

    fn arrived(files: &[(&str, &[u8])]) -> Entries {
        let mut entries = Entries::default();
        for (path, content) in files {
            let member = TarEntry {
                path: (*path).into(),
                kind: TarKind::File,
                mode: 0o600,
                mtime: 0,
                size: content.len() as u64,
                link: None,
            };
            entries.begin("", member);
            entries.checked(sum(content));
        }
        entries
    }

    fn listed(files: &[(&str, &[u8])]) -> PgManifest {
        let file = |(path, content): &(&str, &[u8])| PgFile {
            path: path.as_bytes().to_vec(),
            size: content.len() as u64,
            checksum: Some(sum(content)),
        };
        PgManifest {
            version: 1,
            system_id: None,
            files: files.iter().map(file).collect(),
            wal_ranges: vec![],
        }
    }

    #[test]
    fn equal_lists_have_no_difference() {
        let files: [(&str, &[u8]); 3] = [("PG_VERSION", b"15\n"), ("base/1/1259", b"x"), ("empty", b"")];
        assert!(differences(&listed(&files), &arrived(&files)).is_empty());
    }

    #[test]
    fn every_kind_of_difference_is_found_and_named() {
        let sent = listed(&[("a", b"one"), ("b", b"two"), ("c", b"three"), ("lost", b"x")]);
        let got = arrived(&[("a", b"one"), ("b", b"TWO"), ("c", b"thre"), ("extra", b"y")]);
        assert_eq!(
            differences(&sent, &got),
            [
                "b arrived with another checksum",
                "c is listed with 5 bytes, 4 arrived",
                "lost is listed and did not arrive",
                "extra arrived and is not listed"
            ]
        );
    }

    #[test]
    fn a_manifest_that_cannot_be_read_voids_the_backup() {
        let error = against_pg_manifest(b"{}", &arrived(&[]), SystemId(7))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("backup_manifest") && error.contains("not published"),
            "{error}"
        );
    }
}
