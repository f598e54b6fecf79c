//! One configuration for both programs: a TOML file, `HIGHWATER_*` variables and flags, the later
//! winning over the earlier, so that a sidecar needs no file.
//!
//! Owns: names, defaults, units, bounds, the messages for what is wrong, and the exit codes that both
//! programs share. Does not own: command lines (each program has its own), libpq's environment
//! (resolved when a connection is opened) and the S3 credential chain (resolved by the store).
//!
//! Invariant: an unknown name is never ignored, and a value that may be a secret is never printed.

use std::path::{Path, PathBuf};

mod error;
mod exit;
mod file;
mod nearest;
mod outage;
mod overlay;
mod raw;
mod regions;
mod schema;
mod settings;
mod units;

#[cfg(test)]
mod tests;

use highwater_store::RegionConfig;

pub use error::{ConfigError, Origin};
pub use exit::Exit;
pub use outage::{OutageConfig, OutagePolicy};
pub use settings::{
    Acknowledge, AdminConfig, BackupConfig, ClusterConfig, Durability, HealConfig, Policy, PulseConfig,
    RestoreConfig, Standby, WalConfig,
};
pub use units::{ByteSize, Interval, UnitError};

/// Names the file where no `--config` is given.
pub const CONFIG_VARIABLE: &str = "HIGHWATER_CONFIG";

/// Everything both programs can be told.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[cluster]`.
    pub cluster: ClusterConfig,
    /// `[[region]]`, at least one, in the order given, names distinct.
    pub regions: Vec<RegionConfig>,
    /// `[durability]`.
    pub durability: Durability,
    /// `[wal]` and `[memory]`.
    pub wal: WalConfig,
    /// `[outage]`.
    pub outage: OutageConfig,
    /// `[backup]`.
    pub backup: BackupConfig,
    /// `[pulse]`.
    pub pulse: PulseConfig,
    /// `[heal]`.
    pub heal: HealConfig,
    /// `[admin]`.
    pub admin: AdminConfig,
    /// `[restore]`.
    pub restore: RestoreConfig,
}

/// What the command line says about settings; a program fills it from its own flags.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--archive [NAME=]URL`, repeated: replaces the regions of the file and the environment.
    pub archives: Vec<String>,
    /// `--cluster NAME`.
    pub cluster_name: Option<String>,
    /// `--connection CONNINFO`.
    pub connection: Option<String>,
    /// `--slot NAME`.
    pub slot: Option<String>,
    /// `--set section.key=value`, repeated: any other setting that is not a region's.
    pub settings: Vec<(String, String)>,
}

impl Config {
    /// Reads the file (`path`, or the one that `HIGHWATER_CONFIG` names, or none), lays the environment
    /// and then the flags over it, and checks the result.
    ///
    /// # Errors
    ///
    /// Whatever cannot be read, is unknown, out of bounds, missing or contradictory, naming the place.
    pub fn load(
        path: Option<&Path>,
        env: impl Fn(&str) -> Option<String>,
        overrides: &Overrides,
    ) -> Result<Self, ConfigError> {
        let named = env(CONFIG_VARIABLE)
            .filter(|text| !text.is_empty())
            .map(PathBuf::from);
        let mut raw = match path.or(named.as_deref()) {
            Some(path) => file::read(path)?,
            None => raw::Raw::default(),
        };
        let of_the_file = raw.regions.clone();
        overlay::environment(&mut raw, &env);
        overlay::archives(&mut raw, &of_the_file, &overrides.archives);
        overlay::flags(&mut raw, overrides)?;
        Self::build(&raw)
    }

    fn build(raw: &raw::Raw) -> Result<Self, ConfigError> {
        let cluster = ClusterConfig::build(raw)?;
        let regions = regions::build(raw)?;
        let names: Vec<String> = regions.iter().map(|region| region.name.clone()).collect();
        let wal = WalConfig::build(raw)?;
        Ok(Self {
            cluster,
            durability: Durability::build(raw, regions.len())?,
            outage: OutageConfig::build(raw, &wal)?,
            wal,
            backup: BackupConfig::build(raw)?,
            pulse: PulseConfig::build(raw)?,
            heal: HealConfig::build(raw)?,
            admin: AdminConfig::build(raw)?,
            restore: RestoreConfig::build(raw, &names)?,
            regions,
        })
    }
}

/// One line for each `HIGHWATER_*` variable in `names` that no setting reads, with the nearest one
/// that exists; `also` are variables that the program reads itself. For a warning, not an error: an
/// orchestrator may inject variables of its own under the same prefix (`HIGHWATER_PORT`, …).
pub fn unknown_variables(names: impl Iterator<Item = String>, also: &[&str]) -> Vec<String> {
    overlay::unknown_variables(names, also)
}
