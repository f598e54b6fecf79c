//! The packer against a simple model: what went in must come out of the extents, in every region.

use std::time::Duration;

use highwater_format::codec::Codec;
use highwater_format::container::Object as Container;
use highwater_format::layout::ClusterName;
use highwater_format::{Lsn, SystemId, Time, TimelineId};
use highwater_store::{MemoryStore, Store};
use proptest::prelude::*;

use super::*;
use crate::region::Region;

const PACK: u64 = 3 << 20;

fn region(index: usize, store: Arc<dyn Store>) -> Arc<Region> {
    Arc::new(Region::bare(format!("region-{index}"), index, store))
}

fn settings(pack_size: u64, memory: u64, codec: Codec) -> PackSettings {
    let system_id = SystemId(7);
    let timeline = TimelineId::FIRST;
    PackSettings {
        backup: BackupId::new(timeline, Lsn(0x200_0028), Time::UNIX_EPOCH),
        layout: Layout::new("orders".parse::<ClusterName>().unwrap(), system_id),
        header: Header::pack(codec, system_id, timeline, 0),
        pack_size,
        threads: 2,
        memory,
    }
}

/// Content that compresses a little and never repeats at the same place.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        u8::try_from(state >> 60).unwrap()
    };
    (0..len).map(|_| next()).collect()
}

async fn read_back(store: &dyn Store, settings: &PackSettings, packs: &[PackInfo]) -> Vec<Vec<u8>> {
    let mut plain = Vec::new();
    for (number, info) in packs.iter().enumerate() {
        assert_eq!(info.number as usize, number);
        let bytes = store
            .get(&settings.layout.pack(&settings.backup, info.number))
            .await
            .unwrap();
        assert_eq!(info.stored_len, bytes.len() as u64);
        assert_eq!(info.crc32, format!("{:08x}", Object::new(bytes.clone()).crc32));
        let object = Container::open(bytes).unwrap();
        assert_eq!(object.header().start, u64::from(info.number));
        plain.push(object.plain().unwrap());
        assert_eq!(plain[number].len() as u64, info.plain_len);
    }
    plain
}

async fn round_trip(pieces: Vec<Vec<u8>>, pack_size: u64, codec: Codec) {
    let stores = [Arc::new(MemoryStore::new("a")), Arc::new(MemoryStore::new("b"))];
    let regions = [region(0, stores[0].clone()), region(1, stores[1].clone())];
    let targets = Arc::new(Targets::new(&regions, 2, Duration::from_secs(5)));
    let mut packs = Packs::new(settings(pack_size, 0, codec), targets, Progress::new()).unwrap();
    let mut extents = Vec::new();
    for piece in &pieces {
        let mut of_piece = Vec::new();
        packs.append(piece, |extent| of_piece.push(extent)).await.unwrap();
        extents.push(of_piece);
    }
    let infos = packs.finish().await.unwrap();
    let settings = settings(pack_size, 0, codec);
    for store in &stores {
        let plain = read_back(&**store, &settings, &infos).await;
        for (piece, extents) in pieces.iter().zip(&extents) {
            let mut found = Vec::new();
            for Extent { pack, offset, len } in extents {
                let from = usize::try_from(*offset).unwrap();
                found.extend_from_slice(&plain[*pack as usize][from..from + usize::try_from(*len).unwrap()]);
            }
            assert!(found == *piece);
        }
        // No byte lies anywhere that no extent names.
        let total: usize = plain.iter().map(Vec::len).sum();
        assert_eq!(total, pieces.iter().map(Vec::len).sum::<usize>());
        assert!(infos.iter().rev().skip(1).all(|pack| pack.plain_len == pack_size));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_piece_comes_back_from_its_extents(
        lengths in prop::collection::vec(prop_oneof![0usize..40_000, 500_000usize..3_000_000], 0..8),
        pack_size in prop::sample::select(vec![1 << 20, 1_500_000, PACK]),
        codec in prop::sample::select(vec![Codec::None, Codec::Lz4, Codec::Zstd]),
    ) {
        let pieces = lengths.iter().enumerate().map(|(seed, len)| content(seed as u64, *len)).collect();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(round_trip(pieces, pack_size, codec));
    }
}

#[tokio::test]
async fn nothing_makes_no_pack() {
    round_trip(vec![], PACK, Codec::Zstd).await;
    round_trip(vec![vec![], vec![]], PACK, Codec::Zstd).await;
}

/// A region that holds every put until it is let go.
#[derive(Debug)]
struct Gate {
    inner: MemoryStore,
    open: Semaphore,
}

#[async_trait::async_trait]
impl Store for Gate {
    fn region(&self) -> &str {
        self.inner.region()
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
    async fn put(
        &self,
        key: &str,
        object: Object,
        mode: highwater_store::PutMode,
    ) -> Result<highwater_store::Put, highwater_store::StoreError> {
        let _pass = self.open.acquire().await.unwrap();
        self.inner.put(key, object, mode).await
    }
    async fn get(&self, key: &str) -> Result<bytes::Bytes, highwater_store::StoreError> {
        self.inner.get(key).await
    }
    async fn get_range(
        &self,
        key: &str,
        range: std::ops::Range<u64>,
    ) -> Result<bytes::Bytes, highwater_store::StoreError> {
        self.inner.get_range(key, range).await
    }
    async fn head(&self, key: &str) -> Result<highwater_store::Meta, highwater_store::StoreError> {
        self.inner.head(key).await
    }
    async fn list(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        max: usize,
    ) -> Result<highwater_store::Page, highwater_store::StoreError> {
        self.inner.list(prefix, start_after, max).await
    }
    async fn delete(&self, key: &str) -> Result<(), highwater_store::StoreError> {
        self.inner.delete(key).await
    }
}

fn gate() -> Arc<Gate> {
    Arc::new(Gate {
        inner: MemoryStore::new("slow"),
        open: Semaphore::new(0),
    })
}

#[tokio::test]
async fn a_slow_region_stops_the_reader_at_the_memory_bound_and_no_earlier() {
    let gate = gate();
    let targets = Arc::new(Targets::new(
        &[region(0, gate.clone())],
        1,
        Duration::from_secs(3600),
    ));
    let memory = 8 << 20;
    let mut packs = Packs::new(settings(1 << 20, memory, Codec::None), targets, Progress::new()).unwrap();
    let piece = vec![7; 1 << 20];
    let mut taken = 0;
    // Incompressible by choice of codec: what is taken is what is held. However long the pieces before it take, only the one
    // that finds no room takes for ever.
    while let Ok(appended) = tokio::time::timeout(Duration::from_secs(2), packs.append(&piece, |_| ())).await
    {
        appended.unwrap();
        taken += piece.len() as u64;
    }
    assert!(taken > memory - (3 << 20) && taken <= memory, "{taken}");
    gate.open.add_permits(64);
    let stored: u64 = packs
        .finish()
        .await
        .unwrap()
        .iter()
        .map(|pack| pack.plain_len)
        .sum();
    assert!(stored >= taken);
}

#[tokio::test]
async fn a_region_that_hangs_is_given_up_and_the_policy_decides() {
    for (needed, good) in [(1, true), (2, false)] {
        let fast = Arc::new(MemoryStore::new("fast"));
        let regions = [region(0, fast), region(1, gate())];
        let targets = Arc::new(Targets::new(&regions, needed, Duration::from_millis(200)));
        let mut packs = Packs::new(settings(PACK, 0, Codec::Lz4), targets.clone(), Progress::new()).unwrap();
        packs.append(&content(1, 100_000), |_| ()).await.unwrap();
        let result = packs.finish().await;
        assert_eq!(result.is_ok(), good, "{result:?}");
        assert_eq!(targets.lost()[0].0, "region-1");
        assert!(targets.lost()[0].1.contains("could not be stored"));
    }
}
