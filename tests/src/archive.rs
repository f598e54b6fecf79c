//! What an archive holds, read from the names of its objects alone.
//!
//! A second opinion: it shares no code with the product, so that a wrong position of the agent is
//! not excused by the same mistake here. It trusts names; that the bytes behind them are right is
//! shown by restoring.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::s3::S3Snapshot;
use crate::site::REGIONS;

/// The WAL of one timeline: ranges by their start, merged where they meet or overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    runs: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Adds `start` to `end`.
    pub fn add(&mut self, mut start: u64, mut end: u64) {
        let touching: Vec<u64> = self
            .runs
            .range(..=end)
            .filter(|(_, run_end)| **run_end >= start)
            .map(|(run, _)| *run)
            .collect();
        for run in touching {
            if let Some(run_end) = self.runs.remove(&run) {
                start = start.min(run);
                end = end.max(run_end);
            }
        }
        self.runs.insert(start, end);
    }

    /// The end of the run that holds `from`; `from` itself when none does.
    #[must_use]
    pub fn contiguous_end(&self, from: u64) -> u64 {
        match self.runs.range(..=from).next_back() {
            Some((_, end)) if *end >= from => *end,
            _ => from,
        }
    }

    /// The first position of the first run.
    #[must_use]
    pub fn start(&self) -> Option<u64> {
        self.runs.keys().next().copied()
    }

    /// The runs, in order. More than one means a hole.
    #[must_use]
    pub fn runs(&self) -> Vec<(u64, u64)> {
        self.runs.iter().map(|(start, end)| (*start, *end)).collect()
    }
}

/// The WAL that `bucket` holds, by timeline.
#[must_use]
pub fn wal(snapshot: &S3Snapshot, bucket: &str, segment_size: u64) -> BTreeMap<u32, Coverage> {
    let mut timelines: BTreeMap<u32, Coverage> = BTreeMap::new();
    for key in snapshot.keys(bucket) {
        if let Some((timeline, start, end)) = range_of(&key, segment_size) {
            timelines.entry(timeline).or_default().add(start, end);
        }
    }
    timelines
}

/// The end of the WAL that follows without a hole on the first of what `bucket` holds of `timeline`;
/// 0 when it holds nothing.
#[must_use]
pub fn wal_end(snapshot: &S3Snapshot, bucket: &str, timeline: u32, segment_size: u64) -> u64 {
    let timelines = wal(snapshot, bucket, segment_size);
    let covered = timelines.get(&timeline);
    covered
        .and_then(|covered| covered.start().map(|start| covered.contiguous_end(start)))
        .unwrap_or(0)
}

/// Timeline, start and end of a key that holds WAL.
#[must_use]
pub fn range_of(key: &str, segment_size: u64) -> Option<(u32, u64, u64)> {
    let (_, below) = key.split_once("/wal/")?;
    let mut parts = below.split('/');
    let timeline = u32::from_str_radix(parts.next()?, 16).ok()?;
    let (kind, name) = (parts.next()?, parts.next()?);
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    match kind {
        "tail" => {
            let (start, end) = name.split_once('-')?;
            Some((timeline, hex(start)?, hex(end)?))
        }
        "segment" => {
            let start = (hex(name.get(8..16)?)? << 32) + hex(name.get(16..24)?)? * segment_size;
            Some((timeline, start, start + segment_size))
        }
        _ => None,
    }
}

/// Keys of `bucket` that contain `part`.
#[must_use]
pub fn keys_with(snapshot: &S3Snapshot, bucket: &str, part: &str) -> Vec<String> {
    let mut keys = snapshot.keys(bucket);
    keys.retain(|key| key.contains(part));
    keys
}

/// Whether `first` is there, and was written before `then`.
#[must_use]
pub fn precedes(snapshot: &S3Snapshot, bucket: &str, first: &str, then: &str) -> bool {
    let written = |key| snapshot.get(bucket, key).map(|stored| stored.sequence);
    matches!((written(first), written(then)), (Some(first), Some(then)) if first < then)
}

/// I7: by the order in which each region took its objects, none of a later timeline came before the history of that timeline.
///
/// # Errors
/// The first object that did.
pub fn histories_first(regions: &[S3Snapshot; 2], bucket: &str, segment_size: u64) -> Result<()> {
    for (name, region) in REGIONS.iter().zip(regions) {
        for key in region.keys(bucket) {
            let Some((2.., ..)) = range_of(&key, segment_size) else {
                continue;
            };
            let (dir, _) = key
                .rsplit_once('/')
                .and_then(|(dir, _)| dir.rsplit_once('/'))
                .context("a short key")?;
            ensure!(
                precedes(region, bucket, &format!("{dir}/history"), &key),
                "{name} had {key} before the history of its timeline"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::S3Server;

    #[tokio::test]
    async fn wal_that_came_before_its_history_is_noticed() -> Result<()> {
        let (history, wal) = (
            "p/orders/7/wal/00000002/history",
            "p/orders/7/wal/00000002/tail/0000000002000028-0000000002000100",
        );
        let of_the_first = wal.replace("00000002/tail", "00000001/tail");
        for (keys, lawful) in [
            (&[&*of_the_first, history, wal][..], true),
            (&[&*of_the_first, wal, history][..], false),
            (&[&*of_the_first, wal][..], false),
        ] {
            let server = S3Server::start().await?;
            server.create_bucket("b");
            keys.iter().for_each(|key| server.put("b", key, "x"));
            for regions in [
                [S3Snapshot::default(), server.snapshot()],
                [server.snapshot(), S3Snapshot::default()],
            ] {
                let judged = histories_first(&regions, "b", 1 << 20);
                assert_eq!(judged.is_ok(), lawful, "{keys:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn names_of_segments_and_tail_chunks_are_read() {
        let segment = "p/orders/7/wal/00000002/segment/000000020000000100000003";
        assert_eq!(
            range_of(segment, 0x100_0000),
            Some((2, 0x1_0300_0000, 0x1_0400_0000))
        );
        let tail = "p/orders/7/wal/00000001/tail/0000000002000028-0000000002000100";
        assert_eq!(range_of(tail, 0x100_0000), Some((1, 0x200_0028, 0x200_0100)));
        assert_eq!(range_of("p/orders/7/wal/00000002/history", 0x100_0000), None);
        assert_eq!(range_of("p/orders/7/pulse.json", 0x100_0000), None);
    }

    #[test]
    fn runs_merge_where_they_meet_and_show_holes() {
        let mut coverage = Coverage::default();
        for (start, end) in [(10, 20), (30, 40), (20, 25), (12, 15), (24, 28)] {
            coverage.add(start, end);
        }
        assert_eq!(coverage.runs(), [(10, 28), (30, 40)]);
        assert_eq!(
            (
                coverage.contiguous_end(10),
                coverage.contiguous_end(29),
                coverage.contiguous_end(35)
            ),
            (28, 29, 40)
        );
        coverage.add(28, 30);
        assert_eq!(coverage.runs(), [(10, 40)]);
    }
}
