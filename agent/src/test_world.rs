//! An archive of three regions in memory for tests, with WAL whose bytes say where they are.

use std::sync::Arc;

use bytes::Bytes;
use highwater_config::Policy;
use highwater_format::coverage::{Piece, PieceKind};
use highwater_format::{
    ClusterName, Codec, FrameEncoder, Header, History, Identity, Kind, Lsn, LsnRange, SegmentName,
    SegmentSize, SystemId, TimelineId, seal,
};
use highwater_store::{ErrorKind, Fault, FaultyStore, MemoryStore, Object, PutMode, Rule};

use crate::budget::Budget;
use crate::frontier::Position;
use crate::places::Places;
use crate::progress::Progress;
use crate::region::{Archive, Region};
use crate::state::State;
use crate::uploader::Shared;
use crate::window::Window;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const SYSTEM: SystemId = SystemId(7);

/// Three regions in memory: the first is filled from the others.
pub(crate) struct World {
    pub(crate) shared: Shared,
    pub(crate) peers: Vec<Arc<Region>>,
    faulty: Vec<Arc<FaultyStore>>,
}

/// `policy` over the three.
pub(crate) fn world(policy: Policy) -> World {
    let names = ["a", "b", "c"];
    let faulty = names.map(|name| Arc::new(FaultyStore::new(Arc::new(MemoryStore::new(name)))));
    let regions: Vec<Arc<Region>> = names
        .into_iter()
        .zip(&faulty)
        .enumerate()
        .map(|(index, (name, store))| Arc::new(Region::bare(name, index, store.clone())))
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
        progress: Arc::new(Progress::new(policy, 3, state.clone())),
        state,
        uploads: 1,
        in_flight: MIB,
        server: History::root(TimelineId::FIRST),
        budget: Budget::new(64 * MIB),
        origin,
        acknowledged: None,
        kept_from: None,
        histories: Arc::from([]),
        places: Places::new("orders/7/", "this"),
    };
    World {
        shared,
        peers,
        faulty: faulty.to_vec(),
    }
}

impl World {
    pub(crate) fn region(&self, index: usize) -> &Region {
        &self.shared.archive.regions[index]
    }

    pub(crate) fn faulty(&self, index: usize) -> &FaultyStore {
        &self.faulty[index]
    }

    pub(crate) async fn put(&self, index: usize, key: &str, bytes: impl Into<Bytes>) {
        let put = self
            .region(index)
            .quick
            .put(key, Object::new(bytes), PutMode::Overwrite);
        put.await.unwrap();
    }

    /// Makes every call to a region fail from now on.
    pub(crate) fn silence(&self, index: usize) {
        self.faulty[index].inject(Rule::times(1_000, Fault::FailBefore(ErrorKind::Retry)));
    }

    pub(crate) async fn has(&self, index: usize, key: &str) -> bool {
        self.region(index).quick.head(key).await.is_ok()
    }

    pub(crate) fn key(&self, piece: Piece) -> String {
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
    pub(crate) async fn put_wal(&self, index: usize, piece: Piece) -> String {
        let kind = match piece.kind {
            PieceKind::Segment => Kind::Segment,
            PieceKind::Tail => Kind::Tail,
        };
        let header = Header::wal(kind, Codec::Lz4, SYSTEM, TimelineId::FIRST, piece.range);
        let plain = wal(piece.range);
        self.put(index, &self.key(piece), sealed(header, &plain)).await;
        self.key(piece)
    }

    pub(crate) async fn remove(&self, index: usize, key: &str) {
        self.region(index).quick.delete(key).await.unwrap();
    }

    pub(crate) async fn damage(&self, index: usize, key: &str) {
        let mut bytes = self.region(index).quick.get(key).await.unwrap().to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        self.put(index, key, bytes).await;
    }
}

/// Bytes that say where they are.
pub(crate) fn wal(range: LsnRange) -> Vec<u8> {
    (range.start.0..range.end.0)
        .map(|at| u8::try_from((at ^ (at >> 8)) % 251).unwrap())
        .collect()
}

pub(crate) fn sealed(header: Header, plain: &[u8]) -> Bytes {
    let mut encoder = FrameEncoder::new(header.codec);
    let frames: Vec<_> = plain
        .chunks(1 << 20)
        .map(|frame| encoder.encode(frame).unwrap())
        .collect();
    seal(header, &frames).unwrap().bytes
}

pub(crate) fn piece(kind: PieceKind, start: u64, end: u64) -> Piece {
    Piece {
        range: LsnRange::new(Lsn(start), Lsn(end)),
        kind,
        size: 10,
    }
}
