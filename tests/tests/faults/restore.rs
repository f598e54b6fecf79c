//! Restores that are asked for what is not there, or are interrupted.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_tests::clock::{self, eventually};
use highwater_tests::ledger::{Expect, LedgerLog};
use highwater_tests::process;
use highwater_tests::s3::{Operation, Strike};
use highwater_tests::site::{BUCKET, PATIENCE, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, SmallDisk, TestDir, archive, lsn, skip};

use crate::pulse::until_pulse;
use crate::support::{VERSION, answers, from_both, from_region, leave};

/// Whole segments of WAL after a backup, so that one in the middle can be lost; 1 MB each.
pub(crate) async fn with_segments() -> Result<(Site, LedgerLog)> {
    let site = Site::start(PgCluster::builder(VERSION), 1).await?;
    let agent = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    for _ in 0..5 {
        ledger.grow(30).await?;
        site.primary.sql("SELECT pg_switch_wal()").await?;
    }
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    leave(agent).await?;
    Ok((site, log))
}

/// Starts the server over `name` and waits until it can be written to.
async fn recovers(place: &RestoreSite, name: &str) -> Result<PgCluster> {
    let mut cluster = PgCluster::adopt(VERSION, &place.data(name))?;
    cluster.start_again().await?;
    let writable = || async {
        let recovering = cluster.value("SELECT pg_is_in_recovery()").await.ok()?;
        (recovering == "f").then_some(())
    };
    let waited = eventually("the end of recovery", PATIENCE, writable).await;
    waited.with_context(|| cluster.log())?;
    Ok(cluster)
}

/// A segment in the middle is gone from both regions: refused before anything is written, with the range that is
/// missing; what lies before the hole can still be had.
#[tokio::test]
async fn fault_53_a_hole_before_the_target_is_refused_before_the_disk_is_touched() -> Result<()> {
    let (site, log) = with_segments().await?;
    let snapshot = site.regions[0].snapshot();
    let segment = |key: &String| archive::range_of(key, site.segment_size());
    let keys = archive::keys_with(&snapshot, BUCKET, "/segment/");
    let middle = keys.get(keys.len().saturating_sub(3)).context("no segments")?;
    let (_, start, end) = segment(middle).context("no range")?;
    for region in &site.regions {
        for key in region.objects(BUCKET) {
            if segment(&key).is_some_and(|(_, from, to)| from < end && to > start) {
                region.delete(BUCKET, &key);
            }
        }
    }
    let place = from_both(&site)?;
    for target in [
        vec![],
        vec!["--to-lsn".to_owned(), lsn::show(site.position().await?)],
    ] {
        let target: Vec<&str> = target.iter().map(String::as_str).collect();
        let said = place.run("never", &target).await?;
        answers(&said, 1, &[&lsn::show(start)])?;
        ensure!(!place.data("never").exists(), "the directory was made");
    }
    let verify = place.program()?.arg("verify").output().await?;
    answers(&verify, 1, &[&lsn::show(start)])?;
    let before = place
        .recovered("before", &["--to-lsn", &lsn::show(start)])
        .await?;
    log.check(&before, Expect::at_lsn(start)).await?;
    Ok(())
}

/// The regions go away in the middle of replay: PostgreSQL stops and does not open; when they are back the same
/// server is started again and gets to the end.
#[tokio::test]
async fn fault_52_an_outage_in_the_middle_of_replay_stops_it_and_it_goes_on_later() -> Result<()> {
    let (site, log) = with_segments().await?;
    let place = from_region(&site, 0)?;
    place.run("data", &[]).await?.expect_code(0)?;
    // The first segments come, then nothing does.
    let segments = archive::keys_with(&site.regions[0].snapshot(), BUCKET, "/segment/");
    let third = segments
        .get(segments.len().saturating_sub(3))
        .context("no segments")?;
    site.regions[0]
        .faults()
        .only_keys(third.rsplit('/').next().unwrap_or_default());
    site.regions[0].faults().fail_always(Some(503));
    let mut cluster = PgCluster::adopt(VERSION, &place.data("data"))?;
    cluster.spawn()?;
    cluster
        .until_ended(Duration::from_secs(150))
        .await
        .context("recovery went on without the segment")?;
    ensure!(
        place.data("data").join("recovery.signal").exists(),
        "recovery was given up"
    );
    let opened = cluster
        .log()
        .contains("database system is ready to accept connections");
    ensure!(
        !opened || !cluster.log().contains("archive recovery complete"),
        "{}",
        cluster.log()
    );
    drop(cluster);
    site.regions[0].faults().clear();
    log.check(&recovers(&place, "data").await?, Expect::everything())
        .await?;
    Ok(())
}

/// Times and positions around two backups: before the first one is refused, between them the older one is used,
/// before a backup is consistent is refused, and a moment in an idle stretch is reached.
#[tokio::test]
async fn fault_55_fault_56_fault_57_targets_before_and_after_what_happened() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(30).await?;
    let too_early = clock::now();
    ledger.grow(20).await?;
    site.backup().await?;
    ledger.grow(30).await?;
    let between = clock::now();
    let between_lsn = site.position().await?;
    ledger.grow(30).await?;
    let second = site.backup().await?;
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    let moment = |time| Time::from_unix_micros(clock::unix_micros(time));
    let text = |time| moment(time).to_string();
    // Nothing is written any more; the pulse goes on.
    let idle = clock::now() + Duration::from_millis(500);
    for region in &site.regions {
        until_pulse(region, |pulse| {
            pulse.server_time > moment(idle) && pulse.stored_lsn >= pulse.wal_end
        })
        .await?;
    }
    leave(agent).await?;

    let place = from_both(&site)?;
    let refused = place.run("never", &["--to-time", &text(too_early)]).await?;
    ensure!(
        refused.code == 1 && !place.data("never").exists(),
        "{}",
        refused.said()
    );
    // The second backup is not consistent yet at that position.
    let early = place
        .program()?
        .args(["plan", "--backup", &second, "--to-lsn", &lsn::show(between_lsn)]);
    let early = early.output().await?;
    ensure!(early.code == 1 || early.code == 2, "{}", early.said());
    let restored = place.recovered("between", &["--to-time", &text(between)]).await?;
    let report = log.check(&restored, Expect::at_time(between)).await?;
    ensure!(
        report.missing > 0,
        "nothing lies past the time: the test proves nothing"
    );
    drop(restored);
    let restored = place.recovered("idle", &["--to-time", &text(idle)]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// The program is killed at each pack that it reads: nothing that PostgreSQL would start is there, and the same
/// command run again completes.
#[tokio::test]
async fn fault_61_killed_at_every_pack_it_cannot_be_started_and_starts_over() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let agent = site.start_agent().await?;
    site.primary
        .sql("CREATE TABLE t AS SELECT g AS i, md5(g::text) FROM generate_series(1, 60000) g")
        .await?;
    let small =
        highwater_tests::Program::agent()?.config(&(site.config() + "[backup]\npack_size = \"4MiB\"\n"))?;
    small.arg("backup").output().await?.expect_code(0)?;
    site.all_durable().await?;
    leave(agent).await?;
    let place = from_region(&site, 0)?;
    let region = &site.regions[0];
    let packs = archive::keys_with(&region.snapshot(), BUCKET, "/pack/").len() as u64;
    ensure!(packs >= 4, "only {packs} packs");
    for nth in 1..=packs {
        region.faults().only(&[Operation::Get]);
        region.faults().only_keys("/pack/");
        region.faults().strike(nth, Strike::HoldBefore);
        let run = place.program()?.args(["run", "--into"]).arg(place.data("data"));
        let mut run = run.start()?;
        let struck = tokio::time::timeout(PATIENCE, region.faults().until_struck()).await;
        struck.with_context(|| format!("pack {nth} was never read:\n{}", run.stderr()))?;
        run.kill9();
        region.faults().clear();
        ensure!(
            !place.data("data").join("global/pg_control").exists(),
            "startable though killed at pack {nth} of {packs}"
        );
    }
    place.run("data", &[]).await?.expect_code(0)?;
    let restored = recovers(&place, "data").await?;
    ensure!(restored.value("SELECT count(*) FROM t").await? == "60000");
    Ok(())
}

/// The limits that a standby must not undercut were raised after the backup: the restored server starts. And it has a place
/// for what was prepared, though the setting lay in a file that is not in the backup: without one, replay ends.
#[tokio::test]
async fn fault_63_limits_raised_after_the_backup_do_not_stop_recovery() -> Result<()> {
    let elsewhere = TestDir::new()?;
    let settings = elsewhere.path().join("settings.conf");
    std::fs::write(&settings, "max_prepared_transactions = 3\n")?;
    let builder = PgCluster::builder(VERSION).conf("include_if_exists", &settings.display().to_string());
    let mut site = Site::start(builder, 16).await?;
    let agent = site.start_agent().await?;
    site.backup().await?;
    for setting in [
        "max_connections = 177",
        "max_locks_per_transaction = 99",
        "max_wal_senders = 23",
    ] {
        site.primary.sql(&format!("ALTER SYSTEM SET {setting}")).await?;
    }
    site.primary.stop(highwater_tests::Stop::Fast).await?;
    site.primary.start_again().await?;
    site.primary.sql("CREATE TABLE t AS SELECT 7 AS i").await?;
    let client = site.primary.client().await?;
    for statement in ["BEGIN", "INSERT INTO t VALUES (8)", "PREPARE TRANSACTION 'eight'"] {
        client.batch_execute(statement).await?;
    }
    site.all_durable().await?;
    leave(agent).await?;
    std::fs::remove_file(&settings)?;
    let place = from_region(&site, 0)?;
    let mut restored = place.recovered("data", &[]).await?;
    ensure!(restored.value("SELECT i FROM t").await? == "7");
    // Recovery is over, and what is prepared still needs its place.
    restored.stop(highwater_tests::Stop::Fast).await?;
    restored.start_again().await?;
    restored.sql("COMMIT PREPARED 'eight'").await?;
    ensure!(restored.value("SELECT sum(i) FROM t").await? == "15");
    Ok(())
}

/// The disk fills while files are written, after the check up front found room: a clean error, nothing startable,
/// and the same command completes when there is room again.
#[tokio::test]
async fn fault_71_a_disk_that_fills_in_the_middle_ends_cleanly_and_goes_on_later() -> Result<()> {
    let Some(disk) = SmallDisk::new(400)? else {
        return skip::not_allowed("nobody may mount a file system on this machine");
    };
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let agent = site.start_agent().await?;
    site.backup().await?;
    site.all_durable().await?;
    leave(agent).await?;
    let place = from_region(&site, 0)?;
    let data = disk.path().join("data");
    let packs = site.regions[0].faults();
    packs.only(&[Operation::Get]);
    packs.only_keys("/pack/");
    packs.fail_always(Some(503));
    let into = disk.inner_path().join("data");
    let Some(restore) = disk.inside(place.program()?.args(["run", "--into"]).arg(into)) else {
        return skip::not_allowed("users may have no namespaces on this machine");
    };
    let first = restore.start()?;
    // The directory is made when the check of free room is done; no pack comes before the disk is full.
    let made = || async { data.exists().then_some(()) };
    eventually("the directory to be made", PATIENCE, made).await?;
    disk.take(u32::try_from(disk.free()? >> 20)?)?;
    packs.clear();
    let said = first.finish(PATIENCE).await?.expect_code(3)?.said();
    ensure!(
        said.contains("space") || said.contains("room"),
        "the reason is not named:\n{said}"
    );
    ensure!(!data.join("global/pg_control").exists(), "it could be started");
    disk.make_room()?;
    restore.output().await?.expect_code(0)?;
    ensure!(data.join("global/pg_control").exists(), "it is not complete");
    Ok(())
}

/// Configuration files of PostgreSQL, in the order in which they are named.
const CONFIGURATION: [&str; 3] = ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"];
/// The port is only part of the socket's name: the server listens on no network.
const PORT: u16 = 5432;

/// The configuration lies outside the data directory, as on Debian: the backup cannot have it. The restore says which files
/// are missing and leaves them to the operator, or writes minimal ones where it starts the server itself.
#[tokio::test]
async fn fault_72_configuration_outside_the_data_directory_is_named() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    // The running server has read them; a base backup finds the directory as it would be on Debian.
    for name in CONFIGURATION {
        std::fs::rename(site.primary.data_dir().join(name), site.primary.dir().join(name))?;
    }
    let agent = site.start_agent().await?;
    site.primary.sql("CREATE TABLE t AS SELECT 7 AS i").await?;
    site.backup().await?;
    site.all_durable().await?;
    leave(agent).await?;
    let place = from_region(&site, 0)?;

    let said = place.run("left", &[]).await?;
    let all = CONFIGURATION.join(", ");
    answers(&said, 0, &[&all, "outside the data directory", "provide them"])?;
    let left = place.data("left");
    for name in CONFIGURATION {
        ensure!(!left.join(name).exists(), "{name} was made up");
    }
    for name in CONFIGURATION {
        let path = left.join(name);
        std::fs::copy(site.primary.dir().join(name), &path)?;
        process::RunAs::own(&path)?;
    }
    ensure!(recovers(&place, "left").await?.value("SELECT i FROM t").await? == "7");

    let run = place
        .program()?
        .args(["run", "--start", "--port", &PORT.to_string(), "--into"]);
    let run = run.arg(place.data("started")).arg("--socket-directory");
    let run = run.arg(place.dir()).arg("--bin").arg(VERSION.bin()?);
    let said = run.output().await?;
    let started = PgCluster::attach(VERSION, &place.data("started"), place.dir(), PORT)?;
    answers(&said, 0, &[&all, "minimal ones were written"])?;
    let hba = started.data_dir().join("pg_hba.conf");
    ensure!(
        !std::fs::read_to_string(&hba)?.contains("trust"),
        "anybody may log in"
    );
    // Nobody but the server's own account is let in; the original's file changes that.
    std::fs::copy(site.primary.dir().join("pg_hba.conf"), &hba)?;
    let pid = std::fs::read_to_string(started.data_dir().join("postmaster.pid"))?;
    let pid = pid.lines().next().context("no process id")?.parse()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGHUP)?;
    let read = || async { started.value("SELECT i FROM t").await.ok() };
    let seen = eventually("the restored server to let us in", PATIENCE, read).await?;
    ensure!(seen == "7", "{seen}");
    Ok(())
}
