//! How old a pulse is. Pure.
//!
//! A pulse has the time of the server's clock, and whoever asks for the status may be on a machine with another one. One that
//! lies well ahead of that says nothing of its age: it would pass for new for as long as the clocks are apart, and the agent
//! that wrote it may be dead. Then only a pulse that changes shows that somebody lives, as for writers.
//! Owns: the age, and whether it is that of a living agent's. Does not own: looking again ([`super::doubt`]), nor the verdict.

use std::time::Duration;

use highwater_format::{Pulse, Time};

use super::{RegionStatus, Status};
use crate::admin::BREACHED_AFTER;

/// Clocks are not set to the same microsecond. One that is ahead by less has a dead agent pass for a living one for so
/// much longer, which is no more than what is granted to a living one.
const APART: Duration = BREACHED_AFTER;

/// What is known of a pulse's age; the less is known of it the greater.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Age {
    /// It is so old.
    Known(Duration),
    /// It is so far ahead of this machine's clock, and was not seen to change.
    Ahead(Duration),
}

impl Age {
    /// That of the region's pulse. One that has changed since it was looked at first is new.
    pub(super) fn of(region: &RegionStatus, now: Time) -> Option<Age> {
        let pulse = region.pulse.as_ref()?;
        Some(match ahead(pulse, now) {
            None => Age::Known(now.since(pulse.server_time)),
            Some(_) if region.renewed => Age::Known(Duration::ZERO),
            Some(ahead) => Age::Ahead(ahead),
        })
    }

    /// Whether a living agent's pulse may be so old.
    pub(super) fn is_fresh(self, pulse_interval: Duration) -> bool {
        matches!(self, Age::Known(silent) if silent <= BREACHED_AFTER.max(pulse_interval * 3))
    }
}

/// By how much the server's clock is ahead of this machine's, if that is worth a word.
pub(super) fn ahead(pulse: &Pulse, now: Time) -> Option<Duration> {
    Some(pulse.server_time.since(now)).filter(|ahead| *ahead > APART)
}

/// The age of every pulse, the youngest first.
pub(super) fn ages(status: &Status) -> Vec<Age> {
    let regions = status.regions.iter();
    let mut ages: Vec<Age> = regions.filter_map(|region| Age::of(region, status.now)).collect();
    ages.sort_unstable();
    ages
}

/// Whether it rests on pulses whose age is not known that so many are fresh.
pub(super) fn is_unclear(status: &Status, needed: usize, pulse_interval: Duration) -> bool {
    let ages = ages(status);
    let fresh = ages.iter().filter(|age| age.is_fresh(pulse_interval)).count();
    let unknown = ages.iter().filter(|age| matches!(age, Age::Ahead(_))).count();
    fresh < needed && fresh + unknown >= needed
}

/// Notes which pulses have been written again since the first look. By their server's time, whatever that is: an agent whose
/// server says nothing any more goes on to write pulses, and has nothing to say.
pub(super) fn note_renewed(first: &Status, again: &mut Status) {
    for (before, region) in first.regions.iter().zip(&mut again.regions) {
        let then = before.pulse.as_ref().map(|pulse| pulse.server_time);
        let now = region.pulse.as_ref().map(|pulse| pulse.server_time);
        region.renewed = then.is_some() && now.is_some() && then != now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::judge::samples::{at, status};

    const INTERVAL: Duration = Duration::from_secs(5);

    /// Regions with pulses of these times, at noon.
    fn with(times: &[Option<&str>]) -> Status {
        let mut all = status(None, Some(100));
        let regions = times.iter().map(|time| status(*time, None).regions.remove(0));
        all.regions = regions.collect();
        all
    }

    #[test]
    fn a_pulse_ahead_of_the_clock_is_of_no_known_age() {
        let age = |time| Age::of(&with(&[time]).regions[0], at("2026-11-20T12:00:00Z"));
        let seconds = Duration::from_secs;
        for (time, expected, fresh) in [
            ("2026-11-20T11:59:30Z", Age::Known(seconds(30)), true),
            ("2026-11-20T11:58:30Z", Age::Known(seconds(90)), false),
            // Two clocks are never quite the same.
            ("2026-11-20T12:01:00Z", Age::Known(Duration::ZERO), true),
            ("2026-11-20T12:01:01Z", Age::Ahead(seconds(61)), false),
            ("2026-11-20T15:00:00Z", Age::Ahead(seconds(10_800)), false),
        ] {
            assert_eq!(age(Some(time)), Some(expected));
            assert_eq!(expected.is_fresh(INTERVAL), fresh, "{time}");
        }
        assert_eq!(age(None), None);
        // With such pauses between two of them it need not be dead.
        assert!(Age::Known(seconds(90)).is_fresh(seconds(30)));
    }

    #[test]
    fn one_that_changes_is_new_whatever_its_time() {
        let first = with(&[Some("2026-11-20T15:00:00Z"), Some("2026-11-20T15:00:00Z"), None]);
        // The server's clock may be set back, too.
        for written in ["2026-11-20T15:00:05Z", "2026-11-20T14:00:05Z"] {
            let mut again = with(&[
                Some(written),
                Some("2026-11-20T15:00:00Z"),
                Some("2026-11-20T15:00:05Z"),
            ]);
            note_renewed(&first, &mut again);
            let renewed: Vec<bool> = again.regions.iter().map(|region| region.renewed).collect();
            assert_eq!(renewed, [true, false, false]);
            assert_eq!(ages(&again)[0], Age::Known(Duration::ZERO));
            assert!(matches!(ages(&again)[1], Age::Ahead(_)));
        }
    }

    #[test]
    fn it_is_unclear_only_where_pulses_of_unknown_age_decide() {
        let (ahead, fresh, old) = (
            Some("2026-11-20T15:00:00Z"),
            Some("2026-11-20T11:59:55Z"),
            Some("2026-11-20T09:00:00Z"),
        );
        for (times, needed, expected) in [
            ([ahead, ahead], 1, true),
            ([ahead, ahead], 2, true),
            ([ahead, fresh], 1, false),
            ([ahead, fresh], 2, true),
            ([ahead, old], 1, true),
            ([ahead, old], 2, false),
            ([ahead, None], 2, false),
            ([old, None], 1, false),
        ] {
            let unclear = is_unclear(&with(&times), needed, INTERVAL);
            assert_eq!(unclear, expected, "{times:?} {needed}");
        }
    }
}
