//! Filling a region from another one: object by object, verified, in order.
//!
//! Used when a region holds less than the window reaches back to: it was away, or it is new. Owns the
//! copying; does not own the region's position, which the caller reports.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::{History, Lsn, LsnRange, TimelineId};
use highwater_store::Object;

use crate::archived::{read_piece, verify};
use crate::blocking;
use crate::error::{AgentError, Kind, Result};
use crate::frontier::{DurableLsn, Position};
use crate::gap;
use crate::heal::listing::Listing;
use crate::held::Part;
use crate::inventory::{held, timelines};
use crate::region::{Region, get_optional, write_once};
use crate::segmenter::object_start;
use crate::uploader::Shared;

/// How long to wait before looking again when no other region is further, or the one that is fails.
const PAUSE: Duration = Duration::from_millis(500);

/// Where a region that holds no WAL begins: where PostgreSQL has been told that everything before is safe. So
/// the region counts for all that will be acknowledged from now on as soon as it has caught up with the
/// present, and what is older is filled in behind ([`crate::heal`]). Where no region holds WAL from there on,
/// it begins with the gap-free WAL of the furthest region, or where the stream does.
pub async fn origin(shared: &Shared, region: &Region) -> Result<Position> {
    loop {
        let sources = sources(shared, region, None);
        if sources.is_empty() {
            return Ok(shared.origin);
        }
        for (source, furthest) in sources {
            match try_origin(shared, region, &source, furthest).await {
                Ok(position) => return Ok(position),
                Err(error) => pass_over(region, &source, error)?,
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn try_origin(
    shared: &Shared,
    region: &Region,
    source: &Region,
    furthest: Position,
) -> Result<Position> {
    let (layout, size) = (&shared.archive.layout, shared.segment_size);
    for timeline in timelines(&*source.quick, layout).await? {
        if let Some(content) = get_optional(&*source.quick, &layout.history(timeline)).await? {
            write_once(&*region.store, &layout.history(timeline), Object::new(content)).await?;
        }
    }
    let durable = shared.progress.durable().map(DurableLsn::position);
    let told = durable.or(shared.acknowledged).unwrap_or(furthest).min(furthest);
    let beyond = held(&*source.quick, layout, size, told.timeline, told.lsn).await?;
    let goes_on = told == furthest || beyond.contiguous_end(told.lsn) > told.lsn;
    let at = if goes_on {
        told
    } else {
        let held = held(&*source.quick, layout, size, furthest.timeline, Lsn::ZERO).await?;
        let run = held.runs().into_iter().find(|run| run.end >= furthest.lsn);
        // Nobody may count for WAL that the source has and does not show.
        let run = run.ok_or_else(|| AgentError::Trouble {
            what: format!(
                "region {} does not list the WAL that it holds up to {furthest}",
                source.name
            ),
            next: "It is asked again: its listing may lag".into(),
        })?;
        Position {
            timeline: furthest.timeline,
            lsn: run.start,
        }
    };
    // At the first start of an archive there is nothing older.
    if at != shared.origin {
        tracing::warn!(
            region = region.name, from = source.name, %at,
            "the region holds no WAL: it counts for what comes after this position, and what is older is copied from the others"
        );
    }
    Ok(at)
}

/// Copies what the furthest other region holds beyond `position`, and returns how far the region is then.
/// Waits a little and returns `position` itself when nothing can be had.
pub async fn advance(shared: &Shared, region: &Region, position: Position) -> Result<Position> {
    let sources = sources(shared, region, Some(position));
    for (source, _) in &sources {
        match copy(shared, region, source, position).await {
            Ok(reached) if reached > position => return Ok(reached),
            Ok(_) => {}
            Err(error) => {
                pass_over(region, source, error)?;
                // What was copied before the failure is in the region already.
                let reached = shared.progress.position(region.index).filter(|at| *at > position);
                if let Some(reached) = reached {
                    return Ok(reached);
                }
            }
        }
    }
    if !sources.is_empty() {
        let why =
            || format!("no other region could give the WAL that follows {position}; it is asked for again");
        shared.state.update_region(region.index, |view| {
            view.last_error.get_or_insert_with(why);
        });
    }
    tokio::time::sleep(PAUSE).await;
    Ok(position)
}

/// After a failure that time or another source may cure; passes on what they cannot.
fn pass_over(region: &Region, source: &Region, error: AgentError) -> Result<()> {
    // Damage in the source may be healed there, or a third region may have the object; a conflict is in the
    // region that is being filled.
    if matches!(error, AgentError::Conflict { .. }) || matches!(error.kind(), Kind::Bug | Kind::Cancelled) {
        return Err(error);
    }
    tracing::warn!(region = region.name, from = source.name, %error, "cannot fill the region from there, trying again");
    Ok(())
}

/// The other regions that are further than `than`, the furthest first.
fn sources(shared: &Shared, region: &Region, than: Option<Position>) -> Vec<(Arc<Region>, Position)> {
    let others = shared
        .archive
        .regions
        .iter()
        .filter(|other| other.index != region.index);
    let mut found: Vec<_> = others
        .filter_map(|other| Some((other.clone(), shared.progress.position(other.index)?)))
        .filter(|(_, at)| than.is_none_or(|than| *at > than))
        .collect();
    found.sort_by(|(_, a), (_, b)| b.cmp(a));
    found
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
        match part {
            Part::Wal(piece) => copy_piece(shared, region, source, from.timeline, &piece).await?,
            Part::Gap(range) => {
                gap::copy(&shared.archive, source, region, from.timeline, range).await?;
            }
        }
        position.lsn = position.lsn.max(part.range().end);
        shared.progress.stored(region.index, position);
    }
    Ok(position)
}

/// One object; where it is damaged, the chunks that it made superfluous.
async fn copy_piece(
    shared: &Shared,
    region: &Region,
    source: &Region,
    timeline: TimelineId,
    piece: &Piece,
) -> Result<()> {
    let damage = match copy_object(shared, region, source, timeline, piece).await {
        Err(error @ AgentError::Object { .. }) if piece.kind == PieceKind::Segment => error,
        done => return done,
    };
    tracing::error!(region = region.name, from = source.name, error = %damage, "a damaged segment is not copied; its chunks are, if they are there");
    let listing = Listing {
        layout: &shared.archive.layout,
        size: shared.segment_size,
    };
    let around = listing.around(&*source.quick, timeline, piece.range).await?;
    let chunks = around.into_iter().filter(|other| other.kind == PieceKind::Tail);
    let Ok(chunks) = chunks.collect::<Coverage>().cover(piece.range) else {
        return Err(damage);
    };
    for chunk in chunks {
        copy_object(shared, region, source, timeline, &chunk).await?;
    }
    Ok(())
}

async fn copy_object(
    shared: &Shared,
    region: &Region,
    source: &Region,
    timeline: TimelineId,
    piece: &Piece,
) -> Result<()> {
    let _charge = shared.budget.charge(piece.size);
    let (key, bytes, object) = read_piece(
        &shared.archive,
        &*source.quick,
        shared.segment_size,
        timeline,
        piece,
    )
    .await?;
    blocking::run("checking an object", move || verify(&object))
        .await?
        .map_err(|source_error| AgentError::Object {
            region: source.name.clone(),
            key: key.clone(),
            source: source_error,
        })?;
    write_once(&*region.store, &key, Object::new(bytes)).await?;
    Ok(())
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
        if from.lsn < switch {
            // The rest of this timeline is missing in the source too: the next one is not to be counted before it.
            continue;
        }
        write_once(&*region.store, &layout.history(timeline), Object::new(content)).await?;
        let position = Position {
            timeline,
            lsn: object_start(shared.segment_size, switch),
        };
        shared.progress.stored(region.index, position);
        return Ok(position);
    }
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

#[cfg(test)]
#[path = "backfill_tests.rs"]
mod tests;
