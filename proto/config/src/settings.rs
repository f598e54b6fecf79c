//! What the settings mean: types, units, defaults, bounds and the reason for each. Built from
//! [`Raw`]; knows nothing of files and variables.

use std::{net::SocketAddr, num::NonZeroUsize, str::FromStr, time::Duration};

use highwater_format::{codec::Codec, layout::ClusterName};
use secrecy::SecretString;

use crate::{
    error::ConfigError,
    raw::Raw,
    units::{ByteSize, Interval},
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// `[cluster]`: which PostgreSQL instance.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// The operator's name for it; the first part of every key in the archive.
    pub name: ClusterName,
    /// A libpq connection string or URI; libpq's own environment where it is not given. May hold a
    /// password and is never printed.
    pub connection: Option<SecretString>,
    /// The physical replication slot. Default `highwater`; PostgreSQL allows `[a-z0-9_]{1,63}`.
    pub slot: String,
    /// What to do when the server is in recovery. Default `refuse`.
    pub standby: Standby,
}

/// What the agent does beside a server that is in recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standby {
    /// Not work there: a connection string that leads to a standby by mistake is noticed at once.
    Refuse,
    /// Archive what the standby receives, as a second stream beside the primary's agent, and take over when it is
    /// promoted. For one agent beside every node.
    Stream,
}

impl FromStr for Standby {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "stream" => Ok(Self::Stream),
            other => Err(format!("`{other}` is neither \"refuse\" nor \"stream\"")),
        }
    }
}

/// How PostgreSQL is told what is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledge {
    /// On the stream. Where `synchronous_standby_names` matches the agent, commits wait for it.
    Stream,
    /// By moving the slot, with SQL. The stream acknowledges nothing, so that the agent never counts as a synchronous
    /// standby, whatever `synchronous_standby_names` says.
    Slot,
}

impl FromStr for Acknowledge {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stream" => Ok(Self::Stream),
            "slot" => Ok(Self::Slot),
            other => Err(format!("`{other}` is neither \"stream\" nor \"slot\"")),
        }
    }
}

/// In how many regions WAL must be safe before PostgreSQL is told so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Every region. The default: one lost region then never costs a commit.
    All,
    /// The fastest one.
    Any,
    /// That many.
    Count(NonZeroUsize),
}

impl Policy {
    /// The number of regions it asks for out of `regions`.
    #[must_use]
    pub fn needed(self, regions: usize) -> usize {
        match self {
            Self::All => regions,
            Self::Any => regions.min(1),
            Self::Count(count) => count.get(),
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            "any" => Ok(Self::Any),
            number => number.parse().map(Self::Count).map_err(|_| {
                format!("`{number}` is not a policy; use \"all\", \"any\" or a number of regions from 1")
            }),
        }
    }
}

/// `[durability]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durability {
    /// In how many regions WAL must be safe before it is acknowledged. Default all.
    pub policy: Policy,
}

/// `[wal]` and `[memory]`: streaming.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalConfig {
    /// The longest that a received byte waits before it is sealed. Default 1 s, 10 ms to 1 min:
    /// below that every region would see a PUT per commit, above it the recovery point is no longer
    /// one of seconds.
    pub flush_interval: Duration,
    /// A tail chunk is sealed at this many bytes at the latest. Default 1 MiB, 64 KiB to 64 MiB (the
    /// most plain bytes that one object may hold).
    pub flush_size: u64,
    /// Default lz4. zstd stores a third less at nearly the same cost; old archives stay readable
    /// whatever is chosen.
    pub compression: Codec,
    /// `memory.limit`: half of it, or what four objects need if that is more, bounds the WAL held in memory. Default
    /// 256 MiB, least 64 MiB; when it is spent the agent stops reading and PostgreSQL keeps the WAL.
    pub memory: u64,
    /// Seal at once instead of waiting for the interval; for an agent that is named in
    /// `synchronous_standby_names`. Default false.
    pub synchronous: bool,
    /// Default stream. With slot no commit ever waits for the agent.
    pub acknowledge: Acknowledge,
    /// PUTs in flight per region. Default 4, 1 to 64.
    pub uploads: usize,
}

/// `[backup]`: base backups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupConfig {
    /// Five-field cron expression in UTC; none when not given.
    pub schedule: Option<String>,
    /// Default zstd.
    pub compression: Codec,
    /// Plain bytes in one pack. Default 32 MiB, 1 MiB to 64 MiB: one PUT each, and what is sent
    /// again when one fails.
    pub pack_size: u64,
    /// Bytes per second that PostgreSQL may send, unlimited when not given. 32 kB to 1 GB, which are
    /// the limits of `MAX_RATE` in PostgreSQL's BASE_BACKUP.
    pub max_rate: Option<u64>,
    /// Ask for an immediate checkpoint instead of waiting for the spread one. Default true.
    pub checkpoint_fast: bool,
    /// Packs compressed at the same time. Default the number of processors up to 8; 1 to 64.
    pub threads: usize,
}

/// `[pulse]`: the sign of life in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulseConfig {
    /// Default 5 s, 1 s to 5 min. A target time in an idle stretch can be proven up to the last pulse.
    pub interval: Duration,
}

/// `[heal]`: regions are compared, and what one lacks is copied from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealConfig {
    /// Between two comparisons. Default 15 min, 1 s to 1 day: one costs a listing of everything in every
    /// region, and what is found missing was in one region less since the comparison before.
    pub interval: Duration,
}

/// `[admin]`: metrics and health over HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    /// Default `127.0.0.1:9187`, loopback because the endpoint has no access control; `off` for none.
    pub listen: Option<SocketAddr>,
}

/// `[restore]`: reading the archive back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreConfig {
    /// The region to read from first; the order of the configuration when not given.
    pub region: Option<String>,
    /// GETs in flight. Default 8, 1 to 64.
    pub parallel: usize,
    /// Bytes of WAL fetched ahead of replay. Default 256 MiB, 32 MiB to 16 GiB; lies on the disk of
    /// the restored cluster.
    pub prefetch: u64,
}

impl ClusterConfig {
    pub(crate) fn build(raw: &Raw) -> Result<Self, ConfigError> {
        let name = raw
            .read_optional("cluster", "name")?
            .ok_or_else(|| ConfigError::Missing {
                setting: "cluster.name".to_owned(),
                how: "name the cluster with `name` in [cluster], HIGHWATER_CLUSTER_NAME or --cluster"
                    .to_owned(),
            })?;
        let slot = raw
            .text("cluster", "slot")
            .unwrap_or_else(|| "highwater".to_owned());
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if slot.len() > 63 || !slot.chars().all(allowed) {
            let problem = format!("`{slot}` is not a slot name; PostgreSQL takes up to 63 of a-z, 0-9 and _");
            return Err(raw.bad("cluster", "slot", &problem));
        }
        Ok(Self {
            name,
            connection: raw.text("cluster", "connection").map(SecretString::from),
            slot,
            standby: raw.read("cluster", "standby", Standby::Refuse)?,
        })
    }
}

impl Durability {
    pub(crate) fn build(raw: &Raw, regions: usize) -> Result<Self, ConfigError> {
        let policy = raw.read("durability", "policy", Policy::All)?;
        if policy.needed(regions) > regions {
            let problem = format!(
                "{} regions are asked for and only {regions} configured",
                policy.needed(regions)
            );
            return Err(raw.bad("durability", "policy", &problem));
        }
        Ok(Self { policy })
    }
}

impl WalConfig {
    pub(crate) fn build(raw: &Raw) -> Result<Self, ConfigError> {
        let interval = |millis| Interval(Duration::from_millis(millis));
        let limits = (interval(10), interval(60_000));
        let synchronous = flag(raw, "wal", "synchronous", false)?;
        let acknowledge = raw.read("wal", "acknowledge", Acknowledge::Stream)?;
        if synchronous && acknowledge == Acknowledge::Slot {
            let problem = "\"slot\" and synchronous = true exclude each other: a commit can only wait for an agent that \
                           acknowledges on the stream";
            return Err(raw.bad("wal", "acknowledge", problem));
        }
        Ok(Self {
            flush_interval: raw.bounded("wal", "flush_interval", interval(1_000), limits)?.0,
            flush_size: size(raw, "wal", "flush_size", MIB, (64 * KIB, 64 * MIB))?,
            compression: raw.read("wal", "compression", Codec::Lz4)?,
            memory: size(raw, "memory", "limit", 256 * MIB, (64 * MIB, 1024 * GIB))?,
            synchronous,
            acknowledge,
            uploads: raw.bounded("wal", "uploads", 4, (1, 64))?,
        })
    }
}

impl BackupConfig {
    pub(crate) fn build(raw: &Raw) -> Result<Self, ConfigError> {
        let max_rate = match raw.get("backup", "max_rate") {
            Some(_) => Some(size(raw, "backup", "max_rate", GIB, (32 * KIB, GIB))?),
            None => None,
        };
        let processors = std::thread::available_parallelism().map_or(2, NonZeroUsize::get);
        Ok(Self {
            schedule: raw.text("backup", "schedule"),
            compression: raw.read("backup", "compression", Codec::Zstd)?,
            pack_size: size(raw, "backup", "pack_size", 32 * MIB, (MIB, 64 * MIB))?,
            max_rate,
            checkpoint_fast: flag(raw, "backup", "checkpoint_fast", true)?,
            threads: raw.bounded("backup", "threads", processors.min(8), (1, 64))?,
        })
    }
}

impl PulseConfig {
    pub(crate) fn build(raw: &Raw) -> Result<Self, ConfigError> {
        let seconds = |seconds| Interval(Duration::from_secs(seconds));
        let interval = raw
            .bounded("pulse", "interval", seconds(5), (seconds(1), seconds(300)))?
            .0;
        Ok(Self { interval })
    }
}

impl HealConfig {
    pub(crate) fn build(raw: &Raw) -> Result<Self, ConfigError> {
        let seconds = |seconds| Interval(Duration::from_secs(seconds));
        let interval = raw
            .bounded("heal", "interval", seconds(900), (seconds(1), seconds(86_400)))?
            .0;
        Ok(Self { interval })
    }
}

impl AdminConfig {
    pub(crate) fn build(raw: &Raw) -> Result<Self, ConfigError> {
        let text = raw
            .text("admin", "listen")
            .unwrap_or_else(|| "127.0.0.1:9187".to_owned());
        if text == "off" {
            return Ok(Self { listen: None });
        }
        let listen = text.parse().map_err(|_| {
            let problem =
                format!("`{text}` is not an address; write it as in \"127.0.0.1:9187\", or \"off\"");
            raw.bad("admin", "listen", &problem)
        })?;
        Ok(Self { listen: Some(listen) })
    }
}

impl RestoreConfig {
    pub(crate) fn build(raw: &Raw, regions: &[String]) -> Result<Self, ConfigError> {
        let region = raw.text("restore", "region");
        if let Some(name) = region.as_ref().filter(|name| !regions.contains(name)) {
            let problem = format!(
                "there is no region `{name}`; configured are {}",
                regions.join(", ")
            );
            return Err(raw.bad("restore", "region", &problem));
        }
        Ok(Self {
            region,
            parallel: raw.bounded("restore", "parallel", 8, (1, 64))?,
            prefetch: size(raw, "restore", "prefetch", 256 * MIB, (32 * MIB, 16 * GIB))?,
        })
    }
}

fn size(
    raw: &Raw,
    section: &'static str,
    key: &'static str,
    default: u64,
    (least, most): (u64, u64),
) -> Result<u64, ConfigError> {
    Ok(raw
        .bounded(section, key, ByteSize(default), (ByteSize(least), ByteSize(most)))?
        .0)
}

fn flag(raw: &Raw, section: &'static str, key: &'static str, default: bool) -> Result<bool, ConfigError> {
    match raw.text(section, key).as_deref() {
        None => Ok(default),
        Some("true" | "on" | "yes" | "1") => Ok(true),
        Some("false" | "off" | "no" | "0") => Ok(false),
        Some(other) => Err(raw.bad(section, key, &format!("`{other}` is neither true nor false"))),
    }
}
