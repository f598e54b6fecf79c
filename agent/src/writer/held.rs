//! While a claim is held: whether it still is, and being told when it is not.
//!
//! Owns: the looks with every pulse and connection, and what they change. Does not own the rules ([`super::judge`]).

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use highwater_format::{Lsn, Pulse, Time, TimelineId, Writer};
use highwater_store::Store;
use tokio::time::Instant;

use super::claim::{
    GRACE, create, epochs, name, newest_above, newest_of_these, older_claim, pulse_of, read_sound,
};
use super::judge::{Sign, Standing, Watch, above_a_stray, rank, standing};
use super::silence::SILENT_FOR;
use super::{Claims, Held, Told};
use crate::error::{AgentError, Result};
use crate::lease::{self, Moment, asked_awake};
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

/// What was heard beside a newer claim.
struct Heard {
    /// Somebody else lives.
    alive: bool,
    /// Who made that claim was silent for longer than one who has just taken a place may need to be heard, and our own server was
    /// not.
    enough: bool,
}

/// A newer claim in a region that does not say that this agent was left behind, and what was seen since.
#[derive(Debug)]
pub(super) struct Beside {
    rival: Writer,
    /// Its claim was there before ours, which has come late.
    older: bool,
    watch: Watch,
    /// For how long nothing has changed, as far as somebody looked.
    silent: Duration,
    looked: Instant,
    /// What our own server had said when this began.
    server: Said,
    /// The archive was claimed above the rival, which, if it lives, will have noticed by then.
    until: Option<Instant>,
}

impl Beside {
    /// The interval of the slower of the two.
    fn interval(&self, ours: Duration) -> Duration {
        self.watch.interval(ours).max(ours)
    }

    /// When the rival must have noticed what is claimed above it now.
    fn noticed_by(&self, ours: Duration) -> Instant {
        Instant::now() + lease::term(self.interval(ours))
    }
}

/// Server time, end of WAL, and when the server answered.
type Said = (Option<Time>, Lsn, Option<Time>);

/// How long a rival is listened for that may have claimed a moment ago: it waits for its own term, begins to stream, and writes a pulse.
fn hearing(interval: Duration) -> Duration {
    /// A start takes its time, however often it pulses afterwards.
    const LEAST: Duration = Duration::from_secs(15);
    (lease::term(interval) + interval * (SILENT_FOR + 2)).max(LEAST)
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
        self.begins_anew_if_displaced()?;
        self.hold(Some(own));
        Ok(())
    }

    /// With each pulse: whether this agent has a say in that region. A region that was away when the claim was made gets it
    /// now. False: it has none there at present, and writes no pulse.
    pub async fn look(&self, region: &Region) -> Result<bool> {
        let held = self.held.borrow().clone();
        let Some(own) = held.claim.filter(|_| held.fenced.is_none()) else {
            return Ok(false);
        };
        let (found, began) = asked_awake(self.interval, self.found_in(region, own)).await;
        match &found {
            Ok(Found::Holds) => {
                self.renew(region, began);
                self.show(region, None);
            }
            Ok(Found::Beside | Found::Lost) => region.lease.revoke(),
            // Nothing was learned: somebody may have claimed where nobody could look.
            Err(error) if !region.lease.is_good() => {
                let why = format!(
                    "nothing is stored before it is known that no other writer has claimed the archive: {error}"
                );
                self.show(region, Some(why));
            }
            Err(_) => {}
        }
        Ok(found? != Found::Lost)
    }

    /// Why nothing is stored in a region that would take it.
    fn show(&self, region: &Region, why: Option<String>) {
        let snapshot = self.state.snapshot();
        if snapshot
            .regions
            .get(region.index)
            .is_some_and(|view| view.beside != why)
        {
            self.state.update_region(region.index, |view| view.beside(why));
        }
    }

    /// Not for one who was fenced meanwhile, in this region or another.
    fn renew(&self, region: &Region, began: Option<Moment>) {
        let held = self.held.borrow();
        if let (Some(began), Some(_), None) = (began, &held.claim, &held.fenced) {
            region.lease.looked(began);
        }
    }

    async fn found_in(&self, region: &Region, own: Writer) -> Result<Found> {
        let store = &*region.quick;
        let listed = epochs(store, &self.layout, own.epoch - 1).await?;
        self.away().remove(&region.index);
        if listed == [own.epoch] && self.known().get(&region.index) == Some(&own.epoch) {
            return self.settled(region, &own).await;
        }
        let (newest, damaged) = newest_of_these(store, &self.layout, listed).await?;
        if newest
            .as_ref()
            .is_some_and(|newest| newest.instance == own.instance)
        {
            self.known()
                .extend(newest.as_ref().map(|newest| (region.index, newest.epoch)));
        }
        let stray = newest.as_ref().and_then(|newest| above_a_stray(&own, newest));
        let holds = match (stray, newest) {
            (Some(epoch), _) => {
                let placed = self.claim_above(store, &own, epoch).await;
                self.wait_again(region);
                placed?
            }
            (None, None) => {
                self.is_still_there(region, &own).await?;
                self.succeed(region, &own).await?;
                // Where our own is damaged, or another's that has its number.
                create(store, &self.layout, &own).await?
                    || damaged.is_some() && self.claim_above(store, &own, own.epoch + 1).await?
            }
            (None, Some(newest)) => match standing(&own, &newest) {
                Standing::Holds => true,
                Standing::Beside(rival) => return self.beside(region, &own, rival).await,
                Standing::Fenced(holder) => {
                    self.fence(&own, holder);
                    false
                }
            },
        };
        match holds {
            true => self.settled(region, &own).await,
            false => Ok(Found::Lost),
        }
    }

    /// No newer claim is in the way. Where our own came late, whoever was there before must have noticed; where there was a newer one,
    /// its writer must have left nothing, too, that we do not know of.
    async fn settled(&self, region: &Region, own: &Writer) -> Result<Found> {
        if self.is_waited_for(region) {
            return Ok(Found::Beside);
        }
        let rival = self
            .besides()
            .get(&region.index)
            .map(|known| (known.rival.clone(), known.older));
        if let Some((rival, false)) = &rival {
            self.nothing_came_between(region, own, rival).await?;
        }
        if rival.is_some() {
            self.forget(region);
        }
        Ok(Found::Holds)
    }

    /// Another process has claimed after us what is no later than our timeline: because it saw us silent, was told to take our place,
    /// or did so where we could not see it. Whose claim it was may be dead, and hide another's that lives: of those who live only
    /// one may go on, and until that is known nothing is stored here.
    async fn beside(&self, region: &Region, own: &Writer, rival: Writer) -> Result<Found> {
        let here = self.regions.iter().filter(|known| known.index == region.index);
        let here: Told = here.map(|region| (region.clone(), None)).collect();
        if self.is_gone(&here, Some(&rival)).await? {
            return self.above_the_gone(region, own, &rival).await;
        }
        let pulse = pulse_of(&*region.quick, &self.layout).await?;
        let heard = self.heard_beside(region, own, &rival, pulse.as_ref());
        if let Some(pulse) = pulse.filter(|_| heard.alive) {
            let theirs = match pulse.instance == rival.instance {
                true => Some(rival.clone()),
                false => older_claim(&*region.quick, &self.layout, &pulse.instance).await?,
            };
            match theirs {
                // It is that one which has to give way, as its own looks tell it; of the rival nothing is known by that.
                Some(theirs) if rank(&theirs) < rank(own) => {}
                // It could not see our claim when it made its own, and what we store comes after all that it ever will.
                Some(theirs) if theirs.timeline < own.timeline && self.has_begun(own.timeline) => {
                    return self.claim_back(region, own, &rival).await;
                }
                theirs => {
                    // Who cannot be named lives all the same.
                    self.fence(own, theirs.unwrap_or(rival));
                    return Ok(Found::Lost);
                }
            }
        }
        match heard.enough {
            true => self.claim_back(region, own, &rival).await,
            false => Ok(Found::Beside),
        }
    }

    /// Who made the newest claim has ended: it is ours again, once what was stored meanwhile is known.
    async fn above_the_gone(&self, region: &Region, own: &Writer, rival: &Writer) -> Result<Found> {
        self.nothing_came_between(region, own, rival).await?;
        let placed = self.claim_above(&*region.quick, own, rival.epoch + 1).await?;
        match placed {
            true => self.settled(region, own).await,
            false => Ok(Found::Beside),
        }
    }

    /// What the pulses of a region, looked at since `rival` was first seen there, have told.
    fn heard_beside(&self, region: &Region, own: &Writer, rival: &Writer, pulse: Option<&Pulse>) -> Heard {
        if !self.is_writer() {
            return Heard {
                alive: false,
                enough: false,
            };
        }
        let mut beside = self.besides();
        let fresh = || {
            tracing::warn!(
                region = region.name, rival = %name(rival),
                "another process has made a newer claim there: nothing is stored before it is known whether it lives"
            );
            self.listen_to(region, own, rival)
        };
        let known = beside.entry(region.index).or_insert_with(fresh);
        if known.rival != *rival {
            *known = fresh();
        }
        // What nobody has listened to was not silence.
        let since = known.looked.elapsed().min(self.interval);
        known.looked = Instant::now();
        let sign = known.watch.observe(region.index, pulse, self.interval);
        known.silent = match sign {
            Sign::Changed => Duration::ZERO,
            // Who goes on being heard is either what we give way to, or one that gives way to us.
            Sign::None | Sign::Alive => known.silent + since,
        };
        Heard {
            alive: sign == Sign::Alive,
            enough: known.silent >= hearing(known.interval(self.interval))
                && known.server != self.server_said(),
        }
    }

    /// Begins to listen for the one that made a claim in a region.
    fn listen_to(&self, region: &Region, own: &Writer, rival: &Writer) -> Beside {
        let why = format!(
            "nothing is stored before it is known whether another writer lives: {}",
            name(rival)
        );
        self.show(region, Some(why));
        Beside {
            rival: rival.clone(),
            older: false,
            watch: Watch::new(&own.instance, None, rival),
            silent: Duration::ZERO,
            looked: Instant::now(),
            server: self.server_said(),
            until: None,
        }
    }

    /// An agent whose own server says nothing takes nobody's place.
    fn server_said(&self) -> Said {
        let snapshot = self.state.snapshot();
        (snapshot.server_time, snapshot.server_end, snapshot.answered_at)
    }

    /// This agent's claim comes to a region late: whoever has the newest one there may not have noticed yet that it is not any more.
    async fn succeed(&self, region: &Region, own: &Writer) -> Result<()> {
        let (before, _) = newest_above(&*region.quick, &self.layout, 0).await?;
        let Some(before) = before.filter(|before| before.instance != own.instance) else {
            return Ok(());
        };
        if !self.is_writer() || self.me.knows_to_be_gone(&before) {
            return Ok(());
        }
        let mut besides = self.besides();
        let older = || Beside {
            older: true,
            ..self.listen_to(region, own, &before)
        };
        let known = besides.entry(region.index).or_insert_with(older);
        let until = known.noticed_by(self.interval);
        known.until.get_or_insert(until);
        Ok(())
    }

    /// The rival is silent. If it lives all the same it finds our new claim above its own, and stops; until it must have, we store
    /// nothing either.
    async fn claim_back(&self, region: &Region, own: &Writer, rival: &Writer) -> Result<Found> {
        if let Some(holder) = self.fencing(own).await? {
            self.fence(own, holder);
            return Ok(Found::Lost);
        }
        tracing::warn!(
            region = region.name, rival = %name(rival),
            "it is silent, or its server was left behind: its place is taken back"
        );
        self.wait_for_rivals();
        let placed = self.claim_above(&*region.quick, own, rival.epoch + 1).await;
        self.wait_for_rivals();
        Ok(if placed? { Found::Beside } else { Found::Lost })
    }

    /// Whether WAL of a timeline was stored anywhere. No agent ever gets in after that whose server is still on an earlier one.
    pub(super) fn has_begun(&self, timeline: TimelineId) -> bool {
        let snapshot = self.state.snapshot();
        snapshot
            .regions
            .iter()
            .any(|view| view.timeline == Some(timeline))
    }

    /// A claim of any region by which this agent was left behind, be it hidden by a newer one.
    async fn fencing(&self, own: &Writer) -> Result<Option<Writer>> {
        let read = self.ask_all(|region| async move {
            for epoch in epochs(&*region.quick, &self.layout, own.epoch).await? {
                let claim = read_sound(&*region.quick, &self.layout, epoch).await?;
                if let Some(Standing::Fenced(holder)) = claim.map(|claim| standing(own, &claim)) {
                    return Ok(Some(holder));
                }
            }
            Ok(None)
        });
        Ok(read.await?.into_iter().find_map(|(_, holder)| holder))
    }

    /// The answer to a claim may be lost: it counts from before it was made, and from after.
    fn wait_for_rivals(&self) {
        for known in self.besides().values_mut() {
            known.until = Some(known.noticed_by(self.interval));
        }
    }

    /// The same for a region in which such a claim has arrived now.
    fn wait_again(&self, region: &Region) {
        if let Some(known) = self.besides().get_mut(&region.index)
            && known.until.is_some()
        {
            known.until = Some(known.noticed_by(self.interval));
        }
    }

    /// Whether a rival whose place was taken back there may not have noticed yet.
    fn is_waited_for(&self, region: &Region) -> bool {
        let beside = self.besides();
        let until = beside.get(&region.index).and_then(|known| known.until);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Nobody else's claim is newer there any more, or who made it is known to have ended.
    fn forget(&self, region: &Region) {
        if self.besides().remove(&region.index).is_some() {
            tracing::info!(
                region = region.name,
                "no other writer lives: storing goes on there"
            );
            self.show(region, None);
        }
    }

    /// This agent writes nothing anyway.
    pub(super) fn listens_no_more(&self) {
        self.besides().clear();
        self.regions.iter().for_each(|region| self.show(region, None));
    }

    pub(super) fn known(&self) -> MutexGuard<'_, BTreeMap<usize, u64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn besides(&self) -> MutexGuard<'_, BTreeMap<usize, Beside>> {
        self.beside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims what is held again, with a higher epoch. The other regions get it with their next look.
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
        // On a later timeline it stores beside nothing of ours.
        let displaces = !matches!(standing(own, &holder), Standing::Fenced(_));
        let changed = self.held.send_if_modified(|held| {
            let ours = held.claim.as_ref() == Some(own);
            let changed = ours && held.fenced.as_ref() != Some(&holder);
            if ours {
                held.fenced = Some(holder);
            }
            changed
        });
        if changed {
            if displaces {
                self.note_displaced();
            }
            self.regions.iter().for_each(|region| region.lease.revoke());
            self.listens_no_more();
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
