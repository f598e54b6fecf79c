//! What can go wrong in the agent, and what is to be done about it.
//!
//! Every error has a [`Kind`]; the kind alone decides whether a task tries again, the process stops, and
//! with which exit code. Nothing decides on an error's text.

use highwater_config::{ConfigError, Exit};
use highwater_format::{FormatError, Lsn, LsnRange, SystemId, TimelineId};
use highwater_pgwire::{PgError, PgErrorKind};
use highwater_store::{ErrorKind as StoreKind, StoreError};

/// What the caller should do about an [`AgentError`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Try again after a while: it may cure itself.
    Retry,
    /// Somebody must change something outside the agent (a grant, a bucket policy, a full disk).
    Operator,
    /// The configuration or command line is wrong.
    Config,
    /// The answer is no, and trying again will not change it.
    Refused,
    /// The archive is damaged, or holds something that contradicts what the agent wants to write.
    Damage,
    /// The work was told to stop.
    Cancelled,
    /// A mistake in Highwater.
    Bug,
}

/// An error of the agent: what, where, and the next step.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration is unusable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A region failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// PostgreSQL failed or said no.
    #[error("PostgreSQL: {0}")]
    Postgres(#[from] PgError),
    /// An object of the archive cannot be understood.
    #[error("region {region}: object {key}: {source}")]
    Object {
        /// Region that holds the object.
        region: String,
        /// Key of the object within the region.
        key: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// Bytes could not be encoded.
    #[error("cannot encode {what}: {source}")]
    Encode {
        /// What was being encoded.
        what: String,
        /// Why not.
        source: FormatError,
    },
    /// A key that should be ours holds something else.
    #[error(
        "region {region}: {key} already holds different content ({theirs}); ours is {ours}. Nothing was replaced. \
         Two writers with different histories share this archive: stop one of them, then run `highwater-restore verify`"
    )]
    Conflict {
        /// Region in which the key is taken.
        region: String,
        /// The key.
        key: String,
        /// Identity of what was to be written.
        ours: String,
        /// Identity of what is there.
        theirs: String,
    },
    /// The server sends other bytes for a range than the archive holds.
    #[error(
        "timeline {timeline}: the server's WAL differs from the archive's from {at} on (compared {range}). The server was \
         rolled back (a snapshot or clone was put in its place) or it is not the one that was archived. Nothing was stored \
         or acknowledged. Start a new archive for it (another cluster name), or bring the right server back"
    )]
    Diverged {
        /// Timeline on which both are.
        timeline: TimelineId,
        /// First differing byte.
        at: Lsn,
        /// What was compared.
        range: LsnRange,
    },
    /// Another agent has claimed the archive: for a timeline that this agent's server is not on, or for this very one from
    /// another server.
    #[error(
        "this agent wrote timeline {timeline}, and another one has taken its place: {holder}. {} Nothing was replaced, and \
         nothing more is stored or acknowledged. Stop this server, or make it a standby of the new primary (pg_rewind) before \
         its agent starts again",
        why_fenced(*timeline, *theirs)
    )]
    Fenced {
        /// The timeline that was written.
        timeline: TimelineId,
        /// The timeline of the other.
        theirs: TimelineId,
        /// Who it is.
        holder: String,
    },
    /// Another agent writes the archive, and its server is alive.
    #[error("{what}. {next}")]
    InUse {
        /// This server was promoted beside that one: it is a copy, and not to be tried again until that one is away for a moment.
        promoted: bool,
        /// Who it is.
        what: String,
        /// What to do about it.
        next: String,
    },
    /// The archive belongs to another cluster.
    #[error(
        "region {region}: the archive of this cluster name belongs to system identifier {theirs}, the server is {ours}. \
         Nothing was written. Use another cluster name or prefix; after pg_upgrade or a deliberate re-creation pass \
         --new-lineage once"
    )]
    OtherCluster {
        /// Region in which it was seen.
        region: String,
        /// The server's identifier.
        ours: SystemId,
        /// The identifier that the region holds.
        theirs: SystemId,
    },
    /// The server that was streamed from has made way for another cluster.
    #[error(
        "the server's system identifier is now {now}, it was {before}: another cluster answers at this address. Nothing of it was \
         stored. Look where the connection leads; after pg_upgrade or a deliberate re-creation start the agent once with --new-lineage"
    )]
    ServerChanged {
        /// The identifier before.
        before: SystemId,
        /// The identifier now.
        now: SystemId,
    },
    /// Another lineage was begun in the place of this one.
    #[error(
        "region {region}: this server is system identifier {ours}, and that of {theirs} was begun in its place with \
         --new-lineage. Nothing was written. Stop this agent, or give this server another cluster name or prefix; only to go on \
         with it all the same, pass --new-lineage at every start (a restore then needs --system-id {ours})"
    )]
    Succeeded {
        /// Region in which it was seen.
        region: String,
        /// The server's identifier.
        ours: SystemId,
        /// The identifier of the lineage that came after.
        theirs: SystemId,
    },
    /// The answer is no; the text says why and what to do next.
    #[error("{what}. {next}")]
    Refused {
        /// What is wrong.
        what: String,
        /// What to do about it.
        next: String,
    },
    /// Something that needs the operator or time.
    #[error("{what}. {next}")]
    Trouble {
        /// What is wrong.
        what: String,
        /// What to do about it.
        next: String,
    },
    /// The agent has to begin anew: what is wrong is cured by that, and by nothing within.
    #[error("{what}. {next}")]
    Restart {
        /// What is wrong.
        what: String,
        /// What happens then.
        next: String,
    },
    /// The task was told to stop.
    #[error("stopped")]
    Cancelled,
    /// An impossible state: a mistake in Highwater.
    #[error("internal error: {0}; please report this")]
    Bug(String),
}

fn why_fenced(ours: TimelineId, theirs: TimelineId) -> String {
    match ours == theirs {
        true => format!("Two servers are on timeline {ours}, of which one is a copy: only one may go on."),
        false => format!(
            "This server is not on timeline {theirs}: it is an old primary that was started again, or a copy."
        ),
    }
}

impl AgentError {
    /// What to do about it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Config(_) => Kind::Config,
            Self::Store(error) => match error.kind() {
                StoreKind::Retry => Kind::Retry,
                StoreKind::Operator => Kind::Operator,
                StoreKind::Config => Kind::Config,
                StoreKind::Bug => Kind::Bug,
                StoreKind::NotFound | StoreKind::Corrupt | StoreKind::Conflict => Kind::Damage,
            },
            Self::Postgres(error) => match error.kind() {
                PgErrorKind::Retry => Kind::Retry,
                PgErrorKind::Operator => Kind::Operator,
                PgErrorKind::Config => Kind::Config,
                PgErrorKind::Refused => Kind::Refused,
                _ => Kind::Retry,
            },
            Self::Object { .. } | Self::Conflict { .. } | Self::Diverged { .. } => Kind::Damage,
            Self::OtherCluster { .. } | Self::ServerChanged { .. } => Kind::Damage,
            Self::Succeeded { .. } | Self::Fenced { .. } => Kind::Damage,
            Self::InUse { promoted: true, .. } => Kind::Damage,
            Self::Refused { .. } | Self::InUse { .. } => Kind::Refused,
            Self::Trouble { .. } | Self::Restart { .. } => Kind::Retry,
            Self::Encode { .. } | Self::Bug(_) => Kind::Bug,
            Self::Cancelled => Kind::Cancelled,
        }
    }

    /// The process's exit code for this error.
    pub fn exit(&self) -> Exit {
        match self.kind() {
            Kind::Refused => Exit::No,
            Kind::Config => Exit::Usage,
            Kind::Retry | Kind::Operator | Kind::Cancelled | Kind::Bug => Exit::Trouble,
            Kind::Damage => Exit::Damage,
        }
    }

    /// Refuses with a reason and a next step.
    pub fn refused(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self::Refused {
            what: what.into(),
            next: next.into(),
        }
    }
}

/// The agent's result.
pub type Result<T, E = AgentError> = std::result::Result<T, E>;
