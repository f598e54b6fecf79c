//! What `run` says when it is done. The JSON form is stable; its version is `format`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use highwater_format::{BackupId, Lsn, Time, TimelineId};
use serde::Serialize;

use super::server::Postgres;
use super::watch::Reached;
use super::{Input, Options, notes};
use crate::datadir::DataDir;
use crate::fetch::Fetched;

/// How long each phase took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Phases {
    pub(crate) fetch: Duration,
    pub(crate) finish: Duration,
    pub(crate) replay: Option<Duration>,
}

/// The report.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of this form.
    pub format: u32,
    /// The data directory.
    pub data_directory: PathBuf,
    /// Who owns it.
    pub owner: String,
    /// What it was built from.
    pub backup: BackupId,
    /// What was asked for, in words.
    pub target: String,
    /// Where replay ends, or ended.
    pub planned_end: Lsn,
    /// What was fetched.
    pub fetched: Fetched,
    /// How recovery ended.
    pub end: End,
    /// Milliseconds for files, for making them durable, and for replay.
    pub fetch_ms: u64,
    /// See `fetch_ms`.
    pub finish_ms: u64,
    /// See `fetch_ms`; absent without `--start`.
    pub replay_ms: Option<u64>,
    /// What the operator should know.
    pub notes: Vec<String>,
}

/// How recovery ended.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum End {
    /// Nothing was started: recovery is set up and replay has not begun.
    NotStarted,
    /// The target was reached.
    Reached {
        /// Replay ended here.
        lsn: Lsn,
        /// On this timeline.
        replayed_timeline: TimelineId,
        /// The timeline the server is on now.
        timeline: TimelineId,
        /// When the last replayed transaction ended.
        last_transaction: Option<Time>,
        /// Whether the server runs.
        running: bool,
        /// Which server.
        postgres: PathBuf,
        /// Its version.
        version: String,
    },
}

impl End {
    pub(crate) fn of(reached: &Reached, postgres: &Postgres) -> Self {
        Self::Reached {
            lsn: reached.lsn,
            replayed_timeline: reached.replayed_timeline,
            timeline: reached.timeline,
            last_transaction: reached.last_transaction,
            running: reached.running,
            postgres: postgres.program.clone(),
            version: postgres.version.clone(),
        }
    }
}

pub(crate) fn of(input: &Input<'_>, into: &DataDir, fetched: &Fetched, options: &Options) -> Report {
    Report {
        format: 1,
        data_directory: into.root().to_owned(),
        owner: into.access().owner().name.clone(),
        backup: input.plan.backup.id.clone(),
        target: input.plan.target.to_string(),
        planned_end: input.plan.target.stop.lsn,
        fetched: *fetched,
        end: End::NotStarted,
        fetch_ms: 0,
        finish_ms: 0,
        replay_ms: None,
        notes: notes::of(input, into, fetched, options),
    }
}

impl Report {
    pub(crate) fn set_phases(&mut self, phases: Phases) {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self.fetch_ms = millis(phases.fetch);
        self.finish_ms = millis(phases.finish);
        self.replay_ms = phases.replay.map(millis);
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fetched = &self.fetched;
        writeln!(
            f,
            "restored backup {} into {} (owner {})",
            self.backup,
            self.data_directory.display(),
            self.owner
        )?;
        writeln!(
            f,
            "  files   {} ({} bytes, {} read) in {}; {} confirmed by PostgreSQL's manifest",
            fetched.files,
            fetched.plain_bytes,
            fetched.stored_bytes,
            seconds(self.fetch_ms),
            fetched.vouched
        )?;
        writeln!(f, "  durable in {}", seconds(self.finish_ms))?;
        match &self.end {
            End::NotStarted => {
                let end = self.planned_end;
                writeln!(
                    f,
                    "  recovery is set up and NOT yet replayed: start the server; it ends at {end} ({})",
                    self.target
                )?;
            }
            End::Reached {
                lsn,
                replayed_timeline,
                timeline,
                last_transaction,
                running,
                version,
                ..
            } => {
                let replay = seconds(self.replay_ms.unwrap_or_default());
                writeln!(f, "  replayed in {replay} with PostgreSQL {version}")?;
                writeln!(
                    f,
                    "reached {}: LSN {lsn} of timeline {replayed_timeline}",
                    self.target
                )?;
                if let Some(time) = last_transaction {
                    writeln!(f, "  last transaction replayed: {time}")?;
                }
                let state = if *running { "running" } else { "stopped" };
                writeln!(f, "  the server is {state}, on timeline {timeline}")?;
            }
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}
