//! Positions, times, timelines and WAL file names as PostgreSQL writes them.

use std::time::Duration;

use highwater_format::*;
use proptest::prelude::*;

use crate::keys::{any_range, any_time, any_timeline};
use crate::samples::{self, time, timeline};

fn any_segment_size() -> impl Strategy<Value = SegmentSize> {
    (20_u32..=30).prop_map(|bits| SegmentSize::new(1 << bits).unwrap())
}

proptest! {
    #[test]
    fn an_lsn_is_read_back(value in any::<u64>()) {
        let lsn = Lsn(value);
        prop_assert_eq!(lsn.to_string().parse::<Lsn>().unwrap(), lsn);
        prop_assert_eq!(format!("{:08X}/{:08x}", value >> 32, value & 0xFFFF_FFFF).parse::<Lsn>().unwrap(), lsn);
        prop_assert_eq!(Lsn::from_hex16(&lsn.hex16()), Some(lsn));
    }

    #[test]
    fn a_time_is_read_back(at in any_time()) {
        prop_assert_eq!(at.to_string().parse::<Time>().unwrap(), at);
        prop_assert_eq!(serde_json::from_str::<Time>(&serde_json::to_string(&at).unwrap()).unwrap(), at);
    }

    #[test]
    fn postgres_time_is_read_back(micros in -200_000_000_000_000_000_i64..200_000_000_000_000_000) {
        prop_assert_eq!(Time::from_pg(micros).to_pg(), micros);
    }

    #[test]
    fn arithmetic_never_wraps(a in any::<u64>(), b in any::<u64>(), at in any_time()) {
        prop_assert!(Lsn(a) + b >= Lsn(a));
        prop_assert!(Lsn(a) - b <= Lsn(a));
        prop_assert_eq!(Lsn(a).checked_add(b).is_none(), a.checked_add(b).is_none());
        prop_assert!(at.saturating_add(Duration::from_micros(b)) >= at);
        prop_assert!(at.saturating_sub(Duration::MAX) <= at);
        let _ = (Time::MAX.since(Time::MIN), at.since(Time::MAX), Time::from_pg(i64::MIN).to_pg());
    }

    #[test]
    fn a_segment_name_is_read_back(tli in any_timeline(), lsn in any::<u64>(), size in any_segment_size()) {
        let name = SegmentName::of(tli, Lsn(lsn), size);
        let text = name.to_string(size);
        prop_assert_eq!(text.len(), 24);
        prop_assert_eq!(SegmentName::parse(&text, size).unwrap(), name);
        prop_assert_eq!(name.start(size), size.segment_start(Lsn(lsn)));
        prop_assert!(name.start(size) <= Lsn(lsn) && Lsn(lsn).distance_from(name.start(size)) < size.bytes());
        prop_assert_eq!(WalFile::parse(&text).unwrap().to_string(), text);
    }

    #[test]
    fn a_wal_file_name_is_read_back(tli in any_timeline(), high in any::<u32>(), low in any::<u32>(), offset in any::<u32>()) {
        let name = WalName { timeline: tli, high, low };
        let files = [
            WalFile::Segment(name), WalFile::Partial(name), WalFile::History(tli), WalFile::BackupHistory(name, offset),
        ];
        for file in files {
            prop_assert_eq!(WalFile::parse(&file.to_string()).unwrap(), file);
        }
    }

    #[test]
    fn an_intersection_is_what_both_contain(a in any_range(), b in any_range(), at in any::<u64>()) {
        let both = a.intersect(b);
        prop_assert_eq!(both, b.intersect(a));
        let inside = both.is_some_and(|range| range.contains(Lsn(at)));
        prop_assert_eq!(inside, a.contains(Lsn(at)) && b.contains(Lsn(at)));
        if let Some(both) = both {
            prop_assert!(a.contains_range(both) && b.contains_range(both));
        }
    }

    #[test]
    fn history_parsing_never_panics(content in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = History::parse(timeline(5), &content);
    }
}

#[test]
fn lsn_text_is_strict_about_everything_but_zeros() {
    for (text, lsn) in [
        ("0/0", 0),
        ("16/B374D848", 0x16_B374_D848),
        ("00000000/02000028", 0x200_0028),
        ("0/a", 10),
    ] {
        assert_eq!(text.parse::<Lsn>().unwrap(), Lsn(lsn));
    }
    for text in [
        "",
        "/",
        "0/",
        "/0",
        "0",
        "0/0/0",
        "+1/2",
        "-1/2",
        "0x1/2",
        " 0/1",
        "0/1 ",
        "1/123456789",
        "G/0",
    ] {
        let error = text.parse::<Lsn>().unwrap_err();
        assert!(error.to_string().contains("0/2000028"), "{error}");
    }
}

#[test]
fn segment_sizes_are_those_of_postgres() {
    for (text, bytes) in [
        ("1MB", 1 << 20),
        ("16MB", 16 << 20),
        ("1GB", 1 << 30),
        ("16777216", 16 << 20),
    ] {
        assert_eq!(SegmentSize::from_show(text).unwrap().bytes(), bytes);
    }
    for text in [
        "",
        "0",
        "3MB",
        "512kB",
        "2GB",
        "16 XB",
        "MB",
        "99999999999999999999MB",
        "-1MB",
    ] {
        assert!(SegmentSize::from_show(text).is_err(), "{text}");
    }
}

#[test]
fn a_boundary_belongs_to_the_segment_it_begins() {
    let size = SegmentSize::DEFAULT;
    assert_eq!(size.segment_end(Lsn(0x100_0000)), Lsn(0x200_0000));
    assert_eq!(size.segment_end(Lsn(0x0FF_FFFF)), Lsn(0x100_0000));
    assert_eq!(size.segment_start(Lsn(0x100_0000)), Lsn(0x100_0000));
}

/// As `pg_walfile_name` answers on servers with these segment sizes.
#[test]
fn segment_names_are_those_of_postgres() {
    for (show, lsn, name) in [
        ("16MB", 0x200_0028, "000000010000000000000002"),
        ("16MB", 0x1_0000_0000, "000000010000000100000000"),
        ("1MB", 0xFFF0_0000, "000000010000000000000FFF"),
        ("1GB", 0x1_4000_0001, "000000010000000100000001"),
    ] {
        let size = SegmentSize::from_show(show).unwrap();
        assert_eq!(SegmentName::of(timeline(1), Lsn(lsn), size).to_string(size), name);
    }
    // With 1 GiB segments the last part counts to 3 only.
    assert!(SegmentName::parse("000000010000000000000004", SegmentSize::from_show("1GB").unwrap()).is_err());
}

#[test]
fn other_file_names_are_refused() {
    for name in [
        "",
        "../../etc/passwd",
        "000000000000000000000001",
        "00000001.HISTORY",
        "00000000.history",
        "000000010000000000000001.gz",
        "00000001000000000000000g",
        "000000010000000000000001.0000028.backup",
    ] {
        assert!(WalFile::parse(name).is_err(), "{name}");
    }
}

#[test]
fn the_first_and_the_last_moment_can_be_written() {
    for (at, text) in [
        (Time::from_unix_micros(i64::MAX), "9999-12-30T22:00:00.000000Z"),
        (Time::from_unix_micros(i64::MIN), "-009999-01-02T01:59:59.000000Z"),
    ] {
        assert_eq!(at.to_string(), text);
        assert_eq!(time(text), at);
    }
}

#[test]
fn times_need_a_zone() {
    assert_eq!(
        time("2026-11-20T15:56:53.1234569+01:00").to_string(),
        "2026-11-20T14:56:53.123456Z"
    );
    assert_eq!(time("2026-11-20 14:56:53Z").unix_micros(), 1_795_186_613_000_000);
    assert_eq!(time("2000-01-01T00:00:00Z").to_pg(), 0);
    assert_eq!(
        time("1969-12-31T23:59:59.9999995Z").unix_micros(),
        -1,
        "rounded down"
    );
    for text in ["2026-11-20T14:56:53", "2026-11-20", "now", "", "14:56:53Z"] {
        let error = text.parse::<Time>().unwrap_err();
        assert!(error.to_string().contains("with its zone"), "{error}");
    }
}

#[test]
fn a_history_tells_where_every_timeline_begins_and_ends() {
    let history = History::parse(timeline(3), samples::HISTORY).unwrap();
    assert_eq!(history.entries[0].reason, "no recovery target specified");
    assert_eq!(history.begin_of(timeline(1)), Some(Lsn::ZERO));
    assert_eq!(history.begin_of(timeline(2)), Some(Lsn(0xA00_0178)));
    assert_eq!(history.begin_of(timeline(3)), Some(Lsn(0x1_0200_0000)));
    assert_eq!(history.begin_of(timeline(4)), None);
    assert_eq!(history.switch_of(timeline(2)), Some(Lsn(0x1_0200_0000)));
    assert_eq!(history.switch_of(timeline(3)), None);
    assert_eq!(
        history.range_of(timeline(2)),
        Some(LsnRange::new(Lsn(0xA00_0178), Lsn(0x1_0200_0000)))
    );
    assert_eq!(history.parent().unwrap().timeline, timeline(2));
    assert!(history.contains(timeline(3)) && !history.contains(timeline(4)));
    let root = History::parse(timeline(1), b"").unwrap();
    assert_eq!(
        (root.timeline_at(Lsn(5)), root.begin_of(timeline(1))),
        (timeline(1), Some(Lsn::ZERO))
    );
}

#[test]
fn history_files_are_read_as_postgres_reads_them() {
    let odd = b"# a comment\r\n\n  1   0/00000028\r\n\t4\t0/30\tan \xFF odd\treason\n";
    let history = History::parse(timeline(9), odd).unwrap();
    assert_eq!(history.entries.len(), 2);
    assert_eq!(history.entries[0].switch, Lsn(0x28));
    assert_eq!(history.entries[1].reason, "an \u{FFFD} odd\treason");
    for bad in [
        "1",
        "1 x",
        "x 0/1",
        "0 0/1",
        "2 0/1\n1 0/2",
        "1 0/2\n2 0/1",
        "9 0/1",
        "10 0/1",
    ] {
        let error = History::parse(timeline(9), bad.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("timeline 9"), "{bad}: {error}");
    }
}

#[test]
fn system_identifiers_are_text_in_json() {
    let json = serde_json::to_string(&SystemId(u64::MAX)).unwrap();
    assert_eq!(json, "\"18446744073709551615\"");
    assert_eq!(
        serde_json::from_str::<SystemId>(&json).unwrap(),
        SystemId(u64::MAX)
    );
    for text in ["", "01", "+1", "-1", "18446744073709551616"] {
        assert!(text.parse::<SystemId>().is_err(), "{text}");
    }
}
