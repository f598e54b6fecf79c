//! The end of the tasks: each has a moment for its last word, and none holds up the process.
//!
//! Owns: waiting for what has been told to stop, in a bounded time. A process that has nothing to do any more and stays
//! archives nothing, and no supervisor starts it again. Does not own: the order in which things are told to stop (`run`), nor
//! the time that the last bytes are given (the receiver, before).

use std::time::Duration;

use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, timeout_at};

use crate::error::{AgentError, Result};

/// How long all tasks together may take. The longest of them is the last pulse of a slow region. With the time for the last
/// bytes it stays below `TimeoutStopSec` of the systemd unit.
const LAST: Duration = Duration::from_secs(10);

/// Waits for tasks that were told to stop, and goes without those that do not. The first error counts.
pub(crate) async fn drain(tasks: &mut JoinSet<Result<()>>) -> Result<()> {
    let until = Instant::now() + LAST;
    let mut first = Ok(());
    loop {
        match timeout_at(until, tasks.join_next()).await {
            Ok(None) => return first,
            Ok(Some(ended)) => match flatten(ended) {
                Err(AgentError::Cancelled) | Ok(()) => {}
                Err(error) => first = first.and(Err(error)),
            },
            Err(_) => {
                let (left, seconds) = (tasks.len(), LAST.as_secs());
                tracing::warn!(
                    left,
                    seconds,
                    "tasks that were told to stop have not; the process ends without them"
                );
                tasks.abort_all();
                return first;
            }
        }
    }
}

/// What a task says that has ended.
pub(crate) fn flatten(ended: std::result::Result<Result<()>, JoinError>) -> Result<()> {
    ended.map_err(|error| AgentError::Bug(format!("a task ended abnormally: {error}")))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restart() -> AgentError {
        AgentError::Restart {
            what: "a region is dead".into(),
            next: "The agent is started again".into(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_stop_is_left_behind() {
        let mut tasks = JoinSet::new();
        tasks.spawn(std::future::pending());
        tasks.spawn(async { Err(AgentError::Cancelled) });
        tasks.spawn(async {
            tokio::time::sleep(LAST / 2).await;
            Err(restart())
        });
        let ended = tokio::time::timeout(2 * LAST, drain(&mut tasks)).await;
        let error = ended.expect("it ends").unwrap_err();
        assert!(matches!(error, AgentError::Restart { .. }), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_stop_are_waited_for_and_no_longer() {
        let mut tasks = JoinSet::new();
        let began = Instant::now();
        tasks.spawn(async {
            tokio::time::sleep(LAST / 2).await;
            Ok(())
        });
        drain(&mut tasks).await.unwrap();
        assert_eq!(began.elapsed(), LAST / 2);
    }
}
