//! The planner's words: what is missing, in which range, and what to do about it.

use std::collections::BTreeSet;

use highwater_config::Exit;
use highwater_format::{Backup, BackupId, History, Lsn, LsnRange, SystemId, Time, TimelineId};

use crate::{
    catalog::{Catalog, Damaged, Reading, RegionView, descent},
    target::{Request, Target},
};

use super::{
    Mark, Missing, Reason, Refusal,
    base::{Base, Line},
    timeline::PassedOver,
};

pub(super) fn nothing_archived(catalog: &Catalog) -> Refusal {
    Refusal::no(
        Reason::NoBackup,
        format!(
            "there is neither WAL nor a backup under {}",
            catalog.layout.root()
        ),
        "check --cluster and the regions' urls with `highwater-restore list`",
    )
}

pub(super) fn unknown_timeline(timeline: TimelineId, known: &BTreeSet<TimelineId>) -> Refusal {
    let known: Vec<String> = known.iter().map(ToString::to_string).collect();
    Refusal::no(
        Reason::UnknownTimeline { timeline },
        format!(
            "there is no timeline {timeline} in the archive; it holds {}",
            known.join(", ")
        ),
        "give one of those with --timeline, or leave it out for the latest",
    )
}

/// A timeline behind the one asked for has no history.
pub(super) fn unnamed_successor(catalog: &Catalog, timeline: TimelineId, successor: TimelineId) -> Refusal {
    let mut refusal = Refusal::no(
        Reason::BrokenHistory { timeline: successor },
        format!(
            "the history file of timeline {successor} is in no region: a server that is promoted from timeline {timeline} asks for it \
             to find a free number, and would end after all is replayed"
        ),
        format!(
            "put {} back (every server that has been on that timeline has it in pg_wal); or look at the data with a target and \
             --action pause",
            catalog.layout.history(successor)
        ),
    );
    refusal.exit = Exit::Damage;
    refusal
}

/// The target lies on an ancestor that has no history of its own.
pub(super) fn unnamed_ancestor(catalog: &Catalog, line: &Line, ancestor: TimelineId) -> Refusal {
    let (timeline, layout) = (line.timeline(), &catalog.layout);
    let mut refusal = Refusal::no(
        Reason::BrokenHistory { timeline: ancestor },
        format!(
            "the target lies on timeline {ancestor}, whose history file is in no region: a server that is promoted there would \
             note its new timeline as a child of timeline {timeline}, which begins only later"
        ),
        format!(
            "put {} back (every server that has been on that timeline has it in pg_wal; it is what stands in {} before the line of \
             timeline {ancestor}); or look at the data with --action pause",
            layout.history(ancestor),
            layout.history(timeline)
        ),
    );
    refusal.exit = Exit::Damage;
    refusal
}

/// Regions tell different descents of a timeline: one of them would replay WAL that is not part of it.
pub(super) fn differing_histories(
    catalog: &Catalog,
    timeline: TimelineId,
    copies: &[(&str, &History)],
) -> Refusal {
    let told = copies.iter().map(|(region, history)| {
        let ancestors: Vec<String> = descent(history)
            .map(|(ancestor, switch)| format!("timeline {ancestor} up to {switch}"))
            .collect();
        format!("region {region}: {}", ancestors.join(", "))
    });
    let told: Vec<String> = told.collect();
    let key = catalog.layout.history(timeline);
    let message = format!(
        "the regions hold different histories of timeline {timeline} ({key}): {}",
        told.join("; ")
    );
    let mut refusal = Refusal::no(
        Reason::DifferingHistories { timeline },
        message,
        format!(
            "put the right copy in the place of the wrong one (a server of that timeline has it as pg_wal/{}.history), or \
             leave the region that is wrong out with --without-region",
            timeline.hex8()
        ),
    );
    refusal.exit = Exit::Damage;
    refusal
}

pub(super) fn no_backup(catalog: &Catalog, line: &Line) -> Refusal {
    let timeline = line.timeline();
    if let Some((id, hole)) = line.broken.last() {
        let range = *hole;
        let message = format!(
            "no backup on timeline {timeline} can be restored: the newest, {id}, lacks the WAL {range} that it needs to \
             become consistent{}",
            because(catalog, range)
        );
        let reason = Reason::Hole {
            timeline,
            range,
            recorded: None,
            damaged: catalog.damage_within(range),
        };
        return Refusal::no(
            reason,
            message,
            "run `highwater-restore verify` to see what else is missing",
        )
        .because_of_damage(catalog.damage_within(range).is_some());
    }
    let elsewhere: BTreeSet<TimelineId> = catalog.backups().values().map(|backup| backup.timeline).collect();
    let message = format!("no finished base backup lies on timeline {timeline} or its ancestors");
    if elsewhere.is_empty() {
        return Refusal::no(
            Reason::NoBackup,
            message,
            "take one with `highwater-agent backup`; WAL alone restores nothing",
        );
    }
    let elsewhere: Vec<String> = elsewhere.iter().map(ToString::to_string).collect();
    let next = format!(
        "there are backups on timeline {}; choose one with --timeline",
        elsewhere.join(", ")
    );
    Refusal::no(Reason::NoBackup, message, next)
}

pub(super) fn unknown_backup(catalog: &Catalog, line: &Line, wanted: &BackupId) -> Refusal {
    let broken = line.broken.iter().find(|(id, _)| id == wanted);
    let message = match broken {
        Some((_, hole)) => format!(
            "backup {wanted} lacks the WAL {hole} that it needs to become consistent{}",
            because(catalog, *hole)
        ),
        None if catalog.backups().contains_key(wanted) => {
            format!(
                "backup {wanted} does not lie on timeline {} or its ancestors",
                line.timeline()
            )
        }
        None if catalog
            .regions
            .iter()
            .any(|region| region.unfinished.contains(wanted)) =>
        {
            format!("backup {wanted} was never finished")
        }
        None => format!("there is no backup {wanted} in the archive"),
    };
    Refusal::no(
        Reason::UnknownBackup,
        message,
        "`highwater-restore list` shows the backups; leave out --backup for the best one",
    )
    .because_of_damage(broken.is_some_and(|(_, hole)| catalog.damage_within(*hole).is_some()))
}

/// The archive's end is not known, because a region does not answer.
pub(super) fn open_end(region: &RegionView, error: &str) -> Refusal {
    Refusal {
        reason: Reason::RegionUnreadable,
        message: format!(
            "region {} cannot be read, so the end of the archive is not known: it may hold WAL that the others lack: {error}",
            region.name
        ),
        next: format!(
            "try again when it answers, or add --without-region {} to accept what the other regions hold",
            region.name
        ),
        exit: Exit::Trouble,
    }
}

pub(super) fn hole(line: &Line, missing: Missing, end: Lsn, target: &Target) -> Refusal {
    let is_damage = missing.damaged.is_some();
    let message =
        format!("{target} cannot be reached: {missing}; what is before it can be restored up to {end}");
    let first = try_again(is_known_of_by_a_pulse_alone(line, &missing));
    // Beside the target that was asked for a second one would be refused.
    let next = format!(
        "{first}to accept that, ask for --to-lsn {end} instead; `highwater-restore list` shows all windows"
    );
    Refusal::no(missing.into(), message, next).because_of_damage(is_damage)
}

/// What comes first where waiting may help.
fn try_again(may_pass: bool) -> &'static str {
    if may_pass {
        "a pulse says that it was stored, and a store whose listings lag shows it later: try again; "
    } else {
        ""
    }
}

/// The break reaches to the end of all that is known, and no object or record of it is listed.
fn is_known_of_by_a_pulse_alone(line: &Line, missing: &Missing) -> bool {
    let range = missing.range;
    missing.recorded.is_none()
        && missing.damaged.is_none()
        && line.claimed == Some(range.end)
        && line.chain.end().is_none_or(|stored| stored <= range.start)
}

/// Why a hole is one, where objects that should fill it were found to be damaged.
fn because(catalog: &Catalog, hole: LsnRange) -> String {
    catalog
        .damage_within(hole)
        .map(|why| format!(": {why}"))
        .unwrap_or_default()
}

pub(super) fn too_late(line: &Line, end: Lsn, proven: Option<Time>, target: &Target) -> Refusal {
    let time = proven
        .map(|time| format!(", and nothing is proven after {time}"))
        .unwrap_or_default();
    Refusal::no(
        Reason::TooLate { end, time: proven },
        format!(
            "{target} lies past the archive: timeline {} ends at {end}{time}",
            line.timeline()
        ),
        "use --to-latest for everything there is",
    )
}

pub(super) fn too_early(catalog: &Catalog, line: &Line, bases: &[&Base], request: &Request) -> Refusal {
    let target = &request.target;
    let earliest = bases
        .iter()
        .map(|base| &base.backup)
        .min_by_key(|backup| backup.stop_lsn);
    let (lsn, time) = earliest.map_or((Lsn::ZERO, None), |backup| {
        (backup.stop_lsn, Some(backup.finished_at))
    });
    let at = time.map(|time| format!(" ({time})")).unwrap_or_default();
    let of = request.backup.as_ref();
    let of = of.map(|id| format!(" from backup {id}")).unwrap_or_default();
    let mut message = format!("{target} lies before the earliest state that can be restored{of}, {lsn}{at}");
    let broken = line.broken.first();
    let is_damage = broken.is_some_and(|(_, hole)| catalog.damage_within(*hole).is_some());
    if let Some((id, hole)) = broken {
        let why = because(catalog, *hole);
        message.push_str(&format!(
            "; backup {id} cannot be used, it lacks the WAL {hole}{why}"
        ));
    }
    Refusal::no(
        Reason::TooEarly { earliest: lsn, time },
        message,
        match request.backup {
            None => format!("the earliest choice is --to-lsn {lsn}"),
            Some(_) => format!(
                "leave out --backup for older ones; the earliest choice with this one is --to-lsn {lsn}"
            ),
        },
    )
    .because_of_damage(is_damage)
}

/// Of so many places where WAL is missing a message names the range; the others it counts.
const NAMED: usize = 3;

pub(super) fn not_found(line: &Line, bases: &[&Base], missing: Vec<Missing>, target: &Target) -> Refusal {
    let start = bases
        .iter()
        .map(|base| base.consistent())
        .min()
        .unwrap_or(Lsn::ZERO);
    let end = bases.iter().map(|base| base.wal.end).max().unwrap_or(Lsn::ZERO);
    let (range, timeline) = (LsnRange::new(start, end), line.timeline());
    let mut message = format!("{target} is not in the WAL {range} of timeline {timeline}");
    let advice = where_nothing_is_missing(target);
    if missing.is_empty() {
        return Refusal::no(Reason::NotFound { missing }, message, advice);
    }
    message.push_str(&may_lie_in(bases, &missing));
    let is_damage = missing.iter().any(|missing| missing.damaged.is_some());
    let may_pass = missing
        .iter()
        .any(|missing| is_known_of_by_a_pulse_alone(line, missing));
    let next = format!(
        "{}to accept that, ask for {} instead, the end of what is before it (`highwater-restore list` shows all windows); if it \
         does not lie there: {advice}",
        try_again(may_pass),
        nearest(bases, &missing)
    );
    Refusal::no(Reason::NotFound { missing }, message, next).because_of_damage(is_damage)
}

fn where_nothing_is_missing(target: &Target) -> &'static str {
    match target {
        Target::Xid(_) => {
            "a transaction that wrote nothing leaves no trace; use --to-time or --to-lsn instead"
        }
        _ => "check the spelling; restore points are made with pg_create_restore_point()",
    }
}

/// Where a target may lie that was looked for in vain. What is behind a break and before the end of the next backup is
/// there, and nothing restores it.
fn may_lie_in(bases: &[&Base], missing: &[Missing]) -> String {
    let named: Vec<String> = missing.iter().take(NAMED).map(ToString::to_string).collect();
    let more = match missing.len().saturating_sub(NAMED) {
        0 => String::new(),
        1 => "; one more range of WAL is missing".to_owned(),
        more => format!("; {more} more ranges of WAL are missing"),
    };
    let is_ended = |missing: &Missing| bases.iter().any(|base| base.wal.start >= missing.range.end);
    let behind = if missing.iter().any(is_ended) {
        ", or between there and the end of the base backup that follows,"
    } else {
        ""
    };
    format!(
        "; {}{more}; it may lie there{behind} and cannot be reached then",
        named.join("; ")
    )
}

/// The last that can be reached before each break that is named.
fn nearest(bases: &[&Base], missing: &[Missing]) -> String {
    let before = |missing: &Missing| {
        let ends = bases.iter().map(|base| base.wal.end);
        ends.filter(|end| *end <= missing.range.start).max()
    };
    let ends: BTreeSet<Lsn> = missing.iter().take(NAMED).filter_map(before).collect();
    let choices: Vec<String> = ends.iter().map(|end| format!("--to-lsn {end}")).collect();
    choices.join(" or ")
}

pub(super) fn on_ancestor(line: &Line, own: &Line) -> String {
    let (timeline, own) = (line.timeline(), own.timeline());
    format!(
        "the target lies on timeline {own}, before timeline {timeline} branched off: recovery ends on timeline {own}"
    )
}

/// The timeline with the highest number is not followed.
pub(super) fn passed_over(over: &PassedOver) -> String {
    let PassedOver {
        timeline,
        ancestor,
        switch,
    } = over;
    format!(
        "timeline {timeline} is passed over: its history is archived and nothing that was written on it, and timeline {ancestor} \
         goes on behind {switch}, where timeline {timeline} left it; --timeline {timeline} restores to there"
    )
}

pub(super) fn ragged_end(line: &Line, end: Lsn) -> String {
    let hole = line.chain.hole_at(end, line.end);
    format!(
        "the archive ends at {end}: single objects lie behind {hole}, which was on its way when the agent stopped; no pulse \
         tells of anything behind {end} that was acknowledged"
    )
}

pub(super) fn time_resolved(time: Time, last_before: Option<Mark>, first_after: Option<Mark>) -> Vec<String> {
    let stamp = |mark: Mark| {
        mark.time.map_or_else(
            || mark.end.to_string(),
            |time| format!("{time} (LSN {})", mark.end),
        )
    };
    let kept = last_before.map_or_else(
        || "no transaction ended between the backup's start and the target".to_owned(),
        |mark| format!("the last transaction kept ended at {}", stamp(mark)),
    );
    let left = first_after.map_or_else(
        || format!("none ended after it up to {time}, and the archive proves that it is complete to then"),
        |mark| format!("the first one left out ended at {}", stamp(mark)),
    );
    vec![format!("{kept}; {left}")]
}

pub(super) fn found(target: &Target, mark: Mark) -> String {
    let time = mark.time.map(|time| format!(", {time}")).unwrap_or_default();
    format!("{target} ends at LSN {}{time}", mark.end)
}

/// What an operator should know about the archive before trusting the plan.
pub(super) fn circumstances(catalog: &Catalog, line: &Line, backup: &Backup) -> Vec<String> {
    let mut notes: Vec<String> = catalog.other_lineages.iter().map(other_lineage).collect();
    for region in &catalog.regions {
        match &region.reading {
            Reading::Readable => {
                if !region.backups.contains_key(&backup.id) {
                    notes.push(format!("region {} does not hold backup {}", region.name, backup.id));
                }
            }
            Reading::LeftOut => notes.push(format!("region {} is left out as asked", region.name)),
            Reading::Unreadable { error } => notes.push(format!(
                "region {} cannot be read; the target lies within what the others hold, but a timeline that only it knows would \
                 not be noticed: {error}",
                region.name
            )),
        }
    }
    let skipped = line.broken.iter().filter(|(id, _)| *id > backup.id);
    notes.extend(skipped.map(|(id, hole)| {
        format!(
            "backup {id} is passed over: it lacks the WAL {hole}{}",
            because(catalog, *hole)
        )
    }));
    notes.extend(damage_notes(catalog, line));
    notes.extend(branch_notes(catalog, line));
    notes.extend(catalog.findings.iter().map(ToString::to_string));
    notes
}

fn other_lineage(other: &SystemId) -> String {
    format!(
        "another lineage is archived under this cluster's name, as after an upgrade with pg_upgrade: --system-id {other} restores that one"
    )
}

/// What planning found to be damaged, and what becomes of it.
fn damage_notes(catalog: &Catalog, line: &Line) -> Vec<String> {
    let note = |damaged: &Damaged| match line.chain.cover(damaged.range) {
        Ok(_) => format!("{damaged}; other objects hold the same WAL and are used"),
        Err(_) => format!("{damaged}; it is not needed for this target"),
    };
    catalog.damaged.iter().map(note).collect()
}

/// Of WAL that only one of two timelines has, a plan for either says so.
fn branch_notes(catalog: &Catalog, line: &Line) -> Vec<String> {
    let (timeline, mut notes) = (line.timeline(), Vec::new());
    for branch in catalog.branches(&catalog.readable()) {
        let (range, other) = (branch.range(), branch.timeline);
        if branch.newest == timeline {
            notes.push(format!("not part of this: {branch}"));
        } else if other == timeline {
            notes.push(format!(
                "WAL {range} is a divergent branch: timeline {} left timeline {other} at {} and never had it",
                branch.newest, branch.start
            ));
        }
    }
    notes
}
