//! What is there already: the same, something else, or nothing that can be read.

use highwater_format::coverage::PieceKind;
use highwater_format::{Codec, Header, Kind, TimelineId};
use highwater_store::{Fault, FaultyStore, MemoryStore, Rule};

use super::*;
use crate::state::RegionState;
use crate::test_world::{MIB, SYSTEM, piece, sealed, wal};

/// Writes `ours` where `theirs` is, which stays.
async fn beside(theirs: impl Into<Bytes>, ours: impl Into<Bytes>) -> Result<Written> {
    let store = MemoryStore::new("a");
    let theirs = theirs.into();
    let there = Object::new(theirs.clone());
    store.put("key", there, PutMode::Create).await.unwrap();
    let written = write_once(&store, "key", Object::new(ours)).await;
    assert_eq!(store.get("key").await.unwrap(), theirs);
    written
}

fn segment(codec: Codec) -> Bytes {
    let range = piece(PieceKind::Segment, MIB, 2 * MIB).range;
    let header = Header::wal(Kind::Segment, codec, SYSTEM, TimelineId::FIRST, range);
    sealed(header, &wal(range))
}

#[tokio::test]
async fn damage_in_one_region_is_no_contradiction() {
    let ours = segment(Codec::Lz4);
    let mut flipped = segment(Codec::None).to_vec();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let cut = ours.slice(..ours.len() / 2);
    for theirs in [Bytes::from(flipped), cut, Bytes::new(), Bytes::from("not ours")] {
        let written = beside(theirs, ours.clone()).await;
        assert!(matches!(written, Err(AgentError::Object { .. })), "{written:?}");
    }
}

#[tokio::test]
async fn what_can_be_read_on_both_sides_is_the_same_or_a_contradiction() {
    let written = beside(segment(Codec::None), segment(Codec::Lz4)).await;
    assert!(matches!(written, Ok(Written::Same)), "{written:?}");
    let range = piece(PieceKind::Segment, MIB, 2 * MIB).range;
    let header = Header::wal(Kind::Segment, Codec::Lz4, SYSTEM, TimelineId::FIRST, range);
    let mut other = wal(range);
    other[7] ^= 1;
    let written = beside(sealed(header, &other), segment(Codec::Lz4)).await;
    assert!(matches!(written, Err(AgentError::Conflict { .. })), "{written:?}");
}

#[tokio::test]
async fn a_history_that_was_cut_off_is_damaged_and_one_that_ends_elsewhere_contradicts() {
    let ours = "1\t0/400000\tpromoted\n\n2\t0/500000\tpromoted\n";
    for theirs in ["", "1\t0/40", &ours[..ours.len() - 1], "\0\0\0\0"] {
        let written = beside(theirs.to_owned(), ours).await;
        assert!(
            matches!(written, Err(AgentError::Object { .. })),
            "{theirs:?}: {written:?}"
        );
    }
    // The first may be whole: a timeline of the same number that left timeline 1 directly.
    let longer = format!("{ours}\n3\t0/600000\tpromoted\n");
    for theirs in ["1\t0/400000\tpromoted\n", "1\t0/300000\tpromoted\n", &longer] {
        let written = beside(theirs.to_owned(), ours).await;
        assert!(
            matches!(written, Err(AgentError::Conflict { .. })),
            "{theirs:?}: {written:?}"
        );
    }
}

/// While a long backlog is copied one call is repeated.
#[tokio::test(start_paused = true)]
async fn a_call_that_succeeds_says_nothing_of_the_pipeline() {
    let state = State::new(["a".to_owned()]);
    let plain = Arc::new(FaultyStore::new(Arc::new(MemoryStore::new("a"))));
    let region = Region::over(plain.clone(), "a".into(), 0, &state, Some(1));
    let shown = || {
        let view = state.snapshot().regions[0].clone();
        (view.state, view.last_error)
    };
    let why = Some("behind".to_owned());
    state.update_region(0, |view| view.pipeline(RegionState::CatchingUp, why.clone()));
    plain.inject(Rule::times(2, Fault::FailBefore(ErrorKind::Retry)));
    let put = region.store.put("key", Object::new("bytes"), PutMode::Create);
    let mut put = std::pin::pin!(put);
    assert!(futures::poll!(put.as_mut()).is_pending());
    assert_eq!(shown().0, RegionState::Failing);
    put.await.unwrap();
    assert_eq!(shown(), (RegionState::CatchingUp, why));
}
