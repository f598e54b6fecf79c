//! When the next base backup is due.
//!
//! Owns: the cron expression (UTC) and the decision, pure, and the task that waits for it and runs backups
//! one after the other. A run that was missed while the agent was down is made up for at once, a cluster
//! without any base backup gets its first one at once, and a failed one is tried again with growing pauses.
//! Does not own: how a base backup is taken, nor which backups exist.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use highwater_config::ConfigError;
use highwater_format::{Backup, Time};
use highwater_pgwire::ConnInfo;
use jiff::{Timestamp, tz::TimeZone};
use tokio_util::sync::CancellationToken;

use crate::backup::command::tell;
use crate::backup::{BackupContext, BackupOptions, Progress, list, run_backup};
use crate::clock::Clock;
use crate::error::{AgentError, Result};
use crate::region::Archive;
use crate::state::{LastBackup, State};

/// First pause after a failed base backup; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// Longest pause after failed base backups.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

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
    /// a failure nothing is tried before `not_before`.
    pub fn wait(&self, last: Option<Time>, not_before: Option<Time>, now: Time) -> Duration {
        let due = match last {
            None => Duration::ZERO,
            Some(last) => self
                .next_after(last)
                .map_or(Duration::MAX, |next| next.since(now)),
        };
        due.max(not_before.map_or(Duration::ZERO, |time| time.since(now)))
    }
}

/// The pause after so many failures in a row.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(LONGEST_PAUSE)
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
        let (mut failures, mut not_before) = (0, None);
        let mut last = self.first_reading().await;
        let mut read_at = self.clock.now();
        loop {
            let now = self.clock.now();
            if now.since(read_at) >= READ_EVERY {
                last = self.newest().await.unwrap_or(last);
                read_at = now;
            }
            let wait = self
                .schedule
                .as_ref()
                .map_or(Duration::MAX, |schedule| schedule.wait(last, not_before, now));
            // Beside a standby it is the primary's agent that takes them, and one that was fenced takes none.
            let elsewhere = self.state.snapshot().writer_epoch == 0;
            if !wait.is_zero() || elsewhere {
                let due = if elsewhere { LOOK_EVERY } else { wait };
                tokio::time::sleep(due.min(LOOK_EVERY)).await;
                continue;
            }
            match self.back_up().await {
                Ok(started) => (last, failures, not_before) = (Some(started), 0, None),
                Err(error) => {
                    failures += 1;
                    not_before = Some(self.clock.now().saturating_add(pause(failures)));
                    tracing::error!(%error, failures, "the scheduled base backup failed; older ones are untouched");
                    self.failed(&error);
                }
            }
        }
    }

    /// When the newest base backup began. Waits for at least one region to answer: an archive that cannot be
    /// read must not look like one without base backups.
    async fn first_reading(&self) -> Option<Time> {
        loop {
            match self.newest().await {
                Some(last) => return last,
                None => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// When the newest base backup of any region began, and shows it; `None` when no region answers.
    async fn newest(&self) -> Option<Option<Time>> {
        let mut answers = Vec::new();
        for region in &self.archive.regions {
            match list::newest(&*region.quick, &self.archive.layout).await {
                Ok(backup) => answers.push(backup),
                Err(error) => tracing::warn!(region = %region.name, %error, "its base backups are not known"),
            }
        }
        if answers.is_empty() {
            return None;
        }
        let newest = answers
            .into_iter()
            .flatten()
            .max_by_key(|backup| backup.started_at);
        newest.iter().for_each(|backup| self.show(backup));
        Some(newest.map(|backup| backup.started_at))
    }

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
        };
        for missing in &report.missing {
            tracing::warn!(region = %missing.region, reason = %missing.reason, "the base backup is not in this region");
        }
        self.show(&report.backup);
        Ok(report.backup.started_at)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Time {
        text.parse().unwrap()
    }

    fn nightly() -> Schedule {
        "0 2 * * *".parse().unwrap()
    }

    #[test]
    fn moments_are_utc_and_strictly_later() {
        let schedule = nightly();
        assert_eq!(
            schedule.next_after(at("2026-11-20T01:59:59Z")),
            Some(at("2026-11-20T02:00:00Z"))
        );
        assert_eq!(
            schedule.next_after(at("2026-11-20T02:00:00Z")),
            Some(at("2026-11-21T02:00:00Z"))
        );
        assert_eq!(
            schedule.next_after(at("2026-11-20T03:30:00+01:00")),
            Some(at("2026-11-21T02:00:00Z"))
        );
        let weekly: Schedule = "30 4 * * SUN".parse().unwrap();
        assert_eq!(
            weekly.next_after(at("2026-11-20T12:00:00Z")),
            Some(at("2026-11-22T04:30:00Z"))
        );
    }

    #[test]
    fn waits_for_the_moment_after_the_newest_backup() {
        let wait = nightly().wait(Some(at("2026-11-20T02:00:07Z")), None, at("2026-11-20T14:00:00Z"));
        assert_eq!(wait, Duration::from_secs(12 * 3600));
    }

    #[test]
    fn the_first_and_the_missed_backup_are_due_at_once() {
        let now = at("2026-11-20T14:00:00Z");
        assert_eq!(nightly().wait(None, None, now), Duration::ZERO);
        assert_eq!(
            nightly().wait(Some(at("2026-11-18T02:00:00Z")), None, now),
            Duration::ZERO
        );
    }

    #[test]
    fn failures_are_followed_by_growing_pauses() {
        assert_eq!(
            [1, 2, 3, 7, 40].map(|failures| pause(failures).as_secs()),
            [60, 120, 240, 3600, 3600]
        );
        let (now, later) = (at("2026-11-20T14:00:00Z"), Some(at("2026-11-20T14:02:00Z")));
        assert_eq!(nightly().wait(None, later, now), Duration::from_secs(120));
        assert_eq!(
            nightly().wait(None, later, at("2026-11-20T14:02:00Z")),
            Duration::ZERO
        );
        // The schedule itself may be further away than the pause.
        let wait = nightly().wait(Some(at("2026-11-20T02:00:07Z")), later, now);
        assert_eq!(wait, Duration::from_secs(12 * 3600));
    }

    #[test]
    fn rubbish_is_refused_with_an_example() {
        for text in ["", "0 2 * *", "0 0 2 * * *", "61 2 * * *", "daily", "0 2 31 2 *"] {
            let error = text.parse::<Schedule>().unwrap_err();
            assert_eq!(error.exit(), highwater_config::Exit::Usage, "{text}");
            assert!(error.to_string().contains("0 2 * * *"), "{error}");
        }
    }
}
