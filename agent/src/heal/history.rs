//! Timeline histories across regions: copied where they are missing, compared where they are not.

use std::collections::BTreeSet;

use highwater_format::{History, TimelineId};
use highwater_store::Object;

use super::copy::Copied;
use crate::error::{AgentError, Result};
use crate::inventory::timelines;
use crate::region::{Region, get_optional};
use crate::region::{Written, write_once};
use crate::uploader::Shared;

/// Copies the history files that `peer` has and `region` lacks. Two that differ are a conflict: the timelines
/// of one number are not the same history.
pub(super) async fn settle(
    shared: &Shared,
    region: &Region,
    peer: &Region,
    settled: &mut BTreeSet<String>,
) -> Result<Copied> {
    let layout = &shared.archive.layout;
    let mut copied = Copied::default();
    for timeline in timelines(&*peer.quick, layout).await? {
        let key = layout.history(timeline);
        let name = format!("{} {key}", peer.name);
        let ours = get_optional(&*region.quick, &key).await?;
        if timeline == TimelineId::FIRST || (ours.is_some() && settled.contains(&name)) {
            continue;
        }
        let Some(theirs) = get_optional(&*peer.quick, &key).await? else {
            continue;
        };
        if let Err(error) = History::parse(timeline, &theirs) {
            tracing::error!(region = peer.name, key, %error, "the history file cannot be read and is not copied");
            continue;
        }
        match ours {
            Some(ours) if ours == theirs => {
                settled.insert(name);
            }
            Some(ours) => {
                return Err(AgentError::Conflict {
                    region: region.name.clone(),
                    key,
                    ours: format!("that of region {}: {}", peer.name, describe(timeline, &theirs)),
                    theirs: describe(timeline, &ours),
                });
            }
            None => {
                let bytes = theirs.len() as u64;
                if write_once(&*region.quick, &key, Object::new(theirs)).await? == Written::Created {
                    copied.add(Copied { objects: 1, bytes });
                }
            }
        }
    }
    Ok(copied)
}

fn describe(timeline: TimelineId, content: &[u8]) -> String {
    match History::parse(timeline, content) {
        Ok(history) => match history.parent() {
            Some(parent) => format!(
                "timeline {timeline} leaves timeline {} at {}",
                parent.timeline, parent.switch
            ),
            None => format!("timeline {timeline} without a parent"),
        },
        Err(error) => format!("{} bytes that cannot be read: {error}", content.len()),
    }
}
