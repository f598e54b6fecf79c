use highwater_format::Time;

use super::*;

const MIB: u64 = 1 << 20;

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn range(start: u64, end: u64) -> LsnRange {
    LsnRange::new(Lsn(start * MIB), Lsn(end * MIB))
}

fn piece(start: u64, end: u64, size: u64) -> Piece {
    Piece {
        range: range(start, end),
        kind: PieceKind::Segment,
        size,
    }
}

/// A region and the objects that it lists.
#[derive(Clone, Default)]
struct Region {
    held: Held,
    pieces: BTreeMap<TimelineId, Coverage>,
}

fn held(wal: &[(u32, u64, u64)]) -> Region {
    let mut region = Region::default();
    for (number, start, end) in wal {
        let pieces = (*start..*end).map(|segment| piece(segment, segment + 1, 10));
        let coverage: Coverage = pieces.collect();
        let wal = region.held.wal.entry(timeline(*number)).or_default();
        wal.add(&coverage, everything());
        let known = region.pieces.entry(timeline(*number)).or_default();
        known.extend(coverage.pieces().copied());
    }
    region
}

fn everything() -> LsnRange {
    LsnRange::new(Lsn::ZERO, Lsn::MAX)
}

fn compare(ours: &Region, peers: &[Region], position: Position) -> Lack {
    compare_first(ours, peers, position, usize::MAX)
}

fn compare_first(ours: &Region, peers: &[Region], position: Position, limit: usize) -> Lack {
    let theirs: Vec<Held> = peers.iter().map(|peer| peer.held.clone()).collect();
    let all = std::iter::once(&ours.held).chain(&theirs);
    let mut comparison = Comparison::new(all, position, limit);
    let timelines: BTreeSet<_> = peers.iter().flat_map(|peer| peer.pieces.keys()).collect();
    for timeline in timelines {
        let of = |region: &Region| region.pieces.get(timeline).cloned().unwrap_or_default();
        let sides: Vec<_> = peers.iter().map(of).enumerate().collect();
        comparison.slice(*timeline, everything(), of(ours), &sides);
    }
    comparison.finish(&ours.held, &theirs)
}

fn id(number: u32, start: u64) -> BackupId {
    BackupId::new(
        timeline(number),
        Lsn(start * MIB + 40),
        Time::from_unix_micros(i64::try_from(start).unwrap()),
    )
}

fn with_backups(mut region: Region, ids: &[BackupId]) -> Region {
    for id in ids {
        let base = Base {
            visible: true,
            manifest: true,
            packs: BTreeMap::from([(0, 5)]),
        };
        region.held.backups.insert(id.clone(), base);
    }
    region
}

fn at(number: u32, lsn: u64) -> Position {
    Position {
        timeline: timeline(number),
        lsn: Lsn(lsn * MIB),
    }
}

fn copied(lack: &Lack) -> Vec<String> {
    let show = |step: &Step| match step {
        Step::Gap(timeline, range, _) => format!("gap {timeline} {}", range.start.0 / MIB),
        Step::Wal(timeline, piece, peer) => {
            format!("wal {timeline} {} from {peer}", piece.range.start.0 / MIB)
        }
        Step::Backup(id) => format!("backup {}", id.start_lsn().0 / MIB),
    };
    lack.steps.iter().map(show).collect()
}

#[test]
fn equal_regions_lack_nothing() {
    let one = with_backups(held(&[(1, 3, 9)]), &[id(1, 3)]);
    assert!(compare(&one, &[one.clone(), Region::default()], at(1, 9)).is_empty());
}

#[test]
fn an_empty_region_gets_the_newest_backup_first_and_nothing_that_nobody_needs() {
    let (old, new) = (id(1, 4), id(1, 7));
    let full = with_backups(held(&[(1, 1, 10)]), &[old, new]);
    // It was added at 9 and takes new WAL from there on.
    let lack = compare(&held(&[(1, 9, 10)]), &[full], at(1, 10));
    let expected = [
        "wal 1 7 from 0",
        "wal 1 8 from 0",
        "backup 7",
        "wal 1 4 from 0",
        "wal 1 5 from 0",
        "wal 1 6 from 0",
        "backup 4",
    ];
    assert_eq!(copied(&lack), expected);
    assert_eq!(lack.backups.len(), 2);
}

#[test]
fn without_any_backup_all_wal_is_copied() {
    let lack = compare(&held(&[(1, 5, 6)]), &[held(&[(1, 3, 6)])], at(1, 6));
    assert_eq!(copied(&lack), ["wal 1 3 from 0", "wal 1 4 from 0"]);
    assert_eq!(lack.wal_bytes(), 2 * MIB);
}

#[test]
fn what_lies_beyond_the_position_is_left_to_the_uploader() {
    let full = held(&[(1, 3, 9), (2, 8, 9)]);
    let lack = compare(&held(&[(1, 3, 5)]), std::slice::from_ref(&full), at(1, 5));
    assert!(lack.is_empty(), "{lack:?}");
    // On a later timeline all of the older ones counts.
    let lack = compare(&held(&[(1, 3, 5), (2, 8, 9)]), &[full], at(2, 9));
    assert_eq!(
        copied(&lack),
        [
            "wal 1 5 from 0",
            "wal 1 6 from 0",
            "wal 1 7 from 0",
            "wal 1 8 from 0"
        ]
    );
}

#[test]
fn several_peers_fill_what_none_has_alone() {
    let ours = held(&[(1, 1, 2)]);
    let peers = [held(&[(1, 1, 4)]), held(&[(1, 3, 6)])];
    let lack = compare(&ours, &peers, at(1, 6));
    assert_eq!(
        copied(&lack),
        [
            "wal 1 2 from 0",
            "wal 1 3 from 0",
            "wal 1 4 from 1",
            "wal 1 5 from 1"
        ]
    );
}

#[test]
fn gap_records_come_before_any_wal() {
    let mut full = held(&[(1, 1, 2), (1, 4, 5)]);
    full.held
        .wal
        .get_mut(&timeline(1))
        .unwrap()
        .gaps
        .push(range(2, 4));
    let lack = compare(&Region::default(), &[full.clone(), full], at(1, 5));
    assert_eq!(copied(&lack), ["gap 1 2", "wal 1 1 from 0", "wal 1 4 from 0"]);
}

#[test]
fn a_pack_that_is_gone_is_found_though_the_backup_is_visible() {
    let whole = with_backups(Region::default(), &[id(1, 3)]);
    let mut ours = whole.clone();
    ours.held.backups.get_mut(&id(1, 3)).unwrap().packs.clear();
    let lack = compare(&ours, std::slice::from_ref(&whole), at(1, 9));
    assert_eq!(copied(&lack), ["backup 3"]);
    // What is not visible anywhere is unfinished or abandoned, and copied by nobody.
    let mut unfinished = whole;
    unfinished.held.backups.get_mut(&id(1, 3)).unwrap().visible = false;
    assert!(compare(&Region::default(), &[unfinished], at(1, 9)).is_empty());
}

#[test]
fn what_was_there_before_and_is_needed_counts_as_lost() {
    let before = BTreeMap::from([(timeline(1), vec![range(2, 9)])]);
    let now = held(&[(1, 6, 7)]);
    assert_eq!(
        lost(&before, &now.held, Some(at(1, 4))),
        [(timeline(1), range(4, 6)), (timeline(1), range(7, 9))]
    );
    assert!(lost(&before, &now.held, Some(at(2, 4))).is_empty());
    assert_eq!(
        lost(&before, &Held::default(), None),
        [(timeline(1), range(2, 9))]
    );
}

#[test]
fn the_same_key_with_another_size_is_doubtful() {
    let ours = [piece(1, 2, 10), piece(2, 3, 10)];
    let mut theirs = ours;
    assert!(doubtful(&ours, &theirs).is_empty());
    theirs[1].size = 11;
    assert_eq!(doubtful(&ours, &theirs), [piece(2, 3, 10)]);
}

#[test]
fn of_many_steps_the_first_are_remembered_and_no_backup_comes_before_its_wal() {
    let full = with_backups(held(&[(1, 1, 10)]), &[id(1, 4), id(1, 7)]);
    let ours = held(&[(1, 9, 10)]);
    let all = compare(&ours, std::slice::from_ref(&full), at(1, 10));
    assert!(!all.more);
    let expected = ["wal 1 7 from 0", "wal 1 8 from 0", "backup 7", "wal 1 4 from 0"];
    for (limit, steps) in [(1, 1), (2, 3), (3, 4)] {
        let first = compare_first(&ours, std::slice::from_ref(&full), at(1, 10), limit);
        assert!(first.more);
        assert_eq!(copied(&first), expected[..steps]);
        // What is told is told of everything.
        assert_eq!((&first.wal, &first.backups), (&all.wal, &all.backups));
    }
    assert_eq!(
        compare_first(&ours, std::slice::from_ref(&full), at(1, 10), 5),
        all
    );
}
