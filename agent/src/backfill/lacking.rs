//! What follows where no region gives the WAL that comes next.
//!
//! Owns: since when it is absent, whether the region may go on behind it, and what the operator is told. Does not own: the
//! proof that nothing gives it ([`crate::salvage`]).

use std::time::Duration;

use tokio::time::Instant;

use crate::frontier::{DurableLsn, Position};
use crate::region::Region;
use crate::salvage::Damage;
use crate::uploader::Shared;

/// For so long a listing that lacks WAL may only lag. After that the WAL is gone. As long as where a stream begins.
const LISTING_LAG: Duration = Duration::from_secs(90);

/// Since when no region lists the WAL that a region needs next.
#[derive(Debug, Default)]
pub struct Absent(Option<(Position, Instant)>);

impl Absent {
    /// Whether the WAL at `position` has been absent for longer than a listing may lag.
    pub(super) fn lasts(&mut self, position: Position) -> bool {
        match self.0 {
            Some((at, since)) if at == position => since.elapsed() >= LISTING_LAG,
            _ => {
                self.0 = Some((position, Instant::now()));
                false
            }
        }
    }

    /// It is there, or not every region has answered.
    pub fn ended(&mut self) {
        self.0 = None;
    }
}

/// What PostgreSQL has been told to be safe.
fn told(shared: &Shared) -> Option<Position> {
    let durable = shared.progress.durable().map(DurableLsn::position);
    durable.max(shared.acknowledged)
}

/// Of WAL that no region lists, the part that was acknowledged; all of it, if its first byte was not. What is absent may
/// be long, and the server still has the rest.
pub(super) fn told_part(shared: &Shared, mut missing: Damage) -> Damage {
    let told = told(shared).filter(|told| told.timeline == missing.timeline);
    if let Some(told) = told.filter(|told| missing.range.contains(told.lsn) && told.lsn > missing.range.start)
    {
        missing.range.end = told.lsn;
    }
    missing
}

/// The position behind WAL that nothing gives, if everything up to there was acknowledged to PostgreSQL before.
pub(super) fn beyond(shared: &Shared, region: &Region, damage: &Damage) -> Option<Position> {
    let behind = Position {
        timeline: damage.timeline,
        lsn: damage.range.end,
    };
    if told(shared)? < behind {
        return None;
    }
    let start = damage.range.start;
    tracing::error!(
        region = region.name, to = %behind,
        "the region goes on behind {damage}. Take a base backup: restores from older ones end at {start}"
    );
    shared.state.update_region(region.index, |view| {
        view.lacks.wal_bytes += damage.range.len();
        if !damage.is_absent() {
            view.lacks.damaged_bytes += damage.range.len();
        }
        view.lacks.detail = Some(damage.as_lack());
    });
    Some(behind)
}

/// Shows that something keeps the region from being filled, or that nothing does any more.
pub(super) fn block(shared: &Shared, region: &Region, why: Option<String>) {
    let before = shared
        .state
        .snapshot()
        .regions
        .get(region.index)
        .and_then(|view| view.blocked.clone());
    if before == why {
        return;
    }
    match &why {
        Some(why) => tracing::error!(region = region.name, "cannot be filled further: {why}"),
        None => tracing::info!(region = region.name, "is filled again"),
    }
    shared
        .state
        .update_region(region.index, |view| view.blocked = why);
}

pub(super) fn blocked_by(damage: &Damage) -> String {
    let put_back = match damage.is_absent() {
        true => "Put the objects back that somebody or a lifecycle rule has removed",
        false => "Put an intact version of the object back where it is damaged",
    };
    format!(
        "it lacks {damage}. Nothing newer counts here: PostgreSQL still keeps that WAL, perhaps as its last copy, and would let \
         it go. {put_back}. Or run the agent with only this region configured, and durability.policy \"all\", until it has \
         caught up: the server sends that WAL again; then put the other regions back. Do not set the policy to \"any\" before \
         both have failed: that gives this WAL up for good, and restores from older base backups end at {}",
        damage.range.start
    )
}
