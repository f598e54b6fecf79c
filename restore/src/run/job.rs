//! From a plan to what the steps need. Pure.

use std::collections::BTreeSet;
use std::sync::Arc;

use highwater_config::Config;
use highwater_format::{Lsn, TimelineId};
use highwater_store::Store;

use super::Input;
use crate::catalog::{Catalog, Reading, RegionView};
use crate::fetch::Sources;
use crate::plan::Plan;
use crate::recovery::facts::{Facts, RegionFacts, TimelineFacts};
use crate::regions::Region;
use crate::target::Target;

/// Replayed segments stay until the next restartpoint lets them go: about `max_wal_size`, 1 GiB by default.
const KEPT_WAL: u64 = 1 << 30;

/// The regions to read the backup from: those that list it, then the others (one of them may have a pack that a
/// damaged region lost).
#[must_use]
pub fn sources(plan: &Plan, regions: &[Region]) -> Sources {
    let mut order = plan.backup_regions.clone();
    order.extend(
        plan.regions
            .iter()
            .filter(|index| !plan.backup_regions.contains(index)),
    );
    let stores = order
        .into_iter()
        .filter_map(|index| regions.get(index)?.store().cloned());
    Sources::new(stores.collect::<Vec<Arc<dyn Store>>>())
}

/// Room for WAL while it is replayed.
#[must_use]
pub fn wal_room(plan: &Plan, config: &Config) -> u64 {
    let wal = plan.wal.len();
    let segments = plan.chain.segment_size.bytes().saturating_mul(3);
    wal.min(KEPT_WAL)
        .saturating_add(wal.min(config.restore.prefetch))
        .saturating_add(segments)
}

/// What `wal-fetch` must know.
#[must_use]
pub fn facts(input: &Input<'_>) -> Facts {
    let (plan, catalog, config) = (input.plan, input.catalog, input.config);
    let (format, note) = Facts::format_and_note();
    let (left_out, views): (Vec<&RegionView>, Vec<&RegionView>) = catalog
        .regions
        .iter()
        .partition(|view| view.reading == Reading::LeftOut);
    let regions = views.into_iter().filter_map(|view| {
        let settings = config.regions.iter().find(|region| region.name == view.name)?;
        Some(RegionFacts::of(settings, view.is_readable()))
    });
    Facts {
        format,
        note,
        cluster: catalog.layout.cluster().clone(),
        system_id: plan.system_id,
        segment_size: plan.chain.segment_size.bytes(),
        config: input.config_file.and_then(|path| std::path::absolute(path).ok()),
        regions: regions.map(absolute_paths).collect(),
        left_out: left_out.into_iter().map(|view| view.name.clone()).collect(),
        timelines: timelines(plan),
        known_timelines: catalog.timelines().into_iter().collect(),
        without_history: without_history(catalog, plan),
        needed_until: (plan.target.asked != Target::Latest).then_some(plan.wal.end),
        prefetch_bytes: config.restore.prefetch,
    }
}

/// PostgreSQL runs in its data directory, so a relative path would mean something else there.
fn absolute_paths(mut region: RegionFacts) -> RegionFacts {
    region.ca_file = region
        .ca_file
        .map(|path| std::path::absolute(&path).unwrap_or(path));
    region
}

/// The line of descent, each timeline with the proven end of what recovery takes from it.
fn timelines(plan: &Plan) -> Vec<TimelineFacts> {
    let history = &plan.chain.history;
    let ancestors = history.entries.iter().map(|entry| entry.timeline);
    let one = |timeline: TimelineId| {
        let range = history.range_of(timeline)?;
        let end: Lsn = range.end.min(plan.wal_end).max(range.start);
        Some(TimelineFacts {
            timeline,
            begin: range.start,
            end,
            ragged: plan.ragged && timeline == history.timeline,
        })
    };
    ancestors.chain([history.timeline]).filter_map(one).collect()
}

/// The timelines before the one that recovery goes to whose history is in no region. PostgreSQL asks for every number up to
/// it, ancestor or not.
fn without_history(catalog: &Catalog, plan: &Plan) -> Vec<TimelineId> {
    let ancestors = plan.chain.history.entries.iter().map(|entry| entry.timeline);
    let mut lacking: BTreeSet<TimelineId> = catalog.timelines().into_iter().chain(ancestors).collect();
    lacking.retain(|timeline| *timeline < plan.timeline && catalog.history(*timeline).is_none());
    lacking.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::model::{Branch, Model, tli};
    use crate::target::Request;

    /// Timeline 2 is an abandoned branch of 1; 3 leaves 1, and 4 leaves 3.
    #[test]
    fn every_older_timeline_without_a_history_is_one_that_recovery_does_without() {
        let mut model = Model::default();
        let tree = [
            (1, None, 20),
            (2, Some((1, 8)), 12),
            (3, Some((1, 20)), 30),
            (4, Some((3, 30)), 50),
        ];
        for (timeline, parent, end) in tree {
            model.branches.insert(timeline, Branch { parent, end });
        }
        model.backups = vec![(1, 4, 6)];
        let plan = model.plan(&Request::latest()).unwrap();
        assert_eq!(without_history(&model.catalog(), &plan), []);
        model.forgotten = [2, 3].into();
        let plan = model.plan(&Request::latest()).unwrap();
        let mut catalog = model.catalog();
        assert_eq!(without_history(&catalog, &plan), [tli(2), tli(3)]);
        // An ancestor of which nothing at all is here.
        catalog.regions[0].timelines.remove(&tli(3));
        assert_eq!(without_history(&catalog, &plan), [tli(2), tli(3)]);
    }
}
