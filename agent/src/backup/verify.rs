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
