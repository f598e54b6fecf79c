//! Asking everyone who knows: the running agent, the server, every region.
//!
//! Owns the questions; each failure becomes part of the answer. Does not own the verdict.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;
use highwater_config::Config;
use highwater_format::{
    BackupId, Branch, Gap, History, Identity, Layout, SystemId, Time, TimelineId, Writer,
};
use highwater_pgwire::Connection;
use highwater_store::Store;

use super::{GapStatus, LastBackup, Place, RegionStatus, Server, Slot, Status, agent, foreign};
use crate::answering::Said;
use crate::backup::list;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::region::{self, Region};
use crate::sql;
use crate::state::State;
use crate::synchronous::{self, Manner, Role};
use crate::writer::claim::newest_of;
use crate::writer::judge::rank;
use crate::{branches, gap, identity, inventory, outage, run, server};

/// What one region told.
struct Told {
    status: RegionStatus,
    position: Option<Position>,
    backups: Vec<BackupId>,
    gaps: Vec<Gap>,
    branches: Vec<Branch>,
    /// The newest timeline's.
    history: Option<History>,
    writer: Option<Writer>,
}

pub(super) async fn gather(config: &Config, now: Time) -> Result<Status> {
    let state = State::new(
        config
            .regions
            .iter()
            .map(|region| region.display_name().to_owned()),
    );
    let regions = region::open(config, &state).await?;
    let (said, (server, identity), mut slot) =
        tokio::join!(agent::ask(config), ask_server(config), ask_slot(config));
    let system_id = match &identity {
        Some(identity) => Some(identity.system_id),
        None => lineage(config, &regions, said.as_ref().ok()).await,
    };
    let agent = agent::of_this_cluster(said, config, system_id);
    agent::add_what_it_saw(&mut slot, &agent);
    let told = join_all(
        regions
            .iter()
            .map(|region| ask_region(config, region, system_id, now)),
    )
    .await;
    let end = server.end;
    let durable = durable(config, &told);
    let last_backup = last_backup(&told, now);
    let failed_backup = agent::failed_backup(&agent, last_backup.as_ref().map(|last| &last.id));
    let gaps = gaps(&told);
    let writer = told
        .iter()
        .filter_map(|told| told.writer.clone())
        .max_by(|a, b| rank(a).cmp(&rank(b)));
    let branches = branches_of(&told);
    let histories = told.iter().filter_map(|told| told.history.as_ref());
    let newest = histories.max_by_key(|history| history.timeline).cloned();
    let behind = |place: Option<Place>| Some(lag(end?, place?, &branches, newest.as_ref()));
    let all: BTreeSet<BackupId> = told
        .iter()
        .flat_map(|told| told.backups.iter().cloned())
        .collect();
    let lacking: BTreeMap<String, String> = agent.lacking.iter().cloned().collect();
    let with_lag = |told: Told| RegionStatus {
        lag_bytes: behind(told.status.stored),
        missing_backups: match told.status.error {
            None => all
                .iter()
                .filter(|id| !told.backups.contains(id))
                .cloned()
                .collect(),
            Some(_) => Vec::new(),
        },
        note: lacking.get(&told.status.name).cloned(),
        ..told.status
    };
    Ok(Status {
        version: super::REPORT_VERSION,
        now,
        breached: Vec::new(),
        system_id,
        agent,
        server,
        slot,
        durable,
        lag_bytes: behind(durable),
        regions: told.into_iter().map(with_lag).collect(),
        last_backup,
        failed_backup,
        gaps,
        branches,
        writer,
        elsewhere: None,
    })
}

async fn ask_server(config: &Config) -> (Server, Option<Identity>) {
    let asked = async {
        let mut conn = server::connect(&run::connection(config)?).await?;
        let system = conn.identify_system().await?;
        let identity = server::identity(&mut conn).await?;
        let standby = server::in_recovery(&mut conn).await.unwrap_or(false);
        let synchronous = match standby {
            true => None,
            false => who_waits(&mut conn, config).await,
        };
        conn.close().await;
        let end = Place {
            timeline: system.timeline,
            lsn: system.xlogpos,
        };
        let server = Server {
            end: Some(end),
            error: None,
            synchronous,
            standby,
        };
        Ok::<_, AgentError>((server, identity))
    };
    match asked.await {
        Ok((server, identity)) => (server, Some(identity)),
        Err(error) => (
            Server {
                error: Some(error.to_string()),
                ..Server::default()
            },
            None,
        ),
    }
}

/// What the primary's list of synchronous standbys makes of an agent with this configuration, where it is not as meant.
async fn who_waits(conn: &mut Connection, config: &Config) -> Option<String> {
    let names = conn.show(synchronous::SETTING).await.ok()?;
    Role::of(&names, Manner::from(&config.wal)).remark(&names)
}

async fn ask_slot(config: &Config) -> Option<Slot> {
    let name = &config.cluster.slot;
    let mut sql = sql::connect(&run::connection(config).ok()?).await.ok()?;
    let row = outage::ask(&mut sql, name).await.ok()?;
    sql.close().await;
    row.map(|row| Slot {
        name: name.clone(),
        active_pid: row.active_pid,
        held_bytes: row.held,
        wal_status: row.wal_status,
        room_bytes: row.safe,
        growth_bytes_per_second: None,
        seconds_until_full: None,
    })
}

/// Without a server the archive itself may say whose it is: where it has only one lineage, or the one that an agent of
/// this cluster's name names.
async fn lineage(
    config: &Config,
    regions: &[std::sync::Arc<Region>],
    said: Option<&Said>,
) -> Option<SystemId> {
    let name = &config.cluster.name;
    let mut found = Vec::new();
    for region in regions {
        found.extend(
            identity::other_lineages(&*region.quick, name)
                .await
                .unwrap_or_default(),
        );
    }
    found.sort_unstable_by_key(|id| id.0);
    found.dedup();
    match found.as_slice() {
        [only] => Some(*only),
        several => said
            .and_then(|said| said.lineage(name))
            .filter(|id| several.contains(id)),
    }
}

async fn ask_region(config: &Config, region: &Region, system_id: Option<SystemId>, now: Time) -> Told {
    let status = RegionStatus {
        name: region.name.clone(),
        stored: None,
        lag_bytes: None,
        pulse: None,
        backups: 0,
        newest_backup: None,
        missing_backups: Vec::new(),
        note: None,
        error: None,
        renewed: false,
        foreign: false,
    };
    let Some(system_id) = system_id else {
        return Told::only(RegionStatus {
            error: Some("the archive's lineage is not known while the server does not answer".into()),
            ..status
        });
    };
    let layout = Layout::new(config.cluster.name.clone(), system_id);
    match read_region(&*region.quick, &layout, now, status.clone()).await {
        Ok(told) => told,
        Err(error) => Told::only(RegionStatus {
            error: Some(error.to_string()),
            ..status
        }),
    }
}

impl Told {
    /// Nothing but what is in `status`.
    fn only(status: RegionStatus) -> Told {
        Told {
            status,
            position: None,
            backups: Vec::new(),
            gaps: Vec::new(),
            branches: Vec::new(),
            history: None,
            writer: None,
        }
    }
}

async fn read_region(store: &dyn Store, layout: &Layout, now: Time, status: RegionStatus) -> Result<Told> {
    let Some(identity) = identity::read(store, layout).await? else {
        return Ok(Told::only(foreign::noted(store, layout, status).await?));
    };
    // Before the position: so that what it speaks of can be there.
    let pulse = inventory::pulse(store, layout).await?;
    let position = inventory::position(store, layout, identity.segment_size).await?;
    let histories = branches::histories(store, layout).await?;
    let mut backups = list::complete(store, layout).await?;
    list::newest_record(store, layout, &mut backups).await?;
    Ok(Told {
        position,
        gaps: gap::read_all(store, layout).await?,
        branches: branches::of(store, layout, identity.segment_size, &histories).await?,
        history: histories.into_iter().max_by_key(|history| history.timeline),
        writer: newest_of(store, layout).await?,
        status: RegionStatus {
            stored: position.map(Place::from),
            pulse,
            backups: backups.len(),
            newest_backup: list::newest(&backups, now).cloned(),
            ..status
        },
        backups,
    })
}

/// What the server has beyond `place`. A place on a timeline that was left before counts up to where that was, and one on
/// a newer timeline than the server's up to where that left the server's.
fn lag(end: Place, place: Place, branches: &[Branch], newest: Option<&History>) -> u64 {
    let common = branches::common_end(branches, Some(place.timeline), place.lsn, Some(end.timeline));
    let left = newest
        .filter(|_| end.timeline < place.timeline)
        .and_then(|newest| newest.switch_of(end.timeline));
    end.lsn
        .distance_from(left.map_or(common, |left| left.min(common)))
}

/// Branches of all regions: of one that several hold to a different length the longest.
fn branches_of(told: &[Told]) -> Vec<Branch> {
    let newest = told
        .iter()
        .flat_map(|told| &told.branches)
        .map(|branch| branch.newest)
        .max();
    let mut found: BTreeMap<TimelineId, Branch> = BTreeMap::new();
    let all = told.iter().flat_map(|told| &told.branches);
    for branch in all.filter(|branch| Some(branch.newest) == newest) {
        let known = found.entry(branch.timeline).or_insert_with(|| branch.clone());
        known.end = known.end.max(branch.end);
    }
    found.into_values().collect()
}

/// The position that as many regions as the policy asks for have reached.
fn durable(config: &Config, told: &[Told]) -> Option<Place> {
    let needed = config.durability.policy.needed(config.regions.len());
    let mut positions: Vec<Position> = told.iter().filter_map(|told| told.position).collect();
    positions.sort_unstable_by(|a, b| b.cmp(a));
    positions.get(needed.checked_sub(1)?).copied().map(Place::from)
}

fn last_backup(told: &[Told], now: Time) -> Option<LastBackup> {
    let newest = told
        .iter()
        .filter_map(|told| list::newest(&told.backups, now))
        .max_by_key(|id| id.started_at())?;
    let has = |told: &&Told| told.backups.contains(newest);
    Some(LastBackup {
        id: newest.clone(),
        regions: told
            .iter()
            .filter(has)
            .map(|told| told.status.name.clone())
            .collect(),
        age_seconds: now.since(newest.started_at()).as_secs(),
    })
}

/// Gaps of all regions; the same hole recorded in several is one.
fn gaps(told: &[Told]) -> Vec<GapStatus> {
    let mut found: Vec<GapStatus> = Vec::new();
    for gap in told.iter().flat_map(|told| &told.gaps) {
        let known = found
            .iter()
            .any(|known| known.gap.timeline == gap.timeline && known.gap.range() == gap.range());
        if known {
            continue;
        }
        let ended_by = gap::ended_by(gap, told.iter().flat_map(|told| &told.backups)).cloned();
        found.push(GapStatus {
            gap: gap.clone(),
            closed: ended_by.is_some(),
            ended_by,
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use highwater_format::Lsn;

    use super::*;

    /// The archive is on timeline 2, which left timeline 1 at 5 and is at 20.
    #[test]
    fn a_server_on_a_timeline_that_was_left_is_behind_with_what_it_wrote_since() {
        let history = History::parse(TimelineId::new(2).unwrap(), b"1\t0/5\tno recovery target\n").unwrap();
        let place = |timeline, lsn| Place {
            timeline: TimelineId::new(timeline).unwrap(),
            lsn: Lsn(lsn),
        };
        for (timeline, lsn, expected) in [(1, 4, 0), (1, 5, 0), (1, 12, 7), (2, 20, 0), (2, 21, 1)] {
            let lag = lag(place(timeline, lsn), place(2, 20), &[], Some(&history));
            assert_eq!(lag, expected, "{lsn} on {timeline}");
        }
    }
}
