//! A plan, for people and programs.

use std::fmt;

use highwater_format::{BackupId, Lsn, SystemId, Time, TimelineId};
use serde::Serialize;

use super::bytes;
use crate::{
    catalog::Catalog,
    plan::{Amount, Plan},
};

/// What would be done.
#[derive(Debug, Clone, Serialize)]
pub struct PlanReport {
    /// The lineage.
    pub system_id: SystemId,
    /// Its PostgreSQL major version.
    pub postgres: u32,
    /// What was asked for, in words.
    pub target: String,
    /// The base backup.
    pub backup: BackupId,
    /// When it had finished.
    pub backup_finished_at: Time,
    /// The regions it can be read from, the preferred one first.
    pub backup_regions: Vec<String>,
    /// The timeline that recovery ends on.
    pub timeline: TimelineId,
    /// Its ancestors, the oldest first, with the LSN at which each was left.
    pub ancestors: Vec<Ancestor>,
    /// The first byte of WAL that is needed.
    pub wal_start: Lsn,
    /// Behind the last one.
    pub wal_end: Lsn,
    /// Where replay ends.
    pub stop_lsn: Lsn,
    /// The last transaction end that is replayed, where it was looked up.
    pub stop_time: Option<Time>,
    /// PostgreSQL's settings.
    pub settings: Vec<Setting>,
    /// What will be read.
    #[serde(flatten)]
    pub amount: Amount,
    /// What the operator should know.
    pub notes: Vec<String>,
}

/// An ancestor of a timeline.
#[derive(Debug, Clone, Serialize)]
pub struct Ancestor {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it was left.
    pub switch: Lsn,
}

/// One setting of PostgreSQL.
#[derive(Debug, Clone, Serialize)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: String,
}

/// The report of a plan.
#[must_use]
pub fn plan(catalog: &Catalog, plan: &Plan) -> PlanReport {
    let ancestors = plan.chain.history.entries.iter();
    let settings = plan.target.settings.iter();
    PlanReport {
        system_id: plan.system_id,
        postgres: catalog.identity.major(),
        target: plan.target.to_string(),
        backup: plan.backup.id.clone(),
        backup_finished_at: plan.backup.finished_at,
        backup_regions: plan
            .backup_regions
            .iter()
            .map(|index| catalog.region_name(*index).to_owned())
            .collect(),
        timeline: plan.timeline,
        ancestors: ancestors
            .map(|entry| Ancestor {
                timeline: entry.timeline,
                switch: entry.switch,
            })
            .collect(),
        wal_start: plan.wal.start,
        wal_end: plan.wal.end,
        stop_lsn: plan.target.stop.lsn,
        stop_time: plan.target.stop.last_commit,
        settings: settings
            .map(|(name, value)| Setting {
                name,
                value: value.clone(),
            })
            .collect(),
        amount: plan.amount,
        notes: plan.notes.clone(),
    }
}

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "target   {}", self.target)?;
        let time = self
            .stop_time
            .map(|time| format!(", last transaction {time}"))
            .unwrap_or_default();
        writeln!(
            f,
            "reaches  LSN {} on timeline {}{time}",
            self.stop_lsn, self.timeline
        )?;
        for ancestor in &self.ancestors {
            writeln!(
                f,
                "         timeline {} up to {}",
                ancestor.timeline, ancestor.switch
            )?;
        }
        writeln!(
            f,
            "backup   {}, finished {}, PostgreSQL {}",
            self.backup, self.backup_finished_at, self.postgres
        )?;
        writeln!(
            f,
            "         {} in {} packs from {}; {} on disk",
            bytes(self.amount.backup_bytes),
            self.amount.packs,
            self.backup_regions.join(", then "),
            bytes(self.amount.backup_plain_bytes)
        )?;
        writeln!(
            f,
            "wal      {} to {}: {} segments, {} in {} objects",
            self.wal_start,
            self.wal_end,
            self.amount.wal_segments,
            bytes(self.amount.wal_bytes),
            self.amount.wal_objects
        )?;
        for (index, setting) in self.settings.iter().enumerate() {
            let label = if index == 0 { "settings" } else { "        " };
            writeln!(f, "{label} {} = '{}'", setting.name, setting.value)?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}
