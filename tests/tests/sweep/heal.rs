//! The healer's copies: what is gone at rest from one region comes back from the other.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use highwater_format::{Backup, decode};
use highwater_tests::clock::eventually;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS};
use highwater_tests::{S3Snapshot, archive};

use crate::bench::{Bench, Law, Run, SEGMENT};
use crate::blow::{Blow, name_of, sweep};
use crate::judge::precedes;
use crate::timeline::promoted;

/// The regions are compared every second.
const HEALING: &str =
    "[wal]\nflush_interval = \"100ms\"\n[pulse]\ninterval = \"5m\"\n[heal]\ninterval = \"1s\"\n";

/// What the healer has to put back.
struct Lost {
    bench: Bench,
    /// Everything that both regions had before.
    whole: S3Snapshot,
}

/// Two timelines, each with a base backup. The first region has lost the newer base backup and the WAL that it needs, the
/// second one the history, a pack of the older base backup, and a segment of each timeline.
async fn lost() -> Result<Lost> {
    let mut bench = promoted(HEALING).await?;
    let run = bench.run("whole".to_owned()).await?;
    let target = bench.write(1).await?;
    let mut agent = run.streams_to(target, None).await?;
    run.agent("backup")?.output().await?.expect_code(0)?;
    bench.write(1).await?;
    let target = bench.write(2).await?;
    run.reaches(&mut agent, target, None).await?;
    run.judge(agent, target).await?;
    let [north, south] = run.left().await?;
    drop(run);
    let (older, newer) = (backup(&south, 1)?, backup(&north, 2)?);
    let of_newer = format!("/base/{}/", newer.id);
    let needed = (newer.start_lsn.0, newer.stop_lsn.0);
    let pack = format!("/base/{}/pack/", older.id);
    let packs = archive::keys_with(&south, BUCKET, &pack);
    let pack = packs.last().context("no pack")?;
    let [one, two] = [
        in_the_middle(&south, 1, older.start_lsn.0)?,
        in_the_middle(&south, 2, 0)?,
    ];
    bench.before = [
        north
            .clone()
            .filtered(|key, _| !key.contains(&of_newer) && !is_within(key, 2, needed)),
        south.clone().filtered(|key, _| {
            let gone = key == pack || key.ends_with("/history");
            !gone && !is_within(key, 1, one) && !is_within(key, 2, two)
        }),
    ];
    let whole = north;
    bench.law = mark_last(&whole, &newer);
    Ok(Lost { bench, whole })
}

/// The base backup of a timeline.
fn backup(region: &S3Snapshot, timeline: u32) -> Result<Backup> {
    for key in archive::keys_with(region, BUCKET, "/backup.json") {
        let backup: Backup = decode(&region.get(BUCKET, &key).context("gone")?.bytes)?;
        if backup.timeline.get() == timeline {
            return Ok(backup);
        }
    }
    anyhow::bail!("timeline {timeline} has no base backup")
}

/// The range of a segment of `timeline` behind `start` that is not the last one.
fn in_the_middle(region: &S3Snapshot, timeline: u32, start: u64) -> Result<(u64, u64)> {
    let segments = archive::keys_with(region, BUCKET, &format!("/wal/{timeline:08X}/segment/"));
    let ranges = segments.iter().filter_map(|key| archive::range_of(key, SEGMENT));
    let behind: Vec<_> = ranges.filter(|(_, from, _)| *from > start).collect();
    ensure!(
        behind.len() > 1,
        "timeline {timeline} has {} segments",
        behind.len()
    );
    let (_, start, end) = behind[(behind.len() - 1) / 2];
    Ok((start, end))
}

/// Whether an object holds WAL of this range.
fn is_within(key: &str, of: u32, (from, to): (u64, u64)) -> bool {
    archive::range_of(key, SEGMENT)
        .is_some_and(|(timeline, start, end)| timeline == of && start < to && from < end)
}

/// I9: where the first region has the mark of the base backup, it has all that belongs to it, and had it before.
fn mark_last(whole: &S3Snapshot, backup: &Backup) -> Law {
    let base = archive::keys_with(whole, BUCKET, &format!("/base/{}/", backup.id));
    let (marks, parts): (Vec<_>, Vec<_>) = base.into_iter().partition(|key| key.ends_with("/backup.json"));
    let (timeline, start, stop) = (backup.timeline.get(), backup.start_lsn.0, backup.stop_lsn.0);
    Box::new(move |[north, _]| {
        for mark in marks.iter().filter(|mark| north.get(BUCKET, mark).is_some()) {
            for part in &parts {
                ensure!(precedes(north, part, mark), "{mark} was there before {part}");
            }
            let older = north.clone().filtered(|key, _| precedes(north, key, mark));
            let wal = archive::wal(&older, BUCKET, SEGMENT);
            let held = wal
                .get(&timeline)
                .map_or(start, |held| held.contiguous_end(start));
            ensure!(held >= stop, "{mark} was there before its WAL");
        }
        Ok(())
    })
}

impl Run<'_> {
    /// An agent that starts brings the histories of its server with it: the second region loses this one once more, beside the
    /// running agent, so that it is the healer's to copy.
    async fn loses_history(&self) -> Result<()> {
        let south = &self.regions[1];
        let brought =
            || async { archive::keys_with(&south.snapshot(), BUCKET, "/wal/00000002/history").pop() };
        let key = eventually("the history in both regions", PATIENCE, brought).await?;
        ensure!(south.delete(BUCKET, &key), "{key} is gone");
        Ok(())
    }
}

impl Lost {
    /// Whether both regions have, byte for byte, all that they had, but for chunks that segments made superfluous.
    fn is_back(&self, run: &Run<'_>) -> bool {
        let missing = |region: &S3Snapshot| {
            let lacks = |key: &String| !self.is_same(region, key);
            self.needed().iter().any(lacks)
        };
        !run.snapshots().iter().any(missing)
    }

    fn is_same(&self, region: &S3Snapshot, key: &str) -> bool {
        let bytes = |region: &S3Snapshot| region.get(BUCKET, key).map(|stored| stored.bytes.clone());
        bytes(region) == bytes(&self.whole)
    }

    fn needed(&self) -> BTreeSet<String> {
        let mut keys = self.whole.keys(BUCKET);
        keys.retain(|key| key.contains("/base/") || (key.contains("/wal/") && !key.contains("/tail/")));
        keys.into_iter().collect()
    }

    /// One run with an agent that streams before it is struck. Whether it was.
    async fn heals(&self, nth: u64, blow: Blow) -> Result<bool> {
        let run = self.bench.run(name_of(nth, blow)).await?;
        let mut agent = run.agent("run")?.start()?;
        agent.says("streaming", PATIENCE).await?;
        run.loses_history().await?;
        run.strike(nth, blow);
        run.until(&mut agent, Some(blow), || self.is_back(&run)).await?;
        let struck = run.struck();
        run.calm();
        let target = self.bench.commit().await?;
        run.reaches(&mut agent, target, None).await?;
        agent.says("streaming", PATIENCE).await?;
        run.judge(agent, target).await?;
        run.restorable(target).await?;
        for region in 0..REGIONS.len() {
            ensure!(run.backups(region).len() == 2, "{:?}", run.backups(region));
        }
        Ok(struck)
    }
}

#[tokio::test]
async fn every_request_of_the_healer_may_fail_or_be_the_last() -> Result<()> {
    let lost = lost().await?;
    let struck = sweep(|nth, blow| lost.heals(nth, blow)).await?;
    ensure!(struck > 15, "only {struck} requests were struck");
    Ok(())
}
