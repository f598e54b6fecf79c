//! `[outage]`: what happens to PostgreSQL's disk while no region takes WAL.
//!
//! Owns: the settings and what must be said together. Does not own: watching (the agent).

use std::{path::PathBuf, str::FromStr, time::Duration};

use crate::{
    error::ConfigError,
    raw::Raw,
    settings::WalConfig,
    units::{ByteSize, Interval},
};

const MIB: u64 = 1 << 20;
/// More than any disk that PostgreSQL runs on.
const LARGEST: u64 = 1 << 50;

/// What is given up when storage stays away: the archive's wholeness, or the server's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutagePolicy {
    /// The slot holds WAL for as long as it takes. The default: no WAL is ever lost by the agent's doing, and a disk
    /// without a limit fills up.
    Hold,
    /// At a limit the slot is given up. What the server then removes before a region has it becomes a recorded gap. Not
    /// with `wal.synchronous`: commits wait for that very WAL.
    GiveUp,
}

impl FromStr for OutagePolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "hold" => Ok(Self::Hold),
            "give-up" => Ok(Self::GiveUp),
            other => Err(format!(
                "`{other}` is not an outage policy; use \"hold\" or \"give-up\""
            )),
        }
    }
}

/// `[outage]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutageConfig {
    /// Default hold.
    pub policy: OutagePolicy,
    /// Give the slot up when it holds more WAL than this and that does not shrink. 1 MiB to 1 PiB; needed for
    /// give-up unless `keep_free` is given, because no default fits every disk.
    pub max_backlog: Option<u64>,
    /// Give the slot up when less room than this is left, as far as room is known: up to `max_slot_wal_keep_size`
    /// (the server's `safe_wal_size`) and on the file system of `disk`. 1 MiB to 1 PiB; below `max_slot_wal_keep_size`,
    /// where that is set, because there is never more room than that.
    pub keep_free: Option<u64>,
    /// A path on the file system that holds `pg_wal`, where the agent can see it. Only its free space is asked for.
    pub disk: Option<PathBuf>,
    /// Give up only after the backlog has not shrunk for this long: one that is being worked off costs nothing but
    /// time. Default 1 min, far above a slow PUT and its retries; 1 s to 1 h.
    pub patience: Duration,
}

impl OutageConfig {
    pub(crate) fn build(raw: &Raw, wal: &WalConfig) -> Result<Self, ConfigError> {
        let seconds = |seconds| Interval(Duration::from_secs(seconds));
        let config = Self {
            policy: raw.read("outage", "policy", OutagePolicy::Hold)?,
            max_backlog: size(raw, "max_backlog")?,
            keep_free: size(raw, "keep_free")?,
            disk: raw.text("outage", "disk").map(PathBuf::from),
            patience: raw
                .bounded("outage", "patience", seconds(60), (seconds(1), seconds(3600)))?
                .0,
        };
        if config.policy == OutagePolicy::GiveUp && config.max_backlog.is_none() && config.keep_free.is_none()
        {
            let problem = "\"give-up\" needs to know when: set max_backlog (how much WAL may wait), keep_free (how much \
                           room must stay), or both";
            return Err(raw.bad("outage", "policy", problem));
        }
        if config.policy == OutagePolicy::GiveUp && wal.synchronous {
            let problem = "\"give-up\" and synchronous = true in [wal] exclude each other: commits wait for the very WAL that \
                           would be given up. Set policy = \"hold\"";
            return Err(raw.bad("outage", "policy", problem));
        }
        Ok(config)
    }
}

fn size(raw: &Raw, key: &'static str) -> Result<Option<u64>, ConfigError> {
    if raw.get("outage", key).is_none() {
        return Ok(None);
    }
    let limits = (ByteSize(MIB), ByteSize(LARGEST));
    Ok(Some(raw.bounded("outage", key, ByteSize(LARGEST), limits)?.0))
}
