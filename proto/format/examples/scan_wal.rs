//! Reads whole WAL segments in order and says what the scanner found and what it cost.
//!
//! `cargo run --release -p highwater-format --example scan_wal -- SEGMENT...` (16 MiB segments of one timeline)

use std::error::Error;
use std::time::Instant;

use highwater_format::walscan::{WalEvent, WalScanner};
use highwater_format::{SegmentSize, WalFile};

/// As large as the largest message of a replication stream, and as badly aligned.
const MESSAGE: usize = 128 * 1024;
const OFFSET: usize = 25;
const ROUNDS: u32 = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let size = SegmentSize::DEFAULT;
    let mut wal = vec![0; OFFSET];
    let mut first = None;
    for path in std::env::args().skip(1) {
        let name = path.rsplit('/').next().unwrap_or_default();
        if let Ok(WalFile::Segment(name)) = WalFile::parse(name) {
            first.get_or_insert(name);
        }
        wal.extend(std::fs::read(&path)?);
    }
    let first = first
        .and_then(|name| name.resolve(size))
        .ok_or("name at least one 16 MiB WAL segment")?;
    let wal = &wal[OFFSET..];
    for round in 0..ROUNDS {
        let mut scanner = WalScanner::new(first.start(size), size, None, None);
        let (mut commits, mut nameless, mut others) = (0_u64, 0_u64, Vec::new());
        let mut count = |event| match event {
            WalEvent::Commit { xid, .. } => {
                commits += 1;
                nameless += u64::from(xid == 0);
            }
            other => others.push(other),
        };
        let begun = Instant::now();
        let outcome = wal
            .chunks(MESSAGE)
            .try_for_each(|message| scanner.feed(message, &mut count));
        let seconds = begun.elapsed().as_secs_f64();
        let read = scanner.position().distance_from(first.start(size));
        println!(
            "round {round}: {read} bytes, {commits} transactions ({nameless} without id), {} other events, {:.3} s per GB, {}",
            others.len(),
            seconds * 1e9 / read as f64,
            outcome.map_or_else(|damage| damage.to_string(), |()| "all whole".to_owned()),
        );
        if round == 0 {
            others.iter().for_each(|event| println!("  {event:?}"));
        }
    }
    Ok(())
}
