//! What the running agent says, as far as it is this cluster's.
//!
//! Owns: which of its words are taken over. Does not own: whose agent it is ([`crate::answering`]), nor the verdict.

use highwater_config::Config;
use highwater_format::SystemId;
use serde_json::Value;

use super::{Agent, Slot};
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
        lacking: lacking(document),
        slot: document.get("slot").filter(|slot| !slot.is_null()).cloned(),
    }
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
