//! The stretches of time and WAL that can be restored, and why each one ends.

use highwater_format::{BackupId, Lsn, LsnRange, Time, TimelineId};

use crate::catalog::{BrokenChain, Catalog};

use super::{
    Missing, Span,
    base::{Base, Line},
};

/// Every LSN from `from` to `to` along one timeline's chain can be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// The timeline that the chain leads to.
    pub timeline: TimelineId,
    /// The earliest consistent LSN.
    pub from: Lsn,
    /// When the backup that begins it had finished.
    pub from_time: Time,
    /// The end of unbroken WAL.
    pub to: Lsn,
    /// The latest time proven by a pulse; reading the headers of the last objects may prove more.
    pub pulse_time: Option<Time>,
    /// Why it ends there.
    pub end: End,
    /// The backups it can be restored from, the oldest first.
    pub backups: Vec<BackupId>,
    /// The WAL of the newest backup, for questions about its end.
    pub span: Span,
}

/// Why a window ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The archive ends.
    Archive,
    /// WAL is missing.
    Hole {
        /// What is missing.
        range: LsnRange,
        /// The recorded reason.
        recorded: Option<String>,
        /// The objects that should hold it and that no region has a good copy of.
        damaged: Option<Box<str>>,
    },
    /// Objects behind a break that was never acknowledged: the archive ends here.
    Ragged,
    /// The cluster went on with another timeline.
    Switch {
        /// The timeline that began here.
        child: TimelineId,
        /// Where.
        at: Lsn,
    },
}

/// The windows of one timeline, or why they cannot be told.
pub type Windows = Result<Vec<Window>, BrokenChain>;

/// The windows of every timeline as the given regions together show them, the oldest first.
#[must_use]
pub fn windows(catalog: &Catalog, regions: &[usize]) -> Vec<(TimelineId, Windows)> {
    let of = |timeline| {
        Ok(of_line(
            catalog,
            regions,
            &Line::build(catalog, timeline, regions)?,
        ))
    };
    catalog
        .timelines()
        .into_iter()
        .map(|timeline| (timeline, of(timeline)))
        .collect()
}

fn of_line(catalog: &Catalog, regions: &[usize], line: &Line) -> Vec<Window> {
    let begin = line.chain.history.begin_of(line.timeline()).unwrap_or(Lsn::ZERO);
    let mut windows: Vec<Window> = Vec::new();
    for base in line.bases.iter().rev() {
        if base.wal.end < begin {
            // It ends on an ancestor, under whose number it is shown.
            continue;
        }
        match windows.last_mut() {
            Some(window) if window.to == base.wal.end => extend(window, base),
            _ => windows.push(open(catalog, regions, line, base)),
        }
    }
    windows
}

fn extend(window: &mut Window, base: &Base) {
    window.backups.push(base.backup.id.clone());
    window.span.start = base.backup.start_lsn;
    if base.consistent() < window.from {
        window.from = base.consistent();
        window.from_time = base.backup.finished_at;
    }
}

fn open(catalog: &Catalog, regions: &[usize], line: &Line, base: &Base) -> Window {
    let span = base.span(line.timeline());
    Window {
        timeline: line.timeline(),
        from: base.consistent(),
        from_time: base.backup.finished_at,
        to: base.wal.end,
        pulse_time: line.pulse_time(catalog, regions, &span),
        end: end(catalog, regions, line, base.wal.end),
        backups: vec![base.backup.id.clone()],
        span,
    }
}

fn end(catalog: &Catalog, regions: &[usize], line: &Line, at: Lsn) -> End {
    match line.break_at(catalog, regions, at) {
        Some(_) if line.is_ragged_end(catalog, regions, at) => End::Ragged,
        Some(Missing {
            range,
            recorded,
            damaged,
            ..
        }) => End::Hole {
            range,
            recorded,
            damaged,
        },
        _ => child(catalog, line.timeline(), at).unwrap_or(End::Archive),
    }
}

/// The timeline that branched off from `parent` at or before `at`, the latest branch first.
fn child(catalog: &Catalog, parent: TimelineId, at: Lsn) -> Option<End> {
    let children = catalog.timelines().into_iter().filter_map(|child| {
        let history = catalog.history(child)?;
        let entry = history
            .parent()
            .filter(|entry| entry.timeline == parent && entry.switch <= at)?;
        Some((entry.switch, child))
    });
    children.max().map(|(at, child)| End::Switch { child, at })
}
