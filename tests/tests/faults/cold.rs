//! Objects that a lifecycle rule has moved to an archive tier: they are listed, and cannot be read until somebody brings them
//! back. Nobody calls them whole, lost or past the end.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use highwater_tests::PgCluster;
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::s3::Operation;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS};

use crate::damage::Victim;
use crate::restore::with_segments;
use crate::support::{VERSION, answers, from_both, from_region, leave};

const CODE: &str = "InvalidObjectState";
/// The advice that belongs to it.
const ADVICE: &str = "restore it there first";

/// A segment in the middle, and no chunk holds its WAL: the other region is read instead. Where there is none, recovery
/// stops before it, and goes on when it is back.
#[tokio::test]
async fn fault_47_a_segment_in_a_colder_class_is_named_and_never_passed_over() -> Result<()> {
    let (site, log) = with_segments().await?;
    let north = &site.regions[0];
    let victim = Victim::of(north, site.segment_size())?;
    victim.without_chunks(north)?;
    north.faults().archive_tier(&victim.key);

    let both = from_both(&site)?;
    let verify = both.program()?.arg("verify").output().await?;
    answers(&verify, 3, &[REGIONS[0], victim.name(), CODE, ADVICE])?;
    ensure!(
        !verify.said().contains("everything is whole"),
        "{}",
        verify.said()
    );
    let restored = both.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    ensure!(
        north.counters().answered(CODE) > 1,
        "only `verify` has asked for it: the restore proves nothing"
    );

    let alone = from_region(&site, 0)?;
    let verify = alone.program()?.arg("verify").output().await?;
    answers(&verify, 3, &[victim.name(), CODE, ADVICE])?;
    let run = alone.program()?.args(["run", "--start", "--into"]);
    let run = run.arg(alone.data("data")).arg("--bin").arg(VERSION.bin()?);
    let run = run.output().await?;
    answers(&run, 3, &[victim.name(), CODE, ADVICE])?;
    let data = alone.data("data");
    ensure!(data.join("recovery.signal").exists(), "recovery was given up");
    ensure!(
        !data.join("pg_wal/00000002.history").exists(),
        "it was opened on a new timeline"
    );
    // Brought back, it is only a matter of starting the server again.
    north.faults().clear();
    let mut server = PgCluster::adopt(VERSION, &data)?;
    server.start_again().await?;
    alone.until_writable(&server).await?;
    log.check(&server, Expect::everything()).await?;
    Ok(())
}

/// What one region lacks can be copied from nowhere: new WAL goes on meanwhile, the copy is tried again at the healer's pace
/// and said each time, and it is done when the object is back.
#[tokio::test]
async fn fault_47_a_colder_class_holds_up_neither_the_stream_nor_itself() -> Result<()> {
    let (mut site, _) = with_segments().await?;
    site.settings += "[heal]\ninterval = \"1s\"\n";
    let [north, south] = &site.regions;
    let victim = Victim::of(north, site.segment_size())?;
    for region in [north, south] {
        victim.without_chunks(region)?;
    }
    south.delete(BUCKET, &victim.key);
    north.faults().archive_tier(&victim.key);

    let agent = site.start_agent().await?;
    let refusals = || north.counters().answered(CODE);
    let tried = |times: u64| move || async move { (refusals() >= times).then_some(()) };
    eventually("the first attempt to copy it", PATIENCE, tried(1))
        .await
        .with_context(|| agent.last_words())?;
    let (began, asked, refused) = (
        Instant::now(),
        north.counters().requests(Operation::Get),
        refusals(),
    );
    site.primary.sql("CREATE TABLE meanwhile ()").await?;
    site.all_durable().await.with_context(|| agent.last_words())?;
    eventually("further attempts", PATIENCE, tried(refused + 3))
        .await
        .with_context(|| agent.last_words())?;
    let asked = north.counters().requests(Operation::Get) - asked;
    ensure!(
        asked < 40 * (began.elapsed().as_secs() + 2),
        "{asked} reads in {:?}",
        began.elapsed()
    );
    let said = agent.stderr();
    ensure!(said.contains(victim.name()) && said.contains(CODE), "{said}");

    north.faults().clear();
    let filled = || async { south.get(BUCKET, &victim.key).map(drop) };
    eventually("the segment in the other region", PATIENCE, filled)
        .await
        .with_context(|| agent.last_words())?;
    leave(agent).await?;
    Ok(())
}
