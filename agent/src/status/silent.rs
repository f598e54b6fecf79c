//! Who would have to answer for what is not known.
//!
//! A region that does not answer may hold all of it: "nothing" and "none" are said only where everybody has answered.
//! Owns: naming those who have not. Does not own: the verdict, which says so in its own words.

use super::Status;

/// They do not answer; none when everybody has. A region of another cluster has answered.
pub(super) fn silent(status: &Status) -> Option<String> {
    let regions = status.regions.iter();
    let away = regions.filter(|region| region.error.is_some() && !region.foreign);
    let names: Vec<&str> = away.map(|region| region.name.as_str()).collect();
    match names.as_slice() {
        [] => None,
        // The regions were not asked: without a lineage there is nothing to ask for.
        _ if status.system_id.is_none() => Some("the server does not answer".into()),
        [one] => Some(format!("{one} does not answer")),
        [others @ .., last] => Some(format!("{} and {last} do not answer", others.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use highwater_format::{BackupId, Lsn, SystemId, TimelineId};

    use super::*;
    use crate::status::judge::samples::{at, status};
    use crate::status::{LastBackup, Place, RegionStatus};

    /// Regions with these names and errors, of which too few are known to hold WAL.
    fn with(regions: &[(&str, Option<&str>)]) -> Status {
        let mut all = status(None, None);
        let region = all.regions.remove(0);
        all.regions = regions
            .iter()
            .map(|(name, error)| RegionStatus {
                name: (*name).to_owned(),
                error: error.map(str::to_owned),
                ..region.clone()
            })
            .collect();
        (all.system_id, all.durable) = (Some(SystemId(7)), None);
        all
    }

    fn says(status: &Status, line: &str) -> bool {
        status.to_string().lines().any(|said| said == line)
    }

    #[test]
    fn those_who_do_not_answer_are_named() {
        let away = Some("timed out");
        for (regions, expected) in [
            (vec![("ra", None), ("rb", None)], None),
            (vec![("ra", None), ("rb", away)], Some("rb does not answer")),
            (vec![("ra", away), ("rb", away)], Some("ra and rb do not answer")),
            (
                vec![("ra", away), ("rb", away), ("rc", away)],
                Some("ra, rb and rc do not answer"),
            ),
        ] {
            assert_eq!(silent(&with(&regions)).as_deref(), expected, "{regions:?}");
        }
        let mut lineless = with(&[("ra", away), ("rb", away)]);
        lineless.system_id = None;
        assert_eq!(silent(&lineless).as_deref(), Some("the server does not answer"));
        let mut foreign = with(&[("ra", away)]);
        foreign.regions[0].foreign = true;
        assert_eq!(silent(&foreign), None);
    }

    #[test]
    fn what_is_not_known_is_not_called_nothing() {
        let empty = with(&[("ra", None), ("rb", None)]);
        assert!(says(&empty, "durable  nothing"));
        assert!(says(&empty, "backup   none"));
        let mut away = with(&[("ra", None), ("rb", Some("timed out"))]);
        assert!(says(&away, "durable  not known while rb does not answer"));
        assert!(says(&away, "backup   not known while rb does not answer"));
        away.last_backup = Some(LastBackup {
            id: BackupId::new(TimelineId::FIRST, Lsn(0x200_0028), at("2026-11-20T02:00:01Z")),
            regions: vec!["ra".into()],
            age_seconds: 36_000,
        });
        assert!(!away.to_string().contains("backup   not known"), "{away}");
    }

    /// It knows what it has told the server.
    #[test]
    fn a_running_agent_knows_what_is_durable() {
        let mut away = with(&[("ra", None), ("rb", Some("timed out"))]);
        away.agent.running = true;
        away.agent.durable = Some(Place {
            timeline: TimelineId::FIRST,
            lsn: Lsn(0x300_0000),
        });
        let line = "durable  0/3000000 on timeline 1, as the agent says while rb does not answer";
        assert!(says(&away, line), "{away}");
        away.agent.lag_bytes = Some(512);
        let text = away.to_string();
        assert!(text.contains(", 512 bytes behind, as the agent"), "{text}");
    }
}
