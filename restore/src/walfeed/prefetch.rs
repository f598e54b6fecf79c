//! The prefetcher: one process per recovery that keeps the segments after the last one asked for in the spool.
//!
//! Owns: when it is started (by the first `wal-fetch`), which segments it keeps, and when it leaves. It is only ever an
//! accelerator: what it does not have, `wal-fetch` gets by itself, and nothing is proven here. It leaves when
//! recovery has ended, when the server is gone, or when nothing was asked for a long time; a later `wal-fetch` starts
//! another. Disk: the window of [`Window`]; memory: one stored object and one frame for each fetch in flight.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use highwater_format::lsn::SegmentSize;
use highwater_format::walname::{SegmentName, WalName};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::feed::{Answer, Feed};
use super::spool::{Claim, Spool};
use crate::datadir::occupied;
use crate::recovery::facts::Facts;

/// The subcommand, hidden from help.
pub const COMMAND: &str = "wal-prefetch";

/// How often the note of what was asked is read. Replay of a segment takes tens of milliseconds at best.
const LOOK: Duration = Duration::from_millis(5);
/// How often it is checked whether anybody still needs this.
const CHECK: Duration = Duration::from_secs(1);
/// A segment that could not be had is not tried again for this long.
const PAUSE: Duration = Duration::from_secs(5);
/// Nothing asked for this long: the server waits at its target, or somebody called `wal-fetch` by hand.
const IDLE: Duration = Duration::from_secs(600);
/// The same where no server runs on the directory.
const IDLE_WITHOUT_SERVER: Duration = Duration::from_secs(20);

/// Starts the prefetcher of the data directory that `facts` lies in, in a process group of its own so that signals
/// to the server's processes do not reach it.
///
/// # Errors
/// The process cannot be started.
pub fn spawn(facts: &Path, asked: WalName) -> std::io::Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(COMMAND)
        .arg("--plan")
        .arg(facts)
        .arg("--after")
        .arg(asked.to_string());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    command.spawn().map(drop)
}

/// How much is kept ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Segments in the spool.
    pub ahead: usize,
    /// Fetches in flight.
    pub parallel: usize,
}

impl Window {
    /// At least two segments ahead, whatever their size; objects in flight are bounded by the same bytes.
    #[must_use]
    pub fn of(bytes: u64, size: SegmentSize) -> Self {
        let segments = |bytes: u64| usize::try_from(bytes / size.bytes()).unwrap_or(usize::MAX);
        let ahead = segments(bytes).clamp(2, 64);
        Self {
            ahead,
            parallel: segments(128 << 20).clamp(2, 6).min(ahead),
        }
    }
}

/// The segment that recovery asks for after `name`: the next number, on the newest timeline that has begun by then
/// (the rule of PostgreSQL's `XLogFileReadAnyTLI`). `None` behind the end of what recovery needs.
#[must_use]
pub fn following(facts: &Facts, name: SegmentName) -> Option<SegmentName> {
    let size = facts.segments();
    let number = name.number.checked_add(1)?;
    let begun = facts
        .timelines
        .iter()
        .filter(|timeline| size.segment_number(timeline.begin) <= number);
    let newest = begun.max_by_key(|timeline| timeline.timeline)?;
    let next = SegmentName {
        timeline: newest.timeline,
        number,
    };
    let start = next.start(size);
    let needed = facts.needed_until.is_none_or(|until| start < until);
    (newest.timeline >= name.timeline && start < newest.end && needed).then_some(next)
}

/// The segments to keep after `asked`, nearest first.
fn wanted(facts: &Facts, asked: SegmentName, window: Window) -> Vec<SegmentName> {
    std::iter::successors(following(facts, asked), |name| following(facts, *name))
        .take(window.ahead)
        .collect()
}

/// Serves the spool until nobody needs it. `Ok` also when another prefetcher has it already.
///
/// # Errors
/// The spool cannot be used.
pub async fn serve(root: &Path, feed: Feed, asked: WalName) -> std::io::Result<()> {
    let Some(claim) = Spool::of(root).claim()? else {
        return Ok(());
    };
    claim.spool().note_asked(asked)?;
    let size = feed.facts().segments();
    let window = Window::of(feed.facts().prefetch_bytes, size);
    let mut server = Prefetcher {
        root: root.to_owned(),
        size,
        window,
        feed: Arc::new(feed),
        claim: Arc::new(claim),
        fetching: HashSet::new(),
        paused: HashMap::new(),
        running: JoinSet::new(),
    };
    server.run(asked).await?;
    // Fetches in flight end with the runtime; what they wrote is removed here.
    server.running.shutdown().await;
    match Arc::try_unwrap(server.claim) {
        Ok(claim) => claim.leave(),
        Err(shared) => shared.retain(|_| false),
    }
}

struct Prefetcher {
    root: PathBuf,
    size: SegmentSize,
    window: Window,
    feed: Arc<Feed>,
    claim: Arc<Claim>,
    fetching: HashSet<SegmentName>,
    paused: HashMap<SegmentName, Instant>,
    running: JoinSet<(SegmentName, bool)>,
}

impl Prefetcher {
    async fn run(&mut self, first: WalName) -> std::io::Result<()> {
        let mut asked = first;
        let mut asked_at = Instant::now();
        let mut checked_at = Instant::now();
        let mut had_server = occupied::running_server(&self.root).is_some();
        self.keep(asked)?;
        loop {
            tokio::select! {
                Some(done) = self.running.join_next() => {
                    if let Ok((name, good)) = done {
                        self.note(name, good);
                    }
                    self.keep(asked)?;
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            let now = Instant::now();
            if let Some(name) = self.claim.spool().asked().filter(|name| *name != asked) {
                (asked, asked_at) = (name, now);
                self.keep(asked)?;
            }
            if now.duration_since(checked_at) >= CHECK {
                checked_at = now;
                if !is_needed(&self.root, now.duration_since(asked_at), &mut had_server) {
                    return Ok(());
                }
                self.paused.retain(|_, until| *until > now);
                self.keep(asked)?;
            }
        }
    }

    fn note(&mut self, name: SegmentName, good: bool) {
        self.fetching.remove(&name);
        if !good {
            self.paused.insert(name, Instant::now() + PAUSE);
        }
    }

    /// Removes what is no longer wanted and starts what is missing.
    fn keep(&mut self, asked: WalName) -> std::io::Result<()> {
        let Some(asked) = asked.resolve(self.size) else {
            return Ok(());
        };
        let wanted = wanted(self.feed.facts(), asked, self.window);
        let keep: HashSet<WalName> = wanted
            .iter()
            .chain(&self.fetching)
            .map(|name| name.wal_name(self.size))
            .collect();
        self.claim.retain(|name| keep.contains(&name))?;
        for name in wanted {
            if self.fetching.len() >= self.window.parallel {
                break;
            }
            let there =
                self.claim.spool().standing(name.wal_name(self.size)) != super::spool::Standing::Absent;
            if !there && !self.paused.contains_key(&name) {
                self.start(name)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, name: SegmentName) -> std::io::Result<()> {
        let wal_name = name.wal_name(self.size);
        let part = self.claim.begin(wal_name)?;
        self.fetching.insert(name);
        let (feed, claim) = (self.feed.clone(), self.claim.clone());
        self.running.spawn(async move {
            let good = feed.segment(name, &part).await == Answer::Done && claim.ready(wal_name).is_ok();
            if good {
                // Not waited for by anyone: the segment can be taken already, and the server's own sync of it
                // then finds little left to write.
                let path = claim.spool().directory().join(wal_name.to_string());
                let synced =
                    tokio::task::spawn_blocking(move || File::open(path).and_then(|file| file.sync_data()));
                let _ = synced.await;
            } else {
                claim.give_up(wal_name);
            }
            (name, good)
        });
        Ok(())
    }
}

/// Whether anybody may still ask. `had_server` remembers that a server ran on the directory.
fn is_needed(root: &Path, idle: Duration, had_server: &mut bool) -> bool {
    let recovering = root.join("recovery.signal").exists() || root.join("standby.signal").exists();
    match occupied::running_server(root) {
        Some(_) => {
            *had_server = true;
            recovering && idle < IDLE
        }
        // Called by hand; or the server is gone, and its data directory may be removed at any moment.
        None => !*had_server && idle < IDLE_WITHOUT_SERVER && root.exists(),
    }
}

#[cfg(test)]
#[path = "prefetch_tests.rs"]
mod tests;
