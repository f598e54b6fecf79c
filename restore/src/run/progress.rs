//! Showing how far it is: a bar on a terminal, a log line now and then elsewhere.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::fetch::Progress;
use crate::walfeed::spool::Spool;

/// How often a bar is drawn.
const DRAW: Duration = Duration::from_millis(200);
/// How often a log line is written where there is no terminal.
const LINE: Duration = Duration::from_secs(10);

/// Waits for `work` and shows `progress` towards `total` bytes meanwhile.
pub async fn shown<T>(work: impl Future<Output = T>, progress: &Progress, total: u64) -> T {
    let bar = bar(total);
    let mut said = Instant::now();
    let mut work = std::pin::pin!(work);
    let mut draw = tokio::time::interval(DRAW);
    loop {
        tokio::select! {
            done = &mut work => {
                bar.finish_and_clear();
                return done;
            }
            _ = draw.tick() => {
                let written = progress.written.load(Ordering::Relaxed);
                bar.set_position(written);
                if bar.is_hidden() && said.elapsed() >= LINE {
                    said = Instant::now();
                    tracing::info!(written, total, "restoring files");
                }
            }
        }
    }
}

fn bar(total: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    // A template that cannot be read would be a mistake of this file; the plain bar is then good enough.
    let style =
        ProgressStyle::with_template("files {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Shows which segment is being replayed.
#[derive(Debug)]
pub struct Replay {
    spool: Spool,
    bar: ProgressBar,
    looked: Instant,
    said: Instant,
}

impl Replay {
    /// For the data directory `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        let now = Instant::now();
        Self {
            spool: Spool::of(root),
            bar,
            looked: now,
            said: now,
        }
    }

    /// Looks and shows, not too often.
    pub fn show(&mut self) {
        if self.looked.elapsed() < DRAW {
            return;
        }
        self.looked = Instant::now();
        let Some(segment) = self.spool.asked() else { return };
        if !self.bar.is_hidden() {
            self.bar.set_message(format!("replaying {segment}"));
            self.bar.tick();
        } else if self.said.elapsed() >= LINE {
            self.said = Instant::now();
            tracing::info!(%segment, "replaying");
        }
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
