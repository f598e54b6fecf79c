//! The parser against archives written by the `tar` crate and by hand, cut at arbitrary places.

use super::{TarEntry, TarError, TarEvent, TarKind, TarParser};
use proptest::prelude::*;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    entry: TarEntry,
    content: Vec<u8>,
}

fn parse(archive: &[u8], mut cuts: Vec<usize>) -> Result<Vec<Member>, TarError> {
    cuts.iter_mut().for_each(|cut| *cut %= archive.len() + 1);
    cuts.push(archive.len());
    cuts.sort_unstable();
    let mut parser = TarParser::new();
    let mut members: Vec<Member> = Vec::new();
    let mut open = false;
    let mut from = 0;
    for cut in cuts {
        let mut input = &archive[from..cut];
        from = cut;
        while let Some(event) = parser.next(&mut input)? {
            match event {
                TarEvent::Entry(entry) => {
                    assert!(!open, "a member began inside another");
                    open = entry.kind == TarKind::File;
                    members.push(Member {
                        entry,
                        content: Vec::new(),
                    });
                }
                TarEvent::Data(data) => members.last_mut().unwrap().content.extend_from_slice(data),
                TarEvent::FileEnd => {
                    let last = members.last().unwrap();
                    assert_eq!(last.content.len() as u64, last.entry.size);
                    open = false;
                }
            }
        }
        assert!(input.is_empty());
    }
    parser.finish().map(|()| members)
}

fn build(members: &[Member]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for Member { entry, content } in members {
        let mut header = tar::Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_mtime(entry.mtime.cast_unsigned());
        header.set_uid(26);
        header.set_gid(26);
        header.set_size(entry.size);
        match entry.kind {
            TarKind::File => {
                header.set_entry_type(tar::EntryType::Regular);
                builder
                    .append_data(&mut header, &entry.path, content.as_slice())
                    .unwrap();
            }
            TarKind::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                builder
                    .append_data(&mut header, format!("{}/", entry.path), &[][..])
                    .unwrap();
            }
            TarKind::Symlink => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder
                    .append_link(&mut header, &entry.path, entry.link.as_deref().unwrap())
                    .unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

fn any_path() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-z0-9_]{1,12}(/[a-z0-9_]{1,12}){0,3}",
        1 => "[a-z]{90,130}/[a-z]{90,130}",
    ]
}

fn any_member() -> impl Strategy<Value = Member> {
    let content = prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..2000),
        1 => (0usize..4).prop_map(|blocks| vec![7; blocks * 512]),
    ];
    (
        any_path(),
        0u32..0o10000,
        0i64..1 << 34,
        content,
        0..4,
        any_path(),
    )
        .prop_map(|(path, mode, mtime, content, kind, link)| {
            let (kind, content, link) = match kind {
                0 => (TarKind::Directory, Vec::new(), None),
                1 => (TarKind::Symlink, Vec::new(), Some(format!("/{link}"))),
                _ => (TarKind::File, content, None),
            };
            Member {
                entry: TarEntry {
                    path,
                    kind,
                    mode,
                    mtime,
                    size: content.len() as u64,
                    link,
                },
                content,
            }
        })
}

proptest! {
    #[test]
    fn every_member_comes_back_wherever_the_stream_is_cut(
        members in prop::collection::vec(any_member(), 0..8),
        cuts in prop::collection::vec(any::<usize>(), 0..30),
    ) {
        let archive = build(&members);
        prop_assert_eq!(parse(&archive, cuts.clone()).unwrap(), members.clone());
        // PostgreSQL 14 leaves the two zero blocks out.
        let bare = &archive[..archive.len() - 1024];
        prop_assert_eq!(parse(bare, cuts).unwrap(), members);
    }

    #[test]
    fn one_byte_at_a_time_is_the_same(members in prop::collection::vec(any_member(), 1..3)) {
        let archive = build(&members);
        let cuts = (0..archive.len()).collect();
        prop_assert_eq!(parse(&archive, cuts).unwrap(), members);
    }

    #[test]
    fn rubbish_is_an_error_or_nothing_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _ = parse(&bytes, vec![7, 600]);
    }

    #[test]
    fn an_altered_header_is_noticed(at in 0usize..512, flip in 1u8..=255) {
        let mut archive = build(&[file("base/1/1259", b"content")]);
        // Blanks and zeros are interchangeable at the end of the checksum field itself.
        prop_assume!(!(148..156).contains(&at));
        archive[at] ^= flip;
        prop_assert!(parse(&archive, vec![]).is_err());
    }

    #[test]
    fn a_truncated_archive_is_noticed(cut in 1usize..1536) {
        let archive = build(&[file("base/1/1259", &[1; 600])]);
        let bare = &archive[..archive.len() - 1024];
        prop_assert!(parse(&bare[..bare.len() - cut], vec![]).is_err());
    }
}

fn file(path: &str, content: &[u8]) -> Member {
    let entry = TarEntry {
        path: path.into(),
        kind: TarKind::File,
        mode: 0o600,
        mtime: 1_700_000_000,
        size: content.len() as u64,
        link: None,
    };
    Member {
        entry,
        content: content.to_vec(),
    }
}

fn header(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut block = build(&[file("base/1/1259", b"")]);
    block.truncate(512);
    change(&mut block);
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}

#[test]
fn sizes_beyond_eight_gib_are_base_256() {
    let block = header(|block| {
        block[124] = 0x80;
        block[125..136].fill(0);
        block[131] = 3;
        block[135] = 9;
    });
    let mut input = block.as_slice();
    let Some(TarEvent::Entry(entry)) = TarParser::new().next(&mut input).unwrap() else {
        panic!("no entry")
    };
    assert_eq!(entry.size, 3 << 32 | 9);
}

#[test]
fn a_size_beyond_64_bits_is_refused() {
    let block = header(|block| block[124..136].copy_from_slice(&[0x80, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
    assert!(
        TarParser::new()
            .next(&mut block.as_slice())
            .unwrap_err()
            .to_string()
            .contains("size is too large")
    );
}

#[test]
fn paths_that_leave_the_directory_are_refused() {
    for path in ["../x", "/etc/passwd", "base/../../x", "base//1"] {
        let block = header(|block| {
            block[..100].fill(0);
            block[..path.len()].copy_from_slice(path.as_bytes());
        });
        let error = TarParser::new().next(&mut block.as_slice()).unwrap_err();
        assert!(error.to_string().contains(path), "{error}");
    }
}

#[test]
fn the_way_postgresql_spells_pg_wal_is_normalised() {
    let block = header(|block| {
        block[..100].fill(0);
        block[..25].copy_from_slice(b"./pg_wal/archive_status//");
        block[156] = b'5';
    });
    let mut input = block.as_slice();
    let Some(TarEvent::Entry(entry)) = TarParser::new().next(&mut input).unwrap() else {
        panic!("no entry")
    };
    assert_eq!(
        (entry.path.as_str(), entry.kind),
        ("pg_wal/archive_status", TarKind::Directory)
    );
}

#[test]
fn a_name_that_is_not_utf8_is_named_in_the_error() {
    let block = header(|block| block[..3].copy_from_slice(&[b'a', 0xff, b'b']));
    let error = TarParser::new()
        .next(&mut block.as_slice())
        .unwrap_err()
        .to_string();
    assert!(error.contains("rename or remove"), "{error}");
}

#[test]
fn unknown_member_types_are_named() {
    let block = header(|block| block[156] = b'S');
    let error = TarParser::new()
        .next(&mut block.as_slice())
        .unwrap_err()
        .to_string();
    assert!(error.contains("'S'"), "{error}");
}

#[test]
fn data_after_the_end_are_refused() {
    let mut archive = build(&[file("PG_VERSION", b"15\n")]);
    archive.extend_from_slice(&header(|_| ()));
    assert!(parse(&archive, vec![]).is_err());
}
