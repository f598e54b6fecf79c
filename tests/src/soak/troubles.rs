//! What goes wrong for a while, beside whatever comes next.
//!
//! Owns: beginning and ending such troubles. Several last at the same time: both regions may be away, and an agent may
//! be killed and start again meanwhile.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::site::Soaked;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The region hangs.
    Frozen(usize),
    /// Nobody listens at the region.
    Down(usize),
    /// Every so many requests of the region fail with this status.
    Storm(usize, u64, u16),
    AgentStopped,
    StreamFrozen,
}

impl Trouble {
    /// Two of the same kind at the same place are one, which lasts as long as the later one says.
    fn is_as(self, other: Self) -> bool {
        match (self, other) {
            (Trouble::Storm(one, ..), Trouble::Storm(two, ..)) => one == two,
            _ => self == other,
        }
    }

    fn set(self, soaked: &mut Soaked, on: bool) {
        let faults = |region: usize| soaked.site.regions[region].faults().clone();
        match (self, on) {
            (Trouble::Frozen(region), true) => faults(region).freeze(),
            (Trouble::Frozen(region), false) => faults(region).thaw(),
            (Trouble::Down(region), _) => faults(region).refuse(on),
            (Trouble::Storm(region, every, status), true) => faults(region).fail_every(every, status),
            (Trouble::Storm(region, ..), false) => faults(region).fail_every(0, 0),
            (Trouble::AgentStopped, true) => soaked.agent.signal(Signal::SIGSTOP),
            // One that was started meanwhile does not mind.
            (Trouble::AgentStopped, false) => soaked.agent.signal(Signal::SIGCONT),
            (Trouble::StreamFrozen, _) => soaked.site.tap.freeze(on),
        }
    }
}

/// The troubles of the moment, and when each of them ends.
#[derive(Debug, Default)]
pub(super) struct Troubles(Vec<(Instant, Trouble)>);

impl Soaked {
    /// Begins a trouble that ends by itself.
    pub(super) fn suffers(&mut self, trouble: Trouble, length: Duration) {
        self.troubles.0.retain(|(_, other)| !other.is_as(trouble));
        self.troubles.0.push((Instant::now() + length, trouble));
        trouble.set(self, true);
    }

    /// Lets time pass, in which troubles end.
    pub(super) async fn lives_on(&mut self, length: Duration) {
        let until = Instant::now() + length;
        loop {
            let now = Instant::now();
            self.recovers(|end| end <= now);
            let next = self.troubles.0.iter().map(|(end, _)| *end).min();
            let wake = next.map_or(until, |next| next.min(until));
            if now >= until {
                return;
            }
            tokio::time::sleep_until(wake.into()).await;
        }
    }

    /// Nothing is wrong any more.
    pub(super) fn recovers_from_all(&mut self) {
        self.recovers(|_| true);
        self.site
            .regions
            .iter()
            .for_each(|region| region.faults().clear());
    }

    fn recovers(&mut self, is_over: impl Fn(Instant) -> bool) {
        let (over, left) = std::mem::take(&mut self.troubles.0)
            .into_iter()
            .partition(|(end, _)| is_over(*end));
        self.troubles.0 = left;
        let over: Vec<(Instant, Trouble)> = over;
        over.into_iter().for_each(|(_, trouble)| trouble.set(self, false));
    }
}
