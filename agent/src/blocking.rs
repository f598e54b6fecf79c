//! Work that keeps a processor busy: compressing, sealing, comparing.
//!
//! Owns where it runs, and nothing else does. On a runtime with several threads it goes to the blocking
//! pool, so that sockets and timers are not kept waiting. A runtime with one thread gets it done on the spot:
//! the order of events is then the same at every run, which is what a simulation needs.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::spawn_blocking;

use crate::error::{AgentError, Result};

/// Runs `work` away from the tasks that must not wait for it; `what` names it if it ends abnormally.
pub(crate) async fn run<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    if Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread {
        return Ok(work());
    }
    spawn_blocking(work)
        .await
        .map_err(|error| AgentError::Bug(format!("{what}: {error}")))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[tokio::test]
    async fn one_thread_does_the_work_itself() {
        let here = thread::current().id();
        let there = run("looking", || thread::current().id()).await.unwrap();
        assert_eq!(here, there);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn several_threads_leave_it_to_the_pool() {
        let worker = tokio::spawn(async {
            let here = thread::current().id();
            (here, run("looking", || thread::current().id()).await.unwrap())
        });
        let (here, there) = worker.await.unwrap();
        assert_ne!(here, there);
        let ended = run("a check", move || assert!(here == there)).await;
        assert!(ended.is_err_and(|error| error.to_string().contains("a check")));
    }
}
