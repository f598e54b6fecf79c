//! What the running agent says, as far as it is this cluster's.
//!
//! Owns: which of its words are taken over. Does not own: whose agent it is ([`crate::answering`]), nor the verdict.

use highwater_config::Config;
use highwater_format::{BackupId, Lsn, SystemId, TimelineId};
use serde_json::Value;

use super::{Agent, Place, Slot};
use crate::answering::{self, Said};

/// What answers at `admin.listen`; the error says why nothing does.
pub(super) async fn ask(config: &Config) -> Result<Said, String> {
    match config.admin.listen {
        Some(listen) => answering::ask(listen).await,
        None => Err("[admin] listen is off".into()),
    }
}

/// The agent's view. Another cluster's agent says nothing of this one.
pub(super) fn of_this_cluster(
    said: Result<Said, String>,
    config: &Config,
    system_id: Option<SystemId>,
) -> Agent {
    let none = |reason| Agent {
        reason: Some(reason),
        ..Agent::default()
    };
    let said = match said {
        Ok(said) => said,
        Err(reason) => return none(reason),
    };
    if let Some(strange) = said.why_strange(&config.cluster.name, system_id) {
        return none(strange);
    }
    let document = &said.document;
    Agent {
        running: true,
        ready: Some(said.ready),
        reason: document["reason"].as_str().map(str::to_owned),
        lag_seconds: document["lag_seconds"].as_f64(),
        durable: durable(document),
        lag_bytes: document["lag_bytes"].as_u64(),
        failed_backup: failed(&document["last_backup"]),
        lacking: lacking(document),
        slot: document.get("slot").filter(|slot| !slot.is_null()).cloned(),
    }
}

/// Up to where it says that WAL is durable; none as long as nothing is, or it has not read the regions yet.
fn durable(document: &Value) -> Option<Place> {
    let lsn: Lsn = document["durable"].as_str()?.parse().ok()?;
    let timeline = u32::try_from(document["durable_timeline"].as_u64()?).ok()?;
    let timeline = TimelineId::new(timeline)?;
    (lsn > Lsn::ZERO).then_some(Place { timeline, lsn })
}

/// Why the newest attempt at a base backup failed, and the newest one that the agent knew of then.
fn failed(last: &Value) -> Option<(Option<BackupId>, String)> {
    let id = last["id"].as_str().and_then(|id| BackupId::parse(id).ok());
    Some((id, last["error"].as_str()?.to_owned()))
}

/// Why the newest attempt at a base backup failed. One that was taken since, as by the `backup` command, has made up for it:
/// the agent itself sees that only minutes later.
pub(super) fn failed_backup(agent: &Agent, newest: Option<&BackupId>) -> Option<String> {
    let (known, error) = agent.failed_backup.as_ref()?;
    let known = known.as_ref().map(BackupId::started_at);
    let is_newer = newest.is_some_and(|newest| known.is_none_or(|known| newest.started_at() > known));
    (!is_newer).then(|| error.clone())
}

/// Name and words for each region that lacks something, as the agent's document has them.
fn lacking(document: &Value) -> Vec<(String, String)> {
    let regions = document["regions"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let told = regions.iter().filter_map(|region| {
        let blocked = region["blocked"].as_str();
        let detail = blocked.or_else(|| region["lacks"]["detail"].as_str())?;
        Some((region["name"].as_str()?.to_owned(), detail.to_owned()))
    });
    told.collect()
}

/// What only a running agent knows: it has looked more than once, and perhaps at the disk.
pub(super) fn add_what_it_saw(slot: &mut Option<Slot>, agent: &Agent) {
    if let (Some(slot), Some(seen)) = (slot, &agent.slot) {
        slot.room_bytes = seen["room_bytes"].as_u64().or(slot.room_bytes);
        slot.growth_bytes_per_second = seen["growth_bytes_per_second"].as_u64();
        slot.seconds_until_full = seen["seconds_until_full"].as_u64();
    }
}

#[cfg(test)]
mod tests {
    use highwater_format::Time;
    use serde_json::json;

    use super::*;
    use crate::state::Snapshot;

    /// Read from what the admin endpoint makes of its own numbers.
    #[test]
    fn what_it_calls_durable_is_read_from_its_document() {
        let says = |timeline, lsn| {
            let snapshot = Snapshot {
                durable: lsn,
                durable_timeline: timeline,
                ..Snapshot::default()
            };
            durable(&serde_json::to_value(&snapshot).unwrap())
        };
        let (timeline, lsn) = (TimelineId::new(2).unwrap(), Lsn(0x300_0000));
        assert_eq!(says(Some(timeline), lsn), Some(Place { timeline, lsn }));
        assert_eq!(says(Some(timeline), Lsn::ZERO), None);
        assert_eq!(says(None, Lsn::ZERO), None);
        assert_eq!(durable(&json!({"ready": true})), None);
    }

    #[test]
    fn a_failure_counts_until_a_newer_base_backup_is_there() {
        let id = |second: i64| {
            let began = Time::from_unix_micros(second * 1_000_000);
            BackupId::new(TimelineId::FIRST, Lsn(0x200_0028), began)
        };
        let agent = |id: Option<BackupId>, error: Option<&str>| Agent {
            failed_backup: failed(&json!({"id": id.map(|id| id.to_string()), "error": error})),
            ..Agent::default()
        };
        let why = Some("refused".to_owned());
        for (agent, newest, expected) in [
            (agent(Some(id(100)), Some("refused")), Some(id(100)), why.clone()),
            (agent(Some(id(100)), Some("refused")), Some(id(200)), None),
            (agent(Some(id(100)), Some("refused")), None, why.clone()),
            (agent(None, Some("refused")), None, why),
            (agent(None, Some("refused")), Some(id(100)), None),
            (agent(Some(id(100)), None), Some(id(100)), None),
            (Agent::default(), Some(id(100)), None),
        ] {
            assert_eq!(
                failed_backup(&agent, newest.as_ref()),
                expected,
                "{agent:?} {newest:?}"
            );
        }
    }
}
