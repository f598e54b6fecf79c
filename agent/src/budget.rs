//! The bound on memory, in bytes of WAL held anywhere between the socket and the regions.
//!
//! Owns one counter. Whoever holds WAL bytes holds a [`Charge`] for them; the receiver alone waits, before
//! it reads more from the socket, until the sum is under the limit. So nothing inside the pipeline ever
//! blocks on memory, and the overshoot is bounded by one frame. When the limit is reached PostgreSQL keeps
//! the WAL: the slot holds it there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Mutex, MutexGuard, Notify};

/// The limit and what is charged against it.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
    freed: Notify,
    turns: Mutex<()>,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU64::new(0),
            freed: Notify::new(),
            turns: Mutex::new(()),
        })
    }

    /// The limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes charged now.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// Whether more may be read.
    pub fn has_room(&self) -> bool {
        self.used() < self.limit
    }

    /// Charges `bytes` until the returned value is dropped. Never waits.
    pub fn charge(self: &Arc<Self>, bytes: u64) -> Charge {
        self.used.fetch_add(bytes, Ordering::AcqRel);
        Charge {
            budget: self.clone(),
            bytes,
        }
    }

    /// Waits until there is room.
    pub async fn room(&self) {
        loop {
            let freed = self.freed.notified();
            if self.has_room() {
                return;
            }
            freed.await;
        }
    }

    /// Waits until nobody else reads back WAL only to compare it, and until there is room: many regions at once would
    /// each charge as much as the end of a region's WAL, without waiting, and the stream would wait for them.
    pub async fn turn(&self) -> MutexGuard<'_, ()> {
        let turn = self.turns.lock().await;
        self.room().await;
        turn
    }

    fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
        self.freed.notify_waiters();
    }
}

/// Bytes that count against a [`Budget`] for as long as this lives.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Charge {
    /// Changes the charge, for instance when plain bytes became fewer compressed ones.
    pub fn resize(&mut self, bytes: u64) {
        if bytes > self.bytes {
            self.budget.used.fetch_add(bytes - self.bytes, Ordering::AcqRel);
        } else {
            self.budget.release(self.bytes - bytes);
        }
        self.bytes = bytes;
    }

    /// Takes over what another one of the same budget stands for.
    pub fn join(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.release(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_until_charges_are_dropped() {
        let budget = Budget::new(10);
        let mut first = budget.charge(8);
        let second = budget.charge(8);
        assert!(!budget.has_room());
        first.resize(4);
        assert_eq!(budget.used(), 12);
        let waiter = tokio::spawn({
            let budget = budget.clone();
            async move { budget.room().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(second);
        waiter.await.unwrap();
        assert_eq!(budget.used(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn who_compares_waits_for_its_turn_and_for_room() {
        let budget = Budget::new(10);
        let soon = std::time::Duration::from_secs(1);
        let turn = budget.turn().await;
        assert!(tokio::time::timeout(soon, budget.turn()).await.is_err());
        drop(turn);
        let full = budget.charge(10);
        assert!(tokio::time::timeout(soon, budget.turn()).await.is_err());
        drop(full);
        assert!(tokio::time::timeout(soon, budget.turn()).await.is_ok());
    }
}
