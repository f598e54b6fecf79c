//! `run`: carries a plan out. Refuse, or fetch, set up recovery, and with `--start` replay, wait and report.
//!
//! Owns: the order of the steps and their report. Does not own: choosing (the plan is a value that was shown before) and
//! any of the steps. Everything that can be refused is refused before the first byte is written: the server program,
//! what its account may read, the directories, the room, and a backup that has lost packs.

pub mod account;
pub mod control;
pub mod inspect;
pub mod job;
mod notes;
pub mod permissions;
pub mod pins;
pub mod progress;
pub mod reached;
pub mod report;
pub mod server;
pub mod serverlog;
pub mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use highwater_config::{Config, Exit};
use highwater_format::Identity;

use crate::catalog::Catalog;
use crate::clock::Clock;
use crate::datadir::{DataDir, DataDirError, Remap, Request};
use crate::error::RestoreError;
use crate::fetch::{self, FetchError, Fetched, Job, Limits, Nowhere, Progress, Sources};
use crate::plan::Plan;
use crate::recovery::{self, Setup};
use crate::regions::Region;
use crate::target::Action;
use report::{End, Phases, Report};
use server::{Postgres, StartOptions};
use watch::Wanted;

/// What the plan was made from.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// Its file, where there is one.
    pub config_file: Option<&'a Path>,
    /// The regions, with the catalog's indices.
    pub regions: &'a [Region],
    /// What they hold.
    pub catalog: &'a Catalog,
    /// What is to be done.
    pub plan: &'a Plan,
}

/// What the operator asked for besides the target.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--into`.
    pub into: PathBuf,
    /// `--tablespace`.
    pub tablespaces: Vec<Remap>,
    /// `--owner`.
    pub owner: Option<String>,
    /// `--start`, with how.
    pub start: Option<StartOptions>,
    /// Where elapsed time comes from.
    pub clock: Clock,
}

/// Restores.
///
/// # Errors
/// A refusal (nothing was written), or a step that failed: the directory is then marked as unfinished and the same
/// command starts over.
pub async fn run(input: Input<'_>, options: &Options) -> Result<Report, RestoreError> {
    let identity = &input.catalog.identity;
    let postgres = match &options.start {
        Some(start) => Some(find_postgres(identity, start)?),
        None => None,
    };
    let program = std::env::current_exe().map_err(|source| RestoreError::Local {
        action: "find",
        path: PathBuf::from("this program"),
        source,
    })?;
    let backup = &input.plan.backup;
    let sources = job::sources(input.plan, input.regions);
    let mut manifest = inspect::inspect(input.catalog, input.regions, input.plan).await?;
    let packs = std::mem::take(&mut manifest.packs);
    let into = DataDir::prepare(
        &Request {
            into: &options.into,
            backup,
            tablespaces: &options.tablespaces,
            owner: options.owner.as_deref(),
            wal_bytes: job::wal_room(input.plan, input.config),
        },
        manifest,
    )?;
    let facts = job::facts(&input);
    permissions::check_way(into.access().owner(), into.directories())?;
    permissions::check(into.access().owner(), &program, &facts, input.config)?;

    let mut phases = Phases::default();
    let watch = options.clock.start();
    let unfinished = into.begin()?;
    let fetched = fetch_all(&input, &sources, &into, packs).await?;
    phases.fetch = watch.elapsed();

    let watch = options.clock.start();
    let target = &input.plan.target;
    let setup = Setup {
        program: &program,
        facts: &facts,
        target: &target.settings,
        action: target.action,
        limits: &limits(&into, target.action)?,
        generate_configuration: options.start.is_some(),
    };
    recovery::write(&into, &setup)?;
    into.finish()?;
    drop(unfinished);
    phases.finish = watch.elapsed();

    let mut report = report::of(&input, &into, &fetched, options);
    let pins = pins::of(into.root())?;
    report.notes.extend(pins.notes);
    if let (Some(postgres), Some(start)) = (&postgres, &options.start) {
        let watch = options.clock.start();
        report.end = replay(&input, &into, &program, postgres, start, &pins.settings).await?;
        phases.replay = Some(watch.elapsed());
    }
    report.set_phases(phases);
    Ok(report)
}

/// Only a server that is to be read while it recovers needs all of the original's limits; to any other a control file of
/// unknown form is no hindrance.
fn limits(into: &DataDir, action: Action) -> Result<Vec<(&'static str, u32)>, RestoreError> {
    let path = into.pending_control();
    let control = match control::Control::read_file(&path) {
        Ok(control) => control,
        Err(_) if action != Action::Pause => return Ok(Vec::new()),
        Err(source) => {
            return Err(RestoreError::Local {
                action: "read",
                path,
                source,
            });
        }
    };
    let mut limits = recovery::limits::at_least(into.root(), control.limits)?;
    limits.retain(|(name, _)| action == Action::Pause || *name == recovery::limits::PREPARED);
    Ok(limits)
}

fn find_postgres(identity: &Identity, start: &StartOptions) -> Result<Postgres, RestoreError> {
    Postgres::find(identity.major(), start.bin.as_deref())
        .map_err(|error| RestoreError::failed(Exit::Usage, error.to_string()))
}

async fn fetch_all(
    input: &Input<'_>,
    sources: &Sources,
    into: &DataDir,
    packs: Vec<highwater_format::manifest::PackInfo>,
) -> Result<Fetched, RestoreError> {
    let progress = Arc::new(Progress::default());
    let job = Job {
        sources,
        layout: &input.catalog.layout,
        backup: &input.plan.backup,
        packs,
        into,
        limits: Limits {
            packs: input.config.restore.parallel,
            ..Limits::default()
        },
        progress: progress.clone(),
    };
    let fetching = fetch::fetch(job);
    Ok(progress::shown(fetching, &progress, into.bytes()).await?)
}

/// Starts the server and waits for its verdict.
async fn replay(
    input: &Input<'_>,
    into: &DataDir,
    program: &Path,
    postgres: &Postgres,
    start: &StartOptions,
    pins: &[(String, String)],
) -> Result<End, RestoreError> {
    let (root, access) = (into.root(), into.access());
    let started = server::start(program, postgres, root, access, start, pins);
    let mut child = started.map_err(|source| RestoreError::Local {
        action: "start",
        path: postgres.program.clone(),
        source,
    })?;
    let target = &input.plan.target;
    let wanted = Wanted {
        target: &target.asked,
        action: target.action,
        end: target.stop.lsn,
        last_commit: target.stop.last_commit,
        timeline: input.plan.timeline,
        segment_size: input.catalog.identity.segment_size,
        by_hand: &server::by_hand(postgres, root, pins),
    };
    let mut shown = progress::Replay::new(root);
    let log = root.join(server::LOG);
    let waited = watch::wait(&mut child, root, &log, 0, &wanted, |_| shown.show()).await;
    let reached = waited.map_err(|error| RestoreError::failed(error.exit, error.to_string()))?;
    if target.action == Action::Promote {
        recovery::clear(root, access)?;
    }
    Ok(End::of(&reached, postgres))
}

impl From<DataDirError> for RestoreError {
    fn from(error: DataDirError) -> Self {
        Self::failed(error.exit(), error.to_string())
    }
}

impl From<Nowhere> for RestoreError {
    fn from(error: Nowhere) -> Self {
        Self::lacking(error.exit(), error.to_string())
    }
}

impl From<FetchError> for RestoreError {
    fn from(error: FetchError) -> Self {
        let exit = error.exit();
        let message = format!("{error}; the directory cannot be started, and the same command starts over");
        match error {
            FetchError::Nowhere(_)
            | FetchError::BadSpread(_)
            | FetchError::Incomplete { .. }
            | FetchError::NotAsSent { .. } => Self::lacking(exit, message),
            FetchError::Write { .. } | FetchError::CutOff(_) => Self::failed(exit, message),
        }
    }
}
