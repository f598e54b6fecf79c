//! A value that several tasks follow, each woken in the order in which it began to follow.
//!
//! Every follower has a `watch` channel of its own: one channel for all of them wakes them in an order that
//! is drawn at random, and the same events would not give the same course twice.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// See the module.
#[derive(Debug)]
pub(crate) struct Followers<T> {
    inner: Mutex<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T> {
    value: T,
    followers: Vec<watch::Sender<T>>,
}

impl<T: Copy> Followers<T> {
    pub(crate) fn new(value: T) -> Self {
        let inner = Inner {
            value,
            followers: Vec::new(),
        };
        Self {
            inner: Mutex::new(inner),
        }
    }

    /// Tells everybody who still follows.
    pub(crate) fn send(&self, value: T) {
        let mut inner = self.lock();
        inner.value = value;
        inner.followers.retain(|follower| follower.send(value).is_ok());
    }

    /// The value now.
    pub(crate) fn value(&self) -> T {
        self.lock().value
    }

    /// Follows from here on; the value now counts as seen.
    pub(crate) fn follow(&self) -> watch::Receiver<T> {
        let mut inner = self.lock();
        inner.followers.retain(|follower| !follower.is_closed());
        let (follower, receiver) = watch::channel(inner.value);
        inner.followers.push(follower);
        receiver
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_are_told_in_order_and_those_that_left_are_forgotten() {
        let followers = Followers::new(1);
        let mut all: Vec<_> = (0..20).map(|_| followers.follow()).collect();
        drop(all.remove(3));
        let (sender, mut order) = tokio::sync::mpsc::channel(20);
        for (number, mut follower) in all.into_iter().enumerate() {
            let sender = sender.clone();
            tokio::spawn(async move {
                follower.changed().await.unwrap();
                assert_eq!(*follower.borrow(), 2);
                sender.send(number).await.unwrap();
            });
        }
        tokio::task::yield_now().await;
        followers.send(2);
        for expected in 0..19 {
            assert_eq!(order.recv().await, Some(expected));
        }
        assert_eq!(followers.value(), 2);
        assert_eq!(followers.lock().followers.len(), 19);
    }
}
