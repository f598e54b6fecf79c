//! `list`: what the archive holds and what can be restored from it.

use std::fmt;

use highwater_format::{BackupId, Branch, Gap, Lsn, LsnRange, SystemId, Time, TimelineId};
use serde::Serialize;

use crate::{
    catalog::{Catalog, Reading},
    error::RestoreError,
    locate::{Locator, Unanswered, learn},
    plan::{Answer, End, Question, Window, windows},
    regions::Region,
    report::bytes,
};

/// The answer of `list`.
#[derive(Debug, Clone, Serialize)]
pub struct Listing {
    /// The cluster.
    pub cluster: String,
    /// The lineage shown.
    pub system_id: SystemId,
    /// Others under the same name.
    pub other_lineages: Vec<SystemId>,
    /// Major version.
    pub postgres: u32,
    /// Bytes in a WAL segment.
    pub segment_size: u64,
    /// The regions.
    pub regions: Vec<RegionLine>,
    /// The backups.
    pub backups: Vec<BackupLine>,
    /// Backups without a commit mark: in progress, or abandoned.
    pub unfinished: Vec<BackupId>,
    /// WAL that is on record as lost.
    pub gaps: Vec<GapLine>,
    /// What can be restored from all regions together.
    pub windows: Vec<WindowLine>,
    /// What each region alone could restore.
    pub windows_by_region: Vec<WindowLine>,
    /// WAL that the newest timeline never had.
    pub branches: Vec<Branch>,
    /// Timelines of which the descent is not known, and other things that are wrong.
    pub problems: Vec<String>,
}

/// One region.
#[derive(Debug, Clone, Serialize)]
pub struct RegionLine {
    /// Its name.
    pub name: String,
    /// Its URL.
    pub place: String,
    /// `readable`, `unreadable` or `left_out`.
    pub state: &'static str,
    /// Why it is unreadable.
    pub error: Option<String>,
    /// The server time of its last sign of life.
    pub pulse: Option<Time>,
    /// What it held then.
    pub stored_lsn: Option<Lsn>,
}

/// One backup.
#[derive(Debug, Clone, Serialize)]
pub struct BackupLine {
    /// Its id.
    pub id: BackupId,
    /// Its timeline.
    pub timeline: TimelineId,
    /// Where it begins.
    pub start_lsn: Lsn,
    /// Where it becomes consistent.
    pub stop_lsn: Lsn,
    /// When it had finished.
    pub finished_at: Time,
    /// Size on disk.
    pub plain_bytes: u64,
    /// Size in the archive.
    pub stored_bytes: u64,
    /// Where it is.
    pub regions: Vec<String>,
}

/// One gap in the WAL.
#[derive(Debug, Clone, Serialize)]
pub struct GapLine {
    /// Its timeline.
    pub timeline: TimelineId,
    /// The first missing byte.
    pub start: Lsn,
    /// Behind the last missing byte.
    pub end: Lsn,
    /// Why, as it was recorded.
    pub reason: String,
    /// When it was recorded.
    pub recorded_at: Time,
    /// The first backup behind it: what follows can be restored from there on.
    pub ended_by: Option<BackupId>,
}

/// One window.
#[derive(Debug, Clone, Serialize)]
pub struct WindowLine {
    /// The only region; all together when absent.
    pub region: Option<String>,
    /// The timeline to give with `--timeline`.
    pub timeline: TimelineId,
    /// The earliest LSN.
    pub from: Lsn,
    /// When that was.
    pub from_time: Time,
    /// The end.
    pub to: Lsn,
    /// The latest time that can be restored.
    pub to_time: Option<Time>,
    /// Why it ends, in words.
    pub end: String,
    /// Its backups.
    pub backups: Vec<BackupId>,
}

/// Builds the listing, reading the headers at the end of each window for its time. What is found to be damaged is noted
/// in the catalog, and the windows are those of what is left.
///
/// # Errors
///
/// None at present: what cannot be read is part of the answer.
pub async fn list(catalog: &mut Catalog, regions: &[Region]) -> Result<Listing, RestoreError> {
    let (lines, mut problems) = loop {
        match all_windows(catalog, regions).await {
            Ok(found) => break found,
            Err(unanswered) => {
                if let Err(error) = learn(catalog, regions, unanswered).await {
                    break (without_times(catalog), vec![error.to_string()]);
                }
            }
        }
    };
    for (timeline, windows) in windows(catalog, &catalog.readable()) {
        if let Err(broken) = windows {
            problems.push(format!("timeline {timeline} cannot be restored: {broken}"));
        }
    }
    problems.extend(catalog.damaged.iter().map(ToString::to_string));
    problems.extend(catalog.findings.iter().map(ToString::to_string));
    Ok(Listing {
        cluster: catalog.layout.cluster().to_string(),
        system_id: catalog.identity.system_id,
        other_lineages: catalog.other_lineages.clone(),
        postgres: catalog.identity.major(),
        segment_size: catalog.identity.segment_size.bytes(),
        regions: region_lines(catalog),
        backups: backup_lines(catalog),
        unfinished: unfinished(catalog),
        gaps: gap_lines(catalog),
        windows: lines,
        windows_by_region: region_windows(catalog),
        branches: catalog.branches(&catalog.readable()),
        problems,
    })
}

/// The windows of all regions together, each with the latest time that its last objects prove.
async fn all_windows(
    catalog: &Catalog,
    regions: &[Region],
) -> Result<(Vec<WindowLine>, Vec<String>), Unanswered> {
    let locator = Locator::new(catalog, regions);
    let (mut lines, mut problems) = (Vec::new(), Vec::new());
    for window in open_windows(catalog) {
        let time = match locator.answer(&Question::Proven { span: window.span }).await {
            Ok(Answer::Time(time)) => time,
            Ok(_) => None,
            Err(Unanswered::Failed(error)) => {
                problems.push(error.to_string());
                None
            }
            Err(spoilt @ Unanswered::Spoilt(_)) => return Err(spoilt),
        };
        lines.push(WindowLine::of(None, &window, time));
    }
    Ok((lines, problems))
}

fn without_times(catalog: &Catalog) -> Vec<WindowLine> {
    let all = open_windows(catalog).into_iter();
    all.map(|window| WindowLine::of(None, &window, None)).collect()
}

fn open_windows(catalog: &Catalog) -> Vec<Window> {
    let of_all = windows(catalog, &catalog.readable()).into_iter();
    of_all.filter_map(|(_, windows)| windows.ok()).flatten().collect()
}

impl WindowLine {
    fn of(region: Option<&str>, window: &Window, proven: Option<Time>) -> Self {
        Self {
            region: region.map(str::to_owned),
            timeline: window.timeline,
            from: window.from,
            from_time: window.from_time,
            to: window.to,
            to_time: proven.max(window.pulse_time),
            end: end_in_words(&window.end),
            backups: window.backups.clone(),
        }
    }
}

fn end_in_words(end: &End) -> String {
    match end {
        End::Archive => "the archive ends".to_owned(),
        End::Hole {
            range,
            damaged: Some(why),
            ..
        } => format!("WAL {range} is damaged: {why}"),
        End::Hole {
            range,
            recorded: None,
            ..
        } => format!("WAL {range} is missing"),
        End::Hole {
            range,
            recorded: Some(why),
            ..
        } => format!("WAL {range} is missing, recorded: {why}"),
        End::Ragged => "the archive ends; no pulse tells that what lies behind was acknowledged".to_owned(),
        End::Switch { child, at } => format!("timeline {child} branched off at {at}"),
    }
}

fn region_lines(catalog: &Catalog) -> Vec<RegionLine> {
    let line = |region: &crate::catalog::RegionView| {
        let (state, error) = match &region.reading {
            Reading::Readable => ("readable", None),
            Reading::Unreadable { error } => ("unreadable", Some(error.clone())),
            Reading::LeftOut => ("left_out", None),
        };
        RegionLine {
            name: region.name.clone(),
            place: region.place.clone(),
            state,
            error,
            pulse: region.pulse.as_ref().map(|pulse| pulse.server_time),
            stored_lsn: region.pulse.as_ref().map(|pulse| pulse.stored_lsn),
        }
    };
    catalog.regions.iter().map(line).collect()
}

fn backup_lines(catalog: &Catalog) -> Vec<BackupLine> {
    let line = |backup: &highwater_format::Backup| BackupLine {
        id: backup.id.clone(),
        timeline: backup.timeline,
        start_lsn: backup.start_lsn,
        stop_lsn: backup.stop_lsn,
        finished_at: backup.finished_at,
        plain_bytes: backup.plain_bytes,
        stored_bytes: backup.stored_bytes,
        regions: catalog
            .backup_regions(&backup.id)
            .into_iter()
            .map(|index| catalog.region_name(index).to_owned())
            .collect(),
    };
    catalog.backups().into_values().map(line).collect()
}

/// The gaps that are on record. WAL that some region holds all the same is not missing.
fn gap_lines(catalog: &Catalog) -> Vec<GapLine> {
    let regions = catalog.readable();
    let ended_by = |gap: &Gap| {
        let behind = |id: &&&BackupId| {
            id.timeline() > gap.timeline || (id.timeline() == gap.timeline && id.start_lsn() >= gap.end)
        };
        let backups = catalog.backups();
        let first = backups
            .keys()
            .filter(behind)
            .min_by_key(|id| (id.timeline(), id.start_lsn()));
        first.map(|id| (*id).clone())
    };
    let of = |timeline| {
        let held = catalog.coverage(timeline, &regions);
        let gaps = catalog.gaps(timeline, &regions).into_iter();
        gaps.filter(move |gap| !held.holes(gap.range()).is_empty())
    };
    let line = |gap: Gap| GapLine {
        timeline: gap.timeline,
        start: gap.start,
        end: gap.end,
        recorded_at: gap.recorded_at,
        ended_by: ended_by(&gap),
        reason: gap.reason,
    };
    catalog.timelines().into_iter().flat_map(of).map(line).collect()
}

fn unfinished(catalog: &Catalog) -> Vec<BackupId> {
    let finished = catalog.backups();
    let all = catalog.regions.iter().flat_map(|region| region.unfinished.iter());
    let open: std::collections::BTreeSet<&BackupId> = all.filter(|id| !finished.contains_key(id)).collect();
    open.into_iter().cloned().collect()
}

fn region_windows(catalog: &Catalog) -> Vec<WindowLine> {
    let mut lines = Vec::new();
    for index in catalog.readable() {
        let name = catalog.region_name(index);
        for windows in windows(catalog, &[index])
            .into_iter()
            .filter_map(|(_, windows)| windows.ok())
        {
            lines.extend(
                windows
                    .iter()
                    .map(|window| WindowLine::of(Some(name), window, None)),
            );
        }
    }
    lines
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "cluster {}, system {}, PostgreSQL {}, {} segments",
            self.cluster,
            self.system_id,
            self.postgres,
            bytes(self.segment_size)
        )?;
        for other in &self.other_lineages {
            writeln!(f, "  also here: system {other} (choose it with --system-id)")?;
        }
        writeln!(f, "\nregions")?;
        for region in &self.regions {
            write!(f, "  {}  {}  {}", region.name, region.place, region.state)?;
            if let (Some(time), Some(lsn)) = (region.pulse, region.stored_lsn) {
                write!(f, ", last sign of life {time} at {lsn}")?;
            }
            writeln!(f)?;
            region
                .error
                .iter()
                .try_for_each(|error| writeln!(f, "    {error}"))?;
        }
        writeln!(f, "\nbackups")?;
        for backup in &self.backups {
            writeln!(
                f,
                "  {}  finished {}  {} ({} stored)  in {}",
                backup.id,
                backup.finished_at,
                bytes(backup.plain_bytes),
                bytes(backup.stored_bytes),
                backup.regions.join(", ")
            )?;
        }
        if self.backups.is_empty() {
            writeln!(f, "  none; take one with `highwater-agent backup`")?;
        }
        for id in &self.unfinished {
            writeln!(f, "  {id}  unfinished: in progress or abandoned")?;
        }
        write_gaps(f, &self.gaps)?;
        writeln!(f, "\nwhat can be restored")?;
        write_windows(f, &self.windows)?;
        writeln!(f, "\nfrom one region alone")?;
        write_windows(f, &self.windows_by_region)?;
        if !self.branches.is_empty() {
            writeln!(f, "\ndivergent branches")?;
        }
        for branch in &self.branches {
            writeln!(f, "  {branch}")?;
        }
        self.problems
            .iter()
            .try_for_each(|problem| writeln!(f, "problem: {problem}"))
    }
}

fn write_gaps(f: &mut fmt::Formatter<'_>, gaps: &[GapLine]) -> fmt::Result {
    if gaps.is_empty() {
        return Ok(());
    }
    writeln!(f, "\ngaps in the WAL")?;
    for gap in gaps {
        let range = LsnRange::new(gap.start, gap.end);
        write!(
            f,
            "  timeline {}: {range} ({}), recorded {}: {}; ",
            gap.timeline,
            bytes(range.len()),
            gap.recorded_at,
            gap.reason
        )?;
        match &gap.ended_by {
            Some(id) => writeln!(f, "ended by backup {id}")?,
            None => writeln!(f, "no backup has ended it yet")?,
        }
    }
    Ok(())
}

fn write_windows(f: &mut fmt::Formatter<'_>, windows: &[WindowLine]) -> fmt::Result {
    for window in windows {
        let region = window
            .region
            .as_ref()
            .map(|name| format!("{name}: "))
            .unwrap_or_default();
        let until = window
            .to_time
            .map(|time| format!(" ({time})"))
            .unwrap_or_default();
        writeln!(
            f,
            "  {region}timeline {}: {} ({}) to {}{until}; {}",
            window.timeline, window.from, window.from_time, window.to, window.end
        )?;
    }
    if windows.is_empty() {
        writeln!(f, "  nothing")?;
    }
    Ok(())
}
