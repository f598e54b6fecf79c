//! The command line: what can be said, and how it becomes a configuration.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use highwater_config::{Config, ConfigError, Overrides};

const EXAMPLES: &str = "\
Examples:
  highwater-agent --config /etc/highwater/highwater.toml check
  highwater-agent --config /etc/highwater/highwater.toml run
  highwater-agent --cluster orders \\
      --connection 'host=/var/run/postgresql user=highwater' \\
      --archive s3://orders-archive/prod \\
      --archive s3://orders-archive-dr/prod run

Settings come from the file, then HIGHWATER_* variables (HIGHWATER_CLUSTER_NAME, HIGHWATER_WAL_FLUSH_INTERVAL,
HIGHWATER_REGION_1_URL, ...), then flags; the later win. Without a connection libpq's own environment is used
(PGHOST, PGUSER, PGPASSFILE, PGSERVICE, ...). Credentials for S3 come from the standard chain (environment,
profile, web identity, instance role). Unencrypted connections to another machine are refused unless they are asked
for: allow_http = true for a region's http:// endpoint, an sslmode for PostgreSQL.

Commits wait for the agent only where synchronous_standby_names lists it (\"highwater\" or *). With wal.synchronous=true
it is quick about it; with wal.acknowledge=slot it never counts, and moves its slot by SQL.

Exit codes: 0 done; 1 the answer is no; 2 wrong command line or configuration; 3 trouble that a retry may
cure; 4 damage or conflict in the archive.";

/// Continuous archiving for PostgreSQL: streams WAL and base backups into every region of an archive.
#[derive(Debug, Parser)]
#[command(name = "highwater-agent", version, about, after_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    /// What applies to every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// Configuration file (TOML) [env: HIGHWATER_CONFIG]
    #[arg(long, short, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Answers for people, or one stable JSON document for programs
    #[arg(long, global = true, value_enum, default_value_t)]
    pub output: Output,
    /// Name of the cluster in the archive
    #[arg(long, global = true, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Connection string or URI of the server, as libpq takes it
    #[arg(long, global = true, value_name = "CONNINFO")]
    pub connection: Option<String>,
    /// Replication slot; created if it is missing
    #[arg(long, global = true, value_name = "NAME")]
    pub slot: Option<String>,
    /// A region of the archive (repeat): [NAME=]s3://bucket/prefix or [NAME=]file:///directory.
    /// Replaces the regions of the file
    #[arg(long, global = true, value_name = "[NAME=]URL")]
    pub archive: Vec<String>,
    /// Any other setting (repeat), for instance wal.flush_interval=500ms
    #[arg(long = "set", global = true, value_name = "SECTION.KEY=VALUE")]
    pub settings: Vec<String>,
    /// Log format [env: HIGHWATER_LOG_FORMAT]; levels are set with HIGHWATER_LOG (info, debug,
    /// highwater_agent=trace, ...)
    #[arg(
        long,
        global = true,
        value_enum,
        env = "HIGHWATER_LOG_FORMAT",
        hide_env = true,
        default_value_t
    )]
    pub log_format: LogFormat,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// How log lines are printed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Verify everything that must be in place; each missing grant or setting with the line that mends it
    Check {
        /// Accept a cluster name that holds another system identifier (after pg_upgrade)
        #[arg(long)]
        new_lineage: bool,
    },
    /// Stream WAL, take scheduled base backups and serve metrics until SIGTERM, which stores the last bytes first
    Run {
        /// Begin a new lineage under a cluster name that holds another system identifier (after pg_upgrade)
        #[arg(long)]
        new_lineage: bool,
        /// Take the place of another agent although its server shows signs of life, once that must have noticed (two of its
        /// pulse intervals); counts for nothing beside a standby
        #[arg(long)]
        take_over: bool,
    },
    /// Take one base backup now and print its id; the agent must be running
    Backup {
        /// Wait for the server's next regular checkpoint instead of asking for one at once
        #[arg(long)]
        spread_checkpoint: bool,
    },
    /// Positions and lag per region, slot, last base backup; exit 1 if the recovery point is breached, or for want of a base backup
    Status,
    /// Drop the replication slot, so that the server keeps no WAL for the agent, and say what stays
    Decommission {
        /// Terminate the connection of an agent that does not answer at admin.listen and uses the slot
        #[arg(long)]
        force: bool,
    },
}

impl Global {
    /// The configuration: file, environment, flags.
    pub fn load(&self) -> Result<Config, ConfigError> {
        let settings = self.settings.iter().map(|setting| match setting.split_once('=') {
            Some((name, value)) => (name.trim().to_owned(), value.to_owned()),
            None => (setting.clone(), String::new()),
        });
        let overrides = Overrides {
            archives: self.archive.clone(),
            cluster_name: self.cluster.clone(),
            connection: self.connection.clone(),
            slot: self.slot.clone(),
            settings: settings.collect(),
        };
        Config::load(
            self.config.as_deref(),
            |name| std::env::var(name).ok(),
            &overrides,
        )
    }
}
