//! `highwater-agent status`: how far the archive is, and whether the recovery point is kept.
//!
//! Owns: gathering it from the running agent where one answers, from the server, and from the regions
//! themselves; and the verdict (exit 1 when breached, base backups included). The regions are always read: what an agent says of
//! itself is not proof. Anything that does not answer is shown as such and does not stop the rest.
//! Does not own: the rule for a running agent (`admin::not_ready`).

mod age;
mod agent;
mod backups;
mod doubt;
mod foreign;
mod gather;
mod judge;
mod silent;

use std::fmt;

use highwater_config::{Config, Exit};
use highwater_format::{BackupId, Branch, Gap, Lsn, Pulse, SystemId, Time, TimelineId, Writer};
use serde::Serialize;

use crate::clock::Clock;
use crate::error::Result;
use crate::frontier::Position;
use crate::schedule::Schedule;

/// Version of the JSON document.
const REPORT_VERSION: u32 = 1;

/// Everything that is known.
#[derive(Debug, Serialize)]
pub struct Status {
    version: u32,
    /// By this machine's clock.
    pub now: Time,
    /// Why the recovery point is breached; empty when it is kept.
    pub breached: Vec<String>,
    /// The lineage, when the server or the archive named one.
    pub system_id: Option<SystemId>,
    /// The running agent's own view.
    pub agent: Agent,
    /// The server.
    pub server: Server,
    /// The slot; none when it is missing or cannot be seen.
    pub slot: Option<Slot>,
    /// Up to where as many regions as the policy asks for are seen to hold the WAL; none, too, where too few can be read.
    pub durable: Option<Place>,
    /// WAL that the server has and that is not durable.
    pub lag_bytes: Option<u64>,
    /// Every region, in the order of the configuration.
    pub regions: Vec<RegionStatus>,
    /// The newest base backup of any region.
    pub last_backup: Option<LastBackup>,
    /// Why the newest attempt at one failed, as the running agent says.
    pub failed_backup: Option<String>,
    /// Recorded holes in the WAL.
    pub gaps: Vec<GapStatus>,
    /// WAL that the newest timeline never had.
    pub branches: Vec<Branch>,
    /// The newest claim of any region: who writes.
    pub writer: Option<Writer>,
    /// Why the pulses do not speak of the server that was asked.
    #[serde(skip)]
    pub elsewhere: Option<String>,
}

/// A position with its timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The timeline.
    pub timeline: TimelineId,
    /// The LSN.
    pub lsn: Lsn,
}

impl From<Position> for Place {
    fn from(position: Position) -> Place {
        Place {
            timeline: position.timeline,
            lsn: position.lsn,
        }
    }
}

/// What the admin endpoint answered.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Agent {
    /// Whether this cluster's agent answered.
    pub running: bool,
    /// Its own verdict.
    pub ready: Option<bool>,
    /// Its reason, or why none answered, or whose agent did.
    pub reason: Option<String>,
    /// For how long WAL has waited to become durable.
    pub lag_seconds: Option<f64>,
    /// Up to where WAL is durable, as it says: what it has told the server, whichever regions answer now.
    pub durable: Option<Place>,
    /// WAL that the server has and that is not durable, as it says.
    pub lag_bytes: Option<u64>,
    /// The newest base backup that it knew of when an attempt at another one failed, and why that failed; none after a success.
    #[serde(skip)]
    pub failed_backup: Option<(Option<BackupId>, String)>,
    /// What it says of regions that lack something, by name.
    #[serde(skip)]
    pub lacking: Vec<(String, String)>,
    /// What it saw of the slot.
    #[serde(skip)]
    slot: Option<serde_json::Value>,
}

/// What the server answered.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Server {
    /// Its position.
    pub end: Option<Place>,
    /// Why there is none.
    pub error: Option<String>,
    /// What its list of synchronous standbys makes of the agent, where somebody should know.
    pub synchronous: Option<String>,
    /// It is in recovery: another server's agent may archive what it receives.
    #[serde(skip)]
    pub standby: bool,
}

/// The slot.
#[derive(Debug, Clone, Serialize)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// PID of the walsender that uses it.
    pub active_pid: Option<u32>,
    /// WAL that the server keeps for it.
    pub held_bytes: Option<u64>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// WAL that may still be written before the server gives it up or the disk is full; none if not known.
    pub room_bytes: Option<u64>,
    /// By how much `held_bytes` grows; none without a running agent.
    pub growth_bytes_per_second: Option<u64>,
    /// When the room is used up at that rate; none: never, or not known.
    pub seconds_until_full: Option<u64>,
}

/// One region.
#[derive(Debug, Clone, Serialize)]
pub struct RegionStatus {
    /// Its name.
    pub name: String,
    /// End of its WAL.
    pub stored: Option<Place>,
    /// WAL that the server has and the region has not.
    pub lag_bytes: Option<u64>,
    /// The newest pulse.
    pub pulse: Option<Pulse>,
    /// Complete base backups.
    pub backups: usize,
    /// The newest of them.
    pub newest_backup: Option<BackupId>,
    /// Complete base backups of other regions that are not complete here.
    pub missing_backups: Vec<BackupId>,
    /// What the running agent found missing here, and does about it.
    pub note: Option<String>,
    /// Why it could not be read.
    pub error: Option<String>,
    /// The pulse has changed since it was looked at first, where that was done.
    #[serde(skip)]
    pub renewed: bool,
    /// The cluster's name belongs to another server there; `error` says to which.
    #[serde(skip)]
    pub foreign: bool,
}

/// The newest base backup.
#[derive(Debug, Clone, Serialize)]
pub struct LastBackup {
    /// Its id.
    pub id: BackupId,
    /// The regions that have it.
    pub regions: Vec<String>,
    /// Time since it began.
    pub age_seconds: u64,
}

/// A recorded hole.
#[derive(Debug, Clone, Serialize)]
pub struct GapStatus {
    /// The hole.
    #[serde(flatten)]
    pub gap: Gap,
    /// A base backup began after it: everything later can be restored.
    pub closed: bool,
    /// The first such base backup.
    pub ended_by: Option<BackupId>,
}

impl Status {
    /// The command's exit code.
    pub fn exit(&self) -> Exit {
        if self.breached.is_empty() {
            Exit::Done
        } else {
            Exit::No
        }
    }
}

/// Gathers and judges.
pub async fn run(config: &Config, clock: &Clock) -> Result<Status> {
    let schedule: Option<Schedule> = config.backup.schedule.as_deref().map(str::parse).transpose()?;
    let status = Box::pin(gather::gather(config, clock.now())).await?;
    let mut status = Box::pin(doubt::settled(config, clock, status)).await?;
    let needed = config.durability.policy.needed(config.regions.len());
    let of_wal = judge::breaches(&status, needed, config.pulse.interval);
    let of_backups = backups::breaches(&status, needed, schedule.as_ref());
    let reasons = foreign::breach(&status, needed).into_iter();
    status.breached = reasons.chain(of_wal).chain(of_backups).collect();
    Ok(status)
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self
            .agent
            .reason
            .as_deref()
            .unwrap_or("streaming, recovery point kept");
        writeln!(
            f,
            "agent    {}{reason}",
            if self.agent.running { "" } else { "not answering: " }
        )?;
        match (&self.server.end, &self.server.error) {
            (Some(end), _) => writeln!(f, "server   {} on timeline {}", end.lsn, end.timeline)?,
            (None, error) => writeln!(f, "server   {}", error.as_deref().unwrap_or("unknown"))?,
        }
        if let Some(remark) = &self.server.synchronous {
            writeln!(f, "commits  {remark}")?;
        }
        match &self.slot {
            None => writeln!(f, "slot     missing or not visible")?,
            Some(slot) => writeln!(f, "slot     {}", SlotLine(slot))?,
        }
        writeln!(f, "durable  {}", DurableLine(self))?;
        for region in &self.regions {
            writeln!(f, "region   {}", RegionLine(region, self.now))?;
        }
        writeln!(f, "backup   {}", BackupLine(self))?;
        for GapStatus { gap, ended_by, .. } in &self.gaps {
            write!(
                f,
                "gap      {} on timeline {}, recorded {}: {}; ",
                gap.range(),
                gap.timeline,
                gap.recorded_at,
                gap.reason
            )?;
            match ended_by {
                Some(backup) => writeln!(f, "ended by base backup {backup}")?,
                None => writeln!(f, "OPEN: no base backup has ended it")?,
            }
        }
        if let Some(writer) = &self.writer {
            writeln!(
                f,
                "writer   {} (pid {}), timeline {}, epoch {}, since {}",
                writer.host, writer.pid, writer.timeline, writer.epoch, writer.claimed_at
            )?;
        }
        for branch in &self.branches {
            writeln!(f, "branch   {branch}")?;
        }
        if self.breached.is_empty() {
            return write!(f, "the recovery point is kept");
        }
        write!(f, "BREACHED: {}", self.breached.join("; "))
    }
}

struct DurableLine<'a>(&'a Status);

impl fmt::Display for DurableLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seen, agent) = (self.0, &self.0.agent);
        let away = silent::silent(seen);
        let (durable, lag, away) = match (seen.durable, agent.durable, away) {
            (Some(durable), _, _) => (durable, seen.lag_bytes, None),
            (None, _, None) => return write!(f, "nothing"),
            (None, None, Some(away)) => return write!(f, "not known while {away}"),
            (None, Some(told), Some(away)) => (told, agent.lag_bytes, Some(away)),
        };
        write!(f, "{} on timeline {}", durable.lsn, durable.timeline)?;
        if let Some(lag) = lag {
            write!(f, ", {lag} bytes behind")?;
        }
        match away {
            Some(away) => write!(f, ", as the agent says while {away}"),
            None => Ok(()),
        }
    }
}

struct BackupLine<'a>(&'a Status);

impl fmt::Display for BackupLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.0.last_backup, silent::silent(self.0)) {
            (None, None) => write!(f, "none")?,
            (None, Some(away)) => write!(f, "not known while {away}")?,
            (Some(last), _) => {
                let (hours, regions) = (last.age_seconds / 3600, last.regions.join(", "));
                write!(f, "{}, {hours} h old, in {regions}", last.id)?;
            }
        }
        match &self.0.failed_backup {
            Some(error) => write!(f, "; the newest attempt FAILED: {error}"),
            None => Ok(()),
        }
    }
}

struct SlotLine<'a>(&'a Slot);

impl fmt::Display for SlotLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Slot {
            name,
            active_pid,
            held_bytes,
            wal_status,
            room_bytes,
            growth_bytes_per_second,
            seconds_until_full,
        } = self.0;
        write!(f, "{name}")?;
        match active_pid {
            Some(pid) => write!(f, ", in use by PID {pid}")?,
            None => write!(f, ", not in use")?,
        }
        if let Some(bytes) = held_bytes {
            write!(f, ", {bytes} bytes of WAL kept for it")?;
        }
        wal_status.iter().try_for_each(|status| write!(f, ", {status}"))?;
        match room_bytes {
            Some(room) => write!(f, ", room for {room} more")?,
            None => write!(
                f,
                ", room not known (max_slot_wal_keep_size and outage.disk are not set)"
            )?,
        }
        if let Some(growth) = growth_bytes_per_second.filter(|growth| *growth > 0) {
            write!(f, ", growing by {growth} bytes/s")?;
        }
        match seconds_until_full {
            Some(seconds) => write!(f, ", FULL IN {} MIN", seconds / 60),
            None => Ok(()),
        }
    }
}

struct RegionLine<'a>(&'a RegionStatus, Time);

impl fmt::Display for RegionLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RegionLine(region, now) = self;
        write!(f, "{}: ", region.name)?;
        if let Some(error) = &region.error {
            return write!(f, "{error}");
        }
        match &region.stored {
            None => write!(f, "no WAL")?,
            Some(place) => write!(f, "{} on timeline {}", place.lsn, place.timeline)?,
        }
        if let Some(lag) = region.lag_bytes {
            write!(f, ", {lag} bytes behind")?;
        }
        if let Some(pulse) = &region.pulse {
            match age::ahead(pulse, *now) {
                None => write!(f, ", pulse {} s ago", now.since(pulse.server_time).as_secs())?,
                Some(ahead) => write!(
                    f,
                    ", pulse {} s AHEAD of this machine's clock{}",
                    ahead.as_secs(),
                    if region.renewed { " and new" } else { "" }
                )?,
            }
        }
        write!(f, ", {} base backups", region.backups)?;
        if let Some(note) = &region.note {
            return write!(f, ", {note}");
        }
        match region.missing_backups.as_slice() {
            [] => Ok(()),
            missing => {
                let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
                write!(f, ", lacks base backup {}", names.join(", "))
            }
        }
    }
}
