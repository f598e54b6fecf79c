use std::collections::BTreeMap;
use std::sync::Arc;

use highwater_config::Policy;
use highwater_format::coverage::PieceKind;
use highwater_format::{
    ClusterName, Codec, FrameEncoder, Header, Identity, Kind, Lsn, SegmentName, SegmentSize, SystemId, Time,
    encode, seal,
};
use highwater_store::{MemoryStore, PutMode, Store};

use super::*;
use crate::frontier::Position;
use crate::places::Places;
use crate::progress::Progress;
use crate::region::Archive;
use crate::state::State;
use crate::window::Window;

const MIB: u64 = 1 << 20;
const SYSTEM: SystemId = SystemId(7);

/// Three regions in memory: the first is filled from the others.
struct World {
    shared: Shared,
    peers: Vec<Arc<Region>>,
}

fn world() -> World {
    let regions: Vec<Arc<Region>> = ["a", "b", "c"]
        .into_iter()
        .enumerate()
        .map(|(index, name)| {
            let store: Arc<dyn Store> = Arc::new(MemoryStore::new(name));
            Arc::new(Region {
                name: name.into(),
                index,
                store: store.clone(),
                quick: store,
            })
        })
        .collect();
    let segment_size = SegmentSize::new(MIB).unwrap();
    let identity = Identity {
        system_id: SYSTEM,
        server_version: 150_000,
        segment_size,
        wal_block_size: 8192,
        block_size: 8192,
    };
    let cluster: ClusterName = "orders".parse().unwrap();
    let origin = Position {
        timeline: TimelineId::FIRST,
        lsn: Lsn(MIB),
    };
    let state = State::new(regions.iter().map(|region| region.name.clone()));
    let peers = regions.iter().skip(1).cloned().collect();
    let shared = Shared {
        archive: Archive::new(cluster, identity, regions),
        segment_size,
        window: Arc::new(Window::new(3, MIB, origin)),
        progress: Arc::new(Progress::new(Policy::All, 3, state.clone())),
        state,
        uploads: 1,
        in_flight: MIB,
        server_timeline: TimelineId::FIRST,
        budget: Budget::new(64 * MIB),
        origin,
        acknowledged: None,
        histories: Arc::from([]),
        places: Places::new("orders/7/", "this"),
    };
    World { shared, peers }
}

impl World {
    fn copier(&self) -> Copier<'_> {
        Copier {
            shared: &self.shared,
            region: self.region(0),
            peers: &self.peers,
        }
    }

    fn region(&self, index: usize) -> &Region {
        &self.shared.archive.regions[index]
    }

    async fn put(&self, index: usize, key: &str, bytes: impl Into<Bytes>) {
        let put = self
            .region(index)
            .quick
            .put(key, Object::new(bytes), PutMode::Overwrite);
        put.await.unwrap();
    }

    async fn has(&self, index: usize, key: &str) -> bool {
        self.region(index).quick.head(key).await.is_ok()
    }

    fn key(&self, piece: Piece) -> String {
        let (layout, size) = (&self.shared.archive.layout, self.shared.segment_size);
        let timeline = TimelineId::FIRST;
        match piece.kind {
            PieceKind::Segment => {
                let number = size.segment_number(piece.range.start);
                layout.segment(SegmentName { timeline, number }, size)
            }
            PieceKind::Tail => layout.tail(timeline, piece.range),
        }
    }

    /// Stores WAL in one region, and returns its key.
    async fn put_wal(&self, index: usize, piece: Piece) -> String {
        let kind = match piece.kind {
            PieceKind::Segment => Kind::Segment,
            PieceKind::Tail => Kind::Tail,
        };
        let header = Header::wal(kind, Codec::Lz4, SYSTEM, TimelineId::FIRST, piece.range);
        let plain = wal(piece.range);
        self.put(index, &self.key(piece), sealed(header, &plain)).await;
        self.key(piece)
    }

    async fn damage(&self, index: usize, key: &str) {
        let mut bytes = self.region(index).quick.get(key).await.unwrap().to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        self.put(index, key, bytes).await;
    }
}

/// Bytes that say where they are.
fn wal(range: LsnRange) -> Vec<u8> {
    (range.start.0..range.end.0)
        .map(|at| u8::try_from((at ^ (at >> 8)) % 251).unwrap())
        .collect()
}

fn sealed(header: Header, plain: &[u8]) -> Bytes {
    let mut encoder = FrameEncoder::new(header.codec);
    let frames: Vec<_> = plain
        .chunks(1 << 20)
        .map(|frame| encoder.encode(frame).unwrap())
        .collect();
    seal(header, &frames).unwrap().bytes
}

fn piece(kind: PieceKind, start: u64, end: u64) -> Piece {
    Piece {
        range: LsnRange::new(Lsn(start), Lsn(end)),
        kind,
        size: 10,
    }
}

#[tokio::test]
async fn damaged_wal_is_taken_from_another_region_or_from_its_chunks() {
    let world = world();
    let segment = piece(PieceKind::Segment, MIB, 2 * MIB);
    let key = world.put_wal(1, segment).await;
    world.put_wal(2, segment).await;
    world.damage(1, &key).await;
    let copied = world.copier().wal(TimelineId::FIRST, segment, 0).await.unwrap();
    assert_eq!(copied.objects, 1);
    assert!(world.has(0, &key).await);

    // Damaged everywhere: the chunks of one region do.
    let segment = piece(PieceKind::Segment, 2 * MIB, 3 * MIB);
    for region in [1, 2] {
        let key = world.put_wal(region, segment).await;
        world.damage(region, &key).await;
    }
    let chunks = [
        piece(PieceKind::Tail, 2 * MIB, 2 * MIB + 700),
        piece(PieceKind::Tail, 2 * MIB + 700, 3 * MIB),
    ];
    for chunk in chunks {
        world.put_wal(2, chunk).await;
    }
    let copied = world.copier().wal(TimelineId::FIRST, segment, 0).await.unwrap();
    assert_eq!(copied.objects, 2);
    assert!(!world.has(0, &world.key(segment)).await);

    // Damaged everywhere and no chunks: nothing is written.
    let segment = piece(PieceKind::Segment, 3 * MIB, 4 * MIB);
    let key = world.put_wal(1, segment).await;
    world.damage(1, &key).await;
    let error = world
        .copier()
        .wal(TimelineId::FIRST, segment, 0)
        .await
        .unwrap_err();
    assert!(
        matches!(error, AgentError::Object { ref region, .. } if region == "b"),
        "{error}"
    );
    assert!(!world.has(0, &key).await);
    assert_eq!(world.shared.budget.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn copying_gives_way_when_new_wal_needs_the_memory() {
    let world = world();
    let never = std::future::pending::<Result<()>>();
    let budget = world.shared.budget.clone();
    let copier = world.copier();
    let held = copier.holding(MIB, never);
    let fill = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(budget.used(), MIB);
        budget.charge(64 * MIB)
    };
    let (gave_way, full) = tokio::join!(held, fill);
    assert!(matches!(gave_way, Err(AgentError::Trouble { .. })));
    assert_eq!(budget.used(), 64 * MIB, "the object is still charged");
    drop(full);
}

#[tokio::test]
async fn other_wal_under_the_same_key_is_a_conflict_and_stays() {
    let world = world();
    let segment = piece(PieceKind::Segment, MIB, 2 * MIB);
    let key = world.put_wal(1, segment).await;
    let header = Header::wal(
        Kind::Segment,
        Codec::Lz4,
        SYSTEM,
        TimelineId::FIRST,
        segment.range,
    );
    let other = sealed(header, &vec![7; usize::try_from(MIB).unwrap()]);
    world.put(0, &key, other.clone()).await;
    let error = world
        .copier()
        .wal(TimelineId::FIRST, segment, 0)
        .await
        .unwrap_err();
    assert!(matches!(error, AgentError::Conflict { .. }), "{error}");
    assert_eq!(world.region(0).quick.get(&key).await.unwrap(), other);
}

/// A base backup of one pack in regions `in_regions`, from 1 MiB + 40 to 1 MiB + 200.
async fn put_backup(world: &World, in_regions: &[usize]) -> BackupId {
    let layout = &world.shared.archive.layout;
    let (start, stop) = (Lsn(MIB + 40), Lsn(MIB + 200));
    let id = BackupId::new(TimelineId::FIRST, start, Time::from_unix_micros(1_000_000));
    let pack = sealed(
        Header::pack(Codec::Zstd, SYSTEM, TimelineId::FIRST, 0),
        b"the files",
    );
    let manifest = Manifest {
        backup: id.clone(),
        packs: vec![PackInfo {
            number: 0,
            plain_len: 9,
            stored_len: pack.len() as u64,
            crc32: format!("{:08x}", Object::new(pack.clone()).crc32),
        }],
        entries: vec![],
    };
    let manifest = encode(&manifest).unwrap();
    let backup = Backup {
        id: id.clone(),
        system_id: SYSTEM,
        server_version: 150_000,
        timeline: TimelineId::FIRST,
        start_lsn: start,
        stop_lsn: stop,
        stop_timeline: TimelineId::FIRST,
        started_at: Time::from_unix_micros(1_000_000),
        finished_at: Time::from_unix_micros(2_000_000),
        label: String::new(),
        tablespaces: vec![],
        from_standby: false,
        files: 0,
        plain_bytes: 9,
        stored_bytes: pack.len() as u64,
        packs: 1,
        manifest_crc32: format!("{:08x}", Object::new(manifest.clone()).crc32),
        pg_manifest: false,
        codec: Codec::Zstd,
    };
    for region in in_regions {
        world.put(*region, &layout.pack(&id, 0), pack.clone()).await;
        world.put(*region, &layout.manifest(&id), manifest.clone()).await;
        world
            .put(*region, &layout.backup(&id), encode(&backup).unwrap())
            .await;
    }
    id
}

#[tokio::test]
async fn a_base_backup_becomes_visible_only_where_its_wal_is() {
    let world = world();
    let layout = &world.shared.archive.layout;
    let id = put_backup(&world, &[1]).await;
    let nothing = Base::default();
    let error = world.copier().backup(&id, &nothing, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("its WAL"), "{error}");
    assert!(world.has(0, &layout.pack(&id, 0)).await && world.has(0, &layout.manifest(&id)).await);
    assert!(
        !world.has(0, &layout.backup(&id)).await,
        "visible without its WAL"
    );

    world.put_wal(0, piece(PieceKind::Segment, MIB, 2 * MIB)).await;
    let size = world
        .region(0)
        .quick
        .head(&layout.pack(&id, 0))
        .await
        .unwrap()
        .size;
    let held = Base {
        visible: false,
        manifest: true,
        packs: BTreeMap::from([(0, size)]),
    };
    let mut objects = 0;
    let copied = world
        .copier()
        .backup(&id, &held, |one| objects += one.objects)
        .await;
    copied.unwrap();
    assert_eq!(objects, 1, "only the commit mark was missing");
    assert!(world.has(0, &layout.backup(&id)).await);
}

#[tokio::test]
async fn a_damaged_pack_is_taken_from_the_region_that_has_it_whole() {
    let world = world();
    let layout = &world.shared.archive.layout;
    let id = put_backup(&world, &[1, 2]).await;
    world.put_wal(0, piece(PieceKind::Segment, MIB, 2 * MIB)).await;
    world.damage(1, &layout.pack(&id, 0)).await;
    let nothing = Base::default();
    world.copier().backup(&id, &nothing, |_| {}).await.unwrap();
    let (ours, whole) = (
        world.region(0).quick.get(&layout.pack(&id, 0)).await.unwrap(),
        world.region(2).quick.get(&layout.pack(&id, 0)).await.unwrap(),
    );
    assert_eq!(ours, whole);

    // A pack of another size under the same name is somebody else's.
    let held = Base {
        visible: true,
        manifest: true,
        packs: BTreeMap::from([(0, 3)]),
    };
    let error = world.copier().backup(&id, &held, |_| {}).await.unwrap_err();
    assert!(matches!(error, AgentError::Conflict { .. }), "{error}");
}
