//! Backups whose packs are gone: refused before anything is touched.

use highwater_config::Exit;
use highwater_format::{Backup, BackupId, Manifest, PackInfo, Time, TimelineId, crc32_hex, encode};
use highwater_store::{ErrorKind, Fault, FaultyStore, Rule, Store};

use crate::{
    error::RestoreError,
    locate,
    regions::Region,
    run::inspect::inspect,
    target::{Request, Target},
};

use super::archive::*;

const PACKS: u32 = 3;

/// Gives both regions a manifest with packs; of the packs themselves each holds some.
async fn with_packs() -> Archive {
    let archive = Archive::whole().await;
    let id = backup().id;
    let pack = |number| PackInfo {
        number,
        plain_len: 5,
        stored_len: 5,
        crc32: "00000000".to_owned(),
    };
    let manifest = Manifest {
        backup: id.clone(),
        packs: (0..PACKS).map(pack).collect(),
        entries: Vec::new(),
    };
    let bytes = encode(&manifest).unwrap();
    let backup = Backup {
        manifest_crc32: crc32_hex(crc32fast::hash(&bytes)),
        packs: PACKS,
        ..backup()
    };
    for store in [&archive.a, &archive.b] {
        put(store, &layout().manifest(&id), bytes.clone()).await;
        put(store, &layout().backup(&id), encode(&backup).unwrap()).await;
    }
    for number in 0..PACKS {
        let store = if number == 1 { &archive.b } else { &archive.a };
        put(store, &layout().pack(&id, number), b"bytes".to_vec()).await;
    }
    archive
}

async fn inspected(archive: &Archive, regions: &[Region]) -> Result<usize, RestoreError> {
    let mut catalog = archive.catalog().await;
    let request = Request::to(Target::Immediate);
    let plan = locate::resolve(&mut catalog, regions, &request).await?;
    Ok(inspect(&catalog, regions, &plan).await?.packs.len())
}

#[tokio::test]
async fn packs_that_are_gone_are_missed_before_anything_is_written() {
    let archive = with_packs().await;
    let regions = archive.regions();
    assert_eq!(inspected(&archive, &regions).await.unwrap(), 3);

    let key = layout().pack(&backup().id, 1);
    put(&archive.b, &key, b"byte".to_vec()).await;
    let short = inspected(&archive, &regions).await.unwrap_err();
    archive.b.delete(&key).await.unwrap();
    let gone = inspected(&archive, &regions).await.unwrap_err();
    for error in [&short, &gone] {
        assert_eq!(error.exit(), Exit::Damage, "{error}");
        for part in ["1 of its 3 packs", key.as_str(), "no older backup"] {
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    }

    let faulty = std::sync::Arc::new(FaultyStore::new(archive.b.clone()));
    let silent = [regions[0].clone(), Region::over(faulty.clone())];
    faulty.inject(Rule::times(1_000, Fault::FailBefore(ErrorKind::Operator)));
    let error = inspected(&archive, &silent).await.unwrap_err();
    assert_eq!(error.exit(), Exit::Trouble, "{error}");
}

#[tokio::test]
async fn an_older_backup_is_named() {
    let archive = with_packs().await;
    let started_at: Time = at("2026-11-20T15:22:28Z");
    let older = BackupId::new(TimelineId::FIRST, START, started_at);
    let bytes = manifest(&older);
    let backup = Backup {
        id: older.clone(),
        start_lsn: START,
        started_at,
        manifest_crc32: crc32_hex(crc32fast::hash(&bytes)),
        ..backup()
    };
    put(&archive.b, &layout().manifest(&older), bytes).await;
    put(&archive.b, &layout().backup(&older), encode(&backup).unwrap()).await;
    let newest = super::archive::backup().id;
    archive.a.delete(&layout().pack(&newest, 2)).await.unwrap();
    let error = inspected(&archive, &archive.regions()).await.unwrap_err();
    assert!(
        error.to_string().contains(&format!("--backup {older}")),
        "{error}"
    );
}
