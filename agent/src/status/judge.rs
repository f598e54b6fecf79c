//! When the recovery point counts as breached. Pure.
//!
//! With an agent of this cluster that answers, its own rule decides. Without one, what the regions hold decides: WAL that the
//! server has and the policy's regions lack, unless fresh pulses in so many regions speak for an agent on another machine, and
//! say that no WAL waits for too long, and nothing shows that they speak of another server; or, when the server does not answer
//! either, pulses that stopped or say otherwise. What is fresh is told by [`super::age`].
//! Open gaps are always a breach: moments inside them cannot be restored.

use std::time::Duration;

use highwater_format::Pulse;

use super::age::{self, Age};
use super::{Place, RegionStatus, Status};
use crate::admin::BREACHED_AFTER;

/// Every reason. `needed` regions must hold WAL for it to be durable.
pub(super) fn breaches(status: &Status, needed: usize, pulse_interval: Duration) -> Vec<String> {
    let mut reasons = Vec::new();
    if status.agent.running {
        if status.agent.ready == Some(false) {
            reasons.push(
                status
                    .agent
                    .reason
                    .clone()
                    .unwrap_or_else(|| "the agent is not ready".into()),
            );
        }
    } else {
        reasons.extend(without_agent(status, needed, pulse_interval));
    }
    for gap in status.gaps.iter().filter(|gap| !gap.closed) {
        let gap = &gap.gap;
        reasons.push(format!(
            "WAL {} of timeline {} is missing ({}), and no base backup has ended the gap yet",
            gap.range(),
            gap.timeline,
            gap.reason
        ));
    }
    reasons
}

fn without_agent(status: &Status, needed: usize, pulse_interval: Duration) -> Option<String> {
    if status.durable.is_none() {
        return Some(nothing_durable(status));
    }
    // Another machine may run the agent: fresh pulses speak for it, if as many regions as the policy asks for take them.
    let age = age::ages(status).get(needed.saturating_sub(1)).copied();
    let fresh = age.is_some_and(|age| age.is_fresh(pulse_interval));
    match (status.lag_bytes, fresh) {
        (Some(0), _) if !is_on_newer_timeline(status) => status.elsewhere.clone(),
        (_, true) => on_older_timeline(status)
            .or_else(|| status.elsewhere.clone())
            .or_else(|| told_late(status)),
        (Some(0), false) => Some(
            "no agent of this cluster answers, and nothing of the timeline that the server is on is durable"
                .into(),
        ),
        (Some(lag), false) => Some(match age {
            Some(Age::Ahead(_)) => format!(
                "no agent of this cluster answers, {lag} bytes of WAL are not durable, and {}",
                silence(age)
            ),
            _ => format!("no agent of this cluster answers and {lag} bytes of WAL are not durable"),
        }),
        (None, false) => Some(format!("neither agent nor server answers, and {}", silence(age))),
    }
}

/// Why nobody is known to write pulses in as many regions as the policy asks for.
fn silence(age: Option<Age>) -> String {
    match age {
        None => "there is no pulse in as many regions as the policy asks for".into(),
        Some(Age::Known(silent)) => format!(
            "the last pulse in as many regions as the policy asks for is {} s old",
            silent.as_secs()
        ),
        Some(Age::Ahead(ahead)) => format!(
            "how old the last pulse in as many regions as the policy asks for is cannot be told: the server's clock, by which it \
             was written, is {} s ahead of this machine's, and it was not seen to change; set the clocks right, or ask on the \
             agent's machine",
            ahead.as_secs()
        ),
    }
}

/// A region that does not answer may hold all of it. One of another cluster does not; that is a reason of its own.
fn nothing_durable(status: &Status) -> String {
    let failing = |region: &RegionStatus| Some(format!("{}: {}", region.name, region.error.as_ref()?));
    let ours = status.regions.iter().filter(|region| !region.foreign);
    let failing: Vec<String> = ours.filter_map(failing).collect();
    let whose = match status.regions.iter().any(|region| region.foreign) {
        true => " of this server",
        false => "",
    };
    match failing.is_empty() {
        true => format!(
            "no agent of this cluster answers and the archive holds no WAL{whose} in as many regions as the policy asks for"
        ),
        false => format!(
            "no agent of this cluster answers, and fewer regions can be read than the policy asks for ({})",
            failing.join("; ")
        ),
    }
}

/// The server was promoted, and nothing of what it has written since is durable, however far that reaches.
pub(super) fn is_on_newer_timeline(status: &Status) -> bool {
    let on = |place: Option<Place>| place.map(|place| place.timeline);
    on(status.durable).is_some() && on(status.server.end) > on(status.durable)
}

/// The pulse that speaks for an agent on another machine. One whose age is not known does so only where there is no other.
pub(super) fn newest_pulse(status: &Status) -> Option<&Pulse> {
    let is_known = |region: &RegionStatus| matches!(Age::of(region, status.now), Some(Age::Known(_)));
    let pulses = status
        .regions
        .iter()
        .filter_map(|region| Some((is_known(region), region.pulse.as_ref()?)));
    let newest = pulses.max_by_key(|(known, pulse)| (*known, pulse.server_time, pulse.waiting_ms));
    newest.map(|(_, pulse)| pulse)
}

/// Pulses of a newer timeline do not speak of a server that has WAL of its own on an older one: a primary that was revived
/// after a failover. Its own agent is refused, and what it writes is nowhere else.
fn on_older_timeline(status: &Status) -> Option<String> {
    let end = status.server.end?;
    let pulse = newest_pulse(status).filter(|pulse| pulse.timeline > end.timeline)?;
    Some(format!(
        "nobody archives the server that was asked: it is on timeline {}, with WAL that timeline {} does not have, which the \
         agent writes whose pulses are in the archive; the server is an old primary, or this configuration leads to the wrong one",
        end.timeline, pulse.timeline
    ))
}

/// What fresh pulses say, by the agent's own rule. Where all is durable that the server had at the moment of the newest one,
/// what waits is younger than that, whatever it says; one of an earlier version, which does not say, is believed only then.
fn told_late(status: &Status) -> Option<String> {
    let newest = newest_pulse(status)?;
    let told = (newest.timeline, newest.wal_end);
    if (status.durable).is_some_and(|durable| (durable.timeline, durable.lsn) >= told) {
        return None;
    }
    let behind = status
        .lag_bytes
        .map_or(String::new(), |lag| format!(" ({lag} bytes behind)"));
    match newest.waiting_ms.map(Duration::from_millis) {
        Some(waited) if waited <= BREACHED_AFTER => None,
        Some(waited) => Some(format!(
            "no agent of this cluster answers, and its pulse says that WAL has waited {} s to become durable{behind}",
            waited.as_secs()
        )),
        None => Some(format!(
            "no agent of this cluster answers, its pulse does not say for how long WAL has waited to become durable (its version \
             is an earlier one), and not all is durable that the server had then{behind}"
        )),
    }
}

#[cfg(test)]
pub(super) mod samples {
    use highwater_format::{Lsn, Pulse, Time, TimelineId};

    use crate::status::{Agent, Place, RegionStatus, Server, Status};

    pub(in crate::status) fn at(text: &str) -> Time {
        text.parse().unwrap()
    }

    /// One region that takes pulses, and a server so far ahead of it.
    pub(in crate::status) fn status(pulse: Option<&str>, lag: Option<u64>) -> Status {
        let pulse = pulse.map(|time| Pulse {
            timeline: TimelineId::FIRST,
            server_time: at(time),
            wal_end: Lsn(9),
            durable_lsn: Lsn(9),
            stored_lsn: Lsn(9),
            last_commit: None,
            instance: "x".into(),
            sequence: 1,
            quorum: None,
            interval_ms: None,
            waiting_ms: None,
            answered_at: None,
        });
        let place = Place {
            timeline: TimelineId::FIRST,
            lsn: Lsn(9),
        };
        Status {
            version: 1,
            now: at("2026-11-20T12:00:00Z"),
            breached: vec![],
            system_id: None,
            agent: Agent::default(),
            server: Server::default(),
            slot: None,
            durable: Some(place),
            lag_bytes: lag,
            regions: vec![RegionStatus {
                name: "a".into(),
                stored: Some(place),
                lag_bytes: lag,
                pulse,
                backups: 0,
                newest_backup: None,
                missing_backups: vec![],
                note: None,
                error: None,
                renewed: false,
                foreign: false,
            }],
            last_backup: None,
            failed_backup: None,
            gaps: vec![],
            branches: vec![],
            writer: None,
            elsewhere: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use highwater_format::{Gap, Lsn, TimelineId};

    use super::samples::{at, status};
    use super::*;
    use crate::status::{Agent, GapStatus};

    const INTERVAL: Duration = Duration::from_secs(5);

    #[test]
    fn a_running_agent_speaks_for_itself() {
        let mut good = status(None, Some(1 << 30));
        good.agent = Agent {
            running: true,
            ready: Some(true),
            reason: None,
            lag_seconds: Some(0.1),
            ..Agent::default()
        };
        assert!(breaches(&good, 1, INTERVAL).is_empty());
        good.agent.ready = Some(false);
        good.agent.reason = Some("why".into());
        assert_eq!(breaches(&good, 1, INTERVAL), ["why"]);
    }

    #[test]
    fn without_an_agent_the_archive_decides() {
        let (fresh, old) = (Some("2026-11-20T11:59:30Z"), Some("2026-11-20T11:50:00Z"));
        for (pulse, lag, kept) in [
            (fresh, Some(100), true),
            (fresh, None, true),
            (old, Some(0), true),
            (old, Some(1), false),
            (old, None, false),
            (None, None, false),
            (None, Some(7), false),
        ] {
            let reasons = breaches(&status(pulse, lag), 1, INTERVAL);
            assert_eq!(reasons.is_empty(), kept, "{pulse:?} {lag:?}: {reasons:?}");
        }
        let mut nothing = status(fresh, None);
        nothing.durable = None;
        assert_eq!(breaches(&nothing, 1, INTERVAL).len(), 1);
    }

    /// The agent runs on another machine, and one of two regions takes no writes.
    #[test]
    fn as_many_fresh_pulses_as_the_policy_asks_for_regions_speak_for_the_agent() {
        let (fresh, old) = (Some("2026-11-20T11:59:30Z"), Some("2026-11-20T11:50:00Z"));
        for (pulse, needed, kept) in [
            (old, 1, true),
            (old, 2, false),
            (fresh, 2, true),
            (None, 2, false),
        ] {
            let mut status = status(fresh, Some(100));
            status.regions.extend(samples::status(pulse, Some(100)).regions);
            let reasons = breaches(&status, needed, INTERVAL);
            assert_eq!(reasons.is_empty(), kept, "{pulse:?} {needed}: {reasons:?}");
        }
    }

    /// This machine's clock is three hours slow. What the agent wrote last, dead or not, is ahead of it for as long.
    #[test]
    fn pulses_ahead_of_the_clock_speak_for_an_agent_only_while_they_change() {
        for (time, lag, renewed, kept) in [
            ("2026-11-20T15:00:00Z", Some(100), false, false),
            ("2026-11-20T15:00:00Z", None, false, false),
            ("2026-11-20T15:00:00Z", Some(100), true, true),
            ("2026-11-20T15:00:00Z", None, true, true),
            // All is durable that the server has, whoever lives.
            ("2026-11-20T15:00:00Z", Some(0), false, true),
            ("2026-11-20T12:00:59Z", Some(100), false, true),
        ] {
            let mut status = status(Some(time), lag);
            status.regions[0].renewed = renewed;
            let reasons = breaches(&status, 1, INTERVAL);
            assert_eq!(reasons.is_empty(), kept, "{time} {lag:?} {renewed}: {reasons:?}");
            let told = reasons.iter().all(|reason| reason.contains("10800 s ahead"));
            assert!(told, "{reasons:?}");
        }
        // An old one of a server whose clock was fast hides neither that the agent lives nor what it says.
        let mut both = status(Some("2026-11-20T15:00:00Z"), Some(100));
        let mut living = status(Some("2026-11-20T11:59:55Z"), Some(100));
        let pulse = living.regions[0].pulse.as_mut().unwrap();
        (pulse.wal_end, pulse.waiting_ms) = (Lsn(12), Some(0));
        both.regions.append(&mut living.regions);
        assert!(breaches(&both, 1, INTERVAL).is_empty());
        both.regions[1].pulse.as_mut().unwrap().waiting_ms = Some(90_000);
        let reasons = breaches(&both, 1, INTERVAL);
        assert!(reasons.len() == 1 && reasons[0].contains("90 s"), "{reasons:?}");
    }

    #[test]
    fn a_region_that_cannot_be_read_is_not_called_empty() {
        let mut status = status(None, None);
        status.durable = None;
        let said = |status: &Status| breaches(status, 2, INTERVAL).join("");
        assert!(said(&status).contains("holds no WAL"));
        status.regions[0].error = Some("connection refused".into());
        let said = said(&status);
        assert!(
            said.contains("connection refused") && !said.contains("holds no WAL"),
            "{said}"
        );
    }

    #[test]
    fn a_region_of_another_cluster_is_not_called_unreadable() {
        let mut status = status(None, None);
        status.durable = None;
        status.regions[0].error = Some("belongs to another".into());
        status.regions[0].foreign = true;
        let said = breaches(&status, 1, INTERVAL).join("");
        assert!(
            said.contains("of this server") && !said.contains("another"),
            "{said}"
        );
    }

    #[test]
    fn open_gaps_are_a_breach_whatever_the_agent_says() {
        let gap = |closed| GapStatus {
            gap: Gap {
                timeline: TimelineId::FIRST,
                start: Lsn(0x100_0000),
                end: Lsn(0x200_0000),
                reason: "slot lost".into(),
                recorded_at: at("2026-11-20T11:00:00Z"),
                unreplayable: false,
            },
            closed,
            ended_by: None,
        };
        let mut status = status(None, Some(0));
        status.agent = Agent {
            running: true,
            ready: Some(true),
            ..Agent::default()
        };
        status.gaps = vec![gap(true)];
        assert!(breaches(&status, 1, INTERVAL).is_empty());
        status.gaps = vec![gap(true), gap(false)];
        let reasons = breaches(&status, 1, INTERVAL);
        assert!(
            reasons.len() == 1 && reasons[0].contains("[0/1000000, 0/2000000)"),
            "{reasons:?}"
        );
    }

    /// The agent runs on another machine, and a region of the policy is hours behind although it takes pulses.
    #[test]
    fn fresh_pulses_do_not_hide_wal_that_waits() {
        for (waiting_ms, durable, kept) in [
            (Some(0), 8, true),
            (Some(60_000), 8, true),
            (Some(60_001), 8, false),
            (Some(10_800_000), 8, false),
            (Some(10_800_000), 9, true),
            (None, 8, false),
            (None, 9, true),
        ] {
            for lag in [Some(1 << 30), None] {
                let mut status = status(Some("2026-11-20T11:59:55Z"), lag);
                for pulse in status
                    .regions
                    .iter_mut()
                    .filter_map(|region| region.pulse.as_mut())
                {
                    pulse.waiting_ms = waiting_ms;
                }
                status.durable.as_mut().unwrap().lsn = Lsn(durable);
                let reasons = breaches(&status, 1, INTERVAL);
                assert_eq!(reasons.is_empty(), kept, "{waiting_ms:?} {durable}: {reasons:?}");
            }
        }
    }

    /// After a failover, with the old primary's configuration; and a copy that was promoted, with production's.
    #[test]
    fn pulses_of_another_timeline_do_not_speak_of_this_server() {
        let timeline = |number| TimelineId::new(number).unwrap();
        for (server, told, lag, kept) in [
            (1, 2, 100, false),
            // All that it has is of the newer timeline's past: a standby, or a node that was rewound.
            (1, 2, 0, true),
            (2, 2, 100, true),
            // Promoted just now; that somebody else goes on is seen only by looking again.
            (2, 1, 100, true),
        ] {
            let mut status = status(Some("2026-11-20T11:59:58Z"), Some(lag));
            let told = timeline(told);
            status.regions[0].pulse.as_mut().unwrap().timeline = told;
            status.durable.as_mut().unwrap().timeline = told;
            status.server.end = Some(Place {
                timeline: timeline(server),
                lsn: Lsn(12),
            });
            let reasons = breaches(&status, 1, INTERVAL);
            assert_eq!(reasons.is_empty(), kept, "{server} {told} {lag}: {reasons:?}");
        }
        // Beyond its fork a copy may be short of where the archive ends.
        let mut copy = status(Some("2026-11-20T11:50:00Z"), Some(0));
        copy.server.end = Some(Place {
            timeline: timeline(2),
            lsn: Lsn(5),
        });
        let reasons = breaches(&copy, 1, INTERVAL);
        assert!(
            reasons.len() == 1 && reasons[0].contains("timeline"),
            "{reasons:?}"
        );
    }
}
