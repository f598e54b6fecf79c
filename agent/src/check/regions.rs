//! Trying the regions: reachable, ours, readable and writable, honest about conditional writes, and apart.
//!
//! Owns one finding or two per region, and one where two of them are the same place. Writes two small probe objects below the
//! cluster's own prefix, which stay, so that no right to delete is needed. Does not own: mending.

use futures::future::join_all;
use highwater_config::Config;
use highwater_format::{Layout, SystemId};
use highwater_store::{RegionConfig, RetryPolicy, Retrying, Store, StoreError, list_all, probe};

use super::{Finding, Verdict};
use crate::error::AgentError;
use crate::identity;
use crate::places::{Place, Places};
use crate::writer::Me;

/// Looks at every region at once, and whether they are as many places.
pub(super) async fn look(config: &Config, system_id: Option<SystemId>) -> Vec<Finding> {
    let looks = config.regions.iter().map(|region| one(config, region, system_id));
    let looks = join_all(looks).await;
    let works = |findings: &Vec<Finding>| findings.iter().all(|finding| finding.verdict != Verdict::Fail);
    let usable = config
        .regions
        .iter()
        .zip(&looks)
        .filter(|(_, findings)| works(findings));
    let usable: Vec<&RegionConfig> = usable.map(|(region, _)| region).collect();
    let same = same_place(config, &usable).await.err();
    let same = same.map(|error| Finding::fail("regions", error.to_string(), "mend it and check again"));
    looks.into_iter().flatten().chain(same).collect()
}

/// Fails when two regions are the same place; one that fails now was looked at a moment ago.
async fn same_place(config: &Config, regions: &[&RegionConfig]) -> Result<(), AgentError> {
    let places = Places::new(&Layout::cluster_dir(&config.cluster.name), &Me::new_instance());
    let mut marked = Vec::with_capacity(regions.len());
    for region in regions {
        let store = open(region).await?;
        places.mark((&region.name, &store)).await?;
        marked.push((region.name.as_str(), store));
    }
    let marked: Vec<Place<'_>> = marked
        .iter()
        .map(|(name, store)| (*name, store as &dyn Store))
        .collect();
    places.tell_apart(&marked).await
}

async fn open(region: &RegionConfig) -> Result<Retrying, StoreError> {
    let plain = highwater_store::open(region).await?;
    Ok(Retrying::new(
        plain,
        RetryPolicy::interactive(),
        std::sync::Arc::new(Quiet),
    ))
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
    let store = open(region).await?;
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
    if let Some(ours) = system_id
        && let Ok(Some(theirs)) = identity::successor(&store, cluster, ours).await
    {
        findings.push(Finding::fail(
            &what,
            format!(
                "the lineage of system {theirs} was begun there in the place of {ours}, which is this server"
            ),
            "choose another [cluster] name or another prefix in the region's url, or stop this agent",
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
