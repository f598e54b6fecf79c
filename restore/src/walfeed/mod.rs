//! `wal-fetch`: the `restore_command`, and the prefetcher that keeps replay from waiting.
//!
//! Owns: the three answers PostgreSQL understands. 0: the file is there, whole and verified. 1: it is proven to lie
//! past the end (see [`prove`]). Above 125: anything else, at which PostgreSQL stops recovery instead of opening
//! the cluster with data missing. PostgreSQL takes every other number for "the archive has ended".
//!
//! One process runs per segment, so what is fast comes first: a segment that waits in the spool is renamed into place
//! before a configuration is read, a runtime built or a connection made.

pub mod feed;
mod look;
pub(crate) mod place;
pub mod prefetch;
pub mod prove;
pub mod spool;
mod watched;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use highwater_config::{Config, Overrides};
use highwater_format::walname::{WalFile, WalName};
use highwater_store::RegionConfig;

use crate::recovery::facts::Facts;
use feed::{Answer, Feed};
use spool::{Spool, Standing};

/// The file is there.
const DONE: u8 = 0;
/// Proven to lie past the end.
const PAST_END: u8 = 1;
/// Stop recovery.
const STOP: u8 = 255;

/// What is said of a segment that no patience brings back.
pub(crate) const DAMAGED: &str =
    "is damaged in every region that this restore reads, and nothing else there holds all of it";

/// What begins the reason where this machine is the trouble, and no region.
pub(crate) const CANNOT_WRITE: &str = "the file that PostgreSQL waits for cannot be written:";

/// A segment that is being fetched is waited for this long before it is fetched a second time.
const WAIT_FOR_PREFETCH: Duration = Duration::from_secs(60);
/// How often the spool is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(1);
/// A whole answer takes at most this long; recovery must not hang on a store that accepts and never answers.
const DEADLINE: Duration = Duration::from_secs(180);

/// What `wal-fetch` ends with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The exit code for PostgreSQL.
    pub code: u8,
    /// For the server's log.
    pub message: Option<String>,
}

impl Reply {
    fn done() -> Self {
        Self {
            code: DONE,
            message: None,
        }
    }

    /// Recovery must stop.
    #[must_use]
    pub fn stop(message: impl Into<String>) -> Self {
        Self {
            code: STOP,
            message: Some(message.into()),
        }
    }

    fn of(name: &str, answer: Answer) -> Self {
        match answer {
            Answer::Done => Self::done(),
            Answer::PastEnd(proof) => Self {
                code: PAST_END,
                message: Some(format!("{name} lies past the end of the archive: {proof}")),
            },
            Answer::Failed(reason) => {
                let next = "recovery stops here and goes on when the server is started again";
                Self::stop(format!(
                    "{name} cannot be had, and is not proven to lie past the end: {reason}; {next}"
                ))
            }
            Answer::Damaged { reason, before } => Self::stop(format!(
                "{name} {DAMAGED}: {reason}; recovery stops here. Put an intact version of the object back and start the server \
                 again, or restore to the end of what is there: `highwater-restore run --to-lsn {before}` into another directory"
            )),
        }
    }
}

/// Answers for the file `name`, to be put at `to`, by the facts in the file `plan` (which lies in the data
/// directory). Blocking; builds a runtime only if it must.
#[must_use]
pub fn fetch(plan: &Path, name: &str, to: &Path) -> Reply {
    let file = match WalFile::parse(name) {
        Ok(file) => file,
        Err(error) => return Reply::stop(error.to_string()),
    };
    let segment = match file {
        WalFile::Segment(segment) => Some(segment),
        WalFile::History(_) => None,
        WalFile::Partial(_) | WalFile::BackupHistory(..) => {
            return Reply::stop(format!(
                "{name} is never needed for recovery, and is not archived"
            ));
        }
    };
    let spool = Spool::of(plan.parent().unwrap_or(Path::new(".")));
    if let Some(segment) = segment {
        match from_spool(&spool, plan, segment, to) {
            Ok(true) => return Reply::done(),
            Ok(false) => {}
            Err(error) => return Reply::stop(format!("cannot move {name} from the spool: {error}")),
        }
    }
    slowly(&spool, plan, file, name, to)
}

/// Takes a segment from the spool, waiting for it if it is on its way. Starts a prefetcher where none runs.
fn from_spool(spool: &Spool, plan: &Path, segment: WalName, to: &Path) -> std::io::Result<bool> {
    if !spool.is_served() {
        // Without one everything still works, only slower; and a directory that cannot be written to will be told
        // of when the segment itself is written.
        let _ = prefetch::spawn(plan, segment);
        return Ok(false);
    }
    let _ = spool.note_asked(segment);
    let since = Instant::now();
    loop {
        match spool.standing(segment) {
            Standing::Ready => return spool.take(segment, to),
            Standing::Absent => return Ok(false),
            Standing::Coming if since.elapsed() > WAIT_FOR_PREFETCH || !spool.is_served() => {
                return Ok(false);
            }
            // A plain process with nothing else to do: there is no runtime yet whose thread this could block.
            Standing::Coming => std::thread::park_timeout(LOOK),
        }
    }
}

fn slowly(spool: &Spool, plan: &Path, file: WalFile, name: &str, to: &Path) -> Reply {
    let facts = match Facts::read(plan) {
        Ok(facts) => facts,
        Err(error) => return Reply::stop(error.to_string()),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Reply::stop(format!("cannot start: {error}")),
    };
    let answer = runtime.block_on(async {
        let work = async {
            let feed = open(facts, spool).await;
            answer(&feed, file, to).await
        };
        match tokio::time::timeout(DEADLINE, work).await {
            Ok(answer) => answer,
            Err(_) => Answer::Failed(format!(
                "the regions did not answer within {} s",
                DEADLINE.as_secs()
            )),
        }
    });
    // A blocking thread may hang in a dead file system; the answer does not wait for it.
    runtime.shutdown_background();
    Reply::of(name, answer)
}

/// Answers from an open feed. Regions that are silent beside others are not waited for unless nothing else helps.
pub async fn answer(feed: &Feed, file: WalFile, to: &Path) -> Answer {
    let answer = ask(feed, file, to).await;
    if matches!(answer, Answer::Failed(_)) && feed.wake() {
        return ask(feed, file, to).await;
    }
    answer
}

async fn ask(feed: &Feed, file: WalFile, to: &Path) -> Answer {
    match file {
        WalFile::Segment(name) => match name.resolve(feed.facts().segments()) {
            Some(segment) => feed.segment(segment, to).await,
            None => {
                let size = feed.facts().segment_size;
                Answer::Failed(format!("no segment of {size} bytes has the name {name}"))
            }
        },
        WalFile::History(timeline) => feed.history(timeline, to).await,
        other => Answer::Failed(format!(
            "{other} is never needed for recovery, and is not archived"
        )),
    }
}

/// Opens the feed of `facts`, with credentials from the configuration file where it can be read.
pub async fn open(facts: Facts, spool: &Spool) -> Feed {
    let configured = credentials(facts.config.as_deref());
    let feed = Feed::open(facts, &configured, spool.directory()).await;
    let root = spool.directory().parent();
    feed.following(root.is_some_and(|root| root.join("standby.signal").exists()))
}

/// The regions as configured, for their credentials only. A configuration that cannot be read is no error here:
/// credentials may come from the standard chain, and if they do not, the region says so.
fn credentials(path: Option<&Path>) -> Vec<RegionConfig> {
    match Config::load(path, |name| std::env::var(name).ok(), &Overrides::default()) {
        Ok(config) => config.regions,
        Err(error) => {
            tracing::debug!(%error, "the configuration is not used; credentials come from the standard chain");
            Vec::new()
        }
    }
}

/// The prefetcher's own process. Why it could not work is told to nobody: every `wal-fetch` does without it. Nor may its
/// exit code tell: in a container PostgreSQL can be process 1, inherits it, and takes every child that it does not know and
/// that ends with another code than 0 or 1 for a crash of the whole server.
pub fn prefetch(plan: &Path, after: &str) {
    let root: PathBuf = plan.parent().unwrap_or(Path::new(".")).to_owned();
    let (Some(asked), Ok(facts)) = (WalName::parse(after), Facts::read(plan)) else {
        return;
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    let served =
        runtime.block_on(async { prefetch::serve(&root, open(facts, &Spool::of(&root)).await, asked).await });
    if let Err(error) = served {
        tracing::debug!(%error, "the spool cannot be used");
    }
    runtime.shutdown_background();
}
