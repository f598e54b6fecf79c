//! How far a base backup is, for whoever shows it.
//!
//! Owns a few counters that the stream and the packs move. Does not own: terminals and log lines.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared counters of one base backup. Cheap to clone; every clone counts into the same place.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    received: AtomicU64,
    expected: AtomicU64,
    stored: AtomicU64,
}

impl Progress {
    /// Counters at zero.
    pub fn new() -> Progress {
        Progress::default()
    }

    /// Bytes received from PostgreSQL.
    pub fn received(&self) -> u64 {
        self.counters.received.load(Ordering::Relaxed)
    }

    /// PostgreSQL's own estimate of what it will send; zero until it has said so.
    pub fn expected(&self) -> u64 {
        self.counters.expected.load(Ordering::Relaxed)
    }

    /// Bytes of packs that are stored in every region of the backup, as they are stored.
    pub fn stored(&self) -> u64 {
        self.counters.stored.load(Ordering::Relaxed)
    }

    pub(crate) fn add_received(&self, bytes: u64) {
        self.counters.received.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_stored(&self, bytes: u64) {
        self.counters.stored.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn expect(&self, bytes: u64) {
        self.counters.expected.store(bytes, Ordering::Relaxed);
    }
}
