//! An archive in memory, made of WAL that PostgreSQL 15 wrote.

use std::sync::Arc;

use highwater_format::{
    Backup, BackupId, Codec, FrameEncoder, Header, Identity, Kind, Layout, Lsn, LsnRange, Manifest, Pulse,
    SegmentName, SegmentSize, SystemId, Time, TimelineId, crc32_hex, encode, seal,
    walscan::{WalEvent, WalScanner},
};
use highwater_store::{MemoryStore, Object, PutMode, Store};

use crate::{
    catalog::{Catalog, read},
    error::RestoreError,
    locate,
    plan::Plan,
    regions::Region,
    target::Request,
};

pub(super) const FIRST: &[u8] =
    include_bytes!("../../../proto/format/testdata/wal/pg15/000000010000000000000007.head");
pub(super) const SECOND: &[u8] =
    include_bytes!("../../../proto/format/testdata/wal/pg15/000000020000000000000008.head");
pub(super) const WALDUMP: &str = include_str!("../../../proto/format/testdata/wal/pg15/pg_waldump.txt");
pub(super) const SEGMENT: u64 = 1 << 20;
pub(super) const START: Lsn = Lsn(7 * SEGMENT);
pub(super) const SWITCH: Lsn = Lsn(0x80_1B90);
/// The last record is a `pg_switch_wal()`, which ends where its segment does.
pub(super) const LAST_END: Lsn = Lsn(9 * SEGMENT);
/// Tail chunks of an odd size, so that records, pages and objects never end together.
pub(super) const CHUNK: u64 = 5003;

/// One line of `pg_waldump`.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) lsn: Lsn,
    pub(super) prev: Lsn,
    pub(super) time: Option<Time>,
    pub(super) xid: Option<u32>,
}

pub(super) fn lines() -> Vec<Line> {
    let between = |text: &str, before: &str, after: &str| {
        let (_, rest) = text.split_once(before).unwrap();
        rest.split(after).next().unwrap().trim().to_owned()
    };
    let read = |text: &str| {
        let desc = between(text, "desc: ", "\n");
        let ends = desc.starts_with("COMMIT") || desc.starts_with("ABORT");
        let stamp = desc.split(" UTC").next().unwrap();
        let time = stamp.len().checked_sub(26).and_then(|at| stamp.get(at..));
        let prepared = desc
            .split_once("_PREPARED ")
            .map(|(_, rest)| rest.split(':').next().unwrap().parse().unwrap());
        Line {
            lsn: between(text, "lsn: ", ",").parse().unwrap(),
            prev: between(text, "prev ", ",").parse().unwrap(),
            time: time
                .filter(|_| ends)
                .map(|time| format!("{}Z", time.replace(' ', "T")).parse().unwrap()),
            xid: prepared
                .or_else(|| between(text, "tx:", ",").parse().ok())
                .filter(|_| ends),
        }
    };
    WALDUMP.lines().map(read).collect()
}

pub(super) fn transaction_ends() -> Vec<(Line, Time)> {
    lines()
        .into_iter()
        .filter_map(|line| Some((line.clone(), line.time?)))
        .collect()
}

pub(super) fn size() -> SegmentSize {
    SegmentSize::new(SEGMENT).unwrap()
}

pub(super) fn system_id() -> SystemId {
    SystemId(u64::from_le_bytes(FIRST[24..32].try_into().unwrap()))
}

pub(super) fn layout() -> Layout {
    Layout::new("orders".parse().unwrap(), system_id())
}

pub(super) fn second_timeline() -> TimelineId {
    TimelineId::new(2).unwrap()
}

/// All bytes from `START` on, along timeline 2, and the transaction ends in them.
pub(super) fn wal() -> (Vec<u8>, Vec<(Lsn, Time)>) {
    let mut wal = FIRST.to_vec();
    wal.resize(usize::try_from(SEGMENT).unwrap(), 0);
    wal.extend(SECOND);
    scanned(wal)
}

/// The same WAL with the times of some transaction ends moved.
pub(super) fn wal_with_times(moved: impl Fn(&Line, Time) -> Time) -> (Vec<u8>, Vec<(Lsn, Time)>) {
    let (mut wal, _) = wal();
    for (line, time) in transaction_ends() {
        let at = usize::try_from(line.lsn.distance_from(START)).unwrap();
        let len = usize::try_from(u32::from_le_bytes(wal[at..at + 4].try_into().unwrap())).unwrap();
        let record = &mut wal[at..at + len];
        let (old, new) = (stamp(time), stamp(moved(&line, time)));
        if old == new {
            continue;
        }
        let place = record.windows(8).position(|bytes| bytes == old).unwrap();
        record[place..place + 8].copy_from_slice(&new);
        // `COMP_CRC32C` of `xlog.c`: what follows the header, then the header up to the checksum itself.
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[24..]), &record[..20]);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
    }
    scanned(wal)
}

fn stamp(time: Time) -> [u8; 8] {
    time.to_pg().to_le_bytes()
}

fn scanned(mut wal: Vec<u8>) -> (Vec<u8>, Vec<(Lsn, Time)>) {
    let mut commits = Vec::new();
    let mut scanner = WalScanner::new(START, size(), Some(second_timeline()), Some(15));
    let mut on = |event| {
        if let WalEvent::Commit { end, time, .. } = event {
            commits.push((end, time));
        }
    };
    let outcome = scanner.feed(&wal, &mut on);
    assert!(outcome.is_ok() || outcome.is_err_and(|damage| damage.is_end_of_wal()));
    wal.truncate(usize::try_from(scanner.last_record_end().distance_from(START)).unwrap());
    (wal, commits)
}

pub(super) struct Archive {
    pub(super) a: Arc<MemoryStore>,
    pub(super) b: Arc<MemoryStore>,
    pub(super) end: Lsn,
}

impl Archive {
    pub(super) async fn whole() -> Self {
        let (wal, commits) = wal();
        Self::of(&wal, &commits).await
    }

    pub(super) async fn of(wal: &[u8], commits: &[(Lsn, Time)]) -> Self {
        let end = START.saturating_add(wal.len() as u64);
        let archive = Self {
            a: Arc::new(MemoryStore::new("a")),
            b: Arc::new(MemoryStore::new("b")),
            end,
        };
        for store in [&archive.a, &archive.b] {
            archive.documents(store).await;
            // Timeline 1 up to the switch, timeline 2 from the start of its first segment.
            let second = Lsn(8 * SEGMENT);
            archive
                .tails(
                    store,
                    TimelineId::FIRST,
                    LsnRange::new(second, SWITCH),
                    wal,
                    commits,
                )
                .await;
            archive
                .tails(store, second_timeline(), LsnRange::new(second, end), wal, commits)
                .await;
        }
        let first = LsnRange::new(START, Lsn(8 * SEGMENT));
        archive
            .tails(&archive.a, TimelineId::FIRST, first, wal, commits)
            .await;
        let key = layout().segment(
            SegmentName {
                timeline: TimelineId::FIRST,
                number: 7,
            },
            size(),
        );
        put(
            &archive.b,
            &key,
            container(Kind::Segment, TimelineId::FIRST, first, wal, commits),
        )
        .await;
        archive
    }

    pub(super) async fn tails(
        &self,
        store: &MemoryStore,
        timeline: TimelineId,
        range: LsnRange,
        wal: &[u8],
        commits: &[(Lsn, Time)],
    ) {
        let mut at = range.start;
        while at < range.end {
            let chunk = LsnRange::new(at, at.saturating_add(CHUNK).min(range.end));
            put(
                store,
                &layout().tail(timeline, chunk),
                container(Kind::Tail, timeline, chunk, wal, commits),
            )
            .await;
            at = chunk.end;
        }
    }

    pub(super) async fn documents(&self, store: &MemoryStore) {
        let identity = Identity {
            system_id: system_id(),
            server_version: 150_020,
            segment_size: size(),
            wal_block_size: 8192,
            block_size: 8192,
        };
        put(store, &layout().identity(), encode(&identity).unwrap()).await;
        let history = format!("1\t{SWITCH}\tno recovery target specified\n");
        put(store, &layout().history(second_timeline()), history.into_bytes()).await;
        let pulse = Pulse {
            timeline: second_timeline(),
            server_time: at("2026-11-20T15:22:40Z"),
            wal_end: self.end,
            durable_lsn: self.end,
            stored_lsn: self.end,
            last_commit: None,
            instance: "test".to_owned(),
            sequence: 1,
            quorum: None,
            interval_ms: None,
            waiting_ms: None,
            answered_at: None,
        };
        put(store, &layout().pulse(), encode(&pulse).unwrap()).await;
        let backup = backup();
        put(store, &layout().manifest(&backup.id), manifest(&backup.id)).await;
        put(store, &layout().backup(&backup.id), encode(&backup).unwrap()).await;
    }

    pub(super) fn regions(&self) -> Vec<Region> {
        vec![Region::over(self.a.clone()), Region::over(self.b.clone())]
    }

    pub(super) async fn catalog(&self) -> Catalog {
        read::read(&self.regions(), &"orders".parse().unwrap(), None)
            .await
            .unwrap()
    }

    pub(super) async fn plan(&self, request: &Request) -> Result<Plan, RestoreError> {
        locate::resolve(&mut self.catalog().await, &self.regions(), request).await
    }

    pub(super) async fn key_of(store: &MemoryStore, lsn: Lsn) -> String {
        let tails = highwater_store::list_all(store, &layout().tail_dir(TimelineId::FIRST), None)
            .await
            .unwrap();
        let holds = |key: &str| match layout().parse(key) {
            Some(highwater_format::Key::Tail(_, range)) => range.contains(lsn),
            _ => false,
        };
        tails
            .into_iter()
            .map(|meta| meta.key)
            .find(|key| holds(key))
            .unwrap()
    }
}

pub(super) fn manifest(id: &BackupId) -> Vec<u8> {
    encode(&Manifest {
        backup: id.clone(),
        packs: Vec::new(),
        entries: Vec::new(),
    })
    .unwrap()
}

pub(super) fn backup() -> Backup {
    let started_at = at("2026-11-20T15:22:29Z");
    let start_lsn = START.saturating_add(40);
    let id = BackupId::new(TimelineId::FIRST, start_lsn, started_at);
    Backup {
        manifest_crc32: crc32_hex(crc32fast::hash(&manifest(&id))),
        id,
        system_id: system_id(),
        server_version: 150_020,
        timeline: TimelineId::FIRST,
        start_lsn,
        stop_lsn: Lsn(0x70_1C08),
        stop_timeline: TimelineId::FIRST,
        started_at,
        finished_at: at("2026-11-20T15:22:30Z"),
        label: String::new(),
        tablespaces: Vec::new(),
        from_standby: false,
        files: 0,
        plain_bytes: 0,
        stored_bytes: 0,
        packs: 0,
        pg_manifest: false,
        codec: Codec::Zstd,
    }
}

pub(super) fn at(text: &str) -> Time {
    text.parse().unwrap()
}

pub(super) async fn put(store: &MemoryStore, key: &str, bytes: Vec<u8>) {
    store
        .put(key, Object::new(bytes), PutMode::Overwrite)
        .await
        .unwrap();
}

pub(super) fn container(
    kind: Kind,
    timeline: TimelineId,
    range: LsnRange,
    wal: &[u8],
    commits: &[(Lsn, Time)],
) -> Vec<u8> {
    let offset = |lsn: Lsn| usize::try_from(lsn.distance_from(START)).unwrap();
    let plain = &wal[offset(range.start)..offset(range.end)];
    let within = |(end, _): &&(Lsn, Time)| range.start < *end && *end <= range.end;
    let mut header = Header::wal(kind, Codec::Lz4, system_id(), timeline, range);
    header.first_commit = commits.iter().filter(within).map(|(_, time)| *time).min();
    header.last_commit = commits.iter().filter(within).map(|(_, time)| *time).max();
    header.sealed_at = at("2026-11-20T15:22:31Z");
    header.server_end = range.end;
    let frame = FrameEncoder::new(Codec::Lz4).encode(plain).unwrap();
    seal(header, &[frame]).unwrap().bytes.to_vec()
}
