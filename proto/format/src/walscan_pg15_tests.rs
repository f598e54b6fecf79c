//! WAL that PostgreSQL 15 wrote, against what its own `pg_waldump` says of it.
//!
//! `testdata/wal/pg15`: the written parts of two segments of 1 MiB. The first ends in `pg_switch_wal()`; the second
//! is the first of timeline 2 and begins with pages of timeline 1. Between them: savepoints, rollbacks, prepared
//! transactions that drop tables, restore points, a replication origin, a restart with other settings, a promotion.

use super::*;
use crate::time::Time;

const FIRST: &[u8] = include_bytes!("../testdata/wal/pg15/000000010000000000000007.head");
const SECOND: &[u8] = include_bytes!("../testdata/wal/pg15/000000020000000000000008.head");
const WALDUMP: &str = include_str!("../testdata/wal/pg15/pg_waldump.txt");
const START: Lsn = Lsn(7 * SEGMENT);

fn wal() -> Vec<u8> {
    let mut wal = FIRST.to_vec();
    wal.resize(SEGMENT as usize, 0);
    wal.extend(SECOND);
    wal
}

fn scanner() -> WalScanner {
    WalScanner::new(START, size(), timeline(2), Some(15))
}

fn field<'a>(line: &'a str, before: &str, after: &str) -> &'a str {
    let (_, rest) = line.split_once(before).unwrap();
    rest.split(after).next().unwrap().trim()
}

/// "2026-11-20 15:22:30.002734 UTC; subxacts: ..." as PostgreSQL prints it.
fn pg_time(text: &str) -> Time {
    let (time, _) = text.split_once(" UTC").unwrap();
    format!("{}Z", time.trim().replace(' ', "T")).parse().unwrap()
}

/// What a line of `pg_waldump` says should be reported.
fn expected(line: &str, reported: &WalEvent) -> WalEvent {
    let desc = field(line, "desc: ", "\n");
    let (what, rest) = desc.split_once(' ').unwrap_or((desc, ""));
    let end = end_of(reported);
    let number = |name: &str| field(desc, name, " ").parse().unwrap();
    match what {
        "COMMIT" | "ABORT" => {
            let xid = field(line, "tx:", ",").parse().unwrap();
            WalEvent::Commit {
                end,
                time: pg_time(rest),
                xid,
                abort: what == "ABORT",
            }
        }
        "COMMIT_PREPARED" | "ABORT_PREPARED" => {
            let (xid, time) = rest.split_once(": ").unwrap();
            let abort = what == "ABORT_PREPARED";
            WalEvent::Commit {
                end,
                time: pg_time(time),
                xid: xid.parse().unwrap(),
                abort,
            }
        }
        "RESTORE_POINT" => {
            let WalEvent::RestorePoint { time, .. } = reported else {
                panic!("{line}: {reported:?}")
            };
            WalEvent::RestorePoint {
                end,
                name: rest.to_owned(),
                time: *time,
            }
        }
        "CHECKPOINT_SHUTDOWN" => {
            let WalEvent::Checkpoint { time, .. } = reported else {
                panic!("{line}: {reported:?}")
            };
            let redo = field(rest, "redo ", ";").parse().unwrap();
            let timeline = field(rest, "tli ", ";").parse().unwrap();
            WalEvent::Checkpoint {
                end,
                redo,
                timeline,
                time: *time,
                shutdown: true,
            }
        }
        "PARAMETER_CHANGE" => WalEvent::ParameterChange {
            end,
            max_connections: number("max_connections="),
            max_worker_processes: number("max_worker_processes="),
            max_wal_senders: number("max_wal_senders="),
            max_prepared_xacts: number("max_prepared_xacts="),
            max_locks_per_xact: number("max_locks_per_xact="),
            wal_level: ["minimal", "replica", "logical"]
                .iter()
                .position(|name| *name == field(desc, "wal_level=", " "))
                .unwrap() as i32,
        },
        "END_OF_RECOVERY" => WalEvent::EndOfRecovery {
            end,
            time: pg_time(field(desc, "time ", "\n")),
            timeline: field(desc, "tli ", ";").parse().unwrap(),
            previous: field(desc, "prev tli ", ";").parse().unwrap(),
        },
        "SWITCH" => WalEvent::Switch { end },
        other => panic!("unexpected {other}"),
    }
}

#[test]
fn pg_waldump_says_the_same() {
    let outcome = feed(scanner(), &wal());
    let lines: Vec<_> = WALDUMP.lines().collect();
    assert_eq!(outcome.events.len(), lines.len());
    for (line, event) in lines.iter().zip(&outcome.events) {
        assert_eq!(event, &expected(line, event), "{line}");
        let start: Lsn = field(line, "lsn: ", ",").parse().unwrap();
        let total: u64 = field(line, "(rec/tot):", ",")
            .split('/')
            .nth(1)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let plain_end = (start.0 + total).next_multiple_of(8);
        match event {
            WalEvent::Switch { end } => assert_eq!(*end, size().segment_end(start)),
            _ if start.align_down(PAGE) == Lsn(plain_end).align_down(PAGE) => {
                assert_eq!(end_of(event), Lsn(plain_end), "{line}");
            }
            // Across a page, its header comes on top.
            _ => assert!((plain_end..=plain_end + 24).contains(&end_of(event).0), "{line}"),
        }
    }
    let named = |wanted: &str| {
        outcome.events.iter().find_map(|event| match event {
            WalEvent::RestorePoint { name, time, .. } if name == wanted => Some(*time),
            _ => None,
        })
    };
    // `pg_waldump` does not show the time of a restore point; the transactions around it do.
    let time = named("before the release").unwrap();
    assert!(
        pg_time("2026-11-20 15:22:30.005883 UTC") < time && time < pg_time("2026-11-20 15:22:30.007424 UTC")
    );
    assert!(named(&"n".repeat(63)).is_some());
}

#[test]
fn the_wal_ends_with_the_segment_that_is_not_full() {
    let outcome = feed(scanner(), &wal());
    // The last record is the switch with which a base backup ended.
    assert_eq!(outcome.damage, None);
    let until_switch = SEGMENT as usize + 0x4C50;
    let mut padded = wal()[..until_switch].to_vec();
    padded.resize(2 * SEGMENT as usize, 0);
    let outcome = feed(scanner(), &padded);
    assert!(outcome.damage.unwrap().is_end_of_wal());
    assert_eq!(outcome.whole_until, START + until_switch as u64);
}

#[test]
fn the_pages_of_the_parent_are_accepted_and_then_the_new_timeline() {
    let mut scanner = WalScanner::new(START + SEGMENT, size(), timeline(2), Some(15));
    scanner.feed(&SECOND[..PAGE as usize], &mut |_| ()).unwrap();
    assert_eq!(scanner.timeline(), timeline(1));
    scanner.feed(&SECOND[PAGE as usize..], &mut |_| ()).unwrap();
    assert_eq!(scanner.timeline(), timeline(2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_cut_gives_the_same(cuts in prop::collection::vec(prop_oneof![1..60_usize, 1..30_000_usize], 1..20)) {
        let wal = wal();
        prop_assert_eq!(feed_cut(scanner(), &wal, &cuts), feed(scanner(), &wal));
    }

    #[test]
    fn a_flipped_bit_is_noticed_or_means_nothing(
        second in any::<bool>(),
        at in any::<prop::sample::Index>(),
        bit in 0..8_u32,
    ) {
        let mut wal = wal();
        // As on disk, with zeros behind the switch: a length that became too long shows on the next page.
        wal.resize(2 * SEGMENT as usize, 0);
        let whole = feed(scanner(), &wal);
        // Before the last record, so that something follows.
        let at = if second { SEGMENT as usize + at.index(0x4C50 - 64) } else { at.index(FIRST.len()) };
        wal[at] ^= 1 << bit;
        let outcome = feed(scanner(), &wal);
        match &outcome.damage {
            None => prop_assert_eq!(outcome, whole),
            Some(_) => {
                prop_assert!(whole.events.starts_with(&outcome.events));
                prop_assert!(outcome.whole_until <= START + at as u64);
            }
        }
    }
}
