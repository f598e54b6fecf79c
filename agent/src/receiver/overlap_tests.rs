use highwater_config::Policy;
use highwater_format::{SegmentSize, SystemId};

use super::*;
use crate::budget::Budget;
use crate::test_world::{MIB, World, piece, wal, world};

fn overlap(plain: &[u8]) -> Overlap {
    let range = LsnRange {
        start: Lsn(100),
        end: Lsn(100 + plain.len() as u64),
    };
    Overlap::of(TimelineId::FIRST, range, plain.to_vec(), None)
}

fn charged(plain: &[u8], budget: &Arc<Budget>) -> Overlap {
    let charge = Some(budget.charge(plain.len() as u64));
    Overlap {
        charge,
        ..overlap(plain)
    }
}

#[test]
fn what_was_compared_is_no_longer_charged() {
    let (budget, plain) = (Budget::new(1 << 30), vec![7; 3 * STEP + 5]);
    let mut plainly = charged(&plain, &budget);
    for left in [2 * STEP + 5, STEP + 5, 5] {
        plainly.pass(Bytes::from(vec![7; STEP])).unwrap();
        assert_eq!(budget.used(), left as u64);
    }
    plainly.pass(Bytes::from_static(&[7; 9])).unwrap();
    assert_eq!(budget.used(), 0);
    // The place of a difference counts what was let go of.
    let mut other = charged(&plain, &budget);
    other.pass(Bytes::from(vec![7; 2 * STEP])).unwrap();
    let Err(AgentError::Diverged { at, .. }) = other.pass(Bytes::from_static(b"\x07x")) else {
        panic!("must differ")
    };
    assert_eq!(at, Lsn(100 + 2 * STEP as u64 + 1));
    drop(other);
    // What is withheld is charged until it has been passed on.
    let mut withheld = charged(&plain, &budget).withholding();
    let [equal, rest] = withheld.pass(Bytes::from(vec![7; plain.len() + 1])).unwrap();
    assert_eq!((equal.len(), rest.len()), (plain.len(), 1));
    assert_eq!(budget.used(), plain.len() as u64);
    withheld.pass(Bytes::from_static(b"more")).unwrap();
    assert_eq!(budget.used(), 0);
}

/// Segment 7 of a server with segments of 1 MiB, up to the page in which `pg_switch_wal()` ended it.
const SWITCHED: &[u8] =
    include_bytes!("../../../proto/format/testdata/wal/pg15/000000010000000000000007.head");

#[test]
fn what_a_standby_leaves_behind_a_switch_is_no_other_course() {
    let world = world(Policy::All);
    let identity = Identity {
        segment_size: SegmentSize::new(MIB).unwrap(),
        system_id: SystemId(u64::from_le_bytes(SWITCHED[24..32].try_into().unwrap())),
        ..world.shared.archive.identity.clone()
    };
    let mut archived = SWITCHED.to_vec();
    let used = archived.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    archived.resize(usize::try_from(MIB).unwrap(), 0);
    let range = LsnRange::new(Lsn(7 * MIB), Lsn(8 * MIB));
    let begun = || Overlap::of(TimelineId::FIRST, range, archived.clone(), None);
    let mut sent = archived.clone();
    sent[used.next_multiple_of(8)..].fill(0xEE);
    for message in [1 << 20, 128 << 10, 1000] {
        let mut overlap = begun().but_for_what_is_unused(&identity);
        for message in sent.chunks(message) {
            overlap.pass(Bytes::copy_from_slice(message)).unwrap();
        }
        assert!(overlap.is_over());
    }
    assert!(
        begun().pass(Bytes::from(sent.clone())).is_err(),
        "who does not know of the switch"
    );
    // Whatever is used must be equal, the switch itself as well.
    for at in [0, used / 2, used - 1] {
        let mut other = sent.clone();
        other[at] ^= 1;
        let passed = begun().but_for_what_is_unused(&identity).pass(Bytes::from(other));
        let Err(AgentError::Diverged { at: found, .. }) = passed else {
            panic!("must differ")
        };
        assert_eq!(found, range.start + at as u64);
    }
}

#[test]
fn equal_bytes_pass_in_any_pieces() {
    let mut overlap = overlap(b"abcdef");
    overlap.compare(b"ab").unwrap();
    overlap.compare(b"cdefgh").unwrap();
    overlap.compare(b"anything").unwrap();
}

/// The object before tells two courses apart that are the same in the little that follows it.
#[test]
fn what_is_only_compared_does_not_pass() {
    let (budget, bytes) = (Budget::new(1 << 30), Bytes::from_static);
    let begun = || {
        let next = Overlap {
            range: LsnRange::new(Lsn(106), Lsn(108)),
            next: Lsn(106),
            ..charged(b"gh", &budget)
        };
        charged(b"abcdef", &budget).followed_by(next)
    };
    let mut overlap = begun();
    assert_eq!((overlap.asks_from(Lsn(106)), overlap.end()), (Lsn(100), Lsn(108)));
    assert_eq!(budget.used(), 8);
    for (comes, passes) in [("abcd", ""), ("efg", "g"), ("hij", "hij"), ("k", "k")] {
        let [_, passed] = overlap.pass(bytes(comes.as_bytes())).unwrap();
        assert_eq!(passed, passes);
    }
    assert_eq!(budget.used(), 0);
    let mut other = begun();
    let Err(AgentError::Diverged { at, .. }) = other.pass(bytes(b"abcdXfgh")) else {
        panic!("must differ")
    };
    assert_eq!(at, Lsn(104));
}

#[test]
fn the_first_differing_byte_is_named() {
    let mut overlap = overlap(b"abcdef");
    overlap.compare(b"abc").unwrap();
    let Err(AgentError::Diverged { at, .. }) = overlap.compare(b"dXf") else {
        panic!("must differ")
    };
    assert_eq!(at, Lsn(104));
}

#[test]
fn nothing_of_a_new_timeline_passes_before_all_it_shares_was_compared() {
    let bytes = Bytes::from_static;
    let mut common = overlap(b"abcdef").withholding();
    for piece in [b"ab", b"cd"] {
        assert_eq!(common.pass(bytes(piece)).unwrap(), [bytes(b""), bytes(b"")]);
    }
    assert_eq!(
        common.pass(bytes(b"efgh")).unwrap(),
        [bytes(b"abcdef"), bytes(b"gh")]
    );
    assert_eq!(common.pass(bytes(b"ij")).unwrap(), [bytes(b""), bytes(b"ij")]);
    let mut rolled_back = overlap(b"abcdef").withholding();
    rolled_back.pass(bytes(b"abc")).unwrap();
    assert!(rolled_back.pass(bytes(b"dXf")).is_err());
    let mut nothing = overlap(b"").withholding();
    assert_eq!(nothing.pass(bytes(b"ab")).unwrap(), [bytes(b""), bytes(b"ab")]);
}

fn at_end(world: &World, indices: &[usize], end: u64) {
    for index in indices {
        let lsn = Lsn(end);
        world.shared.progress.stored(
            *index,
            Position {
                timeline: TimelineId::FIRST,
                lsn,
            },
        );
    }
}

/// Some regions have lost the front of the object that is being received, each another part of it.
#[tokio::test]
async fn where_the_front_is_gone_the_longest_rest_is_compared() {
    let world = world(Policy::All);
    let (end, range) = (MIB + 900, LsnRange::new(Lsn(MIB), Lsn(MIB + 900)));
    world.put_wal(0, piece(PieceKind::Tail, MIB + 500, end)).await;
    for (start, end) in [(MIB, MIB + 200), (MIB + 300, MIB + 500), (MIB + 500, end)] {
        world.put_wal(1, piece(PieceKind::Tail, start, end)).await;
    }
    at_end(&world, &[0, 1], end);
    let held = Overlap::load_if_held(&world.shared, TimelineId::FIRST, range).await;
    assert!(held.unwrap().is_none());
    let load = async || {
        Overlap::load_rest(&world.shared, TimelineId::FIRST, range)
            .await
            .unwrap()
    };
    let mut rest = load().await;
    assert_eq!(rest.range(), LsnRange::new(Lsn(MIB + 300), Lsn(end)));
    // What comes before it is not known; from there on one byte that differs is found, in whatever pieces it comes.
    let mut sent = wal(range);
    sent[..300].fill(0xAA);
    for piece in sent.chunks(70) {
        let [withheld, passed] = rest.pass(Bytes::copy_from_slice(piece)).unwrap();
        assert_eq!((withheld.len(), &passed[..]), (0, piece));
    }
    sent[300] ^= 1;
    for size in [70, 900] {
        let mut rest = load().await;
        let mut passed = sent
            .chunks(size)
            .map(|piece| rest.pass(Bytes::copy_from_slice(piece)));
        let Some(Err(AgentError::Diverged { at, .. })) = passed.find(Result::is_err) else {
            panic!("must differ")
        };
        assert_eq!(at, Lsn(MIB + 300));
    }
}

/// Where nothing is left nothing is compared; but nothing is reported either before the stream has passed the place.
#[tokio::test]
async fn where_all_is_gone_nothing_is_compared() {
    let world = world(Policy::All);
    let (timeline, range) = (TimelineId::FIRST, LsnRange::new(Lsn(MIB), Lsn(MIB + 900)));
    at_end(&world, &[0, 1, 2], MIB + 900);
    let mut rest = Overlap::load_rest(&world.shared, timeline, range).await.unwrap();
    assert_eq!(rest.end(), range.end);
    let sent = Bytes::from(wal(range));
    assert_eq!(rest.pass(sent.clone()).unwrap(), [Bytes::new(), sent]);
    // A region that does not answer may hold it.
    world.silence(2);
    assert!(Overlap::load_rest(&world.shared, timeline, range).await.is_err());
}
