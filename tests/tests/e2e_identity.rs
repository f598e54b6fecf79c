//! The archive belongs to one history: a rolled-back primary and a second agent are told apart from a plain
//! restart, and neither spoils what is archived.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_agent::slot;
use highwater_format::TimelineId;
use highwater_pgwire::{ConnInfo, Connection, Mode};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{
    Ledger, PgCluster, PgVersion, Program, S3Server, S3Snapshot, Stop, archive, lsn, process,
};

/// The write-once objects of both regions: all but the pulse, which is rewritten, and the notes of writers.
fn archived(site: &Site) -> [Vec<String>; 2] {
    let kept = |snapshot: S3Snapshot| {
        let mut keys = snapshot.keys(BUCKET);
        keys.retain(|key| key.contains("/wal/") || key.contains("/base/"));
        keys
    };
    site.snapshots().map(kept)
}

/// Starts `run` and waits for it to give up; returns the exit code and what it said.
async fn gives_up(site: &Site) -> Result<(i32, String)> {
    let mut agent = site.agent()?.arg("run").start()?;
    let code = agent.wait_exit(PATIENCE).await?;
    Ok((code, agent.last_words()))
}

/// The place from which on an agent says that the server's WAL is another one.
fn place_named_in(said: &str) -> Result<u64> {
    let place = said.split("differs from the archive's from ").nth(1);
    let place = place.and_then(|rest| rest.split(' ').next());
    lsn::parse(place.with_context(|| format!("no place is named: {said}"))?)
}

/// Loses the server's disk and puts a copy of it in its place.
async fn roll_back(site: &mut Site, kept: &Path) -> Result<()> {
    site.primary.stop(Stop::Immediate).await?;
    site.primary.lose_disk()?;
    process::copy_tree(kept, site.primary.data_dir())?;
    site.primary.start_again().await
}

async fn a_primary_that_was_rolled_back_is_refused(version: PgVersion) -> Result<()> {
    // Nobody else writes WAL: for a while the copy is to stay behind what is archived.
    let mut site = Site::start(PgCluster::builder(version).conf("autovacuum", "off"), 16).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    site.primary.sql("CREATE TABLE story (line text)").await?;
    site.primary.stop(Stop::Fast).await?;
    let kept = site.primary.dir().join("kept");
    process::copy_tree(site.primary.data_dir(), &kept)?;
    site.primary.start_again().await?;
    // The last record that both histories have.
    let shutdown = "SELECT checkpoint_lsn FROM pg_control_checkpoint()";
    let common = lsn::parse(&site.primary.value(shutdown).await?)?;
    site.primary
        .sql("INSERT INTO story SELECT 'what was archived ' || g FROM generate_series(1, 2000) g")
        .await?;
    site.all_durable().await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    let before = archived(&site);

    // The copy is put in its place, and grows past the point up to which the other one was archived.
    roll_back(&mut site, &kept).await?;
    // Before that its end lies inside what is archived, and the listings look as if its WAL were stored.
    site.primary
        .sql("INSERT INTO story SELECT 'another story altogether ' || g FROM generate_series(1, 100) g")
        .await?;
    let backup = site.agent()?.arg("backup").output().await?.expect_code(4)?;
    ensure!(
        backup.stderr.contains("differs from the archive"),
        "{}",
        backup.stderr
    );
    let reported = site.tap.highest_flush();
    let (code, said) = gives_up(&site).await?;
    ensure!(code == 4, "exit code {code} while it is behind:\n{said}");
    let (end, place) = (site.position().await?, place_named_in(&said)?);
    ensure!(common < place && place <= end && end < reported, "{said}");
    ensure!(site.tap.highest_flush() == reported && archived(&site) == before);

    site.primary
        .sql("INSERT INTO story SELECT 'another story altogether ' || g FROM generate_series(1, 9000) g")
        .await?;
    let (code, said) = gives_up(&site).await?;
    ensure!(code == 4, "exit code {code}:\n{said}");
    // The first records behind that are another's.
    let place = place_named_in(&said)?;
    ensure!(
        common < place && place < common + (64 << 10) && place < reported,
        "the histories part behind {}: {said}",
        lsn::show(common)
    );
    nothing_of_the_other_story(&site, reported, &before)?;

    only_the_first_story(&site, "what was", 2000).await
}

/// Neither was anything reported since, nor stored.
fn nothing_of_the_other_story(site: &Site, reported: u64, before: &[Vec<String>; 2]) -> Result<()> {
    ensure!(
        site.tap.highest_flush() == reported,
        "something of the other history was acknowledged"
    );
    ensure!(
        archived(site) == *before,
        "something of the other history was stored"
    );
    Ok(())
}

/// A restore has `rows` rows of the history that was archived, and none of another.
async fn only_the_first_story(site: &Site, begins: &str, rows: u32) -> Result<()> {
    let version = site.primary.version();
    let place = RestoreSite::new(version, &[(REGIONS[0], site.regions[0].as_ref())])?;
    let restored = place.recovered("data", &[]).await?;
    let query = format!("SELECT count(*) FROM story WHERE line LIKE '{begins}%'");
    ensure!(restored.value(&query).await? == rows.to_string());
    ensure!(restored.value("SELECT count(*) FROM story").await? == rows.to_string());
    Ok(())
}

#[tokio::test]
async fn fault_08_a_primary_that_was_rolled_back_is_refused_on_postgresql_15() -> Result<()> {
    a_primary_that_was_rolled_back_is_refused(PgVersion::V15).await
}

#[tokio::test]
async fn fault_08_a_primary_that_was_rolled_back_is_refused_on_postgresql_17() -> Result<()> {
    a_primary_that_was_rolled_back_is_refused(PgVersion::V17).await
}

#[tokio::test]
async fn fault_08_a_primary_that_was_rolled_back_is_refused_on_postgresql_18() -> Result<()> {
    a_primary_that_was_rolled_back_is_refused(PgVersion::V18).await
}

/// A hundred rows of a length that does not depend on `letter`, and then a new segment. Its start, and that of the one before.
async fn a_chapter_of(site: &Site, letter: char) -> Result<(u64, u64)> {
    site.primary
        .sql(&format!(
            "INSERT INTO story SELECT repeat('{letter}', 60) FROM generate_series(1, 100)"
        ))
        .await?;
    let switched = lsn::parse(&site.primary.value("SELECT pg_switch_wal()").await?)?;
    let open = switched.next_multiple_of(site.segment_size());
    Ok((open, open - site.segment_size()))
}

/// Both histories have as many bytes in the segment before, so that the open one begins the same way in both: with what an idle
/// server notes by itself, in which there is no time. The agent has to look into the segment before.
#[tokio::test]
async fn fault_08_a_rolled_back_primary_whose_open_segment_is_nearly_empty_is_refused() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15).conf("autovacuum", "off"), 16).await?;
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    site.primary.sql("CREATE TABLE story (line text)").await?;
    site.all_durable().await?;
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    site.primary.stop(Stop::Fast).await?;
    let kept = site.primary.dir().join("kept");
    process::copy_tree(site.primary.data_dir(), &kept)?;
    site.primary.start_again().await?;
    let (open, closed) = a_chapter_of(&site, 'a').await?;
    let mut agent = site.start_agent().await?;
    // The server's background writer notes the running transactions, at the latest fifteen seconds after something was written.
    let noted = site.durable(open + 1).await;
    noted.with_context(|| agent.last_words())?;
    let name = format!("SELECT pg_walfile_name('{}')", lsn::show(closed + 1));
    let whole = format!("/segment/{}", site.primary.value(&name).await?);
    let stored = || async {
        let has = |held: &S3Snapshot| !archive::keys_with(held, BUCKET, &whole).is_empty();
        site.snapshots().iter().all(has).then_some(())
    };
    eventually("the segment before as a whole", PATIENCE, stored).await?;
    agent.kill9();
    agent.wait_exit(PATIENCE).await?;

    roll_back(&mut site, &kept).await?;
    let before = archived(&site);
    let (reported, end) = (site.tap.highest_flush(), site.stored_ends()[0]);
    ensure!(
        end > open && end < open + (64 << 10),
        "{} bytes of the open segment are archived",
        end.saturating_sub(open)
    );
    ensure!(
        a_chapter_of(&site, 'b').await? == (open, closed),
        "the other history is not as long"
    );
    let as_long = || async {
        let flushed = site.primary.value("SELECT pg_current_wal_flush_lsn()").await;
        (lsn::parse(&flushed.ok()?).ok()? >= end).then_some(())
    };
    eventually("the other history to be as long", PATIENCE, as_long).await?;
    let (code, said) = gives_up(&site).await?;
    ensure!(code == 4, "exit code {code}:\n{said}");
    let place = place_named_in(&said)?;
    ensure!(
        closed < place && place < open,
        "they part in the segment from {} to {}: {said}",
        lsn::show(closed),
        lsn::show(open)
    );
    nothing_of_the_other_story(&site, reported, &before)?;
    only_the_first_story(&site, "aaa", 100).await
}

/// The agent goes on running while its server is replaced by one that it refuses, and that had no slot.
#[tokio::test]
async fn a_running_agent_leaves_no_slot_on_a_server_that_it_refuses() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let mut agent = site.start_agent().await?;
    site.primary.sql("CREATE TABLE story (line text)").await?;
    site.primary.stop(Stop::Fast).await?;
    let kept = site.primary.dir().join("kept");
    process::copy_tree(site.primary.data_dir(), &kept)?;
    std::fs::remove_dir_all(kept.join("pg_replslot/highwater"))?;
    site.primary.start_again().await?;
    site.primary
        .sql("INSERT INTO story SELECT 'what was archived ' || g FROM generate_series(1, 2000) g")
        .await?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    roll_back(&mut site, &kept).await?;
    ensure!(agent.wait_exit(PATIENCE).await? == 4, "{}", agent.last_words());
    let slots = site
        .primary
        .value("SELECT count(*) FROM pg_replication_slots")
        .await?;
    ensure!(slots == "0", "{slots} slots are left:\n{}", agent.last_words());
    Ok(())
}

/// A server process notices only after a moment that its client is gone, and holds the slot until then.
#[tokio::test]
async fn a_slot_is_taken_back_when_the_stream_lets_go() -> Result<()> {
    let server = PgCluster::builder(PgVersion::V15).start().await?;
    let info = ConnInfo::resolve(Some(&server.connection_string()))?;
    let mut connection = Connection::connect(&info, Mode::Replication).await?;
    let at = slot::ensure(&mut connection, &info, "highwater").await?.keeps;
    let start = at.context("the slot keeps nothing")?;
    let stream = connection
        .start_replication(Some("highwater"), start, TimelineId::FIRST)
        .await?;
    let taken = tokio::spawn(async move { slot::take_back(&info, "highwater", at).await });
    let asked = || async { server.log().contains("DROP_REPLICATION_SLOT").then_some(()) };
    eventually("the first attempt to drop it", PATIENCE, asked).await?;
    drop(stream);
    ensure!(taken.await?, "the slot is left");
    let slots = server.value("SELECT count(*) FROM pg_replication_slots").await?;
    ensure!(slots == "0", "{slots} slots are left");
    Ok(())
}

/// One bucket under two names would count twice under policy `all`, and be lost at once.
#[tokio::test]
async fn two_regions_that_are_one_place_are_refused() -> Result<()> {
    let site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let (north, south) = (site.regions[0].endpoint(), site.regions[1].endpoint());
    let alias = north.replace("127.0.0.1", "localhost");
    ensure!(alias != north, "{north} has no other name");
    let [one, other] = &site.regions;
    let key = |server: &S3Server| server.access_key().to_owned();
    let toml = site
        .config()
        .replace(&south, &alias)
        .replace(&key(other), &key(one))
        .replace(other.secret_key(), one.secret_key());
    let said = Program::agent()?.config(&toml)?.arg("check").output().await?;
    ensure!(said.code == 1, "{}", said.said());
    ensure!(said.stdout.contains("are the same place"), "{}", said.said());
    let mut agent = Program::agent()?.config(&toml)?.arg("run").start()?;
    let code = agent.wait_exit(PATIENCE).await?;
    ensure!(code != 0, "it ran");
    ensure!(
        agent.stderr().contains("north") && agent.stderr().contains("same place"),
        "{}",
        agent.stderr()
    );
    let kept = archived(&site);
    ensure!(kept.iter().all(Vec::is_empty), "WAL was stored: {kept:?}");
    Ok(())
}

#[tokio::test]
async fn two_agents_of_one_cluster_do_no_harm() -> Result<()> {
    let site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    let mut first = site.start_agent().await?;
    site.backup().await?;
    let mut second = site.agent()?.arg("run").start()?;
    ledger.grow(100).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(
        first.is_running(),
        "the first agent has left:\n{}",
        first.last_words()
    );
    first.kill9();
    ledger.grow(100).await?;
    let log = ledger.stop().await;
    // The second one waits, or has seen the first one live and leaves: then its supervisor starts it again.
    let supervised = async {
        loop {
            if !second.is_running() {
                second = site.agent()?.arg("run").start()?;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let durable: Result<u64> = tokio::select! {
        ended = supervised => ended,
        durable = site.all_durable() => durable,
    };
    durable.with_context(|| second.last_words())?;
    drop(second);
    for (name, region) in REGIONS.iter().zip(&site.regions) {
        let place = RestoreSite::new(PgVersion::V15, &[(name, region.as_ref())])?;
        log.check(&place.recovered("data", &[]).await?, Expect::everything())
            .await
            .context(*name)?;
        let verify = place.program()?.arg("verify").output().await?;
        ensure!(verify.code == 0, "{name}: {}", verify.said());
    }
    Ok(())
}

#[tokio::test]
async fn after_decommission_the_server_keeps_no_wal_for_the_agent() -> Result<()> {
    let site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let mut agent = site.start_agent().await?;
    ensure!(
        site.primary
            .value("SELECT count(*) FROM pg_replication_slots")
            .await?
            == "1"
    );
    agent.terminate();
    ensure!(agent.wait_exit(PATIENCE).await? == 0, "{}", agent.last_words());
    let decommission: Program = site.agent()?.arg("decommission");
    decommission.output().await?.expect_code(0)?;
    ensure!(
        site.primary
            .value("SELECT count(*) FROM pg_replication_slots")
            .await?
            == "0"
    );
    Ok(())
}

/// A machine is cloned with its disk, or a snapshot of it is started somewhere: that server is on the same timeline and
/// knows nothing else. Production is idle, so that what the copy has is what is archived, and more.
#[tokio::test]
async fn fault_67_a_copy_of_the_disk_that_runs_beside_production_is_refused() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    // Production must not seem to be silent, which after a few intervals it would, even on a machine that stalls.
    site.settings = site.settings.replace("interval = \"1s\"", "interval = \"5s\"");
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    site.primary.sql("CREATE TABLE story (line text)").await?;
    site.all_durable().await?;
    site.primary.stop(Stop::Fast).await?;
    let kept = site.primary.dir().join("clone");
    process::copy_tree(site.primary.data_dir(), &kept)?;
    site.primary.start_again().await?;
    site.all_durable().await?;
    let mut clone = PgCluster::adopt(PgVersion::V15, &kept)?;
    clone.start_again().await?;
    clone
        .sql("INSERT INTO story SELECT 'of the copy ' || g FROM generate_series(1, 2000) g")
        .await?;

    let mut beside = site.agent_at(&clone.connection_string())?.arg("run").start()?;
    let code = beside.wait_exit(PATIENCE).await?;
    let said = beside.last_words();
    ensure!(code == 1, "exit code {code}:\n{said}");
    let holder = format!("pid {}", agent.pid());
    for part in [
        holder.as_str(),
        "is a copy of that one",
        "timeline 1",
        "--take-over",
    ] {
        ensure!(said.contains(part), "{part} is not named:\n{said}");
    }
    let end = site.position().await?;
    ensure!(
        site.stored_ends().iter().all(|stored| *stored <= end),
        "something of the copy is stored"
    );
    let text = "INSERT INTO story VALUES ('of production')";
    site.primary.sql(text).await?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    ensure!(agent.is_running(), "{}", agent.last_words());
    Ok(())
}
