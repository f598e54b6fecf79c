use std::collections::BTreeMap;

use highwater_config::Policy;
use highwater_format::coverage::PieceKind;
use highwater_format::{Codec, Header, Kind, Lsn, Time, encode};

use super::*;
use crate::test_world::{MIB, SYSTEM, World, piece, sealed, world};

fn copier(world: &World) -> Copier<'_> {
    Copier {
        shared: &world.shared,
        region: world.region(0),
        peers: &world.peers,
    }
}

#[tokio::test]
async fn damaged_wal_is_taken_from_another_region_or_from_its_chunks() {
    let world = world(Policy::All);
    let segment = piece(PieceKind::Segment, MIB, 2 * MIB);
    let key = world.put_wal(1, segment).await;
    world.put_wal(2, segment).await;
    world.damage(1, &key).await;
    let done = copier(&world).wal(TimelineId::FIRST, segment, 0).await.unwrap();
    assert_eq!(done.copied.objects, 1);
    assert!(world.has(0, &key).await);

    // Damaged everywhere: the chunks of two regions do together, though one of them is damaged too.
    let segment = piece(PieceKind::Segment, 2 * MIB, 3 * MIB);
    for region in [1, 2] {
        let key = world.put_wal(region, segment).await;
        world.damage(region, &key).await;
    }
    let (early, late) = (
        piece(PieceKind::Tail, 2 * MIB, 2 * MIB + 700),
        piece(PieceKind::Tail, 2 * MIB + 700, 3 * MIB),
    );
    let key = world.put_wal(1, early).await;
    world.damage(1, &key).await;
    world.put_wal(2, early).await;
    world.put_wal(1, late).await;
    let done = copier(&world).wal(TimelineId::FIRST, segment, 0).await.unwrap();
    assert_eq!((done.copied.objects, done.damage), (2, vec![]));
    assert!(!world.has(0, &world.key(segment)).await);

    // Damaged everywhere and no chunks: nothing is written, and what is missing has a name.
    let segment = piece(PieceKind::Segment, 3 * MIB, 4 * MIB);
    let key = world.put_wal(1, segment).await;
    world.damage(1, &key).await;
    let done = copier(&world).wal(TimelineId::FIRST, segment, 0).await.unwrap();
    let [damage] = done.damage.as_slice() else {
        panic!("{:?}", done.damage)
    };
    assert_eq!((damage.range, done.copied.objects), (segment.range, 0));
    assert!(damage.to_string().contains("region b"), "{damage}");
    assert!(!world.has(0, &key).await);
    assert_eq!(world.shared.budget.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn copying_gives_way_when_new_wal_needs_the_memory() {
    let world = world(Policy::All);
    let never = std::future::pending::<Result<()>>();
    let budget = world.shared.budget.clone();
    let copier = copier(&world);
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
    let world = world(Policy::All);
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
    let error = copier(&world)
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
    let world = world(Policy::All);
    let layout = &world.shared.archive.layout;
    let id = put_backup(&world, &[1]).await;
    let nothing = Base::default();
    let error = copier(&world).backup(&id, &nothing, |_| {}).await.unwrap_err();
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
    let copied = copier(&world)
        .backup(&id, &held, |one| objects += one.objects)
        .await;
    copied.unwrap();
    assert_eq!(objects, 1, "only the commit mark was missing");
    assert!(world.has(0, &layout.backup(&id)).await);
}

#[tokio::test]
async fn a_damaged_pack_is_taken_from_the_region_that_has_it_whole() {
    let world = world(Policy::All);
    let layout = &world.shared.archive.layout;
    let id = put_backup(&world, &[1, 2]).await;
    world.put_wal(0, piece(PieceKind::Segment, MIB, 2 * MIB)).await;
    world.damage(1, &layout.pack(&id, 0)).await;
    let nothing = Base::default();
    copier(&world).backup(&id, &nothing, |_| {}).await.unwrap();
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
    let error = copier(&world).backup(&id, &held, |_| {}).await.unwrap_err();
    assert!(matches!(error, AgentError::Conflict { .. }), "{error}");
}

/// An upload that was cut off has left a part of a pack: this region's alone, and no reason to stop the agent.
#[tokio::test]
async fn what_is_left_of_a_pack_is_damage_and_no_contradiction() {
    let world = world(Policy::All);
    let layout = &world.shared.archive.layout;
    let id = put_backup(&world, &[1]).await;
    let key = layout.pack(&id, 0);
    let whole = world.region(1).quick.get(&key).await.unwrap();
    let part = whole.slice(..whole.len() / 2);
    world.put(0, &key, part.clone()).await;
    for packs in [BTreeMap::from([(0, part.len() as u64)]), BTreeMap::new()] {
        let held = Base {
            packs,
            ..Base::default()
        };
        let error = copier(&world).backup(&id, &held, |_| {}).await.unwrap_err();
        assert!(
            matches!(&error, AgentError::Object { region, .. } if region == "a"),
            "{error}"
        );
        assert_eq!(world.region(0).quick.get(&key).await.unwrap(), part);
    }
}
