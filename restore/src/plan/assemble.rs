//! The plan for a target that can be reached: on which timeline, with which settings, from how much.
//!
//! Owns: PostgreSQL's settings for a stop, the WAL that is needed for it, and what it amounts to.

use highwater_format::{Lsn, LsnRange, TimelineId};

use super::{
    Amount, Mark, Plan, ResolvedTarget, Stop,
    base::{Base, Line},
    choose::{Halt, Planner},
    say,
};

/// How recovery is told to stop.
pub(super) enum Cut {
    /// Not at all: replay what there is.
    End,
    /// As soon as the backup is consistent.
    Immediate,
    /// At the first record that begins at or after an LSN: after it, or before it.
    At { lsn: Lsn, inclusive: bool },
}

impl Cut {
    /// Right after that record.
    pub(super) fn behind(record: Mark) -> Self {
        Self::At {
            lsn: record.start,
            inclusive: true,
        }
    }
}

impl Stop {
    /// Right after that record, whose time is known if it ends a transaction.
    pub(super) fn behind(record: Mark) -> Self {
        Self {
            lsn: record.end,
            last_commit: record.time,
        }
    }

    /// Right before it.
    pub(super) fn before(record: Mark) -> Self {
        Self {
            lsn: record.start,
            last_commit: None,
        }
    }
}

impl Planner<'_> {
    pub(super) fn finish(
        &self,
        line: &Line,
        base: &Base,
        cut: &Cut,
        stop: Stop,
        mut notes: Vec<String>,
    ) -> Result<Plan, Halt> {
        let Some((ancestor, switch)) = own_timeline(line, cut, stop.lsn) else {
            return Ok(self.assemble(line, base, cut, stop, notes));
        };
        self.refuse_unnamed_ancestor(line, ancestor)?;
        Ok(match self.own_line(ancestor, switch, base) {
            Some((own, own_base)) => {
                notes.push(say::on_ancestor(line, &own));
                self.assemble(&own, &own_base, cut, stop, notes)
            }
            None => self.assemble(line, base, cut, stop, notes),
        })
    }

    /// The line of the ancestor on which the target itself lies, which the descendant leaves at `switch`. Recovery towards
    /// the descendant would reach the same state, but PostgreSQL would then note the new timeline as a child of the
    /// descendant, branching off before that one began.
    fn own_line(&self, timeline: TimelineId, switch: Lsn, base: &Base) -> Option<(Line, Base)> {
        let own = Line::build(self.catalog, timeline, &self.regions).ok()?;
        let own_base = own
            .bases
            .iter()
            .find(|own| own.backup.id == base.backup.id)?
            .clone();
        let whole = own_base.wal.end >= switch.min(base.wal.end);
        whole.then_some((own, own_base))
    }

    fn assemble(&self, line: &Line, base: &Base, cut: &Cut, stop: Stop, mut notes: Vec<String>) -> Plan {
        let size = line.chain.segment_size;
        let needed = match cut {
            Cut::End => base.wal.end,
            Cut::Immediate | Cut::At { .. } => base.wal.end.min(size.segment_end(stop.lsn.saturating_sub(1))),
        };
        let wal = LsnRange::new(base.wal.start, needed);
        notes.extend(say::circumstances(self.catalog, line, &base.backup));
        let backup_regions: Vec<usize> = self.catalog.backup_regions(&base.backup.id);
        Plan {
            system_id: self.catalog.identity.system_id,
            backup_regions: self
                .regions
                .iter()
                .copied()
                .filter(|index| backup_regions.contains(index))
                .collect(),
            regions: self.regions.clone(),
            timeline: line.timeline(),
            amount: amount(line, base, wal),
            chain: line.chain.clone(),
            wal,
            wal_end: base.wal.end,
            ragged: match cut {
                Cut::End => self.ends_ragged(line, base),
                // PostgreSQL reads ahead of its target, past a break that lies close behind it. It may be told that
                // nothing follows: with a target it does not open the cluster at an end that comes too early.
                Cut::Immediate | Cut::At { .. } => {
                    line.break_at(self.catalog, &self.regions, base.wal.end).is_some()
                }
            },
            target: self.resolve(line.timeline(), cut, stop),
            backup: base.backup.clone(),
            notes,
        }
    }

    fn resolve(&self, timeline: TimelineId, cut: &Cut, stop: Stop) -> ResolvedTarget {
        let mut settings = match cut {
            Cut::End => Vec::new(),
            Cut::Immediate => vec![("recovery_target", "immediate".to_owned())],
            Cut::At { lsn, inclusive } => vec![
                ("recovery_target_lsn", lsn.to_string()),
                ("recovery_target_inclusive", inclusive.to_string()),
            ],
        };
        settings.push(("recovery_target_timeline", timeline.to_string()));
        if !matches!(cut, Cut::End) {
            settings.push(("recovery_target_action", self.request.action.as_str().to_owned()));
        }
        ResolvedTarget {
            asked: self.request.target.clone(),
            exclusive: self.request.exclusive,
            settings,
            action: self.request.action,
            stop,
        }
    }
}

/// The ancestor on which the target itself lies, and where it was left; `None` where it lies on the line's own timeline.
fn own_timeline(line: &Line, cut: &Cut, stop: Lsn) -> Option<(TimelineId, Lsn)> {
    let history = &line.chain.history;
    let timeline = match cut {
        Cut::End => return None,
        Cut::At { inclusive: false, .. } => history.timeline_at(stop),
        Cut::Immediate | Cut::At { .. } => history.timeline_at(stop.saturating_sub(1)),
    };
    Some((timeline, history.switch_of(timeline)?))
}

fn amount(line: &Line, base: &Base, wal: LsnRange) -> Amount {
    let mut objects: Vec<_> = line.chain.cover(wal).unwrap_or_default();
    objects.dedup_by_key(|source| (source.timeline, source.piece.range, source.piece.kind));
    let size = line.chain.segment_size.bytes();
    Amount {
        backup_bytes: base.backup.stored_bytes,
        backup_plain_bytes: base.backup.plain_bytes,
        packs: u64::from(base.backup.packs),
        wal_bytes: objects.iter().map(|source| source.piece.size).sum(),
        wal_objects: objects.len() as u64,
        wal_segments: wal.len().div_ceil(size),
    }
}
