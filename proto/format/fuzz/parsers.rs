//! Everything in this crate that reads bytes from outside, one function each: none may panic, whatever it is given.
//!
//! The fuzz targets and `tests/parsers_are_total.rs` both call these. A checksum stops almost every changed input at
//! the door, so where there is one the functions also put the right one under the bytes and go on.

use bytes::Bytes;
use highwater_format::backup_label::BackupLabel;
use highwater_format::container::Header;
use highwater_format::pg_manifest::PgManifest;
use highwater_format::walpage::page_magic;
use highwater_format::walscan::WalScanner;
use highwater_format::{
    Backup, ClusterName, Document, Gap, History, Identity, Layout, Lsn, Manifest, Object, Pulse, SegmentName,
    SegmentSize, SystemId, Time, TimelineId, WalFile, Writer, decode,
};
use sha2::{Digest, Sha256};

/// Objects of the archive.
pub(crate) fn container(data: &[u8]) {
    open(data);
    let mut sealed = data.to_vec();
    if let Some(header) = sealed.first_chunk_mut::<{ Header::LEN }>() {
        let crc = crc32fast::hash(&header[..Header::LEN - 4]);
        header[Header::LEN - 4..].copy_from_slice(&crc.to_le_bytes());
    }
    if let Some((covered, crc)) = sealed.split_last_chunk_mut::<4>() {
        *crc = crc32fast::hash(covered).to_le_bytes();
    }
    open(&sealed);
}

fn open(data: &[u8]) {
    let _ = Header::decode(data);
    let Ok(object) = Object::open(Bytes::copy_from_slice(data)) else {
        return;
    };
    for frame in object.frames() {
        let mut plain = vec![7];
        let outcome = frame.decode_into(&mut plain);
        assert!(
            outcome.is_ok() || plain == [7],
            "a frame that is wrong leaves nothing behind"
        );
    }
    // The header's claim, before it is allocated for.
    if object.header().plain_len <= 64 << 20 {
        let _ = object.plain();
    }
}

/// JSON documents of the archive.
pub(crate) fn documents(data: &[u8]) {
    document::<Identity>(data);
    document::<Gap>(data);
    document::<Writer>(data);
    document::<Pulse>(data);
    document::<Backup>(data);
    document::<Manifest>(data);
}

fn document<T: Document>(data: &[u8]) {
    let _ = decode::<T>(data);
    let crc = crc32fast::hash(data);
    let mut sealed = format!(r#"{{"format":1,"kind":"{}","crc32":"{crc:08x}","body":"#, T::KIND).into_bytes();
    sealed.extend(data);
    sealed.push(b'}');
    let _ = decode::<T>(&sealed);
}

/// Timeline history files.
pub(crate) fn history(data: &[u8]) {
    if let Some(timeline) = TimelineId::new(7) {
        let _ = History::parse(timeline, data);
    }
}

/// WAL: as it is, and as the body of a whole record on a good page. The first bytes choose where it is cut.
pub(crate) fn walscan(data: &[u8]) {
    let Some((choice, data)) = data.split_first_chunk::<4>() else {
        return;
    };
    let Ok(size) = SegmentSize::new(1 << 20) else {
        return;
    };
    let cut = usize::from(choice[0]) + 1;
    let start = Lsn(u64::from(choice[1]) * 64);
    scan(WalScanner::new(start, size, None, None), data, cut);
    let on_a_page = page_with(data, choice[2], choice[3]);
    scan(
        WalScanner::new(PAGE, size, TimelineId::new(1), Some(15)),
        &on_a_page,
        cut,
    );
}

fn scan(mut scanner: WalScanner, data: &[u8], cut: usize) {
    let begin = scanner.position();
    for piece in data.chunks(cut) {
        if scanner.feed(piece, &mut |_| ()).is_err() {
            return;
        }
    }
    assert_eq!(
        scanner.position(),
        begin + data.len() as u64,
        "everything was read"
    );
}

const PAGE: Lsn = Lsn(8192);

/// The first page of a segment but one, with this body in a record whose CRC is right.
fn page_with(body: &[u8], manager: u8, info: u8) -> Vec<u8> {
    let body = &body[..body.len().min(8000)];
    let mut page = page_magic(15).unwrap_or(0).to_le_bytes().to_vec();
    page.extend([0, 0, 1, 0, 0, 0]);
    page.extend(PAGE.0.to_le_bytes());
    page.extend([0; 8]);
    let mut header = u32::try_from(body.len() + 24)
        .unwrap_or(24)
        .to_le_bytes()
        .to_vec();
    header.extend([0; 12]);
    header.extend([info, manager, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), &header);
    page.extend(header);
    page.extend(crc.to_le_bytes());
    page.extend(body);
    page.resize(page.len().next_multiple_of(8), 0);
    page
}

/// PostgreSQL's list of a base backup.
pub(crate) fn pg_manifest(data: &[u8]) {
    let _ = PgManifest::parse(data);
    let Some(line) = data
        .windows(19)
        .rposition(|part| part == b"\"Manifest-Checksum\"")
    else {
        return;
    };
    let mut sealed = data[..line].to_vec();
    let hex: String = Sha256::digest(&sealed)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    sealed.extend(format!("\"Manifest-Checksum\": \"{hex}\"}}\n").into_bytes());
    let _ = PgManifest::parse(&sealed);
}

/// PostgreSQL's mark in a base backup.
pub(crate) fn backup_label(data: &[u8]) {
    let _ = BackupLabel::parse(data);
}

/// Keys as a region lists them. What is understood must be built again to the same text.
pub(crate) fn keys(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let _ = text.parse::<ClusterName>();
    let Ok(cluster) = "orders".parse::<ClusterName>() else {
        return;
    };
    let _ = Layout::parse_system_id(&cluster, text);
    let layout = Layout::new(cluster, SystemId(7_560_123_456_789_012_345));
    let _ = layout.parse(text);
    let _ = layout.parse(&format!("{}{text}", layout.root()));
}

/// File names that PostgreSQL asks for, and the small texts that operators write.
pub(crate) fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let _ = WalFile::parse(text);
    let _ = SegmentName::parse(text, SegmentSize::DEFAULT);
    let _ = SegmentSize::from_show(text);
    let _ = text.parse::<TimelineId>();
    if let Ok(lsn) = text.parse::<Lsn>() {
        assert_eq!(lsn.to_string().parse(), Ok(lsn), "an LSN survives its own text");
    }
    if let Ok(time) = text.parse::<Time>() {
        assert_eq!(time.to_string().parse(), Ok(time), "a time survives its own text");
    }
}
