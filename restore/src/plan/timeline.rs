//! Which timeline a restore follows when none is asked for.
//!
//! Owns: the rule. It is the highest number, but one on which nothing was archived is passed over where an ancestor goes
//! on behind the place where it was left: the promoted server and its agent were lost at once, say, and the old primary
//! came back. To follow the history alone would end there without a word. Does not own: what is planned on it.
//!
//! A history alone still counts for something: what lies before the switch was written. So it is passed over only for an
//! ancestor that can be restored at least to the switch; before it, following the history is what shows the hole. And
//! only where it is known that nothing was archived: a region that does not answer may hold it, and what a pulse claims,
//! a backup needs, a gap records or a damaged object should hold was there once.

use highwater_format::{Lsn, TimelineId};

use super::base::Line;
use crate::catalog::{Catalog, Chain};

/// A timeline that is not followed although it has the highest number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PassedOver {
    pub(super) timeline: TimelineId,
    /// The ancestor that goes on.
    pub(super) ancestor: TimelineId,
    /// Where that one was left.
    pub(super) switch: Lsn,
}

/// The timeline to follow, and those that were passed over for it; `None` where the archive has no timeline.
pub(super) fn latest(catalog: &Catalog, regions: &[usize]) -> Option<(TimelineId, Vec<PassedOver>)> {
    let mut passed_over = Vec::new();
    for timeline in catalog.timelines().into_iter().rev() {
        match pass_over(catalog, regions, timeline) {
            Some(over) => passed_over.push(over),
            None => return Some((timeline, passed_over)),
        }
    }
    None
}

fn pass_over(catalog: &Catalog, regions: &[usize], timeline: TimelineId) -> Option<PassedOver> {
    let chain = catalog.chain(timeline, regions).ok()?;
    let settled = catalog.unreadable().next().is_none() && catalog.differing_histories(timeline).is_empty();
    if !settled || is_archived(catalog, regions, &chain) {
        return None;
    }
    let goes_on = |ancestor: TimelineId, switch: Lsn| {
        let line = Line::build(catalog, ancestor, regions).ok()?;
        let reaches = line.bases.iter().any(|base| base.wal.end >= switch);
        (reaches && line.end > switch).then_some(PassedOver {
            timeline,
            ancestor,
            switch,
        })
    };
    let mut ancestors = chain.history.entries.iter().rev();
    ancestors.find_map(|entry| goes_on(entry.timeline, entry.switch))
}

/// Whether anything tells of WAL of the timeline that the archive holds or once held. The copy of what its parent wrote is
/// not its own.
fn is_archived(catalog: &Catalog, regions: &[usize], chain: &Chain) -> bool {
    let timeline = chain.timeline();
    let begin = chain.history.begin_of(timeline).unwrap_or(Lsn::ZERO);
    let end = catalog.coverage(timeline, regions).end();
    let mut pulses = catalog.regions.iter().filter_map(|region| region.pulse.as_ref());
    end.is_some_and(|end| end > begin)
        || pulses.any(|pulse| pulse.timeline == timeline && pulse.stored_lsn.max(pulse.durable_lsn) > begin)
        || catalog
            .backups()
            .into_values()
            .any(|backup| backup.timeline == timeline || backup.stop_timeline == timeline)
        || !catalog.gaps(timeline, regions).is_empty()
        || catalog.damaged.iter().any(|damaged| damaged.timeline == timeline)
}

#[cfg(test)]
#[path = "timeline_tests.rs"]
mod tests;
