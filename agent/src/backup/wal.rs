//! What WAL a region holds, asked of the region itself.
//!
//! Owns: reading how far a region's stored WAL reaches without a hole, and waiting for it. Only listings
//! count, never what the streaming part believes: a base backup is announced where its WAL can be read back.
//! Does not own: writing WAL, which the running agent does.

use std::time::Duration;

use highwater_format::layout::Layout;
use highwater_format::{Lsn, LsnRange, SegmentSize, TimelineId};
use highwater_store::Store;
use tokio::time::{Instant, sleep};

use crate::error::{AgentError, Kind, Result};
use crate::inventory;

/// Between two looks at a region that does not hold the WAL yet. A listing costs one request.
const POLL: Duration = Duration::from_millis(250);

/// It is asked again after so many times what the last look took: in a directory a listing reads all names.
const REST: u32 = 4;

/// A timeline's WAL in the archive.
#[derive(Debug, Clone)]
pub(crate) struct WalOf<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) segment_size: SegmentSize,
    pub(crate) timeline: TimelineId,
}

impl WalOf<'_> {
    /// The end of the unbroken WAL that begins with the start of `range`; the start itself if that is not held. It is
    /// looked for no further than the end of the range.
    pub(crate) async fn stored_end(&self, store: &dyn Store, range: LsnRange) -> Result<Lsn> {
        let held = inventory::coverage(store, self.layout, self.segment_size, self.timeline, range).await?;
        Ok(held.contiguous_end(range.start))
    }

    /// Whether the stream is stored right up to `lsn`: the byte before it is held, or on record as lost.
    pub(crate) async fn reaches(&self, store: &dyn Store, lsn: Lsn) -> Result<bool> {
        let before = lsn - 1;
        let last = LsnRange::new(before, lsn);
        let held = inventory::held(store, self.layout, self.segment_size, self.timeline, last).await?;
        Ok(held.contiguous_end(before) >= lsn)
    }

    /// Waits until all of `range` is held. Gives up when nothing was added for `patience`; a region that does
    /// not answer meanwhile adds nothing.
    pub(crate) async fn wait_for(
        &self,
        store: &dyn Store,
        range: LsnRange,
        patience: Duration,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mut end = range.start;
        let mut last_progress = Instant::now();
        loop {
            let asked = Instant::now();
            let failure = match self.stored_end(store, LsnRange::new(end, range.end)).await {
                Ok(now) if now >= range.end => return Ok(()),
                Ok(now) if now > end => {
                    (end, last_progress) = (now, Instant::now());
                    None
                }
                Ok(_) => None,
                Err(error) if matches!(error.kind(), Kind::Retry | Kind::Operator) => Some(error),
                Err(error) => return Err(error),
            };
            if last_progress.elapsed() >= patience {
                return Err(
                    failure.unwrap_or_else(|| self.missing(store.region(), LsnRange::new(end, range.end)))
                );
            }
            sleep(POLL.max(asked.elapsed() * REST)).await;
        }
    }

    fn missing(&self, region: &str, range: LsnRange) -> AgentError {
        AgentError::Trouble {
            what: format!(
                "region {region}: WAL {range} of timeline {} is not stored",
                self.timeline
            ),
            next: "A running agent stores it: start `highwater-agent run`, or see in its log and with \
                   `highwater-agent status` why it does not get there"
                .into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use highwater_format::layout::ClusterName;
    use highwater_format::{SegmentName, SystemId};
    use highwater_store::{MemoryStore, Object, PutMode};

    use super::*;

    fn layout() -> Layout {
        Layout::new("orders".parse::<ClusterName>().unwrap(), SystemId(7))
    }

    async fn put(store: &MemoryStore, key: String) {
        store.put(&key, Object::new("x"), PutMode::Create).await.unwrap();
    }

    #[tokio::test]
    async fn segments_and_tail_chunks_are_read_together() {
        let (layout, store, size) = (layout(), MemoryStore::new("a"), SegmentSize::DEFAULT);
        let timeline = TimelineId::FIRST;
        let wal = WalOf {
            layout: &layout,
            segment_size: size,
            timeline,
        };
        for number in [1, 2, 4] {
            put(&store, layout.segment(SegmentName { timeline, number }, size)).await;
        }
        let chunk = |start: u64, end: u64| layout.tail(timeline, LsnRange::new(Lsn(start), Lsn(end)));
        put(&store, chunk(0x300_0000, 0x300_1000)).await;
        put(&store, chunk(0x300_0800, 0x300_2000)).await;
        put(&store, chunk(0x300_3000, 0x400_0000)).await;

        let end = async |from| {
            let range = LsnRange::new(from, Lsn(0x600_0000));
            wal.stored_end(&store, range).await
        };
        assert_eq!(end(Lsn(0x100_0028)).await.unwrap(), Lsn(0x300_2000));
        assert_eq!(end(Lsn(0x300_1fff)).await.unwrap(), Lsn(0x300_2000));
        assert_eq!(end(Lsn(0x300_2000)).await.unwrap(), Lsn(0x300_2000));
        assert_eq!(end(Lsn(0x380_0000)).await.unwrap(), Lsn(0x500_0000));
        assert!(wal.reaches(&store, Lsn(0x300_2000)).await.unwrap());
        assert!(!wal.reaches(&store, Lsn(0x300_2001)).await.unwrap());
        // A segment boundary is reached when the segment before it is whole.
        assert!(wal.reaches(&store, Lsn(0x500_0000)).await.unwrap());
        assert!(!wal.reaches(&store, Lsn(0x100_0000)).await.unwrap());
    }

    #[tokio::test]
    async fn waiting_ends_when_the_hole_is_filled_and_gives_up_when_it_is_not() {
        let (layout, size, timeline) = (layout(), SegmentSize::DEFAULT, TimelineId::FIRST);
        let store = std::sync::Arc::new(MemoryStore::new("a"));
        let wal = WalOf {
            layout: &layout,
            segment_size: size,
            timeline,
        };
        let range = LsnRange::new(Lsn(0x100_0028), Lsn(0x200_0100));
        put(&store, layout.segment(SegmentName { timeline, number: 1 }, size)).await;
        let error = wal
            .wait_for(&*store, range, Duration::from_millis(700))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("[0/2000000, 0/2000100)"), "{error}");

        let key = layout.tail(timeline, LsnRange::new(Lsn(0x200_0000), Lsn(0x200_0100)));
        let late = tokio::spawn({
            let store = store.clone();
            async move {
                sleep(Duration::from_millis(300)).await;
                put(&store, key).await;
            }
        });
        wal.wait_for(&*store, range, Duration::from_millis(700))
            .await
            .unwrap();
        late.await.unwrap();
    }
}
