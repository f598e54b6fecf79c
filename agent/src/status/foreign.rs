//! Regions in which the cluster's name belongs to another server.
//!
//! They hold nothing of this server and take nothing from it, a base backup included: what is wrong is the name or the prefix.
//! Owns: noticing them, and the reason. Does not own: the rule whose a region is ([`crate::identity`]).

use std::collections::BTreeMap;

use highwater_format::{Layout, SystemId};
use highwater_store::Store;

use super::{RegionStatus, Status};
use crate::error::{AgentError, Result};
use crate::identity;

/// What to do about it, as `check` and the agent say it.
pub(super) const NEXT_STEP: &str = "choose another [cluster] name or another prefix in the region's url, or, after pg_upgrade \
     or a deliberate re-creation, start the agent once with --new-lineage";

/// Notes whose a region is in which this lineage has not begun.
pub(super) async fn noted(store: &dyn Store, layout: &Layout, status: RegionStatus) -> Result<RegionStatus> {
    match identity::holds(store, layout).await {
        Ok(_) => Ok(status),
        Err(AgentError::OtherCluster { ours, theirs, .. }) => Ok(RegionStatus {
            error: Some(belongs(theirs, ours)),
            foreign: true,
            ..status
        }),
        Err(error) => Err(error),
    }
}

fn belongs(theirs: SystemId, ours: SystemId) -> String {
    format!(
        "the archive of this cluster name under this prefix belongs to system identifier {theirs}, the server is {ours}"
    )
}

/// The regions, by name.
pub(super) fn names(status: &Status) -> Vec<&str> {
    let foreign = status.regions.iter().filter(|region| region.foreign);
    foreign.map(|region| region.name.as_str()).collect()
}

/// The reason, where fewer regions than the policy asks for are left. `needed` regions must hold the archive.
pub(super) fn breach(status: &Status, needed: usize) -> Option<String> {
    let foreign = names(status).len();
    if foreign == 0 || status.regions.len() >= needed.saturating_add(foreign) {
        return None;
    }
    let mut facts: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for region in status.regions.iter().filter(|region| region.foreign) {
        let fact = region.error.as_deref().unwrap_or_default();
        facts.entry(fact).or_default().push(&region.name);
    }
    let facts: Vec<String> = facts
        .iter()
        .map(|(fact, names)| format!("region {}: {fact}", names.join(" and ")))
        .collect();
    Some(format!("{}: {NEXT_STEP}", facts.join("; ")))
}

#[cfg(test)]
mod tests {
    use highwater_format::{Identity, SegmentSize};
    use highwater_store::MemoryStore;

    use super::*;
    use crate::region::Archive;
    use crate::status::judge::samples;

    const OURS: SystemId = SystemId(8);

    fn layout(system_id: SystemId) -> Layout {
        Layout::new("orders".parse().unwrap(), system_id)
    }

    /// A region in which `owner` has begun its archive.
    async fn begun(owner: SystemId) -> MemoryStore {
        let identity = Identity {
            system_id: owner,
            server_version: 150_020,
            segment_size: SegmentSize::DEFAULT,
            wal_block_size: 8192,
            block_size: 8192,
        };
        let archive = Archive::new("orders".parse().unwrap(), identity, Vec::new());
        let store = MemoryStore::new("north");
        identity::ensure(&store, &archive).await.unwrap();
        store
    }

    /// Regions of which some are another server's.
    fn regions(foreign: &[bool]) -> Status {
        let mut status = samples::status(None, None);
        let region = status.regions.remove(0);
        status.regions = foreign
            .iter()
            .map(|foreign| RegionStatus {
                foreign: *foreign,
                error: foreign.then(|| belongs(SystemId(7), OURS)),
                ..region.clone()
            })
            .collect();
        status
    }

    #[tokio::test]
    async fn a_region_of_another_server_is_told_from_an_empty_one() {
        let blank = || samples::status(None, None).regions.remove(0);
        for (store, foreign) in [
            (MemoryStore::new("north"), false),
            (begun(OURS).await, false),
            (begun(SystemId(7)).await, true),
        ] {
            let region = noted(&store, &layout(OURS), blank()).await.unwrap();
            let error = region.error.unwrap_or_default();
            assert_eq!(region.foreign, foreign, "{error}");
            assert_eq!(error.contains(" 7, the server is 8"), foreign, "{error}");
        }
    }

    #[test]
    fn it_is_a_breach_where_too_few_regions_are_left() {
        for (foreign, needed, breached) in [
            ([false, false], 2, false),
            ([true, false], 1, false),
            ([true, false], 2, true),
            ([true, true], 1, true),
            ([true, true], 2, true),
        ] {
            let reason = breach(&regions(&foreign), needed);
            assert_eq!(reason.is_some(), breached, "{foreign:?} {needed}: {reason:?}");
        }
        let reason = breach(&regions(&[true, true]), 2).unwrap();
        assert!(
            reason.starts_with("region a and a: the archive") && reason.contains("another prefix"),
            "{reason}"
        );
    }
}
