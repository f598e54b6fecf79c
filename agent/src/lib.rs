//! The agent: consumes a primary's physical replication stream and keeps it, with base backups, in every
//! region of the archive.
//!
//! Data goes one way: receiver → segmenter → encoder → window → one uploader per region → frontier, and
//! only the frontier's durable position goes back to PostgreSQL.

pub mod clock;
pub mod error;
pub mod region;
pub mod state;
