//! Making a stored base backup visible, region by region.
//!
//! Owns the order: the manifest, then proof that the region holds all WAL from the start to the stop
//! position, that it is the server's, and that no pack is gone again, then `backup.json`, the commit mark. Whatever happens in between leaves
//! nothing that a restore would see. A region becomes visible on its own, without waiting for the others.
//! Does not own: packs, which are stored before this begins.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use highwater_format::LsnRange;
use highwater_format::records::Backup;
use highwater_store::{ErrorKind, Object, list_all};
use tokio::time::timeout;

use super::course::Served;
use super::regions::{Target, Targets};
use super::wal::WalOf;
use crate::error::{AgentError, Result};
use crate::region::Archive;

/// What is to be published: the record, and both documents as they are stored.
#[derive(Debug)]
pub(crate) struct Publication {
    pub(crate) backup: Backup,
    pub(crate) manifest: Object,
    pub(crate) record: Object,
}

/// Publishes in every live region. Fails when fewer than the policy asks for got it.
pub(crate) async fn publish(
    targets: &Targets,
    archive: &Archive,
    wal: &WalOf<'_>,
    publication: &Publication,
    served: &Served,
) -> Result<()> {
    let regions = targets.live().map(|target| async move {
        (
            target,
            one(targets, target, archive, wal, publication, served).await,
        )
    });
    targets.settle(join_all(regions).await)
}

async fn one(
    targets: &Targets,
    target: &Target,
    archive: &Archive,
    wal: &WalOf<'_>,
    publication: &Publication,
    served: &Served,
) -> Result<()> {
    let (backup, layout) = (&publication.backup, &archive.layout);
    targets
        .put_one(target, &layout.manifest(&backup.id), publication.manifest.clone())
        .await?;
    let range = LsnRange::new(backup.start_lsn, backup.stop_lsn.max(served.end()));
    wal.wait_for(&*target.region.quick, range, targets.patience())
        .await?;
    served.is_held(archive, &*target.region.quick).await?;
    let listed = timeout(targets.patience(), has_all_packs(target, archive, publication)).await;
    listed.unwrap_or_else(|_| Err(does_not_list(target, targets.patience())))?;
    targets
        .put_one(target, &layout.backup(&backup.id), publication.record.clone())
        .await?;
    tracing::info!(region = %target.region.name, backup = %backup.id, "base backup is complete and visible");
    Ok(())
}

fn does_not_list(target: &Target, patience: Duration) -> AgentError {
    AgentError::Trouble {
        what: format!(
            "region {}: what it holds of the base backup could not be listed within {} s",
            target.region.name,
            patience.as_secs()
        ),
        next: "Look for the region's own errors in the log, mend it and back up again".into(),
    }
}

/// A region may have been emptied while the backup was under way: what was stored there before is gone then.
async fn has_all_packs(target: &Target, archive: &Archive, publication: &Publication) -> Result<()> {
    let (region, layout, backup) = (&target.region, &archive.layout, &publication.backup);
    let listed = list_all(&*region.store, &layout.backup_dir(&backup.id), None).await?;
    let listed: BTreeSet<String> = listed.into_iter().map(|object| object.key).collect();
    for number in 0..backup.packs {
        let key = layout.pack(&backup.id, number);
        if listed.contains(&key) {
            continue;
        }
        // A listing may lag.
        match region.store.head(&key).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(AgentError::Trouble {
                    what: format!(
                        "region {}: {key} is gone, which this base backup has stored there",
                        region.name
                    ),
                    next:
                        "Find out who removes objects, or whether the bucket was replaced; then back up again"
                            .into(),
                });
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
