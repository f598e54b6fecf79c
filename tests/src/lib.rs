//! The test harness: real PostgreSQL clusters, S3 endpoints with faults, a tap on the replication
//! connection, a ledger of acknowledged commits, and the built programs, each cleaned up when its
//! test ends, however it ends.
//!
//! Nothing here uses a fixed port or a shared directory: every test may run beside every other and
//! beside a second copy of itself. As root, PostgreSQL and the programs run as an unprivileged user.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a harness that cannot go on fails its test, and a panic is how a test fails"
)]

pub mod archive;
pub mod cgroup;
pub mod clock;
pub mod dice;
pub mod dir;
pub mod disk;
pub mod ledger;
pub mod lsn;
pub mod postgres;
pub mod process;
pub mod program;
pub mod s3;
pub mod site;
pub mod skip;
pub mod soak;
pub mod tap;
pub mod witness;

pub use dir::TestDir;
pub use disk::SmallDisk;
pub use ledger::{Ledger, LedgerLog};
pub use postgres::{PgCluster, PgVersion, Stop};
pub use program::Program;
pub use s3::{S3Server, S3Snapshot};
pub use tap::FeedbackTap;
pub use witness::Witness;
