use highwater_store::{Fault, FaultyStore, MemoryStore, Rule};

use super::*;

fn frozen() -> Arc<FaultyStore> {
    let store = FaultyStore::new(Arc::new(MemoryStore::new("a")));
    store.freeze();
    Arc::new(store)
}

async fn list(region: &Watched) -> Result<Page, StoreError> {
    region.list("wal/", None, 1).await
}

#[tokio::test(start_paused = true)]
async fn a_region_that_never_answers_is_given_up_and_the_next_process_knows() {
    let dir = tempfile::tempdir().unwrap();
    let (store, note) = (frozen(), Note::of(dir.path(), 0));
    let first = Watched::new(store.clone(), true, true, Some(note.clone()));
    assert!(!first.is_doubtful());
    assert_eq!(list(&first).await.unwrap_err().kind(), ErrorKind::Retry);
    assert!(first.silence().is_some(), "not asked again by this process");

    let second = Watched::new(store.clone(), true, true, Some(note.clone()));
    assert!(second.is_doubtful());
    let began = tokio::time::Instant::now();
    assert!(second.get("k").await.is_err());
    assert_eq!(began.elapsed(), HURRIED_LIMIT);

    // It is back: both know at once.
    store.thaw();
    assert!(list(&second).await.is_ok());
    assert_eq!(second.patience(), Patience::Brief);
    assert!(!Watched::new(store, true, true, Some(note)).is_doubtful());
}

#[tokio::test(start_paused = true)]
async fn one_that_is_needed_is_asked_with_all_patience_once_more() {
    let store = FaultyStore::new(Arc::new(MemoryStore::new("a")));
    store.inject(Rule::times(1, Fault::Delay(Duration::from_secs(15))).on(Operation::List));
    let region = Watched::new(Arc::new(store), false, true, None);
    assert!(region.is_doubtful(), "the plan did without it");
    assert!(region.wake());
    assert!(list(&region).await.is_ok());
    assert!(!region.wake(), "it answers");
}

#[tokio::test(start_paused = true)]
async fn the_only_region_is_never_hurried() {
    let dir = tempfile::tempdir().unwrap();
    let note = Note::of(dir.path(), 0);
    note.set();
    let store = FaultyStore::new(Arc::new(MemoryStore::new("a")));
    store.inject(Rule::times(1, Fault::Delay(Duration::from_secs(15))).on(Operation::List));
    let region = Watched::new(Arc::new(store), true, false, Some(note));
    assert!(!region.is_doubtful());
    assert!(list(&region).await.is_ok());
    assert!(region.silence().is_none());
}

#[test]
fn a_note_holds_for_a_minute_and_not_from_the_future() {
    let dir = tempfile::tempdir().unwrap();
    let at = |seconds: u64| Note {
        path: dir.path().join("silent-0"),
        clock: Clock::Fixed(Time::UNIX_EPOCH.saturating_add(Duration::from_secs(seconds))),
    };
    assert!(!at(1000).is_silent());
    at(1000).set();
    assert!(at(1000).is_silent() && at(1059).is_silent());
    assert!(!at(1060).is_silent() && !at(900).is_silent());
    std::fs::write(dir.path().join("silent-0"), "rubbish").unwrap();
    assert!(!at(1000).is_silent());
}
