//! Keys: every one is read back, sorts as its position does, and nothing else is taken for one.

use highwater_format::*;
use proptest::prelude::*;

use crate::samples::{self, SYSTEM};

fn layout() -> Layout {
    Layout::new("orders".parse().unwrap(), SYSTEM)
}

pub(crate) fn any_timeline() -> impl Strategy<Value = TimelineId> {
    (1..=u32::MAX).prop_map(samples::timeline)
}

pub(crate) fn any_range() -> impl Strategy<Value = LsnRange> {
    (any::<u64>(), any::<u64>()).prop_filter_map("an empty range is no key", |(a, b)| {
        (a != b).then(|| LsnRange::new(Lsn(a.min(b)), Lsn(a.max(b))))
    })
}

pub(crate) fn any_time() -> impl Strategy<Value = Time> {
    any::<i64>().prop_map(Time::from_unix_micros)
}

fn any_backup_id() -> impl Strategy<Value = BackupId> {
    (any_timeline(), any::<u64>(), 0..=Time::MAX.unix_micros())
        .prop_map(|(tli, lsn, at)| BackupId::new(tli, Lsn(lsn), Time::from_unix_micros(at)))
}

fn any_key() -> impl Strategy<Value = Key> {
    let wal_name = (any_timeline(), any::<u32>(), any::<u32>());
    prop_oneof![
        Just(Key::Identity),
        Just(Key::Pulse),
        any_timeline().prop_map(Key::History),
        wal_name.prop_map(|(timeline, high, low)| Key::Segment(WalName { timeline, high, low })),
        (any_timeline(), any_range()).prop_map(|(tli, range)| Key::Tail(tli, range)),
        (any_timeline(), any_range()).prop_map(|(tli, range)| Key::Gap(tli, range)),
        (any_backup_id(), any::<u32>()).prop_map(|(id, number)| Key::Pack(id, number)),
        any_backup_id().prop_map(Key::Manifest),
        any_backup_id().prop_map(Key::Backup),
        any::<u64>().prop_map(Key::Writer),
    ]
}

proptest! {
    #[test]
    fn a_key_is_read_back(key in any_key()) {
        let text = layout().key(&key);
        prop_assert_eq!(layout().parse(&text), Some(key));
        prop_assert_eq!(Layout::parse_system_id(layout().cluster(), &text), Some(SYSTEM));
    }

    #[test]
    fn what_is_read_as_a_key_is_written_the_same(key in any_key(), at in any::<prop::sample::Index>(), with in any::<char>()) {
        let mut chars: Vec<char> = layout().key(&key).chars().collect();
        let at = at.index(chars.len());
        chars[at] = with;
        let text: String = chars.into_iter().collect();
        if let Some(parsed) = layout().parse(&text) {
            prop_assert_eq!(layout().key(&parsed), text);
        }
    }

    #[test]
    fn tail_keys_sort_as_their_ranges(a in any_range(), b in any_range()) {
        let key = |range| layout().tail(samples::timeline(1), range);
        prop_assert_eq!(key(a).cmp(&key(b)), a.cmp(&b));
    }

    #[test]
    fn numbered_keys_sort_as_their_numbers(a in any::<u64>(), b in any::<u64>(), c in any::<u32>(), d in any::<u32>()) {
        prop_assert_eq!(layout().writer(a).cmp(&layout().writer(b)), a.cmp(&b));
        let pack = |number| layout().pack(&samples::backup_id(), number);
        prop_assert_eq!(pack(c).cmp(&pack(d)), c.cmp(&d));
    }

    #[test]
    fn a_backup_id_says_what_it_was_made_of(tli in any_timeline(), lsn in any::<u64>(), at in 0..Time::MAX.unix_micros()) {
        let id = BackupId::new(tli, Lsn(lsn), Time::from_unix_micros(at));
        prop_assert_eq!(id.timeline(), tli);
        prop_assert_eq!(id.start_lsn(), Lsn(lsn));
        prop_assert_eq!(id.started_at().unix_micros(), at - at % 1_000_000);
        prop_assert_eq!(BackupId::parse(id.as_str()).unwrap(), id);
    }

    #[test]
    fn parsing_never_panics(text in ".*") {
        let _ = layout().parse(&text);
        let _ = layout().parse(&format!("{}wal/{text}", layout().root()));
        let _ = layout().parse(&format!("{}base/{text}", layout().root()));
        let _ = BackupId::parse(&text);
        let _ = text.parse::<ClusterName>();
        let _ = WalFile::parse(&text);
    }
}

#[test]
fn strangers_are_no_keys() {
    let id = samples::backup_id();
    let foreign = [
        "identity.json",
        "",
        "wal/00000001",
        "wal/00000001/",
        "wal/00000000/history",
        "wal/00000001/history/",
        "wal/1/history",
        "wal/0000000a/history",
        "wal/00000001/segment/000000020000000000000001",
        "wal/00000001/segment/000000010000000000000001.partial",
        "wal/00000001/tail/0000000000000001",
        "wal/00000001/tail/0000000000000002-0000000000000001",
        "wal/00000001/tail/0000000000000001-0000000000000001",
        "wal/00000001/gap/000000000000000a-000000000000000b",
        "writer/1",
        "writer/99999999999999999999",
        "pulse.json.tmp",
        "base/00000001-0000000002000028-20261120T145653Z",
        "base/00000001-0000000002000028-20261332T145653Z/manifest",
        "base/00000001-0000000002000028-20261120T145653+/manifest",
    ];
    for key in foreign {
        let key = if key == "identity.json" {
            key.to_owned()
        } else {
            format!("{}{key}", layout().root())
        };
        assert_eq!(layout().parse(&key), None, "{key}");
    }
    assert_eq!(
        layout().parse(&format!("{}base/{id}/pack/99999999999", layout().root())),
        None
    );
    let other = Layout::new("orders".parse().unwrap(), SystemId(1));
    assert_eq!(other.parse(&layout().pulse()), None);
}

#[test]
fn directories_are_prefixes_of_what_they_hold() {
    let (layout, tli, id) = (layout(), samples::timeline(1), samples::backup_id());
    let range = LsnRange::new(Lsn(1), Lsn(2));
    let name = SegmentName {
        timeline: tli,
        number: 1,
    };
    assert!(
        layout
            .segment(name, SegmentSize::DEFAULT)
            .starts_with(&layout.segment_dir(tli))
    );
    assert!(layout.tail(tli, range).starts_with(&layout.tail_dir(tli)));
    assert!(layout.gap(tli, range).starts_with(&layout.gap_dir(tli)));
    assert!(layout.history(tli).starts_with(&layout.timeline_dir(tli)));
    assert!(layout.timeline_dir(tli).starts_with(&layout.wal_dir()));
    assert!(layout.pack(&id, 0).starts_with(&layout.backup_dir(&id)));
    assert!(layout.backup_dir(&id).starts_with(&layout.base_dir()));
    assert!(layout.writer(1).starts_with(&layout.writer_dir()));
    assert!(layout.root().starts_with(&Layout::cluster_dir(layout.cluster())));
}

#[test]
fn cluster_names_cannot_leave_their_place() {
    for name in ["orders", "a", "0", "a.b_c-d", &"x".repeat(63)] {
        assert_eq!(name.parse::<ClusterName>().unwrap().as_str(), name);
    }
    for name in [
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "Orders",
        "a/b",
        "a b",
        "ä",
        &"x".repeat(64),
    ] {
        assert!(name.parse::<ClusterName>().is_err(), "{name}");
    }
}
