//! Whether the packs of a backup are there at all.
//!
//! Owns: comparing what the manifest names with what the regions list, by number and stored size, so that a backup that
//! lost packs (to a lifecycle rule, say) is refused before a directory is touched. Does not own: whether their content
//! is good; that is checked when it is read. Memory: a page of a listing, and the packs not found yet.

use std::collections::BTreeMap;

use highwater_format::BackupId;
use highwater_format::layout::{Key, Layout};
use highwater_format::manifest::PackInfo;
use highwater_store::{ErrorKind, LONG_PAGE, Store, StoreError};

use super::Sources;

/// What lacks of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lacking {
    /// How many packs.
    pub packs: usize,
    /// The key of the first.
    pub first: String,
    /// A region that did not answer and may have them.
    pub silent: Option<String>,
}

/// Packs by number, with their stored sizes.
type Wanted = BTreeMap<u32, u64>;

/// The packs of `id` that no region holds in the right size; `None` if all are there.
pub async fn lacking(
    sources: &Sources,
    layout: &Layout,
    id: &BackupId,
    packs: &[PackInfo],
) -> Option<Lacking> {
    let mut wanted: Wanted = packs.iter().map(|pack| (pack.number, pack.stored_len)).collect();
    let mut silent = None;
    for store in sources.stores() {
        if let Err(error) = cross_off(store.as_ref(), layout, id, &mut wanted).await {
            silent = Some(error.to_string());
        }
    }
    // A listing may lag; the object itself does not.
    while let Some((number, size)) = wanted.first_key_value().map(|(number, size)| (*number, *size)) {
        let first = layout.pack(id, number);
        let mut found = false;
        for store in sources.stores() {
            match store.head(&first).await {
                Ok(meta) => found |= meta.size == size,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => silent = Some(error.to_string()),
            }
        }
        if !found {
            return Some(Lacking {
                packs: wanted.len(),
                first,
                silent,
            });
        }
        wanted.remove(&number);
    }
    None
}

/// Takes out what a region lists in the right size.
async fn cross_off(
    store: &dyn Store,
    layout: &Layout,
    id: &BackupId,
    wanted: &mut Wanted,
) -> Result<(), StoreError> {
    let directory = format!("{}pack/", layout.backup_dir(id));
    let mut after: Option<String> = None;
    while !wanted.is_empty() {
        let page = store.list(&directory, after.as_deref(), LONG_PAGE).await?;
        let last = page.entries.last().map(|meta| meta.key.clone());
        for meta in page.entries {
            if let Some(Key::Pack(_, number)) = layout.parse(&meta.key)
                && wanted.get(&number) == Some(&meta.size)
            {
                wanted.remove(&number);
            }
        }
        if !page.more || last.is_none() {
            break;
        }
        after = last;
    }
    Ok(())
}
