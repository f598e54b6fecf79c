use std::collections::HashSet;
use std::time::Duration;

use highwater_format::{Branch, Gap, Time, TimelineId};

use super::*;
use crate::clock::Clock;
use crate::state::{Gaps, LastBackup, SlotView};

fn at(text: &str) -> Time {
    text.parse().unwrap()
}

/// Now, when the wall clock says `text`.
fn stamp(text: &str) -> Stamp {
    Clock::held_at(at(text)).stamp()
}

fn snapshot() -> Snapshot {
    let region = |name: &str, stored, state| RegionView {
        name: name.into(),
        stored: Lsn(stored),
        state,
        retries: 3,
        ..RegionView::default()
    };
    Snapshot {
        received: Lsn(0x300_0400),
        server_end: Lsn(0x300_0500),
        sealed: Lsn(0x300_0300),
        durable: Lsn(0x300_0100),
        durable_commit: Some(at("2026-11-20T12:00:00Z")),
        current_at: Some(stamp("2026-11-20T12:00:01Z")),
        regions: vec![
            region("a\"b", 0x300_0300, RegionState::Ok),
            region("b", 0x300_0100, RegionState::Failing),
        ],
        connection: Connection::Reconnecting("gone".into()),
        last_backup: Some(LastBackup {
            id: Some("x".into()),
            finished_at: at("2026-11-20T02:00:00Z"),
            error: None,
            bytes: 12,
        }),
        ..Snapshot::default()
    }
}

fn gaps_of_one() -> Gaps {
    let gap = Gap {
        timeline: TimelineId::FIRST,
        start: Lsn(0x100_0000),
        end: Lsn(0x300_0000),
        reason: "slot lost".into(),
        recorded_at: at("2026-11-20T11:30:00Z"),
        unreplayable: false,
    };
    Gaps {
        recorded: 1,
        open: 1,
        last: Some(gap),
    }
}

#[test]
fn gaps_are_counted_once_they_are_known() {
    let mut snapshot = snapshot();
    let now = stamp("2026-11-20T12:00:00Z");
    assert!(!render(&snapshot, now).contains("highwater_gap"));
    snapshot.gaps = Some(Gaps::default());
    let text = render(&snapshot, now);
    assert_eq!(value(&text, "highwater_gaps_open"), "0");
    assert!(!text.contains("highwater_gap_last"), "{text}");
    snapshot.gaps = Some(gaps_of_one());
    let text = render(&snapshot, now);
    assert_eq!(value(&text, "highwater_gaps_open"), "1");
    assert_eq!(value(&text, "highwater_gap_last_bytes"), (0x200_0000).to_string());
    let gap = gaps_of_one().last.unwrap();
    let info = format!(
        "highwater_gap_last_info{{timeline=\"1\",start=\"{}\",end=\"{}\",cause=\"{}\"}} 1\n",
        gap.start, gap.end, gap.reason
    );
    assert!(text.contains(&info), "{info} is missing in\n{text}");
}

fn value<'a>(text: &'a str, series: &str) -> &'a str {
    let line = text.lines().find(|line| {
        line.strip_prefix(series)
            .is_some_and(|rest| rest.starts_with(' '))
    });
    line.unwrap_or_else(|| panic!("{series} is missing in\n{text}"))
        .rsplit(' ')
        .next()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn positions_lag_and_ages() {
    let snapshot = snapshot();
    tokio::time::advance(Duration::from_millis(2500)).await;
    let text = render(&snapshot, stamp("2026-11-20T12:00:03.5Z"));
    assert_eq!(value(&text, "highwater_durable_lsn"), (0x300_0100).to_string());
    assert_eq!(value(&text, "highwater_lag_bytes"), "1024");
    assert_eq!(value(&text, "highwater_lag_seconds"), "2.500");
    assert_eq!(value(&text, "highwater_durable_commit_age_seconds"), "3.500");
    assert_eq!(value(&text, "highwater_region_lag_bytes{region=\"b\"}"), "1024");
    assert_eq!(value(&text, "highwater_region_up{region=\"b\"}"), "0");
    assert_eq!(value(&text, "highwater_region_up{region=\"a\\\"b\"}"), "1");
    assert_eq!(value(&text, "highwater_connection{state=\"reconnecting\"}"), "1");
    assert_eq!(value(&text, "highwater_connection{state=\"streaming\"}"), "0");
    assert_eq!(value(&text, "highwater_backup_last_success"), "1");
}

#[test]
fn what_is_not_known_yet_is_no_lag_of_zero() {
    for forget in [
        |snapshot: &mut Snapshot| snapshot.server_end = Lsn::ZERO,
        |snapshot: &mut Snapshot| {
            snapshot.durable = Lsn::ZERO;
            snapshot
                .regions
                .iter_mut()
                .for_each(|view| view.stored = Lsn::ZERO);
        },
    ] {
        let mut early = snapshot();
        forget(&mut early);
        let text = render(&early, stamp("2026-11-20T12:00:03.5Z"));
        assert!(!text.contains("\nhighwater_lag_bytes "), "{text}");
        assert!(!text.contains("\nhighwater_region_lag_bytes{"), "{text}");
    }
}

/// A failover to a server that lagged: one region follows, the other holds more of the old timeline than the new one has.
#[tokio::test(start_paused = true)]
async fn what_is_durable_on_the_old_timeline_does_not_hide_that_the_new_one_waits() {
    let (old, new) = (TimelineId::FIRST, TimelineId::new(2).unwrap());
    let mut snapshot = snapshot();
    snapshot.timeline = Some(new);
    (snapshot.durable, snapshot.durable_timeline) = (Lsn(0x300_0800), Some(old));
    for (view, timeline) in snapshot.regions.iter_mut().zip([new, old]) {
        view.timeline = Some(timeline);
    }
    snapshot.regions[1].stored = Lsn(0x300_0800);
    tokio::time::advance(Duration::from_millis(2500)).await;
    let now = stamp("2026-11-20T12:00:03.5Z");
    let text = render(&snapshot, now);
    assert_eq!(value(&text, "highwater_lag_seconds"), "2.500");
    assert_eq!(
        value(&text, "highwater_region_lag_bytes{region=\"a\\\"b\"}"),
        "512"
    );
    // How much waits is not known before it is known where the old timeline was left.
    assert!(!text.contains("\nhighwater_lag_bytes ") && !text.contains("lag_bytes{region=\"b\"}"));
    snapshot.branches = vec![Branch {
        timeline: old,
        start: Lsn(0x300_0200),
        end: Lsn(0x300_0800),
        newest: new,
    }];
    let text = render(&snapshot, now);
    assert_eq!(value(&text, "highwater_lag_bytes"), "768");
    assert_eq!(value(&text, "highwater_region_lag_bytes{region=\"b\"}"), "768");
}

#[tokio::test(start_paused = true)]
async fn nothing_lags_when_everything_received_is_durable() {
    let mut snapshot = snapshot();
    snapshot.durable = snapshot.received;
    tokio::time::advance(Duration::from_secs(3600)).await;
    assert_eq!(lag_seconds(&snapshot, Moment::now()).to_bits(), 0.0_f64.to_bits());
}

/// The wall clock was wrong by hours, and is set while WAL waits.
#[tokio::test(start_paused = true)]
async fn for_how_long_wal_has_waited_does_not_depend_on_the_wall_clock() {
    let current = snapshot();
    // Nothing was current yet since the start.
    let early = Snapshot {
        current_at: None,
        begun: Some(Moment::now()),
        ..snapshot()
    };
    tokio::time::advance(Duration::from_secs(90)).await;
    for now in [
        "2026-11-20T09:01:31Z",
        "2026-11-20T12:01:31Z",
        "2026-11-20T15:01:31Z",
    ] {
        for snapshot in [&current, &early] {
            let text = render(snapshot, stamp(now));
            assert_eq!(value(&text, "highwater_lag_seconds"), "90.000", "{now}");
        }
    }
}

#[test]
fn what_is_not_known_is_left_out() {
    let text = render(&Snapshot::default(), stamp("2026-11-20T12:00:00Z"));
    assert!(!text.contains("durable_commit_age") && !text.contains("backup_last"));
    assert_eq!(value(&text, "highwater_connection{state=\"starting\"}"), "1");
}

#[test]
fn every_series_is_documented_and_every_documented_one_exists() {
    let manual = include_str!("../docs/metrics.md");
    let mut full = snapshot();
    full.started_at = Some(at("2026-11-20T11:00:00Z"));
    full.gaps = Some(gaps_of_one());
    full.slot = Some(SlotView {
        room_bytes: Some(7),
        seconds_until_full: Some(7),
        ..SlotView::default()
    });
    let text = render(&full, stamp("2026-11-20T12:00:00Z"));
    let rendered: HashSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    let documented: HashSet<&str> = manual
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next())
        .collect();
    assert_eq!(rendered, documented);
}
