//! Ends of timelines that are gone from a region: a listing that merely ends earlier is not a whole one.

use highwater_config::Exit;
use highwater_format::{Key, Lsn, LsnRange, TimelineId};
use highwater_store::{MemoryStore, Store, list_all};

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
