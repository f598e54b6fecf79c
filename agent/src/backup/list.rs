//! Which base backups a region has.
//!
//! Owns: finding complete ones by listing, without paging through their packs. Does not own: whether their
//! objects are whole (`highwater-restore verify`).

use std::time::Duration;

use highwater_format::{Backup, BackupId, Layout, Lsn, Time, TimelineId, decode};
use highwater_store::{ErrorKind, Store, list_parts};

use crate::error::{AgentError, Kind, Result};

/// Sorts behind every character that a key of the archive holds.
const BEHIND_ITS_OBJECTS: char = '\u{7f}';

/// A base backup that began so much later than now was named by a clock that was wrong: that is not a clock that is fast.
const WRONG_CLOCK: Duration = Duration::from_secs(24 * 3600);

/// The complete base backups, oldest first by their start time.
pub(crate) async fn complete(store: &dyn Store, layout: &Layout) -> Result<Vec<BackupId>> {
    let mut found = Vec::new();
    for id in begun(store, layout).await? {
        if is_complete(store, layout, &id).await? {
            found.push(id);
        }
    }
    found.sort_by_key(BackupId::started_at);
    Ok(found)
}

/// A complete base backup that begins at or behind `lsn` of `timeline`, or on a later one: the first in the order of their ids. A few
/// requests, however many there are.
pub(crate) async fn first_behind(
    store: &dyn Store,
    layout: &Layout,
    timeline: TimelineId,
    lsn: Lsn,
) -> Result<Option<BackupId>> {
    let directory = layout.base_dir();
    let mut after = format!("{directory}{}", BackupId::new(timeline, lsn, Time::UNIX_EPOCH));
    let mut passed = None;
    loop {
        let page = store.list(&directory, Some(&after), 1).await?;
        let Some(first) = page.entries.into_iter().next() else {
            return Ok(None);
        };
        let name = first
            .key
            .strip_prefix(&directory)
            .and_then(|rest| rest.split('/').next());
        let id = name.and_then(|name| BackupId::parse(name).ok());
        match id.filter(|id| passed.as_ref() != Some(id)) {
            Some(id) if is_complete(store, layout, &id).await? => return Ok(Some(id)),
            Some(id) => {
                after = format!("{}{BEHIND_ITS_OBJECTS}", layout.backup_dir(&id));
                passed = Some(id);
            }
            // Not ours.
            None => after = first.key,
        }
    }
}

async fn is_complete(store: &dyn Store, layout: &Layout, id: &BackupId) -> Result<bool> {
    match store.head(&layout.backup(id)).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The record of a complete base backup.
pub(crate) async fn record(store: &dyn Store, layout: &Layout, id: &BackupId) -> Result<Backup> {
    let key = layout.backup(id);
    let bytes = store.get(&key).await?;
    let region = store.region().to_owned();
    decode(&bytes).map_err(|source| AgentError::Object { region, key, source })
}

/// The record of the newest of `backups`. Those whose record cannot be read are no base backups: nobody could restore them.
pub(crate) async fn newest_record(
    store: &dyn Store,
    layout: &Layout,
    backups: &mut Vec<BackupId>,
) -> Result<Option<Backup>> {
    while let Some(id) = backups.last() {
        match record(store, layout, id).await {
            Err(error) if error.kind() == Kind::Damage => {
                tracing::error!(backup = %id, %error, "the record of a base backup cannot be read");
                backups.pop();
            }
            backup => return backup.map(Some),
        }
    }
    Ok(None)
}

/// The newest of these, in order of their start. One that begins long after `now` was named by a clock that was wrong, and
/// would pass for the newest until then.
pub(crate) fn newest(backups: &[BackupId], now: Time) -> Option<&BackupId> {
    let by_now = |id: &&BackupId| id.started_at().since(now) <= WRONG_CLOCK;
    backups.iter().rfind(by_now)
}

/// Every id under which anything lies: one request per backup, however many packs it has.
async fn begun(store: &dyn Store, layout: &Layout) -> Result<Vec<BackupId>> {
    let parts = list_parts(store, &layout.base_dir()).await?;
    let id = |(name, _): &(String, String)| BackupId::parse(name).ok();
    Ok(parts.iter().filter_map(id).collect())
}

#[cfg(test)]
mod tests {
    use highwater_format::{ClusterName, SystemId};
    use highwater_store::{MemoryStore, Object, PutMode};

    use super::*;

    #[tokio::test]
    async fn only_those_with_their_commit_mark_count() {
        let layout = Layout::new("orders".parse::<ClusterName>().unwrap(), SystemId(7));
        let store = MemoryStore::new("a");
        let id = |lsn, seconds: i64| {
            BackupId::new(
                TimelineId::FIRST,
                Lsn(lsn),
                Time::from_unix_micros(seconds * 1_000_000),
            )
        };
        // The older LSN began later: a server that was rolled back.
        let (first, second, broken) = (id(0x900_0028, 100), id(0x200_0028, 200), id(0x500_0028, 300));
        for key in [
            layout.pack(&first, 0),
            layout.pack(&first, 1),
            layout.backup(&first),
            layout.pack(&second, 0),
            layout.backup(&second),
            layout.pack(&broken, 0),
            layout.manifest(&broken),
            format!("{}stray", layout.base_dir()),
            format!("{}\u{dc}.txt", layout.backup_dir(&first)),
            layout.pulse(),
        ] {
            store.put(&key, Object::new("x"), PutMode::Create).await.unwrap();
        }
        for (lsn, found) in [
            (0, Some(&second)),
            (0x200_0028, Some(&second)),
            (0x200_0029, Some(&first)),
            (0x900_0029, None),
        ] {
            let behind = first_behind(&store, &layout, TimelineId::FIRST, Lsn(lsn)).await;
            assert_eq!(behind.unwrap().as_ref(), found, "{lsn:x}");
        }
        let mut complete = complete(&store, &layout).await.unwrap();
        assert_eq!(complete, [first, second]);
        // None of these can be read, and that is not the end of everything.
        let newest = newest_record(&store, &layout, &mut complete).await.unwrap();
        assert!(newest.is_none() && complete.is_empty());
    }
}
