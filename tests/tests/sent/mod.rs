//! Whether stored bytes are the bytes that PostgreSQL sent, as the tap has kept them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use highwater_format::Object;

use highwater_tests::site::{BUCKET, Site};
use highwater_tests::{S3Server, archive, lsn};

/// Most that one message of the stream carries.
const LONGEST: u64 = 1 << 20;

/// Compares all WAL of both regions with what was sent since the tap began to keep it, on a server that kept its timeline.
///
/// # Errors
/// At the first byte that differs; when less than `least` bytes of a region could be compared.
pub(crate) fn holds_what_was_sent(site: &Site, least: u64) -> Result<()> {
    let sent = site.tap.recorded();
    for region in &site.regions {
        let compared = compared(region, &sent, site.segment_size())?;
        ensure!(compared >= least, "only {compared} bytes were compared");
    }
    Ok(())
}

/// Every byte of the WAL objects of one region equals what went over the wire; how many there are of which that is known.
fn compared(server: &S3Server, sent: &BTreeMap<u64, Bytes>, segment: u64) -> Result<u64> {
    let mut compared = 0;
    for key in server.objects(BUCKET) {
        let Some((_, start, end)) = archive::range_of(&key, segment) else {
            continue;
        };
        let stored = server.get(BUCKET, &key).context("an object is gone")?;
        let plain = Object::open(stored.bytes.clone())?.plain()?;
        ensure!(
            plain.len() as u64 == end - start,
            "{key} holds {} bytes",
            plain.len()
        );
        for (at, bytes) in sent.range(start.saturating_sub(LONGEST)..end) {
            let (from, to) = ((*at).max(start), (at + bytes.len() as u64).min(end));
            if from >= to {
                continue;
            }
            let cut = |base: u64| {
                usize::try_from(from - base).unwrap_or(0)..usize::try_from(to - base).unwrap_or(0)
            };
            let same = plain.get(cut(start)) == bytes.get(cut(*at));
            ensure!(same, "{key} differs from what was sent at {}", lsn::show(from));
            compared += to - from;
        }
    }
    Ok(compared)
}
