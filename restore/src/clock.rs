//! The one place that asks what time it is.
//!
//! Time is for progress, reports and for refusing a target that lies in the future. Nothing about what can be
//! restored is decided by it: that is settled by LSNs and by the server times in the archive.

use std::time::{Duration, Instant, SystemTime};

use highwater_format::Time;

/// A source of wall-clock and elapsed time.
#[derive(Debug, Clone, Copy, Default)]
pub enum Clock {
    /// The machine's clock.
    #[default]
    System,
    /// Always this moment.
    Fixed(Time),
}

impl Clock {
    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Time {
        match self {
            Self::System => system_now(),
            Self::Fixed(time) => *time,
        }
    }

    /// A stopwatch that starts now.
    #[must_use]
    pub fn start(&self) -> Stopwatch {
        Stopwatch {
            started: Instant::now(),
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "this module is where wall-clock time comes from"
)]
fn system_now() -> Time {
    from_system(SystemTime::now())
}

/// A moment as the operating system counts; nothing before 1970.
#[must_use]
pub fn to_system(time: Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + time.since(Time::UNIX_EPOCH)
}

/// Back from it, to the microsecond.
#[must_use]
pub fn from_system(time: SystemTime) -> Time {
    Time::UNIX_EPOCH.saturating_add(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// Measures how long something takes, unmoved by changes of the clock.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    started: Instant,
}

impl Stopwatch {
    /// Time since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}
