//! When the next base backup is due.
//!
//! Owns: the cron expression (UTC) and the decision, pure, and the task that waits for it and runs backups
//! one after the other. A run that was missed while the agent was down is made up for at once, a cluster
//! without any base backup gets its first one at once, and a failed one is tried again with growing pauses.
//! A gap that no base backup has ended is a reason of its own, with or without a schedule: nothing behind it can be
//! restored until one does.
//! Only the schedule itself follows the wall clock; pauses are measured by one that nobody sets.
//! Does not own: how a base backup is taken, nor which backups exist.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use futures::FutureExt;
use highwater_config::ConfigError;
use highwater_format::{Backup, BackupId, Gap, Time};
use highwater_pgwire::ConnInfo;
use jiff::{Timestamp, tz::TimeZone};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backup::command::tell;
use crate::backup::{BackupContext, BackupOptions, Progress, list, run_backup};
use crate::clock::Clock;
use crate::error::{AgentError, Result};
use crate::gap;
use crate::region::{Archive, Region};
use crate::state::{Gaps, LastBackup, State};
use crate::unended::{Told, Unended};

/// First pause after a failed base backup; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// Longest pause after failed base backups.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// The same while a gap is open.
const FIRST_PAUSE_IN_A_GAP: Duration = Duration::from_secs(5);
/// The same while a gap is open.
const LONGEST_PAUSE_IN_A_GAP: Duration = Duration::from_secs(300);

/// A five-field cron expression, read in UTC.
#[derive(Debug, Clone)]
pub struct Schedule {
    cron: Cron,
}

impl FromStr for Schedule {
    type Err = AgentError;

    fn from_str(text: &str) -> Result<Schedule> {
        let parser = CronParser::builder()
            .seconds(Seconds::Disallowed)
            .year(Year::Disallowed)
            .build();
        let bad = |problem: String| {
            AgentError::Config(ConfigError::Contradiction {
                problem: format!(
                    "backup.schedule: {text:?} is not a schedule: {problem}. Give five fields (minute, hour, day of \
                     month, month, day of week) in UTC, as in \"0 2 * * *\""
                ),
            })
        };
        let cron = parser.parse(text).map_err(|error| bad(error.to_string()))?;
        let schedule = Schedule { cron };
        match schedule.next_after(Time::UNIX_EPOCH) {
            Some(_) => Ok(schedule),
            None => Err(bad("it never comes due".into())),
        }
    }
}

impl Schedule {
    /// The first moment of the schedule after `time`.
    pub fn next_after(&self, time: Time) -> Option<Time> {
        let from = Timestamp::from_microsecond(time.unix_micros())
            .ok()?
            .to_zoned(TimeZone::UTC);
        let next = self.cron.find_next_occurrence(&from, false).ok()?;
        Some(Time::from_unix_micros(next.timestamp().as_microsecond()))
    }

    /// How long to wait for the next base backup. `last` is when the newest one began, if there is any; after
    /// a failure nothing is tried before `rest`, what is left of the pause, has passed.
    pub fn wait(&self, last: Option<Time>, rest: Duration, now: Time) -> Duration {
        let due = match last {
            None => Duration::ZERO,
            Some(last) => self
                .next_after(last)
                .map_or(Duration::MAX, |next| next.since(now)),
        };
        due.max(rest)
    }
}

/// The pause after so many failures in a row. An open gap is not left waiting as long.
fn pause(failures: u32, gap_is_open: bool) -> Duration {
    let (first, longest) = match gap_is_open {
        true => (FIRST_PAUSE_IN_A_GAP, LONGEST_PAUSE_IN_A_GAP),
        false => (FIRST_PAUSE, LONGEST_PAUSE),
    };
    first
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(longest)
}

/// How long to wait for the next base backup, with or without a schedule.
fn wait(schedule: Option<&Schedule>, seen: &Seen, rest: Duration, now: Time) -> Duration {
    if seen.gaps.open > 0 {
        return rest;
    }
    schedule.map_or(Duration::MAX, |schedule| schedule.wait(seen.last, rest, now))
}

/// The base backup that this agent took last.
#[derive(Clone, Copy, Debug)]
struct Own {
    /// When it began, by the agent's clock, which the schedule is compared with.
    began: Time,
    /// The same by the server's clock, as its id has it.
    named: Time,
}

/// What the regions that answer have.
#[derive(Debug, Default)]
struct Seen {
    /// When the newest base backup began.
    last: Option<Time>,
    gaps: Gaps,
}

impl Seen {
    /// With the one that this agent took itself. The schedule is compared with the agent's clock: by the server's, where
    /// that is slower, the same moment would come due again at once, and again; where it is faster, as after the agent's was
    /// set back, each would be put off by as much. One that began ahead of `now` says nothing: the clock was set back since, and
    /// the moments that it was set back over are not due once more where the server says that they have been.
    fn with(&self, own: Option<Own>, now: Time) -> Self {
        let last = match own.filter(|own| own.began <= now) {
            Some(own) if self.last == Some(own.named) => Some(own.began),
            own => self.last.max(own.map(|own| own.began)),
        };
        Self {
            last,
            gaps: self.gaps.clone(),
        }
    }
}

/// When the newest base backup began.
fn last(told: &[Told], now: Time) -> Option<Time> {
    let newest = told.iter().filter_map(|told| list::newest(&told.backups, now));
    newest.map(BackupId::started_at).max()
}

/// Every gap that a region has on record, or that this process has recorded.
fn on_record<'a>(told: &'a [Told], recorded: &'a [Gap]) -> Vec<&'a Gap> {
    let mut gaps: Vec<&Gap> = told.iter().flat_map(|told| &told.gaps).chain(recorded).collect();
    gaps.sort_by_key(|gap| (gap.timeline, gap.start, gap.end));
    gaps.dedup_by_key(|gap| (gap.timeline, gap.start, gap.end));
    gaps
}

/// How many gaps there are, and how many of them no base backup has ended in any region.
fn judge(told: &[Told], gaps: &[&Gap]) -> Gaps {
    let is_open = |gap: &&&Gap| gap::ended_by(gap, told.iter().flat_map(|told| &told.backups)).is_none();
    Gaps {
        recorded: gaps.len(),
        open: gaps.iter().filter(is_open).count(),
        last: gaps.last().map(|gap| (*gap).clone()),
    }
}

/// Longest sleep between two looks at the clock, so that a clock that was set does not delay a backup.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Between two readings of which base backups the regions have: others take some too, with the `backup` command.
const READ_EVERY: Duration = Duration::from_secs(600);

/// The task that takes base backups on schedule, and knows the newest one.
#[derive(Debug)]
pub struct Scheduled {
    /// When; without one the newest base backup is only shown.
    pub schedule: Option<Schedule>,
    /// The gaps that were recorded, and the bell.
    pub unended: Arc<Unended>,
    /// The server.
    pub conn: ConnInfo,
    /// Where they go.
    pub archive: Arc<Archive>,
    /// How they are taken.
    pub options: BackupOptions,
    /// Where the result is shown.
    pub state: State,
    /// What the schedule is compared with.
    pub clock: Clock,
    /// Ends the task, and a base backup that is under way.
    pub cancel: CancellationToken,
}

impl Scheduled {
    /// Runs until cancelled. A failed base backup is logged, shown and tried again; it never ends the agent.
    pub async fn run(self) -> Result<()> {
        let cancel = self.cancel.clone();
        cancel.run_until_cancelled(self.repeat()).await;
        Ok(())
    }

    async fn repeat(&self) {
        let (mut failures, mut not_before, mut own) = (0, Instant::now(), None);
        let mut seen = self.first_reading().await;
        let mut read_at = Instant::now();
        loop {
            if self.unended.bell.notified().now_or_never().is_some() {
                seen = self.first_reading().await;
                (failures, not_before) = (0, Instant::now());
            }
            // Commits are held back by a gap that some region has ended: others may be given that base backup soon.
            let is_behind = self.state.snapshot().commits_held_back && seen.gaps.open == 0;
            if read_at.elapsed() >= if is_behind { LOOK_EVERY } else { READ_EVERY } {
                read_at = Instant::now();
                seen = self.read().await.unwrap_or(seen);
            }
            let now = self.clock.now();
            let rest = not_before.saturating_duration_since(Instant::now());
            // Beside a standby it is the primary's agent that takes them, and one that was fenced takes none.
            let elsewhere = self.state.snapshot().writer_epoch == 0;
            let wait = wait(self.schedule.as_ref(), &seen.with(own, now), rest, now);
            if !wait.is_zero() || elsewhere {
                let due = if elsewhere {
                    LOOK_EVERY
                } else {
                    wait.min(LOOK_EVERY)
                };
                tokio::select! {
                    biased;
                    // The next turn sees to it.
                    () = self.unended.bell.notified() => self.unended.bell.notify_one(),
                    () = tokio::time::sleep(due) => {}
                }
                continue;
            }
            match self.back_up().await {
                Ok(named) => {
                    (failures, not_before) = (0, Instant::now());
                    own = Some(Own { began: now, named });
                    seen = self.read().await.unwrap_or(seen);
                    seen.last = seen.last.max(Some(named));
                    if seen.gaps.open > 0 {
                        // Not read again yet, or recorded meanwhile: never one backup right after the other.
                        not_before = Instant::now() + LONGEST_PAUSE_IN_A_GAP;
                    }
                }
                Err(error) => {
                    failures += 1;
                    seen = self.read().await.unwrap_or(seen);
                    not_before = Instant::now() + pause(failures, seen.gaps.open > 0);
                    tracing::error!(%error, failures, "the base backup failed and is tried again; older ones are untouched");
                    self.failed(&error);
                }
            }
        }
    }

    /// What the archive has. Waits for at least one region to answer: an archive that cannot be read must not look
    /// like one without base backups.
    async fn first_reading(&self) -> Seen {
        loop {
            match self.read().await {
                Some(seen) => return seen,
                None => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// What the regions that answer have, and shows it; `None` when no region answers.
    async fn read(&self) -> Option<Seen> {
        let (mut told, mut newest) = (Vec::new(), Vec::new());
        for region in &self.archive.regions {
            match self.ask(region).await {
                Ok((answer, record)) => {
                    told.push(answer);
                    newest.extend(record);
                }
                Err(error) => {
                    tracing::warn!(region = %region.name, %error, "its base backups and gaps are not known");
                }
            }
        }
        if told.is_empty() {
            return None;
        }
        let recorded = self.unended.gaps();
        let mut gaps = judge(&told, &on_record(&told, &recorded));
        if self.state.snapshot().commits_held_back {
            // One region that has a base backup is not enough.
            gaps.open = gaps.open.max(recorded.len());
        }
        self.unended.learn(&told, self.options.needed, None);
        self.state.update(|snapshot| snapshot.gaps = Some(gaps.clone()));
        let last = last(&told, self.clock.now());
        let newest = newest.into_iter().max_by_key(|backup| backup.started_at);
        newest.iter().for_each(|backup| self.show(backup));
        Some(Seen { last, gaps })
    }

    /// Gaps and base backups, and the record of the newest of these.
    async fn ask(&self, region: &Region) -> Result<(Told, Option<Backup>)> {
        let (store, layout) = (&*region.quick, &self.archive.layout);
        let mut backups = list::complete(store, layout).await?;
        let newest = list::newest_record(store, layout, &mut backups).await?;
        let gaps = gap::read_all(store, layout).await?;
        Ok((Told { gaps, backups }, newest))
    }

    /// Takes one, and says when it began by the server's clock, as its id has it.
    async fn back_up(&self) -> Result<Time> {
        let progress = Progress::new();
        let ctx = BackupContext {
            conn: self.conn.clone(),
            archive: self.archive.clone(),
            options: self.options.clone(),
            cancel: self.cancel.clone(),
            progress: progress.clone(),
        };
        let report = tokio::select! {
            biased;
            report = run_backup(ctx) => report?,
            () = tell(progress) => return Err(AgentError::Bug("the progress reporter ended".into())),
            () = self.unended.bell.notified() => return Err(overtaken()),
        };
        for missing in &report.missing {
            tracing::warn!(region = %missing.region, reason = %missing.reason, "the base backup is not in this region");
        }
        self.show(&report.backup);
        Ok(report.backup.id.started_at())
    }

    /// Shows a base backup. One that is shown already keeps the failure of a later attempt beside it.
    fn show(&self, backup: &Backup) {
        let id = Some(backup.id.to_string());
        let (finished_at, bytes) = (backup.finished_at, backup.plain_bytes);
        self.state.update(|snapshot| {
            if snapshot.last_backup.as_ref().is_none_or(|shown| shown.id != id) {
                snapshot.last_backup = Some(LastBackup {
                    id,
                    finished_at,
                    error: None,
                    bytes,
                });
            }
        });
    }

    /// A failure is shown beside the newest base backup that succeeded, whose age is what matters.
    fn failed(&self, error: &AgentError) {
        let now = self.clock.now();
        self.state.update(|snapshot| {
            let none = LastBackup {
                id: None,
                finished_at: now,
                error: None,
                bytes: 0,
            };
            snapshot.last_backup.get_or_insert(none).error = Some(error.to_string());
        });
    }
}

/// A base backup needs the WAL from its start to its end, and now some of it is known to be lost.
fn overtaken() -> AgentError {
    AgentError::Trouble {
        what: "a gap in the WAL was recorded while the base backup ran, so that it could never be restored"
            .into(),
        next: "Another one is taken".into(),
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
