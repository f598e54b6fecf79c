//! Which bytes of which pack go where in which file.
//!
//! Owns: turning the manifest's view (a file and its extents) round into the reader's (a pack and its slices), and the
//! check that every slice lies in its pack and no two overlap. Pure.

use std::collections::BTreeMap;

use highwater_format::manifest::PackInfo;

use crate::datadir::FileToWrite;

/// A run of a pack's plain bytes that belongs to one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// First byte in the pack.
    pub offset: u64,
    /// Number of bytes, at least one.
    pub len: u64,
    /// Index of the file.
    pub file: usize,
    /// First byte in the file.
    pub at: u64,
}

/// A pack and what is taken from it, by offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackSlices {
    /// The pack as the manifest describes it.
    pub info: PackInfo,
    /// In ascending order, without overlaps.
    pub slices: Vec<Slice>,
}

/// The manifest contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the manifest contradicts itself: {file} takes bytes {offset}+{len} of pack {pack}, {problem}; run `highwater-restore verify`"
)]
pub struct BadSpread {
    file: String,
    pack: u32,
    offset: u64,
    len: u64,
    problem: &'static str,
}

/// Sorts the extents of `files` by pack. Packs that nothing is taken from are not read.
///
/// # Errors
/// An extent lies outside its pack, or two overlap.
pub fn spread(files: &[FileToWrite], packs: Vec<PackInfo>) -> Result<Vec<PackSlices>, BadSpread> {
    let mut by_pack: BTreeMap<u32, PackSlices> = packs
        .into_iter()
        .map(|info| {
            (
                info.number,
                PackSlices {
                    info,
                    slices: Vec::new(),
                },
            )
        })
        .collect();
    for (index, file) in files.iter().enumerate() {
        let mut at = 0;
        for extent in &file.extents {
            let bad = |problem| BadSpread {
                file: file.name.clone(),
                pack: extent.pack,
                offset: extent.offset,
                len: extent.len,
                problem,
            };
            let pack = by_pack
                .get_mut(&extent.pack)
                .ok_or_else(|| bad("which does not exist"))?;
            let end = extent
                .offset
                .checked_add(extent.len)
                .ok_or_else(|| bad("which is beyond any pack"))?;
            if end > pack.info.plain_len {
                return Err(bad("which ends before"));
            }
            if extent.len > 0 {
                pack.slices.push(Slice {
                    offset: extent.offset,
                    len: extent.len,
                    file: index,
                    at,
                });
            }
            at += extent.len;
        }
    }
    let mut packs: Vec<PackSlices> = by_pack
        .into_values()
        .filter(|pack| !pack.slices.is_empty())
        .collect();
    for pack in &mut packs {
        pack.slices.sort_unstable_by_key(|slice| slice.offset);
        check_apart(pack, files)?;
    }
    Ok(packs)
}

fn check_apart(pack: &PackSlices, files: &[FileToWrite]) -> Result<(), BadSpread> {
    for pair in pack.slices.windows(2) {
        let [before, after] = pair else { continue };
        if before.offset + before.len > after.offset {
            return Err(BadSpread {
                file: files
                    .get(after.file)
                    .map(|file| file.name.clone())
                    .unwrap_or_default(),
                pack: pack.info.number,
                offset: after.offset,
                len: after.len,
                problem: "which another file takes too",
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use highwater_format::manifest::Extent;

    use super::*;

    fn file(name: &str, extents: &[(u32, u64, u64)]) -> FileToWrite {
        let extents: Vec<_> = extents
            .iter()
            .map(|&(pack, offset, len)| Extent { pack, offset, len })
            .collect();
        let size = extents.iter().map(|extent| extent.len).sum();
        FileToWrite {
            name: name.to_owned(),
            path: PathBuf::from(name),
            mode: 0o600,
            size,
            extents,
        }
    }

    fn pack(number: u32, plain_len: u64) -> PackInfo {
        PackInfo {
            number,
            plain_len,
            stored_len: 1,
            crc32: "00000000".to_owned(),
        }
    }

    #[test]
    fn a_file_over_two_packs_is_found_in_both() {
        let files = [file("a", &[(0, 10, 5), (1, 0, 7)]), file("b", &[(0, 0, 10)])];
        let spread = spread(&files, vec![pack(0, 15), pack(1, 7), pack(2, 9)]).unwrap();
        assert_eq!(spread.len(), 2, "pack 2 is not needed");
        let first = [
            Slice {
                offset: 0,
                len: 10,
                file: 1,
                at: 0,
            },
            Slice {
                offset: 10,
                len: 5,
                file: 0,
                at: 0,
            },
        ];
        assert_eq!(spread[0].slices, first);
        assert_eq!(
            spread[1].slices,
            [Slice {
                offset: 0,
                len: 7,
                file: 0,
                at: 5
            }]
        );
    }

    #[test]
    fn contradictions_are_refused() {
        for (extents, what) in [
            (vec![(9, 0, 1)], "no such pack"),
            (vec![(0, 10, 6)], "past its end"),
            (vec![(0, u64::MAX, 2)], "past all numbers"),
            (vec![(0, 0, 5), (0, 4, 2)], "overlap"),
        ] {
            assert!(
                spread(&[file("a", &extents)], vec![pack(0, 15)]).is_err(),
                "{what}"
            );
        }
    }
}
