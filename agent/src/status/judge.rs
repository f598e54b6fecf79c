//! When the recovery point counts as breached. Pure.
//!
//! With an agent that answers, its own rule decides. Without one, what the regions hold decides: WAL that the
//! server has and the policy's regions lack, or, when the server does not answer either, a pulse that stopped.
//! Open gaps are always a breach: moments inside them cannot be restored.

use std::time::Duration;

use super::Status;
use crate::admin::BREACHED_AFTER;

/// Every reason.
pub(super) fn breaches(status: &Status, pulse_interval: Duration) -> Vec<String> {
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
        reasons.extend(without_agent(status, pulse_interval));
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

fn without_agent(status: &Status, pulse_interval: Duration) -> Option<String> {
    if status.durable.is_none() {
        return Some(
            "no agent answers and the archive holds no WAL in as many regions as the policy asks for".into(),
        );
    }
    // Another machine may run the agent: a fresh pulse speaks for it.
    let newest = status
        .regions
        .iter()
        .filter_map(|region| region.pulse.as_ref())
        .map(|pulse| pulse.server_time)
        .max();
    let silent = newest.map(|time| status.now.since(time));
    let fresh = silent.is_some_and(|silent| silent <= BREACHED_AFTER.max(pulse_interval * 3));
    match (status.lag_bytes, fresh) {
        (_, true) | (Some(0), _) => None,
        (Some(lag), false) => Some(format!("no agent answers and {lag} bytes of WAL are not durable")),
        (None, false) => Some(match silent {
            Some(silent) => format!(
                "neither agent nor server answers, and the last pulse is {} s old",
                silent.as_secs()
            ),
            None => "neither agent nor server answers, and there is no pulse".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use highwater_format::{Gap, Lsn, Pulse, Time, TimelineId};

    use super::*;
    use crate::status::{Agent, GapStatus, Place, RegionStatus, Server};

    const INTERVAL: Duration = Duration::from_secs(5);

    fn at(text: &str) -> Time {
        text.parse().unwrap()
    }

    fn status(pulse: Option<&str>, lag: Option<u64>) -> Status {
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
                missing_backups: vec![],
                note: None,
                error: None,
            }],
            last_backup: None,
            gaps: vec![],
            branches: vec![],
            writer: None,
        }
    }

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
        assert!(breaches(&good, INTERVAL).is_empty());
        good.agent.ready = Some(false);
        good.agent.reason = Some("why".into());
        assert_eq!(breaches(&good, INTERVAL), ["why"]);
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
            let reasons = breaches(&status(pulse, lag), INTERVAL);
            assert_eq!(reasons.is_empty(), kept, "{pulse:?} {lag:?}: {reasons:?}");
        }
        let mut nothing = status(fresh, None);
        nothing.durable = None;
        assert_eq!(breaches(&nothing, INTERVAL).len(), 1);
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
        assert!(breaches(&status, INTERVAL).is_empty());
        status.gaps = vec![gap(true), gap(false)];
        let reasons = breaches(&status, INTERVAL);
        assert!(
            reasons.len() == 1 && reasons[0].contains("[0/1000000, 0/2000000)"),
            "{reasons:?}"
        );
    }
}
