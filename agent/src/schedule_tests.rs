//! When the next base backup is due, and why.

use highwater_format::{Lsn, TimelineId};

use super::*;

fn backup(lsn: u64) -> BackupId {
    BackupId::new(TimelineId::FIRST, Lsn(lsn), at("2026-11-20T02:00:00Z"))
}

fn gap(start: u64, end: u64) -> Gap {
    Gap {
        timeline: TimelineId::FIRST,
        start: Lsn(start),
        end: Lsn(end),
        reason: "slot lost".into(),
        recorded_at: at("2026-11-20T01:00:00Z"),
        unreplayable: false,
    }
}

fn told(backups: &[BackupId], gaps: &[Gap]) -> Told {
    Told {
        backups: backups.to_vec(),
        newest: None,
        gaps: gaps.to_vec(),
    }
}

#[test]
fn a_gap_is_open_until_a_base_backup_behind_it_is_in_some_region() {
    let (first, second) = (gap(100, 200), gap(300, 400));
    let gaps = judge(&[
        told(&[backup(50)], std::slice::from_ref(&first)),
        told(&[backup(250)], &[second.clone(), first]),
    ]);
    assert_eq!(
        (gaps.recorded, gaps.open, gaps.last),
        (2, 1, Some(second.clone()))
    );
    assert_eq!(judge(&[told(&[backup(400)], &[second])]).open, 0);
    assert_eq!(judge(&[told(&[], &[])]), Gaps::default());
}

#[test]
fn an_open_gap_is_due_at_once_even_without_a_schedule() {
    let now = at("2026-11-20T14:00:00Z");
    let mut seen = Seen {
        last: Some(at("2026-11-20T13:00:00Z")),
        gaps: judge(&[told(&[], &[gap(1, 2)])]),
    };
    assert_eq!(wait(None, &seen, None, now), Duration::ZERO);
    assert_eq!(wait(Some(&nightly()), &seen, None, now), Duration::ZERO);
    assert_eq!(
        wait(None, &seen, Some(at("2026-11-20T14:00:05Z")), now),
        Duration::from_secs(5)
    );
    seen.gaps = Gaps::default();
    assert_eq!(wait(None, &seen, None, now), Duration::MAX);
    assert_eq!(
        wait(Some(&nightly()), &seen, None, now),
        Duration::from_secs(12 * 3600)
    );
}

fn at(text: &str) -> Time {
    text.parse().unwrap()
}

fn nightly() -> Schedule {
    "0 2 * * *".parse().unwrap()
}

#[test]
fn moments_are_utc_and_strictly_later() {
    let schedule = nightly();
    assert_eq!(
        schedule.next_after(at("2026-11-20T01:59:59Z")),
        Some(at("2026-11-20T02:00:00Z"))
    );
    assert_eq!(
        schedule.next_after(at("2026-11-20T02:00:00Z")),
        Some(at("2026-11-21T02:00:00Z"))
    );
    assert_eq!(
        schedule.next_after(at("2026-11-20T03:30:00+01:00")),
        Some(at("2026-11-21T02:00:00Z"))
    );
    let weekly: Schedule = "30 4 * * SUN".parse().unwrap();
    assert_eq!(
        weekly.next_after(at("2026-11-20T12:00:00Z")),
        Some(at("2026-11-22T04:30:00Z"))
    );
}

#[test]
fn waits_for_the_moment_after_the_newest_backup() {
    let wait = nightly().wait(Some(at("2026-11-20T02:00:07Z")), None, at("2026-11-20T14:00:00Z"));
    assert_eq!(wait, Duration::from_secs(12 * 3600));
}

#[test]
fn the_first_and_the_missed_backup_are_due_at_once() {
    let now = at("2026-11-20T14:00:00Z");
    assert_eq!(nightly().wait(None, None, now), Duration::ZERO);
    assert_eq!(
        nightly().wait(Some(at("2026-11-18T02:00:00Z")), None, now),
        Duration::ZERO
    );
}

#[test]
fn failures_are_followed_by_growing_pauses() {
    assert_eq!(
        [1, 2, 3, 7, 40].map(|failures| pause(failures, false).as_secs()),
        [60, 120, 240, 3600, 3600]
    );
    assert_eq!(
        [1, 2, 3, 7, 40].map(|failures| pause(failures, true).as_secs()),
        [5, 10, 20, 300, 300]
    );
    let (now, later) = (at("2026-11-20T14:00:00Z"), Some(at("2026-11-20T14:02:00Z")));
    assert_eq!(nightly().wait(None, later, now), Duration::from_secs(120));
    assert_eq!(
        nightly().wait(None, later, at("2026-11-20T14:02:00Z")),
        Duration::ZERO
    );
    // The schedule itself may be further away than the pause.
    let wait = nightly().wait(Some(at("2026-11-20T02:00:07Z")), later, now);
    assert_eq!(wait, Duration::from_secs(12 * 3600));
}

#[test]
fn rubbish_is_refused_with_an_example() {
    for text in ["", "0 2 * *", "0 0 2 * * *", "61 2 * * *", "daily", "0 2 31 2 *"] {
        let error = text.parse::<Schedule>().unwrap_err();
        assert_eq!(error.exit(), highwater_config::Exit::Usage, "{text}");
        assert!(error.to_string().contains("0 2 * * *"), "{error}");
    }
}

/// The server's clock, by which base backups are named, may be slower than that of the agent, which the schedule follows.
#[test]
fn one_moment_is_due_once_whatever_the_servers_clock_says() {
    let seen = Seen {
        last: Some(at("2026-11-20T01:00:01Z")),
        gaps: Gaps::default(),
    };
    let (began, now) = (Some(at("2026-11-20T02:00:00Z")), at("2026-11-20T02:05:00Z"));
    assert_eq!(wait(Some(&nightly()), &seen, None, now), Duration::ZERO);
    assert_eq!(
        wait(Some(&nightly()), &seen.with(began, now), None, now),
        Duration::from_secs(24 * 3600 - 300)
    );
    // Set back since.
    let now = at("2026-11-20T01:30:00Z");
    assert_eq!(
        wait(Some(&nightly()), &seen.with(began, now), None, now),
        Duration::from_secs(1800)
    );
}

#[test]
fn a_base_backup_of_the_future_does_not_put_off_all_others() {
    let id = |text| BackupId::new(TimelineId::FIRST, Lsn(1), at(text));
    let told = [told(
        &[
            id("2026-11-20T02:00:00Z"),
            id("2026-11-20T14:05:00Z"),
            id("2027-11-20T02:00:00Z"),
        ],
        &[],
    )];
    let now = at("2026-11-20T14:00:00Z");
    assert_eq!(
        last(&told, now),
        Some(at("2026-11-20T14:05:00Z")),
        "its clock is fast"
    );
    assert_eq!(last(&told[..0], now), None);
}
