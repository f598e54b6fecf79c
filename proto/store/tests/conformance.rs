//! The stores that need no server keep the promises of the trait; so do the wrappers, which must forward
//! everything.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, also in the functions that its cases share"
)]

use std::sync::Arc;

use highwater_store::{
    FaultyStore, MemoryStore, NoObserver, RegionConfig, RetryPolicy, Retrying, Store, conformance, open,
    probe,
};

fn memory() -> Arc<dyn Store> {
    Arc::new(MemoryStore::new("memory"))
}

fn retrying(inner: Arc<dyn Store>) -> Arc<dyn Store> {
    Arc::new(Retrying::new(
        inner,
        RetryPolicy::interactive(),
        Arc::new(NoObserver),
    ))
}

#[tokio::test]
async fn memory_conforms() {
    conformance::run(|| async { Ok(memory()) }).await.unwrap();
}

#[tokio::test]
async fn retrying_conforms() {
    conformance::run(|| async { Ok(retrying(memory())) })
        .await
        .unwrap();
}

#[tokio::test]
async fn faulty_without_faults_conforms() {
    conformance::run(|| async { Ok(Arc::new(FaultyStore::new(memory())) as Arc<dyn Store>) })
        .await
        .unwrap();
}

#[tokio::test]
async fn retrying_over_a_directory_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let count = std::sync::atomic::AtomicU32::new(0);
    conformance::run(|| {
        let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let config = RegionConfig::new("disk", format!("file://{}/{number}", dir.path().display()));
        async move { Ok(retrying(open(&config).await?)) }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn the_suite_notices_a_store_that_loses_its_conditions() {
    // The suite must be able to fail: a store that overwrites on create is the likeliest offender.
    #[derive(Debug)]
    struct Careless(MemoryStore);
    #[async_trait::async_trait]
    impl Store for Careless {
        fn region(&self) -> &str {
            self.0.region()
        }
        fn describe(&self) -> String {
            self.0.describe()
        }
        async fn put(
            &self,
            key: &str,
            object: highwater_store::Object,
            _mode: highwater_store::PutMode,
        ) -> Result<highwater_store::Put, highwater_store::StoreError> {
            self.0.put(key, object, highwater_store::PutMode::Overwrite).await
        }
        async fn get(&self, key: &str) -> Result<bytes::Bytes, highwater_store::StoreError> {
            self.0.get(key).await
        }
        async fn get_range(
            &self,
            key: &str,
            range: std::ops::Range<u64>,
        ) -> Result<bytes::Bytes, highwater_store::StoreError> {
            self.0.get_range(key, range).await
        }
        async fn head(&self, key: &str) -> Result<highwater_store::Meta, highwater_store::StoreError> {
            self.0.head(key).await
        }
        async fn list(
            &self,
            prefix: &str,
            start_after: Option<&str>,
            max: usize,
        ) -> Result<highwater_store::Page, highwater_store::StoreError> {
            self.0.list(prefix, start_after, max).await
        }
        async fn delete(&self, key: &str) -> Result<(), highwater_store::StoreError> {
            self.0.delete(key).await
        }
    }
    let make = || async { Ok(Arc::new(Careless(MemoryStore::new("careless"))) as Arc<dyn Store>) };
    let violation = conformance::run(make).await.unwrap_err();
    assert_eq!(violation.check, "a create never replaces");
    let store = make().await.unwrap();
    assert!(!probe(store.as_ref(), "").await.unwrap().conditional_create);
}

#[tokio::test]
async fn probe_sees_conditional_creates_and_can_run_again() {
    let store = memory();
    for _ in 0..2 {
        assert!(probe(store.as_ref(), "orders/").await.unwrap().conditional_create);
    }
    assert_eq!(
        store.list("", None, 10).await.unwrap().entries[0].key,
        "orders/probe/create"
    );
}
