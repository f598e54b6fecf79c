//! What the restored server says while it recovers.
//!
//! Owns: recognising the lines that tell how recovery went. The server is started with `lc_messages=C` and a known
//! prefix, so the texts are PostgreSQL's own (`xlogrecovery.c`, `xlog.c`, `postmaster.c`), equal from 14 to 18. A
//! line that is not recognised is only kept for the report; success never rests on the log alone.

use std::collections::VecDeque;

use highwater_format::{Lsn, Time, TimelineId};

use crate::recovery::limits::PREPARED;

/// Lines kept to be shown when something goes wrong.
const KEPT: usize = 12;

/// Log line prefix given to the server.
pub const PREFIX: &str = "%m [%p] ";

/// A limit that is lower than the original's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TooLow {
    /// The setting.
    pub name: String,
    /// The least that it must be.
    pub needed: u32,
    /// The original's value is not told; it is not below `needed`.
    pub or_more: bool,
}

impl TooLow {
    /// From `max_connections = 50 is a lower setting than on the primary server, where its value was 100.`
    fn parse(text: &str) -> Option<Self> {
        let (before, after) = text.split_once(" is a lower setting than on the ")?;
        let (name, _) = before.split_once(" = ")?;
        let number = after.rsplit_once(' ')?.1.trim_end_matches(['.', ')']);
        Some(Self {
            name: name.rsplit(' ').next()?.to_owned(),
            needed: number.parse().ok()?,
            or_more: false,
        })
    }

    /// From `HINT:  Increase max_prepared_transactions (currently 0).`, which follows `FATAL:  maximum number of prepared
    /// transactions reached`; the name is quoted from 17 on.
    fn parse_hint(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("HINT:  Increase ")?;
        let (name, now) = rest.split_once(" (currently ")?;
        let now: u32 = now.strip_suffix(").")?.parse().ok()?;
        let name = name.trim_matches('"');
        (name == PREPARED).then(|| Self {
            name: name.to_owned(),
            needed: now.saturating_add(1),
            or_more: true,
        })
    }
}

/// What has been said so far.
#[derive(Debug, Clone, Default)]
pub struct ServerLog {
    partial: String,
    last: VecDeque<String>,
    /// Replay has begun.
    pub redo_from: Option<Lsn>,
    /// Consistency was reached there.
    pub consistent_at: Option<Lsn>,
    /// "recovery stopping ...": where and why.
    pub stopped: Option<String>,
    /// The record that this was said of.
    pub stopped_at: Option<StoppedAt>,
    /// Replay has ended there.
    pub redo_done: Option<Lsn>,
    /// When the last replayed transaction ended, but for one that is itself the target.
    pub last_completed: Option<Time>,
    /// The timeline chosen at the end.
    pub new_timeline: Option<TimelineId>,
    /// It waits at its target.
    pub paused: bool,
    /// Why it cannot go on as a readable server: one of its limits is lower than the original's.
    pub too_low: Option<TooLow>,
    /// It waits, and not at its target: the operator's command, or a limit.
    pub halted: bool,
    /// It stopped at its target.
    pub shut_down_at_target: bool,
    /// It is open.
    pub ready: bool,
    /// The last FATAL or PANIC.
    pub fatal: Option<String>,
}

/// The record at which recovery stopped, by where it begins (`ReadRecPtr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoppedAt {
    /// It was replayed.
    After(Lsn),
    /// It was not.
    Before(Lsn),
}

impl StoppedAt {
    /// Of what PostgreSQL says when its target was an LSN.
    fn parse(text: &str) -> Option<Self> {
        let (which, rest) = text
            .strip_prefix("recovery stopping ")?
            .split_once(" WAL location (LSN) \"")?;
        let lsn = rest.strip_suffix('"')?.parse().ok()?;
        match which {
            "after" => Some(Self::After(lsn)),
            "before" => Some(Self::Before(lsn)),
            _ => None,
        }
    }
}

impl ServerLog {
    /// Takes in what was appended to the log file.
    pub fn feed(&mut self, text: &str) {
        self.partial.push_str(text);
        while let Some(end) = self.partial.find('\n') {
            let line: String = self.partial.drain(..=end).collect();
            self.line(line.trim_end());
        }
    }

    fn line(&mut self, line: &str) {
        self.note(line);
        if line.trim().is_empty() {
            return;
        }
        self.last.push_back(line.to_owned());
        if self.last.len() > KEPT {
            self.last.pop_front();
        }
    }

    fn note(&mut self, line: &str) {
        if let Some(too_low) = TooLow::parse(line).or_else(|| TooLow::parse_hint(line)) {
            self.too_low = Some(too_low);
        }
        if let Some((_, text)) = line.split_once("LOG:  ") {
            self.note_log(text);
        } else if let Some((_, text)) = line
            .split_once("FATAL:  ")
            .or_else(|| line.split_once("PANIC:  "))
        {
            self.fatal = Some(text.to_owned());
        }
    }

    fn note_log(&mut self, text: &str) {
        if let Some(lsn) = text.strip_prefix("redo starts at ") {
            self.redo_from = lsn.parse().ok();
        } else if let Some(rest) = text.strip_prefix("consistent recovery state reached at ") {
            self.consistent_at = rest.split_whitespace().next().and_then(|lsn| lsn.parse().ok());
        } else if text.starts_with("recovery stopping ") {
            self.stopped = Some(text.to_owned());
            self.stopped_at = StoppedAt::parse(text);
        } else if let Some(rest) = text.strip_prefix("redo done at ") {
            self.redo_done = rest.split_whitespace().next().and_then(|lsn| lsn.parse().ok());
        } else if let Some(time) = text.strip_prefix("last completed transaction was at log time ") {
            self.last_completed = time.parse().ok();
        } else if let Some(id) = text.strip_prefix("selected new timeline ID: ") {
            self.new_timeline = id.trim().parse().ok().and_then(TimelineId::new);
        } else if text.starts_with("pausing at the end of recovery") {
            self.paused = true;
        } else if text.starts_with("recovery has paused") {
            self.halted = true;
        } else if text.starts_with("shutdown at recovery target") {
            self.shut_down_at_target = true;
        } else if text.starts_with("database system is ready to accept connections") {
            self.ready = true;
        }
    }

    /// The last lines, for a report of failure.
    #[must_use]
    pub fn last_lines(&self) -> Vec<String> {
        self.last.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
2026-11-20 15:00:00.000 UTC [10] LOG:  starting point-in-time recovery to WAL location (LSN) \"0/5000060\"
2026-11-20 15:00:00.100 UTC [10] LOG:  redo starts at 0/2000028
2026-11-20 15:00:00.200 UTC [10] LOG:  consistent recovery state reached at 0/2000100
2026-11-20 15:00:01.000 UTC [10] LOG:  recovery stopping after WAL location (LSN) \"0/5000060\"
2026-11-20 15:00:01.000 UTC [10] LOG:  redo done at 0/5000060 system usage: CPU: user: 0.00 s, system: 0.00 s, elapsed: 0.01 s
2026-11-20 15:00:01.000 UTC [10] LOG:  last completed transaction was at log time 2026-11-20 14:59:58.123456+00
2026-11-20 15:00:01.100 UTC [10] LOG:  selected new timeline ID: 2
2026-11-20 15:00:01.200 UTC [9] LOG:  database system is ready to accept connections
";

    #[test]
    fn a_recovery_is_followed_however_the_text_is_cut() {
        for cut in [1, 7, 80, 10_000] {
            let mut log = ServerLog::default();
            let bytes: Vec<char> = LOG.chars().collect();
            for part in bytes.chunks(cut) {
                log.feed(&part.iter().collect::<String>());
            }
            assert_eq!(log.redo_from, Some(Lsn(0x0200_0028)));
            assert_eq!(log.redo_done, Some(Lsn(0x0500_0060)));
            assert_eq!(log.last_completed, "2026-11-20T14:59:58.123456Z".parse().ok());
            assert_eq!(log.new_timeline.map(TimelineId::get), Some(2));
            assert!(log.ready && log.fatal.is_none() && log.stopped.is_some());
            assert_eq!(log.stopped_at, Some(StoppedAt::After(Lsn(0x0500_0060))));
        }
    }

    #[test]
    fn waiting_at_the_target_is_not_mistaken_for_waiting_at_a_limit() {
        let mut log = ServerLog::default();
        log.feed("x [1] WARNING:  hot standby is not possible because of insufficient parameter settings\n");
        log.feed("x [1] DETAIL:  max_connections = 100 is a lower setting than on the primary server, where its value was 150.\n");
        log.feed("x [1] LOG:  recovery has paused\n");
        let too_low = TooLow {
            name: "max_connections".to_owned(),
            needed: 150,
            or_more: false,
        };
        assert_eq!(
            (log.paused, log.halted, log.too_low.clone()),
            (false, true, Some(too_low))
        );
        log.feed("x [1] LOG:  pausing at the end of recovery\n");
        assert!(log.paused);
    }

    #[test]
    fn too_few_places_for_prepared_transactions_are_a_limit_too() {
        for name in ["max_prepared_transactions", "\"max_prepared_transactions\""] {
            let mut log = ServerLog::default();
            log.feed("x [1] FATAL:  maximum number of prepared transactions reached\n");
            log.feed(&format!("x [1] HINT:  Increase {name} (currently 2).\n"));
            let too_low = log.too_low.unwrap();
            assert_eq!(
                (too_low.name.as_str(), too_low.needed, too_low.or_more),
                (PREPARED, 3, true)
            );
        }
        let mut other = ServerLog::default();
        other.feed("x [1] HINT:  Increase max_wal_size (currently 2).\n");
        assert_eq!(other.too_low, None);
    }

    #[test]
    fn a_fatal_end_is_kept_with_the_last_lines() {
        let mut log = ServerLog::default();
        log.feed("x [1] FATAL:  recovery ended before configured recovery target was reached\n");
        assert_eq!(
            log.fatal.as_deref(),
            Some("recovery ended before configured recovery target was reached")
        );
        assert_eq!(log.last_lines().len(), 1);
    }
}
