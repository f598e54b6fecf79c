//! Timeline histories across regions: copied where they are missing, compared where they are not.

use std::collections::BTreeSet;

use bytes::Bytes;
use highwater_format::{FormatError, History, TimelineId};
use highwater_store::Object;

use super::copy::Copied;
use crate::error::{AgentError, Result};
use crate::inventory::timelines;
use crate::region::{Compared, Region, Written, compare, get_optional, write_once};
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
        if let Err(error) = whole(&peer.name, &key, timeline, &theirs) {
            tracing::error!(region = region.name, %error, "the history file is not copied");
            continue;
        }
        match ours {
            Some(ours) if ours == theirs => {
                settled.insert(name);
            }
            Some(ours) if is_damaged(&ours, &theirs) => {
                tracing::error!(
                    region = region.name,
                    key,
                    "the history file is damaged here; another region has it whole. Nothing is replaced: remove it"
                );
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

fn is_damaged(ours: &Bytes, theirs: &Bytes) -> bool {
    matches!(compare(theirs, ours), Compared::Unreadable(_))
}

/// The history, if the file is whole: PostgreSQL writes none without an ancestor, and ends each line. One that was cut off
/// in its last line may still be read, and say something else.
pub(crate) fn whole(region: &str, key: &str, timeline: TimelineId, content: &[u8]) -> Result<History> {
    let problem = match History::parse(timeline, content) {
        Err(error) => error.to_string(),
        Ok(history) if timeline == TimelineId::FIRST => return Ok(history),
        Ok(history) if content.ends_with(b"\n") && !history.entries.is_empty() => return Ok(history),
        Ok(_) => format!("{} bytes, which are not all of a history file", content.len()),
    };
    Err(AgentError::Object {
        region: region.to_owned(),
        key: key.to_owned(),
        source: FormatError::Damaged {
            what: "the history file",
            problem,
        },
    })
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

#[cfg(test)]
mod tests {
    use highwater_config::Policy;

    use super::*;
    use crate::test_world::world;

    const WHOLE: &str = "1\t0/400000\tpromoted\n";

    #[tokio::test]
    async fn a_history_that_was_cut_off_in_one_region_is_reported_and_neither_copied_nor_a_contradiction() {
        let world = world(Policy::All);
        let (two, three) = (TimelineId::new(2).unwrap(), TimelineId::new(3).unwrap());
        let layout = &world.shared.archive.layout;
        let three_whole = format!("{WHOLE}\n2\t0/500000\tpromoted\n");
        world.put(0, &layout.history(two), &WHOLE[..9]).await;
        world.put(1, &layout.history(two), WHOLE).await;
        world.put(1, &layout.history(three), three_whole.clone()).await;
        let settled = &mut BTreeSet::new();
        let copied = settle(&world.shared, world.region(0), world.region(1), settled).await;
        assert_eq!(copied.unwrap().objects, 1, "the others are copied");
        let there = get_optional(&*world.region(0).quick, &layout.history(two)).await;
        assert_eq!(there.unwrap().unwrap(), &WHOLE[..9]);

        // The other way round: one whose last line is cut would tell another switch.
        let cut = "1\t0/4000";
        for (region, content) in [(1, cut), (2, "")] {
            world.put(region, &layout.history(two), content).await;
            world.remove(0, &layout.history(two)).await;
            let settled = &mut BTreeSet::new();
            let peer = world.region(region);
            settle(&world.shared, world.region(0), peer, settled)
                .await
                .unwrap();
            assert!(!world.has(0, &layout.history(two)).await, "{content:?}");
        }

        // Two that can be read and differ.
        world.put(0, &layout.history(two), WHOLE).await;
        world
            .put(1, &layout.history(two), "1\t0/300000\tpromoted\n")
            .await;
        let settled = &mut BTreeSet::new();
        let error = settle(&world.shared, world.region(0), world.region(1), settled).await;
        assert!(matches!(error, Err(AgentError::Conflict { .. })), "{error:?}");
    }
}
