//! What must hold after every run, and at the moment of every crash.
//!
//! Owns: the comparison of the regions, and restoring from each. Reads WAL from the objects' bytes; what is a gap is believed
//! of the names of its records.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use highwater_format::{BackupId, Object};
use highwater_tests::clock::eventually;
use highwater_tests::program::Running;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite};
use highwater_tests::{S3Snapshot, archive, lsn};

use crate::bench::{Backups, Run, SEGMENT, VERSION};

/// Where the WAL of `timeline` ends that follows without a hole, but for gaps on record, on the first of it.
pub(crate) fn end(region: &S3Snapshot, timeline: u32) -> u64 {
    let wal = archive::wal(region, BUCKET, SEGMENT);
    let Some(covered) = wal.get(&timeline) else {
        return 0;
    };
    let gaps = gaps(region, timeline);
    let mut end = covered.start().unwrap_or(0);
    loop {
        let next = over(&gaps, covered.contiguous_end(end));
        if next == end {
            return end;
        }
        end = next;
    }
}

/// The gaps of a timeline that are on record.
pub(crate) fn gaps(region: &S3Snapshot, timeline: u32) -> Vec<(u64, u64)> {
    let keys = archive::keys_with(region, BUCKET, &format!("/wal/{timeline:08X}/gap/"));
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = |key: &String| {
        let (start, end) = key.rsplit('/').next()?.split_once('-')?;
        Some((hex(start)?, hex(end)?))
    };
    keys.iter().filter_map(range).collect()
}

/// Where the gaps lead that begin at or before `at`.
fn over(gaps: &[(u64, u64)], mut at: u64) -> u64 {
    while let Some((_, end)) = gaps.iter().find(|(start, end)| *start <= at && at < *end) {
        at = *end;
    }
    at
}

/// I7: no object of a later timeline was written before the history of that timeline.
pub(crate) fn histories_first(regions: &[S3Snapshot; 2]) -> Result<()> {
    archive::histories_first(regions, BUCKET, SEGMENT)
}

/// Whether `first` is there, and was written before `then`.
pub(crate) fn precedes(region: &S3Snapshot, first: &str, then: &str) -> bool {
    archive::precedes(region, BUCKET, first, then)
}

/// WAL without a hole.
#[derive(PartialEq, Eq)]
struct Stretch {
    start: u64,
    bytes: Vec<u8>,
}

impl Stretch {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

/// The WAL of a timeline in a region from its beginning to `target`, put together from its objects: every object opens, none
/// contradicts another, and there is no hole but what is on record as a gap.
fn wal_of(region: &S3Snapshot, timeline: u32, target: u64) -> Result<Vec<Stretch>> {
    let gaps = gaps(region, timeline);
    let mut stretches: Vec<Stretch> = Vec::new();
    for (start, key, plain) in pieces(region, timeline)? {
        let follows = stretches.last().is_some_and(|last| start <= last.end());
        if !follows {
            let on_record = stretches
                .last()
                .is_none_or(|last| over(&gaps, last.end()) >= start);
            ensure!(on_record, "a hole before {key}");
            stretches.push(Stretch {
                start,
                bytes: Vec::new(),
            });
        }
        let last = stretches.last_mut().context("there is one")?;
        let at = usize::try_from(start - last.start)?;
        let known = (last.bytes.len() - at).min(plain.len());
        ensure!(
            last.bytes[at..at + known] == plain[..known],
            "{key} contradicts another object"
        );
        last.bytes.extend_from_slice(&plain[known..]);
    }
    let last = stretches.last_mut().context("no WAL")?;
    ensure!(last.end() >= target, "it ends at {}", lsn::show(last.end()));
    let needed = target
        .checked_sub(last.start)
        .context("it begins behind the target")?;
    last.bytes.truncate(usize::try_from(needed)?);
    Ok(stretches)
}

/// The objects of a timeline with their content, in order.
fn pieces(region: &S3Snapshot, timeline: u32) -> Result<Vec<(u64, String, Vec<u8>)>> {
    let mut pieces = Vec::new();
    for key in region.keys(BUCKET) {
        let Some((_, start, end)) = archive::range_of(&key, SEGMENT).filter(|(of, ..)| *of == timeline)
        else {
            continue;
        };
        let stored = region.get(BUCKET, &key).context("an object is gone")?;
        let plain = Object::open(stored.bytes.clone())?.plain()?;
        ensure!(
            plain.len() as u64 == end - start,
            "{key} holds {} bytes",
            plain.len()
        );
        pieces.push((start, key, plain));
    }
    pieces.sort();
    Ok(pieces)
}

/// Both regions hold the same WAL of `timeline` up to `target`.
fn same_wal(regions: &[S3Snapshot; 2], timeline: u32, target: u64) -> Result<()> {
    let [north, south] = regions;
    let of = |name: &str, region| {
        wal_of(region, timeline, target).with_context(|| format!("{name}, timeline {timeline}"))
    };
    let (north, south) = (of(REGIONS[0], north)?, of(REGIONS[1], south)?);
    let places = |stretches: &[Stretch]| -> Vec<String> {
        let place = |one: &Stretch| format!("{}-{}", lsn::show(one.start), lsn::show(one.end()));
        stretches.iter().map(place).collect()
    };
    ensure!(
        places(&north) == places(&south),
        "{} holds {:?} of timeline {timeline}, {} {:?}",
        REGIONS[0],
        places(&north),
        REGIONS[1],
        places(&south)
    );
    for (north, south) in north.iter().zip(&south) {
        let differ = north
            .bytes
            .iter()
            .zip(&south.bytes)
            .position(|(one, other)| one != other);
        let differ = differ.map(|at| lsn::show(north.start + at as u64));
        ensure!(
            differ.is_none(),
            "the regions differ from {} on",
            differ.unwrap_or_default()
        );
    }
    Ok(())
}

/// Histories and gap records: both regions have the same ones. Two records of one gap may have been written at different times.
fn same_records(regions: &[S3Snapshot; 2]) -> Result<()> {
    let keys = |part| {
        [
            archive::keys_with(&regions[0], BUCKET, part),
            archive::keys_with(&regions[1], BUCKET, part),
        ]
    };
    let [north, south] = keys("/gap/");
    ensure!(
        north == south,
        "the regions have different gaps: {north:?} {south:?}"
    );
    let [north, south] = keys("/history");
    ensure!(
        north == south,
        "the regions have different histories: {north:?} {south:?}"
    );
    for key in north {
        let [north, south] = regions.each_ref().map(|region| region.get(BUCKET, &key));
        ensure!(
            north.map(|stored| stored.bytes.clone()) == south.map(|stored| stored.bytes.clone()),
            "{key} differs"
        );
    }
    Ok(())
}

impl Run<'_> {
    /// Ends the agent, drops the slot, and judges the state that is left. Nothing is struck any more.
    pub(crate) async fn judge(&self, mut agent: Running, target: u64) -> Result<()> {
        let refused = self.is_refused();
        self.calm();
        agent.terminate();
        let mut code = agent.wait_exit(PATIENCE).await?;
        if refused && matches!(code, 1..=3) {
            // It was about to end for that.
            agent = self.agent("run")?.start()?;
            self.reaches(&mut agent, target, None).await?;
            agent.terminate();
            code = agent.wait_exit(PATIENCE).await?;
        }
        ensure!(code == 0, "{}", agent.last_words());
        let drop_slot = format!("SELECT pg_drop_replication_slot('{}')", self.slot);
        let dropped = || async { self.bench.primary.sql(&drop_slot).await.ok() };
        eventually("the slot to be free", PATIENCE, dropped).await?;
        let regions = self.snapshots();
        self.is_lawful()?;
        for (timeline, switch) in &self.bench.left {
            same_wal(&regions, *timeline, *switch)?;
        }
        same_wal(&regions, self.bench.timeline, target)?;
        same_records(&regions)?;
        self.same_backups()
    }

    /// The backup that was struck may have become visible in one region only, where it is whole; all others are in both.
    fn same_backups(&self) -> Result<()> {
        let [north, south] = [self.backups(0), self.backups(1)];
        let single: Vec<_> = north.symmetric_difference(&south).collect();
        let newest_in_both = north.last() == south.last();
        ensure!(
            single.len() <= 1 && newest_in_both,
            "the regions have different backups: {north:?} {south:?}"
        );
        Ok(())
    }

    /// Every visible backup that no gap follows can be planned with from either region alone; one end state of each kind is
    /// restored.
    pub(crate) async fn restorable(&self, target: u64) -> Result<()> {
        for region in 0..2 {
            for id in self.backups(region) {
                if !self.is_cut_off(region, &id, target)? {
                    self.plans(region, &id, target, 0).await?;
                }
            }
        }
        let state = [self.begun_and_done(0), self.begun_and_done(1)];
        if self.bench.is_new(state) {
            for (region, name) in REGIONS.iter().enumerate() {
                self.restores(region, target)
                    .await
                    .with_context(|| format!("from {name}, with the backups {state:?}"))?;
            }
        }
        Ok(())
    }

    fn begun_and_done(&self, region: usize) -> Backups {
        let keys = self.regions[region].objects(BUCKET);
        let begun: BTreeSet<&str> = keys
            .iter()
            .filter_map(|key| key.split_once("/base/")?.1.split('/').next())
            .collect();
        let done = self.backups(region).len();
        (done, begun.len() - done)
    }

    /// What the program says of restoring this backup from this region alone.
    async fn plans(&self, region: usize, id: &str, target: u64, code: i32) -> Result<()> {
        let place = self.place(region)?;
        let plan = place
            .program()?
            .args(["plan", "--backup", id, "--to-lsn", &lsn::show(target)]);
        plan.output().await?.expect_code(code).map(drop)
    }

    /// Whether a gap lies between this base backup and `target`.
    fn is_cut_off(&self, region: usize, id: &str, target: u64) -> Result<bool> {
        let start = BackupId::parse(id)?.start_lsn().0;
        let gaps = gaps(&self.regions[region].snapshot(), self.bench.timeline);
        Ok(gaps.iter().any(|(from, _)| start <= *from && *from < target))
    }

    fn place(&self, region: usize) -> Result<RestoreSite> {
        RestoreSite::new(VERSION, &[(REGIONS[region], &self.regions[region])])
    }

    /// With a policy that one region satisfies, what the server wrote when the agent was stopped may be in one of them only.
    fn place_of_the_newest(&self, region: usize) -> Result<RestoreSite> {
        if self.policy != "any" {
            return self.place(region);
        }
        let regions: Vec<_> = REGIONS.into_iter().zip(&self.regions).collect();
        RestoreSite::new(VERSION, &regions)
    }

    /// The visible base backups.
    pub(crate) fn backups(&self, region: usize) -> BTreeSet<String> {
        let keys = self.regions[region].objects(BUCKET);
        let id = |key: &String| Some(key.strip_suffix("/backup.json")?.rsplit('/').next()?.to_owned());
        keys.iter().filter_map(id).collect()
    }

    /// Verifies one region, restores every visible backup of it, starts it and looks into the table. Across a gap it is refused.
    async fn restores(&self, region: usize, target: u64) -> Result<()> {
        self.place(region)?
            .program()?
            .arg("verify")
            .output()
            .await?
            .expect_code(0)?;
        let mut restored = 0;
        for (number, id) in self.backups(region).iter().enumerate() {
            if self.is_cut_off(region, id, target)? {
                self.plans(region, id, target, 1).await?;
                continue;
            }
            let place = self.place_of_the_newest(region)?;
            let cluster = place
                .recovered(&format!("data{number}"), &["--backup", id])
                .await?;
            let newest = format!("SELECT count(*) FROM t WHERE {}", self.bench.newest);
            ensure!(
                cluster.value(&newest).await? != "0",
                "backup {id} restores no row of which {}",
                self.bench.newest
            );
            restored += 1;
        }
        ensure!(restored > 0, "no base backup could be restored");
        Ok(())
    }
}
