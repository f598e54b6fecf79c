//! The only place of the agent that reads the wall clock.
//!
//! Wall-clock time is for people: pulses, log lines, times in metrics. Nothing that orders or names data
//! depends on it (order comes from LSNs and timelines, stamps from PostgreSQL). Waiting is done with the
//! runtime's timers, which tests can pause. How long something has lasted is taken from a clock that nobody
//! sets: a wall clock that was wrong by hours and is set back would hide for as long that something stands still.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use highwater_format::Time;
use serde::Serialize;

use crate::lease::Moment;

/// A source of the current time: the system's, or one that a test holds and moves.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    held: Option<Arc<AtomicI64>>,
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self { held: None }
    }

    /// A clock that stands at `time` until it is moved.
    pub fn held_at(time: Time) -> Self {
        Self {
            held: Some(Arc::new(AtomicI64::new(time.unix_micros()))),
        }
    }

    /// Moves a held clock; the system clock is left alone.
    pub fn set(&self, time: Time) {
        if let Some(held) = &self.held {
            held.store(time.unix_micros(), Ordering::SeqCst);
        }
    }

    /// Now, by both clocks.
    pub fn stamp(&self) -> Stamp {
        Stamp {
            time: self.now(),
            moment: Moment::now(),
        }
    }

    /// Now, in microseconds UTC.
    pub fn now(&self) -> Time {
        match &self.held {
            Some(held) => Time::from_unix_micros(held.load(Ordering::SeqCst)),
            None => system_now(),
        }
    }
}

/// A moment by two clocks: the wall's, which is shown, and the one that nobody sets, which tells how long ago it was.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(transparent)]
pub struct Stamp {
    /// By the wall clock.
    pub time: Time,
    /// By the clock that nobody sets.
    #[serde(skip)]
    pub(crate) moment: Moment,
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place that reads the wall clock"
)]
fn system_now() -> Time {
    let since_epoch = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    Time::from_unix_micros(i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX))
}
