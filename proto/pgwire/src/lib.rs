//! Client side of PostgreSQL's physical replication protocol.
//!
//! Owns everything between a connection string and the bytes of WAL and base backups: connection
//! parameters as libpq understands them ([`ConnInfo`]), TLS, authentication, the simple query
//! protocol, the replication commands, `CopyBoth` streaming and both framings of `BASE_BACKUP`.
//!
//! It keeps three promises. A server, however hostile, gets typed errors out of this crate and never
//! a panic or unbounded memory. The stream is checked to be gap-free: every WAL message starts
//! exactly where the last one ended. A reader that waits for WAL never stops a status update from
//! going out.
//!
//! It does not own retries, reconnection, positions that are durable, or the decision what to
//! acknowledge: it reports to PostgreSQL exactly the LSNs it is handed. It never sends hot-standby
//! feedback, which would hold back vacuum on the primary.

mod base_backup;
mod commands;
mod connection;
mod conninfo;
mod dial;
mod error;
mod frame;
mod message;
mod startup;
mod stream;
mod tls;
mod walstream;

pub use base_backup::{BackupMessage, BaseBackup, BaseBackupOptions, ManifestOption, Tablespace};
pub use commands::{HistoryFile, IdentifySystem, SlotPosition};
pub use connection::{Connection, Mode, QueryResult};
pub use conninfo::{
    AuthMethod, AuthMethods, ChannelBinding, ConnInfo, Environment, Host, HostSpec, Keepalives, SessionAttrs,
    SslMode, SslNegotiation, TlsOptions, TrustRoots,
};
pub use dial::{ByteStream, Dialer, Dialing};
pub use error::{ForkPoint, Notice, PgError, PgErrorKind, ServerError};
pub use walstream::{NextTimeline, Started, Status, StatusWriter, StreamEnd, StreamMessage, WalReader};
