//! While a claim is held: whether it still is, and being told when it is not.
//!
//! Owns: the looks with every pulse and connection, and what they change. Does not own the rules ([`super::judge`]).

use std::sync::PoisonError;

use highwater_format::{Pulse, TimelineId, Writer};
use highwater_store::Store;
use tokio::time::Instant;

use super::claim::{GRACE, create, name, newest_of, older_claim};
use super::judge::{Sign, Standing, Watch, above_a_stray, rank, standing};
use super::silence::SILENT_FOR;
use super::{Claims, Held, Told};
use crate::error::{AgentError, Kind, Result};
use crate::inventory;
use crate::lease::Moment;
use crate::region::Region;

/// What a look has found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Found {
    /// The claim is the newest, or whoever made a newer one has to give way or is dead.
    Holds,
    /// There is a newer one, and it is not known yet whether anybody else lives.
    Beside,
    /// This agent has no say here.
    Lost,
}

fn holds_if(holds: bool) -> Found {
    if holds { Found::Holds } else { Found::Lost }
}

/// Whether anybody else lives.
enum Life {
    Shown,
    Unknown,
    /// Silent for as long as is waited for before a writer's place is taken.
    None,
}

/// A newer claim in a region that does not say that this agent was left behind, and what was seen since.
#[derive(Debug)]
pub(super) struct Beside {
    rival: Writer,
    watch: Watch,
    changed: Instant,
}

impl Claims {
    /// Whoever holds a claim writes where he has looked; nothing more is allowed to one who has just lost it.
    pub(super) fn hold(&self, claim: Option<Writer>) {
        if claim.is_some() {
            self.regions
                .iter()
                .for_each(|region| region.lease.claim(self.interval));
        }
        let epoch = claim.as_ref().map_or(0, |claim| claim.epoch);
        self.held.send_replace(Held { claim, fenced: None });
        self.state.update(|snapshot| snapshot.writer_epoch = epoch);
    }

    pub(super) async fn still_holds(&self, own: Writer) -> Result<()> {
        // While no region answers nothing can be stored either; the next pulse that gets through looks again.
        let told = tokio::time::timeout(GRACE, self.read()).await;
        let told = told.ok().and_then(Result::ok).unwrap_or_default();
        let claims: Vec<&Writer> = told.iter().filter_map(|(_, claim)| claim.as_ref()).collect();
        // Not the newest alone: a dead claim that one region has kept may be newer than the one that fences.
        let fencing = |claim: &&Writer| match standing(&own, claim) {
            Standing::Fenced(holder) => Some(holder),
            Standing::Holds | Standing::Beside(_) => None,
        };
        let holder = match claims.is_empty() {
            true => self.held.borrow().fenced.clone(),
            false => claims.iter().find_map(fencing),
        };
        if let Some(holder) = holder {
            let error = fenced(own.timeline, &holder);
            self.fence(&own, holder);
            return Err(error);
        }
        self.hold(Some(own));
        Ok(())
    }

    /// With each pulse: whether this agent has a say in that region. A region that was away when the claim was made gets it
    /// now. False: it has none there at present, and writes no pulse.
    pub async fn look(&self, region: &Region) -> Result<bool> {
        let Some(own) = self.held.borrow().claim.clone() else {
            return Ok(false);
        };
        let began = Moment::now();
        let found = self.found_in(region, own).await;
        match &found {
            Ok(Found::Holds) => region.lease.looked(began),
            // Somebody may have claimed where nobody could look.
            Err(error) if error.kind() == Kind::Retry => {}
            // What cannot be read fences nobody.
            Err(_) => region.lease.looked(began),
            Ok(Found::Beside | Found::Lost) => {}
        }
        Ok(found? != Found::Lost)
    }

    async fn found_in(&self, region: &Region, own: Writer) -> Result<Found> {
        let store = &*region.quick;
        let newest = newest_of(store, &self.layout, own.epoch - 1).await?;
        self.away().remove(&region.index);
        if let Some(epoch) = newest.as_ref().and_then(|newest| above_a_stray(&own, newest)) {
            return Ok(holds_if(self.claim_above(store, &own, epoch).await?));
        }
        match newest {
            None => Ok(holds_if(create(store, &self.layout, &own).await?)),
            Some(newest) => match standing(&own, &newest) {
                Standing::Holds => Ok(Found::Holds),
                Standing::Beside(rival) => self.beside(region, &own, rival).await,
                Standing::Fenced(holder) => {
                    self.fence(&own, holder);
                    Ok(Found::Lost)
                }
            },
        }
    }

    /// Another process has claimed after us what is no later than our timeline: because it saw us silent, was told to take our place,
    /// or did so where we could not see it. Whose claim it was may be dead, and hide another's that lives: of those who live only
    /// one may go on, and until that is known nothing is stored here.
    async fn beside(&self, region: &Region, own: &Writer, rival: Writer) -> Result<Found> {
        let here = self.regions.iter().filter(|known| known.index == region.index);
        let here: Told = here.map(|region| (region.clone(), None)).collect();
        if self.is_gone(&here, Some(&rival)).await? {
            return Ok(Found::Holds);
        }
        let pulse = match inventory::pulse(&*region.quick, &self.layout).await {
            // The next one replaces it.
            Err(AgentError::Object { .. }) => None,
            pulse => pulse?,
        };
        let life = self.life_beside(region.index, own, &rival, pulse.as_ref());
        let pulse = match (life, pulse) {
            (Life::Shown, Some(pulse)) => pulse,
            (Life::None, _) => return Ok(Found::Holds),
            _ => return Ok(Found::Beside),
        };
        let theirs = match pulse.instance == rival.instance {
            true => Some(rival.clone()),
            // Who cannot be named lives all the same.
            false => older_claim(&*region.quick, &self.layout, &pulse.instance)
                .await
                .ok()
                .flatten(),
        };
        match theirs {
            // It is that one which has to give way, as its own looks tell it.
            Some(theirs) if rank(&theirs) < rank(own) => return Ok(Found::Holds),
            Some(theirs) => self.fence(own, theirs),
            None => self.fence(own, rival),
        }
        Ok(Found::Lost)
    }

    /// What the pulses of a region, looked at since `rival` was first seen there, have shown of anybody else.
    fn life_beside(&self, region: usize, own: &Writer, rival: &Writer, pulse: Option<&Pulse>) -> Life {
        let mut beside = self.beside.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || Beside {
            rival: rival.clone(),
            watch: Watch::new(&own.instance, None, &rival.instance),
            changed: Instant::now(),
        };
        let known = beside.entry(region).or_insert_with(fresh);
        if known.rival != *rival {
            *known = fresh();
        }
        match pulse.map_or(Sign::None, |pulse| {
            known.watch.observe(region, pulse, self.interval)
        }) {
            Sign::Alive => Life::Shown,
            Sign::Changed => {
                known.changed = Instant::now();
                Life::Unknown
            }
            Sign::None if known.changed.elapsed() < known.watch.interval(self.interval) * SILENT_FOR => {
                Life::Unknown
            }
            Sign::None => Life::None,
        }
    }

    /// Claims what is held again, above a stray claim. The other regions get it with their next look.
    async fn claim_above(&self, store: &dyn Store, own: &Writer, epoch: u64) -> Result<bool> {
        let again = Writer {
            epoch: self.next_epoch(epoch),
            claimed_at: self.clock.now(),
            ..own.clone()
        };
        if !create(store, &self.layout, &again).await? {
            return Ok(false);
        }
        self.held.send_if_modified(|held| {
            let ours = held.claim.as_ref() == Some(own);
            if ours {
                held.claim = Some(again);
            }
            ours
        });
        Ok(true)
    }

    /// Notes who has taken the place of `own`, unless that is not held any more.
    fn fence(&self, own: &Writer, holder: Writer) {
        let changed = self.held.send_if_modified(|held| {
            let ours = held.claim.as_ref() == Some(own);
            let changed = ours && held.fenced.as_ref() != Some(&holder);
            if ours {
                held.fenced = Some(holder);
            }
            changed
        });
        if changed {
            self.regions.iter().for_each(|region| region.lease.revoke());
            self.state.update(|snapshot| snapshot.writer_epoch = 0);
        }
    }

    /// Returns when another writer has taken this agent's place.
    pub async fn fenced(&self) -> AgentError {
        let mut held = self.held.subscribe();
        loop {
            if let Held {
                claim: Some(own),
                fenced: Some(holder),
            } = &*held.borrow_and_update()
            {
                return fenced(own.timeline, holder);
            }
            if held.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

fn fenced(timeline: TimelineId, holder: &Writer) -> AgentError {
    AgentError::Fenced {
        timeline,
        theirs: holder.timeline,
        holder: name(holder),
    }
}
