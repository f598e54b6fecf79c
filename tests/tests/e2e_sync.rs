//! As a synchronous standby: a commit returns only when both regions hold it, so nothing that was
//! acknowledged can be lost, however the machine ends.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::ledger::{Expect, Pace};
use highwater_tests::site::{REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, S3Server};

#[tokio::test]
async fn every_acknowledged_commit_survives() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    site.settings = "[wal]\nflush_interval = \"1s\"\nsynchronous = true\n".to_owned();
    let mut agent = site.start_agent().await?;
    site.backup().await?;
    site.primary
        .sql("ALTER SYSTEM SET synchronous_standby_names = 'highwater'")
        .await?;
    site.primary.sql("SELECT pg_reload_conf()").await?;
    for region in &site.regions {
        region.faults().delay(Some(Duration::from_millis(5)));
    }
    let pace = Pace {
        clients: 8,
        pause: Duration::ZERO,
        ..Pace::default()
    };
    let ledger = Ledger::start_paced(&site.primary, pace).await?;
    ledger.grow(300).await?;

    // In this order: what the regions get after the notes were taken does not count.
    let log = ledger.log();
    let copies = site.snapshots();
    site.primary.kill9();
    agent.kill9();
    ledger.stop().await;
    for (name, copy) in REGIONS.iter().zip(copies) {
        let frozen = S3Server::serve(copy).await?;
        let place = RestoreSite::new(PgVersion::V15, &[(name, &frozen)])?;
        place.run("data", &[]).await?.expect_code(0)?;
        let mut restored = PgCluster::adopt(PgVersion::V15, &place.data("data"))?;
        restored.start_again().await?;
        restored.value("SELECT pg_promote()").await.ok();
        // Rows that were acknowledged after the notes were taken may be there as well.
        let rows = restored.sql("SELECT client, number FROM ledger").await?;
        for entry in &log.entries {
            let row = vec![Some(entry.client.to_string()), Some(entry.number.to_string())];
            ensure!(
                rows.contains(&row),
                "{name} misses row {} of client {}",
                entry.number,
                entry.client
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn without_a_region_commits_wait_and_go_on_when_it_is_back() -> Result<()> {
    let mut site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    site.settings = "[wal]\nsynchronous = true\n".to_owned();
    let agent = site.start_agent().await?;
    site.backup().await?;
    site.primary
        .sql("ALTER SYSTEM SET synchronous_standby_names = 'highwater'")
        .await?;
    site.primary.sql("SELECT pg_reload_conf()").await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(20).await?;
    site.regions[0].faults().freeze();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let stuck = ledger.acknowledged();
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(
        ledger.acknowledged() == stuck,
        "commits were acknowledged while a region was frozen"
    );
    site.regions[0].faults().thaw();
    ledger.grow(20).await.context("after the thaw")?;
    let log = ledger.stop().await;
    site.all_durable().await?;
    drop(agent);
    let place = RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}
