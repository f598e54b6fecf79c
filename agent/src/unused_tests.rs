use highwater_config::Policy;
use highwater_format::{SegmentSize, SystemId};

use super::*;
use crate::test_world::{MIB, world};

/// Segment 7 of a server with segments of 1 MiB, up to the page in which `pg_switch_wal()` ended it.
const SWITCHED: &[u8] = include_bytes!("../../proto/format/testdata/wal/pg15/000000010000000000000007.head");
const START: Lsn = Lsn(7 * MIB);
const END: Lsn = Lsn(8 * MIB);

fn identity() -> Identity {
    Identity {
        segment_size: SegmentSize::new(MIB).unwrap(),
        system_id: SystemId(u64::from_le_bytes(SWITCHED[24..32].try_into().unwrap())),
        ..world(Policy::All).shared.archive.identity.clone()
    }
}

/// The whole segment, and where what is used of it ends.
fn segment() -> (Vec<u8>, Lsn) {
    let mut segment = SWITCHED.to_vec();
    let used = segment.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    segment.resize(usize::try_from(MIB).unwrap(), 0);
    (segment, START + used.next_multiple_of(8) as u64)
}

fn unused(start: Lsn, archived: &[u8]) -> Vec<LsnRange> {
    let Unused(rests) = Unused::of(&identity(), TimelineId::FIRST, start, archived);
    rests.into_iter().map(|rest| rest.range).collect()
}

/// As many pages from `start` on as `bytes` hold, each of which says that it is of `timeline`, and the one at the LSN that
/// `address` gives it.
fn pages(start: Lsn, bytes: usize, timeline: u32, address: impl Fn(Lsn) -> Lsn) -> Vec<u8> {
    let mut sent = vec![0xEE; bytes];
    for (number, page) in sent.chunks_mut(8192).enumerate() {
        let at = start + number as u64 * 8192;
        page[4..8].copy_from_slice(&timeline.to_le_bytes());
        page[8..16].copy_from_slice(&address(at).0.to_le_bytes());
    }
    sent
}

#[test]
fn what_follows_a_switch_is_found_however_much_of_it_is_archived() {
    let (segment, used) = segment();
    let rest = LsnRange::new(used, END);
    assert_eq!(unused(START, &segment), [rest]);
    let until = |lsn: Lsn| usize::try_from(lsn.distance_from(START)).unwrap();
    assert_eq!(unused(START, &segment[..until(used)]), [rest]);
    assert_eq!(unused(START, &segment[..until(used) - 8]), []);
    // What follows keeps nobody from telling about this segment.
    let two = [&segment[..], &vec![7; 65_536]].concat();
    assert_eq!(unused(START, &two), [rest]);
    // Nobody knows where a record begins inside a page: the next page tells.
    assert_eq!(unused(START + 100, &segment[100..]), [rest]);
}

/// Who reads on inside a large segment has not seen the switch; only zeros are archived behind it.
#[test]
fn behind_a_switch_that_was_not_seen_are_zeros() {
    let zeros = vec![0; 1 << 19];
    let middle = START + (1 << 19);
    assert_eq!(unused(middle, &zeros), [LsnRange::new(middle, END)]);
    assert_eq!(unused(middle, &zeros[..8192]), [LsnRange::new(middle, END)]);
    let mut other = zeros.clone();
    other[400_000] = 1;
    assert_eq!(unused(middle, &other), [], "what is not zero is somebody's");
    assert_eq!(unused(START, &zeros), [], "no segment begins so");
}

/// A server that was rolled back to before the switch has written other WAL there. What a recycled file held names other places.
#[test]
fn i6_wal_that_was_written_behind_a_switch_that_was_not_seen_is_another_course() {
    let zeros = vec![0; 1 << 19];
    let middle = START + (1 << 19);
    let archived = Unused::of(&identity(), TimelineId::FIRST, middle, &zeros);
    let recycled = pages(middle, 1 << 19, 1, |at| at.saturating_sub(4 * MIB));
    assert_eq!(archived.first_difference(middle, &zeros, &recycled), None);
    let of_the_timeline_before = pages(middle, 1 << 19, 7, |at| at);
    let same = archived.first_difference(middle, &zeros, &of_the_timeline_before);
    assert_eq!(same, None);
    let written = pages(middle, 1 << 19, 1, |at| at);
    assert_eq!(archived.first_difference(middle, &zeros, &written), Some(0));
    let later = [&recycled[..8192 * 3], &written[8192 * 3..]].concat();
    assert_eq!(archived.first_difference(middle, &zeros, &later), Some(8192 * 3));
    // Where the stream goes on, however it is cut into messages.
    let rest = archived.around(middle + 1000).unwrap();
    for (from, found) in [
        (0, Some(3)),
        (5000, Some(3)),
        (8192 * 3 + 1, Some(4)),
        (8192 * 64 - 10, None),
    ] {
        let at = middle + from as u64;
        let found = found.map(|page: u64| middle + page * 8192);
        assert_eq!(rest.first_wal(at, &later[from..]), found, "{from}");
    }
    // Where the switch itself is equal, nobody reads what follows, whatever it is.
    let (segment, used) = segment();
    let seen = Unused::of(&identity(), TimelineId::FIRST, START, &segment);
    let until = usize::try_from(used.distance_from(START)).unwrap();
    let mut sent = pages(START, segment.len(), 1, |at| at);
    sent[..until].copy_from_slice(&segment[..until]);
    assert_eq!(seen.first_difference(START, &segment, &sent), None);
}

#[test]
fn only_what_is_used_must_be_equal() {
    let rest = |start, end| Rest {
        range: LsnRange::new(Lsn(start), Lsn(end)),
        unseen: None,
    };
    let parts = Unused(vec![rest(104, 106), rest(108, 110)]);
    let differs = |sent: &str| parts.first_difference(Lsn(100), b"abcd00gh00kl", sent.as_bytes());
    assert_eq!(differs("abcd00gh00kl"), None);
    assert_eq!(differs("abcdXXghXXkl"), None);
    for (sent, at) in [
        ("Xbcd00gh00kl", 0),
        ("abcXXXgh00kl", 3),
        ("abcdXXgXXXkl", 7),
        ("abcdXXghXXkX", 11),
    ] {
        assert_eq!(differs(sent), Some(at), "{sent}");
    }
    // Any piece of it tells the same, the first difference counted from where it begins.
    for at in 0..12 {
        let lsn = Lsn(100 + at as u64);
        let sent = &b"abcdXXgXXXkl"[at..];
        let found = parts.first_difference(lsn, &b"abcd00gh00kl"[at..], sent);
        assert_eq!(found, (at <= 7).then(|| 7 - at), "{at}");
    }
    assert_eq!(parts.around(Lsn(103)), None);
    assert_eq!(parts.around(Lsn(109)), Some(rest(108, 110)));
}
