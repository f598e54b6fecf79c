//! What follows where no region gives the WAL that comes next.
//!
//! Owns: since when it is absent, whether the region may go on behind it, and what the operator is told. Does not own: the
//! proof that nothing gives it ([`crate::salvage`]).

use std::time::Duration;

use highwater_store::{ErrorKind, Operation};
use tokio::time::Instant;

use crate::error::{AgentError, Result};
use crate::frontier::{DurableLsn, Position};
use crate::inventory::LISTING_LAG;
use crate::region::Region;
use crate::salvage::Damage;
use crate::uploader::Shared;

/// For so long the regions that alone hold what the policy waits for may be silent while the server has it too.
const SILENCE: Duration = Duration::from_secs(60);

/// Since when a region lacks what comes next, and why.
#[derive(Debug, Default)]
pub struct Absent {
    /// No region lists it.
    unlisted: Since,
    /// The regions that hold it do not answer.
    silent: Since,
}

/// Since when something is so at a position.
#[derive(Debug, Default)]
struct Since(Option<(Position, Instant)>);

impl Since {
    fn lasts(&mut self, position: Position, limit: Duration) -> bool {
        match self.0 {
            Some((at, since)) if at == position => since.elapsed() >= limit,
            _ => {
                self.0 = Some((position, Instant::now()));
                false
            }
        }
    }
}

impl Absent {
    /// Whether the WAL at `position` has been absent for longer than a listing may lag.
    pub(super) fn lasts(&mut self, position: Position) -> bool {
        self.unlisted.lasts(position, LISTING_LAG)
    }

    /// It is there, or not every region has answered.
    pub fn ended(&mut self) {
        *self = Self::default();
    }

    /// A region that holds it has answered.
    pub(super) fn answered(&mut self) {
        self.silent = Since::default();
    }

    /// None of the regions that hold what follows `position` answers. After a while that is an error which ends the agent, if
    /// nothing behind was acknowledged: then the policy waits for this region, the server still has that WAL, and sends it
    /// to an agent that begins anew with the regions that answer. While this one is silent, too, that would gain nothing.
    pub(super) async fn silent(
        &mut self,
        shared: &Shared,
        region: &Region,
        position: Position,
    ) -> Result<()> {
        let is_told = told(shared).is_some_and(|told| told > position);
        if is_told || !self.silent.lasts(position, SILENCE) {
            return Ok(());
        }
        let own = shared.archive.layout.segment_dir(position.timeline);
        if region.quick.list(&own, None, 1).await.is_err() {
            self.answered();
            return Ok(());
        }
        Err(AgentError::Restart {
            what: format!(
                "the regions that hold the WAL that follows {position} have not answered for {} s, and the policy waits for it",
                SILENCE.as_secs()
            ),
            next: "The agent ends, and is to be started again: the server still has that WAL and sends it to the regions that \
                   answer; the others join when they do"
                .into(),
        })
    }
}

/// Whether an error says that a region other than `target` is away: it cannot even be listed, so that an agent that
/// starts now goes on without it.
pub(super) fn is_silence(error: &AgentError, target: &Region) -> bool {
    match error {
        AgentError::Store(error) => {
            error.region() != target.name
                && error.kind() == ErrorKind::Retry
                && error.operation() == Operation::List
        }
        _ => false,
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
        match damage.is_absent() {
            true => view.passed.push((damage.timeline, damage.range)),
            false => view.lacks.damaged_bytes += damage.range.len(),
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
