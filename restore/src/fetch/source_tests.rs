use highwater_store::{MemoryStore, Object, PutMode};

use super::*;

async fn region(name: &str, content: Option<&[u8]>) -> Arc<dyn Store> {
    let store = MemoryStore::new(name);
    if let Some(content) = content {
        store
            .put("k", Object::new(content.to_vec()), PutMode::Create)
            .await
            .unwrap();
    }
    Arc::new(store)
}

async fn good(bytes: Bytes) -> Result<Bytes, Reject<()>> {
    if bytes.as_ref() == b"good" {
        Ok(bytes)
    } else {
        Err(Reject::Copy("not good".to_owned()))
    }
}

#[tokio::test]
async fn fault_41_a_copy_that_is_missing_or_bad_is_taken_from_the_next_region() {
    for first in [None, Some(b"bad".as_slice())] {
        let sources = Sources::new(vec![region("a", first).await, region("b", Some(b"good")).await]);
        let had = sources.read("k", good).await.unwrap();
        assert_eq!((had.region.as_str(), had.fell_back), ("b", true));
    }
}

#[tokio::test]
async fn nowhere_names_every_region_and_its_reason() {
    let sources = Sources::new(vec![region("a", None).await, region("b", Some(b"bad")).await]);
    let Err(ReadError::Nowhere(nowhere)) = sources.read("k", good).await else {
        panic!("it was found")
    };
    let text = nowhere.to_string();
    assert!(text.contains("k; a: ") && text.contains("b: not good"), "{text}");
    assert!(!nowhere.is_absent() && nowhere.exit() == Exit::Damage);
}

#[tokio::test]
async fn absent_everywhere_is_told_from_not_answered() {
    let sources = Sources::new(vec![region("a", None).await, region("b", None).await]);
    let Err(ReadError::Nowhere(nowhere)) = sources.read("k", good).await else {
        panic!("it was found")
    };
    assert!(nowhere.is_absent() && !nowhere.may_pass());
}

#[tokio::test]
async fn a_region_that_is_known_to_be_silent_is_asked_last() {
    let both = vec![region("a", Some(b"good")).await, region("b", Some(b"good")).await];
    let sources = Sources::new(both.clone()).asking_last(&[true, false]);
    assert_eq!(sources.read("k", good).await.unwrap().region, "b");
    let sources = Sources::new(both).asking_last(&[false, true]);
    assert_eq!(sources.read("k", good).await.unwrap().region, "a");
}
