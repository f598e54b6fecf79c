//! The suite that every store passes.
//!
//! Public, so that a store with a server behind it is held to the same promises from the crate that has the
//! server. Checks return what they saw instead of panicking; each runs on a store of its own.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::{ErrorKind, Object, Put, PutMode, Store, StoreError, list_all};

/// A promise that a store did not keep.
#[derive(Debug)]
pub struct Violation {
    /// Which check.
    pub check: &'static str,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check, self.seen)
    }
}

impl std::error::Error for Violation {}

/// Runs every check, each on a fresh, empty store from `make`.
pub async fn run<F, Fut>(make: F) -> Result<(), Violation>
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<Arc<dyn Store>, StoreError>>,
{
    let open = |check: &'static str| {
        let making = make();
        async move {
            making.await.map_err(|error| Violation {
                check,
                seen: format!("no store to test: {error}"),
            })
        }
    };
    let check = "what is put comes back";
    named(check, round_trip(open(check).await?).await)?;
    let check = "a create never replaces";
    named(check, create_never_replaces(open(check).await?).await)?;
    let check = "of racing creators one wins";
    named(check, one_creator_wins(open(check).await?).await)?;
    let check = "absent objects are told apart";
    named(check, absent_objects(open(check).await?).await)?;
    let check = "ranges are clamped to the object";
    named(check, ranges(open(check).await?).await)?;
    let check = "listings are sorted and follow plain prefixes";
    named(check, listings(open(check).await?).await)?;
    let check = "pages go on where the last one ended";
    named(check, pages(open(check).await?).await)?;
    let check = "unsafe keys are refused";
    named(check, unsafe_keys(open(check).await?).await)?;
    let check = "bytes with a wrong checksum are not stored";
    named(check, wrong_checksum(open(check).await?).await)
}

type Outcome = Result<(), String>;
type Shared = Arc<dyn Store>;

fn named(check: &'static str, outcome: Outcome) -> Result<(), Violation> {
    outcome.map_err(|seen| Violation { check, seen })
}

macro_rules! hold {
    ($condition:expr, $($seen:tt)+) => {
        if !$condition {
            return Err(format!($($seen)+));
        }
    };
}

fn told(what: &str) -> impl Fn(StoreError) -> String {
    move |error| format!("{what}: {error}")
}

async fn put(store: &Shared, key: &str, bytes: impl Into<Bytes>, mode: PutMode) -> Result<Put, String> {
    store
        .put(key, Object::new(bytes), mode)
        .await
        .map_err(told("put"))
}

async fn get(store: &Shared, key: &str) -> Result<Bytes, String> {
    store.get(key).await.map_err(told("get"))
}

/// Bytes without a short period, so that a misplaced piece shows.
fn pattern(len: u32) -> Bytes {
    (0..len)
        .flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes())
        .take(len as usize)
        .collect()
}

async fn round_trip(store: Shared) -> Outcome {
    let big = pattern(9 << 20);
    let contents = [
        ("empty", Bytes::new()),
        ("one", Bytes::from_static(b"x")),
        ("deep/er/and deeper/ümlaut+&=?%", pattern(1000)),
        ("big", big),
    ];
    for (key, bytes) in contents {
        let put = put(&store, key, bytes.clone(), PutMode::Create).await?;
        hold!(put == Put::Created, "create of {key} said {put:?}");
        hold!(get(&store, key).await? == bytes, "{key} came back changed");
        let meta = store.head(key).await.map_err(told("head"))?;
        hold!(
            meta.key == key && meta.size == bytes.len() as u64,
            "head of {key} said {meta:?}"
        );
    }
    Ok(())
}

async fn create_never_replaces(store: Shared) -> Outcome {
    let key = "dir/key";
    hold!(
        put(&store, key, "first", PutMode::Create).await? == Put::Created,
        "the key was taken"
    );
    let again = put(&store, key, "other", PutMode::Create).await?;
    hold!(again == Put::Exists, "a second create said {again:?}");
    hold!(
        get(&store, key).await? == "first",
        "a refused create changed the object"
    );
    let over = put(&store, key, "second", PutMode::Overwrite).await?;
    hold!(over == Put::Created, "an overwrite said {over:?}");
    hold!(
        get(&store, key).await? == "second",
        "an overwrite did not replace the object"
    );
    hold!(
        put(&store, "new", "n", PutMode::Overwrite).await? == Put::Created,
        "an overwrite needs no object"
    );
    store.delete(key).await.map_err(told("delete"))?;
    let after = put(&store, key, "third", PutMode::Create).await?;
    hold!(after == Put::Created, "a create after a delete said {after:?}");
    Ok(())
}

async fn one_creator_wins(store: Shared) -> Outcome {
    for round in 0..4 {
        let key = format!("race/{round}");
        let mut racers = JoinSet::new();
        for racer in 0..8u8 {
            let (store, key) = (Arc::clone(&store), key.clone());
            racers.spawn(async move {
                let bytes = vec![racer; 10_000 + usize::from(racer)];
                (racer, store.put(&key, Object::new(bytes), PutMode::Create).await)
            });
        }
        let mut winners = Vec::new();
        while let Some(done) = racers.join_next().await {
            let (racer, put) = done.map_err(|error| error.to_string())?;
            match put {
                Ok(Put::Created) => winners.push(racer),
                Ok(Put::Exists) => {}
                // S3 may ask a loser to come again (409); it must not have written anything.
                Err(error) if error.kind() == ErrorKind::Retry => {}
                Err(error) => return Err(format!("racer {racer}: {error}")),
            }
        }
        hold!(
            winners.len() == 1,
            "{} of 8 racing creators won: {winners:?}",
            winners.len()
        );
        let kept = get(&store, &key).await?;
        hold!(kept.first() == winners.first(), "the object is not the winner's");
        hold!(
            kept.iter().all(|byte| Some(byte) == winners.first()),
            "the object is a mixture"
        );
    }
    Ok(())
}

async fn absent_objects(store: Shared) -> Outcome {
    put(&store, "dir/present", "p", PutMode::Create).await?;
    for key in ["absent", "dir", "dir/absent", "dir/present/below", "other/absent"] {
        let errors = [
            store.get(key).await.err(),
            store.get_range(key, 0..10).await.err(),
            store.get_range(key, 5..5).await.err(),
            store.head(key).await.err(),
        ];
        for error in errors {
            let Some(error) = error else {
                return Err(format!("a read of {key} succeeded"));
            };
            hold!(error.kind() == ErrorKind::NotFound, "a read of {key}: {error:?}");
            hold!(
                error.key() == key && error.region() == store.region(),
                "the error does not say where: {error}"
            );
        }
        store
            .delete(key)
            .await
            .map_err(told("delete of an absent object"))?;
    }
    hold!(
        get(&store, "dir/present").await? == "p",
        "a delete of something else removed the object"
    );
    store.delete("dir/present").await.map_err(told("delete"))?;
    let gone = store.get("dir/present").await.err().map(|error| error.kind());
    hold!(
        gone == Some(ErrorKind::NotFound),
        "a deleted object reads as {gone:?}"
    );
    Ok(())
}

async fn ranges(store: Shared) -> Outcome {
    let bytes = pattern(1000);
    put(&store, "key", bytes.clone(), PutMode::Create).await?;
    put(&store, "empty", Bytes::new(), PutMode::Create).await?;
    let wanted: [Range<u64>; 9] = [
        0..1000,
        0..1,
        0..128,
        999..1000,
        500..700,
        900..2000,
        1000..1001,
        5000..6000,
        7..u64::MAX,
    ];
    for range in wanted {
        let part = store
            .get_range("key", range.clone())
            .await
            .map_err(told("get_range"))?;
        let expected = crate::memory::clamp(&bytes, &range);
        hold!(
            part == expected,
            "{range:?} gave {} bytes instead of {}",
            part.len(),
            expected.len()
        );
    }
    let nothing = store.get_range("key", 4..4).await.map_err(told("empty range"))?;
    hold!(nothing.is_empty(), "an empty range gave {} bytes", nothing.len());
    let nothing = store
        .get_range("empty", 0..128)
        .await
        .map_err(told("range of an empty object"))?;
    hold!(nothing.is_empty(), "an empty object gave {} bytes", nothing.len());
    Ok(())
}

/// Keys whose order differs between "by whole key" and "by path component".
const TREE: [&str; 9] = [
    "a-b/1",
    "a.b/1",
    "a/1",
    "a/1-x",
    "a/10",
    "a/1x/y",
    "a0",
    "b/deep/er/1",
    "c",
];

async fn plant(store: &Shared) -> Outcome {
    for key in TREE.iter().rev() {
        put(store, key, *key, PutMode::Create).await?;
    }
    Ok(())
}

async fn keys(store: &Shared, prefix: &str, after: Option<&str>) -> Result<Vec<String>, String> {
    let all = list_all(store.as_ref(), prefix, after)
        .await
        .map_err(told("list"))?;
    for meta in &all {
        hold!(
            meta.size == meta.key.len() as u64,
            "{} is listed with size {}",
            meta.key,
            meta.size
        );
    }
    Ok(all.into_iter().map(|meta| meta.key).collect())
}

async fn listings(store: Shared) -> Outcome {
    hold!(
        keys(&store, "", None).await?.is_empty(),
        "a fresh store is not empty"
    );
    plant(&store).await?;
    let prefixes = [
        "",
        "a",
        "a/",
        "a/1",
        "a/1x",
        "a.",
        "b/deep",
        "b/deep/",
        "b/deep/er/1",
        "c",
        "c/",
        "d",
        "a/1/",
    ];
    let starts = [
        None,
        Some("a"),
        Some("a/"),
        Some("a/1"),
        Some("a/1-"),
        Some("a/1x/y"),
        Some("b/deep/f"),
        Some("zz"),
    ];
    for prefix in prefixes {
        for after in starts {
            let expected: Vec<&str> = TREE
                .into_iter()
                .filter(|key| key.starts_with(prefix) && after.is_none_or(|after| *key > after))
                .collect();
            let seen = keys(&store, prefix, after).await?;
            hold!(
                seen == expected,
                "prefix {prefix:?} after {after:?} gave {seen:?}, not {expected:?}"
            );
        }
    }
    Ok(())
}

async fn pages(store: Shared) -> Outcome {
    plant(&store).await?;
    for max in [1, 2, 4, 9, 100] {
        let (mut seen, mut after): (Vec<String>, Option<String>) = (Vec::new(), None);
        loop {
            let page = store
                .list("", after.as_deref(), max)
                .await
                .map_err(told("list"))?;
            hold!(
                page.entries.len() <= max,
                "{} entries on a page of {max}",
                page.entries.len()
            );
            seen.extend(page.entries.into_iter().map(|meta| meta.key));
            hold!(
                seen.len() <= TREE.len(),
                "a listing by {max} repeats keys: {seen:?}"
            );
            if !page.more {
                break;
            }
            hold!(
                after.as_deref() != seen.last().map(String::as_str),
                "more is promised and nothing comes"
            );
            after = seen.last().cloned();
        }
        hold!(seen == TREE, "pages of {max} gave {seen:?}");
    }
    Ok(())
}

async fn unsafe_keys(store: Shared) -> Outcome {
    for key in [
        "",
        "/",
        "/etc/passwd",
        "../up",
        "a/../../up",
        "a//b",
        "a/",
        ".",
        "a/./b",
        "nul\0",
        "line\nbreak",
        ".tmp/x",
    ] {
        let outcomes = [
            store.put(key, Object::new("x"), PutMode::Overwrite).await.err(),
            store.get(key).await.err(),
            store.get_range(key, 0..1).await.err(),
            store.head(key).await.err(),
            store.delete(key).await.err(),
        ];
        let kinds: BTreeSet<_> = outcomes
            .iter()
            .map(|error| error.as_ref().map_or("accepted", |error| error.kind().as_str()))
            .collect();
        hold!(
            kinds == BTreeSet::from([ErrorKind::Bug.as_str()]),
            "{key:?}: {kinds:?}"
        );
    }
    for prefix in ["/", "../", "a//b"] {
        let kind = store.list(prefix, None, 10).await.err().map(|error| error.kind());
        hold!(kind == Some(ErrorKind::Bug), "listing {prefix:?}: {kind:?}");
    }
    Ok(())
}

async fn wrong_checksum(store: Shared) -> Outcome {
    let wrong = Object::with_crc32("content", crc32fast::hash(b"content") ^ 1);
    for mode in [PutMode::Create, PutMode::Overwrite] {
        let put = store.put("key", wrong.clone(), mode).await;
        hold!(put.is_err(), "{mode:?} accepted them: {put:?}");
        let kind = store.head("key").await.err().map(|error| error.kind());
        hold!(
            kind == Some(ErrorKind::NotFound),
            "{mode:?} stored them; head gave {kind:?}"
        );
    }
    Ok(())
}
