//! `run --start`: the restored server is started, the target awaited, and what was reached is
//! reported. The report must agree with what the ledger finds.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_tests::clock::{self, eventually};
use highwater_tests::ledger::{Expect, LedgerLog};
use highwater_tests::process;
use highwater_tests::program::Finished;
use highwater_tests::site::{PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, lsn};

const VERSION: PgVersion = PgVersion::V15;
/// The port is only part of the socket's name: the servers listen on no network.
const PORT: u16 = 5432;

/// A site whose `ledger` is dropped by mistake at the end; the notes and the moment before the mistake.
async fn dropped_by_mistake() -> Result<(Site, LedgerLog, u64, std::time::SystemTime)> {
    // The ledger's commits are to be the last ones: nobody else commits beside it.
    let site = Site::start(PgCluster::builder(VERSION).conf("autovacuum", "off"), 16).await?;
    let agent = site.start_agent().await?;
    // One client: its last row is the last of all.
    let ledger = Ledger::start(&site.primary, 1).await?;
    ledger.grow(50).await?;
    site.backup().await?;
    ledger.grow(100).await?;
    let log = ledger.stop().await;
    let (position, moment) = (site.position().await?, clock::now());
    site.primary.sql("DROP TABLE ledger").await?;
    site.all_durable().await?;
    drop(agent);
    Ok((site, log, position, moment))
}

async fn start(place: &RestoreSite, name: &str, target: &[&str]) -> Result<Finished> {
    let program = place
        .program()?
        .args(["--output", "json", "run", "--start", "--into"])
        .arg(place.data(name));
    let program = program
        .arg("--socket-directory")
        .arg(place.dir())
        .args(["--port", &PORT.to_string()]);
    program
        .arg("--bin")
        .arg(VERSION.bin()?)
        .args(target)
        .output()
        .await
}

fn report(said: &Finished) -> Result<serde_json::Value> {
    let whole: serde_json::Value =
        serde_json::from_str(&said.stdout).with_context(|| format!("not JSON: {}", said.said()))?;
    Ok(whole["answer"].clone())
}

#[tokio::test]
async fn to_the_moment_before_the_mistake() -> Result<()> {
    let (site, log, position, moment) = dropped_by_mistake().await?;
    let place = RestoreSite::new(VERSION, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let time = Time::from_unix_micros(clock::unix_micros(moment)).to_string();
    let began = Instant::now();
    let said = start(&place, "data", &["--to-time", &time])
        .await?
        .expect_code(0)?;
    let took = began.elapsed();
    let report = report(&said)?;
    let restored = PgCluster::attach(VERSION, &place.data("data"), place.dir(), PORT)?;
    log.check(&restored, Expect::everything()).await?;
    ensure!(
        restored.value("SELECT pg_is_in_recovery()").await? == "f",
        "it is not open"
    );
    let end = &report["end"];
    ensure!(end["state"] == "reached" && end["running"] == true, "{report:#}");
    let reached = lsn::parse(end["lsn"].as_str().context("no LSN")?)?;
    let last = log.entries.iter().map(|entry| entry.before).max();
    let last = last.context("an empty ledger")?;
    ensure!(
        last < reached && reached <= position,
        "reached {}; the last commit begins behind {}, the mistake behind {}",
        lsn::show(reached),
        lsn::show(last),
        lsn::show(position)
    );
    timelines_agree(end, &restored).await?;
    last_transaction_agrees(end, &log)?;
    phases_fit(&report, took)
}

/// The report against the history file that PostgreSQL wrote, and the timeline that the server writes on.
async fn timelines_agree(end: &serde_json::Value, restored: &PgCluster) -> Result<()> {
    let writes = "SELECT pg_walfile_name(pg_current_wal_insert_lsn() + 1)";
    let name = restored.value(writes).await?;
    let timeline = u32::from_str_radix(name.get(..8).context("no name")?, 16)?;
    let history = format!("pg_wal/{timeline:08X}.history");
    let history = std::fs::read_to_string(restored.data_dir().join(history))?;
    let line = history.lines().rfind(|line| !line.trim().is_empty());
    let mut fields = line.context("an empty history")?.split('\t');
    let (parent, switch) = fields.next().zip(fields.next()).context("no switch point")?;
    ensure!(
        end["timeline"] == timeline
            && end["replayed_timeline"] == parent.parse::<u32>()?
            && end["lsn"] == switch,
        "{end:#} but timeline {timeline} with the history\n{history}"
    );
    Ok(())
}

/// The report against the ledger's notes of when the row was committed that it names last. (The server itself does not
/// know: `pg_last_xact_replay_timestamp()` leaves out a record that is the target.)
fn last_transaction_agrees(end: &serde_json::Value, log: &LedgerLog) -> Result<()> {
    let told = end["last_transaction"].as_str().context("no time")?;
    let replayed = told.parse::<Time>()?.unix_micros();
    // Whatever ended before the last one began was not the last.
    let last = log.entries.iter().map(|entry| entry.before).max();
    let mut last = log.entries.iter().filter(|entry| entry.after > last);
    let fits = last.any(|entry| {
        let (sent, acknowledged) = (
            clock::unix_micros(entry.sent),
            clock::unix_micros(entry.acknowledged),
        );
        (sent..=acknowledged).contains(&replayed)
    });
    ensure!(fits, "{told} is not when the ledger's last row was committed");
    Ok(())
}

/// Every phase is told, and all of them fit into the time that was watched.
fn phases_fit(report: &serde_json::Value, took: Duration) -> Result<()> {
    let phases = ["fetch_ms", "finish_ms", "replay_ms"].map(|phase| report[phase].as_u64());
    let [Some(fetch), Some(finish), Some(replay)] = phases else {
        anyhow::bail!("a phase is missing: {report:#}");
    };
    ensure!(
        fetch > 0 && replay > 0 && u128::from(fetch + finish + replay) <= took.as_millis() + 3,
        "{phases:?} of {took:?}"
    );
    Ok(())
}

#[tokio::test]
async fn paused_it_can_be_read_and_not_written() -> Result<()> {
    let (site, log, position, _) = dropped_by_mistake().await?;
    let place = RestoreSite::new(VERSION, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let target = [
        "--to-lsn",
        &lsn::show(position),
        "--exclusive",
        "--action",
        "pause",
    ];
    start(&place, "data", &target).await?.expect_code(0)?;
    let restored = PgCluster::attach(VERSION, &place.data("data"), place.dir(), PORT)?;
    log.check(&restored, Expect::everything()).await?;
    ensure!(
        restored.value("SELECT pg_is_in_recovery()").await? == "t",
        "it is open"
    );
    ensure!(
        restored
            .sql("INSERT INTO ledger VALUES (9, 9, '')")
            .await
            .is_err(),
        "it takes writes"
    );
    Ok(())
}

#[tokio::test]
async fn shut_down_at_the_target_it_starts_there_again() -> Result<()> {
    let (site, log, position, _) = dropped_by_mistake().await?;
    let place = RestoreSite::new(VERSION, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let target = [
        "--to-lsn",
        &lsn::show(position),
        "--exclusive",
        "--action",
        "shutdown",
    ];
    let said = start(&place, "data", &target).await?.expect_code(0)?;
    ensure!(report(&said)?["end"]["running"] == false, "{}", said.said());
    let working = || process::working_below(&place.data("data"));
    let names = || {
        working()
            .iter()
            .map(|pid| process::command_line(*pid))
            .collect::<Vec<_>>()
    };
    ensure!(
        !names().iter().any(|name| name.contains("postgres")),
        "a server is left: {:?}",
        names()
    );
    // What fetched ahead for the server leaves with it, if not in the same moment.
    let gone = || async { working().is_empty().then_some(()) };
    eventually("its companions to leave", PATIENCE, gone)
        .await
        .with_context(|| format!("{:?}", names()))?;

    let mut restored = PgCluster::adopt(VERSION, &place.data("data"))?;
    restored.spawn()?;
    restored
        .until_ended(PATIENCE)
        .await
        .context("started again it shuts down at the target again")?;
    drop((site, log));
    Ok(())
}

#[tokio::test]
async fn to_the_very_end_the_mistake_is_there() -> Result<()> {
    let (site, _, _, _) = dropped_by_mistake().await?;
    let place = RestoreSite::new(VERSION, &[(REGIONS[0], site.regions[0].as_ref())])?;
    start(&place, "data", &[]).await?.expect_code(0)?;
    let restored = PgCluster::attach(VERSION, &place.data("data"), place.dir(), PORT)?;
    ensure!(restored.value("SELECT to_regclass('ledger') IS NULL").await? == "t");
    Ok(())
}

/// Production, for example, on the machine that the restore is made on.
#[tokio::test]
async fn a_port_that_another_server_has_is_said_with_the_way_on() -> Result<()> {
    let (site, _, _, _) = dropped_by_mistake().await?;
    let place = RestoreSite::new(VERSION, &[(REGIONS[0], site.regions[0].as_ref())])?;
    start(&place, "first", &["--to-immediate"])
        .await?
        .expect_code(0)?;
    let _first = PgCluster::attach(VERSION, &place.data("first"), place.dir(), PORT)?;
    let said = start(&place, "second", &["--to-immediate"])
        .await?
        .expect_code(3)?
        .said();
    let by_hand = format!(
        "/postgres -D {} -c data_directory=",
        place.data("second").display()
    );
    ensure!(
        said.contains("has its port or socket") && said.contains("--port") && said.contains(&by_hand),
        "{said}"
    );
    let mut second = PgCluster::adopt(VERSION, &place.data("second"))?;
    second.start_again().await?;
    place.until_writable(&second).await
}

/// What was replayed while the backup ran is in it, and the report says so.
#[tokio::test]
async fn a_standbys_backup_is_restored_to_its_end() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let agent = site.start_agent().await?;
    let standby = PgCluster::builder(VERSION).standby_of(&site.primary).await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(50).await?;
    // A standby's backup begins at its last restart point.
    let taken = || async {
        site.primary.sql("CHECKPOINT").await.ok()?;
        let backup = site.agent_at(&standby.connection_string()).ok()?.arg("backup");
        let done = backup.output().await.ok()?;
        (done.code == 0).then_some(())
    };
    eventually("a base backup of the standby", PATIENCE, taken).await?;
    ledger.grow(50).await?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    drop(agent);
    let place = RestoreSite::new(VERSION, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let said = start(&place, "early", &["--to-immediate"])
        .await?
        .expect_code(0)?;
    ensure!(report(&said)?["end"]["state"] == "reached", "{}", said.said());
    let early = PgCluster::attach(VERSION, &place.data("early"), place.dir(), PORT)?;
    drop(early);
    let restored = place.recovered("late", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

#[tokio::test]
async fn fault_70_a_server_of_another_major_is_refused_before_anything_is_written() -> Result<()> {
    let (site, _, _, _) = dropped_by_mistake().await?;
    let place = RestoreSite::new(VERSION, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let other = PgVersion::V17.bin()?;
    let program = place
        .program()?
        .args(["run", "--start", "--into"])
        .arg(place.data("data"))
        .arg("--bin")
        .arg(other);
    let said = program.output().await?.expect_code(2)?;
    ensure!(
        said.said().contains("15") && !place.data("data").exists(),
        "{}",
        said.said()
    );
    Ok(())
}
