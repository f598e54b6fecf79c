//! What of one timeline was read and found whole, and what that makes of the objects that were not.
//!
//! Owns: the answer to "is it still there?" for WAL whose object is damaged: in chunks of the same region, in another
//! region, only in all regions together, or nowhere. Does not own: reading.

use std::collections::{BTreeMap, BTreeSet};

use highwater_format::{
    BackupId, LsnRange, TimelineId,
    coverage::{Coverage, Piece},
};

use super::{Problem, Verified};
use crate::catalog::{Catalog, Reading, RegionView};

/// One timeline.
#[derive(Debug, Default)]
pub(crate) struct Good {
    /// By the region's index in the catalog.
    whole: BTreeMap<usize, Coverage>,
    /// Region, object and range of what is damaged.
    bad: Vec<(usize, String, LsnRange)>,
}

impl Good {
    pub(super) fn whole(&mut self, region: usize, piece: Piece) {
        self.whole.entry(region).or_default().insert(piece);
    }

    pub(super) fn bad(&mut self, region: usize, key: String, range: LsnRange) {
        self.bad.push((region, key, range));
    }

    fn has(&self, region: usize, range: LsnRange) -> bool {
        self.whole
            .get(&region)
            .is_some_and(|held| held.cover(range).is_ok())
    }

    /// The other regions in which all of `range` is whole.
    pub(crate) fn elsewhere(&self, catalog: &Catalog, region: usize, range: LsnRange) -> Option<String> {
        let others = self.whole.keys().filter(|other| **other != region);
        let names: Vec<&str> = others
            .filter(|other| self.has(**other, range))
            .map(|other| catalog.region_name(*other))
            .collect();
        (!names.is_empty()).then(|| names.join(" and "))
    }

    fn together(&self) -> Coverage {
        self.whole
            .values()
            .flat_map(|held| held.pieces().copied())
            .collect()
    }

    /// Says of each damaged object what else holds its WAL, and names what nothing holds any more.
    pub(super) fn tell(&self, catalog: &Catalog, timeline: TimelineId, found: &mut Verified) {
        let together = self.together();
        let is_read = |view: &RegionView| matches!(view.reading, Reading::Readable);
        let all_read = found.unreadable.is_empty() && catalog.regions.iter().all(is_read);
        let mut lost = BTreeSet::new();
        for (region, key, range) in &self.bad {
            let also = match self.elsewhere(catalog, *region, *range) {
                _ if self.has(*region, *range) => "its chunks here hold the same WAL".to_owned(),
                Some(names) => format!("region {names} has it"),
                None if together.cover(*range).is_ok() => {
                    "no region alone has it, all together do".to_owned()
                }
                None if !all_read => {
                    "nothing else that was read holds all of it; what could not be read may".to_owned()
                }
                None => {
                    lost.extend(
                        together
                            .holes(*range)
                            .into_iter()
                            .map(|hole| (hole.start, hole.end)),
                    );
                    "nothing else holds all of it".to_owned()
                }
            };
            let name = catalog.region_name(*region);
            let told = found.damage.iter_mut();
            for problem in told.filter(|problem| problem.region == name && problem.what == *key) {
                problem.problem.push_str(&format!("; {also}"));
            }
        }
        for (start, end) in lost {
            let hole = LsnRange::new(start, end);
            let what = format!("WAL {hole} of timeline {timeline}");
            let behind = match first_behind(catalog, timeline, hole) {
                Some(id) => format!("what follows can be restored from backup {id} on"),
                None => {
                    "no base backup lies behind it yet: take one now (`highwater-agent backup`)".to_owned()
                }
            };
            let problem = format!(
                "damaged in every region and in every form: base backups before it reach {start} and no further; {behind}. \
                 An intact version of a damaged object, put back, mends it"
            );
            found.lost.push(Problem::new("all", what, problem));
        }
    }
}

/// The first base backup that needs nothing of a hole.
fn first_behind(catalog: &Catalog, timeline: TimelineId, hole: LsnRange) -> Option<BackupId> {
    let behind = catalog.backups().into_values().filter(|backup| {
        backup.timeline > timeline || (backup.timeline == timeline && backup.start_lsn >= hole.end)
    });
    behind
        .min_by_key(|backup| (backup.timeline, backup.start_lsn))
        .map(|backup| backup.id.clone())
}
