//! The read-only half over an archive in memory that holds WAL PostgreSQL 15 wrote, against what `pg_waldump` says of
//! it. Region `a` holds the first segment as tail chunks, region `b` as a segment object; the second segment is where
//! timeline 2 leaves timeline 1, in the middle of a page.

use std::sync::Arc;

use highwater_config::Exit;
use highwater_format::{
    Backup, BackupId, Codec, FrameEncoder, Header, History, Identity, Kind, Layout, Lsn, LsnRange, Manifest,
    Pulse, SegmentName, SegmentSize, SystemId, Time, TimelineId, crc32_hex, encode, seal,
    walscan::{WalEvent, WalScanner},
};
use highwater_store::{ErrorKind, MemoryStore, Object, PutMode, Store};

use crate::{
    catalog::{Catalog, read},
    error::RestoreError,
    list, locate,
    plan::{Plan, Reason},
    regions::{Access, Region},
    target::{Request, Target},
    verify,
};

const FIRST: &[u8] = include_bytes!("../../proto/format/testdata/wal/pg15/000000010000000000000007.head");
const SECOND: &[u8] = include_bytes!("../../proto/format/testdata/wal/pg15/000000020000000000000008.head");
const WALDUMP: &str = include_str!("../../proto/format/testdata/wal/pg15/pg_waldump.txt");
const SEGMENT: u64 = 1 << 20;
const START: Lsn = Lsn(7 * SEGMENT);
const SWITCH: Lsn = Lsn(0x80_1B90);
/// The last record is a `pg_switch_wal()`, which ends where its segment does.
const LAST_END: Lsn = Lsn(9 * SEGMENT);
/// Tail chunks of an odd size, so that records, pages and objects never end together.
const CHUNK: u64 = 5003;

/// One line of `pg_waldump`.
#[derive(Debug, Clone)]
struct Line {
    lsn: Lsn,
    prev: Lsn,
    time: Option<Time>,
    xid: Option<u32>,
}

fn lines() -> Vec<Line> {
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

fn transaction_ends() -> Vec<(Line, Time)> {
    lines()
        .into_iter()
        .filter_map(|line| Some((line.clone(), line.time?)))
        .collect()
}

fn size() -> SegmentSize {
    SegmentSize::new(SEGMENT).unwrap()
}

fn system_id() -> SystemId {
    SystemId(u64::from_le_bytes(FIRST[24..32].try_into().unwrap()))
}

fn layout() -> Layout {
    Layout::new("orders".parse().unwrap(), system_id())
}

fn second_timeline() -> TimelineId {
    TimelineId::new(2).unwrap()
}

/// All bytes from `START` on, along timeline 2, and the transaction ends in them.
fn wal() -> (Vec<u8>, Vec<(Lsn, Time)>) {
    let mut wal = FIRST.to_vec();
    wal.resize(usize::try_from(SEGMENT).unwrap(), 0);
    wal.extend(SECOND);
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

struct Archive {
    a: Arc<MemoryStore>,
    b: Arc<MemoryStore>,
    end: Lsn,
}

impl Archive {
    async fn whole() -> Self {
        let (wal, commits) = wal();
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
                    &wal,
                    &commits,
                )
                .await;
            archive
                .tails(
                    store,
                    second_timeline(),
                    LsnRange::new(second, end),
                    &wal,
                    &commits,
                )
                .await;
        }
        let first = LsnRange::new(START, Lsn(8 * SEGMENT));
        archive
            .tails(&archive.a, TimelineId::FIRST, first, &wal, &commits)
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
            container(Kind::Segment, TimelineId::FIRST, first, &wal, &commits),
        )
        .await;
        archive
    }

    async fn tails(
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

    async fn documents(&self, store: &MemoryStore) {
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
        };
        put(store, &layout().pulse(), encode(&pulse).unwrap()).await;
        let backup = backup();
        put(store, &layout().manifest(&backup.id), manifest(&backup.id)).await;
        put(store, &layout().backup(&backup.id), encode(&backup).unwrap()).await;
    }

    fn regions(&self) -> Vec<Region> {
        vec![Region::over(self.a.clone()), Region::over(self.b.clone())]
    }

    async fn catalog(&self) -> Catalog {
        read::read(&self.regions(), &"orders".parse().unwrap(), None)
            .await
            .unwrap()
    }

    async fn plan(&self, request: &Request) -> Result<Plan, RestoreError> {
        locate::resolve(&self.catalog().await, &self.regions(), request).await
    }

    async fn key_of(store: &MemoryStore, lsn: Lsn) -> String {
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

fn manifest(id: &BackupId) -> Vec<u8> {
    encode(&Manifest {
        backup: id.clone(),
        packs: Vec::new(),
        entries: Vec::new(),
    })
    .unwrap()
}

fn backup() -> Backup {
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

fn at(text: &str) -> Time {
    text.parse().unwrap()
}

async fn put(store: &MemoryStore, key: &str, bytes: Vec<u8>) {
    store
        .put(key, Object::new(bytes), PutMode::Overwrite)
        .await
        .unwrap();
}

fn container(
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
    header.first_commit = commits.iter().find(within).map(|(_, time)| *time);
    header.last_commit = commits.iter().rev().find(within).map(|(_, time)| *time);
    header.sealed_at = at("2026-11-20T15:22:31Z");
    header.server_end = range.end;
    let frame = FrameEncoder::new(Codec::Lz4).encode(plain).unwrap();
    seal(header, &[frame]).unwrap().bytes.to_vec()
}

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
        matches!(&error, RestoreError::Refused(refusal) if refusal.reason == Reason::NotFound),
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
    let alone = Archive {
        b: Arc::new(MemoryStore::new("b")),
        ..archive
    };
    let error = alone.plan(&Request::latest()).await.unwrap_err();
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
    let catalog = read::read(&regions, &"orders".parse().unwrap(), None)
        .await
        .unwrap();
    let latest = locate::resolve(&catalog, &regions, &Request::latest())
        .await
        .unwrap_err();
    assert_eq!(latest.exit(), Exit::Trouble);
    assert!(latest.to_string().contains("--without-region b"), "{latest}");
    let inside = Request::to(Target::Lsn(Lsn(0x71_6E78)));
    assert!(locate::resolve(&catalog, &regions, &inside).await.is_ok());
    regions[1].access = Access::LeftOut;
    let catalog = read::read(&regions, &"orders".parse().unwrap(), None)
        .await
        .unwrap();
    assert!(
        locate::resolve(&catalog, &regions, &Request::latest())
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
    let catalog = archive.catalog().await;
    let found = verify::verify(&catalog, &archive.regions(), 4).await;
    assert_eq!(found.exit(), Exit::No);
    assert!(
        found
            .missing
            .iter()
            .any(|problem| problem.problem.contains("region b has it")),
        "{found}"
    );
    let listing = list::list(&catalog, &archive.regions()).await.unwrap();
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
    let found = verify::verify(&archive.catalog().await, &archive.regions(), 4).await;
    assert_eq!(found.exit(), Exit::No);
    assert_eq!(
        History::root(TimelineId::FIRST),
        archive.catalog().await.history(TimelineId::FIRST).unwrap()
    );
}
