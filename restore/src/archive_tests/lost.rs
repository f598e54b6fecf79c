//! Ends of timelines that are gone from a region: a listing that merely ends earlier is not a whole one.

use std::sync::Arc;

use highwater_config::Exit;
use highwater_format::{Key, Lsn, LsnRange, TimelineId, Writer, encode};
use highwater_store::{MemoryStore, Store, list_all};

use crate::catalog::read;
use crate::list;
use crate::regions::Region;
use crate::target::Request;
use crate::verify::{self, Verified};

use super::archive::*;

/// Removes the chunks of a timeline that begin in `range`.
async fn lose(store: &MemoryStore, timeline: TimelineId, range: LsnRange) {
    let directory = layout().tail_dir(timeline);
    for meta in list_all(store, &directory, None).await.unwrap() {
        if matches!(layout().parse(&meta.key), Some(Key::Tail(_, held)) if range.contains(held.start)) {
            store.delete(&meta.key).await.unwrap();
        }
    }
}

async fn verified(archive: &Archive) -> Verified {
    verify::verify(&archive.catalog().await, &archive.regions(), 4).await
}

#[tokio::test]
async fn verify_misses_the_end_of_a_timeline_that_another_one_left() {
    let archive = Archive::whole().await;
    let switch_segment = LsnRange::new(Lsn(8 * SEGMENT), SWITCH);
    lose(&archive.a, TimelineId::FIRST, switch_segment).await;
    let found = verified(&archive).await;
    assert_eq!(found.exit(), Exit::Done, "the next timeline has a copy: {found}");

    let last = Lsn(0x7F_0000);
    lose(&archive.a, TimelineId::FIRST, LsnRange::new(last, SWITCH)).await;
    let found = verified(&archive).await;
    assert_eq!((found.exit(), found.missing.len()), (Exit::No, 1), "{found}");
    let missing = &found.missing[0];
    assert_eq!(missing.region, "a");
    assert!(
        missing.what.contains("0/800000)") && missing.problem.contains("region b has it"),
        "{found}"
    );
}

#[tokio::test]
async fn verify_misses_a_timeline_of_which_a_region_has_lost_everything() {
    let archive = Archive::whole().await;
    let everything = LsnRange::new(Lsn::ZERO, Lsn::MAX);
    lose(&archive.b, second_timeline(), everything).await;
    let range = LsnRange::new(SWITCH, archive.end).to_string();
    // Whether its history is left or not.
    for store in [None, Some(&archive.b)] {
        if let Some(store) = store {
            store.delete(&layout().history(second_timeline())).await.unwrap();
        }
        let found = verified(&archive).await;
        assert_eq!(found.exit(), Exit::No, "{found}");
        let mut missing = found.missing.iter();
        assert!(
            missing.any(|missing| missing.region == "b" && missing.what.contains(&range)),
            "{found}"
        );
    }
}

/// A server made from a base backup of timeline 5 has no older history, and nothing of timeline 4 was ever archived.
#[tokio::test]
async fn an_ancestor_of_which_nothing_was_archived_is_nothing_lost() {
    let archive = Archive::whole().await;
    let five = TimelineId::new(5).unwrap();
    let end = archive.end;
    let history = format!("1\t{SWITCH}\tx\n\n2\t{end}\tx\n\n4\t{end}\tx\n");
    for store in [&archive.a, &archive.b] {
        put(store, &layout().history(five), history.clone().into_bytes()).await;
    }
    let found = verified(&archive).await;
    assert_eq!(found.exit(), Exit::Done, "{found}");
    assert!(found.lost.is_empty() && found.notes.is_empty(), "{found}");
    let mut catalog = archive.catalog().await;
    let listing = list::list(&mut catalog, &archive.regions()).await.unwrap();
    assert_eq!(listing.problems, Vec::<String>::new());
    let plan = archive.plan(&Request::latest()).await.unwrap();
    assert_eq!((plan.timeline, plan.wal.end), (five, end));
}

/// Everything is there but the marks without which no base backup is one.
#[tokio::test]
async fn verify_says_that_nothing_can_be_restored_without_a_finished_base_backup() {
    let archive = Archive::whole().await;
    for store in [&archive.a, &archive.b] {
        store.delete(&layout().backup(&backup().id)).await.unwrap();
    }
    let found = verified(&archive).await;
    assert_eq!(found.exit(), Exit::No, "{found}");
    assert!(found.to_string().contains("NOTHING can be restored"), "{found}");
}

#[tokio::test]
async fn verify_reads_the_claims_of_writers() {
    let archive = Archive::whole().await;
    let writer = |epoch| Writer {
        epoch,
        instance: "x".to_owned(),
        host: "db1".to_owned(),
        pid: 1,
        timeline: TimelineId::FIRST,
        claimed_at: at("2026-11-20T15:22:40Z"),
        begins: None,
        machine: None,
        interval_ms: None,
    };
    let key = layout().writer(1);
    put(&archive.a, &key, encode(&writer(1)).unwrap()).await;
    let found = verified(&archive).await;
    assert_eq!(found.exit(), Exit::Done, "{found}");

    let mut flipped = encode(&writer(1)).unwrap();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for bytes in [flipped, encode(&writer(2)).unwrap()] {
        put(&archive.b, &key, bytes).await;
        let found = verified(&archive).await;
        assert_eq!((found.exit(), found.damage.len()), (Exit::No, 1), "{found}");
        let damage = &found.damage[0];
        assert_eq!((damage.region.as_str(), &damage.what), ("b", &key), "{found}");
    }
}

/// One region's copy is bad, and the other's is what a restore reads.
#[tokio::test]
async fn verify_speaks_of_a_damaged_manifest_in_its_own_region() {
    let archive = Archive::whole().await;
    let key = layout().manifest(&backup().id);
    let hurt = async |store: &MemoryStore| {
        let mut bytes = store.get(&key).await.unwrap().to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        put(store, &key, bytes).await;
    };
    hurt(&archive.a).await;
    let found = verified(&archive).await;
    assert_eq!((found.exit(), found.damage.len()), (Exit::No, 1), "{found}");
    let damage = &found.damage[0];
    assert_eq!((damage.region.as_str(), &damage.what), ("a", &key));
    assert!(damage.problem.contains("that of region b"), "{found}");
    assert!(!damage.problem.contains("no region has a good copy"), "{found}");

    hurt(&archive.b).await;
    let found = verified(&archive).await;
    assert_eq!(found.damage.len(), 2, "{found}");
    let everywhere = |problem: &verify::Problem| problem.problem.contains("no region has a good copy");
    assert!(found.damage.iter().all(everywhere), "{found}");
    assert!(
        !found.to_string().contains("run `highwater-restore verify`"),
        "{found}"
    );
}

/// Waiting for a region that answers helps nobody.
#[tokio::test]
async fn an_identity_that_every_region_has_lost_is_no_matter_of_patience() {
    let archive = Archive::whole().await;
    let cluster = || "orders".parse().unwrap();
    archive.a.delete(&layout().identity()).await.unwrap();
    let mut regions = archive.regions();
    regions[1] = Region::over(Arc::new(MemoryStore::new("b")));
    let error = read::read(&regions, &cluster(), None).await.unwrap_err();
    assert_eq!(error.exit(), Exit::Trouble, "b may not be mounted: {error}");
    assert!(error.to_string().contains("when region b answers"), "{error}");

    archive.b.delete(&layout().identity()).await.unwrap();
    let error = read::read(&archive.regions(), &cluster(), None)
        .await
        .unwrap_err();
    assert_eq!(error.exit(), Exit::Damage, "{error}");
    assert!(error.to_string().contains("highwater-agent run"), "{error}");
}
