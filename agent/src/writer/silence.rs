//! Before another writer's place is taken: whether its side shows signs of life.
//!
//! Owns: watching the pulses of others, and for how long. Does not own what a sign of life is ([`super::judge::Watch`]).

use std::collections::BTreeSet;
use std::sync::Arc;

use highwater_format::{Pulse, Writer};
use tokio::time::Instant;

use super::claim::{ask, name, older_claim, pulse_of};
use super::judge::{Line, Sign, Watch, interval, interval_of};
use super::{Claims, Told};
use crate::error::{AgentError, Kind, Result};
use crate::lease;
use crate::region::Region;

/// The other side of a timeline is silent when its pulses did not change for so many of its own intervals, which its pulses
/// say; for so many of ours where they do not.
pub(crate) const SILENT_FOR: u32 = 3;

/// Looks at the pulses within one interval: often enough to tell apart two writers that overwrite each other's.
const LOOKS: u32 = 4;

impl Claims {
    /// Whether no other process's pulse is in any region. Only asked where the newest claim is our own: then a
    /// silent companion of ours need not be waited for.
    pub(super) async fn is_alone(&self, told: &Told, newest: Option<&Writer>) -> Result<bool> {
        if newest.is_none_or(|claim| claim.instance != self.me.instance) {
            return Ok(false);
        }
        let pulses = self.pulses(told).await?;
        Ok(pulses.iter().all(|(_, pulse)| pulse.instance == self.me.instance))
    }

    /// Whether the process of the newest claim has ended, and so has whoever else was heard last: one whose place was taken for
    /// a moment may have gone on.
    pub(super) async fn is_gone(&self, told: &Told, newest: Option<&Writer>) -> Result<bool> {
        let Some(newest) = newest.filter(|newest| self.me.knows_to_be_gone(newest)) else {
            return Ok(false);
        };
        for (region, pulse) in self.pulses(told).await? {
            if pulse.instance == self.me.instance || pulse.instance == newest.instance {
                continue;
            }
            // Whose claim cannot be found may live: its silence is waited for.
            let claim = older_claim(&*region.quick, &self.layout, &pulse.instance).await;
            if !claim.is_ok_and(|claim| claim.is_some_and(|claim| self.me.knows_to_be_gone(&claim))) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fails with who it is if `holder`'s server, or another one than that on `line`, shows signs of life. Beside a standby the
    /// pulses of its own timeline are those of its primary. True: some agent goes on, though its server says nothing.
    pub(super) async fn must_be_silent(
        &self,
        told: &Told,
        line: Line,
        standby: bool,
        holder: &Writer,
    ) -> Result<bool> {
        tracing::info!(
            holder = %name(holder), ours = %line.timeline,
            "another process is the newest writer: making sure that it is silent"
        );
        let (mut changed, mut watch) = (
            Instant::now(),
            Watch::new(&self.me.instance, standby.then_some(line.timeline), holder),
        );
        let mut last_words = BTreeSet::new();
        loop {
            for (region, pulse) in self.pulses_if_any(told).await? {
                match (watch.observe(region.index, pulse.as_ref(), self.interval), pulse) {
                    (Sign::Alive, Some(pulse)) => {
                        let in_use = self.in_use(&region, &pulse, holder, line).await;
                        // Nobody starts this agent again: of a primary that has just died, two pulses may have been on their way.
                        let is_certain = !last_words.insert(region.index);
                        if is_certain || in_use.kind() != Kind::Damage {
                            return Err(in_use);
                        }
                        changed = Instant::now();
                    }
                    (Sign::Changed, _) => changed = Instant::now(),
                    _ => {}
                }
            }
            let interval = watch.interval(self.interval);
            if changed.elapsed() >= interval * SILENT_FOR {
                tracing::warn!(
                    holder = %name(holder), seconds = changed.elapsed().as_secs(),
                    "it is silent: going on in its place"
                );
                return Ok(watch.beats());
            }
            tokio::time::sleep(interval.min(self.interval) / LOOKS).await;
        }
    }

    /// Our claim is placed, and `holder` may live: waits until whatever it has looked at before counts for nothing to it, so that the
    /// two never write at the same time.
    pub(super) async fn outlast(&self, told: &Told, holder: &Writer) {
        if self.is_gone(told, Some(holder)).await.unwrap_or(false) {
            return;
        }
        let pulses = self.pulses(told).await.unwrap_or_default();
        let others = pulses
            .iter()
            .filter(|(_, pulse)| pulse.instance != self.me.instance);
        let longest = others.map(|(_, pulse)| interval(pulse, self.interval)).max();
        let longest = longest.max(interval_of(holder)).unwrap_or(self.interval);
        let term = lease::term(longest);
        tracing::warn!(
            holder = %name(holder), seconds = term.as_secs(),
            "its place is taken as soon as it must have noticed"
        );
        tokio::time::sleep(term).await;
    }

    async fn in_use(&self, region: &Region, pulse: &Pulse, newest: &Writer, line: Line) -> AgentError {
        let theirs = match older_claim(&*region.quick, &self.layout, &pulse.instance).await {
            Ok(Some(claim)) => Some(claim),
            _ => Some(newest.clone()).filter(|newest| newest.instance == pulse.instance),
        };
        let holder = match &theirs {
            Some(claim) => name(claim),
            None => format!("instance {}", pulse.instance),
        };
        let timeline = line.timeline;
        // Of what is claimed a pulse speaks only when it is streamed.
        let left_behind = match &theirs {
            Some(theirs) => !line.is_of(theirs) && theirs.timeline <= timeline,
            None => pulse.timeline < timeline,
        };
        let (place, reason) = match (pulse.timeline == timeline, line.is_of(newest)) {
            (true, true) => (
                ", too",
                "It is a copy of that one, or the same, which then has two agents",
            ),
            (true, false) => (
                ", begun elsewhere",
                "It is a restored copy, or was promoted beside a primary that lives",
            ),
            (false, _) => (
                "",
                "It is a restored copy, was promoted beside a primary that lives, or is a standby of such a server",
            ),
        };
        AgentError::InUse {
            promoted: left_behind,
            what: format!(
                "this archive is in use: {holder}, and its server is alive at {} on timeline {}; this server is on timeline \
                 {timeline}{place}. {reason}. Nothing was written",
                pulse.wal_end, pulse.timeline
            ),
            next: "Give this server a cluster name or prefix of its own. If it really takes the other one's place, stop that \
                   one first, or start this agent with `run --take-over`"
                .into(),
        }
    }

    async fn pulses(&self, told: &Told) -> Result<Vec<(Arc<Region>, Pulse)>> {
        let read = self.pulses_if_any(told).await?.into_iter();
        Ok(read
            .filter_map(|(region, pulse)| Some((region, pulse?)))
            .collect())
    }

    async fn pulses_if_any(&self, told: &Told) -> Result<Vec<(Arc<Region>, Option<Pulse>)>> {
        let regions = told.iter().map(|(region, _)| region.clone());
        ask(regions, |region| async move {
            pulse_of(&*region.quick, &self.layout).await
        })
        .await
    }
}
