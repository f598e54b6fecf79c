//! The agent: consumes a primary's physical replication stream and keeps it, with base backups, in every
//! region of the archive.
//!
//! Data goes one way: receiver → segmenter → encoder → sealer → window → one uploader per region →
//! frontier, and only the frontier's durable position goes back to PostgreSQL.

mod acknowledge;
pub mod admin;
pub mod agree;
mod answering;
pub mod archived;
pub mod backfill;
pub mod backup;
mod blocking;
pub mod branches;
pub mod budget;
pub mod check;
pub mod cli;
pub mod clock;
pub mod commits;
pub mod compact;
pub mod decommission;
pub mod encoder;
mod ending;
pub mod error;
mod followers;
pub mod frontier;
pub mod gap;
pub mod heal;
pub mod held;
pub mod identity;
pub mod inventory;
mod lease;
pub mod metrics;
pub mod outage;
mod places;
pub mod progress;
pub mod pulse;
mod receiver;
pub mod region;
pub mod resume;
pub mod run;
mod salvage;
pub mod schedule;
pub mod sealer;
pub mod segmenter;
pub mod server;
pub mod slot;
mod sql;
mod start;
pub mod state;
pub mod status;
mod strays;
pub mod surroundings;
pub mod synchronous;
#[cfg(test)]
mod test_world;
pub mod unended;
mod unused;
pub mod uploader;
pub mod window;
pub mod writer;
