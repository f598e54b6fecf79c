//! The read-only half over an archive in memory that holds WAL PostgreSQL 15 wrote, against what `pg_waldump` says of
//! it. Region `a` holds the first segment as tail chunks, region `b` as a segment object; the second segment is where
//! timeline 2 leaves timeline 1, in the middle of a page.

mod archive;
mod clocks;
mod damage;
mod lost;
mod odd;
mod packs;
mod straddle;

use highwater_config::Exit;
use highwater_format::{History, Kind, Lsn, LsnRange, TimelineId};
use highwater_store::{ErrorKind, Store};

use crate::{
    catalog::read,
    error::RestoreError,
    list, locate,
    plan::{Plan, Reason},
    regions::Access,
    target::{Action, Request, Target},
    verify,
};

use archive::*;

fn recovery_lsn(plan: &Plan) -> Option<Lsn> {
    let setting = plan
        .target
        .settings
        .iter()
        .find(|(name, _)| *name == "recovery_target_lsn");
    setting.map(|(_, value)| value.parse().unwrap())
}

/// PostgreSQL stops at the first record that begins at or after the LSN: that must be this one.
fn assert_stops_at(plan: &Plan, line: &Line) {
    let lsn = recovery_lsn(plan).unwrap();
    assert!(
        line.prev < lsn && lsn <= line.lsn,
        "{lsn} does not lead to the record at {} (previous {})",
        line.lsn,
        line.prev
    );
}

#[tokio::test]
async fn the_catalog_sees_both_regions_alike() {
    let catalog = Archive::whole().await.catalog().await;
    assert_eq!(catalog.findings, []);
    assert_eq!(
        catalog.timelines().into_iter().collect::<Vec<_>>(),
        [TimelineId::FIRST, second_timeline()]
    );
    for region in [0, 1] {
        assert_eq!(
            catalog.coverage(TimelineId::FIRST, &[region]).runs(),
            [LsnRange::new(START, SWITCH)]
        );
    }
    assert_eq!(
        catalog
            .history(second_timeline())
            .unwrap()
            .switch_of(TimelineId::FIRST),
        Some(SWITCH)
    );
    assert_eq!(catalog.regions[0].backups.len(), 1);
}

#[tokio::test]
async fn every_time_keeps_what_pg_waldump_says_was_over() {
    let archive = Archive::whole().await;
    let ends = transaction_ends();
    for (index, (line, time)) in ends.iter().enumerate() {
        let just_before = time.saturating_sub(std::time::Duration::from_micros(1));
        let inclusive = archive.plan(&Request::to(Target::Time(*time))).await.unwrap();
        assert_stops_at(&inclusive, line);
        assert_eq!(inclusive.target.stop.last_commit, Some(*time));
        // PostgreSQL does not tell the time of a record that is its target.
        let behind_it = archive.plan(&Request::to(Target::Lsn(line.lsn))).await.unwrap();
        assert_eq!(behind_it.target.stop.last_commit, Some(*time));
        let exclusive = Request {
            exclusive: true,
            ..Request::to(Target::Time(*time))
        };
        for request in [exclusive, Request::to(Target::Time(just_before))] {
            let plan = archive.plan(&request).await.unwrap();
            match index.checked_sub(1).and_then(|before| ends.get(before)) {
                Some((before, _)) => assert_stops_at(&plan, before),
                None => assert_eq!(recovery_lsn(&plan), None, "nothing but the backup itself"),
            }
        }
    }
}

#[tokio::test]
async fn an_idle_stretch_is_proven_by_the_pulse() {
    let archive = Archive::whole().await;
    let (last, time) = transaction_ends().pop().unwrap();
    let idle = archive
        .plan(&Request::to(Target::Time(at("2026-11-20T15:22:39Z"))))
        .await
        .unwrap();
    assert_stops_at(&idle, &last);
    assert_eq!(idle.target.stop.last_commit, Some(time));
    let error = archive
        .plan(&Request::to(Target::Time(at("2026-11-20T15:22:41Z"))))
        .await
        .unwrap_err();
    assert_eq!(error.exit(), Exit::No);
    assert!(
        error
            .to_string()
            .contains("nothing is proven after 2026-11-20T15:22:40"),
        "{error}"
    );
}

#[tokio::test]
async fn transactions_and_restore_points_are_found() {
    let archive = Archive::whole().await;
    for line in lines().into_iter().filter(|line| line.xid.is_some()) {
        let request = Request::to(Target::Xid(line.xid.unwrap()));
        assert_stops_at(&archive.plan(&request).await.unwrap(), &line);
        let before = archive
            .plan(&Request {
                exclusive: true,
                ..request
            })
            .await
            .unwrap();
        assert_stops_at(&before, &line);
        assert!(
            before
                .target
                .settings
                .contains(&("recovery_target_inclusive", "false".to_owned()))
        );
    }
    let point = archive
        .plan(&Request::to(Target::Name("before the release".to_owned())))
        .await
        .unwrap();
    let line = lines()
        .into_iter()
        .find(|line| line.lsn == Lsn(0x71_6E78))
        .unwrap();
    assert_stops_at(&point, &line);
    let error = archive
        .plan(&Request::to(Target::Name("never".to_owned())))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, RestoreError::Refused(refusal)
            if refusal.reason == Reason::NotFound { missing: vec![] }),
        "{error}"
    );
}

#[tokio::test]
async fn an_lsn_stops_behind_the_record_that_begins_there() {
    let archive = Archive::whole().await;
    for line in lines().into_iter().filter(|line| line.lsn > backup().stop_lsn) {
        let plan = archive.plan(&Request::to(Target::Lsn(line.lsn))).await.unwrap();
        assert_eq!(recovery_lsn(&plan), Some(line.lsn));
        assert!(plan.target.stop.lsn > line.lsn);
        let before = archive
            .plan(&Request {
                exclusive: true,
                ..Request::to(Target::Lsn(line.lsn))
            })
            .await
            .unwrap();
        assert!(line.prev < before.target.stop.lsn && before.target.stop.lsn <= line.lsn);
    }
    let end = archive
        .plan(&Request::to(Target::Lsn(archive.end)))
        .await
        .unwrap();
    assert_eq!(end.target.stop.lsn, LAST_END);
    assert!(
        recovery_lsn(&end).unwrap() < archive.end,
        "no record begins at the end"
    );
}

#[tokio::test]
async fn the_end_is_that_of_timeline_2_through_both_timelines() {
    let archive = Archive::whole().await;
    let plan = archive.plan(&Request::latest()).await.unwrap();
    assert_eq!(
        (plan.timeline, plan.target.stop.lsn),
        (second_timeline(), LAST_END)
    );
    let names: Vec<String> = plan.segments().map(|segment| segment.to_string(size())).collect();
    assert_eq!(names, ["000000010000000000000007", "000000020000000000000008"]);
    // One segment object instead of two hundred chunks, though only the second region has it.
    let need = plan
        .need(&archive.catalog().await, plan.segments().next().unwrap())
        .unwrap();
    assert_eq!(
        (need.pieces.len(), need.pieces[0].regions.as_slice()),
        (1, [1].as_slice())
    );
}

#[tokio::test]
async fn each_region_covers_for_the_other() {
    let archive = Archive::whole().await;
    let lost = Archive::key_of(&archive.a, Lsn(0x71_0000)).await;
    archive.a.delete(&lost).await.unwrap();
    assert!(archive.plan(&Request::latest()).await.is_ok());
    let alone = &archive.regions()[..1];
    let mut catalog = read::read(alone, &"orders".parse().unwrap(), None).await.unwrap();
    let error = locate::resolve(&mut catalog, alone, &Request::latest())
        .await
        .unwrap_err();
    let RestoreError::Refused(refusal) = &error else {
        panic!("{error}")
    };
    let Reason::Hole { range, .. } = &refusal.reason else {
        panic!("{refusal}")
    };
    assert!(range.contains(Lsn(0x71_0000)) && range.len() == CHUNK, "{range}");
}

#[tokio::test]
async fn a_region_that_does_not_answer_is_never_an_empty_one() {
    let archive = Archive::whole().await;
    let mut regions = archive.regions();
    let error = "connection refused".to_owned();
    regions[1].access = Access::Failed {
        error,
        kind: ErrorKind::Retry,
    };
    let mut catalog = read::read(&regions, &"orders".parse().unwrap(), None)
        .await
        .unwrap();
    let latest = locate::resolve(&mut catalog, &regions, &Request::latest())
        .await
        .unwrap_err();
    assert_eq!(latest.exit(), Exit::Trouble);
    assert!(latest.to_string().contains("--without-region b"), "{latest}");
    let inside = Request::to(Target::Lsn(Lsn(0x71_6E78)));
    assert!(locate::resolve(&mut catalog, &regions, &inside).await.is_ok());
    regions[1].access = Access::LeftOut;
    let mut catalog = read::read(&regions, &"orders".parse().unwrap(), None)
        .await
        .unwrap();
    assert!(
        locate::resolve(&mut catalog, &regions, &Request::latest())
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn identities_that_differ_stop_everything() {
    let archive = Archive::whole().await;
    let key = layout().identity();
    let text = String::from_utf8(archive.b.get(&key).await.unwrap().to_vec()).unwrap();
    put(
        &archive.b,
        &key,
        text.replace("\"format\":1", "\"format\":9").into_bytes(),
    )
    .await;
    let error = archive.plan(&Request::to(Target::Immediate)).await.unwrap_err();
    assert_eq!(error.exit(), Exit::Damage, "{error}");
    put(&archive.b, &key, text.replace("150020", "170001").into_bytes()).await;
    let catalog = archive.catalog().await;
    assert!(
        !catalog.regions[1].is_readable(),
        "its checksum does not hold, so nothing there can be interpreted"
    );
}

#[tokio::test]
async fn verify_finds_nothing_wrong_with_a_whole_archive() {
    let archive = Archive::whole().await;
    let found = verify::verify(&archive.catalog().await, &archive.regions(), 4).await;
    assert_eq!(found.exit(), Exit::Done, "{found}");
    assert_eq!(found.notes, []);
}

#[tokio::test]
async fn verify_names_what_is_damaged_and_where() {
    let archive = Archive::whole().await;
    let key = Archive::key_of(&archive.a, Lsn(0x70_8000)).await;
    let mut bytes = archive.a.get(&key).await.unwrap().to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    put(&archive.a, &key, bytes).await;
    let found = verify::verify(&archive.catalog().await, &archive.regions(), 4).await;
    assert_eq!(found.exit(), Exit::No);
    assert_eq!(found.damage.len(), 1, "{found}");
    assert_eq!(
        (found.damage[0].region.as_str(), found.damage[0].what.as_str()),
        ("a", key.as_str())
    );
    assert!(
        archive.plan(&Request::to(Target::Xid(743))).await.is_ok(),
        "the other region has a good copy"
    );
}

#[tokio::test]
async fn verify_finds_histories_that_diverge() {
    let archive = Archive::whole().await;
    let (mut wal, commits) = wal();
    let chunk = LsnRange::new(START.saturating_add(2 * CHUNK), START.saturating_add(3 * CHUNK));
    wal[usize::try_from(2 * CHUNK).unwrap() + 100] ^= 1;
    let forged = container(Kind::Tail, TimelineId::FIRST, chunk, &wal, &commits);
    put(&archive.a, &layout().tail(TimelineId::FIRST, chunk), forged).await;
    let found = verify::verify(&archive.catalog().await, &archive.regions(), 4).await;
    assert_eq!(found.exit(), Exit::No);
    assert!(
        found
            .damage
            .iter()
            .any(|problem| problem.problem.contains("the histories diverge")),
        "{found}"
    );
}

#[tokio::test]
async fn verify_and_list_name_what_is_missing() {
    let archive = Archive::whole().await;
    let lost = Archive::key_of(&archive.a, Lsn(0x71_0000)).await;
    archive.a.delete(&lost).await.unwrap();
    let mut catalog = archive.catalog().await;
    let found = verify::verify(&catalog, &archive.regions(), 4).await;
    assert_eq!(found.exit(), Exit::No);
    assert!(
        found
            .missing
            .iter()
            .any(|problem| problem.problem.contains("region b has it")),
        "{found}"
    );
    let listing = list::list(&mut catalog, &archive.regions()).await.unwrap();
    let to_end = |line: &&list::WindowLine| line.timeline == second_timeline() && line.to == archive.end;
    assert!(listing.windows.iter().any(|line| to_end(&line)));
    assert!(
        !listing
            .windows_by_region
            .iter()
            .any(|line| line.region.as_deref() == Some("a") && to_end(&line))
    );
    assert!(
        listing
            .windows_by_region
            .iter()
            .any(|line| line.region.as_deref() == Some("b") && to_end(&line))
    );
    assert!(listing.to_string().contains("is missing"), "{listing}");
}

#[tokio::test]
async fn a_lost_history_file_is_noticed() {
    let archive = Archive::whole().await;
    for store in [&archive.a, &archive.b] {
        store.delete(&layout().history(second_timeline())).await.unwrap();
    }
    let error = archive.plan(&Request::latest()).await.unwrap_err();
    assert_eq!(error.exit(), Exit::Damage);
    assert!(
        error.to_string().contains("history file of timeline 2"),
        "{error}"
    );
    // Nor can a server be promoted from the first one: it would ask for that file to find a free number.
    let first = |target, action| Request {
        timeline: Some(TimelineId::FIRST),
        action,
        ..Request::to(target)
    };
    for target in [Target::Latest, Target::Immediate, Target::Lsn(Lsn(0x71_6E78))] {
        let error = archive.plan(&first(target, Action::Promote)).await.unwrap_err();
        assert_eq!(error.exit(), Exit::Damage, "{error}");
        assert!(
            error.to_string().contains("history file of timeline 2"),
            "{error}"
        );
    }
    for action in [Action::Pause, Action::Shutdown] {
        let look = first(Target::Lsn(Lsn(0x71_6E78)), action);
        assert!(archive.plan(&look).await.is_ok());
    }
    let found = verify::verify(&archive.catalog().await, &archive.regions(), 4).await;
    assert_eq!(found.exit(), Exit::No);
    assert_eq!(
        History::root(TimelineId::FIRST),
        archive.catalog().await.history(TimelineId::FIRST).unwrap()
    );
}
