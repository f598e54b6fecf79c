//! Trying the regions: reachable, ours, readable and writable, and honest about conditional writes.
//!
//! Owns one finding or two per region. Writes one small probe object below the cluster's own prefix, which
//! stays, so that no right to delete is needed. Does not own: mending.

use futures::future::join_all;
use highwater_config::Config;
use highwater_format::{Layout, SystemId};
use highwater_store::{RegionConfig, RetryPolicy, Retrying, Store, StoreError, list_all, probe};

use super::Finding;
use crate::identity;

/// Looks at every region at once.
pub(super) async fn look(config: &Config, system_id: Option<SystemId>) -> Vec<Finding> {
    let looks = config.regions.iter().map(|region| one(config, region, system_id));
    join_all(looks).await.into_iter().flatten().collect()
}

async fn one(config: &Config, region: &RegionConfig, system_id: Option<SystemId>) -> Vec<Finding> {
    let what = format!("region {}", region.name);
    match attempt(config, region, system_id).await {
        Ok(findings) => findings,
        Err(error) => vec![Finding::fail(what, error.message(), error.next_step())],
    }
}

async fn attempt(
    config: &Config,
    region: &RegionConfig,
    system_id: Option<SystemId>,
) -> Result<Vec<Finding>, StoreError> {
    let what = format!("region {}", region.name);
    let plain = highwater_store::open(region).await?;
    let store = Retrying::new(plain, RetryPolicy::interactive(), std::sync::Arc::new(Quiet));
    let cluster = &config.cluster.name;
    let prefix = Layout::cluster_dir(cluster);
    // Ownership first: nothing is written where something of another cluster lies.
    let lineages = match identity::other_lineages(&store, cluster).await {
        Ok(lineages) => lineages,
        Err(error) => {
            return Ok(vec![Finding::fail(
                what,
                error.to_string(),
                "mend it and check again",
            )]);
        }
    };
    let mut findings = Vec::new();
    if let Some(ours) = system_id.filter(|ours| !lineages.is_empty() && !lineages.contains(ours)) {
        let theirs = lineages
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        findings.push(Finding::fail(
            &what,
            format!(
                "the archive of cluster {cluster} there belongs to system {theirs}, the server is {ours}"
            ),
            "choose another [cluster] name or another prefix in the region's url",
        ));
        return Ok(findings);
    }
    list_all(&store, &format!("{prefix}probe/"), None).await?;
    let able = probe(&store, &prefix).await?;
    let holds = match (system_id, lineages.as_slice()) {
        (_, []) => "empty".to_owned(),
        (Some(ours), lineages) if lineages.contains(&ours) => format!("holds the archive of system {ours}"),
        (_, lineages) => format!("holds {} lineages", lineages.len()),
    };
    findings.push(Finding::ok(
        &what,
        format!("{}: list, write and read work; {holds}", store.describe()),
    ));
    if !able.conditional_create {
        findings.push(Finding::fail(
            &what,
            "the store replaces objects although asked not to (If-None-Match): two agents with different histories could \
             replace each other's WAL, so the agent refuses to write there",
            "use a store that honours conditional writes; most S3-compatible servers do in a current version",
        ));
    }
    Ok(findings)
}

/// A check reports what it found itself.
#[derive(Debug)]
struct Quiet;

impl highwater_store::RetryObserver for Quiet {
    fn on_retry(&self, error: &StoreError, attempt: u32, _wait: std::time::Duration) {
        tracing::debug!(%error, attempt, "trying again");
    }

    fn on_success(&self) {}
}
