//! The command line: its words, its help and what they mean. Owns no work.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use highwater_config::Overrides;

use crate::{datadir::Remap, target::Asked};

const ABOUT: &str = "Restores a PostgreSQL cluster from a Highwater archive, to any moment in it";

const AFTER: &str = "\
EXAMPLES
  What is there:
    highwater-restore --config /etc/highwater/highwater.toml list
  Just before a mistake at 14:56:53 UTC, shown first and then done:
    highwater-restore --config /etc/highwater/highwater.toml plan \\
        --to-time 2026-11-20T14:56:53Z --exclusive
    highwater-restore --config /etc/highwater/highwater.toml run \\
        --to-time 2026-11-20T14:56:53Z --exclusive \\
        --into /srv/pg/restored --start --port 5433
  After somebody deleted the archive at 03:10:20 UTC from buckets that keep versions:
    highwater-restore --config /etc/highwater/highwater.toml \\
        --as-of 2026-11-20T03:10:00Z run --into /srv/pg/restored
  Everything, without a configuration file:
    highwater-restore --archive s3://orders-archive/prod \\
        --archive s3://orders-archive-dr/prod --cluster orders \\
        run --into /srv/pg/restored

EXIT CODES
  0  done
  1  the answer is no: the target cannot be reached, verification found damage
  2  the command line or the configuration is wrong
  3  a region, the disk or the server gave trouble that a retry may cure
  4  damage or conflict in the archive
  wal-fetch alone answers PostgreSQL: 0, 1 only when the file is proven to lie past the end of the archive, 255 otherwise";

/// `highwater-restore`.
#[derive(Debug, Parser)]
#[command(name = "highwater-restore", version, about = ABOUT, after_help = AFTER, disable_help_subcommand = true)]
pub struct Cli {
    /// Which archive, and how to answer.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Args)]
pub struct Common {
    /// Configuration file (TOML); every setting can also come from HIGHWATER_<SECTION>_<KEY>
    #[arg(long, global = true, value_name = "FILE", env = "HIGHWATER_CONFIG")]
    pub config: Option<PathBuf>,
    /// A region by its URL, s3://bucket/prefix or file:///directory; repeat it for more. Replaces the file's regions
    #[arg(long, global = true, value_name = "[NAME=]URL")]
    pub archive: Vec<String>,
    /// The cluster's name in the archive
    #[arg(long, global = true, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Any other setting, as in restore.parallel=16
    #[arg(long, global = true, value_name = "SECTION.KEY=VALUE", value_parser = setting)]
    pub set: Vec<(String, String)>,
    /// Read from this region first (default: the order of the configuration)
    #[arg(long, global = true, value_name = "NAME")]
    pub region: Option<String>,
    /// Do without this region, knowing that what only it holds is given up
    #[arg(long, global = true, value_name = "NAME")]
    pub without_region: Vec<String>,
    /// Read the buckets as they were at this moment, RFC 3339 with zone: what was deleted or overwritten since counts as it
    /// was. The buckets must keep versions; directories keep none
    #[arg(long, global = true, value_name = "TIME")]
    pub as_of: Option<String>,
    /// The lineage, where the cluster's name has had several (after pg_upgrade or initdb)
    #[arg(long, global = true, value_name = "SYSTEM_ID")]
    pub system_id: Option<String>,
    /// Text for people, or JSON (stable, versioned) for programs
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// The form of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Backups, and the windows that can be restored, with the reason for each end
    List,
    /// Which backup, which WAL, how many bytes, from which region for a target, or why not; touches nothing
    Plan(TargetArgs),
    /// Rebuild a data directory and set up recovery; --start also replays, waits and reports
    Run(Box<RunArgs>),
    /// Check every object of every chain in every region; exit 1 if anything is damaged or missing
    Verify,
    /// PostgreSQL's restore_command; `run` writes it into the data directory
    WalFetch(WalFetchArgs),
    /// Fetches WAL ahead of replay; started by wal-fetch
    #[command(hide = true)]
    WalPrefetch(WalPrefetchArgs),
    /// Becomes another program under another account; how `run --start` starts the server when it is run as root
    #[command(hide = true)]
    RunAs(RunAsArgs),
}

/// The target.
#[derive(Debug, Args)]
#[command(next_help_heading = "Target")]
pub struct TargetArgs {
    /// The end of the archive (the default)
    #[arg(long)]
    pub to_latest: bool,
    /// The last transaction that ended at or before this moment, RFC 3339 with zone: 2026-11-20T14:56:53Z
    #[arg(long, value_name = "TIME")]
    pub to_time: Option<String>,
    /// Up to and including the record at this LSN: 0/16B3748
    #[arg(long, value_name = "LSN")]
    pub to_lsn: Option<String>,
    /// Up to and including the end of this transaction
    #[arg(long, value_name = "XID")]
    pub to_xid: Option<String>,
    /// Up to this restore point, made with pg_create_restore_point()
    #[arg(long, value_name = "NAME")]
    pub to_name: Option<String>,
    /// The earliest consistent state: the end of the base backup
    #[arg(long)]
    pub to_immediate: bool,
    /// Stop just before the time, LSN or transaction instead of just after it
    #[arg(long)]
    pub exclusive: bool,
    /// The timeline to end on (default: the latest)
    #[arg(long, value_name = "N")]
    pub timeline: Option<String>,
    /// At the target: promote (default), pause or shutdown
    #[arg(long, value_name = "ACTION")]
    pub action: Option<String>,
    /// Start from this backup (default: the best one)
    #[arg(long, value_name = "ID")]
    pub backup: Option<String>,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The target.
    #[command(flatten)]
    pub target: TargetArgs,
    /// The data directory to build; must be empty or not exist
    #[arg(long, value_name = "DIR")]
    pub into: PathBuf,
    /// Put a tablespace elsewhere: its location in the backup, or its number, and the new directory
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace: Vec<Remap>,
    /// Owner of the files when run as root (default: the owner of DIR, or of the directory that it is made in)
    #[arg(long, value_name = "USER")]
    pub owner: Option<String>,
    /// Start the server, wait for the target, report what was reached
    #[arg(long)]
    pub start: bool,
    /// Directory of the `postgres` program (default: found by major version)
    #[arg(long, value_name = "DIR", requires = "start")]
    pub bin: Option<PathBuf>,
    /// Port of the started server
    #[arg(long, value_name = "PORT", requires = "start")]
    pub port: Option<u16>,
    /// Directory of the started server's Unix socket
    #[arg(long, value_name = "DIR", requires = "start")]
    pub socket_directory: Option<PathBuf>,
    /// A setting for the started server, as in shared_buffers=1GB
    #[arg(long, value_name = "NAME=VALUE", requires = "start", value_parser = setting)]
    pub postgres_setting: Vec<(String, String)>,
}

/// `wal-fetch`.
#[derive(Debug, Args)]
pub struct WalFetchArgs {
    /// The facts that `run` left in the data directory
    #[arg(long, value_name = "FILE")]
    pub plan: PathBuf,
    /// The file that PostgreSQL asks for: %f
    pub name: String,
    /// Where to put it: %p
    pub path: PathBuf,
}

/// `wal-prefetch`.
#[derive(Debug, Args)]
pub struct WalPrefetchArgs {
    /// As for wal-fetch
    #[arg(long)]
    pub plan: PathBuf,
    /// The segment that was asked for last
    #[arg(long)]
    pub after: String,
}

/// `run-as`.
#[derive(Debug, Args)]
pub struct RunAsArgs {
    /// Number of the user
    pub uid: u32,
    /// Number of its group
    pub gid: u32,
    /// Its name, whose further groups it gets
    pub name: String,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    pub program: Vec<std::ffi::OsString>,
}

fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.trim().to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not NAME=VALUE")),
    }
}

impl Common {
    /// What these flags say about settings.
    #[must_use]
    pub fn overrides(&self) -> Overrides {
        Overrides {
            archives: self.archive.clone(),
            cluster_name: self.cluster.clone(),
            settings: self.set.clone(),
            ..Overrides::default()
        }
    }
}

impl From<&TargetArgs> for Asked {
    fn from(args: &TargetArgs) -> Self {
        Self {
            latest: args.to_latest,
            time: args.to_time.clone(),
            lsn: args.to_lsn.clone(),
            xid: args.to_xid.clone(),
            name: args.to_name.clone(),
            immediate: args.to_immediate,
            exclusive: args.exclusive,
            timeline: args.timeline.clone(),
            action: args.action.clone(),
            backup: args.backup.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
