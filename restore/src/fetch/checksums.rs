//! What was written to each file.
//!
//! Owns: the CRC-32C of every written run and joining the runs of a file, so that a check of files as large as the
//! database costs no second read. Does not own: the comparison (see [`super::vouch`]).

use super::FetchError;
use crate::datadir::FileToWrite;

/// A run of bytes as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// Index of the file.
    pub(crate) file: usize,
    /// First byte in the file.
    pub(crate) at: u64,
    /// Number of bytes.
    pub(crate) len: u64,
    /// Of these bytes.
    pub(crate) crc32c: u32,
}

/// What was written to one file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) len: u64,
    pub(crate) crc32c: u32,
}

/// Joins the parts of each file; `Err` names a file whose parts do not add up to it.
pub(crate) fn join(files: &[FileToWrite], mut parts: Vec<Part>) -> Result<Vec<Written>, FetchError> {
    parts.sort_unstable_by_key(|part| (part.file, part.at));
    let mut written = vec![Written::default(); files.len()];
    for part in &parts {
        let Some(sum) = written.get_mut(part.file) else {
            continue;
        };
        if sum.len == part.at {
            let len = usize::try_from(part.len).unwrap_or(usize::MAX);
            sum.crc32c = crc32c::crc32c_combine(sum.crc32c, part.crc32c, len);
            sum.len += part.len;
        }
    }
    for (file, sum) in files.iter().zip(&written) {
        if sum.len != file.size {
            return Err(FetchError::Incomplete {
                name: file.name.clone(),
                written: sum.len,
                size: file.size,
            });
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn file(size: u64) -> FileToWrite {
        FileToWrite {
            name: "f".to_owned(),
            path: PathBuf::from("f"),
            mode: 0o600,
            size,
            extents: Vec::new(),
        }
    }

    fn part(at: u64, bytes: &[u8]) -> Part {
        Part {
            file: 0,
            at,
            len: bytes.len() as u64,
            crc32c: crc32c::crc32c(bytes),
        }
    }

    #[test]
    fn parts_join_in_any_order() {
        let written = join(
            &[file(9)],
            vec![part(6, b"789"), part(0, b"123"), part(3, b"456")],
        )
        .unwrap();
        assert_eq!(
            written,
            [Written {
                len: 9,
                crc32c: crc32c::crc32c(b"123456789")
            }]
        );
    }

    #[test]
    fn a_missing_part_is_noticed() {
        let error = join(&[file(9)], vec![part(0, b"123"), part(6, b"789")]).unwrap_err();
        assert!(
            matches!(
                error,
                FetchError::Incomplete {
                    written: 3,
                    size: 9,
                    ..
                }
            ),
            "{error}"
        );
    }
}
