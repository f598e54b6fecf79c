//! Targets as they are typed.

use highwater_format::{Lsn, Time, TimelineId};

use super::{Action, Asked, Request, Target, parse_as_of};
use crate::clock::Clock;

fn clock() -> Clock {
    Clock::Fixed("2026-11-20T12:00:00Z".parse().unwrap())
}

fn request(asked: &Asked) -> Result<Request, String> {
    asked.request(&clock()).map_err(|error| error.to_string())
}

fn time(text: &str) -> Asked {
    Asked {
        time: Some(text.to_owned()),
        ..Asked::default()
    }
}

fn lsn(text: &str) -> Asked {
    Asked {
        lsn: Some(text.to_owned()),
        ..Asked::default()
    }
}

#[test]
fn nothing_asked_means_the_end() {
    assert_eq!(request(&Asked::default()).unwrap(), Request::latest());
}

#[test]
fn times_are_read_with_any_zone() {
    let wanted: Time = "2026-11-20T10:30:00Z".parse().unwrap();
    for text in [
        "2026-11-20T10:30:00Z",
        "2026-11-20T12:30:00+02:00",
        "2026-11-20 10:30:00Z",
    ] {
        assert_eq!(
            request(&time(text)).unwrap().target,
            Target::Time(wanted),
            "{text}"
        );
    }
}

#[test]
fn the_moment_of_the_buckets_has_a_zone_and_has_been() {
    let of = |text: &str| parse_as_of(text, &clock()).map_err(|error| error.to_string());
    assert_eq!(
        of("2026-11-20T10:30:00+01:00"),
        Ok("2026-11-20T09:30:00Z".parse().unwrap())
    );
    assert!(of("2026-11-20 10:30:00").unwrap_err().contains("has no zone"));
    assert!(
        of("2026-11-20T13:00:00Z")
            .unwrap_err()
            .contains("lies in the future")
    );
}

#[test]
fn a_time_without_zone_is_refused_with_what_to_write() {
    let error = request(&time("2026-11-20 10:30:00")).unwrap_err();
    assert!(
        error.contains("has no zone") && error.contains("`2026-11-20T10:30:00Z`"),
        "{error}"
    );
    let error = request(&time("13am")).unwrap_err();
    assert!(error.contains("RFC 3339"), "{error}");
}

/// The offset and the zone need not agree, and only one of them can be meant.
#[test]
fn a_time_with_the_name_of_a_zone_is_refused() {
    let error = request(&time("2026-11-20T10:30:00+01:00[Europe/Berlin]")).unwrap_err();
    assert!(error.contains("RFC 3339"), "{error}");
}

#[test]
fn a_time_in_the_future_is_refused_but_a_slow_clock_is_not() {
    let error = request(&time("2026-11-21T12:00:00Z")).unwrap_err();
    assert!(error.contains("lies in the future"), "{error}");
    assert!(request(&time("2026-11-20T12:05:00Z")).is_ok());
}

#[test]
fn lsns_are_read_as_postgresql_prints_them() {
    for text in ["0/16B3748", "0/16b3748", "0/016B3748"] {
        assert_eq!(
            request(&lsn(text)).unwrap().target,
            Target::Lsn(Lsn(0x16B_3748)),
            "{text}"
        );
    }
    for text in ["0/0", "16B3748", "", "0/", "0/XYZ", "0/1/2"] {
        assert!(request(&lsn(text)).is_err(), "{text}");
    }
}

#[test]
fn two_targets_contradict_each_other() {
    let asked = Asked {
        latest: true,
        ..lsn("0/16B3748")
    };
    let error = request(&asked).unwrap_err();
    assert!(error.contains("--to-latest and --to-lsn contradict"), "{error}");
}

#[test]
fn exclusive_needs_something_to_exclude() {
    for asked in [
        Asked {
            exclusive: true,
            ..Asked::default()
        },
        Asked {
            exclusive: true,
            immediate: true,
            ..Asked::default()
        },
        Asked {
            exclusive: true,
            name: Some("before_upgrade".to_owned()),
            ..Asked::default()
        },
    ] {
        assert!(request(&asked).unwrap_err().contains("--exclusive means nothing"));
    }
    assert!(
        request(&Asked {
            exclusive: true,
            ..lsn("0/16B3748")
        })
        .unwrap()
        .exclusive
    );
}

#[test]
fn actions_need_a_target() {
    let asked = Asked {
        action: Some("pause".to_owned()),
        ..Asked::default()
    };
    assert!(request(&asked).unwrap_err().contains("always promotes"));
    let asked = Asked {
        action: Some("shutdown".to_owned()),
        ..lsn("0/16B3748")
    };
    assert_eq!(request(&asked).unwrap().action, Action::Shutdown);
    let asked = Asked {
        action: Some("stop".to_owned()),
        ..lsn("0/16B3748")
    };
    assert!(
        request(&asked)
            .unwrap_err()
            .contains("promote, pause or shutdown")
    );
}

#[test]
fn transaction_ids_may_carry_their_epoch() {
    let xid = |text: &str| {
        request(&Asked {
            xid: Some(text.to_owned()),
            ..Asked::default()
        })
    };
    assert_eq!(xid("731").unwrap().target, Target::Xid(731));
    assert_eq!(
        xid(&((7u64 << 32) + 731).to_string()).unwrap().target,
        Target::Xid(731)
    );
    assert!(xid("2").is_err() && xid("-1").is_err() && xid("abc").is_err());
}

#[test]
fn empty_and_impossible_names_are_refused() {
    let name = |text: &str| {
        request(&Asked {
            name: Some(text.to_owned()),
            ..Asked::default()
        })
    };
    assert!(name("").unwrap_err().contains("unset shell variable"));
    assert!(name(&"x".repeat(64)).is_err());
    assert_eq!(
        name("before upgrade").unwrap().target,
        Target::Name("before upgrade".to_owned())
    );
}

#[test]
fn timelines_and_backups_are_read() {
    let timeline = |text: &str| {
        request(&Asked {
            timeline: Some(text.to_owned()),
            ..Asked::default()
        })
    };
    assert_eq!(timeline("3").unwrap().timeline, TimelineId::new(3));
    assert!(timeline("0").is_err() && timeline("latest").is_err());
    let backup = |text: &str| {
        request(&Asked {
            backup: Some(text.to_owned()),
            ..Asked::default()
        })
    };
    assert!(backup("00000001-0000000002000028-20261120T145653Z").is_ok());
    assert!(backup("").unwrap_err().contains("highwater-restore list"));
}
