//! The ledger of the demo: notes every commit that PostgreSQL acknowledged, in a file of its own, and
//! says afterwards which of them a restored cluster holds.
//!
//! Owns: the file of notes. A line `commit <client> <number> <LSN before> <LSN after, or -> <sent>
//! <acknowledged>` for each acknowledged commit, and a line `flush <LSN> <time>` whenever the position
//! that the agent has reported to PostgreSQL moves; times are microseconds since 1970. What a restore
//! must hold is judged by the harness (`ledger::LedgerLog`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::{Parser, Subcommand};
use highwater_tests::ledger::{Entry, Expect};
use highwater_tests::{LedgerLog, clock, lsn};
use tokio_postgres::{Client, NoTls};

/// Notes acknowledged commits, and compares a restored cluster with the notes.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Insert numbered rows and note every acknowledged commit, until told to stop or the server is gone
    Note {
        /// Connection string of the server
        #[arg(long)]
        connection: String,
        /// File to write the notes to
        #[arg(long)]
        notes: PathBuf,
        /// How many clients insert at the same time
        #[arg(long, default_value_t = 4)]
        clients: i32,
        /// Milliseconds that each client waits after a commit
        #[arg(long, default_value_t = 5)]
        pause_ms: u64,
    },
    /// Compare a restored cluster with the notes; exit code 1 when something is missing that was reported as stored
    Compare {
        /// Connection string of the restored server
        #[arg(long)]
        connection: String,
        /// File of the notes
        #[arg(long)]
        notes: PathBuf,
        /// The time that was restored to; without it everything that was reported as stored must be there
        #[arg(long)]
        at: Option<String>,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        Command::Note {
            connection,
            notes,
            clients,
            pause_ms,
        } => {
            note(&connection, &notes, clients, Duration::from_millis(pause_ms)).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Compare {
            connection,
            notes,
            at,
        } => compare(&connection, &notes, at.as_deref()).await,
    }
}

async fn connect(connection: &str) -> anyhow::Result<Client> {
    let (client, driver) = tokio_postgres::connect(connection, NoTls)
        .await
        .context("cannot connect to PostgreSQL")?;
    tokio::spawn(driver);
    Ok(client)
}

async fn position(client: &Client, query: &str) -> anyhow::Result<Option<u64>> {
    let row = client.query_one(query, &[]).await?;
    let text: Option<String> = row.get(0);
    text.as_deref().map(lsn::parse).transpose()
}

const INSERT_POSITION: &str = "SELECT pg_current_wal_insert_lsn()::text";
/// The one number that the agent owes PostgreSQL: WAL before it is in as many regions as the policy asks for.
const REPORTED_FLUSH: &str =
    "SELECT max(flush_lsn)::text FROM pg_stat_replication WHERE application_name = 'highwater'";

/// Lines reach the file at once: the machine may be lost at any moment.
#[derive(Clone)]
struct Notes(Arc<Mutex<File>>);

impl Notes {
    fn write(&self, line: &str) -> anyhow::Result<()> {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(format!("{line}\n").as_bytes())
            .context("cannot write the notes")
    }
}

async fn note(connection: &str, path: &Path, clients: i32, pause: Duration) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let notes = Notes(Arc::new(Mutex::new(file)));
    let client = connect(connection).await?;
    client
        .batch_execute(
            "CREATE TABLE IF NOT EXISTS ledger (client int, number bigint, filling text, PRIMARY KEY (client, number))",
        )
        .await?;
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..clients {
        let connected = connect(connection).await?;
        workers.spawn(commits(connected, number, pause, notes.clone()));
    }
    let flush = tokio::spawn(flushes(client, notes));
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    // The server going away is how this ends in the demo; it is no error of the ledger.
    tokio::select! {
        _ = terminate.recv() => {}
        () = async { while workers.join_next().await.is_some() {} } => {}
    }
    flush.abort();
    Ok(())
}

async fn commits(client: Client, number: i32, pause: Duration, notes: Notes) -> anyhow::Result<()> {
    let filling = "x".repeat(100);
    let insert = client.prepare("INSERT INTO ledger VALUES ($1, $2, $3)").await?;
    let mut before = position(&client, INSERT_POSITION).await?.unwrap_or(0);
    for row in 1_i64.. {
        let sent = clock::unix_micros(clock::now());
        client.execute(&insert, &[&number, &row, &filling]).await?;
        let acknowledged = clock::unix_micros(clock::now());
        let after = position(&client, INSERT_POSITION).await;
        let shown = match &after {
            Ok(Some(after)) => lsn::show(*after),
            _ => "-".to_owned(),
        };
        let start = lsn::show(before);
        notes.write(&format!(
            "commit {number} {row} {start} {shown} {sent} {acknowledged}"
        ))?;
        before = after?.unwrap_or(before);
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

async fn flushes(client: Client, notes: Notes) -> anyhow::Result<()> {
    let mut last = None;
    loop {
        let now = position(&client, REPORTED_FLUSH).await?;
        if let Some(reported) = now.filter(|_| now > last) {
            let time = clock::unix_micros(clock::now());
            notes.write(&format!("flush {} {time}", lsn::show(reported)))?;
            last = now;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The acknowledged commits in order, and the last reported flush.
fn read(path: &Path) -> anyhow::Result<(LedgerLog, Option<u64>)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut log = LedgerLog::default();
    let mut flush = None;
    let time = |micros: &str| -> anyhow::Result<SystemTime> {
        Ok(SystemTime::UNIX_EPOCH + Duration::from_micros(micros.parse()?))
    };
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["flush", reported, _] => flush = flush.max(Some(lsn::parse(reported)?)),
            ["commit", client, number, before, after, sent, acknowledged] => log.entries.push(Entry {
                client: client.parse()?,
                number: number.parse()?,
                before: lsn::parse(before)?,
                after: (after != "-").then(|| lsn::parse(after)).transpose()?,
                sent: time(sent)?,
                acknowledged: time(acknowledged)?,
            }),
            _ => anyhow::bail!("{}: {line:?} is not a note", path.display()),
        }
    }
    log.entries.sort_by_key(|entry| entry.acknowledged);
    Ok((log, flush))
}

async fn held(client: &Client) -> anyhow::Result<BTreeMap<u32, Vec<u64>>> {
    let query = "SELECT client, number FROM ledger ORDER BY client, number";
    let mut held: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for row in client.query(query, &[]).await? {
        let (client, number): (i32, i64) = (row.get(0), row.get(1));
        held.entry(u32::try_from(client)?)
            .or_default()
            .push(u64::try_from(number)?);
    }
    Ok(held)
}

/// A time as PostgreSQL understands it.
async fn moment(client: &Client, text: &str) -> anyhow::Result<SystemTime> {
    let query = "SELECT (extract(epoch FROM $1::text::timestamptz) * 1000000)::bigint";
    let micros: i64 = client.query_one(query, &[&text]).await?.get(0);
    Ok(SystemTime::UNIX_EPOCH + Duration::from_micros(u64::try_from(micros)?))
}

async fn compare(connection: &str, path: &Path, at: Option<&str>) -> anyhow::Result<ExitCode> {
    let (log, flush) = read(path)?;
    let client = connect(connection).await?;
    let held = held(&client).await?;
    let flush = flush.context("the notes hold no reported flush: was the agent running?")?;
    let (expect, target) = match at {
        Some(text) => {
            let target = moment(&client, text).await?;
            (Expect::at_time(target), Some(target))
        }
        None => (Expect::held_through(flush), None),
    };
    let mut out = std::io::stdout();
    match target {
        Some(target) => say_target(&mut out, &log, &held, target)?,
        None => say_end(&mut out, &log, &held, flush)?,
    }
    if let Err(contradiction) = log.check_rows(&held, expect) {
        writeln!(out, "  NOT AS PROMISED: {contradiction:#}")?;
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

type Held = BTreeMap<u32, Vec<u64>>;

fn holds(held: &Held, entry: &Entry) -> bool {
    held.get(&entry.client)
        .is_some_and(|rows| rows.binary_search(&entry.number).is_ok())
}

fn say_target(out: &mut impl Write, log: &LedgerLog, held: &Held, target: SystemTime) -> anyhow::Result<()> {
    let (before, later): (Vec<_>, Vec<_>) = log.entries.iter().partition(|entry| entry.acknowledged < target);
    let there = before.iter().filter(|entry| holds(held, entry)).count();
    let past = later
        .iter()
        .filter(|entry| holds(held, entry) && entry.sent > target)
        .count();
    writeln!(
        out,
        "  commits acknowledged before that moment: {}, {there} of them restored",
        before.len()
    )?;
    writeln!(
        out,
        "  commits made after it: {}, {past} of them restored",
        later.len()
    )?;
    Ok(())
}

fn say_end(out: &mut impl Write, log: &LedgerLog, held: &Held, flush: u64) -> anyhow::Result<()> {
    let stored = |entry: &&Entry| entry.after.is_some_and(|after| after <= flush);
    let (reported, later): (Vec<_>, Vec<_>) = log.entries.iter().partition(stored);
    let lost: Vec<_> = reported.iter().filter(|entry| !holds(held, entry)).collect();
    let missing: Vec<_> = later.iter().filter(|entry| !holds(held, entry)).collect();
    writeln!(
        out,
        "  commits acknowledged by the primary: {}",
        log.entries.len()
    )?;
    writeln!(
        out,
        "  - up to the last flush that the agent had reported, {}: {}, {} of them lost",
        lsn::show(flush),
        reported.len(),
        lost.len()
    )?;
    writeln!(
        out,
        "  - after it, not yet promised: {}, {} of them restored all the same, {} lost",
        later.len(),
        later.len() - missing.len(),
        missing.len()
    )?;
    let (Some(first), Some(last)) = (missing.first(), log.entries.last()) else {
        return Ok(());
    };
    let ago = last
        .acknowledged
        .duration_since(first.acknowledged)
        .unwrap_or_default();
    writeln!(
        out,
        "    the oldest of these was acknowledged {} ms before the last commit ever acknowledged:",
        ago.as_millis()
    )?;
    let names = missing
        .iter()
        .take(6)
        .map(|entry| format!("client {} row {}", entry.client, entry.number));
    let names: Vec<_> = names.collect();
    let more = if missing.len() > names.len() { ", ..." } else { "" };
    writeln!(out, "    {}{more}", names.join(", "))?;
    Ok(())
}
