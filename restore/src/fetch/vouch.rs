//! What was written, compared with what PostgreSQL said it sent.
//!
//! Owns: the comparison with the pg_manifest, both ways round. CRC-32C costs nothing more (it was taken while
//! writing); files with another algorithm are read once more. Does not own: the pg_manifest's own form.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;

use highwater_format::pg_manifest::{ChecksumAlgorithm, Checksummer, PgManifest};

use super::FetchError;
use super::checksums::{Part, join};
use crate::datadir::FileToWrite;

/// Checks that every file is whole, and equal to what `pg_manifest` says where it is given. Returns how many files
/// the pg_manifest vouched for.
///
/// # Errors
/// The first file that is not as it was sent.
pub(crate) fn check(
    files: &[FileToWrite],
    parts: Vec<Part>,
    pg_manifest: Option<&PgManifest>,
) -> Result<u64, FetchError> {
    let written = join(files, parts)?;
    let Some(pg_manifest) = pg_manifest else {
        return Ok(0);
    };
    let by_name: HashMap<&str, usize> = files
        .iter()
        .enumerate()
        .map(|(index, file)| (file.name.as_str(), index))
        .collect();
    let mut vouched = 0;
    for listed in &pg_manifest.files {
        let mismatch = |problem: String| FetchError::NotAsSent {
            name: listed.path.clone(),
            problem,
        };
        let Some(index) = by_name.get(listed.path.as_str()).copied() else {
            if listed.size == 0 || left_out(&listed.path) {
                continue;
            }
            return Err(mismatch(
                "PostgreSQL sent it and the backup does not have it".to_owned(),
            ));
        };
        let (Some(file), Some(sum)) = (files.get(index), written.get(index)) else {
            continue;
        };
        if sum.len != listed.size {
            return Err(mismatch(format!(
                "PostgreSQL sent {} bytes, {} were written",
                listed.size, sum.len
            )));
        }
        let computed = match listed.algorithm {
            ChecksumAlgorithm::None => continue,
            ChecksumAlgorithm::Crc32c => sum.crc32c.to_le_bytes().to_vec(),
            other => read_again(file, other)?,
        };
        if computed != listed.checksum {
            return Err(mismatch(format!(
                "its {} differs from what PostgreSQL sent",
                listed.algorithm
            )));
        }
        vouched += 1;
    }
    Ok(vouched)
}

/// Files that a restore leaves out on purpose.
fn left_out(path: &str) -> bool {
    matches!(path, "standby.signal" | "recovery.signal") || path.starts_with("highwater")
}

fn read_again(file: &FileToWrite, algorithm: ChecksumAlgorithm) -> Result<Vec<u8>, FetchError> {
    let io = |source| FetchError::Write {
        path: file.path.clone(),
        source,
    };
    let mut input = File::open(&file.path).map_err(io)?;
    let mut sum = Checksummer::new(algorithm);
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read = input.read(&mut buffer).map_err(io)?;
        if read == 0 {
            return Ok(sum.finish());
        }
        sum.update(buffer.get(..read).unwrap_or_default());
    }
}

