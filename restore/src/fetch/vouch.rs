//! What was written, compared with what PostgreSQL said it sent.
//!
//! Owns: the comparison with the pg_manifest, file by file. CRC-32C costs nothing more (it was taken while writing);
//! files with another algorithm are read once more. Does not own: the pg_manifest's own form.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};

use highwater_format::pg_manifest::{Checksum, ChecksumAlgorithm, Checksummer, PgFile, PgManifest};

use super::FetchError;
use super::checksums::Written;
use crate::datadir::FileToWrite;

/// Checks every file that `pg_manifest` lists. Returns how many it vouched for.
///
/// # Errors
/// The first file that is missing or is not as it was sent.
pub(crate) fn check(
    files: &[FileToWrite],
    written: &[Written],
    pg_manifest: &PgManifest,
) -> Result<u64, FetchError> {
    let both = files.iter().zip(written);
    let by_name: HashMap<&[u8], (&FileToWrite, &Written)> = both
        .map(|(file, written)| (file.name.as_bytes(), (file, written)))
        .collect();
    let mut vouched = 0;
    for listed in &pg_manifest.files {
        let mismatch = |problem: String| FetchError::NotAsSent {
            name: name_of(listed),
            problem,
        };
        match by_name.get(listed.path.as_slice()) {
            Some((file, written)) => {
                vouched += u64::from(is_as_sent(listed, file, written).map_err(mismatch)?)
            }
            // Empty files have no content to compare; others are left out of a restore on purpose.
            None if listed.size == 0 || is_left_out(&listed.path) => {}
            None => {
                return Err(mismatch(
                    "PostgreSQL sent it, and the backup does not have it".to_owned(),
                ));
            }
        }
    }
    Ok(vouched)
}

fn name_of(listed: &PgFile) -> String {
    String::from_utf8_lossy(&listed.path).into_owned()
}

/// Whether a checksum was there and is right.
fn is_as_sent(listed: &PgFile, file: &FileToWrite, written: &Written) -> Result<bool, String> {
    if written.len != listed.size {
        return Err(format!(
            "PostgreSQL sent {} bytes, and {} were written",
            listed.size, written.len
        ));
    }
    let Some(Checksum { algorithm, value }) = &listed.checksum else {
        return Ok(false);
    };
    let computed = match algorithm {
        ChecksumAlgorithm::Crc32c => written.crc32c.to_le_bytes().to_vec(),
        other => {
            read_again(file, *other)
                .map_err(|error| format!("it cannot be read again: {error}"))?
                .value
        }
    };
    if computed == *value {
        Ok(true)
    } else {
        Err(format!("its {algorithm} differs from what PostgreSQL sent"))
    }
}

/// Files that a restore leaves out on purpose.
fn is_left_out(path: &[u8]) -> bool {
    matches!(path, b"standby.signal" | b"recovery.signal") || path.starts_with(b"highwater")
}

fn read_again(file: &FileToWrite, algorithm: ChecksumAlgorithm) -> io::Result<Checksum> {
    let mut input = File::open(&file.path)?;
    let mut sum = Checksummer::new(algorithm);
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read = input.read(&mut buffer)?;
        if read == 0 {
            return Ok(sum.finish());
        }
        sum.update(buffer.get(..read).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn file(size: u64) -> FileToWrite {
        FileToWrite {
            name: "base/1/2".to_owned(),
            path: PathBuf::from("x"),
            mode: 0o600,
            size,
            extents: Vec::new(),
        }
    }

    fn listed(path: &str, content: &[u8]) -> PgFile {
        let mut sum = Checksummer::new(ChecksumAlgorithm::Crc32c);
        sum.update(content);
        PgFile {
            path: path.as_bytes().to_vec(),
            size: content.len() as u64,
            checksum: Some(sum.finish()),
        }
    }

    fn checked(content: &[u8], listed: Vec<PgFile>) -> Result<u64, FetchError> {
        let written = Written {
            len: content.len() as u64,
            crc32c: crc32c::crc32c(content),
        };
        let manifest = PgManifest {
            version: 1,
            system_id: None,
            files: listed,
            wal_ranges: Vec::new(),
        };
        check(&[file(content.len() as u64)], &[written], &manifest)
    }

    #[test]
    fn equal_files_are_vouched_for_and_others_named() {
        assert_eq!(checked(b"page", vec![listed("base/1/2", b"page")]).unwrap(), 1);
        for (what, list) in [
            ("other bytes", vec![listed("base/1/2", b"pige")]),
            ("another length", vec![listed("base/1/2", b"pages")]),
            ("a file that is not there", vec![listed("base/1/3", b"page")]),
        ] {
            assert!(
                matches!(checked(b"page", list), Err(FetchError::NotAsSent { .. })),
                "{what}"
            );
        }
        assert_eq!(
            checked(b"page", vec![listed("standby.signal", b"left out")]).unwrap(),
            0
        );
    }
}
