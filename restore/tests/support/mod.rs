//! A small archive made by hand: what an agent would have stored, without one.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part of this")]

use std::sync::Arc;

use highwater_format::{
    Backup, BackupId, ClusterName, Codec, Entry, EntryKind, Extent, FrameEncoder, Header, Kind, Layout, Lsn,
    LsnRange, Manifest, PackInfo, SegmentName, SegmentSize, SystemId, Time, TimelineId, crc32_hex, encode,
    seal,
};
use highwater_restore::recovery::facts::{Facts, RegionFacts, TimelineFacts};
use highwater_store::{MemoryStore, Object, PutMode, RegionConfig, Store};

pub const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_001);
pub const MIB: u64 = 1 << 20;
pub const SIZE: u64 = MIB;

pub type Memory = Arc<MemoryStore>;

pub fn memory(region: &str) -> Memory {
    Arc::new(MemoryStore::new(region))
}

pub fn cluster() -> ClusterName {
    "orders".parse().unwrap()
}

pub fn layout() -> Layout {
    Layout::new(cluster(), SYSTEM)
}

pub fn size() -> SegmentSize {
    SegmentSize::new(SIZE).unwrap()
}

pub fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

pub fn segment(number: u64) -> SegmentName {
    SegmentName {
        timeline: timeline(1),
        number,
    }
}

/// The WAL of a made-up cluster: byte `n` of it is a function of `n`, so that a byte in the wrong place shows.
pub fn wal(range: LsnRange) -> Vec<u8> {
    (range.start.0..range.end.0)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8)
        .collect()
}

pub fn range(start: u64, end: u64) -> LsnRange {
    LsnRange::new(Lsn(start), Lsn(end))
}

fn sealed(header: Header, plain: &[u8]) -> highwater_format::Sealed {
    let mut encoder = FrameEncoder::new(Codec::Lz4);
    let frames: Vec<_> = plain
        .chunks(1 << 16)
        .map(|chunk| encoder.encode(chunk).unwrap())
        .collect();
    seal(header, &frames).unwrap()
}

/// Puts bytes under a key in every one of the regions.
pub async fn put(regions: &[&Memory], key: &str, bytes: impl Into<Vec<u8>>) {
    let object = Object::new(bytes.into());
    for region in regions {
        region.put(key, object.clone(), PutMode::Overwrite).await.unwrap();
    }
}

pub async fn put_segment(regions: &[&Memory], name: SegmentName) {
    let range = name.range(size());
    let header = Header::wal(Kind::Segment, Codec::Lz4, SYSTEM, name.timeline, range);
    put(
        regions,
        &layout().segment(name, size()),
        sealed(header, &wal(range)).bytes,
    )
    .await;
}

pub async fn put_tail(regions: &[&Memory], tli: u32, range: LsnRange) {
    let header = Header::wal(Kind::Tail, Codec::Lz4, SYSTEM, timeline(tli), range);
    put(
        regions,
        &layout().tail(timeline(tli), range),
        sealed(header, &wal(range)).bytes,
    )
    .await;
}

/// Facts about regions in memory, with a proven end of timeline 1.
pub fn facts(regions: &[(&str, bool)], end: Option<u64>) -> Facts {
    let (format, note) = Facts::format_and_note();
    let region = |(name, was_read): &(&str, bool)| {
        RegionFacts::of(
            &RegionConfig::new(*name, format!("file:///nowhere/{name}")),
            *was_read,
        )
    };
    let first = |end| TimelineFacts {
        timeline: timeline(1),
        begin: Lsn(0),
        end: Lsn(end),
        ragged: false,
    };
    Facts {
        format,
        note,
        cluster: cluster(),
        system_id: SYSTEM,
        segment_size: SIZE,
        config: None,
        regions: regions.iter().map(region).collect(),
        left_out: Vec::new(),
        timelines: end.map(first).into_iter().collect(),
        known_timelines: vec![timeline(1)],
        without_history: Vec::new(),
        needed_until: None,
        prefetch_bytes: 4 * MIB,
    }
}

/// A file of a made-up backup.
#[derive(Debug, Clone)]
pub struct BackupFile {
    pub path: String,
    pub mode: u32,
    pub content: Vec<u8>,
}

pub fn file(path: &str, content: impl Into<Vec<u8>>) -> BackupFile {
    BackupFile {
        path: path.to_owned(),
        mode: 0o600,
        content: content.into(),
    }
}

/// The least that is accepted as a cluster, with a file that spans several packs.
pub fn small_cluster() -> Vec<BackupFile> {
    let large: Vec<u8> = wal(range(0, 700_000));
    vec![
        file("backup_label", "START WAL LOCATION: 0/2000028\n"),
        file("PG_VERSION", "15\n"),
        file("postgresql.conf", "# nothing\n"),
        file("postgresql.auto.conf", "work_mem = '4MB'\n"),
        file("base/1/1000", large),
        file("base/1/1001", vec![7; 10]),
        file("base/1/empty", ""),
        file("global/pg_control", vec![3; 8192]),
    ]
}

pub fn backup_id() -> BackupId {
    BackupId::new(
        timeline(1),
        Lsn(0x0200_0028),
        Time::from_unix_micros(1_790_000_000_000_000),
    )
}

/// Stores a backup of these files, in packs of `pack_len` plain bytes. Directories are taken from the paths.
pub async fn put_backup(regions: &[&Memory], files: &[BackupFile], pack_len: usize) -> Backup {
    let (mut entries, mut plain) = (directories(files), Vec::new());
    for file in files {
        let (offset, len) = (plain.len() as u64, file.content.len() as u64);
        plain.extend_from_slice(&file.content);
        entries.push(Entry {
            path: file.path.clone(),
            kind: EntryKind::File,
            mode: file.mode,
            mtime: 0,
            size: len,
            link: None,
            extents: extents(offset, len, pack_len as u64),
        });
    }
    let mut packs = Vec::new();
    for (number, content) in (0u32..).zip(plain.chunks(pack_len)) {
        let sealed = sealed(Header::pack(Codec::Lz4, SYSTEM, timeline(1), number), content);
        packs.push(PackInfo {
            number,
            plain_len: content.len() as u64,
            stored_len: sealed.bytes.len() as u64,
            crc32: crc32_hex(sealed.crc32),
        });
        put(regions, &layout().pack(&backup_id(), number), sealed.bytes).await;
    }
    let manifest = Manifest {
        backup: backup_id(),
        packs,
        entries,
    };
    put_manifest(regions, &manifest).await
}

pub async fn put_manifest(regions: &[&Memory], manifest: &Manifest) -> Backup {
    let bytes = encode(manifest).unwrap();
    let backup = Backup {
        id: backup_id(),
        system_id: SYSTEM,
        server_version: 150_020,
        timeline: timeline(1),
        start_lsn: Lsn(0x0200_0028),
        stop_lsn: Lsn(0x0200_0100),
        stop_timeline: timeline(1),
        started_at: backup_id().started_at(),
        finished_at: backup_id().started_at(),
        label: String::new(),
        tablespaces: Vec::new(),
        from_standby: false,
        files: manifest.entries.len() as u64,
        plain_bytes: manifest.packs.iter().map(|pack| pack.plain_len).sum(),
        stored_bytes: manifest.packs.iter().map(|pack| pack.stored_len).sum(),
        packs: u32::try_from(manifest.packs.len()).unwrap(),
        manifest_crc32: crc32_hex(crc32fast::hash(&bytes)),
        pg_manifest: false,
        codec: Codec::Lz4,
    };
    put(regions, &layout().manifest(&backup_id()), bytes).await;
    put(regions, &layout().backup(&backup_id()), encode(&backup).unwrap()).await;
    backup
}

fn extents(mut offset: u64, len: u64, pack_len: u64) -> Vec<Extent> {
    let (end, mut extents) = (offset + len, Vec::new());
    while offset < end {
        let pack = offset / pack_len;
        let len = ((pack + 1) * pack_len).min(end) - offset;
        extents.push(Extent {
            pack: u32::try_from(pack).unwrap(),
            offset: offset % pack_len,
            len,
        });
        offset += len;
    }
    extents
}

fn directories(files: &[BackupFile]) -> Vec<Entry> {
    let parents = files.iter().flat_map(|file| {
        file.path
            .match_indices('/')
            .map(|(at, _)| file.path[..at].to_owned())
    });
    let unique: std::collections::BTreeSet<String> = parents.chain(["pg_wal".to_owned()]).collect();
    let entry = |path| Entry {
        path,
        kind: EntryKind::Directory,
        mode: 0o700,
        mtime: 0,
        size: 0,
        link: None,
        extents: Vec::new(),
    };
    unique.into_iter().map(entry).collect()
}

pub fn shared(store: &Memory) -> Arc<dyn Store> {
    store.clone()
}
