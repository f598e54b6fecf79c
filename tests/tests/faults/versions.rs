//! Buckets that keep versions: what was deleted is out of the way, and can be read as of an earlier time.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_store::{ErrorKind, Object, PutMode, RegionConfig, Store, list_all};
use highwater_tests::clock::{eventually, second_over, unix_micros};
use highwater_tests::ledger::Expect;
use highwater_tests::program::Running;
use highwater_tests::s3::{KeyPair, Rights};
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site, config};
use highwater_tests::{Ledger, PgCluster, S3Server, archive};

use crate::support::{VERSION, answers, both_hold, from_both, from_region, leave};

/// A site whose buckets keep versions.
async fn site() -> Result<Site> {
    let site = Site::start(PgCluster::builder(VERSION), 1).await?;
    site.regions
        .iter()
        .for_each(|region| region.keep_versions(BUCKET));
    Ok(site)
}

/// The present as `--as-of` takes it, returned when its second is over.
async fn moment() -> Result<String> {
    let moment = second_over().await?;
    Ok(Time::from_unix_micros(unix_micros(moment)).to_string())
}

async fn open(region: &S3Server, pair: &KeyPair) -> Result<Arc<dyn Store>> {
    let mut config = RegionConfig::new("attacked", format!("s3://{BUCKET}/prod"));
    config.endpoint = Some(region.endpoint());
    config.access_key_id = Some(pair.access_key.clone());
    config.secret_access_key = Some(pair.secret_key.clone().into());
    Ok(highwater_store::open(&config).await?)
}

/// Whoever has the agent's keys cannot delete, and writes over everything. Whoever may delete objects deletes them all; what
/// neither may is to delete versions.
async fn ransom(region: &S3Server) -> Result<()> {
    let agents = open(region, region.key_pair(Rights::NoDelete)).await?;
    let all = list_all(agents.as_ref(), "", None).await?;
    ensure!(all.len() > 10, "there is not much to lose: {all:?}");
    for meta in &all {
        let refused = agents.delete(&meta.key).await.err();
        let refused = refused.map(|error| error.kind());
        ensure!(refused == Some(ErrorKind::Operator), "{refused:?}");
        let note = Object::new("pay, or lose it");
        agents.put(&meta.key, note, PutMode::Overwrite).await?;
    }
    let others = open(region, region.key_pair(Rights::All)).await?;
    for meta in &all {
        others.delete(&meta.key).await?;
    }
    ensure!(region.objects(BUCKET).is_empty());
    Ok(())
}

/// A base backup and some segments, with the agent and the ledger that go on.
async fn archived(site: &Site) -> Result<(Running, Ledger)> {
    let agent = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    for _ in 0..3 {
        ledger.grow(30).await?;
        site.primary.sql("SELECT pg_switch_wal()").await?;
    }
    Ok((agent, ledger))
}

/// Every object of both regions is overwritten and then deleted. Nothing is left of the archive but its past, and as of the
/// moment before all of it comes back, base backup and WAL.
#[tokio::test]
async fn fault_49_an_archive_that_was_deleted_is_restored_as_of_the_moment_before() -> Result<()> {
    let site = site().await?;
    let (agent, ledger) = archived(&site).await?;
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;
    leave(agent).await?;

    let before = moment().await?;
    for region in &site.regions {
        ransom(region).await?;
    }
    let place = from_both(&site)?;
    let list = place.program()?.arg("list").output().await?;
    answers(&list, 1, &["there is no archive of cluster orders"])?;
    let never = place.run("never", &[]).await?;
    answers(&never, 1, &["there is no archive of cluster orders"])?;

    for command in ["list", "plan", "verify"] {
        let said = place
            .program()?
            .args([command, "--as-of", &before])
            .output()
            .await?
            .expect_code(0)?;
        ensure!(
            command != "list" || said.stdout.contains(" as of 20"),
            "{}",
            said.said()
        );
    }
    let restored = place.recovered("data", &["--as-of", &before]).await?;
    log.check(&restored, Expect::everything()).await?;
    let south = from_region(&site, 1)?;
    let run = south.run("noted", &["--as-of", &before]).await?.expect_code(0)?;
    ensure!(run.said().contains("was read as of"), "{}", run.said());

    // After the attack there is nothing, whatever version is asked for.
    let after = moment().await?;
    let said = place
        .program()?
        .args(["list", "--as-of", &after])
        .output()
        .await?;
    answers(&said, 1, &["there is no archive of cluster orders"])
}

/// What cannot be meant is refused before anything is asked.
#[tokio::test]
async fn fault_49_a_past_that_is_not_there_is_refused_by_name() -> Result<()> {
    let region = S3Server::start().await?;
    region.create_bucket(BUCKET);
    let disk = "[[region]]\nname = \"disk\"\nurl = \"file:///nonexistent/highwater\"\n";
    let toml = config(None, &[(REGIONS[0], &region)]) + disk;
    let place = RestoreSite::with_config(VERSION, &toml)?;
    let list = async |arguments: &[&str]| place.program()?.arg("list").args(arguments).output().await;
    let past = ["--as-of", "2026-01-02T03:04:05Z"];
    let words = ["disk", "keeps no versions", "--without-region disk"];
    answers(&list(&past).await?, 2, &words)?;
    answers(
        &list(&["--as-of", "2026-01-02 03:04:05"]).await?,
        2,
        &["has no zone"],
    )?;
    answers(
        &list(&["--as-of", "2999-01-02T03:04:05Z"]).await?,
        2,
        &["lies in the future"],
    )?;
    ensure!(region.counters().total() == 0, "a region was asked");
    let without = [&past[..], &["--without-region", "disk"]].concat();
    answers(&list(&without).await?, 1, &["there is no archive"])
}

/// Some objects were deleted and written again in the one bucket, others only deleted in the other one. The agent goes on where
/// it was, fills what is gone and writes over delete markers; each bucket alone can be restored, as it is.
#[tokio::test]
async fn fault_38_delete_markers_and_older_versions_are_in_nobodys_way() -> Result<()> {
    let site = site().await?;
    let (agent, ledger) = archived(&site).await?;
    let end = site.all_durable().await?;
    both_hold(&site, end).await?;
    leave(agent).await?;

    let [north, south] = &site.regions;
    for key in north.objects(BUCKET).iter().step_by(2) {
        let bytes = north.get(BUCKET, key).context("it is gone")?.bytes.clone();
        north.delete(BUCKET, key);
        north.put(BUCKET, key, bytes);
    }
    let [segments, tails] =
        ["/segment/", "/tail/"].map(|part| archive::keys_with(&south.snapshot(), BUCKET, part));
    // All of them behind the base backup: what lies before it is of no use and does not come back.
    let deleted: Vec<&String> = segments.iter().rev().step_by(2).take(2).collect();
    ensure!(deleted.len() == 2, "{segments:?}");
    for key in deleted.iter().copied().chain(tails.last()) {
        ensure!(south.delete(BUCKET, key), "{key}");
    }
    let agent = site.start_agent().await?;
    let back = || async {
        let there = south.objects(BUCKET);
        deleted.iter().all(|key| there.contains(key)).then_some(())
    };
    let filled = eventually("the deleted segments to come back", PATIENCE, back).await;
    filled.with_context(|| agent.last_words())?;
    ledger.grow(40).await?;
    let log = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    both_hold(&site, end).await?;
    leave(agent).await?;
    for (index, name) in REGIONS.iter().enumerate() {
        let place = from_region(&site, index)?;
        place.program()?.arg("list").output().await?.expect_code(0)?;
        let restored = place.recovered("data", &[]).await?;
        log.check(&restored, Expect::everything())
            .await
            .with_context(|| format!("from {name}"))?;
    }
    Ok(())
}
