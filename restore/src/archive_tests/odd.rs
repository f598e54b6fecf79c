//! What is not as it should be about the places themselves: other lineages beside the one, a region that holds nothing,
//! files of somebody else.

use std::sync::Arc;

use highwater_config::Exit;
use highwater_format::{Beginning, Identity, Layout, Pulse, SystemId, decode, encode};
use highwater_store::{MemoryStore, Object, PutMode, Store};

use crate::{
    catalog::{Catalog, read},
    error::RestoreError,
    locate,
    plan::Reason,
    target::{Request, Target},
};

use super::archive::*;

async fn read_archive(archive: &Archive, wanted: Option<SystemId>) -> Result<Catalog, RestoreError> {
    read::read(&archive.regions(), &"orders".parse().unwrap(), wanted).await
}

/// The same cluster after `pg_upgrade`, with a later sign of life.
async fn upgraded(archive: &Archive) -> Layout {
    let newer = Layout::new("orders".parse().unwrap(), SystemId(8));
    let identity: Identity = decode(&archive.a.get(&layout().identity()).await.unwrap()).unwrap();
    let pulse: Pulse = decode(&archive.a.get(&layout().pulse()).await.unwrap()).unwrap();
    for store in [&archive.a, &archive.b] {
        let identity = Identity {
            system_id: SystemId(8),
            ..identity.clone()
        };
        put(store, &newer.identity(), encode(&identity).unwrap()).await;
        let pulse = Pulse {
            server_time: at("2026-11-21T00:00:00Z"),
            ..pulse.clone()
        };
        put(store, &newer.pulse(), encode(&pulse).unwrap()).await;
    }
    newer
}

#[tokio::test]
async fn fault_78_a_lineage_is_not_passed_over_because_its_pulse_cannot_be_read() {
    let archive = Archive::whole().await;
    let newer = upgraded(&archive).await;
    let catalog = read_archive(&archive, None).await.unwrap();
    assert_eq!(catalog.layout.system_id(), SystemId(8));

    put(&archive.b, &newer.pulse(), b"{}".to_vec()).await;
    let damaged = read_archive(&archive, None).await.unwrap_err();
    archive.b.delete(&newer.pulse()).await.unwrap();
    assert!(
        read_archive(&archive, None).await.is_ok(),
        "the other region has it"
    );
    archive.a.delete(&newer.pulse()).await.unwrap();
    let absent = read_archive(&archive, None).await.unwrap_err();
    for error in [damaged, absent] {
        assert_eq!(error.exit(), Exit::Usage, "{error}");
        assert!(
            error.to_string().contains("--system-id") && error.to_string().contains("8/pulse.json"),
            "{error}"
        );
    }
    for store in [&archive.a, &archive.b] {
        store.delete(&newer.identity()).await.unwrap();
        put(store, &format!("{}probe/place", newer.root()), Vec::new()).await;
    }
    let catalog = read_archive(&archive, None).await.unwrap();
    assert_eq!(
        catalog.layout.system_id(),
        system_id(),
        "an agent that was refused is no lineage"
    );
    let mut catalog = read_archive(&archive, Some(system_id())).await.unwrap();
    let request = Request::to(Target::Immediate);
    let plan = locate::resolve(&mut catalog, &archive.regions(), &request)
        .await
        .unwrap();
    assert!(
        plan.notes.iter().any(|note| note.contains("--system-id 8")),
        "{:?}",
        plan.notes
    );
}

/// The old server was started again after another one had taken its place on purpose: its pulse is the newest.
#[tokio::test]
async fn the_lineage_begun_last_is_restored_whoever_gave_the_last_sign_of_life() {
    let archive = Archive::whole().await;
    let newer = upgraded(&archive).await;
    let identity: Identity = decode(&archive.a.get(&newer.identity()).await.unwrap()).unwrap();
    let mut pulse: Pulse = decode(&archive.a.get(&layout().pulse()).await.unwrap()).unwrap();
    pulse.server_time = at("2026-11-22T00:00:00Z");
    put(&archive.a, &layout().pulse(), encode(&pulse).unwrap()).await;
    let catalog = read_archive(&archive, None).await.unwrap();
    assert_eq!(
        catalog.layout.system_id(),
        system_id(),
        "nothing says which came last"
    );

    let succeeds = vec![system_id()];
    let beginning = Beginning { identity, succeeds };
    let document = encode(&beginning).unwrap();
    assert_eq!(decode::<Identity>(&document).unwrap(), beginning.identity);
    put(&archive.b, &newer.identity(), document).await;
    let catalog = read_archive(&archive, None).await.unwrap();
    assert_eq!(catalog.layout.system_id(), SystemId(8));
    assert_eq!(catalog.other_lineages, [system_id()]);
    let catalog = read_archive(&archive, Some(system_id())).await.unwrap();
    assert_eq!(catalog.layout.system_id(), system_id());
}

#[tokio::test]
async fn a_region_that_holds_nothing_is_no_witness_of_the_end() {
    let archive = Archive {
        b: Arc::new(MemoryStore::new("b")),
        ..Archive::whole().await
    };
    // The directory that a file system should be mounted on, say.
    put(&archive.b, "lost+found/x", Vec::new()).await;
    let error = archive.plan(&Request::latest()).await.unwrap_err();
    assert_eq!(error.exit(), Exit::Trouble, "{error}");
    let RestoreError::Refused(refusal) = &error else {
        panic!("{error}")
    };
    assert_eq!(refusal.reason, Reason::RegionUnreadable);
    for part in ["not mounted", "--without-region b"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert!(archive.plan(&Request::to(Target::Immediate)).await.is_ok());
}

#[tokio::test]
async fn files_of_somebody_else_hide_nothing() {
    let archive = Archive::whole().await;
    let id = backup().id;
    let odd = [
        format!("{}.DS_Store", layout().backup_dir(&id)),
        format!("{}@eaDir/pack", layout().backup_dir(&id)),
        // Behind what is asked for to pass over a directory.
        format!("{}\u{dc}.txt", layout().backup_dir(&id)),
        format!("{}\u{dc}/\u{dc}.txt", layout().base_dir()),
        format!("{}\u{dc}.txt", layout().timeline_dir(second_timeline())),
        format!("{}.nfs0001", layout().wal_dir()),
    ];
    for key in &odd {
        for store in [&archive.a, &archive.b] {
            let object = Object::new(Vec::new());
            store.put(key, object, PutMode::Create).await.unwrap();
        }
    }
    let catalog = archive.catalog().await;
    for region in &catalog.regions {
        assert!(region.is_readable(), "{region:?}");
        assert!(region.backups.contains_key(&id) && region.unfinished.is_empty());
        assert_eq!(region.timelines.len(), 2);
    }
    for store in [&archive.a, &archive.b] {
        store.delete(&layout().backup(&id)).await.unwrap();
    }
    let catalog = archive.catalog().await;
    assert!(
        catalog
            .regions
            .iter()
            .all(|region| region.unfinished.contains(&id))
    );
}

/// A copy that was cut off names no ancestor, and would make the timeline a beginning.
#[tokio::test]
async fn fault_54_a_history_that_was_cut_off_is_none_and_one_that_differs_is_refused() {
    let archive = Archive::whole().await;
    let key = layout().history(second_timeline());
    put(&archive.a, &key, Vec::new()).await;
    let catalog = archive.catalog().await;
    assert!(
        catalog.findings.iter().any(|finding| finding.key == key),
        "{catalog:?}"
    );
    let plan = archive.plan(&Request::latest()).await.unwrap();
    assert_eq!(plan.chain.history.entries.len(), 1, "the other region's copy");

    put(&archive.a, &key, b"1\t0/801B00\tanother\n".to_vec()).await;
    let error = archive.plan(&Request::latest()).await.unwrap_err();
    assert_eq!(error.exit(), Exit::Damage, "{error}");
    for part in [
        "region a: timeline 1 up to 0/801B00",
        "region b: timeline 1 up to 0/801B90",
    ] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // The same descent in other words is the same.
    put(&archive.a, &key, format!("1 {SWITCH}\n").into_bytes()).await;
    assert!(archive.plan(&Request::latest()).await.is_ok());
}
