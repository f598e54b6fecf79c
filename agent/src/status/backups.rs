//! When base backups are missing, fail, or are too old. Pure.
//!
//! Without a base backup no WAL can be restored, however current it is. Owns: the reasons, in as many regions as the policy
//! asks for. A region that does not answer is not known to lack anything: it is shown with its error. That of another
//! cluster lacks all, and none can be taken as long as there is one. Without a schedule somebody else decides when a base backup
//! is due, and an old one is no reason.

use highwater_format::{BackupId, Time};

use super::{Status, foreign};
use crate::schedule::Schedule;

/// Every reason. `needed` regions must hold a base backup.
pub(super) fn breaches(status: &Status, needed: usize, schedule: Option<&Schedule>) -> Vec<String> {
    let mut reasons = Vec::new();
    if let Some(error) = &status.failed_backup {
        reasons.push(format!("the newest attempt at a base backup failed: {error}"));
    }
    let failing = status.regions.iter().filter(|region| region.error.is_some());
    // What another cluster's region holds is known: nothing of this one.
    let unknown = failing.filter(|region| !region.foreign);
    let Some(place) = needed.saturating_sub(unknown.count()).checked_sub(1) else {
        return reasons;
    };
    let answered = status.regions.iter().filter(|region| region.error.is_none());
    let mut newest: Vec<&BackupId> = answered
        .filter_map(|region| region.newest_backup.as_ref())
        .collect();
    newest.sort_by_key(|id| std::cmp::Reverse(id.started_at()));
    match newest.get(place) {
        // Another reason says already that the archive is another server's.
        None if foreign::breach(status, needed).is_some() => {}
        None => reasons.push(format!(
            "there is no base backup in as many regions as the policy asks for, without which nothing can be restored: {}",
            how_to_get_one(status)
        )),
        Some(id) if schedule.is_some_and(|schedule| is_overdue(schedule, id.started_at(), status.now)) => {
            reasons.push(format!(
                "the newest base backup that as many regions as the policy asks for hold, {id}, is {} h old, more than twice \
                 what backup.schedule means it to be",
                status.now.since(id.started_at()).as_secs() / 3600
            ));
        }
        Some(_) => {}
    }
    reasons
}

/// What to do to have a base backup. The command refuses as long as a region is another cluster's.
fn how_to_get_one(status: &Status) -> String {
    let foreign = foreign::names(status);
    match foreign.is_empty() {
        true => "take one with `highwater-agent backup`, or give [backup] a schedule".into(),
        false => format!(
            "none can be taken while {} holds another cluster's archive: {}",
            foreign.join(" and "),
            foreign::NEXT_STEP
        ),
    }
}

/// Two more have come due since, and it is twice as old as the schedule's interval: a server whose clock is slow begins one a
/// moment before it was due, and a schedule may have a pause at the weekend.
fn is_overdue(schedule: &Schedule, began: Time, now: Time) -> bool {
    let Some(first) = schedule.next_after(began) else {
        return false;
    };
    schedule
        .next_after(first)
        .is_some_and(|second| now >= second && now.since(began) >= second.since(first) * 2)
}

#[cfg(test)]
mod tests {
    use highwater_format::{Lsn, TimelineId};

    use super::*;
    use crate::status::RegionStatus;
    use crate::status::judge::samples::{at, status};

    fn backup(began: &str) -> BackupId {
        BackupId::new(TimelineId::FIRST, Lsn(0x200_0028), at(began))
    }

    /// Two regions with these newest base backups, at noon on 2026-11-20.
    fn holding(newest: [Option<&str>; 2]) -> Status {
        let mut status = status(None, Some(0));
        let region = &status.regions[0];
        let regions = newest.map(|began| RegionStatus {
            newest_backup: began.map(backup),
            ..region.clone()
        });
        status.regions = regions.into();
        status
    }

    #[test]
    fn a_base_backup_has_to_be_in_as_many_regions_as_the_policy_asks_for() {
        let some = Some("2026-11-20T02:00:01Z");
        for (newest, needed, kept) in [
            ([None, None], 1, false),
            ([some, None], 1, true),
            ([some, None], 2, false),
            ([some, some], 2, true),
        ] {
            let reasons = breaches(&holding(newest), needed, None);
            assert_eq!(reasons.is_empty(), kept, "{newest:?} {needed}: {reasons:?}");
        }
        // What a region that does not answer holds is not known.
        let mut away = holding([some, None]);
        away.regions[1].error = Some("timed out".into());
        assert!(breaches(&away, 2, None).is_empty());
        away.regions[0].newest_backup = None;
        assert_eq!(breaches(&away, 2, None).len(), 1);
        away.regions[0].error = Some("timed out".into());
        assert!(breaches(&away, 2, None).is_empty());
    }

    /// Whoever is told to take a base backup there would be refused.
    #[test]
    fn no_base_backup_is_advised_where_a_region_is_another_clusters() {
        let some = Some("2026-11-20T02:00:01Z");
        for (newest, needed, reasons) in [
            // Too few regions are left: that is the reason.
            ([None, None], 2, 0),
            ([None, some], 2, 0),
            ([None, some], 1, 0),
            ([None, None], 1, 1),
        ] {
            let mut status = holding(newest);
            status.regions[0].error = Some("belongs to another".into());
            status.regions[0].foreign = true;
            let said = breaches(&status, needed, None);
            assert_eq!(said.len(), reasons, "{newest:?} {needed}: {said:?}");
            assert!(!said.join("").contains("highwater-agent backup"), "{said:?}");
        }
    }

    #[test]
    fn a_failed_attempt_is_a_reason_of_its_own() {
        let mut failed = holding([Some("2026-11-20T02:00:01Z"); 2]);
        failed.failed_backup = Some("no space".into());
        let reasons = breaches(&failed, 2, None);
        assert!(
            reasons.len() == 1 && reasons[0].contains("no space"),
            "{reasons:?}"
        );
    }

    /// Noon on 2026-11-20 is a Friday.
    #[test]
    fn a_base_backup_grows_old_by_the_schedule() {
        let (daily, weekdays) = ("0 2 * * *", "0 2 * * 1-5");
        for (schedule, began, kept) in [
            (None, "2020-01-01T00:00:00Z", true),
            (Some(daily), "2026-11-20T02:00:01Z", true),
            (Some(daily), "2026-11-19T02:00:01Z", true),
            (Some(daily), "2026-11-18T02:00:01Z", false),
            // The server's clock is slow: this is the one of the 19th.
            (Some(daily), "2026-11-19T01:59:58Z", true),
            (Some(daily), "2026-11-18T01:59:58Z", false),
            (Some("0 2 * * 0"), "2026-11-08T02:00:01Z", true),
            (Some("0 2 * * 0"), "2026-11-01T02:00:01Z", false),
            (Some(weekdays), "2026-11-19T02:00:01Z", true),
            (Some(weekdays), "2026-11-17T02:00:01Z", false),
        ] {
            let schedule: Option<Schedule> = schedule.map(|text| text.parse().unwrap());
            let status = holding([Some(began), Some("2026-11-20T02:00:01Z")]);
            let reasons = breaches(&status, 2, schedule.as_ref());
            assert_eq!(reasons.is_empty(), kept, "{schedule:?} {began}: {reasons:?}");
        }
        // Friday's is the newest until Monday's is done.
        let weekdays: Schedule = weekdays.parse().unwrap();
        let friday = at("2026-11-20T02:00:01Z");
        assert!(!is_overdue(&weekdays, friday, at("2026-11-23T03:00:00Z")));
        assert!(is_overdue(&weekdays, friday, at("2026-11-24T02:00:00Z")));
    }
}
