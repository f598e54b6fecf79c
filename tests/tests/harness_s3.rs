//! The harness itself: what the S3 endpoint promises beyond the protocol, which the suite of the
//! S3 store (`store_s3`) goes through.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use highwater_store::{ErrorKind, Object, Put, PutMode, RegionConfig, Store};
use highwater_tests::S3Server;
use highwater_tests::s3::{Damage, Operation, S3Snapshot};

const BUCKET: &str = "archive";

async fn server() -> Result<S3Server> {
    let server = S3Server::start().await?;
    server.create_bucket(BUCKET);
    Ok(server)
}

async fn store(server: &S3Server) -> Result<std::sync::Arc<dyn Store>> {
    let mut config = RegionConfig::new("r", format!("s3://{BUCKET}"));
    config.endpoint = Some(server.endpoint());
    config.access_key_id = Some(server.access_key().to_owned());
    config.secret_access_key = Some(server.secret_key().to_owned().into());
    config.attempt_timeout = Duration::from_secs(2);
    config.operation_timeout = Duration::from_secs(3);
    Ok(highwater_store::open(&config).await?)
}

async fn put(store: &dyn Store, key: &str, bytes: &'static [u8]) -> Result<Put, highwater_store::StoreError> {
    store
        .put(key, Object::new(Bytes::from_static(bytes)), PutMode::Create)
        .await
}

#[tokio::test]
async fn one_of_many_writers_of_a_key_wins() -> Result<()> {
    let server = server().await?;
    let store = store(&server).await?;
    let writers = (0..16_u8).map(|writer| {
        let store = std::sync::Arc::clone(&store);
        async move {
            store
                .put("key", Object::new(Bytes::from(vec![writer; 64])), PutMode::Create)
                .await
        }
    });
    let outcomes = futures::future::join_all(writers).await;
    let won = outcomes
        .iter()
        .filter(|outcome| matches!(outcome, Ok(Put::Created)))
        .count();
    ensure!(won == 1, "{won} writers won: {outcomes:?}");
    Ok(())
}

#[tokio::test]
async fn a_snapshot_stays_as_it_was_and_can_be_served() -> Result<()> {
    let server = server().await?;
    let writing = store(&server).await?;
    put(writing.as_ref(), "one", b"1").await?;
    let frozen: S3Snapshot = server.snapshot();
    put(writing.as_ref(), "two", b"2").await?;
    server.delete(BUCKET, "one");
    ensure!(server.objects(BUCKET) == ["two"]);
    ensure!(frozen.keys(BUCKET) == ["one"]);

    let copy = S3Server::serve(frozen).await?;
    let reading = store(&copy).await?;
    ensure!(reading.get("one").await? == "1");
    ensure!(
        reading
            .get("two")
            .await
            .is_err_and(|error| error.kind() == ErrorKind::NotFound)
    );
    Ok(())
}

#[tokio::test]
async fn a_frozen_endpoint_applies_nothing_and_goes_on_after_the_thaw() -> Result<()> {
    let server = server().await?;
    let store = store(&server).await?;
    server.faults().freeze();
    let hanging = tokio::time::timeout(Duration::from_millis(300), put(store.as_ref(), "key", b"1")).await;
    ensure!(hanging.is_err(), "a frozen endpoint answered");
    ensure!(
        server.objects(BUCKET).is_empty(),
        "a frozen endpoint took an object"
    );
    server.faults().thaw();
    put(store.as_ref(), "other", b"2").await?;
    ensure!(server.get(BUCKET, "other").is_some());
    Ok(())
}

#[tokio::test]
async fn faults_count_and_filter() -> Result<()> {
    let server = server().await?;
    let store = store(&server).await?;
    put(store.as_ref(), "seen/key", b"content").await?;
    server.faults().only(&[Operation::Get]);
    server.faults().only_keys("seen/");
    server.faults().fail_next(1, 503);
    put(store.as_ref(), "seen/other", b"x").await?;
    ensure!(
        store.get("seen/key").await.is_err(),
        "the scripted failure did not come"
    );
    ensure!(
        store.get("seen/key").await? == "content",
        "the scripted failure came twice"
    );

    server.faults().damage(Some(Damage::FlipAt(0)));
    ensure!(
        server.get(BUCKET, "seen/key").context("gone")?.bytes == "content",
        "the stored object was touched"
    );
    server.faults().clear();
    ensure!(store.get("seen/key").await? == "content");

    server.faults().hide_newest(1);
    let page = store.list("", None, 10).await?;
    ensure!(
        page.entries
            .iter()
            .map(|entry| entry.key.as_str())
            .eq(["seen/key"]),
        "{page:?}"
    );
    ensure!(server.counters().requests(Operation::Put) == 2 && server.counters().bytes_in() == 8);
    Ok(())
}

#[tokio::test]
async fn a_refusing_endpoint_keeps_its_port_and_objects() -> Result<()> {
    let server = server().await?;
    let store = store(&server).await?;
    put(store.as_ref(), "key", b"1").await?;
    server.faults().refuse(true);
    ensure!(store.get("key").await.is_err(), "a refusing endpoint answered");
    server.faults().refuse(false);
    ensure!(store.get("key").await? == "1");
    ensure!(
        server.corrupt(BUCKET, "key")
            && server
                .get(BUCKET, "key")
                .is_some_and(|stored| stored.bytes != "1")
    );
    Ok(())
}
