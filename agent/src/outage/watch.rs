//! Looking at the slot every few seconds.
//!
//! Owns: the question, the free space of the disk, and publishing what was seen. Every look has a connection of its own,
//! as a monitoring probe has: one that stayed open would hold up a smart shutdown. Without SQL the agent works as before,
//! but nothing of this is known, which is said.

use std::path::Path;
use std::time::Duration;

use highwater_config::{Config, OutageConfig, OutagePolicy};
use highwater_pgwire::{ConnInfo, Connection};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{GiveUp, Judge, Look, Outlook};
use crate::clock::Clock;
use crate::error::{AgentError, Result};
use crate::server;
use crate::sql::{self, Rows};
use crate::state::{SlotView, State};
use crate::surroundings::Surroundings;
use crate::synchronous::{self, Manner};

/// Between two looks: a connection and one row.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How long one may take, on a server that is busy.
const LOOK_PATIENCE: Duration = Duration::from_secs(30);
/// Time left is said in the log when it is less than this, every so many looks.
const SAY_BELOW: Duration = Duration::from_secs(3600);
const SAY_EVERY: u64 = 12;

/// The slot as the server's view shows it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Row {
    pub(crate) active_pid: Option<u32>,
    pub(crate) wal_status: Option<String>,
    /// WAL that the server keeps for it.
    pub(crate) held: Option<u64>,
    /// WAL that may be written before the server gives it up; none without `max_slot_wal_keep_size`.
    pub(crate) safe: Option<u64>,
    /// What of `held` a slot made now would not hold; none where that was not asked for.
    pub(crate) gain: Option<u64>,
}

/// Asks for one slot; none if there is none.
pub(crate) async fn ask(sql: &mut Connection, name: &str) -> Result<Option<Row>> {
    // The configuration allows only [a-z0-9_] in the name. On a standby the position is that of replay.
    let query = format!(
        "SELECT active_pid, wal_status, greatest(safe_wal_size, 0) AS safe, CASE WHEN pg_catalog.pg_is_in_recovery() \
         THEN pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_last_wal_replay_lsn(), restart_lsn) \
         ELSE pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn) END::bigint AS held, \
         safe_wal_size IS NOT NULL AS limited FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}'"
    );
    let rows = Rows(sql.simple_query(&query).await?);
    Ok((rows.len() == 1).then(|| Row {
        active_pid: rows.value(0, "active_pid"),
        wal_status: rows.text(0, "wal_status").map(|text| text.into_owned()),
        held: rows.value(0, "held"),
        safe: rows
            .value(0, "safe")
            .filter(|_| rows.flag(0, "limited") == Some(true)),
        gain: None,
    }))
}

/// WAL that the server keeps for the slot from before its last checkpoint. Everybody may ask for that, unless somebody has
/// revoked it.
async fn ask_gain(sql: &mut Connection, name: &str) -> Option<u64> {
    let query = format!(
        "SELECT greatest(pg_catalog.pg_wal_lsn_diff((pg_catalog.pg_control_checkpoint()).redo_lsn, restart_lsn), 0)::bigint \
         AS gain FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}'"
    );
    Rows(sql.simple_query(&query).await.ok()?).value(0, "gain")
}

/// Bytes that an unprivileged writer may still use on the file system of `path`.
fn free_space(path: &Path) -> std::io::Result<u64> {
    let stats = nix::sys::statvfs::statvfs(path)?;
    Ok(stats.blocks_available().saturating_mul(stats.fragment_size()))
}

/// The task.
#[derive(Debug)]
pub(crate) struct Watcher {
    /// The server.
    conninfo: ConnInfo,
    /// The slot.
    slot: String,
    /// What is watched for.
    config: OutageConfig,
    /// How the agent was told to behave towards commits.
    manner: Manner,
    /// Where it is shown.
    state: State,
    /// When.
    clock: Clock,
    /// Where the wish goes.
    give_up: GiveUp,
    /// Ends the task.
    cancel: CancellationToken,
}

impl Watcher {
    /// For an agent in these surroundings.
    pub(crate) fn new(
        config: &Config,
        surroundings: &Surroundings,
        give_up: &GiveUp,
        cancel: &CancellationToken,
    ) -> Self {
        Self {
            conninfo: surroundings
                .conninfo
                .clone()
                .with_application_name("highwater watch"),
            slot: config.cluster.slot.clone(),
            config: config.outage.clone(),
            manner: Manner::from(&config.wal),
            state: surroundings.state.clone(),
            clock: surroundings.clock.clone(),
            give_up: give_up.clone(),
            cancel: cancel.clone(),
        }
    }

    /// Runs until cancelled.
    pub(crate) async fn run(self) -> Result<()> {
        let cancel = self.cancel.clone();
        cancel.run_until_cancelled(self.repeat()).await;
        Ok(())
    }

    async fn repeat(&self) {
        let started = Instant::now();
        let mut judge = Judge::new(self.config.clone());
        let (mut granted, mut blind, mut alarm) = (0, false, Alarm::default());
        loop {
            let now = self.give_up.granted();
            if std::mem::replace(&mut granted, now) != now {
                judge.gave_up();
            }
            let seen = self.look_in_time().await;
            // What was asked before it was given up is about the slot before.
            if self.give_up.granted() == granted {
                if let Err(error) = &seen
                    && !blind
                {
                    self.say_blind(error);
                }
                blind = seen.is_err();
                self.take(&mut judge, seen.ok().flatten(), started.elapsed());
                let outlook = judge.outlook();
                if !blind && let Some(left) = alarm.take(outlook) {
                    say_time_left(left, outlook.bytes_per_second);
                }
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn look_in_time(&self) -> Result<Option<Row>> {
        timeout(LOOK_PATIENCE, self.look()).await.unwrap_or_else(|_| {
            Err(AgentError::Trouble {
                what: format!("the server has not answered within {} s", LOOK_PATIENCE.as_secs()),
                next: "It is asked again".into(),
            })
        })
    }

    async fn look(&self) -> Result<Option<Row>> {
        let mut sql = sql::connect(&self.conninfo).await?;
        let standby = server::in_recovery(&mut sql).await?;
        if !standby {
            let now = Some(self.clock.now());
            self.state.update_quietly(|snapshot| snapshot.answered_at = now);
        }
        let mut row = ask(&mut sql, &self.slot).await;
        if let Ok(Some(row)) = &mut row
            && self.config.policy == OutagePolicy::GiveUp
        {
            row.gain = ask_gain(&mut sql, &self.slot).await;
        }
        self.look_who_waits(&mut sql, standby).await;
        sql.close().await;
        row
    }

    /// The server's list of synchronous standbys may be changed at any moment.
    async fn look_who_waits(&self, sql: &mut Connection, standby: bool) {
        let setting = synchronous::SETTING;
        let Ok(answer) = sql.simple_query(&format!("SHOW {setting}")).await else {
            return;
        };
        if let Some(names) = Rows(answer).text(0, setting) {
            synchronous::notice(&self.state, self.manner, &names, standby);
        }
    }

    fn say_blind(&self, error: &AgentError) {
        match self.config.policy {
            OutagePolicy::Hold => {
                tracing::warn!(%error, "how much WAL the slot holds cannot be asked for; it is asked again");
            }
            OutagePolicy::GiveUp => tracing::error!(
                %error,
                "how much WAL the slot holds cannot be asked for: outage.policy = \"give-up\" does not work meanwhile"
            ),
        }
    }

    /// Free space of the disk; none if none was named or it cannot be seen.
    fn free(&self) -> Option<u64> {
        let disk = self.config.disk.as_deref()?;
        free_space(disk)
            .inspect_err(|error| {
                tracing::warn!(disk = %disk.display(), %error, "the free space of outage.disk cannot be read");
            })
            .ok()
    }

    /// Shows what was seen, and asks for the slot to be given up, or for that no longer: a wish that nobody could grant
    /// since the last look does not outlive what it came from. None: nothing is known of the slot, or there is none.
    fn take(&self, judge: &mut Judge, row: Option<Row>, at: Duration) {
        let Some(row) = row else {
            self.state.update_quietly(|snapshot| snapshot.slot = None);
            self.give_up.ask(None);
            return;
        };
        let look = Look {
            at,
            held: row.held.unwrap_or(0),
            gain: row.gain,
            room: row.safe.into_iter().chain(self.free()).min(),
        };
        let why = judge.take(look);
        let outlook = judge.outlook();
        self.state.update_quietly(|snapshot| {
            snapshot.slot = Some(SlotView {
                held_bytes: look.held,
                room_bytes: look.room,
                wal_status: row.wal_status,
                growth_bytes_per_second: outlook.bytes_per_second,
                seconds_until_full: outlook.full_in.map(|left| left.as_secs()),
            });
        });
        self.give_up.ask(why);
    }
}

/// When the time left is said: as soon as there is little of it, and again every minute.
#[derive(Debug, Default)]
struct Alarm {
    looks_since: Option<u64>,
}

impl Alarm {
    /// The time left, if it is to be said now.
    fn take(&mut self, outlook: Outlook) -> Option<Duration> {
        self.looks_since = self
            .looks_since
            .map(|looks| looks + 1)
            .filter(|looks| *looks < SAY_EVERY);
        let left = outlook.full_in.filter(|left| *left < SAY_BELOW)?;
        self.looks_since.is_none().then(|| {
            self.looks_since = Some(0);
            left
        })
    }
}

fn say_time_left(left: Duration, bytes_per_second: u64) {
    tracing::error!(
        minutes_left = left.as_secs() / 60,
        seconds_left = left.as_secs(),
        bytes_per_second,
        "the WAL kept for the slot grows and the room for it runs out: mend storage, or see [outage] for what happens then"
    );
}

#[cfg(test)]
mod tests {
    use highwater_config::Acknowledge;

    use super::*;

    /// One that gives up at 10 MiB, after eight seconds.
    fn watcher() -> Watcher {
        Watcher {
            conninfo: ConnInfo::resolve(Some("host=/nonexistent user=highwater")).unwrap(),
            slot: "highwater".into(),
            config: OutageConfig {
                policy: OutagePolicy::GiveUp,
                max_backlog: Some(10 << 20),
                keep_free: None,
                disk: None,
                patience: Duration::from_secs(8),
            },
            manner: Manner {
                synchronous: false,
                acknowledge: Acknowledge::Stream,
            },
            state: State::new([]),
            clock: Clock::system(),
            give_up: GiveUp::default(),
            cancel: CancellationToken::new(),
        }
    }

    #[test]
    fn a_wish_that_nobody_grants_is_withdrawn_when_the_backlog_shrinks_or_cannot_be_seen() {
        let watcher = watcher();
        let mut judge = Judge::new(watcher.config.clone());
        let mut asked_after = |seconds, held: Option<u64>| {
            let row = held.map(|held| Row {
                held: Some(held << 20),
                ..Row::default()
            });
            watcher.take(&mut judge, row, Duration::from_secs(seconds));
            watcher.give_up.asked()
        };
        assert_eq!(asked_after(0, Some(50)), None);
        assert!(asked_after(10, Some(50)).is_some());
        assert!(asked_after(15, Some(51)).is_some_and(|why| why.contains("51MiB")));
        assert_eq!(asked_after(20, None), None);
        assert!(asked_after(25, Some(51)).is_some());
        assert_eq!(asked_after(30, Some(40)), None);
        assert_eq!(watcher.give_up.granted(), 0);
    }

    #[test]
    fn little_time_is_said_at_once_and_again_every_minute() {
        let outlook = |seconds| Outlook {
            bytes_per_second: 1,
            full_in: Some(Duration::from_secs(seconds)),
        };
        let mut alarm = Alarm::default();
        assert_eq!(alarm.take(outlook(4000)), None);
        let said: Vec<bool> = (0..25).map(|_| alarm.take(outlook(300)).is_some()).collect();
        let places: Vec<usize> = (0..25).filter(|place| said[*place]).collect();
        assert_eq!(places, [0, 12, 24]);
    }
}
