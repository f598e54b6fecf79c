//! Reading `global/pg_control`: state, checkpoint, timeline, minimum recovery end. Read-only; nothing is changed in it.
//!
//! Offsets are those of `ControlFileData` in PostgreSQL's `catalog/pg_control.h`, which have not moved from 13 to 18 as
//! far as the fields below go (`PG_CONTROL_VERSION` 1300 and 1800), little-endian with 8-byte alignment. PostgreSQL
//! rewrites the file with one write of its first sector; a reader that meets a write half done sees an odd state
//! and looks again.
//!
//! | offset | field |
//! |---|---|
//! | 0 | system identifier u64 |
//! | 8 | control version u32 |
//! | 16 | state u32 |
//! | 32 | latest checkpoint u64 |
//! | 40 | its redo position u64 |
//! | 48 | its timeline u32 |
//! | 136 | minimum recovery end u64 |
//! | 144 | its timeline u32 |
//! | 180 | `max_connections` i32 |
//! | 184 | `max_worker_processes` i32 |
//! | 188 | `max_wal_senders` i32 |
//! | 192 | `max_prepared_transactions` i32 |
//! | 196 | `max_locks_per_transaction` i32 |

use std::fs;
use std::io;
use std::path::Path;

use highwater_format::{Lsn, SystemId, TimelineId};

/// Control versions whose layout is known.
const VERSIONS: std::ops::RangeInclusive<u32> = 1300..=1800;

/// `DBState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Being started.
    StartUp,
    /// Cleanly stopped.
    ShutDown,
    /// Cleanly stopped while in recovery.
    ShutDownInRecovery,
    /// Being stopped.
    ShuttingDown,
    /// Replaying after a crash.
    CrashRecovery,
    /// Replaying from an archive.
    ArchiveRecovery,
    /// Open for work.
    Production,
}

/// What the control file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// The lineage.
    pub system_id: SystemId,
    /// What the server does, or did last.
    pub state: State,
    /// The latest checkpoint.
    pub checkpoint: Lsn,
    /// The timeline of the latest checkpoint.
    pub timeline: Option<TimelineId>,
    /// Replay must reach this before the cluster is consistent.
    pub minimum_recovery_end: Lsn,
    /// The limits that the server ran with last, in the order of [`crate::recovery::limits::NAMES`].
    pub limits: [u32; 5],
}

impl Control {
    /// Reads the control file of the data directory `root`.
    ///
    /// # Errors
    /// It is not there, too short, or of an unknown version.
    pub fn read(root: &Path) -> io::Result<Self> {
        Self::read_file(&root.join("global/pg_control"))
    }

    /// Reads a control file under any name.
    ///
    /// # Errors
    /// It is not there, too short, or of an unknown version.
    pub fn read_file(path: &Path) -> io::Result<Self> {
        let bytes = fs::read(path)?;
        Self::parse(&bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unknown form of pg_control"))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| {
            bytes
                .get(at..)?
                .first_chunk()
                .map(|field| u32::from_le_bytes(*field))
        };
        let u64_at = |at: usize| {
            bytes
                .get(at..)?
                .first_chunk()
                .map(|field| u64::from_le_bytes(*field))
        };
        if !VERSIONS.contains(&u32_at(8)?) {
            return None;
        }
        let state = match u32_at(16)? {
            0 => State::StartUp,
            1 => State::ShutDown,
            2 => State::ShutDownInRecovery,
            3 => State::ShuttingDown,
            4 => State::CrashRecovery,
            5 => State::ArchiveRecovery,
            6 => State::Production,
            _ => return None,
        };
        Some(Self {
            system_id: SystemId(u64_at(0)?),
            state,
            checkpoint: Lsn(u64_at(32)?),
            timeline: TimelineId::new(u32_at(48)?),
            minimum_recovery_end: Lsn(u64_at(136)?),
            limits: [
                u32_at(180)?,
                u32_at(184)?,
                u32_at(188)?,
                u32_at(192)?,
                u32_at(196)?,
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; 8192];
        bytes[0..8].copy_from_slice(&7u64.to_le_bytes());
        bytes[8..12].copy_from_slice(&1300u32.to_le_bytes());
        bytes[16..20].copy_from_slice(&5u32.to_le_bytes());
        bytes[32..40].copy_from_slice(&0x200u64.to_le_bytes());
        bytes[48..52].copy_from_slice(&2u32.to_le_bytes());
        bytes[136..144].copy_from_slice(&0x300u64.to_le_bytes());
        for (at, limit) in [(180, 150u32), (184, 8), (188, 10), (192, 0), (196, 64)] {
            bytes[at..at + 4].copy_from_slice(&limit.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn fields_are_found() {
        let control = Control::parse(&bytes()).unwrap();
        assert_eq!(control.state, State::ArchiveRecovery);
        assert_eq!((control.system_id, control.checkpoint), (SystemId(7), Lsn(0x200)));
        assert_eq!(
            (control.timeline.unwrap().get(), control.minimum_recovery_end),
            (2, Lsn(0x300))
        );
        assert_eq!(control.limits, [150, 8, 10, 0, 64]);
    }

    #[test]
    fn unknown_versions_states_and_short_files_are_refused() {
        let mut newer = bytes();
        newer[8..12].copy_from_slice(&1900u32.to_le_bytes());
        let mut odd = bytes();
        odd[16] = 9;
        for bad in [newer, odd, bytes()[..100].to_vec(), Vec::new()] {
            assert_eq!(Control::parse(&bad), None);
        }
    }
}
