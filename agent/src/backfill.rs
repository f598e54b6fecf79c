//! Filling a region from another one: object by object, verified, in order.
//!
//! Used when a region holds less than the window reaches back to: it was away, or it is new. Owns the
//! copying; does not own the region's position, which the caller reports.

use std::sync::Arc;
use std::time::Duration;

use highwater_format::coverage::Piece;
use highwater_format::{Lsn, LsnRange, TimelineId};
use highwater_store::Object;

use crate::archived::{read_piece, verify};
use crate::blocking;
use crate::error::{AgentError, Kind, Result};
use crate::frontier::{DurableLsn, Position};
use crate::gap;
use crate::heal::history::whole;
use crate::held::Part;
use crate::inventory::{held, held_next, onward, timelines};
use crate::region::{Region, get_optional, write_once};
use crate::salvage::{self, Damage, Rest};
use crate::state::RegionState;
use crate::uploader::Shared;

mod lacking;
mod next;

pub use lacking::Absent;
use lacking::{beyond, block, blocked_by, is_silence, told_part};
use next::{Next, next_timeline};

/// How long to wait before looking again when no other region is further, or the one that is fails.
const PAUSE: Duration = Duration::from_millis(500);

/// The same where damage stands in the way, which somebody has to mend.
const LONG_PAUSE: Duration = Duration::from_secs(10);

/// Objects that are listed and then copied, before it is looked again what follows.
const AT_ONCE: usize = 1000;

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
    // The server's own are there already.
    let known = |timeline| shared.histories.iter().any(|(known, _)| *known == timeline);
    for timeline in timelines(&*source.quick, layout).await? {
        let key = layout.history(timeline);
        if known(timeline) {
            continue;
        }
        if let Some(content) = get_optional(&*source.quick, &key).await? {
            whole(&source.name, &key, timeline, &content)?;
            write_once(&*region.store, &key, Object::new(content)).await?;
        }
    }
    let durable = shared.progress.durable().map(DurableLsn::position);
    let told = durable.or(shared.kept_from).unwrap_or(furthest).min(furthest);
    let next = LsnRange::new(told.lsn, told.lsn + 1);
    let beyond = held(&*source.quick, layout, size, told.timeline, next).await?;
    let goes_on = told == furthest || beyond.contiguous_end(told.lsn) > told.lsn;
    let at = if goes_on {
        told
    } else {
        let held = held(&*source.quick, layout, size, furthest.timeline, onward(Lsn::ZERO)).await?;
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
///
/// Where WAL is damaged in every region that holds it, in every form, or no region lists it for longer than a listing
/// may lag (`absent` remembers since when), the region's position passes it only if PostgreSQL has been told long ago
/// that it is safe: nothing that is acknowledged later lies in it, and what is missing is filled in behind when an intact
/// copy turns up ([`crate::heal`]). Else the position stays, because PostgreSQL still keeps that WAL and would let it
/// go; status and metrics say so ([`RegionView::blocked`]).
///
/// [`RegionView::blocked`]: crate::state::RegionView::blocked
pub async fn advance(
    shared: &Shared,
    region: &Region,
    position: Position,
    absent: &mut Absent,
) -> Result<Position> {
    let sources = sources(shared, region, Some(position));
    let mut pause = PAUSE;
    let mut hole = None::<LsnRange>;
    let mut silent = !sources.is_empty();
    for (source, furthest) in &sources {
        match copy(shared, region, source, position, *furthest).await {
            Ok(reached) => {
                silent = false;
                hole = smaller(hole, reached.lacks);
                if let Some(at) = settle(shared, region, position, reached, &mut pause) {
                    return Ok(at);
                }
            }
            Err(error) => {
                silent &= is_silence(&error, region);
                pass_over(region, source, error)?;
                // What was copied before the failure is in the region already.
                let reached = shared.progress.position(region.index).filter(|at| *at > position);
                if let Some(reached) = reached {
                    return Ok(reached);
                }
            }
        }
    }
    if let Some(hole) = hole {
        let reached = unlisted(shared, region, position, hole, absent).await?;
        if let Some(at) = settle(shared, region, position, reached, &mut pause) {
            return Ok(at);
        }
    }
    match silent {
        true => absent.silent(shared, region, position).await?,
        false => absent.answered(),
    }
    let why = if sources.is_empty() {
        format!(
            "the WAL that follows {position} is no longer in memory, and no region that has answered holds it. If no other \
             region is on its way back, restart the agent: the server sends it again, as far as the slot keeps it"
        )
    } else {
        format!("no other region could give the WAL that follows {position}; it is asked for again")
    };
    shared.state.update_region(region.index, |view| {
        let why = view.blocked.clone().unwrap_or(why);
        view.pipeline(RegionState::CatchingUp, Some(why));
    });
    tokio::time::sleep(pause).await;
    Ok(position)
}

/// Shows what came of an attempt; the new position if there is one.
fn settle(
    shared: &Shared,
    region: &Region,
    position: Position,
    reached: Reached,
    pause: &mut Duration,
) -> Option<Position> {
    let at = Some(reached.at).filter(|at| *at > position);
    match reached.blocked {
        Some(damage) => {
            *pause = LONG_PAUSE;
            block(shared, region, Some(blocked_by(&damage)));
        }
        None if at.is_some() => block(shared, region, None),
        None => {}
    }
    at
}

/// What two regions lack behind the same place.
fn smaller(one: Option<LsnRange>, other: Option<LsnRange>) -> Option<LsnRange> {
    match (one, other) {
        (Some(one), Some(other)) => Some(LsnRange::new(one.start, one.end.min(other.end))),
        (one, other) => one.or(other),
    }
}

/// Where the regions that are further list nothing that follows `from`: looks for it in all of them, chunks that a larger
/// object made superfluous too.
async fn unlisted(
    shared: &Shared,
    region: &Region,
    from: Position,
    hole: LsnRange,
    absent: &mut Absent,
) -> Result<Reached> {
    let mut reached = Reached::to(from);
    let one = |source: Arc<Region>, piece: Piece| async move {
        copy_object(shared, region, &source, from.timeline, &piece).await
    };
    let filled = salvage::fill(shared, region, from.timeline, hole, one).await?;
    reached.at.lsn = reached.at.lsn.max(filled.reached);
    if reached.at > from {
        shared.progress.stored(region.index, reached.at);
        return Ok(reached);
    }
    match filled.rest {
        Some(Rest::Damaged(damage)) => reached.stopped_by(shared, region, damage),
        Some(Rest::Missing(damage)) if absent.lasts(from) => {
            reached.stopped_by(shared, region, told_part(shared, damage));
        }
        Some(Rest::Unknown(error)) => {
            absent.ended();
            tracing::warn!(region = region.name, %error, "the WAL that follows {from} is in no region that answers");
        }
        Some(Rest::Missing(_)) | None => {}
    }
    Ok(reached)
}

/// After a failure that time or another source may cure; passes on what they cannot.
fn pass_over(region: &Region, source: &Region, error: AgentError) -> Result<()> {
    // Damage in the source may be healed there, or a third region may have the object; a conflict is in the
    // region that is being filled.
    if matches!(error, AgentError::Conflict { .. }) || matches!(error.kind(), Kind::Bug | Kind::Cancelled) {
        return Err(error);
    }
    // What is damaged in this region itself stands in the way of all sources.
    if matches!(&error, AgentError::Object { region: of, .. } if *of == region.name) {
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

/// How far a region was filled.
struct Reached {
    at: Position,
    /// What keeps it there.
    blocked: Option<Damage>,
    /// What the source counts and does not list.
    lacks: Option<LsnRange>,
}

impl Reached {
    fn to(at: Position) -> Self {
        Self {
            at,
            blocked: None,
            lacks: None,
        }
    }

    /// Goes on behind WAL that nothing gives, if that may be.
    fn stopped_by(&mut self, shared: &Shared, region: &Region, damage: Damage) {
        match beyond(shared, region, &damage) {
            Some(behind) => self.at = behind,
            None => self.blocked = Some(damage),
        }
    }
}

async fn copy(
    shared: &Shared,
    region: &Region,
    source: &Region,
    from: Position,
    furthest: Position,
) -> Result<Reached> {
    let (layout, size) = (&shared.archive.layout, shared.segment_size);
    let (held, listed) = held_next(&*source.quick, layout, size, from.timeline, from.lsn, AT_ONCE).await?;
    let end = held.contiguous_end(from.lsn);
    if end <= from.lsn {
        let ends = match furthest.timeline == from.timeline {
            true => Some(furthest.lsn),
            false => match next_timeline(shared, region, source, from).await? {
                Next::Entered(at) => return Ok(Reached::to(at)),
                Next::Later(switch) => switch,
            },
        };
        let next = ends.map(|ends| held.next_start(from.lsn).min(listed).min(ends));
        let lacks = next.map(|next| LsnRange::new(from.lsn, next));
        return Ok(Reached {
            lacks,
            ..Reached::to(from)
        });
    }
    let parts = held
        .parts(LsnRange { start: from.lsn, end })
        .map_err(|hole| AgentError::Bug(hole.to_string()))?;
    let mut position = from;
    for part in parts {
        match part {
            Part::Wal(piece) => {
                let reached = copy_piece(shared, region, source, position, &piece).await?;
                position = reached.at;
                if reached.blocked.is_some() {
                    return Ok(reached);
                }
            }
            Part::Gap(range) => {
                gap::copy(&shared.archive, source, region, from.timeline, range).await?;
                position.lsn = position.lsn.max(range.end);
            }
        }
        shared.progress.stored(region.index, position);
    }
    Ok(Reached::to(position))
}

/// One object; where it cannot be used, what holds the same WAL in any region: the same object, or the chunks that
/// it made superfluous.
async fn copy_piece(
    shared: &Shared,
    region: &Region,
    source: &Region,
    from: Position,
    piece: &Piece,
) -> Result<Reached> {
    let mut at = from;
    match copy_object(shared, region, source, from.timeline, piece).await {
        Ok(()) => {
            at.lsn = at.lsn.max(piece.range.end);
            return Ok(Reached::to(at));
        }
        Err(error) if salvage::is_about_object(&error, region) => {}
        Err(error) => return Err(error),
    }
    while at.lsn < piece.range.end {
        let range = LsnRange::new(at.lsn, piece.range.end);
        let one = |source: Arc<Region>, piece: Piece| async move {
            copy_object(shared, region, &source, from.timeline, &piece).await
        };
        let filled = salvage::fill(shared, region, from.timeline, range, one).await?;
        at.lsn = filled.reached;
        shared.progress.stored(region.index, at);
        match filled.rest {
            None => break,
            Some(Rest::Unknown(error)) => return Err(error),
            Some(Rest::Missing(damage)) => return Err(damage.not_listed()),
            Some(Rest::Damaged(damage)) => {
                let mut reached = Reached::to(at);
                reached.stopped_by(shared, region, damage);
                if reached.blocked.is_some() {
                    return Ok(reached);
                }
                at = reached.at;
            }
        }
    }
    Ok(Reached::to(at))
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

#[cfg(test)]
#[path = "backfill_tests.rs"]
mod tests;
