//! Whether stored bytes are the bytes that PostgreSQL sent, as the taps have kept them (I3).

use anyhow::{Context, Result, ensure};
use highwater_format::Object;

use highwater_tests::site::{BUCKET, Site};
use highwater_tests::tap::{FeedbackTap, Recorded};
use highwater_tests::{S3Server, archive, lsn};

/// Most that one message of the stream carries.
const LONGEST: u64 = 1 << 20;

/// Compares all WAL of both regions with what was sent through the site's tap, which keeps it since the agent began.
///
/// # Errors
/// As [`equals`].
pub(crate) fn holds_what_was_sent(site: &Site) -> Result<()> {
    equals(site, &[&site.tap])
}

/// The same for agents behind several taps.
///
/// # Errors
/// At the first byte that differs, or that nobody has sent; where a region holds hardly anything.
pub(crate) fn equals(site: &Site, taps: &[&FeedbackTap]) -> Result<()> {
    let sent: Vec<Recorded> = taps.iter().map(|tap| tap.recorded()).collect();
    for region in &site.regions {
        let stored = compared(region, &sent, site.segment_size())?;
        ensure!(stored >= 100_000, "only {stored} bytes were compared");
    }
    Ok(())
}

/// Every byte of the WAL objects of one region equals what went over the wire; how many there are.
fn compared(server: &S3Server, sent: &[Recorded], segment: u64) -> Result<u64> {
    let mut compared = 0;
    for key in server.objects(BUCKET) {
        let Some((timeline, start, end)) = archive::range_of(&key, segment) else {
            continue;
        };
        let stored = server.get(BUCKET, &key).context("an object is gone")?;
        let plain = Object::open(stored.bytes.clone())?.plain()?;
        ensure!(
            plain.len() as u64 == end - start,
            "{key} holds {} bytes",
            plain.len()
        );
        let mut was_sent = archive::Coverage::default();
        for sent in sent {
            for ((_, at), bytes) in sent.range((timeline, start.saturating_sub(LONGEST))..(timeline, end)) {
                let (from, to) = ((*at).max(start), (at + bytes.len() as u64).min(end));
                if from >= to {
                    continue;
                }
                let cut = |base: u64| {
                    usize::try_from(from - base).unwrap_or(0)..usize::try_from(to - base).unwrap_or(0)
                };
                let same = plain.get(cut(start)) == bytes.get(cut(*at));
                ensure!(same, "{key} differs from what was sent at {}", lsn::show(from));
                was_sent.add(from, to);
            }
        }
        let until = was_sent.contiguous_end(start);
        ensure!(
            until == end,
            "nobody has sent what {key} holds from {} on",
            lsn::show(until)
        );
        compared += end - start;
    }
    Ok(compared)
}
