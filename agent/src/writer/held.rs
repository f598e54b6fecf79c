//! While a claim is held: whether it still is, and being told when it is not.
//!
//! Owns: the looks with every pulse and connection, and what they change. Does not own the rules ([`super::judge`]).

use std::sync::PoisonError;

use highwater_format::{TimelineId, Writer};
use highwater_store::Store;

use super::claim::{GRACE, create, name, newest_of};
use super::judge::{Sign, Standing, Watch, above_a_stray, is_beside, standing};
use super::{Claims, Held, newest};
use crate::error::{AgentError, Result};
use crate::inventory;
use crate::region::Region;

impl Claims {
    pub(super) fn hold(&self, claim: Option<Writer>) {
        let epoch = claim.as_ref().map_or(0, |claim| claim.epoch);
        self.held.send_replace(Held { claim, fenced: None });
        self.state.update(|snapshot| snapshot.writer_epoch = epoch);
    }

    pub(super) async fn still_holds(&self, own: Writer) -> Result<()> {
        // While no region answers nothing can be stored either; the next pulse that gets through looks again.
        let told = tokio::time::timeout(GRACE, self.read()).await;
        let told = told.ok().and_then(Result::ok).unwrap_or_default();
        let holder = match newest(&told) {
            Some(newest) => standing(&own, newest),
            None => self
                .held
                .borrow()
                .fenced
                .clone()
                .map_or(Standing::Holds, Standing::Fenced),
        };
        if let Standing::Fenced(holder) = holder {
            let error = fenced(own.timeline, &holder);
            self.fence(&own, holder);
            return Err(error);
        }
        self.hold(Some(own));
        Ok(())
    }

    /// With each pulse: whether the claim still holds in that region. A region that was away when the claim was
    /// made gets it now. False: this agent has no say there at present, and writes no pulse.
    pub async fn look(&self, region: &Region) -> Result<bool> {
        let Some(own) = self.held.borrow().claim.clone() else {
            return Ok(false);
        };
        let store = &*region.quick;
        let newest = newest_of(store, &self.layout, own.epoch - 1).await?;
        self.away().remove(&region.index);
        if let Some(epoch) = newest.as_ref().and_then(|newest| above_a_stray(&own, newest)) {
            return self.claim_above(store, &own, epoch).await;
        }
        match newest {
            None => create(store, &self.layout, &own).await,
            Some(newest) => match standing(&own, &newest) {
                Standing::Holds if is_beside(&own, &newest) => self.beside(region, &own, newest).await,
                Standing::Holds => Ok(true),
                Standing::Fenced(holder) => {
                    self.fence(&own, holder);
                    Ok(false)
                }
            },
        }
    }

    /// Another process has claimed our timeline after us: because it saw us silent, or was told to take our place. Its server may be a
    /// copy of ours, so that only one of us may go on once it lives.
    async fn beside(&self, region: &Region, own: &Writer, rival: Writer) -> Result<bool> {
        let pulse = inventory::pulse(&*region.quick, &self.layout).await?;
        let alive = {
            let mut beside = self.beside.lock().unwrap_or_else(PoisonError::into_inner);
            let fresh = || (rival.clone(), Watch::new(&own.instance, None, &rival.instance));
            let (known, watch) = beside.entry(region.index).or_insert_with(fresh);
            if *known != rival {
                (*known, *watch) = fresh();
            }
            pulse.is_some_and(|pulse| {
                pulse.instance == rival.instance
                    && watch.observe(region.index, &pulse, self.interval) == Sign::Alive
            })
        };
        if alive {
            self.fence(own, rival);
        }
        Ok(!alive)
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
