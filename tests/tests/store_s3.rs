//! The S3 store against an endpoint that checks signatures, checksums and conditions as S3 does.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, also in the functions that its cases share"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use highwater_store::{
    ErrorKind, NoObserver, Object, Put, PutMode, RegionConfig, RetryPolicy, Retrying, Store, StoreError,
    conformance, list_all, open, probe,
};
use highwater_tests::S3Server;
use highwater_tests::s3::{Damage, KeyPair, Operation, Rights, S3Snapshot};

const BUCKET: &str = "archive";

fn config(server: &S3Server) -> RegionConfig {
    let pair = KeyPair {
        access_key: server.access_key().to_owned(),
        secret_key: server.secret_key().to_owned(),
        rights: Rights::All,
    };
    config_of(server, &pair)
}

fn config_of(server: &S3Server, pair: &KeyPair) -> RegionConfig {
    let mut config = RegionConfig::new("eu", format!("s3://{BUCKET}/prod/hw"));
    config.endpoint = Some(server.endpoint());
    config.access_key_id = Some(pair.access_key.clone());
    config.secret_access_key = Some(pair.secret_key.clone().into());
    config
}

async fn server() -> S3Server {
    let server = S3Server::start().await.unwrap();
    server.create_bucket(BUCKET);
    server
}

async fn put(store: &dyn Store, key: &str, bytes: &'static str) -> Result<Put, StoreError> {
    store.put(key, Object::new(bytes), PutMode::Create).await
}

fn patient(store: Arc<dyn Store>) -> Retrying {
    let policy = RetryPolicy::patient().with_waits(Duration::from_millis(5), Duration::from_millis(20));
    Retrying::new(store, policy, Arc::new(NoObserver))
}

/// A store on a prefix of its own, so that each check finds it empty.
async fn fresh(server: &S3Server, count: &AtomicU32) -> Result<Arc<dyn Store>, StoreError> {
    let mut config = config(server);
    config.url = format!("s3://{BUCKET}/run-{}", count.fetch_add(1, Ordering::Relaxed));
    open(&config).await
}

#[tokio::test]
async fn conforms() {
    let (server, count) = (server().await, AtomicU32::new(0));
    conformance::run(|| fresh(&server, &count)).await.unwrap();
}

/// With an authority that only the configuration names.
#[tokio::test]
async fn conforms_behind_tls() {
    let pair = KeyPair {
        access_key: "HIGHWATERTLS".to_owned(),
        secret_key: "secret-behind-tls".to_owned(),
        rights: Rights::All,
    };
    let address = ([127, 0, 0, 1], 0).into();
    let server = S3Server::listen_tls(address, vec![pair.clone()], S3Snapshot::default())
        .await
        .unwrap();
    server.create_bucket(BUCKET);
    let authority = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(authority.path(), server.authority().unwrap()).unwrap();
    let count = AtomicU32::new(0);
    let make = || async {
        let mut config = config_of(&server, &pair);
        config.url = format!("s3://{BUCKET}/run-{}", count.fetch_add(1, Ordering::Relaxed));
        config.ca_file = Some(authority.path().to_owned());
        open(&config).await
    };
    conformance::run(make).await.unwrap();
    assert!(server.endpoint().starts_with("https://"));
    assert!(server.counters().total() > 50, "not the endpoint that was asked");
}

#[tokio::test]
async fn conforms_behind_retries_on_a_shaky_endpoint() {
    let (server, count) = (server().await, AtomicU32::new(0));
    server.faults().fail_every(5, 503);
    let make = || async {
        let inner = fresh(&server, &count).await?;
        let policy =
            RetryPolicy::interactive().with_waits(Duration::from_millis(2), Duration::from_millis(8));
        Ok(Arc::new(Retrying::new(inner, policy, Arc::new(NoObserver))) as Arc<dyn Store>)
    };
    conformance::run(make).await.unwrap();
    assert!(server.counters().failed() > 20, "the faults did not strike");
}

#[tokio::test]
async fn a_bucket_without_prefix_conforms_too() {
    let (server, count) = (server().await, AtomicU32::new(0));
    let make = || async {
        let bucket = format!("bucket-{}", count.fetch_add(1, Ordering::Relaxed));
        server.create_bucket(&bucket);
        let mut config = config(&server);
        config.url = format!("s3://{bucket}");
        open(&config).await
    };
    conformance::run(make).await.unwrap();
}

#[tokio::test]
async fn objects_lie_under_the_prefix_and_nothing_beside_it_is_seen() {
    let server = server().await;
    server.put(BUCKET, "prod/hw/", "");
    server.put(BUCKET, "prod/hw-other/key", "not ours");
    let store = open(&config(&server)).await.unwrap();
    put(store.as_ref(), "a/b", "x").await.unwrap();
    assert_eq!(
        server.objects(BUCKET),
        ["prod/hw-other/key", "prod/hw/", "prod/hw/a/b"]
    );
    let keys: Vec<String> = list_all(store.as_ref(), "", None)
        .await
        .unwrap()
        .into_iter()
        .map(|meta| meta.key)
        .collect();
    assert_eq!(keys, ["a/b"]);
}

#[tokio::test]
async fn fault_38_long_listings_are_read_to_the_end() {
    let server = server().await;
    for number in 0..2500 {
        server.put(BUCKET, &format!("prod/hw/k/{number:05}"), "x");
    }
    let store = open(&config(&server)).await.unwrap();
    let all = list_all(store.as_ref(), "k/", Some("k/00009")).await.unwrap();
    assert_eq!(all.len(), 2490);
    assert_eq!(all.last().unwrap().key, "k/02499");
    assert_eq!(server.counters().requests(Operation::List), 3);
}

#[tokio::test]
async fn fault_35_a_lost_reply_is_not_a_rival() {
    let server = server().await;
    let store = patient(open(&config(&server)).await.unwrap());
    server.faults().only(&[Operation::Put]);
    server.faults().lose_replies(1);
    assert_eq!(put(&store, "key", "mine").await.unwrap(), Put::Created);
    assert_eq!(server.counters().requests(Operation::Put), 2);
    assert_eq!(put(&store, "key", "hers").await.unwrap(), Put::Exists);
    assert_eq!(&server.get(BUCKET, "prod/hw/key").unwrap().bytes[..], b"mine");
}

#[tokio::test]
async fn fault_36_a_conditional_conflict_is_tried_again() {
    let server = server().await;
    let raw = open(&config(&server)).await.unwrap();
    server.faults().fail_next(1, 409);
    assert_eq!(
        put(raw.as_ref(), "key", "x").await.unwrap_err().kind(),
        ErrorKind::Retry
    );
    server.faults().fail_next(2, 409);
    assert_eq!(put(&patient(raw), "key", "x").await.unwrap(), Put::Created);
}

#[tokio::test]
async fn fault_24_refusals_name_what_to_do() {
    let server = server().await;
    let wrong_secret = KeyPair {
        access_key: server.access_key().to_owned(),
        secret_key: "another secret".to_owned(),
        rights: Rights::All,
    };
    let unknown = KeyPair {
        access_key: "NOBODY".to_owned(),
        ..wrong_secret.clone()
    };
    let cases = [
        (wrong_secret, "SignatureDoesNotMatch", "secret"),
        (unknown, "InvalidAccessKeyId", "key id"),
        (
            server.key_pair(Rights::Nothing).clone(),
            "AccessDenied",
            "s3:PutObject",
        ),
    ];
    for (pair, code, hint) in cases {
        let store = open(&config_of(&server, &pair)).await.unwrap();
        let error = put(store.as_ref(), "key", "x").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Operator, "{error}");
        let text = error.to_string();
        assert!(
            text.contains(code) && text.contains(hint) && text.contains("eu"),
            "{text}"
        );
        assert!(!text.contains(&pair.secret_key), "{text}");
    }
    assert_eq!(server.objects(BUCKET), Vec::<String>::new());
}

#[tokio::test]
async fn fault_24_a_missing_bucket_is_a_configuration_error_for_every_call() {
    let server = server().await;
    let mut config = config(&server);
    config.url = "s3://no-such-bucket/prod".to_owned();
    let store = open(&config).await.unwrap();
    let errors = [
        put(store.as_ref(), "key", "x").await.unwrap_err(),
        store.get("key").await.unwrap_err(),
        store.get_range("key", 0..5).await.unwrap_err(),
        store.head("key").await.unwrap_err(),
        store.list("", None, 5).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    }
}

#[tokio::test]
async fn fault_97_the_least_rights_suffice() {
    let server = server().await;
    let agent = open(&config_of(&server, server.key_pair(Rights::NoDelete)))
        .await
        .unwrap();
    assert!(probe(agent.as_ref(), "orders/").await.unwrap().conditional_create);
    put(agent.as_ref(), "key", "x").await.unwrap();
    assert_eq!(agent.delete("key").await.unwrap_err().kind(), ErrorKind::Operator);

    let restore = open(&config_of(&server, server.key_pair(Rights::ReadOnly)))
        .await
        .unwrap();
    assert_eq!(restore.get("key").await.unwrap(), "x");
    assert_eq!(restore.get_range("key", 0..1).await.unwrap(), "x");
    assert_eq!(restore.head("key").await.unwrap().size, 1);
    assert_eq!(restore.list("", None, 10).await.unwrap().entries.len(), 2);
    assert_eq!(
        restore.head("absent").await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        put(restore.as_ref(), "other", "x").await.unwrap_err().kind(),
        ErrorKind::Operator
    );
}

#[tokio::test]
async fn fault_40_damaged_reads_are_never_accepted() {
    let server = server().await;
    let store = open(&config(&server)).await.unwrap();
    let bytes = vec![7u8; 300_000];
    store
        .put("key", Object::new(bytes.clone()), PutMode::Create)
        .await
        .unwrap();
    let cases = [
        (Damage::CutAfter(150_000), ErrorKind::Retry),
        (Damage::FlipAt(200_000), ErrorKind::Corrupt),
    ];
    for (damage, kind) in cases {
        server.faults().damage(Some(damage));
        let error = store.get("key").await.err().unwrap();
        assert_eq!(error.kind(), kind, "{damage:?}: {error}");
        assert_eq!(error.key(), "key");
    }
    // A whole object cut short by a store that sends no checksum is for the object's own to find; a part is not.
    server.faults().damage(Some(Damage::Shorten(1000)));
    assert_eq!(
        store.get_range("key", 0..5000).await.unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    server.faults().clear();
    assert_eq!(store.get("key").await.unwrap(), bytes);
}

#[tokio::test]
async fn fault_45_a_silent_endpoint_ends_in_bounded_time() {
    let server = server().await;
    let mut config = config(&server);
    config.attempt_timeout = Duration::from_millis(300);
    config.operation_timeout = Duration::from_secs(2);
    let store = open(&config).await.unwrap();
    server.faults().freeze();
    let errors = [
        put(store.as_ref(), "key", "x").await.unwrap_err(),
        store.get("key").await.unwrap_err(),
        store.head("key").await.unwrap_err(),
        store.list("", None, 5).await.unwrap_err(),
        store.delete("key").await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Retry, "{error}");
        assert!(error.to_string().contains("attempt_timeout"), "{error}");
    }
    server.faults().thaw();
    server.faults().refuse(true);
    assert_eq!(store.get("key").await.unwrap_err().kind(), ErrorKind::Retry);
    server.faults().refuse(false);
    assert_eq!(put(&patient(store), "key", "x").await.unwrap(), Put::Created);
}

/// Two writers with clients of their own race for a thousand keys, with lost replies and refusals on the way: both
/// read the same of every key, then and later, and that is what one of them wrote.
#[tokio::test]
async fn i4_two_writers_race_for_a_thousand_keys() {
    const KEYS: usize = 1000;
    let server = server().await;
    server.faults().fail_every(17, 503);
    server.faults().lose_replies(5);
    let race = |who: &'static str| {
        let config = config(&server);
        async move {
            let store = patient(open(&config).await.unwrap());
            let mut seen = Vec::with_capacity(KEYS);
            for number in 0..KEYS {
                let key = format!("race/{number:04}");
                put(&store, &key, who).await.unwrap();
                seen.push(store.get(&key).await.unwrap());
            }
            seen
        }
    };
    let (a, b) = tokio::join!(race("the first"), race("the second"));
    let snapshot = server.snapshot();
    let held: Vec<_> = snapshot
        .keys(BUCKET)
        .iter()
        .map(|key| snapshot.get(BUCKET, key).unwrap().bytes.clone())
        .collect();
    assert_eq!((held.len(), &a), (KEYS, &held));
    assert_eq!(a, b);
    let won = |who: &str| held.iter().filter(|bytes| *bytes == who).count();
    assert_eq!(won("the first") + won("the second"), KEYS);
}
