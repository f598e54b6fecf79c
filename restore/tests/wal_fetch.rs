//! What `wal-fetch` answers: every case in which a wrong answer would lose data or stop a good recovery.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test that fails here should stop here"
)]

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use highwater_format::{Lsn, SegmentName, WalFile};
use highwater_restore::clock::Clock;
use highwater_restore::recovery::facts::{Facts, TimelineFacts};
use highwater_restore::walfeed::feed::{Answer, Feed, Region};
use highwater_restore::walfeed::{self, answer};
use highwater_store::{ErrorKind, Fault, FaultyStore, Operation, Rule, Store};
use support::*;
use tokio::time::Instant;

struct Case {
    regions: Vec<Region>,
    dir: tempfile::TempDir,
}

fn region(name: &str, was_read: bool, store: Result<Arc<dyn Store>, String>) -> Region {
    Region {
        name: name.to_owned(),
        was_read,
        store,
    }
}

impl Case {
    fn new(stores: &[&Memory]) -> Self {
        let region = |store: &&Memory| region(store.region(), true, Ok(shared(store)));
        Self {
            regions: stores.iter().map(region).collect(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn silent(mut self, name: &str, was_read: bool) -> Self {
        self.regions
            .push(region(name, was_read, Err("does not answer".to_owned())));
        self
    }

    async fn ask_with(self, end: Option<u64>, name: &str) -> (Answer, Option<Vec<u8>>) {
        let known: Vec<_> = self
            .regions
            .iter()
            .map(|region| (region.name.as_str(), region.was_read))
            .collect();
        let facts = facts(&known, end);
        self.ask_by(facts, name).await
    }

    async fn ask_by(self, facts: Facts, name: &str) -> (Answer, Option<Vec<u8>>) {
        let feed = Feed::over(facts, self.regions.clone());
        let to = self.dir.path().join("RECOVERYXLOG");
        let answer = answer(&feed, WalFile::parse(name).unwrap(), &to).await;
        let left: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert!(
            left.iter().all(|name| name == "RECOVERYXLOG"),
            "something else was left: {left:?}"
        );
        (answer, fs::read(to).ok())
    }
}

fn name(number: u64) -> String {
    segment(number).to_string(size())
}

#[tokio::test]
async fn fault_51_a_whole_segment_is_served_byte_for_byte() {
    let a = memory("a");
    put_segment(&[&a], segment(3)).await;
    let (answer, file) = Case::new(&[&a]).ask_with(Some(10 * SIZE), &name(3)).await;
    assert_eq!(answer, Answer::Done);
    assert!(file.unwrap() == wal(segment(3).range(size())));
}

#[tokio::test]
async fn fault_51_the_newest_segment_is_put_together_and_padded_with_zeros() {
    let (a, b) = (memory("a"), memory("b"));
    let start = 3 * SIZE;
    put_tail(&[&a], 1, range(start, start + 1000)).await;
    put_tail(&[&b], 1, range(start + 500, start + 5000)).await;
    let (answer, file) = Case::new(&[&a, &b]).ask_with(Some(start + 5000), &name(3)).await;
    assert_eq!(answer, Answer::Done);
    let file = file.unwrap();
    assert_eq!(file.len() as u64, SIZE, "PostgreSQL takes whole segments only");
    assert!(file[..5000] == wal(range(start, start + 5000)));
    assert!(file[5000..].iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn fault_40_a_damaged_segment_is_taken_from_the_other_region_or_from_chunks() {
    let (a, b) = (memory("a"), memory("b"));
    let key = layout().segment(segment(3), size());
    put_segment(&[&a, &b], segment(3)).await;
    a.corrupt(&key, |bytes| bytes[200] ^= 1);
    let (answer, file) = Case::new(&[&a, &b]).ask_with(Some(10 * SIZE), &name(3)).await;
    assert_eq!(answer, Answer::Done);
    assert!(file.unwrap() == wal(segment(3).range(size())));
    // Both copies damaged: the chunks it was made from.
    b.corrupt(&key, |bytes| bytes.truncate(900));
    put_tail(&[&b], 1, segment(3).range(size())).await;
    let (answer, file) = Case::new(&[&a, &b]).ask_with(Some(10 * SIZE), &name(3)).await;
    assert_eq!(answer, Answer::Done);
    assert!(file.unwrap() == wal(segment(3).range(size())));
}

#[tokio::test]
async fn fault_40_damage_everywhere_stops_recovery_and_leaves_no_file() {
    let a = memory("a");
    put_segment(&[&a], segment(3)).await;
    a.corrupt(&layout().segment(segment(3), size()), |bytes| bytes[200] ^= 1);
    // Even where the plan ended before it: the segment exists, so it is not past the end.
    for end in [Some(10 * SIZE), Some(3 * SIZE), None] {
        let (answer, file) = Case::new(&[&a]).ask_with(end, &name(3)).await;
        let Answer::Damaged { reason, before } = answer else {
            panic!("{answer:?} with the end at {end:?}")
        };
        assert!(reason.contains("000000010000000000000003"), "{reason}");
        assert_eq!((file, before), (None, Lsn(3 * SIZE)));
    }
    // A region that does not answer may have a good copy.
    let (answer, _) = Case::new(&[&a])
        .silent("b", true)
        .ask_with(Some(10 * SIZE), &name(3))
        .await;
    assert!(matches!(answer, Answer::Failed(_)), "{answer:?}");
}

/// PostgreSQL reads ahead of its target; without one the damage is never the end.
#[tokio::test]
async fn damage_behind_the_target_does_not_stop_recovery() {
    let a = memory("a");
    put_segment(&[&a], segment(3)).await;
    a.corrupt(&layout().segment(segment(3), size()), |bytes| bytes[200] ^= 1);
    for (until, past) in [(3 * SIZE, true), (3 * SIZE + 1, false)] {
        let mut facts = facts(&[("a", true)], Some(10 * SIZE));
        facts.needed_until = Some(Lsn(until));
        let (answer, file) = Case::new(&[&a]).ask_by(facts, &name(3)).await;
        assert_eq!(matches!(answer, Answer::PastEnd(_)), past, "{answer:?}");
        assert_eq!(file, None);
    }
}

#[tokio::test(start_paused = true)]
async fn fault_53_a_hole_is_never_the_end() {
    let a = memory("a");
    put_segment(&[&a], segment(2)).await;
    put_segment(&[&a], segment(4)).await;
    for end in [Some(5 * SIZE), Some(3 * SIZE), None] {
        let (answer, _) = Case::new(&[&a]).ask_with(end, &name(3)).await;
        assert!(
            matches!(answer, Answer::Failed(_)),
            "{answer:?} with the end at {end:?}"
        );
    }
}

/// The segments of a small archive, of which the newest consists of three chunks.
const POSITIONS: std::ops::RangeInclusive<u64> = 2..=9;
const NEWEST: u64 = 9 * SIZE;
const CHUNKS: [(u64, u64); 3] = [
    (NEWEST, NEWEST + 3000),
    (NEWEST + 3000, NEWEST + 9000),
    (NEWEST + 9000, NEWEST + 9500),
];
const END: u64 = CHUNKS[2].1;

/// All of the archive but one segment, or but one chunk of the newest.
async fn archive_without(segment_gone: Option<u64>, chunk_gone: Option<usize>) -> Memory {
    let store = memory("a");
    for number in POSITIONS.filter(|number| Some(*number) != segment_gone) {
        if number * SIZE != NEWEST {
            put_segment(&[&store], segment(number)).await;
            continue;
        }
        for (index, (start, end)) in CHUNKS.into_iter().enumerate() {
            if chunk_gone != Some(index) {
                put_tail(&[&store], 1, range(start, end)).await;
            }
        }
    }
    store
}

/// Asks for every position and one more: all but `gone` are served byte for byte, and that one stops recovery.
async fn asked_everywhere(regions: &[&Memory], end: Option<u64>, gone: Option<u64>) {
    for number in POSITIONS {
        let (answer, file) = Case::new(regions).ask_with(end, &name(number)).await;
        let what = format!("segment {number} without {gone:?}, the end at {end:?}");
        if gone == Some(number) {
            assert!(matches!(answer, Answer::Failed(_)), "{what}: {answer:?}");
            assert_eq!(file, None, "{what}");
            continue;
        }
        assert_eq!(answer, Answer::Done, "{what}");
        let mut expected = wal(range(number * SIZE, END.min((number + 1) * SIZE)));
        expected.resize(SIZE as usize, 0);
        assert!(file.unwrap() == expected, "{what}");
    }
    let (answer, file) = Case::new(regions).ask_with(end, &name(POSITIONS.end() + 1)).await;
    assert!(matches!(answer, Answer::PastEnd(_)), "{answer:?}");
    assert_eq!(file, None);
}

#[tokio::test(start_paused = true)]
async fn i12_every_position_is_served_and_a_hole_at_none_of_them_is_the_end() {
    let whole = archive_without(None, None).await;
    for end in [Some(END), None] {
        asked_everywhere(&[&whole], end, None).await;
        for gone in POSITIONS {
            let holed = archive_without(Some(gone), None).await;
            // Nobody but the plan knows of what followed on all that is there.
            if end.is_some() || gone * SIZE != NEWEST {
                asked_everywhere(&[&holed], end, Some(gone)).await;
            }
            asked_everywhere(&[&holed, &whole], end, None).await;
        }
        for chunk in 0..CHUNKS.len() {
            let holed = archive_without(None, Some(chunk)).await;
            // Nobody but the plan knows of the last one.
            if end.is_some() || chunk + 1 < CHUNKS.len() {
                asked_everywhere(&[&holed], end, Some(*POSITIONS.end())).await;
            }
            asked_everywhere(&[&holed, &whole], end, None).await;
        }
    }
}

/// Objects that are stored at once become visible in any order.
#[tokio::test]
async fn a_hole_that_closes_while_it_is_looked_at_is_none() {
    let store = archive_without(None, Some(1)).await;
    let closing = async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        put_tail(&[&store], 1, range(CHUNKS[1].0, CHUNKS[1].1)).await;
    };
    let case = Case::new(&[&store]);
    let asked = name(*POSITIONS.end());
    let ((answer, file), ()) = tokio::join!(case.ask_with(None, &asked), closing);
    assert_eq!(answer, Answer::Done);
    let mut expected = wal(range(NEWEST, END));
    expected.resize(SIZE as usize, 0);
    assert!(file.unwrap() == expected);
}

/// In standby mode PostgreSQL asks again, and a hole that nobody fills must not keep a standby from being promoted.
#[tokio::test(start_paused = true)]
async fn a_standby_is_given_what_lies_before_a_hole_and_lives() {
    let following = async |store: &Memory, number: u64, file: &Path| {
        let feed = Feed::over(
            facts(&[("a", true)], None),
            vec![region("a", true, Ok(shared(store)))],
        );
        let asked = WalFile::parse(&name(number)).unwrap();
        answer(&feed.following(true), asked, file).await
    };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("RECOVERYXLOG");
    let holed = archive_without(None, Some(1)).await;
    assert_eq!(following(&holed, *POSITIONS.end(), &file).await, Answer::Done);
    let mut expected = wal(range(CHUNKS[0].0, CHUNKS[0].1));
    expected.resize(SIZE as usize, 0);
    assert!(fs::read(&file).unwrap() == expected);
    fs::remove_file(&file).unwrap();
    let headless = archive_without(None, Some(0)).await;
    for (store, number) in [
        (headless, *POSITIONS.end()),
        (archive_without(Some(5), None).await, 5),
    ] {
        let told = following(&store, number, &file).await;
        assert!(matches!(told, Answer::PastEnd(_)), "{told:?}");
        assert!(!file.exists());
    }
    let damaged = archive_without(None, None).await;
    damaged.corrupt(&layout().segment(segment(5), size()), |bytes| bytes[200] ^= 1);
    let told = following(&damaged, 5, &file).await;
    assert!(matches!(told, Answer::Damaged { .. }), "{told:?}");
}

/// Where every region has answered and nobody fills a hole, waiting helps nobody: it is told with the restore that works. A region
/// that is silent may hold what is missing, and then nothing of the kind is said.
#[tokio::test(start_paused = true)]
async fn a_hole_that_stays_is_told_with_the_lsn_that_can_be_had() {
    let newest = *POSITIONS.end();
    for (holed, number, before) in [
        (archive_without(Some(5), None).await, 5, 5 * SIZE),
        (archive_without(None, Some(0)).await, newest, NEWEST),
        (archive_without(None, Some(1)).await, newest, CHUNKS[0].1),
    ] {
        let (told, _) = Case::new(&[&holed]).ask_with(Some(END), &name(number)).await;
        let Answer::Failed(reason) = told else {
            panic!("{told:?}")
        };
        let before = Lsn(before);
        let words = format!(
            "every region has answered: if no agent is still storing it, what there is ends at {before} \
             (`highwater-restore run --to-lsn {before}` into another directory)"
        );
        assert!(reason.ends_with(&words), "{reason}");
        let left_out = Facts {
            left_out: vec!["c".to_owned()],
            ..facts(&[("a", true)], Some(END))
        };
        let (told, _) = Case::new(&[&holed]).ask_by(left_out, &name(number)).await;
        let Answer::Failed(reason) = told else {
            panic!("{told:?}")
        };
        assert!(
            reason.ends_with("try the restore without --without-region c"),
            "{reason}"
        );
        for was_read in [true, false] {
            let case = Case::new(&[&holed]).silent("b", was_read);
            let (told, _) = case.ask_with(Some(END), &name(number)).await;
            let Answer::Failed(reason) = told else {
                panic!("{told:?}")
            };
            assert!(!reason.contains("--to-lsn"), "{reason}");
            assert!(!reason.contains("every region has answered"), "{reason}");
        }
    }
}

/// Nor is damage, whichever object it strikes.
#[tokio::test(start_paused = true)]
async fn i12_damage_at_no_position_is_the_end() {
    for number in POSITIONS {
        let a = archive_without(None, None).await;
        let key = match number * SIZE {
            NEWEST => layout().tail(timeline(1), range(CHUNKS[1].0, CHUNKS[1].1)),
            _ => layout().segment(segment(number), size()),
        };
        a.corrupt(&key, |bytes| bytes[200] ^= 1);
        for end in [Some(END), None] {
            let (answer, file) = Case::new(&[&a]).ask_with(end, &name(number)).await;
            assert!(matches!(answer, Answer::Damaged { .. }), "{number}: {answer:?}");
            assert_eq!(file, None, "{number}");
        }
    }
}

#[tokio::test]
async fn a_ragged_end_that_the_plan_accepted_is_the_end() {
    let a = memory("a");
    put_segment(&[&a], segment(2)).await;
    put_segment(&[&a], segment(4)).await;
    let ask = async |end, name: String| {
        let mut facts = facts(&[("a", true)], Some(end));
        facts.timelines[0].ragged = true;
        Case::new(&[&a]).ask_by(facts, &name).await
    };
    assert_eq!(ask(3 * SIZE, name(2)).await.0, Answer::Done);
    let past = ask(3 * SIZE, name(3)).await.0;
    assert!(matches!(past, Answer::PastEnd(_)), "{past:?}");
    // Chunks behind the break, in the segment asked for.
    put_tail(&[&a], 1, range(3 * SIZE + 5000, 3 * SIZE + 9000)).await;
    let past = ask(3 * SIZE, name(3)).await.0;
    assert!(matches!(past, Answer::PastEnd(_)), "{past:?}");
    // The plan had more than there is now.
    let lost = ask(3 * SIZE + 100, name(3)).await.0;
    assert!(matches!(lost, Answer::Failed(_)), "{lost:?}");
    // What goes on at the end and is damaged is not nothing.
    put_segment(&[&a], segment(3)).await;
    a.corrupt(&layout().segment(segment(3), size()), |bytes| bytes[200] ^= 1);
    let damaged = ask(3 * SIZE, name(3)).await.0;
    assert!(matches!(damaged, Answer::Damaged { .. }), "{damaged:?}");
}

#[tokio::test]
async fn an_abandoned_branch_is_not_served_past_its_switch_point() {
    let a = memory("a");
    for number in 2..6 {
        put_segment(&[&a], segment(number)).await;
    }
    let switch = 3 * SIZE + 8192;
    let one = |number, begin, end| TimelineFacts {
        timeline: timeline(number),
        begin: Lsn(begin),
        end: Lsn(end),
        ragged: false,
    };
    let ask = async |number| {
        let mut facts = facts(&[("a", true)], None);
        facts.timelines = vec![one(1, 0, switch), one(2, switch, switch)];
        Case::new(&[&a]).ask_by(facts, &name(number)).await
    };
    assert_eq!(ask(2).await.0, Answer::Done);
    let whole = ask(3).await;
    a.corrupt(&layout().segment(segment(3), size()), |bytes| bytes[200] ^= 1);
    put_tail(&[&a], 1, segment(3).range(size())).await;
    // From the whole segment, and put together.
    for (answer, file) in [whole, ask(3).await] {
        assert_eq!(answer, Answer::Done);
        let file = file.unwrap();
        assert_eq!(file.len() as u64, SIZE);
        assert!(file[..8192] == wal(range(3 * SIZE, switch)));
        assert!(
            file[8192..].iter().all(|byte| *byte == 0),
            "of the abandoned branch"
        );
    }
    for number in [4, 5] {
        let (answer, file) = ask(number).await;
        assert!(matches!(answer, Answer::PastEnd(_)), "{answer:?}");
        assert_eq!(file, None);
    }
}

#[tokio::test]
async fn fault_50_past_the_end_is_answered_only_with_proof() {
    let a = memory("a");
    put_segment(&[&a], segment(2)).await;
    let ask = |case: Case, end| case.ask_with(end, "000000010000000000000003");
    assert!(matches!(
        ask(Case::new(&[&a]), Some(3 * SIZE)).await.0,
        Answer::PastEnd(_)
    ));
    assert!(matches!(ask(Case::new(&[&a]), None).await.0, Answer::PastEnd(_)));
    // A region that does not answer now: proven by the plan that read it, or not at all.
    assert!(matches!(
        ask(Case::new(&[&a]).silent("b", true), Some(3 * SIZE)).await.0,
        Answer::PastEnd(_)
    ));
    assert!(matches!(
        ask(Case::new(&[&a]).silent("b", true), None).await.0,
        Answer::Failed(_)
    ));
    assert!(matches!(
        ask(Case::new(&[]).silent("b", true), Some(3 * SIZE)).await.0,
        Answer::Failed(_)
    ));
}

#[tokio::test]
async fn fault_52_an_outage_in_the_middle_stops_recovery() {
    let a = memory("a");
    put_segment(&[&a], segment(2)).await;
    put_segment(&[&a], segment(3)).await;
    let faulty = FaultyStore::new(shared(&a));
    faulty.inject(Rule::times(1_000, Fault::FailBefore(ErrorKind::Operator)));
    let mut case = Case::new(&[]);
    case.regions.push(region("a", true, Ok(Arc::new(faulty))));
    let (answer, file) = case.ask_with(Some(4 * SIZE), &name(3)).await;
    assert!(matches!(answer, Answer::Failed(_)), "{answer:?}");
    assert_eq!(file, None);
}

/// The feed of a region that accepts and never answers, and of another one.
fn beside_a_frozen_one(
    dir: &Path,
    frozen: &Memory,
    other: &Memory,
    was_read: bool,
) -> (Feed, Arc<FaultyStore>) {
    let faulty = Arc::new(FaultyStore::new(shared(frozen)));
    faulty.freeze();
    let facts = facts(&[("a", was_read), ("b", true)], Some(4 * SIZE));
    let regions = vec![
        region("a", was_read, Ok(faulty.clone())),
        region("b", true, Ok(shared(other))),
    ];
    (Feed::noting(facts, regions, dir), faulty)
}

#[tokio::test(start_paused = true)]
async fn a_region_that_the_plan_did_without_costs_no_time() {
    let (a, b) = (memory("a"), memory("b"));
    put_segment(&[&b], segment(3)).await;
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("RECOVERYXLOG");
    let (feed, _) = beside_a_frozen_one(dir.path(), &a, &b, false);
    let began = Instant::now();
    let ask = async |name: &str| answer(&feed, WalFile::parse(name).unwrap(), &to).await;
    assert_eq!(ask(&name(3)).await, Answer::Done);
    assert!(matches!(ask(&name(4)).await, Answer::PastEnd(_)));
    assert!(matches!(ask("00000002.history").await, Answer::PastEnd(_)));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn fault_45_a_region_that_died_after_the_plan_is_known_to_the_next_process() {
    let (a, b) = (memory("a"), memory("b"));
    put_segment(&[&a, &b], segment(3)).await;
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("RECOVERYXLOG");
    let ask = async |feed: &Feed, name: &str| answer(feed, WalFile::parse(name).unwrap(), &to).await;
    fs::write(
        dir.path().join("silent-0"),
        Clock::System
            .now()
            .saturating_add(Duration::from_secs(30))
            .to_string(),
    )
    .unwrap();
    let (feed, faulty) = beside_a_frozen_one(dir.path(), &a, &b, true);
    let began = Instant::now();
    assert_eq!(ask(&feed, &name(3)).await, Answer::Done);
    assert!(matches!(ask(&feed, &name(4)).await, Answer::PastEnd(_)));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // But what only that region has is waited for before recovery is stopped.
    b.corrupt(&layout().segment(segment(3), size()), |bytes| bytes[200] ^= 1);
    let back = async {
        tokio::time::sleep(Duration::from_secs(10)).await;
        faulty.thaw();
    };
    let three = name(3);
    let (answer, ()) = tokio::join!(ask(&feed, &three), back);
    assert_eq!(answer, Answer::Done);
}

#[tokio::test]
async fn a_history_file_is_served_and_its_absence_proven() {
    let (a, b) = (memory("a"), memory("b"));
    put(
        &[&b],
        &layout().history(timeline(2)),
        "1\t0/3000000\tno recovery target specified\n",
    )
    .await;
    let ask = |case: Case, name: &'static str| case.ask_with(Some(3 * SIZE), name);
    let (answer, file) = ask(Case::new(&[&a, &b]), "00000002.history").await;
    assert_eq!(answer, Answer::Done);
    assert!(file.unwrap().starts_with(b"1\t0/3000000"));
    assert!(matches!(
        ask(Case::new(&[&a, &b]), "00000003.history").await.0,
        Answer::PastEnd(_)
    ));
    assert!(matches!(
        ask(Case::new(&[&a]).silent("c", true), "00000003.history")
            .await
            .0,
        Answer::PastEnd(_)
    ));
    assert!(matches!(
        Case::new(&[&a])
            .silent("c", true)
            .ask_with(None, "00000003.history")
            .await
            .0,
        Answer::Failed(_)
    ));
}

#[tokio::test]
async fn fault_54_a_history_other_than_the_planned_one_is_not_served() {
    let (a, b) = (memory("a"), memory("b"));
    let key = layout().history(timeline(2));
    put(&[&b], &key, "1\t0/300000\tno recovery target specified\n").await;
    let planned = || {
        let mut facts = facts(&[("a", true), ("b", true)], Some(3 * SIZE));
        facts.timelines.push(TimelineFacts {
            timeline: timeline(2),
            begin: Lsn(3 * SIZE),
            end: Lsn(4 * SIZE),
            ragged: false,
        });
        facts
    };
    for wrong in ["", "# cut off", "1\t0/2F0000\tanother\n"] {
        put(&[&a], &key, wrong).await;
        let case = Case::new(&[&a, &b]);
        let (answer, file) = case.ask_by(planned(), "00000002.history").await;
        assert_eq!(answer, Answer::Done, "{wrong:?}");
        assert!(file.unwrap().starts_with(b"1\t0/300000"), "{wrong:?}");
        let (answer, _) = Case::new(&[&a]).ask_by(planned(), "00000002.history").await;
        assert!(matches!(answer, Answer::Failed(_)), "{answer:?}");
    }
}

/// PostgreSQL asks for every history from the timeline it starts on to its target, and needs the target's only.
#[tokio::test]
async fn an_older_history_that_the_plan_did_without_is_not_there() {
    let a = memory("a");
    let planned = |without: &[u32]| {
        let mut facts = facts(&[("a", true)], Some(3 * SIZE));
        for number in [2, 3] {
            facts.timelines.push(TimelineFacts {
                timeline: timeline(number),
                begin: Lsn(3 * SIZE),
                end: Lsn(4 * SIZE),
                ragged: false,
            });
            facts.known_timelines.push(timeline(number));
        }
        facts.without_history = without.iter().map(|number| timeline(*number)).collect();
        facts
    };
    let two = SegmentName {
        timeline: timeline(2),
        number: 3,
    };
    put_segment(&[&a], two).await;
    let ask = async |case: Case, name: &'static str| case.ask_by(planned(&[2]), name).await.0;
    let absent = ask(Case::new(&[&a]), "00000002.history").await;
    assert!(matches!(absent, Answer::PastEnd(_)), "{absent:?}");
    let silent = ask(Case::new(&[&a]).silent("b", false), "00000002.history").await;
    assert!(matches!(silent, Answer::PastEnd(_)), "{silent:?}");
    // The target's own is needed, and one that the plan had is not gone for good.
    let target = ask(Case::new(&[&a]), "00000003.history").await;
    assert!(matches!(target, Answer::Failed(_)), "{target:?}");
    let (had, _) = Case::new(&[&a]).ask_by(planned(&[]), "00000002.history").await;
    assert!(matches!(had, Answer::Failed(_)), "{had:?}");

    let key = layout().history(timeline(2));
    put(&[&a], &key, "not a history").await;
    let rotten = ask(Case::new(&[&a]), "00000002.history").await;
    assert!(matches!(rotten, Answer::PastEnd(_)), "{rotten:?}");
    put(&[&a], &key, "1\t0/300000\tput back\n").await;
    assert_eq!(ask(Case::new(&[&a]), "00000002.history").await, Answer::Done);
}

#[tokio::test]
async fn fault_54_a_timeline_whose_history_is_lost_is_not_absent() {
    let a = memory("a");
    put_segment(
        &[&a],
        SegmentName {
            timeline: timeline(2),
            number: 3,
        },
    )
    .await;
    let (answer, _) = Case::new(&[&a])
        .ask_with(Some(3 * SIZE), "00000002.history")
        .await;
    assert!(matches!(answer, Answer::Failed(_)), "{answer:?}");
    put(&[&a], &layout().history(timeline(3)), "not a history").await;
    let (answer, file) = Case::new(&[&a])
        .ask_with(Some(3 * SIZE), "00000003.history")
        .await;
    assert!(matches!(answer, Answer::Failed(_)), "{answer:?}");
    assert_eq!(file, None);
}

#[test]
fn fault_50_every_other_trouble_ends_above_125() {
    let dir = tempfile::tempdir().unwrap();
    let plan = dir.path().join("highwater-recovery.json");
    let to = dir.path().join("to");
    for (what, name) in [
        ("rubbish", "../../etc/passwd"),
        ("a partial", "000000010000000000000003.partial"),
        ("a backup note", "000000010000000000000003.00000028.backup"),
        ("no plan", "00000002.history"),
    ] {
        assert_eq!(walfeed::fetch(&plan, name, &to).code, 255, "{what}");
    }
    fs::write(&plan, "{").unwrap();
    assert_eq!(
        walfeed::fetch(&plan, "00000002.history", &to).code,
        255,
        "a damaged plan"
    );
    fs::write(&plan, facts(&[("a", true)], Some(SIZE)).to_json()).unwrap();
    let reply = walfeed::fetch(&plan, "00000002.history", &to);
    assert_eq!(reply.code, 255, "a region that is not there: {reply:?}");
    assert!(!to.exists());
}

/// The `wal-fetch` of a killed server still runs when the new server's asks for the same path: each is slow in turn.
#[tokio::test(start_paused = true)]
async fn two_calls_for_one_path_give_what_they_wrote_themselves() {
    let (a, b) = (memory("a"), memory("b"));
    put_segment(&[&a, &b], segment(3)).await;
    put_segment(&[&a, &b], segment(4)).await;
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("RECOVERYXLOG");
    let call = |store: &Memory, number: u64, seconds: u64| {
        let gate = Arc::new(FaultyStore::new(shared(store)));
        gate.inject(Rule::once(Fault::Delay(Duration::from_secs(seconds))));
        let feed = Feed::over(
            facts(&[("a", true)], Some(10 * SIZE)),
            vec![region("a", true, Ok(gate.clone()))],
        );
        let to = to.clone();
        let asked = tokio::spawn(async move { feed.segment(segment(number), &to).await });
        (gate, asked)
    };
    // The clock stands still while this looks, so neither has got anything yet.
    let asking = async |gate: &FaultyStore| {
        while gate.calls(Operation::Get) == 0 {
            tokio::task::yield_now().await;
        }
    };
    let (gate, first) = call(&a, 3, 10);
    asking(&gate).await;
    let (gate, second) = call(&b, 4, 20);
    asking(&gate).await;
    for (asked, number) in [(first, 3), (second, 4)] {
        assert_eq!(asked.await.unwrap(), Answer::Done, "segment {number}");
        let given = fs::read(&to).unwrap();
        assert!(
            given == wal(segment(number).range(size())),
            "not segment {number}"
        );
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// What killed calls left is removed by the next, under the name of today and that of earlier versions; what a call that
/// lives is writing is not.
#[tokio::test]
async fn what_a_killed_call_left_is_removed_and_nothing_else() {
    let a = memory("a");
    put_segment(&[&a], segment(3)).await;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in [
        "RECOVERYXLOG.highwater",
        "RECOVERYXLOG.highwater-77-0",
        "RECOVERYXLOG.highwater-77-1",
        "RECOVERYHISTORY",
    ] {
        fs::write(at(name), "left").unwrap();
    }
    let alive = fs::File::open(at("RECOVERYXLOG.highwater-77-1")).unwrap();
    alive.lock().unwrap();
    let feed = Feed::over(
        facts(&[("a", true)], Some(10 * SIZE)),
        vec![region("a", true, Ok(shared(&a)))],
    );
    assert_eq!(feed.segment(segment(3), &at("RECOVERYXLOG")).await, Answer::Done);
    let mut left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(
        left,
        ["RECOVERYHISTORY", "RECOVERYXLOG", "RECOVERYXLOG.highwater-77-1"]
    );
}

/// In a container PostgreSQL inherits it as process 1, and takes other codes of an unknown child for a crash of its own.
#[test]
fn a_prefetcher_that_cannot_work_ends_with_0() {
    let dir = tempfile::tempdir().unwrap();
    let plan = dir.path().join("highwater-recovery.json");
    let prefetch = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_highwater-restore"));
        let ended = command.arg("wal-prefetch").args(arguments).output().unwrap();
        assert_eq!(ended.status.code(), Some(0), "{arguments:?}: {ended:?}");
    };
    let plan_text = plan.to_str().unwrap();
    let three = name(3);
    let after = ["--plan", plan_text, "--after", &three];
    prefetch(&after);
    let facts = facts(&[("a", true)], Some(10 * SIZE));
    fs::write(&plan, serde_json::to_vec(&facts).unwrap()).unwrap();
    // A file where the spool would be: not even root can write into it.
    fs::write(dir.path().join("highwater-prefetch"), "in the way").unwrap();
    prefetch(&after);
    prefetch(&["--plan", plan_text, "--after", "rubbish"]);
    prefetch(&["--of-another-version"]);
}
