//! Turns the archive back into a running cluster, or says why it cannot.
//!
//! `catalog` reads all regions into one view, `locate` answers questions about the WAL in it, `plan` (pure) chooses
//! backup, WAL and recovery settings or refuses; `list` and `verify` report on the archive; `run` and `wal-fetch`
//! carry a plan out. Nothing here writes to an archive.

pub mod catalog;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod datadir;
pub mod error;
pub mod fetch;
pub mod list;
pub mod locate;
pub mod plan;
pub mod progress;
pub mod recovery;
pub mod regions;
pub mod report;
pub mod run;
pub mod target;
pub mod verify;
pub mod walfeed;

#[cfg(test)]
mod archive_tests;

pub use error::RestoreError;
