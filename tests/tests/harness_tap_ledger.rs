//! The harness itself: the tap reads a real replication client, and the ledger sees what is lost.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::process::{self, Process};
use highwater_tests::{FeedbackTap, Ledger, PgCluster, PgVersion, Stop, TestDir, lsn};

/// PostgreSQL's own receiver, streaming through the tap and flushing at once.
fn receiver(cluster: &PgCluster, tap: &FeedbackTap, into: &Path) -> Result<Process> {
    let mut command = process::command(&cluster.bin().join("pg_receivewal"), "KILL");
    command
        .arg("--dbname")
        .arg(tap.connection_string())
        .arg("-D")
        .arg(into)
        .args(["--synchronous", "--no-loop"]);
    command.current_dir(into).stderr(std::process::Stdio::null());
    Ok(Process::start(command)?)
}

#[tokio::test]
async fn the_tap_logs_what_a_receiver_reports() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let tap = FeedbackTap::start(&cluster).await?;
    tap.record();
    let hooked = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&hooked);
    tap.on_feedback(move |feedback| {
        seen.fetch_max(feedback.flush, Ordering::SeqCst);
    });
    let dir = TestDir::new()?;
    let receiver = receiver(&cluster, &tap, dir.path())?;

    let ledger = Ledger::start(&cluster, 2).await?;
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    let end = lsn::parse(&cluster.value("SELECT pg_current_wal_flush_lsn()").await?)?;
    let caught_up = || async { (tap.highest_flush() >= end).then_some(()) };
    eventually(
        "the flush position to reach the end",
        Duration::from_secs(20),
        caught_up,
    )
    .await?;

    ensure!(
        hooked.load(Ordering::SeqCst) == tap.highest_flush(),
        "the hook misses messages"
    );
    let sent = tap.sent();
    ensure!(
        sent.wal_end >= end && sent.wal_bytes > 0,
        "the server's side was not read: {sent:?}"
    );
    let recorded: u64 = tap.recorded().values().map(|bytes| bytes.len() as u64).sum();
    ensure!(
        recorded == sent.wal_bytes,
        "recorded {recorded} of {} bytes",
        sent.wal_bytes
    );
    ensure!(log.entries.len() >= 50 && log.entries.iter().all(|entry| entry.after.is_some()));
    log.check(&cluster, Expect::everything()).await?;
    tap.sever();
    drop(receiver);
    Ok(())
}

#[tokio::test]
async fn the_ledger_finds_a_deleted_row_and_outlives_its_server() -> Result<()> {
    let mut cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let ledger = Ledger::start(&cluster, 3).await?;
    ledger.grow(60).await?;
    cluster.kill9();
    let log = ledger.stop().await;
    cluster.start_again().await?;
    let report = log.check(&cluster, Expect::everything()).await?;
    ensure!(report.missing == 0 && report.held >= 60, "{report:?}");

    cluster
        .sql("DELETE FROM ledger WHERE client = 1 AND number = 3")
        .await?;
    let error = log
        .check(&cluster, Expect::everything())
        .await
        .err()
        .context("a lost row was not noticed")?;
    ensure!(error.to_string().contains("client 1"), "{error}");
    cluster.stop(Stop::Immediate).await?;
    Ok(())
}

#[tokio::test]
async fn a_killed_test_program_leaves_nothing() -> Result<()> {
    // This very test program, asked to run the helper below, is killed in the middle of it.
    let dir = TestDir::new()?;
    let note = dir.join("note");
    let mut child = std::process::Command::new(std::env::current_exe()?)
        .args(["--ignored", "--exact", "victim", "--nocapture"])
        .env("HARNESS_VICTIM_NOTE", &note)
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let noted = || async {
        std::fs::read_to_string(&note)
            .ok()
            .filter(|text| text.ends_with('\n'))
    };
    let noted = eventually("the victim's cluster", Duration::from_secs(60), noted).await?;
    let victim_dir = Path::new(noted.trim());
    ensure!(
        !process::working_below(victim_dir).is_empty(),
        "the victim has no server"
    );
    child.kill()?;
    child.wait()?;
    let gone =
        || async { (!victim_dir.exists() && process::working_below(victim_dir).is_empty()).then_some(()) };
    eventually("its server and files to go", Duration::from_secs(20), gone).await
}

#[tokio::test]
#[ignore = "run by a_killed_test_program_leaves_nothing"]
async fn victim() -> Result<()> {
    let Some(note) = std::env::var_os("HARNESS_VICTIM_NOTE") else {
        return Ok(());
    };
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    std::fs::write(note, format!("{}\n", cluster.dir().path().display()))?;
    tokio::time::sleep(Duration::from_secs(120)).await;
    Ok(())
}
