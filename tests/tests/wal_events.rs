//! What is read from the WAL of every major, against what the server itself says of it: which transactions ended, how and when,
//! and where restore points are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use highwater_format::walscan::{WalEvent, WalScanner};
use highwater_format::{Lsn, SegmentSize, TimelineId};
use highwater_tests::{PgCluster, PgVersion, lsn};

const SEGMENT: u64 = 1 << 20;
/// Transactions that the loops below commit.
const COMMITS: usize = 300;

/// Each row is of the transaction that it names: commits, subtransactions, prepared ones, and pages written whole after checkpoints.
const WORK: [&str; 12] = [
    "CREATE TABLE work (xid bigint, filling text)",
    "DO $$ BEGIN FOR n IN 1..150 LOOP INSERT INTO work VALUES (pg_current_xact_id()::text::bigint, repeat(md5(n::text), 90)); COMMIT; \
     END LOOP; END $$",
    "CHECKPOINT",
    "BEGIN; INSERT INTO work VALUES (pg_current_xact_id()::text::bigint); SAVEPOINT a; INSERT INTO work VALUES \
     (pg_current_xact_id()::text::bigint); SAVEPOINT b; INSERT INTO work VALUES (0); ROLLBACK TO b; COMMIT",
    "BEGIN; INSERT INTO work VALUES (pg_current_xact_id()::text::bigint); CREATE TABLE dropped (id int); PREPARE TRANSACTION 'kept'",
    "BEGIN; INSERT INTO work VALUES (0); PREPARE TRANSACTION 'gone'",
    "SELECT pg_switch_wal()",
    "COMMIT PREPARED 'kept'",
    "ROLLBACK PREPARED 'gone'",
    "DROP TABLE dropped",
    "CHECKPOINT",
    "DO $$ BEGIN FOR n IN 1..150 LOOP UPDATE work SET filling = 'x' WHERE ctid = '(0,1)'; INSERT INTO work VALUES \
     (pg_current_xact_id()::text::bigint, repeat('y', n)); COMMIT; END LOOP; END $$",
];

/// What was read: how and when transactions ended, and where restore points are.
#[derive(Debug, Default)]
struct Read {
    ended: BTreeMap<u32, (bool, i64)>,
    points: Vec<(String, Lsn)>,
}

/// The segment files from the one that holds `from` on, as a stream that reaches `to`.
async fn read(cluster: &PgCluster, from: u64, to: u64) -> Result<Read> {
    let size = SegmentSize::new(SEGMENT)?;
    let start = from - from % SEGMENT;
    let major = Some(cluster.version().major());
    let mut scanner = WalScanner::new(Lsn(start), size, Some(TimelineId::FIRST), major);
    let mut read = Read::default();
    for at in (start..to).step_by(usize::try_from(SEGMENT)?) {
        let number = at / SEGMENT;
        let name = format!("00000001{:08X}{:08X}", number / 4096, number % 4096);
        let path: PathBuf = cluster.data_dir().join("pg_wal").join(name);
        let segment = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let used = usize::try_from((to - at).min(SEGMENT))?;
        let result = scanner.feed(&segment[..used], &mut |event| match event {
            WalEvent::Commit { time, xid, abort, .. } => {
                read.ended.insert(xid, (abort, time.unix_micros()));
            }
            WalEvent::RestorePoint { end, name, .. } => read.points.push((name, end)),
            _ => {}
        });
        result.with_context(|| path.display().to_string())?;
    }
    Ok(read)
}

async fn is_read_as_the_server_says(version: PgVersion) -> Result<()> {
    let cluster = PgCluster::builder(version)
        .segment_mb(1)
        .conf("track_commit_timestamp", "on")
        .conf("max_prepared_transactions", "4")
        .conf("wal_keep_size", "1GB")
        .start()
        .await?;
    let position = "SELECT pg_current_wal_insert_lsn()";
    let from = lsn::parse(&cluster.value(position).await?)?;
    for work in WORK {
        cluster.sql(work).await?;
    }
    let rolled_back = "BEGIN; INSERT INTO work VALUES (0); SELECT pg_current_xact_id(); ROLLBACK";
    let rolled_back: u32 = cluster.value(rolled_back).await?.parse()?;
    let point = cluster.value("SELECT pg_create_restore_point('the end')").await?;
    cluster.sql("CHECKPOINT").await?;
    let to = lsn::parse(&cluster.value("SELECT pg_current_wal_flush_lsn()").await?)?;
    let read = read(&cluster, from, to).await?;

    let said = "SELECT DISTINCT xid, (extract(epoch FROM pg_xact_commit_timestamp(xid::text::xid)) * 1000000)::bigint FROM work";
    let said = cluster.sql(said).await?;
    ensure!(said.len() > COMMITS, "only {} transactions", said.len());
    for row in said {
        let cell = |at: usize| row.get(at).cloned().flatten().context("NULL");
        let (xid, time): (u32, i64) = (cell(0)?.parse()?, cell(1)?.parse()?);
        let found = read.ended.get(&xid);
        ensure!(
            found == Some(&(false, time)),
            "{xid} committed at {time}: {found:?}"
        );
    }
    let found = read.ended.get(&rolled_back);
    ensure!(
        found.is_some_and(|(abort, _)| *abort),
        "{rolled_back} was rolled back: {found:?}"
    );
    // That one, the prepared one, the subtransaction, and nothing else.
    let aborted = read.ended.values().filter(|(abort, _)| *abort).count();
    ensure!(aborted == 3, "{aborted} were rolled back");
    let point = (String::from("the end"), Lsn(lsn::parse(&point)?));
    ensure!(read.points == [point], "{:?}", read.points);
    Ok(())
}

#[tokio::test]
async fn the_wal_of_every_major_is_read_as_the_server_says() -> Result<()> {
    for version in PgVersion::installed()? {
        is_read_as_the_server_says(version).await.context(version)?;
    }
    Ok(())
}
