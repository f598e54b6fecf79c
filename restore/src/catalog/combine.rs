//! Puts the regions' views side by side: one identity, one story, and what differs.

use std::collections::BTreeMap;

use highwater_config::Exit;
use highwater_format::{Identity, Layout, SystemId, TimelineId};

use super::{Catalog, Finding, Reading, RegionView, read::Read};
use crate::error::RestoreError;

/// The catalog from what all regions said.
///
/// # Errors
///
/// The identity is missing, cannot be read, or differs between regions: nothing can be concluded then.
pub(super) fn combine(
    layout: Layout,
    other_lineages: Vec<SystemId>,
    read: Vec<Read>,
) -> Result<Catalog, RestoreError> {
    let mut findings: Vec<Finding> = read.iter().flat_map(|region| region.findings.clone()).collect();
    let identity = identity(&layout, &read, &findings)?;
    let regions: Vec<RegionView> = read.into_iter().map(|region| region.view).collect();
    findings.extend(differing_histories(&layout, &regions));
    findings.extend(differing_backups(&layout, &regions));
    Ok(Catalog {
        layout,
        identity,
        other_lineages,
        regions,
        findings,
        damaged: Vec::new(),
    })
}

fn identity(layout: &Layout, read: &[Read], findings: &[Finding]) -> Result<Identity, RestoreError> {
    let mut known: Option<(&str, &Identity)> = None;
    for region in read {
        let Some(identity) = &region.identity else {
            continue;
        };
        let name = region.view.name.as_str();
        if identity.system_id != layout.system_id() {
            let message = format!(
                "region {name}: {} is about system {}",
                layout.identity(),
                identity.system_id
            );
            return Err(RestoreError::failed(Exit::Damage, message));
        }
        match known {
            None => known = Some((name, identity)),
            Some((other, first)) => first.expect(identity).map_err(|error| {
                let message = format!(
                    "regions {other} and {name} disagree about {}: {error}",
                    layout.identity()
                );
                RestoreError::failed(Exit::Damage, message)
            })?,
        }
    }
    match known {
        Some((_, identity)) => Ok(identity.clone()),
        None => Err(no_identity(layout, read, findings)),
    }
}

fn no_identity(layout: &Layout, read: &[Read], findings: &[Finding]) -> RestoreError {
    let key = layout.identity();
    if let Some(finding) = findings.iter().find(|finding| finding.key == key) {
        let region = finding.region.as_deref().unwrap_or("?");
        let message = format!("region {region}: {key}: {}", finding.problem);
        return RestoreError::lacking(Exit::Damage, message);
    }
    let unknown = |region: &&Read| matches!(region.view.reading, Reading::Unreadable { .. });
    let silent = read
        .iter()
        .find(|region| unknown(region) && !region.lacks_identity);
    match silent {
        Some(region) => {
            let message = format!(
                "{key} is in no readable region; try again when region {} answers",
                region.view.name
            );
            RestoreError::failed(Exit::Trouble, message)
        }
        None => {
            let message = format!(
                "{key} is missing in every region, so nothing else there can be interpreted; `highwater-agent run` beside the \
                 same server writes it anew when it starts"
            );
            RestoreError::lacking(Exit::Damage, message)
        }
    }
}

fn differing_histories(layout: &Layout, regions: &[RegionView]) -> Vec<Finding> {
    let mut first: BTreeMap<TimelineId, (&str, &[u8])> = BTreeMap::new();
    let mut findings = Vec::new();
    for region in regions {
        for (timeline, view) in &region.timelines {
            let Some((_, bytes)) = &view.history else { continue };
            let (other, known) = *first.entry(*timeline).or_insert((&region.name, bytes));
            if known != bytes.as_slice() {
                let problem = format!("regions {other} and {} hold different history files", region.name);
                findings.push(everywhere(layout.history(*timeline), problem));
            }
        }
    }
    findings
}

fn differing_backups(layout: &Layout, regions: &[RegionView]) -> Vec<Finding> {
    let mut first = BTreeMap::new();
    let mut findings = Vec::new();
    for region in regions {
        for (id, backup) in &region.backups {
            let (other, known) = *first.entry(id).or_insert((region.name.as_str(), backup));
            if known != backup {
                let problem = format!(
                    "regions {other} and {} describe this backup differently",
                    region.name
                );
                findings.push(everywhere(layout.backup(id), problem));
            }
        }
    }
    findings
}

fn everywhere(key: String, problem: String) -> Finding {
    Finding {
        region: None,
        key,
        problem,
        newer_format: false,
    }
}
