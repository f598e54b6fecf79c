//! Objects that are damaged in every region: what else holds the same WAL is planned with, and what nothing holds is
//! named before anything is done.

use highwater_config::Exit;
use highwater_format::{Kind, Lsn, LsnRange, SegmentName, TimelineId};
use highwater_store::{ErrorKind, Fault, FaultyStore, MemoryStore, Operation, Rule, Store, list_all};

use crate::{
    catalog::read,
    error::RestoreError,
    list, locate,
    plan::{Reason, Refusal},
    regions::Access,
    target::{Request, Target},
    verify,
};

use super::archive::*;
use super::{assert_stops_at, recovery_lsn};

const DAMAGED: LsnRange = LsnRange {
    start: START,
    end: Lsn(8 * SEGMENT),
};

fn segment_key() -> String {
    let name = SegmentName {
        timeline: TimelineId::FIRST,
        number: 7,
    };
    layout().segment(name, size())
}

async fn hurt(store: &MemoryStore, key: &str) {
    let mut bytes = store.get(key).await.unwrap().to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    put(store, key, bytes).await;
}

async fn last_chunk(store: &MemoryStore) -> String {
    let directory = layout().tail_dir(second_timeline());
    let all = list_all(store, &directory, None).await.unwrap();
    all.last().unwrap().key.clone()
}

/// The first segment is damaged in both regions; region `a` also has its chunks.
async fn damaged() -> Archive {
    let archive = Archive::whole().await;
    let (wal, commits) = wal();
    let segment = container(Kind::Segment, TimelineId::FIRST, DAMAGED, &wal, &commits);
    put(&archive.a, &segment_key(), segment).await;
    for store in [&archive.a, &archive.b] {
        hurt(store, &segment_key()).await;
    }
    archive
}

fn refusal(error: RestoreError) -> Refusal {
    match error {
        RestoreError::Refused(refusal) => *refusal,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn the_chunks_of_a_segment_that_is_damaged_everywhere_are_planned_with() {
    let archive = damaged().await;
    for line in lines().into_iter().filter(|line| line.xid.is_some()) {
        let request = Request::to(Target::Xid(line.xid.unwrap()));
        let mut catalog = archive.catalog().await;
        let plan = locate::resolve(&mut catalog, &archive.regions(), &request)
            .await
            .unwrap();
        assert_stops_at(&plan, &line);
        let need = plan.need(&catalog, plan.segments().next().unwrap()).unwrap();
        assert!(need.pieces.len() > 100, "{} objects", need.pieces.len());
        assert!(need.pieces.iter().all(|piece| piece.key != segment_key()));
        assert!(
            plan.notes
                .iter()
                .any(|note| note.contains(&segment_key()) && note.contains("are used")),
            "{:?}",
            plan.notes
        );
    }
}

#[tokio::test]
async fn what_nothing_holds_is_refused_with_its_range_and_can_be_restored_up_to() {
    let archive = damaged().await;
    let place = Lsn(0x71_0000);
    archive
        .a
        .delete(&Archive::key_of(&archive.a, place).await)
        .await
        .unwrap();
    let late = lines().into_iter().rfind(|line| line.xid.is_some()).unwrap();
    let request = Request::to(Target::Xid(late.xid.unwrap()));
    let refused = refusal(archive.plan(&request).await.unwrap_err());
    assert_eq!(refused.exit, Exit::Damage);
    let Reason::NotFound { missing } = &refused.reason else {
        panic!("{refused}")
    };
    assert!(
        matches!(missing.as_slice(), [one] if one.range.contains(place) && one.damaged.is_some()),
        "{refused}"
    );
    for part in [segment_key(), "a: ".into(), "b: ".into(), "intact version".into()] {
        assert!(refused.to_string().contains(&part), "{part}: {refused}");
    }
    let behind = Request::to(Target::Lsn(Lsn(0x71_6E78)));
    let refused = refusal(archive.plan(&behind).await.unwrap_err());
    let Reason::Hole { range, damaged, .. } = &refused.reason else {
        panic!("{refused}")
    };
    assert!(
        range.contains(place) && range.len() == CHUNK && damaged.is_some(),
        "{refused}"
    );
    assert_eq!(refused.exit, Exit::Damage);
    // As the message says.
    let edge = archive
        .plan(&Request::to(Target::Lsn(range.start)))
        .await
        .unwrap();
    assert!(edge.target.stop.lsn <= range.start && recovery_lsn(&edge).is_some());
    assert!(edge.wal.end <= range.start);
}

#[tokio::test]
async fn damage_at_the_end_is_not_the_end() {
    let archive = Archive::whole().await;
    for store in [&archive.a, &archive.b] {
        // No pulse vouches for it any more.
        store.delete(&layout().pulse()).await.unwrap();
        hurt(store, &last_chunk(store).await).await;
    }
    let refused = refusal(archive.plan(&Request::latest()).await.unwrap_err());
    let Reason::Hole { range, damaged, .. } = &refused.reason else {
        panic!("{refused}")
    };
    assert!(range.end == archive.end && damaged.is_some(), "{refused}");
}

#[tokio::test]
async fn damage_is_not_proven_while_a_region_is_silent() {
    let archive = damaged().await;
    archive
        .a
        .delete(&Archive::key_of(&archive.a, Lsn(0x71_0000)).await)
        .await
        .unwrap();
    let mut regions = archive.regions();
    let faulty = std::sync::Arc::new(FaultyStore::new(archive.b.clone()));
    let mut catalog = archive.catalog().await;
    let kind = ErrorKind::Operator;
    let rule = Rule::times(1_000, Fault::FailBefore(kind));
    faulty.inject(rule);
    regions[1] = crate::regions::Region::over(faulty);
    let request = Request::to(Target::Xid(999));
    let error = locate::resolve(&mut catalog, &regions, &request)
        .await
        .unwrap_err();
    assert_eq!(error.exit(), Exit::Trouble, "{error}");
}

#[tokio::test]
async fn verify_says_what_else_holds_damaged_wal_and_what_is_lost() {
    let archive = damaged().await;
    let found = verify::verify(&archive.catalog().await, &archive.regions(), 4).await;
    let of = |region: &str| {
        let mut all = found.damage.iter().filter(|problem| problem.region == region);
        all.next().unwrap().problem.clone()
    };
    assert!(of("a").contains("its chunks here hold"), "{found}");
    assert!(of("b").contains("region a has it"), "{found}");
    assert!(found.lost.is_empty(), "{found}");

    let key = Archive::key_of(&archive.a, Lsn(0x71_0000)).await;
    hurt(&archive.a, &key).await;
    let found = verify::verify(&archive.catalog().await, &archive.regions(), 4).await;
    assert_eq!((found.exit(), found.lost.len()), (Exit::No, 1), "{found}");
    let lost = &found.lost[0];
    let Some(highwater_format::Key::Tail(_, range)) = layout().parse(&key) else {
        panic!("{key}")
    };
    assert!(lost.what.contains(&range.to_string()), "{found}");
    assert!(
        lost.problem.contains("no base backup lies behind it yet"),
        "{found}"
    );
}

/// Nothing that was read holds the WAL of a damaged object. While a region or an object of it could not be read, that is no loss:
/// it may be there.
#[tokio::test]
async fn verify_calls_nothing_lost_beside_what_it_could_not_read() {
    let archive = damaged().await;
    let key = Archive::key_of(&archive.a, Lsn(0x71_0000)).await;
    hurt(&archive.a, &key).await;
    let of_both = verify::verify(&archive.catalog().await, &archive.regions(), 4).await;
    assert_eq!(
        of_both.lost.len(),
        1,
        "nothing is lost: this proves nothing: {of_both}"
    );

    let silent = |rule: Rule| {
        let store = FaultyStore::new(archive.b.clone());
        store.inject(rule);
        Access::Store(std::sync::Arc::new(store))
    };
    let failing = || Rule::times(1_000, Fault::FailBefore(ErrorKind::Operator));
    let failed = Access::Failed {
        error: "connection refused".to_owned(),
        kind: ErrorKind::Retry,
    };
    // As the catalog found it, and as it turned out behind the catalog: all of it, its listing, or a single object.
    for (access, at_first) in [
        (failed, true),
        (Access::LeftOut, true),
        (silent(failing()), false),
        (silent(failing().on(Operation::List)), false),
        (silent(failing().key(segment_key())), false),
    ] {
        let case = format!("{access:?}");
        let mut regions = archive.regions();
        regions[1].access = access;
        let seen = if at_first { &regions } else { &archive.regions() };
        let catalog = read::read(seen, &"orders".parse().unwrap(), None).await.unwrap();
        let found = verify::verify(&catalog, &regions, 4).await;
        assert!(found.lost.is_empty(), "{case}: {found}");
        assert!(!found.to_string().contains("LOST"), "{case}: {found}");
        let told = found.damage.iter().find(|problem| problem.what == key).unwrap();
        assert!(
            told.problem
                .ends_with("nothing else that was read holds all of it; what could not be read may"),
            "{case}: {found}"
        );
        assert_eq!(found.exit(), Exit::No, "{case}: the damage is there: {found}");
    }
}

#[tokio::test]
async fn list_shows_what_is_left_when_headers_are_damaged() {
    let archive = Archive::whole().await;
    let last = last_chunk(&archive.a).await;
    for store in [&archive.a, &archive.b] {
        let mut bytes = store.get(&last).await.unwrap().to_vec();
        bytes[20] ^= 1;
        put(store, &last, bytes).await;
    }
    let listing = list::list(&mut archive.catalog().await, &archive.regions())
        .await
        .unwrap();
    let window = listing
        .windows
        .iter()
        .find(|line| line.timeline == second_timeline())
        .unwrap();
    assert!(
        window.to < archive.end && window.end.contains("is damaged"),
        "{listing}"
    );
    assert!(
        listing.problems.iter().any(|problem| problem.contains(&last)),
        "{listing}"
    );
}
