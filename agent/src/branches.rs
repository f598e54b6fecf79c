//! Watching for WAL that the newest timeline never had: see [`highwater_format::branches`].
//!
//! Owns: reading a region for them, saying so once, and showing them in [`State`]. They are never deleted here.

use std::collections::BTreeMap;
use std::time::Duration;

use highwater_format::branches::{branches, forks};
use highwater_format::{Branch, History, Layout, Lsn, SegmentSize, TimelineId};
use highwater_store::Store;
use tokio_util::sync::CancellationToken;

use crate::error::Result;
use crate::inventory::{coverage, onward, timelines};
use crate::region::{Archive, get_optional};
use crate::state::{Snapshot, State};

/// Before a region that could not be read is read again.
const PAUSE: Duration = Duration::from_secs(5);

/// As much of what is held up to `lsn` on `timeline` as a server on timeline `current` has too: all of it, or up to
/// where `timeline` was left, as far as that is known.
pub fn common_end(
    branches: &[Branch],
    timeline: Option<TimelineId>,
    lsn: Lsn,
    current: Option<TimelineId>,
) -> Lsn {
    let left = |branch: &&Branch| timeline != current && Some(branch.timeline) == timeline;
    let left = branches.iter().find(left).map(|branch| branch.start);
    left.map_or(lsn, |left| left.min(lsn))
}

/// The branches that one region holds.
pub async fn read(store: &dyn Store, layout: &Layout, size: SegmentSize) -> Result<Vec<Branch>> {
    of(store, layout, size, &histories(store, layout).await?).await
}

/// The histories that one region holds and that can be read.
pub(crate) async fn histories(store: &dyn Store, layout: &Layout) -> Result<Vec<History>> {
    let mut histories = Vec::new();
    for timeline in timelines(store, layout).await? {
        match get_optional(store, &layout.history(timeline)).await? {
            Some(content) => histories.extend(History::parse(timeline, &content).ok()),
            None if timeline == TimelineId::FIRST => histories.push(History::root(timeline)),
            // Restore and verify say what is wrong with it.
            None => {}
        }
    }
    Ok(histories)
}

/// The branches among `histories`, by what the region holds of each.
pub(crate) async fn of(
    store: &dyn Store,
    layout: &Layout,
    size: SegmentSize,
    histories: &[History],
) -> Result<Vec<Branch>> {
    let mut ends = BTreeMap::new();
    for (timeline, start) in forks(histories) {
        let held = coverage(store, layout, size, timeline, onward(start)).await?;
        ends.insert(timeline, held.contiguous_end(start));
    }
    Ok(branches(histories, |timeline, start| {
        ends.get(&timeline).copied().unwrap_or(start)
    }))
}

/// Looks for branches whenever a region has come to another timeline: everything older is stored there then.
pub async fn watch(archive: Archive, state: State, cancel: CancellationToken) {
    let mut changes = state.subscribe();
    let mut read_at = None;
    while cancel
        .run_until_cancelled(changes.changed())
        .await
        .is_some_and(|changed| changed.is_ok())
    {
        let newest = newest(&changes.borrow_and_update());
        let Some((timeline, index)) = newest.filter(|(timeline, _)| read_at != Some(*timeline)) else {
            continue;
        };
        let Some(region) = archive.regions.get(index) else {
            continue;
        };
        let found = read(&*region.quick, &archive.layout, archive.identity.segment_size);
        match cancel.run_until_cancelled(found).await {
            None => return,
            Some(Ok(found)) => {
                read_at = Some(timeline);
                show(&state, found);
            }
            Some(Err(error)) => {
                tracing::warn!(region = region.name, %error, "cannot look for divergent branches yet");
                cancel.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
            }
        }
    }
}

/// The newest timeline of any region, and a region that is on it.
fn newest(snapshot: &Snapshot) -> Option<(TimelineId, usize)> {
    let on = |(index, view): (usize, &crate::state::RegionView)| Some((view.timeline?, index));
    snapshot.regions.iter().enumerate().filter_map(on).max()
}

fn show(state: &State, found: Vec<Branch>) {
    let known = state.snapshot().branches;
    for branch in found.iter().filter(|branch| !known.contains(branch)) {
        tracing::warn!(%branch, bytes = branch.range().len(), "the archive holds a divergent branch; it stays there");
    }
    state.update(|snapshot| snapshot.branches = found);
}
