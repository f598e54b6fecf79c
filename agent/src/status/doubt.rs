//! Whose pulses they are: of this server's agent on another machine, or of one beside another server of the same lineage.
//!
//! Owns: looking again, where fresh pulses speak for an agent while nobody uses the slot of the server that was asked, and the
//! conclusion. A pulse says how far *its* server was, and for how long WAL of that has waited. One that was written after this
//! server was asked, and that knows of less than this server had then, is another server's. One look does not tell: the
//! newest pulse is older than the server's answer, and an agent that was stopped seconds ago is no breach yet. Where pulses lie
//! ahead of this machine's clock, looking again is also what tells a living agent from a dead one.
//! Does not own: the verdict ([`super::judge`]).

use std::time::Duration;

use highwater_config::Config;

use super::judge::{is_on_newer_timeline, newest_pulse};
use super::{Place, Status, age, gather};
use crate::clock::Clock;
use crate::error::Result;
use crate::writer::SILENT_FOR;
use crate::writer::judge::interval;

/// The longest pause between two looks: whoever asks for the status waits.
const LONGEST: Duration = Duration::from_secs(10);

/// Looks again until it is certain whose pulses they are, or nobody writes any.
pub(super) async fn settled(config: &Config, clock: &Clock, first: Status) -> Result<Status> {
    let needed = config.durability.policy.needed(config.regions.len());
    let unclear = |status: &Status| is_unclear(status, needed, config.pulse.interval);
    if !is_behind(&first) && !is_doubtful(&first, config.pulse.interval) && !unclear(&first) {
        return Ok(first);
    }
    let pause = newest_pulse(&first).map_or(LONGEST, |pulse| interval(pulse, config.pulse.interval));
    let mut status = None;
    for _ in 0..SILENT_FOR {
        tokio::time::sleep(pause.min(LONGEST)).await;
        // The first answer is better than none.
        let Ok(mut again) = gather::gather(config, clock.now()).await else {
            break;
        };
        age::note_renewed(&first, &mut again);
        let settled = !is_doubtful(&again, config.pulse.interval) || is_durable(first.server.end, &again);
        if !settled {
            again.elsewhere = another_server(&first, &again);
        } else if let Some(durable) = first.durable.filter(|_| is_behind(&first)) {
            again.elsewhere = lacks(&again, durable);
        }
        if (settled && !unclear(&again)) || again.elsewhere.is_some() {
            return Ok(again);
        }
        status = Some(again);
    }
    Ok(status.unwrap_or(first))
}

/// What the server had at the first look is in the archive since, whoever brought it there.
fn is_durable(end: Option<Place>, again: &Status) -> bool {
    let of = |place: Place| (place.timeline, place.lsn);
    end.is_some_and(|end| again.durable.is_some_and(|durable| of(durable) >= of(end)))
}

/// Somebody lives who is not seen to read from this server, and this server has WAL that is not durable.
fn is_doubtful(status: &Status, pulse_interval: Duration) -> bool {
    let (Some(end), Some(durable), Some(pulse)) = (status.server.end, status.durable, newest_pulse(status))
    else {
        return false;
    };
    let behind = status.lag_bytes.is_some_and(|lag| lag > 0) || end.timeline > durable.timeline;
    let lives = status.now.since(pulse.server_time) <= interval(pulse, pulse_interval) * SILENT_FOR;
    !status.agent.running
        && !status.server.standby
        && !is_in_use(status)
        && behind
        && lives
        && pulse.timeline <= end.timeline
}

/// Whether anybody lives decides, and cannot be told yet: this machine's clock and the server's are too far apart.
fn is_unclear(status: &Status, needed: usize, pulse_interval: Duration) -> bool {
    let behind = status.lag_bytes != Some(0) || is_on_newer_timeline(status);
    let decides = !status.agent.running && status.durable.is_some() && behind;
    decides && age::is_unclear(status, needed, pulse_interval)
}

/// More is durable than the server had that nobody is seen to read from. It was asked before the regions were: it may have it by now.
fn is_behind(status: &Status) -> bool {
    let (Some(end), Some(durable)) = (status.server.end, status.durable) else {
        return false;
    };
    let unattended = !status.agent.running && !status.server.standby && !is_in_use(status);
    unattended && end.timeline == durable.timeline && end.lsn < durable.lsn
}

fn is_in_use(status: &Status) -> bool {
    status.slot.as_ref().is_some_and(|slot| slot.active_pid.is_some())
}

/// Why the archive is another server's: what was durable before this one was asked once more is not in it.
fn lacks(again: &Status, durable: Place) -> Option<String> {
    let end = again.server.end?;
    (end.timeline == durable.timeline && end.lsn < durable.lsn).then(|| {
        format!(
            "nobody archives the server that was asked: it is at {} on timeline {}, and {} of that timeline was durable before. It was \
             rolled back, or is a copy of the server whose WAL this is",
            end.lsn, end.timeline, durable.lsn
        )
    })
}

/// Why the pulses are another server's; nothing where that is not certain.
fn another_server(first: &Status, again: &Status) -> Option<String> {
    let (end, then, now) = (first.server.end?, newest_pulse(first)?, newest_pulse(again)?);
    // Two further: the one before was sent before this one was made up, and seen later than the server was asked.
    let later = now.instance == then.instance
        && now.sequence >= then.sequence.saturating_add(2)
        && now.server_time > then.server_time;
    // What its server had when this one was asked has not been waited for: it knows of that.
    let waited = Duration::from_millis(now.waiting_ms?);
    let less = (now.timeline, now.wal_end) < (end.timeline, end.lsn);
    (later && less && waited < again.now.since(first.now)).then(|| {
        format!(
            "nobody archives the server that was asked: its slot is not in use, and the pulses in the archive go on for a server \
             that was at {} on timeline {} when this one was past {} on timeline {}",
            now.wal_end, now.timeline, end.lsn, end.timeline
        )
    })
}

#[cfg(test)]
mod tests {
    use highwater_format::{Lsn, Pulse, TimelineId};

    use super::*;
    use crate::status::Slot;
    use crate::status::judge::samples::{at, status};

    const INTERVAL: Duration = Duration::from_secs(5);

    /// A server at `lsn`, and a pulse of that sequence that has seen one at 9.
    fn look(now: &str, lsn: u64, sequence: u64) -> Status {
        let mut status = status(Some(now), Some(100));
        status.now = at(now);
        status.server.end = Some(Place {
            timeline: TimelineId::FIRST,
            lsn: Lsn(lsn),
        });
        let pulse = status.regions[0].pulse.as_mut().unwrap();
        (pulse.sequence, pulse.waiting_ms) = (sequence, Some(900));
        status
    }

    fn slot(active_pid: Option<u32>) -> Slot {
        Slot {
            name: "highwater".into(),
            active_pid,
            held_bytes: None,
            wal_status: None,
            room_bytes: None,
            growth_bytes_per_second: None,
            seconds_until_full: None,
        }
    }

    #[test]
    fn only_a_primary_whose_slot_nobody_uses_is_doubtful() {
        let doubtful = |change: &dyn Fn(&mut Status)| {
            let mut status = look("2026-11-20T12:00:00Z", 12, 1);
            change(&mut status);
            is_doubtful(&status, INTERVAL)
        };
        assert!(doubtful(&|_| {}));
        assert!(doubtful(&|status| status.slot = Some(slot(None))));
        assert!(!doubtful(&|status| status.slot = Some(slot(Some(7)))));
        assert!(!doubtful(&|status| status.agent.running = true));
        assert!(!doubtful(&|status| status.server.standby = true));
        assert!(!doubtful(&|status| status.lag_bytes = Some(0)));
        assert!(!doubtful(&|status| status.server.end = None));
        assert!(!doubtful(&|status| status.now = at("2026-11-20T12:00:16Z")));
    }

    /// The agent may have died three hours ago, or live: this machine's clock is slow by as much.
    #[test]
    fn pulses_ahead_of_the_clock_are_looked_at_again() {
        let unclear = |change: &dyn Fn(&mut Status)| {
            let mut status = look("2026-11-20T12:00:00Z", 12, 1);
            status.now = at("2026-11-20T09:00:00Z");
            change(&mut status);
            is_unclear(&status, 1, INTERVAL)
        };
        assert!(unclear(&|_| {}));
        // The server does not answer, or its slot is in use, by whomever.
        assert!(unclear(
            &|status| (status.server.end, status.lag_bytes) = (None, None)
        ));
        assert!(unclear(&|status| status.slot = Some(slot(Some(7)))));
        assert!(!unclear(&|status| status.agent.running = true));
        assert!(!unclear(&|status| status.lag_bytes = Some(0)));
        assert!(!unclear(&|status| status.durable = None));
        assert!(!unclear(&|status| status.now = at("2026-11-20T11:59:00Z")));
        // Seen to change, it is a living agent's.
        let first = look("2026-11-20T12:00:00Z", 12, 1);
        for (written, dead) in [("2026-11-20T12:00:00Z", true), ("2026-11-20T12:00:05Z", false)] {
            let mut again = look(written, 12, 2);
            again.now = at("2026-11-20T09:00:10Z");
            age::note_renewed(&first, &mut again);
            assert_eq!(is_unclear(&again, 1, INTERVAL), dead, "{written}");
        }
    }

    /// The regions are asked after the server, which goes on meanwhile: one look does not tell.
    #[test]
    fn a_server_that_lacks_what_was_durable_before_it_was_asked_is_another_one() {
        let durable = |lsn| {
            let mut status = look("2026-11-20T12:00:00Z", 12, 1);
            status.durable = Some(Place {
                timeline: TimelineId::FIRST,
                lsn: Lsn(lsn),
            });
            status
        };
        assert!(is_behind(&durable(13)) && !is_behind(&durable(12)));
        let mut in_use = durable(13);
        in_use.slot = Some(slot(Some(7)));
        let mut standby = durable(13);
        standby.server.standby = true;
        assert!(!is_behind(&in_use) && !is_behind(&standby));
        let then = durable(13).durable.unwrap();
        for (end, lacking) in [(12, true), (13, false), (15, false)] {
            let again = look("2026-11-20T12:00:05Z", end, 2);
            assert_eq!(lacks(&again, then).is_some(), lacking, "{end}");
        }
        let mut promoted = look("2026-11-20T12:00:05Z", 12, 2);
        promoted.server.end.as_mut().unwrap().timeline = TimelineId::new(2).unwrap();
        assert_eq!(lacks(&promoted, then), None);
    }

    #[test]
    fn later_pulses_that_know_of_less_are_another_servers() {
        let first = || look("2026-11-20T12:00:00Z", 12, 1);
        for (again, certain) in [
            (look("2026-11-20T12:00:10Z", 15, 3), true),
            // Not made up since, for all that is known.
            (look("2026-11-20T12:00:10Z", 15, 2), false),
            (look("2026-11-20T12:00:00Z", 15, 3), false),
        ] {
            assert_eq!(another_server(&first(), &again).is_some(), certain, "{again:?}");
        }
        let changed = |change: &dyn Fn(&mut Pulse)| {
            let mut again = look("2026-11-20T12:00:10Z", 15, 3);
            change(again.regions[0].pulse.as_mut().unwrap());
            another_server(&first(), &again).is_some()
        };
        assert!(
            !changed(&|pulse| pulse.wal_end = Lsn(12)),
            "it knows of all that was there"
        );
        assert!(
            !changed(&|pulse| pulse.instance = "y".into()),
            "restarted meanwhile"
        );
        assert!(
            !changed(&|pulse| pulse.waiting_ms = Some(10_000)),
            "it does not keep up"
        );
        assert!(
            !changed(&|pulse| pulse.waiting_ms = None),
            "of an earlier version"
        );
        // A copy that was promoted, while production goes on.
        let mut copy = first();
        copy.server.end.as_mut().unwrap().timeline = TimelineId::new(2).unwrap();
        copy.server.end.as_mut().unwrap().lsn = Lsn(3);
        let again = look("2026-11-20T12:00:10Z", 15, 3);
        assert!(another_server(&copy, &again).is_some());
    }
}
