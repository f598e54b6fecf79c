//! When calls are tried again, how long that takes, and what a lost reply means.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, also in the functions that its cases share"
)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use highwater_store::{
    ErrorKind, Fault, FaultRates, FaultyStore, MemoryStore, Object, Operation, Put, PutMode, RetryObserver,
    RetryPolicy, Retrying, Rule, Store, StoreError,
};
use tokio::time::Instant;

#[derive(Default)]
struct Heard {
    waits: Mutex<Vec<Duration>>,
    successes: AtomicU32,
}

impl RetryObserver for Heard {
    fn on_retry(&self, error: &StoreError, attempt: u32, wait: Duration) {
        assert!(!error.message().is_empty());
        let mut waits = self.waits.lock().unwrap();
        waits.push(wait);
        assert_eq!(attempt as usize, waits.len());
    }

    fn on_success(&self) {
        self.successes.fetch_add(1, Ordering::Relaxed);
    }
}

struct Bench {
    memory: Arc<MemoryStore>,
    faulty: Arc<FaultyStore>,
    heard: Arc<Heard>,
    store: Retrying,
}

fn bench(policy: RetryPolicy) -> Bench {
    let memory = Arc::new(MemoryStore::new("eu"));
    let faulty = Arc::new(FaultyStore::new(Arc::clone(&memory) as Arc<dyn Store>));
    let heard = Arc::new(Heard::default());
    let store = Retrying::new(
        Arc::clone(&faulty) as Arc<dyn Store>,
        policy.with_seed(7),
        Arc::clone(&heard) as Arc<dyn RetryObserver>,
    );
    Bench {
        memory,
        faulty,
        heard,
        store,
    }
}

impl Bench {
    async fn create(&self, bytes: &'static str) -> Result<Put, StoreError> {
        self.store.put("key", Object::new(bytes), PutMode::Create).await
    }

    fn retries(&self) -> usize {
        self.heard.waits.lock().unwrap().len()
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_reply_to_a_create_is_a_success() {
    let bench = bench(RetryPolicy::interactive());
    bench
        .faulty
        .inject(Rule::once(Fault::FailAfter(ErrorKind::Retry)).on(Operation::Put));
    assert_eq!(bench.create("mine").await.unwrap(), Put::Created);
    assert_eq!(
        (
            bench.faulty.calls(Operation::Put),
            bench.faulty.calls(Operation::Get)
        ),
        (2, 1)
    );
    assert_eq!(bench.heard.successes.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn after_a_lost_reply_a_rival_is_still_a_rival() {
    // Same length, so that only the bytes tell them apart; and another length, which needs no read.
    for (rival, reads) in [("hers", 1), ("longer than mine", 0)] {
        let bench = bench(RetryPolicy::interactive());
        bench
            .memory
            .put("key", Object::new(rival), PutMode::Create)
            .await
            .unwrap();
        bench
            .faulty
            .inject(Rule::once(Fault::FailBefore(ErrorKind::Retry)).on(Operation::Put));
        assert_eq!(bench.create("mine").await.unwrap(), Put::Exists);
        assert_eq!(bench.memory.get("key").await.unwrap(), rival);
        assert_eq!(bench.faulty.calls(Operation::Get), reads);
    }
}

#[tokio::test(start_paused = true)]
async fn the_read_back_is_retried_too() {
    let bench = bench(RetryPolicy::interactive());
    bench
        .faulty
        .inject(Rule::once(Fault::FailAfter(ErrorKind::Retry)).on(Operation::Put));
    bench
        .faulty
        .inject(Rule::times(2, Fault::FailBefore(ErrorKind::Retry)).on(Operation::Get));
    assert_eq!(bench.create("mine").await.unwrap(), Put::Created);
    assert_eq!(bench.retries(), 3);
}

#[tokio::test(start_paused = true)]
async fn equal_bytes_of_an_earlier_run_are_a_success() {
    let bench = bench(RetryPolicy::interactive());
    for _ in 0..2 {
        assert_eq!(bench.create("mine").await.unwrap(), Put::Created);
    }
}

#[tokio::test(start_paused = true)]
async fn interactive_gives_up_on_an_outage_after_its_budget() {
    let bench = bench(RetryPolicy::interactive());
    bench
        .faulty
        .inject(Rule::times(usize::MAX, Fault::FailBefore(ErrorKind::Retry)));
    let began = Instant::now();
    let error = bench.store.get("key").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    let took = began.elapsed();
    assert!(
        (Duration::from_secs(22)..=Duration::from_secs(30)).contains(&took),
        "{took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn what_someone_must_mend_ends_at_once_for_people_and_never_for_uploads() {
    for kind in [
        ErrorKind::Operator,
        ErrorKind::Config,
        ErrorKind::NotFound,
        ErrorKind::Conflict,
        ErrorKind::Bug,
    ] {
        let bench = bench(RetryPolicy::interactive());
        bench.faulty.inject(Rule::once(Fault::FailBefore(kind)));
        assert_eq!(bench.store.get("key").await.unwrap_err().kind(), kind);
        assert_eq!(bench.retries(), 0);
    }
    let bench = bench(RetryPolicy::patient());
    bench
        .faulty
        .inject(Rule::times(500, Fault::FailBefore(ErrorKind::Operator)));
    let began = Instant::now();
    assert_eq!(bench.create("mine").await.unwrap(), Put::Created);
    assert!(
        began.elapsed() > Duration::from_secs(3600),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(bench.retries(), 500);
}

#[tokio::test(start_paused = true)]
async fn patient_still_ends_on_a_wrong_configuration() {
    let bench = bench(RetryPolicy::patient());
    bench
        .faulty
        .inject(Rule::once(Fault::FailBefore(ErrorKind::Config)));
    assert_eq!(bench.create("mine").await.unwrap_err().kind(), ErrorKind::Config);
}

#[tokio::test(start_paused = true)]
async fn waits_grow_to_their_cap_with_jitter_and_repeat_with_the_seed() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let bench = bench(RetryPolicy::patient());
        bench
            .faulty
            .inject(Rule::times(40, Fault::FailBefore(ErrorKind::Retry)));
        bench.create("mine").await.unwrap();
        runs.push(bench.heard.waits.lock().unwrap().clone());
    }
    assert_eq!(runs[0], runs[1]);
    let waits = &runs[0];
    assert!(
        waits[0] >= Duration::from_millis(100) && waits[0] <= Duration::from_millis(200),
        "{waits:?}"
    );
    let late = &waits[20..];
    assert!(
        late.iter().all(|wait| (5..=10).contains(&wait.as_secs())),
        "{waits:?}"
    );
    assert!(
        late.windows(2).any(|pair| pair[0] != pair[1]),
        "no jitter: {waits:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn damage_in_transit_heals_and_rot_is_reported() {
    let healing = bench(RetryPolicy::patient());
    healing.create("mine").await.unwrap();
    healing
        .faulty
        .inject(Rule::times(2, Fault::FailBefore(ErrorKind::Corrupt)));
    assert_eq!(healing.store.get("key").await.unwrap(), "mine");

    let rotten = bench(RetryPolicy::patient());
    rotten
        .faulty
        .inject(Rule::times(usize::MAX, Fault::FailBefore(ErrorKind::Corrupt)));
    assert_eq!(
        rotten.store.get("key").await.unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    assert_eq!(rotten.faulty.calls(Operation::Get), 3);
}

/// At the end of a long outage there is no time left for another attempt: one damaged read is still no rot.
#[tokio::test(start_paused = true)]
async fn damage_is_read_again_though_the_time_is_over() {
    let late = || bench(RetryPolicy::interactive().with_budget(Some(Duration::ZERO)));
    let healing = late();
    healing.create("mine").await.unwrap();
    healing
        .faulty
        .inject(Rule::times(2, Fault::FailBefore(ErrorKind::Corrupt)));
    assert_eq!(healing.store.get("key").await.unwrap(), "mine");

    let away = late();
    for kind in [ErrorKind::Corrupt, ErrorKind::Retry] {
        away.faulty.inject(Rule::once(Fault::FailBefore(kind)));
    }
    let error = away.store.get("key").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry, "the outage goes on");
}

#[tokio::test(start_paused = true)]
async fn seeded_faults_repeat_and_creates_through_them_are_exact() {
    let rates = FaultRates {
        fail_before: 0.2,
        fail_after: 0.2,
        delay: 0.1,
        max_delay: Duration::from_secs(1),
        damage: 0.0,
    };
    let mut calls = Vec::new();
    for _ in 0..2 {
        let memory = Arc::new(MemoryStore::new("eu"));
        let faulty = Arc::new(FaultyStore::new(Arc::clone(&memory) as Arc<dyn Store>).seeded(42, rates));
        for number in 0..200 {
            let policy = RetryPolicy::patient().with_seed(1);
            let heard = Arc::new(Heard::default());
            let store = Retrying::new(
                Arc::clone(&faulty) as Arc<dyn Store>,
                policy,
                heard as Arc<dyn RetryObserver>,
            );
            let put = store
                .put(
                    &format!("key/{number}"),
                    Object::new(format!("{number}")),
                    PutMode::Create,
                )
                .await;
            assert_eq!(put.unwrap(), Put::Created);
        }
        assert_eq!(memory.keys().len(), 200);
        calls.push((faulty.calls(Operation::Put), faulty.calls(Operation::Get)));
    }
    assert_eq!(calls[0], calls[1]);
    assert!(
        calls[0].0 > 250 && calls[0].1 > 10,
        "the faults did not strike: {calls:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn standing_faults_hold_until_they_end() {
    let memory = Arc::new(MemoryStore::new("eu"));
    let faulty = Arc::new(FaultyStore::new(Arc::clone(&memory) as Arc<dyn Store>));
    for key in ["a", "b", "c"] {
        faulty.put(key, Object::new(key), PutMode::Create).await.unwrap();
    }
    faulty.hide("c");
    faulty.hide("a");
    let page = faulty.list("", None, 1).await.unwrap();
    assert_eq!((page.entries[0].key.as_str(), page.more), ("b", true));
    assert_eq!(faulty.get("c").await.unwrap(), "c");
    faulty.unhide();

    faulty.inject(Rule::once(Fault::Truncate(0)).key("a"));
    faulty.inject(Rule::once(Fault::Flip(0)).on(Operation::Get));
    assert_eq!(faulty.get("b").await.unwrap()[0], !b'b');
    assert_eq!(faulty.get("a").await.unwrap(), "");
    assert_eq!(
        (faulty.get("a").await.unwrap(), faulty.pending()),
        ("a".into(), 0)
    );

    faulty.freeze();
    let frozen = tokio::time::timeout(
        Duration::from_secs(3600),
        faulty.put("d", Object::new("d"), PutMode::Create),
    );
    assert!(frozen.await.is_err());
    assert!(!memory.keys().contains(&"d".to_owned()));
    let waiting = tokio::spawn({
        let faulty = Arc::clone(&faulty);
        async move { faulty.get("a").await }
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!waiting.is_finished());
    faulty.thaw();
    assert_eq!(waiting.await.unwrap().unwrap(), "a");
}
