//! The scanner against WAL of PostgreSQL 15 and against WAL written for the purpose.

use proptest::prelude::*;

use super::build::{PAGE, Plan, SEGMENT, SYSTEM_ID, WalBuilder};
use super::*;

fn size() -> SegmentSize {
    SegmentSize::new(SEGMENT).unwrap()
}

fn timeline(number: u32) -> Option<TimelineId> {
    TimelineId::new(number)
}

/// What came of feeding `wal`, cut at these lengths (in turn, over and over).
#[derive(Debug, PartialEq, Eq, Clone)]
struct Outcome {
    events: Vec<WalEvent>,
    damage: Option<WalDamage>,
    whole_until: Lsn,
}

fn feed_cut(mut scanner: WalScanner, wal: &[u8], cuts: &[usize]) -> Outcome {
    let mut events = Vec::new();
    let mut cuts = cuts.iter().cycle();
    let mut rest = wal;
    let mut damage = None;
    while !rest.is_empty() && damage.is_none() {
        let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
        damage = scanner.feed(now, &mut |event| events.push(event)).err();
        rest = later;
    }
    Outcome {
        events,
        damage,
        whole_until: scanner.last_record_end(),
    }
}

fn feed(scanner: WalScanner, wal: &[u8]) -> Outcome {
    feed_cut(scanner, wal, &[usize::MAX])
}

fn scanner_for(wal: &WalBuilder) -> WalScanner {
    WalScanner::new(wal.start, size(), timeline(wal.timeline), Some(wal.major))
        .with_system_id(SystemId(SYSTEM_ID))
}

/// One step of writing WAL.
#[derive(Debug, Clone)]
enum Step {
    Filler(usize),
    Commit(u32, i64, bool),
    Prepared(u32, i64, [u32; 4]),
    Switch,
    Torn,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (24..400_usize).prop_map(Step::Filler),
        2 => (24..30_000_usize).prop_map(Step::Filler),
        6 => (any::<u32>(), -(1_i64 << 50)..1 << 50, any::<bool>())
            .prop_map(|(xid, time, abort)| Step::Commit(xid, time, abort)),
        2 => (any::<u32>(), 0..1_i64 << 50, prop::array::uniform4(0..40_u32))
            .prop_map(|(xid, time, counts)| Step::Prepared(xid, time, counts)),
        1 => Just(Step::Switch),
        1 => Just(Step::Torn),
    ]
}

fn write(major: u32, steps: &[Step]) -> WalBuilder {
    let mut wal = WalBuilder::new(3 * SEGMENT, major);
    wal.filler(100);
    for step in steps {
        match *step {
            Step::Filler(length) => wal.filler(length),
            Step::Commit(xid, time, abort) => wal.commit(xid, time, abort),
            Step::Prepared(xid, time, counts) => wal.commit_prepared(xid, time, counts),
            Step::Switch => wal.switch(),
            Step::Torn => wal.torn_record(),
        }
    }
    // So that nothing before is at the mercy of what did not arrive.
    wal.filler(100);
    wal.filler(20_000);
    wal.finish()
}

fn any_wal() -> impl Strategy<Value = (u32, Vec<Step>)> {
    (13..=18_u32, prop::collection::vec(any_step(), 0..60))
        // Every switch costs a segment of zeros.
        .prop_filter("few switches", |(_, steps)| {
            steps.iter().filter(|step| matches!(step, Step::Switch)).count() < 3
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn everything_written_is_reported_however_it_arrives(
        (major, steps) in any_wal(),
        cuts in prop::collection::vec(prop_oneof![1..40_usize, 1..20_000_usize], 1..20),
    ) {
        let wal = write(major, &steps);
        let whole = feed(scanner_for(&wal), &wal.bytes);
        prop_assert_eq!(&whole.damage, &None);
        prop_assert_eq!(&whole.events, &wal.events);
        prop_assert_eq!(whole.whole_until, wal.end());
        prop_assert_eq!(feed_cut(scanner_for(&wal), &wal.bytes, &cuts), whole);
    }

    #[test]
    fn byte_by_byte_is_the_same_too((major, steps) in any_wal()) {
        let wal = write(major, &steps);
        prop_assert_eq!(
            feed_cut(scanner_for(&wal), &wal.bytes, &[1]),
            feed(scanner_for(&wal), &wal.bytes)
        );
    }

    #[test]
    fn a_flipped_bit_is_noticed_or_means_nothing(
        (major, steps) in any_wal(),
        record in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        bit in 0..8_u32,
    ) {
        let mut wal = write(major, &steps);
        // The fillers at the end are there to follow, not to be hit. Nor is the first record: when a page behind it
        // replaces a torn record, only the back link to it tells that it was not the torn one, and a reader that
        // begins in the middle knows no back link yet.
        let hit = &wal.records[1..wal.records.len() - 2];
        prop_assume!(!hit.is_empty());
        let (start, end) = hit[record.index(hit.len())];
        let whole = feed(scanner_for(&wal), &wal.bytes);
        let at = start.distance_from(wal.start) as usize
            + at.index(end.distance_from(start) as usize);
        wal.bytes[at] ^= 1 << bit;
        let outcome = feed(scanner_for(&wal), &wal.bytes);
        prop_assert_eq!(&feed_cut(scanner_for(&wal), &wal.bytes, &[1, 700, 3]), &outcome);
        match &outcome.damage {
            None => prop_assert_eq!(&outcome, &whole),
            Some(damage) => {
                // A length that became too long shows on the next page; where that replaces a torn record, the
                // first record there shows that another one is missing.
                let latest = (at as u64 + 1).next_multiple_of(PAGE) + LONG_HEADER as u64;
                prop_assert!(damage.lsn <= wal.start + latest);
                prop_assert!(outcome.whole_until <= wal.start + at as u64);
                prop_assert!(whole.events.starts_with(&outcome.events));
            }
        }
    }

    #[test]
    fn a_reader_may_begin_at_any_page(
        (major, steps) in any_wal(),
        page in any::<prop::sample::Index>(),
    ) {
        let wal = write(major, &steps);
        let at = page.index(wal.bytes.len() / PAGE as usize) as u64 * PAGE;
        let start = wal.start + at;
        // Pages after a switch have no header to begin with.
        prop_assume!(wal.bytes[at as usize] != 0);
        let outcome = feed(
            WalScanner::new(start, size(), timeline(1), None),
            &wal.bytes[at as usize..],
        );
        prop_assert_eq!(&outcome.damage, &None);
        let any_begun = wal.records.iter().any(|(record, _)| *record >= start);
        prop_assert_eq!(outcome.whole_until, if any_begun { wal.end() } else { start });
        // Nothing is known of a record that began before.
        let begun_here = |event: &WalEvent| {
            wal.records.iter().rfind(|(record, _)| *record < end_of(event)).is_some_and(|(record, _)| *record >= start)
        };
        let expected: Vec<_> = wal.events.iter().filter(|event| begun_here(event)).cloned().collect();
        prop_assert_eq!(&outcome.events, &expected);
    }

    #[test]
    fn a_reader_may_begin_at_any_record(
        (major, steps) in any_wal(),
        record in any::<prop::sample::Index>(),
    ) {
        let wal = write(major, &steps);
        let (start, _) = wal.records[record.index(wal.records.len())];
        let at = start.distance_from(wal.start) as usize;
        let outcome = feed(WalScanner::new(start, size(), None, Some(major)), &wal.bytes[at..]);
        prop_assert_eq!(&outcome.damage, &None);
        let expected: Vec<_> = wal.events.iter().filter(|event| end_of(event) > start).cloned().collect();
        prop_assert_eq!(outcome.events, expected);
    }
}

fn end_of(event: &WalEvent) -> Lsn {
    match event {
        WalEvent::Commit { end, .. }
        | WalEvent::RestorePoint { end, .. }
        | WalEvent::ParameterChange { end, .. }
        | WalEvent::Switch { end }
        | WalEvent::Checkpoint { end, .. }
        | WalEvent::EndOfRecovery { end, .. } => *end,
    }
}

fn some_wal() -> WalBuilder {
    write(
        16,
        &[
            Step::Filler(300),
            Step::Commit(7, 1, false),
            Step::Filler(9000),
            Step::Commit(8, 2, false),
        ],
    )
}

#[test]
fn zeros_end_a_padded_segment_wherever_they_begin() {
    let mut wal = WalBuilder::new(3 * SEGMENT, 15);
    let mut outcomes = Vec::new();
    for length in [100, 8000, 8192 * 2, 60] {
        wal.filler(length);
        wal.commit(1, 1, false);
        let whole = wal.bytes.len().next_multiple_of(8);
        let mut padded = wal.bytes.clone();
        padded.resize(
            padded.len().next_multiple_of(PAGE as usize) + 2 * PAGE as usize,
            0,
        );
        let outcome = feed(scanner_for(&wal), &padded);
        assert!(outcome.damage.as_ref().unwrap().is_end_of_wal(), "{outcome:?}");
        assert_eq!(outcome.whole_until, wal.start + whole as u64);
        outcomes.push(outcome.events.len());
    }
    assert_eq!(outcomes, [1, 2, 3, 4]);
}

#[test]
fn damage_is_not_taken_for_the_end() {
    let mut wal = some_wal();
    let (start, _) = wal.records[1];
    let at = start.distance_from(wal.start) as usize;
    wal.bytes[at + 30] ^= 4;
    let damage = feed(scanner_for(&wal), &wal.bytes).damage.unwrap();
    assert!(!damage.is_end_of_wal());
    assert_eq!(damage.lsn, start);
    assert!(damage.to_string().contains("CRC-32C"), "{damage}");
}

#[test]
fn the_records_of_a_page_are_checked_together_and_none_escapes() {
    let mut wal = WalBuilder::new(3 * SEGMENT, 15);
    // Every padding, and bodies shorter than what the joint between two records changes.
    for length in (24..60).chain([700, 24, 24, 25, 300]) {
        wal.filler(length);
    }
    let wal = wal.finish();
    assert!(wal.bytes.len() < PAGE as usize);
    let (second, _) = wal.records[1];
    let (head, rest) = wal.bytes.split_at(second.distance_from(wal.start) as usize);
    let mut begun = scanner_for(&wal);
    begun.feed(head, &mut |_| ()).unwrap();

    let mut scanner = begun.clone();
    assert_eq!(scanner.read_batch(rest, &mut |_| ()), rest.len());
    assert_eq!(scanner.last_record_end(), wal.end());

    for (start, end) in &wal.records[1..] {
        for at in start.distance_from(second)..end.distance_from(second) {
            let mut damaged = rest.to_vec();
            damaged[at as usize] ^= 0x10;
            let mut scanner = begun.clone();
            let used = scanner.read_batch(&damaged, &mut |_| ());
            assert!(
                used as u64 <= start.distance_from(second),
                "byte {at} changed and {used} bytes were taken"
            );
        }
    }
}

#[test]
fn damage_stays() {
    let mut wal = some_wal();
    wal.bytes[60] ^= 1;
    let mut scanner = scanner_for(&wal);
    let first = scanner.feed(&wal.bytes, &mut |_| ()).unwrap_err();
    let again = scanner.feed(&wal.bytes[..0], &mut |_| ()).unwrap_err();
    assert_eq!(first, again);
}

#[test]
fn a_missing_record_is_noticed_by_the_one_after_it() {
    let mut wal = WalBuilder::new(3 * SEGMENT, 17);
    for _ in 0..4 {
        wal.filler(64);
    }
    let (from, _) = wal.records[1];
    let (to, _) = wal.records[2];
    let cut = from.distance_from(wal.start) as usize..to.distance_from(wal.start) as usize;
    wal.bytes.drain(cut);
    let damage = feed(scanner_for(&wal), &wal.bytes).damage.unwrap();
    assert_eq!(damage.lsn, from);
    assert!(matches!(damage.what, Damage::BackLink { .. }), "{damage}");
}

/// Only the server's own mark makes of a record without its rest one that never counted.
#[test]
fn a_record_that_was_not_continued_is_damage_without_the_mark_of_a_crash() {
    let mut wal = WalBuilder::new(SEGMENT, 15);
    wal.filler(100);
    let torn_at = wal.bytes.len();
    wal.torn_record();
    wal.commit(7, 1, false);
    let wal = wal.finish();
    let marked = feed(scanner_for(&wal), &wal.bytes);
    assert!(marked.damage.is_none(), "{:?}", marked.damage);
    assert!(
        marked
            .events
            .iter()
            .any(|event| matches!(event, WalEvent::Commit { .. }))
    );
    let page = torn_at.next_multiple_of(PAGE as usize);
    let mut unmarked = wal.bytes.clone();
    assert_eq!(unmarked[page + 2], 0b1100, "the server's flags");
    unmarked[page + 2] = 0b0100;
    let refused = feed(scanner_for(&wal), &unmarked).damage.unwrap();
    assert!(
        matches!(
            refused.what,
            Damage::Continuation {
                found: 0,
                expected: 1..
            }
        ),
        "{refused:?}"
    );
}

#[test]
fn pages_that_do_not_belong_are_refused() {
    let wal = some_wal();
    let refused = |scanner: WalScanner| feed(scanner, &wal.bytes).damage.unwrap().what;
    let new = |start| WalScanner::new(start, size(), timeline(1), None);

    assert_eq!(
        refused(new(wal.start + SEGMENT)),
        Damage::PageAddress { found: wal.start }
    );
    let other_major = WalScanner::new(wal.start, size(), timeline(1), Some(15));
    assert_eq!(
        refused(other_major),
        Damage::Magic {
            found: 0xD113,
            expected: 15
        }
    );
    let other_cluster = new(wal.start).with_system_id(SystemId(5));
    assert_eq!(
        refused(other_cluster),
        Damage::SystemId {
            found: SYSTEM_ID,
            expected: 5
        }
    );
    let other_size = WalScanner::new(wal.start, SegmentSize::DEFAULT, timeline(1), None);
    assert!(matches!(
        refused(other_size),
        Damage::Sizes {
            segment: 1_048_576,
            expected_segment: 16_777_216,
            ..
        }
    ));
    let other_page = new(wal.start).with_page_size(16_384);
    assert!(matches!(
        refused(other_page),
        Damage::Sizes {
            page: 8192,
            expected_page: 16_384,
            ..
        }
    ));
}

#[test]
fn timelines_rise_and_never_pass_the_one_being_read() {
    let mut wal = WalBuilder::new(3 * SEGMENT, 18);
    wal.timeline = 2;
    wal.filler(PAGE as usize);
    wal.timeline = 5;
    wal.filler(PAGE as usize);
    let read = |expected| feed(WalScanner::new(wal.start, size(), expected, None), &wal.bytes).damage;
    assert_eq!(read(timeline(5)), None);
    assert_eq!(read(None), None);
    let damage = read(timeline(4)).unwrap();
    assert_eq!(damage.lsn, wal.start + 2 * PAGE);
    assert!(matches!(damage.what, Damage::PageTimeline { found: 5, .. }));

    let mut back = WalBuilder::new(3 * SEGMENT, 18);
    back.timeline = 3;
    back.filler(PAGE as usize);
    back.timeline = 2;
    back.filler(PAGE as usize);
    let damage = feed(
        WalScanner::new(back.start, size(), timeline(3), None),
        &back.bytes,
    )
    .damage
    .unwrap();
    assert!(matches!(damage.what, Damage::PageTimeline { found: 2, .. }));
}

#[test]
fn the_xid_of_a_prepared_transaction_is_found_behind_any_lists() {
    for major in [14, 15, 18] {
        for counts in [
            [0; 4],
            [1, 0, 0, 0],
            [3, 2, 1, 0],
            [0, 0, 9, 700],
            [2000, 0, 0, 1],
        ] {
            // Versions before 15 have no dropped statistics; their flag never is set.
            let counts = if major < 15 {
                [counts[0], counts[1], 0, counts[3]]
            } else {
                counts
            };
            let wal = write(
                major,
                &[Step::Prepared(4711, 99, counts), Step::Commit(1, 1, true)],
            );
            for cut in [1, 13, usize::MAX] {
                let outcome = feed_cut(scanner_for(&wal), &wal.bytes, &[cut]);
                assert_eq!(outcome.events, wal.events, "{major} {counts:?}");
            }
        }
    }
}

#[test]
fn a_record_of_interest_with_an_unknown_body_is_passed_over() {
    let mut wal = WalBuilder::new(3 * SEGMENT, 15);
    for body in [
        vec![],
        vec![0; 40],
        vec![255, 4, 1, 2, 3, 4],
        vec![253],
        vec![254, 0, 0, 0, 0],
    ] {
        for info in [0x00, 0x10, 0x60, 0x70, 0x90] {
            wal.record(&Plan {
                manager: 0,
                info,
                xid: 0,
                body: body.clone(),
            });
        }
        for info in [0x00, 0x80, 0x20, 0xB0, 0x40] {
            wal.record(&Plan {
                manager: 1,
                info,
                xid: 0,
                body: body.clone(),
            });
        }
    }
    let wal = wal.finish();
    for cut in [1, usize::MAX] {
        let outcome = feed_cut(scanner_for(&wal), &wal.bytes, &[cut]);
        assert_eq!((outcome.events, outcome.damage), (vec![], None));
    }
}

#[path = "walscan_pg15_tests.rs"]
mod pg15;
