//! What should be there of a timeline's WAL in one region and is not.
//!
//! Owns: where the WAL of a timeline must begin and end in a region, and what a hole in it is called. It ends where the
//! region's pulse says, and a timeline that another one left is whole up to that place: a listing that merely ends
//! earlier has lost something. Does not own: reading.

use highwater_format::{
    Gap, Lsn, LsnRange, TimelineId,
    coverage::{Coverage, Piece},
};

use super::{Problem, Subject, Verified, good::Good};
use crate::catalog::{Catalog, TimelineView};

/// The holes in one region's WAL of one timeline, recorded or not.
pub(super) fn holes(
    catalog: &Catalog,
    subject: &Subject<'_>,
    timeline: TimelineId,
    good: &Good,
    found: &mut Verified,
) {
    let nothing = TimelineView::default();
    let view = subject.view.timelines.get(&timeline).unwrap_or(&nothing);
    let place = Place {
        catalog,
        subject,
        timeline,
    };
    let name = &subject.region.name;
    let claimed = place.claimed();
    let last = view.coverage.end().unwrap_or(Lsn::ZERO);
    for gap in view.gaps.iter().filter(|gap| gap.unreplayable) {
        let what = format!("WAL {} of timeline {timeline}", gap.range());
        let problem = format!("on record as unreplayable: {}", gap.reason);
        found.notes.push(Problem::new(name, what, problem));
    }
    for hole in place.missing(view) {
        for (range, gap) in by_record(hole, &view.gaps) {
            let what = format!("WAL {range} of timeline {timeline}");
            let also = good
                .elsewhere(catalog, subject.index, range)
                .map(|names| format!("; region {names} has it"))
                .unwrap_or_default();
            let (list, problem) = match gap {
                Some(gap) => (
                    &mut found.notes,
                    format!("on record as lost: {}{also}", gap.reason),
                ),
                None if claimed.is_some_and(|claimed| claimed <= range.start) => {
                    let why = if range.start < last {
                        "not acknowledged, as far as pulses tell; the archive ends before it"
                    } else {
                        "not here yet, as the region's pulse says"
                    };
                    (&mut found.notes, format!("{why}{also}"))
                }
                None => (&mut found.missing, format!("missing{also}")),
            };
            list.push(Problem::new(name, what, problem));
        }
    }
}

/// One timeline in one region.
struct Place<'a> {
    catalog: &'a Catalog,
    subject: &'a Subject<'a>,
    timeline: TimelineId,
}

impl Place<'_> {
    /// What lacks between where the WAL begins and where it must end.
    fn missing(&self, view: &TimelineView) -> Vec<LsnRange> {
        let claimed = self.claimed().unwrap_or(Lsn::ZERO);
        let runs = view.coverage.runs();
        let (start, end) = match (runs.first(), runs.last()) {
            (Some(first), Some(last)) => (first.start, last.end.max(claimed).max(self.left_at())),
            _ => match self.begin(claimed) {
                Some(begin) => (begin, claimed),
                None => return Vec::new(),
            },
        };
        let mut held: Coverage = view.coverage.pieces().copied().collect();
        held.extend(self.copies());
        held.holes(LsnRange::new(start, end.max(start)))
    }

    /// How far the region's pulse says that this timeline is here.
    fn claimed(&self) -> Option<Lsn> {
        let pulse = self.subject.view.pulse.as_ref();
        pulse
            .filter(|pulse| pulse.timeline == self.timeline)
            .map(|pulse| pulse.stored_lsn)
    }

    /// The furthest place at which another timeline left this one: up to there it was once known.
    fn left_at(&self) -> Lsn {
        let known = self.catalog.timelines().into_iter();
        known
            .filter_map(|timeline| self.catalog.history(timeline)?.switch_of(self.timeline))
            .max()
            .unwrap_or(Lsn::ZERO)
    }

    /// Bytes of this timeline that lie here under others: a promoted server copies the segment in which it leaves its
    /// parent.
    fn copies(&self) -> Vec<Piece> {
        let size = self.catalog.identity.segment_size;
        let mut copies = Vec::new();
        for (child, view) in &self.subject.view.timelines {
            let Some(history) = self.catalog.history(*child) else {
                continue;
            };
            let (Some(left), Some(begin)) = (history.switch_of(self.timeline), history.begin_of(*child))
            else {
                continue;
            };
            let copied = LsnRange::new(size.segment_start(begin).min(left), left);
            copies.extend(view.coverage.pieces().filter_map(|piece| {
                let range = piece.range.intersect(copied)?;
                Some(Piece { range, ..*piece })
            }));
        }
        copies
    }

    /// Where the WAL of a timeline must begin of which nothing is here, though the region's pulse claims it up to
    /// `claimed`. `None` if nothing proves that there was any: a claim alone may be the place where an archive begins.
    fn begin(&self, claimed: Lsn) -> Option<Lsn> {
        let history = self.catalog.history(self.timeline)?;
        let begin = history.begin_of(self.timeline)?;
        let size = self.catalog.identity.segment_size;
        let views = &self.subject.view.timelines;
        let parent = history.parent().and_then(|parent| views.get(&parent.timeline));
        let continued = parent.is_some_and(|view| view.coverage.end().is_some());
        let backups = self.subject.view.backups.values();
        let backups = backups.filter(|backup| history.contains(backup.timeline));
        let others: Vec<usize> = self.catalog.readable();
        let elsewhere = self.catalog.coverage(self.timeline, &others);
        continued
            .then_some(begin)
            .into_iter()
            .chain(backups.map(|backup| size.segment_start(backup.start_lsn).max(begin)))
            .chain(elsewhere.runs().first().map(|run| run.start.max(begin)))
            .filter(|start| *start < claimed)
            .min()
    }
}

/// The parts of a hole, each with the record that explains it. A record explains what it names and nothing around it.
fn by_record(hole: LsnRange, gaps: &[Gap]) -> Vec<(LsnRange, Option<&Gap>)> {
    let mut parts = Vec::new();
    let mut at = hole.start;
    while at < hole.end {
        let holding = gaps.iter().filter(|gap| gap.range().contains(at));
        if let Some(gap) = holding.max_by_key(|gap| gap.end) {
            let end = gap.end.min(hole.end);
            parts.push((LsnRange::new(at, end), Some(gap)));
            at = end;
            continue;
        }
        let next = gaps.iter().map(|gap| gap.start).filter(|start| *start > at).min();
        let end = next.map_or(hole.end, |start| start.min(hole.end));
        parts.push((LsnRange::new(at, end), None));
        at = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use highwater_format::Time;

    use super::*;

    #[test]
    fn a_record_explains_what_it_names_and_nothing_around_it() {
        let gap = |start, end| Gap {
            timeline: TimelineId::FIRST,
            start: Lsn(start),
            end: Lsn(end),
            reason: String::new(),
            recorded_at: Time::UNIX_EPOCH,
            unreplayable: false,
        };
        let range = |start, end| LsnRange::new(Lsn(start), Lsn(end));
        let gaps = [gap(20, 30), gap(25, 40), gap(60, 70)];
        assert_eq!(
            by_record(range(10, 50), &gaps),
            [
                (range(10, 20), None),
                (range(20, 30), Some(&gaps[0])),
                (range(30, 40), Some(&gaps[1])),
                (range(40, 50), None)
            ]
        );
        assert_eq!(by_record(range(62, 65), &gaps), [(range(62, 65), Some(&gaps[2]))]);
        assert_eq!(by_record(range(1, 3), &[]), [(range(1, 3), None)]);
    }
}
