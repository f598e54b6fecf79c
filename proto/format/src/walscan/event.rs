//! What the scanner reports.

use crate::lsn::Lsn;
use crate::time::Time;
use crate::timeline::TimelineId;

/// Something in the WAL that a reader of the archive wants to know. `end` is where PostgreSQL says the record ends,
/// rounded up to the next record: the LSN of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalEvent {
    /// A transaction ended. Recovery to a time or transaction id stops at these and at restore points.
    Commit {
        /// End of the record.
        end: Lsn,
        /// When it ended, by the server's clock.
        time: Time,
        /// The transaction; of `COMMIT PREPARED` and `ROLLBACK PREPARED` the one that was prepared.
        xid: u32,
        /// It was rolled back.
        abort: bool,
    },
    /// `pg_create_restore_point()`.
    RestorePoint {
        /// End of the record.
        end: Lsn,
        /// The name given.
        name: String,
        /// When, by the server's clock.
        time: Time,
    },
    /// The server was started with settings that a hot standby must match or exceed.
    ParameterChange {
        /// End of the record.
        end: Lsn,
        /// `max_connections`.
        max_connections: i32,
        /// `max_worker_processes`.
        max_worker_processes: i32,
        /// `max_wal_senders`.
        max_wal_senders: i32,
        /// `max_prepared_transactions`.
        max_prepared_xacts: i32,
        /// `max_locks_per_transaction`.
        max_locks_per_xact: i32,
        /// `wal_level`: 0 minimal, 1 replica, 2 logical.
        wal_level: i32,
    },
    /// `pg_switch_wal()` or `archive_timeout`: nothing more in this segment.
    Switch {
        /// End of the segment.
        end: Lsn,
    },
    /// A checkpoint was finished.
    Checkpoint {
        /// End of the record.
        end: Lsn,
        /// Where replay from this checkpoint begins.
        redo: Lsn,
        /// Timeline at that moment.
        timeline: TimelineId,
        /// When it began, to the second.
        time: Time,
        /// The server was shutting down or had just recovered.
        shutdown: bool,
    },
    /// The server was promoted and went on without a checkpoint.
    EndOfRecovery {
        /// End of the record.
        end: Lsn,
        /// When, by the server's clock.
        time: Time,
        /// The timeline that begins here.
        timeline: TimelineId,
        /// The one that it left.
        previous: TimelineId,
    },
}
