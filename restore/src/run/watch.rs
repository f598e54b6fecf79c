//! Waiting until the restored server has reached its target, or has not.
//!
//! Owns: reading its log as it grows, noticing its end, and the verdict. Never says success for less: the server must be
//! open (or wait, or have stopped, as asked), and the end of recovery must be the planned one.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

use highwater_config::Exit;
use highwater_format::{Lsn, SegmentSize, Time, TimelineId};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::control::Control;
use super::reached;
use super::serverlog::ServerLog;
use crate::recovery::limits::PREPARED_AT;
use crate::target::{Action, Target};
use crate::walfeed::{CANNOT_WRITE, DAMAGED};

/// How often the log is read.
const LOOK: Duration = Duration::from_millis(20);

/// What was asked and planned.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// The target.
    pub target: &'a Target,
    /// What happens at it.
    pub action: Action,
    /// Where replay ends.
    pub end: Lsn,
    /// The last transaction end before that, where the plan looked it up.
    pub last_commit: Option<Time>,
    /// On which timeline.
    pub timeline: TimelineId,
    /// Of the lineage.
    pub segment_size: SegmentSize,
    /// How the operator starts the server on another port.
    pub by_hand: &'a str,
}

/// How recovery ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// Replay ended here.
    pub lsn: Lsn,
    /// On this timeline.
    pub replayed_timeline: TimelineId,
    /// The timeline the server is on now.
    pub timeline: TimelineId,
    /// When the last replayed transaction ended.
    pub last_transaction: Option<Time>,
    /// The server runs.
    pub running: bool,
}

/// Recovery did not end as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {next}{}", log.iter().map(|line| format!("\n  {line}")).collect::<String>())]
pub struct NotReached {
    /// What happened.
    pub what: String,
    /// What to do.
    pub next: String,
    /// The last lines of the server's log.
    pub log: Vec<String>,
    /// How the program ends.
    pub exit: Exit,
}

/// Waits. `show` is called now and then, for progress.
///
/// # Errors
/// The server ended, or reached something else.
pub async fn wait(
    child: &mut Child,
    root: &Path,
    log_path: &Path,
    log_from: u64,
    wanted: &Wanted<'_>,
    mut show: impl FnMut(&ServerLog),
) -> Result<Reached, NotReached> {
    let mut log = ServerLog::default();
    let mut tail = Tail {
        path: log_path.to_owned(),
        at: log_from,
        rest: Vec::new(),
    };
    let mut stop = Stop::new();
    loop {
        // In this order: what a server said before it ended is read after its end was seen.
        let ended = child.try_wait().ok().flatten();
        if let Ok(text) = tail.read() {
            log.feed(&text);
        }
        show(&log);
        if let Some(status) = ended {
            complete(&mut log, root);
            return at_exit(status, &log, wanted);
        }
        match wanted.action {
            Action::Promote if log.ready => return promoted(root, &log, wanted),
            Action::Pause if log.paused => return stopped_at_target(&log, wanted, true),
            Action::Pause | Action::Shutdown if log.ready => return Err(opened(&log, wanted)),
            _ if log.halted && log.too_low.is_some() => return Err(halted(&log, wanted)),
            _ => tokio::select! {
                () = stop.asked() => return Err(interrupted(child.id(), root, log_path, wanted)),
                () = tokio::time::sleep(LOOK) => {}
            },
        }
    }
}

/// SIGINT and SIGTERM. They end the waiting and not the server, which somebody must be told.
struct Stop(Option<(Signal, Signal)>);

impl Stop {
    fn new() -> Stop {
        let signals =
            signal(SignalKind::interrupt()).and_then(|int| Ok((int, signal(SignalKind::terminate())?)));
        Stop(signals.ok())
    }

    /// Where signals cannot be listened to they do what they always did.
    async fn asked(&mut self) {
        match &mut self.0 {
            Some((int, term)) => tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            },
            None => std::future::pending().await,
        }
    }
}

fn interrupted(pid: u32, root: &Path, log: &Path, wanted: &Wanted<'_>) -> NotReached {
    let then = match wanted.action {
        Action::Promote => "opens for writing",
        Action::Pause => "pauses",
        Action::Shutdown => "shuts down",
    };
    let root = root.display();
    NotReached {
        what: format!(
            "interrupted; the server goes on with the replay in {root} (PID {pid}), and {then} when it has reached {}",
            wanted.target
        ),
        next: format!(
            "follow it in {}, or stop it with `kill -INT {pid}` (as `pg_ctl -D {root} stop -m fast` does). {}",
            log.display(),
            super::notes::left_for_recovery()
        ),
        log: Vec::new(),
        exit: Exit::Trouble,
    }
}

/// What the original's limit was, where the server does not say it: it has noted it in the control file.
fn complete(log: &mut ServerLog, root: &Path) {
    let Some(limit) = log.too_low.as_mut().filter(|limit| limit.or_more) else {
        return;
    };
    let noted = Control::read(root)
        .ok()
        .and_then(|control| control.limits.get(PREPARED_AT).copied());
    if let Some(noted) = noted.filter(|noted| *noted >= limit.needed) {
        (limit.needed, limit.or_more) = (noted, false);
    }
}

fn promoted(root: &Path, log: &ServerLog, wanted: &Wanted<'_>) -> Result<Reached, NotReached> {
    let fail = |what: String| {
        failed(
            what,
            log,
            Exit::Damage,
            "the server runs; do not use it before this is explained",
        )
    };
    let timeline = log
        .new_timeline
        .ok_or_else(|| fail("the server opened and did not say on which timeline".to_owned()))?;
    let path = root.join("pg_wal").join(format!("{}.history", timeline.hex8()));
    let history =
        std::fs::read(&path).map_err(|error| fail(format!("cannot read {}: {error}", path.display())))?;
    let (replayed_timeline, lsn) = reached::end_of_recovery(timeline, &history)
        .ok_or_else(|| fail(format!("{} does not say where recovery ended", path.display())))?;
    reached::check(wanted.target, wanted.end, lsn, wanted.segment_size).map_err(fail)?;
    let fits = replayed_timeline == wanted.timeline
        || wanted.target == &Target::Latest && replayed_timeline > wanted.timeline;
    if !fits {
        return Err(fail(format!(
            "recovery ended on timeline {replayed_timeline}, and {} was asked for",
            wanted.timeline
        )));
    }
    Ok(Reached {
        lsn,
        replayed_timeline,
        timeline,
        last_transaction: wanted.last_commit.or(log.last_completed),
        running: true,
    })
}

/// At a pause or shutdown nothing is written that names the end; PostgreSQL stops there only if it met its target, and says
/// at which record.
fn stopped_at_target(log: &ServerLog, wanted: &Wanted<'_>, running: bool) -> Result<Reached, NotReached> {
    if log.stopped.is_none() {
        let what = "the server stopped replaying and did not say that it met its target".to_owned();
        return Err(failed(what, log, Exit::Damage, "see its log"));
    }
    log.stopped_at
        .map_or(Ok(()), |at| {
            reached::stopped(wanted.target, wanted.end, at, wanted.segment_size)
        })
        .map_err(|what| failed(what, log, Exit::Damage, "do not use it before this is explained"))?;
    Ok(Reached {
        lsn: wanted.end,
        replayed_timeline: wanted.timeline,
        timeline: wanted.timeline,
        last_transaction: wanted.last_commit.or(log.last_completed),
        running,
    })
}

/// A limit was raised on the original after the backup. The server waits with what it has replayed so far.
fn halted(log: &ServerLog, wanted: &Wanted<'_>) -> NotReached {
    let what = format!("the server paused before it reached {}", wanted.target);
    failed(
        what,
        log,
        Exit::Trouble,
        &raise(log).unwrap_or_else(|| "see its log".to_owned()),
    )
}

/// PostgreSQL pauses only where it could be read, which it can not while transactions with many subtransactions were
/// open since the backup; otherwise it goes on as if told to promote (`recoveryPausesHere`).
fn opened(log: &ServerLog, wanted: &Wanted<'_>) -> NotReached {
    let what = format!(
        "the server did not {} at {} but opened for writing: it could not be made readable before",
        wanted.action.as_str(),
        wanted.target
    );
    let next = "it runs on a timeline of its own; stop it if that is not wanted, and restore to a slightly later target to look first";
    failed(what, log, Exit::Damage, next)
}

/// What to do about a limit that is too low.
fn raise(log: &ServerLog) -> Option<String> {
    let limit = log.too_low.as_ref()?;
    Some(format!(
        "the original ran with {name} = {needed}{or_more}: append that to postgresql.auto.conf in the data directory and start \
         the server again (stop it first if it runs): recovery goes on where it stopped",
        name = limit.name,
        or_more = if limit.or_more { " or more" } else { "" },
        needed = limit.needed
    ))
}

fn at_exit(status: ExitStatus, log: &ServerLog, wanted: &Wanted<'_>) -> Result<Reached, NotReached> {
    if wanted.action == Action::Shutdown && status.success() && log.shut_down_at_target {
        return stopped_at_target(log, wanted, false);
    }
    let fatal = log
        .fatal
        .clone()
        .unwrap_or_else(|| format!("no reason given, {status}"));
    let (exit, next) = advice(&fatal, log, wanted.by_hand);
    Err(failed(
        format!("the server ended before it reached {}: {fatal}", wanted.target),
        log,
        exit,
        &next,
    ))
}

/// What a dying server means. By the text of its last words, which are kept untranslated (`lc_messages=C`); what is
/// not known ends with the general answer.
fn advice(fatal: &str, log: &ServerLog, by_hand: &str) -> (Exit, String) {
    if let Some(next) = raise(log) {
        return (Exit::Trouble, next);
    }
    let damaged = log.last_lines().into_iter().find(|line| line.contains(DAMAGED));
    if let Some(line) = damaged {
        let next = format!("nothing was opened, and the directory keeps what was restored; {line}");
        return (Exit::Damage, next);
    }
    if fatal.starts_with("could not create any ") || fatal.contains("/.s.PGSQL.") {
        let next = format!(
            "another server has its port or socket: recovery goes on where it stopped when you start it, as the owner of the \
             directory, with a port of its own: `{by_hand}` (a restore from the beginning takes --port)"
        );
        return (Exit::Trouble, next);
    }
    let (exit, next) = known_advice(fatal, log);
    (exit, next.to_owned())
}

fn known_advice(fatal: &str, log: &ServerLog) -> (Exit, &'static str) {
    let fetch_failed = log
        .last_lines()
        .iter()
        .any(|line| line.contains("is not proven to lie past the end"));
    if log.last_lines().iter().any(|line| line.contains(CANNOT_WRITE)) {
        return (
            Exit::Trouble,
            "make room on its disk, or mend what keeps it from being written, and start the server again: recovery goes on \
             where it stopped",
        );
    }
    if fetch_failed || fatal.starts_with("could not restore file") {
        return (
            Exit::Trouble,
            "start the server again when the regions answer: recovery goes on where it stopped",
        );
    }
    if fatal.starts_with("recovery ended before configured recovery target") {
        return (
            Exit::Damage,
            "the archive holds less than its listing said; run `highwater-restore verify`",
        );
    }
    if fatal.starts_with("requested recovery stop point is before consistent recovery point") {
        return (Exit::No, "choose a later target or an older backup");
    }
    (
        Exit::Trouble,
        "mend what the log says and start the server again: recovery goes on where it stopped",
    )
}

fn failed(what: String, log: &ServerLog, exit: Exit, next: &str) -> NotReached {
    NotReached {
        what,
        next: next.to_owned(),
        log: log.last_lines(),
        exit,
    }
}

/// Reads a file as it grows, in whole characters.
struct Tail {
    path: PathBuf,
    at: u64,
    rest: Vec<u8>,
}

impl Tail {
    fn read(&mut self) -> io::Result<String> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.at))?;
        self.at += file.read_to_end(&mut self.rest)? as u64;
        let whole = self
            .rest
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |last| last + 1);
        let text: Vec<u8> = self.rest.drain(..whole).collect();
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(target: &Target, action: Action) -> Wanted<'_> {
        let (end, timeline) = (Lsn(0x300_0100), TimelineId::FIRST);
        Wanted {
            target,
            action,
            end,
            last_commit: None,
            timeline,
            segment_size: SegmentSize::DEFAULT,
            by_hand: "postgres -c port=5433",
        }
    }

    fn promoted_with(history: &str, target: &Target) -> Result<Reached, NotReached> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("pg_wal")).unwrap();
        std::fs::write(dir.path().join("pg_wal/00000002.history"), history).unwrap();
        let mut log = ServerLog::default();
        log.feed("x LOG:  selected new timeline ID: 2\n");
        promoted(dir.path(), &log, &wanted(target, Action::Promote))
    }

    #[test]
    fn an_open_server_is_success_only_at_the_planned_end() {
        let good = promoted_with("1\t0/3000100\tno recovery target specified\n", &Target::Latest).unwrap();
        assert_eq!((good.lsn, good.timeline.get()), (Lsn(0x300_0100), 2));
        let short =
            promoted_with("1\t0/30000E8\tno recovery target specified\n", &Target::Latest).unwrap_err();
        assert_eq!(short.exit, Exit::Damage);
        assert!(promoted_with("", &Target::Latest).is_err(), "no end named");
    }

    /// A server that cannot be read at its target does not pause there.
    #[tokio::test]
    async fn a_server_that_opens_instead_of_pausing_is_no_success() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(
            &path,
            "x LOG:  recovery stopping after commit of transaction 7\nx LOG:  database system is ready to accept connections\n",
        )
        .unwrap();
        for action in [Action::Pause, Action::Shutdown] {
            let mut server = std::process::Command::new("sleep").arg("600").spawn().unwrap();
            let target = Target::Lsn(Lsn(1));
            let wanted = wanted(&target, action);
            let waiting = wait(&mut server, dir.path(), &path, 0, &wanted, |_| {});
            let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
            server.kill().unwrap();
            server.wait().unwrap();
            let error = waited.unwrap().unwrap_err();
            assert_eq!(error.exit, Exit::Damage, "{error}");
            assert!(error.to_string().contains("opened for writing"), "{error}");
        }
    }

    /// The server is in a group of its own: Ctrl-C ends the waiting alone.
    #[tokio::test]
    async fn whoever_interrupts_is_told_what_goes_on_and_what_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let mut server = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let target = Target::Latest;
        let wanted = wanted(&target, Action::Promote);
        let path = dir.path().join("log");
        let interrupt = |_: &ServerLog| nix::sys::signal::raise(nix::sys::signal::Signal::SIGINT).unwrap();
        let waiting = wait(&mut server, dir.path(), &path, 0, &wanted, interrupt);
        let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
        let lives = server.try_wait().unwrap().is_none();
        let pid = server.id();
        server.kill().unwrap();
        server.wait().unwrap();
        let error = waited.unwrap().unwrap_err();
        assert!(lives && error.exit == Exit::Trouble, "{error}");
        let said = error.to_string();
        for part in [
            format!("(PID {pid})"),
            format!("kill -INT {pid}"),
            dir.path().display().to_string(),
            "highwater-recovery.json".to_owned(),
            "postgresql.auto.conf".to_owned(),
        ] {
            assert!(said.contains(&part), "{part}: {said}");
        }
    }

    #[test]
    fn the_control_file_tells_how_many_places_prepared_transactions_need() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = ServerLog::default();
        log.feed("x FATAL:  maximum number of prepared transactions reached\nx HINT:  Increase max_prepared_transactions (currently 2).\n");
        complete(&mut log, dir.path());
        let unknown = raise(&log).unwrap();
        assert!(
            unknown.contains("max_prepared_transactions = 3 or more"),
            "{unknown}"
        );
        std::fs::create_dir(dir.path().join("global")).unwrap();
        let mut control = vec![0; 8192];
        control[8..12].copy_from_slice(&1300u32.to_le_bytes());
        control[192..196].copy_from_slice(&9u32.to_le_bytes());
        std::fs::write(dir.path().join("global/pg_control"), control).unwrap();
        complete(&mut log, dir.path());
        let known = raise(&log).unwrap();
        assert!(known.contains("max_prepared_transactions = 9:"), "{known}");
    }

    #[test]
    fn dying_words_decide_the_exit_code() {
        let mut log = ServerLog::default();
        assert_eq!(
            advice(
                "recovery ended before configured recovery target was reached",
                &log,
                ""
            )
            .0,
            Exit::Damage
        );
        assert_eq!(advice("something else", &log, "").0, Exit::Trouble);
        let mut low = ServerLog::default();
        low.feed("x DETAIL:  max_wal_senders = 5 is a lower setting than on the primary server, where its value was 20.\n");
        let (exit, next) = advice(
            "recovery aborted because of insufficient parameter settings",
            &low,
            "",
        );
        assert!(
            exit == Exit::Trouble && next.contains("max_wal_senders = 20"),
            "{next}"
        );
        let mut damaged = ServerLog::default();
        damaged.feed(&format!("highwater-restore: 000000010000000000000003 {DAMAGED}: the archive lacks WAL [0/3000000, 0/4000000)\n"));
        let (exit, next) = advice(
            "could not restore file \"000000010000000000000003\" from archive",
            &damaged,
            "",
        );
        let taken = "lock file \"/run/postgresql/.s.PGSQL.5432.lock\" already exists";
        for fatal in [taken, "could not create any TCP/IP sockets"] {
            let (exit, next) = advice(fatal, &log, "postgres -c port=5433");
            assert!(
                exit == Exit::Trouble && next.contains("--port") && next.contains("`postgres -c port=5433`"),
                "{next}"
            );
        }
        assert!(
            exit == Exit::Damage && next.contains("[0/3000000, 0/4000000)"),
            "{next}"
        );
        let mut full = ServerLog::default();
        full.feed(&format!("highwater-restore: 000000010000000000000003 cannot be had, and is not proven to lie past the end: {CANNOT_WRITE} pg_wal/RECOVERYXLOG: No space left on device\n"));
        let (exit, next) = advice(
            "could not restore file \"000000010000000000000003\" from archive",
            &full,
            "",
        );
        assert!(exit == Exit::Trouble && next.contains("make room"), "{next}");
        log.feed("x cannot be had, and is not proven to lie past the end: time-out\n");
        assert_eq!(
            advice(
                "recovery ended before configured recovery target was reached",
                &log,
                ""
            )
            .0,
            Exit::Trouble
        );
    }
}
