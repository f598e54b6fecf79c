//! From facts to findings: what is fine, what is not, and the line that mends it.
//!
//! Pure. Owns every requirement that the agent has of PostgreSQL and its wording. An operator meets this file
//! on the first day: each failure must name the setting, the right or the file, and be mended by what is
//! printed below it.

use highwater_config::{Acknowledge, ByteSize, OutageConfig, OutagePolicy, Standby};

use super::Finding;
use super::login::{self, quoted};
use super::server::{Catalog, Facts, Slot, System};
use crate::synchronous::{Manner, Role, SETTING};

/// Oldest and newest major version that is tested.
const TESTED: std::ops::RangeInclusive<u32> = 14..=18;
/// Oldest major version that can work: `wal_status` and pg_manifest are new in it.
const OLDEST: u32 = 13;

/// Everything about PostgreSQL.
pub(super) fn server(facts: &Facts, slot: &str) -> Vec<Finding> {
    let target = match &facts.target {
        Ok(target) => target,
        Err(message) => return vec![Finding::fail("connection", message, login::CONNECTION_HELP)],
    };
    let mut findings = Vec::new();
    match &facts.replication {
        Ok(system) => {
            findings.push(Finding::ok(
                "connection",
                format!("{target}, system {}, timeline {}", system.id, system.timeline),
            ));
            findings.push(version(system));
        }
        Err(refusal) => findings.push(login::refused(facts, refusal)),
    }
    findings.extend(sql(facts));
    findings.push(role(facts));
    findings.push(recovery(facts));
    if facts.replication.is_ok() || !facts.settings.is_empty() {
        findings.extend(settings(facts));
    }
    let catalog = facts.sql.as_ref().ok();
    findings.extend(walsenders(facts, catalog));
    findings.extend(slots(facts, catalog, slot));
    findings.extend(acknowledge(facts));
    findings
}

/// Streaming needs no SQL, but whoever watches does.
fn sql(facts: &Facts) -> Option<Finding> {
    let (Ok(_), Err(refusal)) = (&facts.replication, &facts.sql) else {
        return None;
    };
    let seen = format!(
        "refused, so that slots, walsenders, the backlog and the room that is left are not seen, here, by `status` and in \
         metrics: {}",
        refusal.message
    );
    let mend = format!(
        "let the role connect to a database; for \"postgres\", which is taken where the connection names none, in pg_hba.conf:\n{}",
        login::hba("postgres", &facts.user)
    );
    Some(Finding {
        mend: Some(mend),
        ..Finding::note("SQL", seen)
    })
}

fn version(system: &System) -> Finding {
    let (what, major) = ("version", system.version / 10_000);
    let seen = format!("PostgreSQL {major}.{}", system.version % 10_000);
    match major {
        major if TESTED.contains(&major) => Finding::ok(what, seen),
        major if major < OLDEST => {
            Finding::fail(what, format!("{seen} is too old"), "use PostgreSQL 14 to 18")
        }
        _ => Finding::note(what, format!("{seen} is not among the tested versions 14 to 18")),
    }
}

fn role(facts: &Facts) -> Finding {
    let what = "role";
    let user = quoted(&facts.user);
    match facts.sql.as_ref().map(|catalog| catalog.can_replicate) {
        Ok(Some(true)) => Finding::ok(what, format!("{user} may replicate")),
        Ok(Some(false)) => {
            let mend = format!("ALTER ROLE {user} REPLICATION;");
            Finding::fail(what, format!("{user} has no right to replicate"), mend)
        }
        _ if facts.replication.is_ok() => Finding::ok(what, format!("{user} may replicate")),
        Ok(None) => Finding::unknown(what, format!("whether {user} may replicate is not visible")),
        Err(refusal) => Finding::unknown(what, format!("not visible, SQL was refused: {}", refusal.message)),
    }
}

fn recovery(facts: &Facts) -> Finding {
    let what = "recovery";
    match facts.sql.as_ref().ok().and_then(|catalog| catalog.in_recovery) {
        Some(false) => Finding::ok(what, "a primary"),
        Some(true) if facts.standby == Standby::Refuse => Finding::fail(
            what,
            "a standby, or a server that is being restored: WAL arrives here later than at the primary",
            "connect to the primary, or set standby = \"stream\" in [cluster] to run one agent beside every node",
        ),
        Some(true) => Finding::note(
            what,
            "a standby: its agent is a second stream beside the primary's, and the writer once this server is promoted",
        ),
        None => Finding::unknown(what, "whether this is a primary is not visible without SQL"),
    }
}

fn settings(facts: &Facts) -> Vec<Finding> {
    let get = |name: &str| facts.settings.get(name).map(String::as_str);
    let mut findings = Vec::new();
    findings.push(match get("wal_level") {
        Some(level @ ("replica" | "logical")) => Finding::ok("wal_level", level),
        Some(level) => Finding::fail(
            "wal_level",
            format!("{level}: WAL does not hold what a restore needs"),
            "ALTER SYSTEM SET wal_level = 'replica';\nthen restart PostgreSQL",
        ),
        None => Finding::unknown("wal_level", "not visible"),
    });
    findings.push(match get("full_page_writes") {
        Some("on") => Finding::ok("full_page_writes", "on"),
        Some(other) => Finding::note(
            "full_page_writes",
            format!("{other}: base backups from a standby are refused, and torn pages after a crash are not repaired"),
        ),
        None => Finding::unknown("full_page_writes", "not visible"),
    });
    if let Some(size) = get("wal_segment_size") {
        findings.push(Finding::ok("wal_segment_size", size));
    }
    findings.extend(synchronous(get("synchronous_standby_names"), facts.manner));
    findings.extend(archive_mode(get("archive_mode")));
    findings.extend(keep_size(get("max_slot_wal_keep_size")));
    findings.extend(match get("data_checksums") {
        Some("on") => Some(Finding::ok("data_checksums", "on")),
        Some(_) => Some(Finding::note(
            "data_checksums",
            "off: base backups cannot tell damaged pages. `pg_checksums --enable` turns them on while PostgreSQL is stopped",
        )),
        None => None,
    });
    findings
}

fn synchronous(names: Option<&str>, manner: Manner) -> Option<Finding> {
    let (what, names) = (SETTING, names?);
    let role = Role::of(names, manner);
    Some(match (role.remark(names), role) {
        (Some(remark), _) => Finding::note(what, remark),
        (None, Role::Synchronous) => {
            Finding::ok(what, format!("{names}: commits wait until the regions have them"))
        }
        (None, _) if manner.synchronous => Finding::note(
            what,
            format!(
                "{names:?} does not list the agent: no commit waits for it, although synchronous = true is set in [wal]"
            ),
        ),
        (None, _) if names.trim().is_empty() => {
            Finding::ok(what, "empty: commits do not wait for the regions")
        }
        (None, _) => Finding::ok(what, names),
    })
}

/// Without the stream's word the slot is moved by SQL, or not at all.
fn acknowledge(facts: &Facts) -> Option<Finding> {
    let what = "acknowledge";
    match (&facts.sql, facts.manner.acknowledge) {
        (_, Acknowledge::Stream) => None,
        (Ok(_), Acknowledge::Slot) => Some(Finding::ok(
            what,
            "by moving the slot; commits never wait for the agent",
        )),
        (Err(refusal), Acknowledge::Slot) => Some(Finding::fail(
            what,
            format!(
                "\"slot\" moves the slot by SQL, which was refused: {}",
                refusal.message
            ),
            "let the role connect to a database, or set acknowledge = \"stream\"",
        )),
    }
}

fn archive_mode(mode: Option<&str>) -> Option<Finding> {
    match mode? {
        "off" => None,
        mode => Some(Finding::note(
            "archive_mode",
            format!(
                "{mode}: archiving by PostgreSQL goes on beside the agent. It is not needed for it, and base backups do not wait for it"
            ),
        )),
    }
}

fn keep_size(limit: Option<&str>) -> Option<Finding> {
    let what = "max_slot_wal_keep_size";
    Some(match limit? {
        "-1" => Finding::note(
            what,
            "-1: while no region takes WAL, pg_wal grows until its disk is full, and the time until then is known only \
             with outage.disk. A limit below the free space gives the WAL up instead, which becomes a recorded gap that a \
             new base backup ends: ALTER SYSTEM SET max_slot_wal_keep_size = '50GB';",
        ),
        limit => Finding::ok(
            what,
            format!(
                "{limit}: beyond it PostgreSQL gives the slot up; what the archive then lacks becomes a recorded gap"
            ),
        ),
    })
}

/// The most WAL that the server lets a slot hold; none if it sets no limit. What it keeps for everybody it keeps for a
/// slot too.
fn most_room(facts: &Facts) -> Option<u64> {
    let size = |name: &str| Some(facts.settings.get(name)?.parse::<ByteSize>().ok()?.0);
    let limit = size("max_slot_wal_keep_size")?;
    Some(limit.max(size("wal_keep_size").unwrap_or(0)))
}

/// A limit that cannot be watched protects nothing, and one that is always passed gives the slot up for nothing.
pub(super) fn outage(config: &OutageConfig, facts: &Facts) -> Option<Finding> {
    let what = "outage";
    if config.policy == OutagePolicy::Hold {
        return None;
    }
    if let Err(refusal) = &facts.sql {
        return Some(Finding::fail(
            what,
            format!(
                "policy \"give-up\" asks PostgreSQL by SQL how much WAL waits, which was refused: {}",
                refusal.message
            ),
            "let the role connect to a database, or set policy = \"hold\"",
        ));
    }
    let kept = most_room(facts);
    if config.keep_free.is_some() && config.disk.is_none() && kept.is_none() {
        let seen = "keep_free cannot be watched: neither outage.disk nor max_slot_wal_keep_size is set";
        return Some(match config.max_backlog {
            Some(_) => Finding::note(what, format!("{seen}; only max_backlog counts")),
            None => Finding::fail(what, seen, "[outage]\ndisk = \"/var/lib/postgresql\""),
        });
    }
    if let Some((kept, free)) = kept.zip(config.keep_free)
        && kept <= free
    {
        let (kept, free) = (ByteSize(kept), ByteSize(free));
        return Some(Finding::fail(
            what,
            format!(
                "keep_free = {free} is never kept: max_slot_wal_keep_size leaves room for {kept} of WAL at the most, so that \
                 the slot would be given up at the first stall"
            ),
            format!(
                "set keep_free in [outage] well below {kept}, or raise max_slot_wal_keep_size far above {free}"
            ),
        ));
    }
    Some(Finding::ok(
        what,
        "the slot is given up at the limits set, and the gap recorded",
    ))
}

/// Nothing where the login was refused for want of one, which is told already.
fn walsenders(facts: &Facts, catalog: Option<&Catalog>) -> Option<Finding> {
    let what = login::WALSENDERS;
    if matches!(&facts.replication, Err(refusal) if refusal.walsender_limit.is_some()) {
        return None;
    }
    let limit = facts.settings.get(what).and_then(|text| text.parse::<u32>().ok());
    let used = catalog.and_then(|catalog| catalog.walsenders);
    Some(match (limit, used) {
        (Some(limit), Some(used)) => {
            let free = limit.saturating_sub(used);
            let seen = format!("{used} of {limit} in use");
            // One to stream, two for a base backup (the second for a moment, to compare WAL); a running agent counts among
            // the used ones already.
            match free {
                0 => Finding::fail(what, seen, login::more_walsenders(facts, limit)),
                1 | 2 => Finding::note(what, format!("{seen}: streaming needs one, a base backup two")),
                _ => Finding::ok(what, seen),
            }
        }
        (Some(limit), None) => Finding::unknown(what, format!("{limit}; how many are in use is not visible")),
        _ => Finding::unknown(what, "not visible"),
    })
}

fn slots(facts: &Facts, catalog: Option<&Catalog>, name: &str) -> Vec<Finding> {
    let Some(slots) = catalog.and_then(|catalog| catalog.slots.as_ref()) else {
        return vec![Finding::unknown(
            "slot",
            format!("{name}: the slots are not visible"),
        )];
    };
    match slots.iter().find(|slot| slot.name == name) {
        Some(slot) => vec![existing(slot)],
        None => vec![missing(facts, name, slots.len())],
    }
}

fn missing(facts: &Facts, name: &str, used: usize) -> Finding {
    let limit = facts
        .settings
        .get("max_replication_slots")
        .and_then(|text| text.parse::<usize>().ok());
    match limit {
        Some(limit) if used >= limit => Finding::fail(
            "max_replication_slots",
            format!("all {limit} slots are in use, and {name} does not exist yet"),
            "ALTER SYSTEM SET max_replication_slots = 10;\nthen restart PostgreSQL, or drop a slot that is not needed",
        ),
        _ => Finding::ok("slot", format!("{name} does not exist yet; `run` creates it")),
    }
}

fn existing(slot: &Slot) -> Finding {
    let what = "slot";
    let name = &slot.name;
    let drop_it = format!("SELECT pg_drop_replication_slot('{name}');");
    if !slot.physical {
        let mend = format!("choose another name:\n[cluster]\nslot = \"highwater_2\"\nor drop it: {drop_it}");
        return Finding::fail(what, format!("{name} is a logical slot"), mend);
    }
    if slot.wal_status.as_deref() == Some("lost") {
        return Finding::note(
            what,
            format!(
                "{name} is lost: PostgreSQL gave it up. `run` makes it anew and goes on where the archive ends; if that WAL \
                 is gone, it records the gap and takes a base backup at once"
            ),
        );
    }
    if let Some(pid) = slot.active_pid {
        return Finding::ok(
            what,
            format!("{name} is in use by the walsender with PID {pid}: an agent is streaming"),
        );
    }
    if !slot.reserved {
        return Finding::note(
            what,
            format!("{name} keeps no WAL: it was never given any to keep. `run` makes it anew"),
        );
    }
    match (slot.wal_status.as_deref(), slot.safe_wal_size) {
        (Some(status @ ("unreserved" | "extended")), Some(left)) => Finding::note(
            what,
            format!(
                "{name} is {status}: PostgreSQL gives it up after {left} more bytes of WAL. Start the agent now"
            ),
        ),
        _ => Finding::ok(what, format!("{name} keeps WAL and nobody streams from it")),
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
