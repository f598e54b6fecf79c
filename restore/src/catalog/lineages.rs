//! Which lineage is restored: the one asked for, the only one, the one that was begun in the place of the others, or the one
//! with the newest sign of life.
//!
//! Owns: this choice, and that it is refused where what cannot be read could change it. Does not own: reading a lineage.

use std::collections::BTreeSet;

use highwater_config::Exit;
use highwater_format::{Beginning, ClusterName, Layout, Pulse, SystemId, Time, decode};
use highwater_store::{Store, StoreError, list_parts};

use crate::{
    error::{RestoreError, store_exit},
    regions::{Access, Meaning, Region, meaning},
};

/// Why a region gave no answer.
#[derive(Debug, Clone)]
pub(super) struct Silence {
    pub(super) error: String,
    exit: Exit,
}

impl From<&StoreError> for Silence {
    fn from(error: &StoreError) -> Self {
        Self {
            error: error.to_string(),
            exit: store_exit(error.kind()),
        }
    }
}

/// The lineages that a region holds something of.
pub(super) async fn lineages(region: &Region, cluster: &ClusterName) -> Result<BTreeSet<SystemId>, Silence> {
    let store = match &region.access {
        Access::Store(store) => store,
        Access::LeftOut => return Ok(BTreeSet::new()),
        Access::Failed { error, kind } => {
            return Err(Silence {
                error: error.clone(),
                exit: store_exit(*kind),
            });
        }
    };
    let directory = Layout::cluster_dir(cluster);
    let parts = list_parts(store.as_ref(), &directory)
        .await
        .map_err(|error| Silence::from(&error))?;
    Ok(parts
        .iter()
        .filter_map(|(_, first)| Layout::parse_system_id(cluster, first))
        .collect())
}

/// Refuses to go on where no region says anything.
pub(super) fn refuse_all_silent(
    regions: &[Region],
    lineages: &[Result<BTreeSet<SystemId>, Silence>],
) -> Result<(), RestoreError> {
    let asked = regions
        .iter()
        .zip(lineages)
        .filter(|(region, _)| !matches!(region.access, Access::LeftOut));
    let mut errors = Vec::new();
    let mut exit = Exit::Usage;
    for (region, read) in asked {
        let Err(silence) = read else { return Ok(()) };
        errors.push(format!("region {}: {}", region.name, silence.error));
        if silence.exit != Exit::Usage {
            exit = Exit::Trouble;
        }
    }
    if errors.is_empty() {
        return Err(RestoreError::failed(
            Exit::Usage,
            "every region is left out; keep at least one",
        ));
    }
    Err(RestoreError::failed(
        exit,
        format!("no region can be read. {}", errors.join(". ")),
    ))
}

/// The lineage to restore: the one asked for, the only one, the one begun last, or the one with the newest sign of life.
pub(super) async fn choose(
    regions: &[Region],
    cluster: &ClusterName,
    found: &BTreeSet<SystemId>,
    wanted: Option<SystemId>,
    lineages: &[Result<BTreeSet<SystemId>, Silence>],
) -> Result<SystemId, RestoreError> {
    let silent = regions
        .iter()
        .zip(lineages)
        .find_map(|(region, read)| read.as_ref().err().map(|_| &region.name));
    let absent = |what: String| match silent {
        None => RestoreError::lacking(
            Exit::No,
            format!("{what}; check the cluster's name and the regions' urls"),
        ),
        Some(name) => {
            let message =
                format!("{what} that can be read, and region {name} does not answer; try again when it does");
            RestoreError::failed(Exit::Trouble, message)
        }
    };
    let mut ids = found.iter().copied();
    match (wanted, ids.next(), ids.next()) {
        (Some(wanted), ..) if found.contains(&wanted) => Ok(wanted),
        (Some(wanted), ..) => Err(absent(format!("there is no archive of system {wanted} in cluster {cluster}"))),
        (None, None, _) => Err(absent(format!("there is no archive of cluster {cluster} in any region"))),
        (None, Some(only), None) => Ok(only),
        (None, Some(_), Some(_)) => newest(regions, cluster, found).await.map_err(|why| {
            let known: Vec<String> = found.iter().map(ToString::to_string).collect();
            let message = format!(
                "cluster {cluster} has the lineages {} and it is not certain which is the newest: {why}; choose one with \
                 --system-id",
                known.join(", ")
            );
            RestoreError::failed(Exit::Usage, message)
        }),
    }
}

/// The lineage with the newest sign of life. One whose pulse is not known may be newer than all others, so that restoring
/// another would quietly bring back what was there before an upgrade: then the reason is returned.
async fn newest(
    regions: &[Region],
    cluster: &ClusterName,
    found: &BTreeSet<SystemId>,
) -> Result<SystemId, String> {
    let mut stores = Vec::new();
    for region in regions {
        match &region.access {
            Access::Store(store) => stores.push(store.as_ref()),
            Access::LeftOut => {}
            Access::Failed { error, .. } => return Err(format!("region {}: {error}", region.name)),
        }
    }
    let mut succeeded = succeeded(&stores, cluster, found).await?;
    if found.is_subset(&succeeded) {
        // Each was begun in the place of another one, in turn: the pulses decide.
        succeeded.clear();
    }
    let candidates = || found.iter().filter(|id| !succeeded.contains(id));
    if let (Some(last), None, false) = (candidates().next(), candidates().nth(1), succeeded.is_empty()) {
        return Ok(*last);
    }
    let mut newest = None;
    for id in candidates() {
        let layout = Layout::new(cluster.clone(), *id);
        match last_sign(&stores, &layout).await? {
            Some(time) => newest = newest.max(Some((time, *id))),
            None if has_begun(&stores, &layout).await? => {
                return Err(format!("no region has {}", layout.pulse()));
            }
            None => {}
        }
    }
    newest.map(|(_, id)| id).ok_or_else(|| "there is none".to_owned())
}

/// The lineages in whose place others were begun. An old server that was started again has the newest pulse, and is not what
/// a restore is asked for.
async fn succeeded(
    stores: &[&dyn Store],
    cluster: &ClusterName,
    found: &BTreeSet<SystemId>,
) -> Result<BTreeSet<SystemId>, String> {
    let mut succeeded = BTreeSet::new();
    for id in found {
        let key = Layout::new(cluster.clone(), *id).identity();
        for store in stores {
            match store.get(&key).await {
                // One that cannot be read says nothing: the other regions have it too, or the pulses decide.
                Ok(bytes) => {
                    if let Ok(beginning) = decode::<Beginning>(&bytes) {
                        succeeded.extend(beginning.succeeds);
                    }
                }
                Err(error) if meaning(&error) != Meaning::Silent => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }
    Ok(succeeded)
}

/// The latest server time that any region's pulse of a lineage names; `None` if there is no pulse.
async fn last_sign(stores: &[&dyn Store], layout: &Layout) -> Result<Option<Time>, String> {
    let key = layout.pulse();
    let mut latest = None;
    for store in stores {
        match store.get(&key).await {
            Ok(bytes) => {
                let pulse = decode::<Pulse>(&bytes)
                    .map_err(|error| format!("region {}: {key}: {error}", store.region()))?;
                latest = latest.max(Some(pulse.server_time));
            }
            Err(error) if meaning(&error) == Meaning::Absent => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(latest)
}

/// Whether there is more of a lineage than the marks of an agent that was refused.
async fn has_begun(stores: &[&dyn Store], layout: &Layout) -> Result<bool, String> {
    for store in stores {
        let parts = list_parts(*store, layout.root()).await;
        let parts = parts.map_err(|error| error.to_string())?;
        if parts.iter().any(|(name, _)| name != "probe") {
            return Ok(true);
        }
    }
    Ok(false)
}
