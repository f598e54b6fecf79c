//! Filling a region from another one: object by object, verified, in order.
//!
//! Used when a region holds less than the window reaches back to: it was away, or it is new. Owns the
//! copying; does not own the region's position, which the caller reports.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use highwater_format::{History, Lsn, LsnRange, TimelineId};
use highwater_store::Object;

use crate::archived::read_piece;
use crate::blocking;
use crate::error::{AgentError, Kind, Result};
use crate::frontier::Position;
use crate::gap;
use crate::held::Part;
use crate::inventory::{held, timelines};
use crate::region::{Region, get_optional, write_once};
use crate::segmenter::object_start;
use crate::uploader::Shared;

/// How long to wait before looking again when no other region is further, or the one that is fails.
const PAUSE: Duration = Duration::from_millis(500);

/// Where a region that holds no WAL begins: with the oldest gap-free WAL of the furthest region on its
/// timeline, or where the stream begins if no region holds anything.
pub async fn origin(shared: &Shared, region: &Region) -> Result<Position> {
    loop {
        let Some((source, furthest)) = source(shared, region, None) else {
            return Ok(shared.origin);
        };
        match try_origin(shared, region, &source, furthest).await {
            Ok(position) => return Ok(position),
            Err(error) => pause(region, &source, error).await?,
        }
    }
}

async fn try_origin(
    shared: &Shared,
    region: &Region,
    source: &Region,
    furthest: Position,
) -> Result<Position> {
    let layout = &shared.archive.layout;
    for timeline in timelines(&*source.quick, layout).await? {
        if let Some(content) = get_optional(&*source.quick, &layout.history(timeline)).await? {
            write_once(&*region.store, &layout.history(timeline), Object::new(content)).await?;
        }
    }
    let held = held(
        &*source.quick,
        layout,
        shared.segment_size,
        furthest.timeline,
        Lsn::ZERO,
    )
    .await?;
    let run = held.runs().into_iter().find(|run| run.end >= furthest.lsn);
    let lsn = run.map_or(furthest.lsn, |run| run.start);
    tracing::info!(region = region.name, from = source.name, at = %lsn, timeline = %furthest.timeline, "new region: filling it");
    Ok(Position {
        timeline: furthest.timeline,
        lsn,
    })
}

/// Copies what the furthest other region holds beyond `position`, and returns how far the region is then.
/// Waits a little and returns `position` itself when nothing can be had.
pub async fn advance(shared: &Shared, region: &Region, position: Position) -> Result<Position> {
    let Some((source, _)) = source(shared, region, Some(position)) else {
        tokio::time::sleep(PAUSE).await;
        return Ok(position);
    };
    match copy(shared, region, &source, position).await {
        Ok(reached) => Ok(reached),
        Err(error) => {
            pause(region, &source, error).await?;
            // What was copied before the failure is in the region already.
            Ok(shared
                .progress
                .position(region.index)
                .map_or(position, |at| at.max(position)))
        }
    }
}

/// Waits after a failure that time or another source may cure; passes on what they cannot.
async fn pause(region: &Region, source: &Region, error: AgentError) -> Result<()> {
    // Damage in the source may be healed there, or a third region may have the object; a conflict is in the
    // region that is being filled.
    if matches!(error, AgentError::Conflict { .. }) || matches!(error.kind(), Kind::Bug | Kind::Cancelled) {
        return Err(error);
    }
    tracing::warn!(region = region.name, from = source.name, %error, "cannot fill the region, trying again");
    tokio::time::sleep(PAUSE).await;
    Ok(())
}

/// The region that is furthest, if it is further than `than`.
fn source(shared: &Shared, region: &Region, than: Option<Position>) -> Option<(Arc<Region>, Position)> {
    let others = shared
        .archive
        .regions
        .iter()
        .filter(|other| other.index != region.index);
    let positions = others.filter_map(|other| Some((other.clone(), shared.progress.position(other.index)?)));
    positions
        .filter(|(_, at)| than.is_none_or(|than| *at > than))
        .max_by_key(|(_, at)| *at)
}

async fn copy(shared: &Shared, region: &Region, source: &Region, from: Position) -> Result<Position> {
    let (layout, size) = (&shared.archive.layout, shared.segment_size);
    let held = held(&*source.quick, layout, size, from.timeline, from.lsn).await?;
    let end = held.contiguous_end(from.lsn);
    if end <= from.lsn {
        return next_timeline(shared, region, source, from).await;
    }
    let parts = held
        .parts(LsnRange { start: from.lsn, end })
        .map_err(|hole| AgentError::Bug(hole.to_string()))?;
    let mut position = from;
    for part in parts {
        let piece = match part {
            Part::Wal(piece) => piece,
            Part::Gap(range) => {
                gap::copy(&shared.archive, source, region, from.timeline, range).await?;
                position.lsn = position.lsn.max(range.end);
                shared.progress.stored(region.index, position);
                continue;
            }
        };
        let (key, bytes, object) =
            read_piece(&shared.archive, &*source.quick, size, from.timeline, &piece).await?;
        blocking::run("checking an object", move || verify(&object))
            .await?
            .map_err(|source_error| AgentError::Object {
                region: source.name.clone(),
                key: key.clone(),
                source: source_error,
            })?;
        write_once(&*region.store, &key, Object::new(bytes)).await?;
        position.lsn = position.lsn.max(piece.range.end);
        shared.progress.stored(region.index, position);
    }
    Ok(position)
}

/// Decodes every frame, so that damage is not copied.
fn verify(object: &highwater_format::Object) -> Result<(), highwater_format::FormatError> {
    let mut plain = Vec::new();
    object.frames().try_for_each(|frame| {
        plain.clear();
        frame.decode_into(&mut plain)
    })
}

/// The source has nothing more on this timeline: goes on to the one that follows it there, if any.
async fn next_timeline(
    shared: &Shared,
    region: &Region,
    source: &Region,
    from: Position,
) -> Result<Position> {
    let layout = &shared.archive.layout;
    for timeline in timelines(&*source.quick, layout)
        .await?
        .into_iter()
        .filter(|id| *id > from.timeline)
    {
        let Some((content, switch)) = descent(source, layout, timeline, from.timeline).await? else {
            continue;
        };
        write_once(&*region.store, &layout.history(timeline), Object::new(content)).await?;
        let position = Position {
            timeline,
            lsn: object_start(shared.segment_size, switch),
        };
        shared.progress.stored(region.index, position);
        return Ok(position);
    }
    tokio::time::sleep(PAUSE).await;
    Ok(from)
}

/// The history of `timeline` and where it began, if it is a child of `parent`.
async fn descent(
    source: &Region,
    layout: &highwater_format::Layout,
    timeline: TimelineId,
    parent: TimelineId,
) -> Result<Option<(Bytes, Lsn)>> {
    let key = layout.history(timeline);
    let Some(content) = get_optional(&*source.quick, &key).await? else {
        return Ok(None);
    };
    let history = History::parse(timeline, &content).map_err(|error| {
        AgentError::refused(
            format!("region {}: {key} cannot be read: {error}", source.name),
            "Compare it with the other regions and run `highwater-restore verify`",
        )
    })?;
    let child = history.parent().filter(|entry| entry.timeline == parent);
    Ok(child.map(|entry| (content.clone(), entry.switch)))
}
