//! Commit times that step back: a clock that was set back, or a promoted host with a slower one.

use std::sync::Arc;
use std::time::Duration;

use highwater_format::{Kind, Lsn, LsnRange, Time};
use highwater_store::{MemoryStore, Store, list_all};

use crate::target::{Request, Target};

use super::archive::*;
use super::assert_stops_at;

/// The archive as region `a` alone holds it, in chunks, with the clock a minute back from the LSN `from` on.
async fn set_back_at(from: u64) -> (Archive, Vec<(Line, Time)>) {
    let moved = |line: &Line, time: Time| {
        if line.lsn.0 >= from {
            time.saturating_sub(Duration::from_secs(60))
        } else {
            time
        }
    };
    let (wal, commits) = wal_with_times(moved);
    let archive = Archive::of(&wal, &commits).await;
    // More objects behind the first segment than are read around a place anyway.
    let directory = layout().tail_dir(second_timeline());
    for meta in list_all(&*archive.a, &directory, None).await.unwrap() {
        archive.a.delete(&meta.key).await.unwrap();
    }
    let mut at = Lsn(8 * SEGMENT);
    while at < archive.end {
        let chunk = LsnRange::new(at, at.saturating_add(1000).min(archive.end));
        let sealed = container(Kind::Tail, second_timeline(), chunk, &wal, &commits);
        put(&archive.a, &layout().tail(second_timeline(), chunk), sealed).await;
        at = chunk.end;
    }
    let ends = transaction_ends().into_iter();
    let ends = ends.map(|(line, time)| (line.clone(), moved(&line, time)));
    let alone = Archive {
        b: Arc::new(MemoryStore::new("b")),
        ..archive
    };
    (alone, ends.collect())
}

/// PostgreSQL stops at the first transaction end that is too late, whatever follows.
#[tokio::test]
async fn the_first_transaction_that_is_too_late_ends_it_though_later_ones_are_early() {
    // In the middle of the first timeline, and where the second begins: a failover.
    for from in [0x71_B690, 0x80_1B90] {
        let (archive, ends) = set_back_at(from).await;
        let before: Vec<_> = ends.iter().filter(|(line, _)| line.lsn.0 < from).collect();
        for pair in before.windows(2) {
            let [(kept, time), (left, _)] = pair else { continue };
            if left.lsn < backup().stop_lsn {
                continue;
            }
            let plan = archive.plan(&Request::to(Target::Time(*time))).await.unwrap();
            assert_stops_at(&plan, kept);
            assert_eq!(plan.target.stop.last_commit, Some(*time));
        }
    }
}
