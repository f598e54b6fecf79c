//! Whose archive it is: clusters against places that are empty, their own and another's.

use highwater_format::SegmentSize;
use highwater_store::{MemoryStore, PutMode};

use super::*;
use crate::error::Kind;

fn server(system_id: u64) -> Identity {
    Identity {
        system_id: SystemId(system_id),
        server_version: 150_020,
        segment_size: SegmentSize::DEFAULT,
        wal_block_size: 8192,
        block_size: 8192,
    }
}

fn archive(name: &str, identity: &Identity, new_lineage: bool) -> Archive {
    let mut archive = Archive::new(name.parse().unwrap(), identity.clone(), Vec::new());
    archive.new_lineage = new_lineage;
    archive
}

/// Two clusters, two names in one place: each name takes the first that comes and nobody else, and a refusal leaves
/// no trace.
#[tokio::test]
async fn i14_two_clusters_and_two_names_do_not_mix() {
    let store = MemoryStore::new("north");
    for (name, system_id, accepted) in [
        ("orders", 7, true),
        ("orders", 8, false),
        ("bills", 8, true),
        ("bills", 7, false),
        ("orders", 7, true),
        ("bills", 8, true),
    ] {
        let before = store.keys();
        let ensured = ensure(&store, &archive(name, &server(system_id), false)).await;
        assert_eq!(ensured.is_ok(), accepted, "{name} {system_id}: {ensured:?}");
        if let Err(error) = ensured {
            assert!(
                matches!(error, AgentError::OtherCluster { .. }) && store.keys() == before,
                "{error}"
            );
        }
    }
}

/// While an agent begins a lineage there is something of it before its identity is.
#[tokio::test]
async fn a_lineage_that_is_just_being_begun_is_nobody_elses() {
    let store = MemoryStore::new("north");
    let layout = archive("orders", &server(7), false).layout;
    assert!(!holds(&store, &layout).await.unwrap());
    let odd = Object::new(Vec::new());
    store
        .put("orders/7/probe/create", odd, PutMode::Create)
        .await
        .unwrap();
    assert!(!holds(&store, &layout).await.unwrap());
    ensure(&store, &archive("orders", &server(7), false))
        .await
        .unwrap();
    assert!(holds(&store, &layout).await.unwrap());
    let other = archive("orders", &server(8), false).layout;
    assert!(matches!(
        holds(&store, &other).await,
        Err(AgentError::OtherCluster { .. })
    ));
}

#[tokio::test]
async fn i14_a_new_lineage_begins_only_when_asked_for() {
    let store = MemoryStore::new("north");
    ensure(&store, &archive("orders", &server(7), false))
        .await
        .unwrap();
    assert!(
        ensure(&store, &archive("orders", &server(8), false))
            .await
            .is_err()
    );
    ensure(&store, &archive("orders", &server(8), true))
        .await
        .unwrap();
    // Once begun it needs no flag, and the old one is as it was.
    ensure(&store, &archive("orders", &server(8), false))
        .await
        .unwrap();
    ensure(&store, &archive("orders", &server(7), false))
        .await
        .unwrap();
    let lineages = other_lineages(&store, &"orders".parse().unwrap()).await.unwrap();
    assert_eq!(lineages, [SystemId(7), SystemId(8)]);
    // Somebody else's file that sorts behind everything of ours.
    let odd = Object::new(Vec::new());
    let mode = PutMode::Create;
    store.put("orders/7/\u{dc}.txt", odd, mode).await.unwrap();
    let lineages = other_lineages(&store, &"orders".parse().unwrap()).await.unwrap();
    assert_eq!(lineages, [SystemId(7), SystemId(8)]);
}

/// The server that another one has replaced on purpose, started again with the same configuration.
#[tokio::test]
async fn i14_a_lineage_in_whose_place_another_was_begun_is_refused() {
    let first = Beginning {
        identity: server(7),
        succeeds: Vec::new(),
    };
    let bytes = records::encode(&first).unwrap();
    assert_eq!(
        bytes,
        records::encode(&server(7)).unwrap(),
        "as every agent wrote it"
    );
    // Whatever the identifiers' order.
    for (old, new) in [(7, 8), (8, 7)] {
        let store = MemoryStore::new("north");
        let orders = |system_id, flag| archive("orders", &server(system_id), flag);
        admit(&store, &orders(old, false)).await.unwrap();
        admit(&store, &orders(new, true)).await.unwrap();
        let before = store.keys();
        let refused = admit(&store, &orders(old, false)).await.unwrap_err();
        assert_eq!(refused.kind(), Kind::Damage, "{refused}");
        assert!(refused.to_string().contains(&new.to_string()), "{refused}");
        assert_eq!(store.keys(), before);
        admit(&store, &orders(new, false)).await.unwrap();
        admit(&store, &orders(old, true)).await.unwrap();
        // What an early agent began says nothing of what came before it.
        let early = records::encode(&server(new)).unwrap();
        let key = orders(new, false).layout.identity();
        store
            .put(&key, Object::new(early), PutMode::Overwrite)
            .await
            .unwrap();
        admit(&store, &orders(old, false)).await.unwrap();
    }
}

#[tokio::test]
async fn i14_facts_that_never_change_are_held_to() {
    let store = MemoryStore::new("north");
    ensure(&store, &archive("orders", &server(7), false))
        .await
        .unwrap();
    let minor = Identity {
        server_version: 150_021,
        ..server(7)
    };
    ensure(&store, &archive("orders", &minor, false)).await.unwrap();
    let before = store.keys();
    for other in [
        Identity {
            server_version: 160_000,
            ..server(7)
        },
        Identity {
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            ..server(7)
        },
        Identity {
            wal_block_size: 16_384,
            ..server(7)
        },
        Identity {
            block_size: 32_768,
            ..server(7)
        },
    ] {
        let refused = ensure(&store, &archive("orders", &other, true))
            .await
            .unwrap_err();
        assert_eq!(refused.kind(), Kind::Refused, "{refused}");
    }
    assert_eq!(store.keys(), before);
    let key = archive("orders", &server(7), false).layout.identity();
    let damaged = Object::new("{}");
    store.put(&key, damaged, PutMode::Overwrite).await.unwrap();
    let refused = ensure(&store, &archive("orders", &server(7), false))
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), Kind::Damage, "{refused}");
}
