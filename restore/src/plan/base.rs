//! The backups that can serve as a base on one chain, and how far the WAL behind each of them reaches.
//!
//! Owns: which bytes count as "the end of the archive" and what a break in the WAL is called. Does not own: targets.

use highwater_format::{Backup, BackupId, Lsn, LsnRange, Time};

use crate::catalog::{BrokenChain, Catalog, Chain, Damaged};
use highwater_format::TimelineId;

use super::{Missing, Span};

/// One timeline with its ancestors and the backups on it.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) chain: Chain,
    /// The newest start first.
    pub(crate) bases: Vec<Base>,
    /// Backups of the chain whose own WAL is not whole, with what is missing.
    pub(crate) broken: Vec<(BackupId, LsnRange)>,
    /// Everything that is known to exist ends here: WAL that is stored, damaged, claimed by a pulse or recorded as
    /// missing.
    pub(crate) end: Lsn,
    /// Everything before this was once reported as stored: a break before it is a loss.
    pub(crate) claimed: Option<Lsn>,
}

/// A backup that can be restored, and the unbroken WAL behind it.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    pub(crate) backup: Backup,
    /// From the start of the segment in which the backup starts.
    pub(crate) wal: LsnRange,
}

impl Base {
    /// The WAL that recovery from this backup reads, beginning at the record it begins with.
    pub(crate) fn span(&self, timeline: TimelineId) -> Span {
        Span {
            timeline,
            start: self.backup.start_lsn,
            end: self.wal.end,
        }
    }

    /// Where the backup becomes consistent.
    pub(crate) fn consistent(&self) -> Lsn {
        self.backup.stop_lsn
    }
}

impl Line {
    /// Reads the line of `timeline` from the catalog as the given regions show it.
    pub(crate) fn build(
        catalog: &Catalog,
        timeline: TimelineId,
        regions: &[usize],
    ) -> Result<Self, BrokenChain> {
        let chain = catalog.chain(timeline, regions)?;
        let mut bases = Vec::new();
        let mut broken = Vec::new();
        for backup in backups(catalog, &chain, regions) {
            let start = chain.segment_size.segment_start(backup.start_lsn);
            let end = chain.contiguous_end(start);
            if end < backup.stop_lsn {
                broken.push((backup.id.clone(), chain.hole_at(end, backup.stop_lsn)));
            } else {
                bases.push(Base {
                    backup: backup.clone(),
                    wal: LsnRange::new(start, end),
                });
            }
        }
        bases.sort_by_key(|base| std::cmp::Reverse((base.backup.start_lsn, base.backup.stop_lsn)));
        let claimed = claimed(catalog, timeline, regions);
        let stored = chain.end().unwrap_or(Lsn::ZERO);
        let recorded = recorded_end(catalog, &chain, regions);
        let damaged = damaged(catalog, &chain).map(|range| range.end).max();
        // Its history proves that all before its begin was written, whether or not any of it is here.
        let begin = chain.history.begin_of(timeline).unwrap_or(Lsn::ZERO);
        let end = stored
            .max(begin)
            .max(recorded)
            .max(damaged.unwrap_or(Lsn::ZERO))
            .max(claimed.unwrap_or(Lsn::ZERO));
        Ok(Self {
            chain,
            bases,
            broken,
            end,
            claimed,
        })
    }

    pub(crate) fn timeline(&self) -> TimelineId {
        self.chain.timeline()
    }

    /// The break behind `end`, if there is known to be more WAL; `None` where the archive simply ends.
    pub(crate) fn break_at(&self, catalog: &Catalog, regions: &[usize], end: Lsn) -> Option<Missing> {
        if end >= self.end {
            return None;
        }
        let timeline = self.chain.history.timeline_at(end);
        let range = self.chain.hole_at(end, self.end);
        let recorded = catalog.gap_for(timeline, range, regions).map(|gap| gap.reason);
        Some(Missing {
            timeline,
            range,
            recorded,
            damaged: catalog.damage_within(range),
        })
    }

    /// Every break behind `from`, in order, whether or not a backup lies behind it.
    pub(crate) fn breaks(&self, catalog: &Catalog, regions: &[usize], from: Lsn) -> Vec<Missing> {
        let mut breaks = Vec::new();
        let mut at = self.chain.contiguous_end(from);
        while let Some(missing) = self.break_at(catalog, regions, at) {
            at = self.chain.contiguous_end(missing.range.end);
            breaks.push(missing);
        }
        breaks
    }

    /// A break that an orderly archive shows after a crash: objects are stored in parallel, so a later one may be there
    /// while an earlier one was on its way. Nothing behind such a break was ever acknowledged to PostgreSQL, and the
    /// pulse is the witness; without a pulse there is none and a break is a loss. Where the durability policy is content
    /// with fewer regions than there are, one region proves nothing: another may hold what was reported behind it.
    pub(crate) fn is_ragged_end(&self, catalog: &Catalog, regions: &[usize], end: Lsn) -> bool {
        let recorded = recorded_end(catalog, &self.chain, regions) > end;
        let own = self
            .chain
            .history
            .begin_of(self.timeline())
            .is_some_and(|begin| end >= begin);
        let pulses = regions
            .iter()
            .filter_map(|index| catalog.regions.get(*index)?.pulse.as_ref());
        let vouched = pulses
            .filter_map(|pulse| pulse.quorum)
            .all(|quorum| quorum.is_vouched_for_by(regions.len()));
        // What is damaged was stored whole once: it was not on its way.
        let damaged = damaged(catalog, &self.chain).any(|range| range.end > end);
        own && !recorded && !damaged && vouched && self.claimed.is_some_and(|claimed| claimed <= end)
    }

    /// The latest server time at which a pulse saw the WAL end within `span`: everything before it is there.
    pub(crate) fn pulse_time(&self, catalog: &Catalog, regions: &[usize], span: &Span) -> Option<Time> {
        let pulses = regions
            .iter()
            .filter_map(|index| catalog.regions.get(*index)?.pulse.as_ref());
        let on_chain = |lsn, timeline| self.chain.holds(timeline, lsn);
        let within = pulses.filter(|pulse| {
            span.start <= pulse.wal_end
                && pulse.wal_end <= span.end
                && on_chain(pulse.wal_end, pulse.timeline)
        });
        within.map(|pulse| pulse.server_time).max()
    }
}

/// The backups of the chain that are visible in one of the regions.
fn backups<'a>(
    catalog: &'a Catalog,
    chain: &'a Chain,
    regions: &'a [usize],
) -> impl Iterator<Item = &'a Backup> {
    let visible = move |id: &BackupId| {
        catalog
            .backup_regions(id)
            .iter()
            .any(|index| regions.contains(index))
    };
    catalog.backups().into_values().filter(move |backup| {
        chain.holds(backup.timeline, backup.start_lsn)
            && chain.holds(backup.stop_timeline, backup.stop_lsn)
            && visible(&backup.id)
    })
}

/// What of the chain is in damaged objects.
fn damaged<'a>(catalog: &'a Catalog, chain: &'a Chain) -> impl Iterator<Item = LsnRange> + 'a {
    let on_chain = |damaged: &'a Damaged| {
        let leg = chain.history.range_of(damaged.timeline)?;
        damaged.range.intersect(leg).filter(|range| !range.is_empty())
    };
    catalog.damaged.iter().filter_map(on_chain)
}

/// The furthest that the pulses of this timeline claim. What one region says about all of them counts only while none
/// is left out: what that one held is given up knowingly.
fn claimed(catalog: &Catalog, timeline: TimelineId, regions: &[usize]) -> Option<Lsn> {
    let whole = regions.len() == catalog.regions.len();
    let pulses = regions
        .iter()
        .filter_map(|index| catalog.regions.get(*index)?.pulse.as_ref());
    pulses
        .filter(|pulse| pulse.timeline == timeline)
        .map(|pulse| {
            if whole {
                pulse.stored_lsn.max(pulse.durable_lsn)
            } else {
                pulse.stored_lsn
            }
        })
        .max()
}

/// The end of the last gap on record. That WAL cannot be replayed is on record before that WAL is stored, and says nothing while
/// there is none.
fn recorded_end(catalog: &Catalog, chain: &Chain, regions: &[usize]) -> Lsn {
    let stored = chain.end().unwrap_or(Lsn::ZERO);
    let gaps = catalog.gaps(chain.timeline(), regions).into_iter();
    let ends = gaps
        .filter(|gap| !gap.unreplayable || gap.end <= stored)
        .map(|gap| gap.end);
    ends.max().unwrap_or(Lsn::ZERO)
}
