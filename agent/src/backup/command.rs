//! `highwater-agent backup`: one base backup now.
//!
//! Owns: opening the archive for a single run, and showing progress, drawn on a terminal and as log lines
//! elsewhere. Refuses regions that belong to another cluster before a base backup is asked for.
//! Does not own: the backup itself.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use highwater_config::Config;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;

use super::{BackupContext, BackupOptions, BackupReport, Progress, run_backup};
use crate::error::{AgentError, Result};
use crate::region::{self, Archive};
use crate::state::State;
use crate::{identity, run, server};

/// Between two drawings on a terminal.
const DRAW_EVERY: Duration = Duration::from_millis(500);
const MB: u64 = 1_000_000;
/// Between two lines about progress in the log.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Takes one base backup.
pub async fn backup(
    config: &Config,
    spread_checkpoint: bool,
    cancel: CancellationToken,
) -> Result<BackupReport> {
    let conn = run::connection(config)?.with_application_name("highwater backup");
    let archive = Arc::new(open(config).await?);
    let mut options = BackupOptions::from_config(config);
    options.checkpoint_fast &= !spread_checkpoint;
    let progress = Progress::new();
    let ctx = BackupContext {
        conn,
        archive,
        options,
        cancel,
        progress: progress.clone(),
    };
    let terminal = std::io::stderr().is_terminal();
    let shown = async {
        match terminal {
            true => draw(progress).await,
            false => tell(progress).await,
        }
    };
    // On a worker thread: there the socket wakes the reader itself, instead of another thread that wakes it.
    let mut task = JoinSet::new();
    task.spawn(run_backup(ctx));
    let report = tokio::select! {
        biased;
        Some(ended) = task.join_next() => {
            ended.map_err(|error| AgentError::Bug(format!("the base backup ended abnormally: {error}")))?
        }
        () = shown => Err(AgentError::Bug("the progress reporter ended".into())),
    };
    if terminal {
        line("");
    }
    report
}

/// The archive of the server that the configuration names.
async fn open(config: &Config) -> Result<Archive> {
    let state = State::new(
        config
            .regions
            .iter()
            .map(|region| region.display_name().to_owned()),
    );
    let regions = region::open(config, &state).await?;
    let mut conn = server::connect(&run::connection(config)?).await?;
    let identity = server::identity(&mut conn).await?;
    conn.close().await;
    let archive = Archive::new(config.cluster.name.clone(), identity, regions);
    for region in &archive.regions {
        // An empty one passes here; it fails later, for want of WAL.
        match identity::holds(&*region.quick, &archive.layout).await {
            Err(error @ AgentError::Store(_)) => {
                tracing::warn!(region = %region.name, %error, "this region does not answer now");
            }
            other => drop(other?),
        }
    }
    Ok(archive)
}

/// Draws how far the backup is on the terminal, for as long as it is polled.
async fn draw(progress: Progress) {
    let began = Instant::now();
    let mut ticks = interval(DRAW_EVERY);
    loop {
        ticks.tick().await;
        let (received, expected) = (progress.received(), progress.expected());
        if received == 0 {
            line("waiting for the WAL stream and PostgreSQL's checkpoint");
            continue;
        }
        let millis = u64::try_from(began.elapsed().as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        let rate = received.saturating_mul(1000) / millis;
        let left = expected.saturating_sub(received).checked_div(rate).unwrap_or(0);
        let percent = (received * 100).checked_div(expected).unwrap_or(0).min(100);
        line(&format!(
            "{} of {} MB, {percent} %, {} MB/s, {left} s left",
            received / MB,
            expected / MB,
            rate / MB
        ));
    }
}

/// Replaces the terminal's last line.
fn line(text: &str) {
    let mut stderr = std::io::stderr();
    // A terminal that went away is no reason to stop.
    let _ = write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush());
}

/// Says how far the backup is, for as long as it is polled.
pub(crate) async fn tell(progress: Progress) {
    let mut ticks = interval(TELL_EVERY);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let (received, expected) = (progress.received(), progress.expected());
        let percent = (received * 100).checked_div(expected).unwrap_or(0).min(100);
        tracing::info!(
            received,
            expected,
            percent,
            stored = progress.stored(),
            "base backup"
        );
    }
}
