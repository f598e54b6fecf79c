//! When the next base backup is due, and why.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use highwater_config::Policy;
use highwater_format::{Codec, Lsn, TimelineId};
use highwater_pgwire::{ByteStream, Dialer, Environment};
use highwater_store::PutMode;

use super::*;
use crate::test_world::{MIB, World, world};

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
        gaps: gaps.to_vec(),
    }
}

fn judged(told: &[Told], recorded: &[Gap]) -> Gaps {
    judge(told, &on_record(told, recorded))
}

#[test]
fn a_gap_is_open_until_a_base_backup_behind_it_is_in_some_region() {
    let (first, second) = (gap(100, 200), gap(300, 400));
    let gaps = judged(
        &[
            told(&[backup(50)], std::slice::from_ref(&first)),
            told(&[backup(250)], &[second.clone(), first]),
        ],
        &[],
    );
    assert_eq!(
        (gaps.recorded, gaps.open, gaps.last),
        (2, 1, Some(second.clone()))
    );
    let ended = [told(&[backup(400)], std::slice::from_ref(&second))];
    assert_eq!(judged(&ended, std::slice::from_ref(&second)).open, 0);
    assert_eq!(judged(&[told(&[], &[])], &[]), Gaps::default());
    let hidden = judged(&[told(&[backup(250)], &[])], &[second]);
    assert_eq!((hidden.recorded, hidden.open), (1, 1), "no listing shows it yet");
}

#[test]
fn an_open_gap_is_due_at_once_even_without_a_schedule() {
    let now = at("2026-11-20T14:00:00Z");
    let mut seen = Seen {
        last: Some(at("2026-11-20T13:00:00Z")),
        gaps: judged(&[told(&[], &[gap(1, 2)])], &[]),
    };
    let (none, rest) = (Duration::ZERO, Duration::from_secs(5));
    assert_eq!(wait(None, &seen, none, now), none);
    assert_eq!(wait(Some(&nightly()), &seen, none, now), none);
    assert_eq!(wait(None, &seen, rest, now), rest);
    seen.gaps = Gaps::default();
    assert_eq!(wait(None, &seen, none, now), Duration::MAX);
    assert_eq!(
        wait(Some(&nightly()), &seen, none, now),
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
    let now = at("2026-11-20T14:00:00Z");
    let wait = nightly().wait(Some(at("2026-11-20T02:00:07Z")), Duration::ZERO, now);
    assert_eq!(wait, Duration::from_secs(12 * 3600));
}

#[test]
fn the_first_and_the_missed_backup_are_due_at_once() {
    let now = at("2026-11-20T14:00:00Z");
    for last in [None, Some(at("2026-11-18T02:00:00Z"))] {
        assert_eq!(nightly().wait(last, Duration::ZERO, now), Duration::ZERO);
    }
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
    let (now, rest) = (at("2026-11-20T14:00:00Z"), Duration::from_secs(120));
    assert_eq!(nightly().wait(None, rest, now), rest);
    // The schedule itself may be further away than the pause.
    let wait = nightly().wait(Some(at("2026-11-20T02:00:07Z")), rest, now);
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
    let own = Some(own("2026-11-20T02:00:00Z", "2026-11-20T01:00:01Z"));
    let due = |seen: &Seen, now| wait(Some(&nightly()), seen, Duration::ZERO, now);
    let now = at("2026-11-20T02:05:00Z");
    assert_eq!(due(&seen, now), Duration::ZERO);
    assert_eq!(
        due(&seen.with(own, now), now),
        Duration::from_secs(24 * 3600 - 300)
    );
    // Set back since.
    let now = at("2026-11-20T01:30:00Z");
    assert_eq!(due(&seen.with(own, now), now), Duration::from_secs(1800));
}

/// The agent's clock was set back by three hours, and the server's was not.
#[test]
fn a_servers_clock_that_is_ahead_puts_off_no_base_backup() {
    let hourly: Schedule = "0 * * * *".parse().unwrap();
    let seen = Seen {
        last: Some(at("2026-11-20T05:00:01Z")),
        gaps: Gaps::default(),
    };
    let now = at("2026-11-20T02:05:00Z");
    let due = |seen: &Seen| wait(Some(&hourly), seen, Duration::ZERO, now);
    let taken_since = own("2026-11-20T02:00:00Z", "2026-11-20T05:00:01Z");
    assert_eq!(
        due(&seen.with(Some(taken_since), now)),
        Duration::from_secs(55 * 60)
    );
    // Somebody else took one after that.
    let before = own("2026-11-20T01:00:00Z", "2026-11-20T04:00:01Z");
    assert_eq!(
        due(&seen.with(Some(before), now)),
        Duration::from_secs(4 * 3600 - 300)
    );
    // What was done before the clock was set back is not done once more.
    let taken_before = own("2026-11-20T05:00:00Z", "2026-11-20T05:00:01Z");
    assert_eq!(
        due(&seen.with(Some(taken_before), now)),
        Duration::from_secs(4 * 3600 - 300)
    );
}

fn own(began: &str, named: &str) -> Own {
    Own {
        began: at(began),
        named: at(named),
    }
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

/// An address at which nobody answers, and how often it was tried.
fn nowhere() -> (ConnInfo, Arc<AtomicUsize>) {
    let tried = Arc::new(AtomicUsize::new(0));
    let counter = tried.clone();
    let dialer = Dialer::new(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Err::<Box<dyn ByteStream>, _>(io::Error::from(io::ErrorKind::ConnectionRefused)) })
    });
    let text = "host=nowhere user=highwater sslmode=disable";
    let conn = ConnInfo::resolve_in(Some(text), &Environment::empty()).unwrap();
    (conn.with_dialer(dialer), tried)
}

/// The writer's, over an archive without base backups.
fn scheduled(world: &World, schedule: Option<Schedule>, conn: ConnInfo, clock: &Clock) -> Scheduled {
    let shared = &world.shared;
    shared.state.update(|snapshot| snapshot.writer_epoch = 1);
    Scheduled {
        schedule,
        unended: Arc::default(),
        conn,
        archive: Arc::new(shared.archive.clone()),
        options: BackupOptions {
            label: "highwater orders".into(),
            codec: Codec::Lz4,
            pack_size: MIB,
            max_rate: None,
            checkpoint_fast: true,
            threads: 1,
            needed: 3,
            stream_wait: Duration::from_secs(1),
            region_patience: Duration::from_secs(1),
        },
        state: shared.state.clone(),
        clock: clock.clone(),
        cancel: CancellationToken::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_does_not_move_the_next_attempt() {
    let (world, (conn, tried)) = (world(Policy::All), nowhere());
    let clock = Clock::held_at(at("2026-11-20T14:00:00Z"));
    tokio::spawn(scheduled(&world, Some(nightly()), conn, &clock).run());
    let mut attempts = 1;
    tokio::time::sleep(Duration::from_secs(1)).await;
    for (failures, now) in [(1, "2026-11-20T11:00:00Z"), (2, "2026-11-20T17:00:00Z")] {
        assert_eq!(tried.load(Ordering::SeqCst), attempts);
        clock.set(at(now));
        tokio::time::sleep(pause(failures, false) - Duration::from_secs(3)).await;
        assert_eq!(tried.load(Ordering::SeqCst), attempts, "{now}");
        tokio::time::sleep(Duration::from_secs(3)).await;
        attempts += 1;
        assert_eq!(tried.load(Ordering::SeqCst), attempts, "{now}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_back_does_not_put_off_the_next_reading() {
    let (world, (conn, _)) = (world(Policy::All), nowhere());
    let clock = Clock::held_at(at("2026-11-20T14:00:00Z"));
    tokio::spawn(scheduled(&world, None, conn, &clock).run());
    let recorded = || world.shared.state.snapshot().gaps.map(|gaps| gaps.recorded);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(recorded(), Some(0));
    clock.set(at("2026-11-20T11:00:00Z"));
    // Another agent's.
    let (key, record) = gap::encode(&world.shared.archive.layout, &gap(MIB, 2 * MIB)).unwrap();
    let put = world.region(0).quick.put(&key, record, PutMode::Create);
    put.await.unwrap();
    tokio::time::sleep(READ_EVERY + LOOK_EVERY).await;
    assert_eq!(recorded(), Some(1));
}
