//! Every requirement, met and not met.

use std::collections::BTreeMap;

use highwater_config::{Acknowledge, Standby};
use highwater_format::{SystemId, TimelineId};

use super::super::Verdict;
use super::super::server::Refusal;
use super::*;

fn good() -> Facts {
    let settings = [
        ("wal_level", "replica"),
        ("max_wal_senders", "10"),
        ("max_replication_slots", "10"),
        ("max_slot_wal_keep_size", "50GB"),
        ("synchronous_standby_names", ""),
        ("archive_mode", "off"),
        ("data_checksums", "on"),
        ("full_page_writes", "on"),
        ("wal_segment_size", "16MB"),
    ];
    Facts {
        target: Ok("host=/tmp port=5432 user=hw".into()),
        user: "hw".into(),
        replication: Ok(System {
            id: SystemId(7),
            timeline: TimelineId::FIRST,
            version: 150_020,
        }),
        sql: Ok(Catalog {
            in_recovery: Some(false),
            can_replicate: Some(true),
            walsenders: Some(1),
            slots: Some(vec![]),
        }),
        settings: settings
            .into_iter()
            .map(|(name, value)| (name, value.to_owned()))
            .collect::<BTreeMap<_, _>>(),
        standby: Standby::Refuse,
        manner: Manner {
            synchronous: false,
            acknowledge: Acknowledge::Stream,
        },
    }
}

fn verdict_of(facts: &Facts, what: &str) -> Finding {
    let findings = server(facts, "highwater");
    findings
        .iter()
        .find(|finding| finding.what == what)
        .cloned()
        .unwrap_or_else(|| panic!("{what}: {findings:#?}"))
}

fn setting(name: &'static str, value: &str) -> Facts {
    let mut facts = good();
    facts.settings.insert(name, value.into());
    facts
}

fn refusal(sqlstate: &str, sql_works: bool) -> Facts {
    let mut facts = good();
    let refusal = Refusal {
        sqlstate: Some(sqlstate.into()),
        at_login: false,
        message: "the server's words".into(),
        walsender_limit: None,
    };
    if !sql_works {
        facts.sql = Err(refusal.clone());
    }
    facts.replication = Err(refusal);
    facts.settings.clear();
    facts
}

fn slot(change: impl FnOnce(&mut Slot)) -> Facts {
    let mut slot = Slot {
        name: "highwater".into(),
        physical: true,
        reserved: true,
        ..Slot::default()
    };
    change(&mut slot);
    let mut facts = good();
    facts.sql.as_mut().unwrap().slots = Some(vec![slot]);
    facts
}

#[test]
fn a_prepared_server_passes_without_a_remark() {
    let findings = server(&good(), "highwater");
    assert!(
        findings.iter().all(|finding| finding.verdict == Verdict::Ok),
        "{findings:#?}"
    );
}

#[test]
fn each_refused_connection_names_its_own_cure() {
    for (sqlstate, sql_works, what, cure) in [
        ("28P01", false, "password", ".pgpass"),
        ("28000", true, "pg_hba.conf", "replication  hw"),
        ("28000", false, "login", "CREATE ROLE \"hw\" LOGIN REPLICATION"),
        (
            "42501",
            true,
            "replication right",
            "ALTER ROLE \"hw\" REPLICATION;",
        ),
        (
            "53300",
            true,
            "max_connections",
            "ALTER ROLE \"hw\" CONNECTION LIMIT",
        ),
        ("53300", false, "max_connections", "max_connections = 200"),
    ] {
        let finding = verdict_of(&refusal(sqlstate, sql_works), what);
        assert_eq!(finding.verdict, Verdict::Fail, "{sqlstate}");
        assert!(finding.mend.as_deref().unwrap().contains(cure), "{finding:?}");
        assert_eq!(finding.seen, "the server's words");
    }
}

/// The limit that the server names, and what SQL shows of it, if it shows anything.
fn no_walsender(limit: u32, settings: Option<&str>) -> Facts {
    let mut facts = refusal("53300", settings.is_some());
    facts.replication.as_mut().unwrap_err().walsender_limit = Some(limit);
    if let Some(level) = settings {
        facts.settings.insert("wal_level", level.into());
        facts.settings.insert("max_wal_senders", limit.to_string());
    }
    facts
}

#[test]
fn walsenders_that_are_switched_off_are_told_from_those_that_are_taken() {
    const LEVEL: &str = "wal_level = 'replica'";
    for (limit, settings, level, senders, word) in [
        (0, Some("minimal"), true, 10, "switched off"),
        (0, Some("logical"), false, 10, "switched off"),
        // It may be minimal, and then the server would not start.
        (0, None, true, 10, "switched off"),
        (2, Some("replica"), false, 10, "is taken"),
        (10, None, false, 20, "is taken"),
    ] {
        let facts = no_walsender(limit, settings);
        let finding = verdict_of(&facts, "max_wal_senders");
        let mend = finding.mend.unwrap();
        assert_eq!(finding.verdict, Verdict::Fail, "{mend}");
        assert!(
            mend.contains(word) && mend.contains("restart PostgreSQL"),
            "{mend}"
        );
        assert!(
            mend.contains(&format!("max_wal_senders = {senders};")),
            "{limit}: {mend}"
        );
        assert_eq!(mend.contains(LEVEL), level, "{limit}: {mend}");
        let told = server(&facts, "highwater")
            .iter()
            .filter(|finding| finding.what == "max_wal_senders")
            .count();
        assert_eq!(told, 1, "told twice");
    }
    let finding = verdict_of(&no_walsender(0, Some("minimal")), "wal_level");
    assert_eq!(finding.verdict, Verdict::Fail);
}

/// What SQL shows of the settings is judged also where the replication login is refused.
#[test]
fn settings_are_judged_without_a_replication_login() {
    let mut facts = refusal("28000", true);
    assert!(
        !server(&facts, "highwater")
            .iter()
            .any(|finding| finding.what == "wal_level")
    );
    facts.settings = good().settings;
    facts.settings.insert("wal_level", "minimal".into());
    assert_eq!(verdict_of(&facts, "wal_level").verdict, Verdict::Fail);
    assert_eq!(verdict_of(&facts, "pg_hba.conf").verdict, Verdict::Fail);
    assert_eq!(verdict_of(&facts, "max_wal_senders").verdict, Verdict::Ok);
}

#[test]
fn nothing_is_called_fine_that_was_not_seen() {
    let mut facts = good();
    facts.sql = Err(Refusal {
        sqlstate: None,
        at_login: false,
        message: "no".into(),
        walsender_limit: None,
    });
    facts.settings.clear();
    for what in [
        "recovery",
        "max_wal_senders",
        "slot",
        "wal_level",
        "full_page_writes",
    ] {
        assert_eq!(verdict_of(&facts, what).verdict, Verdict::Unknown, "{what}");
    }
    // The connection itself proves the right.
    assert_eq!(verdict_of(&facts, "role").verdict, Verdict::Ok);
    let sql = verdict_of(&facts, "SQL");
    assert_eq!(sql.verdict, Verdict::Note);
    assert!(
        sql.mend
            .as_deref()
            .is_some_and(|mend| mend.contains("local  postgres     hw")),
        "{sql:?}"
    );
}

#[test]
fn a_password_that_is_missing_is_not_taken_for_a_server_that_does_not_run() {
    let mut facts = good();
    facts.replication = Err(Refusal {
        sqlstate: None,
        at_login: true,
        message: "the server asks for a password and none is given".into(),
        walsender_limit: None,
    });
    let finding = verdict_of(&facts, "login");
    let mend = finding.mend.unwrap();
    assert!(
        mend.contains(".pgpass") && !mend.contains("PostgreSQL runs"),
        "{mend}"
    );
}

#[test]
fn settings_that_make_restore_impossible_fail() {
    let finding = verdict_of(&setting("wal_level", "minimal"), "wal_level");
    assert_eq!(finding.verdict, Verdict::Fail);
    assert!(finding.mend.unwrap().contains("wal_level = 'replica'"));
}

#[test]
fn settings_with_consequences_are_explained() {
    for (name, value, word) in [
        ("synchronous_standby_names", "*", "commits wait"),
        ("synchronous_standby_names", "ANY 1 (*)", "commits wait"),
        ("archive_mode", "on", "not needed"),
        ("max_slot_wal_keep_size", "-1", "disk is full"),
        ("data_checksums", "off", "pg_checksums"),
        ("full_page_writes", "off", "torn pages"),
    ] {
        let finding = verdict_of(&setting(name, value), name);
        assert_eq!(finding.verdict, Verdict::Note, "{name}");
        assert!(finding.seen.contains(word), "{finding:?}");
    }
}

#[test]
fn walsenders_and_slots_must_be_free() {
    let mut facts = good();
    facts.sql.as_mut().unwrap().walsenders = Some(10);
    let full = verdict_of(&facts, "max_wal_senders");
    assert_eq!(full.verdict, Verdict::Fail);
    assert!(
        full.mend.unwrap().contains("max_wal_senders = 20;"),
        "10 is no cure"
    );
    facts.sql.as_mut().unwrap().walsenders = Some(8);
    assert_eq!(verdict_of(&facts, "max_wal_senders").verdict, Verdict::Note);
    facts.sql.as_mut().unwrap().slots = Some(vec![
        Slot {
            name: "x".into(),
            ..Slot::default()
        };
        10
    ]);
    assert_eq!(verdict_of(&facts, "max_replication_slots").verdict, Verdict::Fail);
}

#[test]
fn the_slot_in_all_its_states() {
    for (facts, verdict, word) in [
        (slot(|slot| slot.physical = false), Verdict::Fail, "logical"),
        (
            slot(|slot| slot.wal_status = Some("lost".into())),
            Verdict::Note,
            "records the gap",
        ),
        (slot(|slot| slot.active_pid = Some(4711)), Verdict::Ok, "4711"),
        (slot(|slot| slot.reserved = false), Verdict::Note, "keeps no WAL"),
        (
            slot(|slot| {
                slot.wal_status = Some("unreserved".into());
                slot.safe_wal_size = Some(4096);
            }),
            Verdict::Note,
            "4096 more bytes",
        ),
        (slot(|_| ()), Verdict::Ok, "nobody streams"),
    ] {
        let finding = verdict_of(&facts, "slot");
        assert_eq!(finding.verdict, verdict, "{finding:?}");
        assert!(finding.seen.contains(word), "{finding:?}");
    }
}

#[test]
fn versions() {
    for (version, verdict) in [
        (130_011, Verdict::Note),
        (140_000, Verdict::Ok),
        (180_004, Verdict::Ok),
        (120_000, Verdict::Fail),
        (190_000, Verdict::Note),
    ] {
        let mut facts = good();
        facts.replication.as_mut().unwrap().version = version;
        assert_eq!(verdict_of(&facts, "version").verdict, verdict, "{version}");
    }
}

#[test]
fn a_standby_is_said_to_be_one() {
    let mut facts = good();
    facts.sql.as_mut().unwrap().in_recovery = Some(true);
    assert_eq!(verdict_of(&facts, "recovery").verdict, Verdict::Fail);
    facts.standby = Standby::Stream;
    assert_eq!(verdict_of(&facts, "recovery").verdict, Verdict::Note);
}

#[test]
fn role_names_are_quoted_in_what_is_to_be_run() {
    let mut facts = refusal("42501", true);
    facts.user = "we\"ird".into();
    assert!(
        verdict_of(&facts, "replication right")
            .mend
            .unwrap()
            .contains("\"we\"\"ird\"")
    );
}

#[test]
fn a_limit_that_cannot_be_watched_is_named() {
    let config = |max_backlog, keep_free, disk: Option<&str>| OutageConfig {
        policy: OutagePolicy::GiveUp,
        max_backlog,
        keep_free,
        disk: disk.map(Into::into),
        patience: std::time::Duration::from_secs(60),
    };
    let unlimited = setting("max_slot_wal_keep_size", "-1");
    let verdict = |config, facts: &Facts| outage(&config, facts).map(|finding| finding.verdict);
    assert_eq!(
        verdict(config(None, Some(1), None), &unlimited),
        Some(Verdict::Fail)
    );
    assert_eq!(
        verdict(config(Some(1), Some(1), None), &unlimited),
        Some(Verdict::Note)
    );
    assert_eq!(
        verdict(config(None, Some(1), Some("/")), &unlimited),
        Some(Verdict::Ok)
    );
    assert_eq!(verdict(config(None, Some(1), None), &good()), Some(Verdict::Ok));
    // Up to the limit, there is never more room than that.
    let (limit, limited) = (50 << 30, good());
    for (free, disk, wanted) in [
        (limit, None, Verdict::Fail),
        (limit, Some("/"), Verdict::Fail),
        (limit - 1, None, Verdict::Ok),
    ] {
        assert_eq!(verdict(config(Some(1), Some(free), disk), &limited), Some(wanted));
    }
    let mut kept_anyway = setting("max_slot_wal_keep_size", "512MB");
    kept_anyway.settings.insert("wal_keep_size", "51GB".into());
    assert_eq!(
        verdict(config(None, Some(limit), None), &kept_anyway),
        Some(Verdict::Ok)
    );
    let blind = refusal("28000", false);
    assert_eq!(verdict(config(Some(1), None, None), &blind), Some(Verdict::Fail));
    let hold = OutageConfig {
        policy: OutagePolicy::Hold,
        ..config(None, None, None)
    };
    assert_eq!(outage(&hold, &blind), None);
}

#[test]
fn an_agent_that_moves_its_slot_needs_sql_and_is_not_waited_for() {
    let mut facts = setting("synchronous_standby_names", "*");
    facts.manner.acknowledge = Acknowledge::Slot;
    assert_eq!(verdict_of(&facts, "acknowledge").verdict, Verdict::Ok);
    let listed = verdict_of(&facts, "synchronous_standby_names");
    assert!(
        listed.verdict == Verdict::Note && listed.seen.contains("does not count"),
        "{listed:?}"
    );
    facts.sql = Err(Refusal {
        sqlstate: Some("28000".into()),
        at_login: false,
        message: "no entry".into(),
        walsender_limit: None,
    });
    assert_eq!(verdict_of(&facts, "acknowledge").verdict, Verdict::Fail);
}

#[test]
fn a_synchronous_agent_that_nobody_waits_for_is_remarked_on() {
    for (names, verdict) in [
        ("", Verdict::Note),
        ("a", Verdict::Note),
        ("highwater", Verdict::Ok),
        ("2 (a, highwater)", Verdict::Ok),
        ("a, highwater", Verdict::Note),
    ] {
        let mut facts = setting("synchronous_standby_names", names);
        facts.manner.synchronous = true;
        assert_eq!(
            verdict_of(&facts, "synchronous_standby_names").verdict,
            verdict,
            "{names}"
        );
    }
}
