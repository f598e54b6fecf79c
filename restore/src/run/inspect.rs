//! A last look at the chosen backup before anything is touched: its manifest can be read, and its packs are there.

use highwater_config::Exit;
use highwater_format::manifest::Manifest;
use highwater_format::{Backup, Lsn};

use super::job;
use crate::catalog::Catalog;
use crate::error::RestoreError;
use crate::fetch::{self, Sources, packs};
use crate::plan::Plan;
use crate::regions::Region;

/// The manifest of the plan's backup, all of whose packs some region lists.
///
/// # Errors
/// The backup is not whole; the message names an older one from which the target can be reached, if there is one.
pub async fn inspect(catalog: &Catalog, regions: &[Region], plan: &Plan) -> Result<Manifest, RestoreError> {
    let sources = job::sources(plan, regions);
    let (problem, may_pass) = match manifest(&sources, catalog, plan).await {
        Ok(manifest) => return Ok(manifest),
        Err(found) => found,
    };
    let id = &plan.backup.id;
    let silent = catalog.unreadable().next().map(|(region, _)| &region.name);
    let older = match older(catalog, plan) {
        Some(older) => format!("restore from an older backup: --backup {}", older.id),
        None => "there is no older backup with all WAL up to the target".to_owned(),
    };
    let (exit, next) = match silent {
        Some(region) => (
            Exit::Trouble,
            format!("try again when region {region} answers, or {older}"),
        ),
        None if may_pass => (Exit::Trouble, format!("try again when it answers, or {older}")),
        None => (Exit::Damage, older),
    };
    let message = format!("backup {id} cannot be restored: {problem}; nothing was written; {next}");
    Err(RestoreError::lacking(exit, message))
}

/// The manifest, or what is wrong and whether that may pass.
async fn manifest(sources: &Sources, catalog: &Catalog, plan: &Plan) -> Result<Manifest, (String, bool)> {
    let id = &plan.backup.id;
    let manifest = fetch::manifest(sources, &catalog.layout, &plan.backup)
        .await
        .map_err(|nowhere| (nowhere.to_string(), nowhere.may_pass()))?;
    let Some(lacking) = packs::lacking(sources, &catalog.layout, id, &manifest.packs).await else {
        return Ok(manifest);
    };
    let (count, all, first) = (lacking.packs, manifest.packs.len(), lacking.first);
    let problem = format!(
        "{count} of its {all} packs are in no region in the size that they must have, the first {first}"
    );
    Err(match lacking.silent {
        Some(error) => (format!("{problem} ({error})"), true),
        None => (problem, false),
    })
}

/// The newest older backup from which the WAL reaches as far.
fn older<'a>(catalog: &'a Catalog, plan: &Plan) -> Option<&'a Backup> {
    let chain = &plan.chain;
    let reaches = |start: Lsn| chain.contiguous_end(chain.segment_size.segment_start(start)) >= plan.wal.end;
    let older = catalog.backups().into_values().filter(|backup| {
        backup.start_lsn < plan.backup.start_lsn
            && chain.holds(backup.timeline, backup.start_lsn)
            && chain.holds(backup.stop_timeline, backup.stop_lsn)
            && reaches(backup.start_lsn)
    });
    older.max_by_key(|backup| backup.start_lsn)
}
