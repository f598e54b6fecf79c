//! Buckets that keep versions: read as of an earlier time, and read as they are now.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use highwater_store::{
    ErrorKind, NoObserver, Object, Put, PutMode, RegionConfig, RetryPolicy, Retrying, Store, list_all,
    list_parts, open,
};
use highwater_tests::clock::{now, second_over};
use highwater_tests::s3::{KeyPair, Operation, Rights};
use highwater_tests::{S3Server, TestDir};

const BUCKET: &str = "archive";

async fn server() -> Result<S3Server> {
    let server = S3Server::start().await?;
    server.create_bucket(BUCKET);
    server.keep_versions(BUCKET);
    Ok(server)
}

async fn store(server: &S3Server, pair: &KeyPair, as_of: Option<SystemTime>) -> Result<Arc<dyn Store>> {
    let mut config = RegionConfig::new("eu", format!("s3://{BUCKET}/prod"));
    config.endpoint = Some(server.endpoint());
    config.access_key_id = Some(pair.access_key.clone());
    config.secret_access_key = Some(pair.secret_key.clone().into());
    config.as_of = as_of;
    Ok(open(&config).await?)
}

/// As of `moment`, with keys that may only read.
async fn past(server: &S3Server, moment: SystemTime) -> Result<Arc<dyn Store>> {
    store(server, server.key_pair(Rights::ReadOnly), Some(moment)).await
}

async fn present(server: &S3Server) -> Result<Arc<dyn Store>> {
    store(server, server.key_pair(Rights::All), None).await
}

type Model = BTreeMap<String, String>;

/// A bucket and what should be in it.
struct Changing {
    server: S3Server,
    model: Model,
}

impl Changing {
    fn put(&mut self, key: &str, content: String) {
        self.server
            .put(BUCKET, &format!("prod/{key}"), content.clone().into_bytes());
        self.model.insert(key.to_owned(), content);
    }

    fn delete(&mut self, key: &str) {
        self.server.delete(BUCKET, &format!("prod/{key}"));
        self.model.remove(key);
    }

    /// Three states: everything is made; then deleted, replaced or added to, and one key replaced very often; then some of it
    /// is made again and the rest deleted.
    async fn three_states() -> Result<(Self, Vec<(SystemTime, Model)>)> {
        let mut bucket = Self {
            server: server().await?,
            model: Model::new(),
        };
        let mut states = Vec::new();
        let key = |number: u32| format!("wal/{:02}/{number:04}", number % 3);
        bucket.put("pulse.json", "first".to_owned());
        bucket.put("pulse.json.old", "not the pulse".to_owned());
        for number in 0..700 {
            bucket.put(&key(number), format!("{number} of the first"));
        }
        states.push((second_over().await?, bucket.model.clone()));
        for number in 0..1100 {
            bucket.put("pulse.json", format!("second {number}"));
        }
        for number in 0..700 {
            match number % 4 {
                0 => bucket.delete(&key(number)),
                1 => bucket.put(&key(number), format!("{number} of the second")),
                _ => {}
            }
        }
        for number in 700..900 {
            bucket.put(&key(number), format!("{number} of the second"));
        }
        states.push((second_over().await?, bucket.model.clone()));
        for number in 0..900 {
            match number % 8 {
                0 => bucket.put(&key(number), format!("{number} of the third")),
                _ => bucket.delete(&key(number)),
            }
        }
        bucket.put("pulse.json", "third".to_owned());
        states.push((second_over().await?, bucket.model.clone()));
        Ok((bucket, states))
    }
}

/// What it held before the last write nobody knows: that is no empty past, or a restore would take a lost tail for the archive's end.
#[tokio::test]
async fn a_bucket_that_kept_no_versions_is_not_read_as_of_before_a_write() -> Result<()> {
    let server = S3Server::start().await?;
    server.create_bucket(BUCKET);
    server.put(BUCKET, "prod/old", b"old".to_vec());
    let moment = second_over().await?;
    server.put(BUCKET, "prod/pulse.json", b"new".to_vec());
    let past = past(&server, moment).await?;
    ensure!(past.get("old").await? == "old");
    let error = past.get("pulse.json").await.unwrap_err();
    ensure!(
        error.kind() == ErrorKind::Config && error.to_string().contains("kept no versions"),
        "{error}"
    );
    let never = past.get("never").await.unwrap_err();
    ensure!(never.kind() == ErrorKind::NotFound, "{never}");
    Ok(())
}

/// Every key that a store lists, walked in pages of `max`.
async fn walk(store: &dyn Store, prefix: &str, max: usize) -> Result<Vec<String>> {
    let mut keys: Vec<String> = Vec::new();
    loop {
        let page = store.list(prefix, keys.last().map(String::as_str), max).await?;
        ensure!(page.entries.len() <= max && (!page.more || !page.entries.is_empty()));
        keys.extend(page.entries.into_iter().map(|meta| meta.key));
        if !page.more {
            return Ok(keys);
        }
    }
}

async fn is(store: &dyn Store, model: &Model) -> Result<()> {
    for meta in list_all(store, "", None).await? {
        let content = model.get(&meta.key);
        ensure!(
            content.is_some_and(|content| content.len() as u64 == meta.size),
            "{meta:?}"
        );
    }
    let expected: Vec<&String> = model.keys().collect();
    ensure!(walk(store, "", 50_000).await?.iter().collect::<Vec<_>>() == expected);
    let below: Vec<&String> = model.keys().filter(|key| key.starts_with("wal/01/")).collect();
    ensure!(walk(store, "wal/01/", 7).await?.iter().collect::<Vec<_>>() == below);
    let parts = list_parts(store, "wal/").await?;
    ensure!(
        parts.iter().map(|(name, _)| name.as_str()).eq(["00", "01", "02"]),
        "{parts:?}"
    );
    for (key, content) in model.iter().step_by(40) {
        ensure!(store.get(key).await? == content.as_bytes(), "{key}");
        ensure!(
            store.get_range(key, 2..5).await? == content.as_bytes()[2..5],
            "{key}"
        );
        ensure!(store.get_range(key, 1000..1001).await?.is_empty(), "{key}");
        ensure!(store.head(key).await?.size == content.len() as u64, "{key}");
    }
    Ok(())
}

#[tokio::test]
async fn a_bucket_is_read_as_it_was_at_each_moment() -> Result<()> {
    let (bucket, states) = Changing::three_states().await?;
    let server = &bucket.server;
    for (moment, model) in &states {
        is(past(server, *moment).await?.as_ref(), model).await?;
    }
    is(present(server).await?.as_ref(), &bucket.model).await?;

    // Deleted in the second state, made again in the third; made in the second, deleted in the third.
    let (gone, made) = ("wal/02/0008", "wal/00/0702");
    for (index, (moment, _)) in states.iter().enumerate() {
        let past = past(server, *moment).await?;
        for (key, there) in [(gone, index != 1), (made, index == 1)] {
            let answers = [
                past.get(key).await.err(),
                past.get_range(key, 0..3).await.err(),
                past.get_range(key, 0..0).await.err(),
                past.head(key).await.err(),
            ];
            for error in answers {
                let kind = error.map(|error| error.kind());
                ensure!(
                    kind == (!there).then_some(ErrorKind::NotFound),
                    "{key} {index}: {kind:?}"
                );
            }
        }
    }
    let before = past(server, SystemTime::UNIX_EPOCH + Duration::from_secs(1)).await?;
    ensure!(walk(before.as_ref(), "", 100).await?.is_empty());

    // Two requests for an object, and the version that counts is found behind a page full of newer ones.
    let asked = server.counters().total();
    let past = past(server, states[0].0).await?;
    ensure!(past.get("wal/01/0001").await? == "1 of the first");
    ensure!(server.counters().total() - asked == 2);
    ensure!(past.get("pulse.json").await? == "first");
    Ok(())
}

#[tokio::test]
async fn errors_on_the_way_change_nothing_of_the_past() -> Result<()> {
    let (bucket, states) = Changing::three_states().await?;
    let faults = bucket.server.faults();
    for (moment, model) in &states {
        let policy =
            RetryPolicy::interactive().with_waits(Duration::from_millis(1), Duration::from_millis(4));
        let past = past(&bucket.server, *moment).await?;
        let patient = Retrying::new(past, policy, Arc::new(NoObserver));
        faults.fail_every(7, 503);
        is(&patient, model).await?;
        faults.clear();
    }
    ensure!(
        bucket.server.counters().failed() > 20,
        "the faults did not strike"
    );
    Ok(())
}

#[tokio::test]
async fn nothing_is_written_to_the_past() -> Result<()> {
    let server = server().await?;
    server.put(BUCKET, "prod/key", "content");
    let moment = second_over().await?;
    let past = store(&server, server.key_pair(Rights::All), Some(moment)).await?;
    let asked = server.counters().total();
    let refused = [
        past.put("key", Object::new("other"), PutMode::Overwrite)
            .await
            .err(),
        past.put("new", Object::new("other"), PutMode::Create).await.err(),
        past.delete("key").await.err(),
    ];
    for error in refused {
        let text = error.map(|error| (error.kind(), error.to_string()));
        ensure!(
            text.as_ref()
                .is_some_and(|(kind, text)| *kind == ErrorKind::Config && text.contains("cannot be written")),
            "{text:?}"
        );
    }
    ensure!(server.counters().total() == asked && past.describe().contains(" as of 20"));
    Ok(())
}

#[tokio::test]
async fn a_directory_has_no_past() -> Result<()> {
    let dir = TestDir::new()?;
    let mut config = RegionConfig::new("disk", format!("file://{}", dir.path().display()));
    config.as_of = Some(now());
    let refused = open(&config).await.err();
    let refused = refused.map(|error| (error.kind(), error.to_string()));
    ensure!(
        refused
            .as_ref()
            .is_some_and(|(kind, text)| *kind == ErrorKind::Config && text.contains("keeps no versions")),
        "{refused:?}"
    );
    Ok(())
}

/// A bucket that keeps no versions has only what nobody touched.
#[tokio::test]
async fn without_versions_only_what_is_left_is_found() -> Result<()> {
    let server = S3Server::start().await?;
    server.create_bucket(BUCKET);
    for key in ["prod/deleted", "prod/kept", "prod/replaced"] {
        server.put(BUCKET, key, "content");
    }
    let moment = second_over().await?;
    server.delete(BUCKET, "prod/deleted");
    server.put(BUCKET, "prod/replaced", "other");
    let past = past(&server, moment).await?;
    ensure!(walk(past.as_ref(), "", 10).await? == ["kept"]);
    ensure!(past.get("kept").await? == "content");
    Ok(())
}

/// S3 passes over delete markers page by page, and a key under one is free.
#[tokio::test]
async fn fault_38_delete_markers_are_passed_over_and_keys_under_them_are_free() -> Result<()> {
    let server = server().await?;
    let store = present(&server).await?;
    for number in 0..200 {
        let key = format!("wal/{number:04}");
        store.put(&key, Object::new("first"), PutMode::Create).await?;
        if number % 50 != 7 {
            store.delete(&key).await?;
        }
    }
    let left = ["wal/0007", "wal/0057", "wal/0107", "wal/0157"];
    for max in [1, 3, 1000] {
        ensure!(walk(store.as_ref(), "", max).await? == left, "in pages of {max}");
    }
    ensure!(store.list("wal/0060", None, 10).await?.entries.is_empty());
    ensure!(
        server.counters().requests(Operation::List) > 20,
        "no empty pages were met"
    );
    let absent = store.get("wal/0050").await.err().map(|error| error.kind());
    ensure!(absent == Some(ErrorKind::NotFound), "{absent:?}");
    let again = store
        .put("wal/0050", Object::new("second"), PutMode::Create)
        .await?;
    ensure!(again == Put::Created && store.get("wal/0050").await? == "second");
    let taken = store
        .put("wal/0057", Object::new("second"), PutMode::Create)
        .await?;
    ensure!(taken == Put::Exists);
    Ok(())
}
