//! Going on to the timeline that follows another one in the region that is copied from.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use highwater_format::{History, Layout, Lsn, TimelineId};
use highwater_store::Object;

use crate::error::Result;
use crate::frontier::Position;
use crate::heal::history::whole;
use crate::inventory::timelines;
use crate::region::{Region, get_optional, write_once};
use crate::segmenter::object_start;
use crate::uploader::Shared;

/// What follows where the source has nothing more on a timeline.
pub(super) enum Next {
    /// The timeline that follows it there; its history is stored.
    Entered(Position),
    /// It is not to be entered before the rest of this timeline is there, which ends here; none if no history says where.
    Later(Option<Lsn>),
}

/// The source has nothing more on this timeline: goes on to the one that follows it there, if any.
pub(super) async fn next_timeline(
    shared: &Shared,
    region: &Region,
    source: &Region,
    from: Position,
) -> Result<Next> {
    let layout = &shared.archive.layout;
    let mut first = None::<Lsn>;
    // The source may have lost what this process stored there.
    let streamed = shared.window.histories();
    let mut later: BTreeSet<_> = timelines(&*source.quick, layout).await?.into_iter().collect();
    later.extend(streamed.keys());
    later.retain(|id| *id > from.timeline);
    let leads_on = leads_on(shared, source, &streamed, from.timeline).await?;
    for timeline in later {
        // One that was given up leads nowhere: what it holds is copied behind the region's position ([`crate::heal`]).
        if leads_on.is_some_and(|next| next != timeline) {
            continue;
        }
        let known = history(source, layout, &streamed, timeline).await?;
        let Some((content, history)) = known else {
            continue;
        };
        let Some(switch) = child_of(&history, from.timeline) else {
            continue;
        };
        if from.lsn < switch {
            // The rest of this timeline is missing in the source too: the next one is not to be counted before it.
            first = Some(first.map_or(switch, |first| first.min(switch)));
            continue;
        }
        write_once(&*region.store, &layout.history(timeline), Object::new(content)).await?;
        let position = Position {
            timeline,
            lsn: object_start(shared.segment_size, switch),
        };
        shared.progress.stored(region.index, position);
        return Ok(Next::Entered(position));
    }
    Ok(Next::Later(first))
}

/// The child of `parent` from which the newest timeline descends, or which is that; none if its history does not say.
async fn leads_on(
    shared: &Shared,
    source: &Region,
    streamed: &BTreeMap<TimelineId, Bytes>,
    parent: TimelineId,
) -> Result<Option<TimelineId>> {
    let furthest = shared.progress.furthest().map(|at| at.timeline);
    let Some(newest) = furthest.max(streamed.keys().next_back().copied()) else {
        return Ok(None);
    };
    let Some((_, history)) = history(source, &shared.archive.layout, streamed, newest).await? else {
        return Ok(None);
    };
    let descent: Vec<_> = history
        .entries
        .iter()
        .map(|entry| entry.timeline)
        .chain([newest])
        .collect();
    let place = descent.iter().position(|timeline| *timeline == parent);
    Ok(place.and_then(|place| descent.get(place + 1).copied()))
}

/// Where a timeline left `parent`, if it is a child of that.
fn child_of(history: &History, parent: TimelineId) -> Option<Lsn> {
    let entry = history.parent().filter(|entry| entry.timeline == parent)?;
    Some(entry.switch)
}

/// The history of `timeline`, as bytes and read.
async fn history(
    source: &Region,
    layout: &Layout,
    streamed: &BTreeMap<TimelineId, Bytes>,
    timeline: TimelineId,
) -> Result<Option<(Bytes, History)>> {
    let key = layout.history(timeline);
    let stored = get_optional(&*source.quick, &key).await?;
    let Some(content) = stored.or_else(|| streamed.get(&timeline).cloned()) else {
        return Ok(None);
    };
    // Where the timeline before ends must not be read from what is left of a file.
    let history = whole(&source.name, &key, timeline, &content)?;
    Ok(Some((content, history)))
}
