//! Checks the base backups of one region: the manifest, every pack, and the WAL that makes each consistent.

use bytes::Bytes;
use futures::{StreamExt, stream};
use highwater_format::{Backup, Expect, Object, PackInfo};

use super::{Problem, Subject, Verified};
use crate::{
    catalog::Catalog,
    fetch::{self, Sources},
    progress::Bar,
};

pub(super) async fn verify(
    catalog: &Catalog,
    subjects: &[Subject<'_>],
    subject: &Subject<'_>,
    parallel: usize,
    found: &mut Verified,
) {
    for backup in subject.view.backups.values() {
        wal(catalog, subject, backup, found);
        files(catalog, subjects, subject, backup, parallel, found).await;
    }
    for id in catalog
        .backups()
        .into_keys()
        .filter(|id| !subject.view.backups.contains_key(id))
    {
        let problem = "is visible in another region only";
        found.notes.push(Problem::new(
            &subject.region.name,
            format!("backup {id}"),
            problem,
        ));
    }
    for id in subject
        .view
        .unfinished
        .iter()
        .filter(|id| !catalog.backups().contains_key(id))
    {
        let problem = "has no commit mark: in progress, or abandoned; it is not used";
        found.notes.push(Problem::new(
            &subject.region.name,
            format!("backup {id}"),
            problem,
        ));
    }
}

/// Without a finished base backup nothing can be restored, however whole everything else is.
pub(super) fn none(catalog: &Catalog, found: &mut Verified) {
    if !catalog.backups().is_empty() {
        return;
    }
    let what = "base backups";
    match catalog.unreadable().next() {
        None => {
            let problem = "no region has a finished one, so NOTHING can be restored: take one with `highwater-agent backup`";
            found.missing.push(Problem::new("all", what, problem));
        }
        Some((region, _)) => {
            let problem = format!(
                "no region that answers has a finished one; without region {} nothing can be restored",
                region.name
            );
            found.notes.push(Problem::new("all", what, problem));
        }
    }
}

/// The other regions whose manifest of a backup is good.
async fn elsewhere(
    catalog: &Catalog,
    subjects: &[Subject<'_>],
    subject: &Subject<'_>,
    backup: &Backup,
) -> String {
    let mut names = Vec::new();
    for other in subjects.iter().filter(|other| other.index != subject.index) {
        let Some(store) = other.region.store() else {
            continue;
        };
        let sources = Sources::new(vec![store.clone()]);
        if fetch::manifest(&sources, &catalog.layout, backup).await.is_ok() {
            names.push(other.region.name.as_str());
        }
    }
    if names.is_empty() {
        "no region has a good copy, so this base backup cannot be restored".to_owned()
    } else {
        format!("a restore reads that of region {}", names.join(", "))
    }
}

/// A backup is visible in a region only when that region alone can make it consistent.
fn wal(catalog: &Catalog, subject: &Subject<'_>, backup: &Backup, found: &mut Verified) {
    let name = &subject.region.name;
    let what = format!("backup {}", backup.id);
    match catalog.chain(backup.stop_timeline, &[subject.index]) {
        Ok(chain) => {
            let end = chain.contiguous_end(chain.segment_size.segment_start(backup.start_lsn));
            if end < backup.stop_lsn {
                let problem = format!(
                    "lacks the WAL {} that it needs",
                    chain.hole_at(end, backup.stop_lsn)
                );
                found.missing.push(Problem::new(name, what, problem));
            }
        }
        Err(broken) => found.missing.push(Problem::new(name, what, broken.to_string())),
    }
}

async fn files(
    catalog: &Catalog,
    subjects: &[Subject<'_>],
    subject: &Subject<'_>,
    backup: &Backup,
    parallel: usize,
    found: &mut Verified,
) {
    let Some(store) = subject.region.store() else {
        return;
    };
    let name = &subject.region.name;
    let sources = Sources::new(vec![store.clone()]);
    let manifest = match fetch::manifest(&sources, &catalog.layout, backup).await {
        Ok(manifest) => manifest,
        Err(nowhere) => {
            // Of this region alone: the words for a search in all of them would be wrong here.
            let reasons: Vec<&str> = nowhere
                .attempts
                .iter()
                .map(|attempt| attempt.reason.as_str())
                .collect();
            let reasons = reasons.join("; ");
            if nowhere.may_pass() {
                found.unreadable.push(Problem::new(name, &nowhere.key, reasons));
            } else {
                let elsewhere = elsewhere(catalog, subjects, subject, backup).await;
                let problem = format!("{reasons}; {elsewhere}");
                found.damage.push(Problem::new(name, &nowhere.key, problem));
            }
            return;
        }
    };
    found.good(subject.index, 0);
    let bar = Bar::objects("verifying packs", manifest.packs.len() as u64);
    let packs = stream::iter(&manifest.packs).map(|pack| async move {
        let key = catalog.layout.pack(&backup.id, pack.number);
        let bytes = store.get(&key).await;
        (pack, key, bytes)
    });
    let mut packs = packs.buffered(parallel.clamp(1, 8));
    while let Some((pack, key, bytes)) = packs.next().await {
        bar.add(1);
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => {
                found.failed(name, &key, &error);
                continue;
            }
        };
        let stored = bytes.len() as u64;
        let expect = Expect::pack(catalog.identity.system_id, &backup.id, pack.number);
        let pack = pack.clone();
        let checked = tokio::task::spawn_blocking(move || check(bytes, &expect, &pack)).await;
        match checked {
            Ok(Ok(())) => found.good(subject.index, stored),
            Ok(Err(problem)) => found.damage.push(Problem::new(name, key, problem)),
            Err(error) => found.unreadable.push(Problem::new(name, key, error.to_string())),
        }
    }
}

fn check(bytes: Bytes, expect: &Expect, pack: &PackInfo) -> Result<(), String> {
    let crc32 = format!("{:08x}", crc32fast::hash(&bytes));
    if bytes.len() as u64 != pack.stored_len || crc32 != pack.crc32 {
        return Err(format!(
            "{} bytes with CRC-32 {crc32}; the manifest says {} with {}",
            bytes.len(),
            pack.stored_len,
            pack.crc32
        ));
    }
    let object = Object::open(bytes).map_err(|error| error.to_string())?;
    object.expect(expect).map_err(|error| error.to_string())?;
    let plain = object.plain().map_err(|error| error.to_string())?;
    if plain.len() as u64 != pack.plain_len {
        return Err(format!(
            "holds {} plain bytes; the manifest says {}",
            plain.len(),
            pack.plain_len
        ));
    }
    Ok(())
}
