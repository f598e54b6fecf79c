//! What one region lists: the WAL of a timeline, the recorded gaps, the objects of base backups.
//!
//! Owns: listing no more than can matter. Tail chunks stay for a long time after their segment object was
//! stored, so they are listed only where segment objects leave something open. Reads keys, never content.

use std::collections::BTreeMap;

use highwater_format::coverage::{Coverage, Piece, PieceKind};
use highwater_format::{BackupId, Key, Layout, Lsn, LsnRange, SegmentName, SegmentSize, TimelineId};
use highwater_store::{ErrorKind, LIST_PAGE, Operation, Store, StoreError, list_all};

use crate::error::{AgentError, Result};
use crate::inventory::gaps;
use crate::segmenter::object_start;

/// One timeline in one region.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wal {
    /// Every piece that matters, those hidden by others too.
    pub(crate) pieces: Vec<Piece>,
    /// What they cover.
    pub(crate) coverage: Coverage,
    /// Holes recorded on purpose.
    pub(crate) gaps: Vec<LsnRange>,
}

/// The objects of one base backup in one region.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Base {
    /// The commit mark is there.
    pub(crate) visible: bool,
    /// The manifest is there.
    pub(crate) manifest: bool,
    /// Stored size of each pack that is there.
    pub(crate) packs: BTreeMap<u32, u64>,
}

/// Where and in which sizes WAL is listed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listing<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) size: SegmentSize,
}

impl Listing<'_> {
    /// What the region lists of `timeline` from the object that holds `from` on.
    pub(crate) async fn wal(&self, store: &dyn Store, timeline: TimelineId, from: Lsn) -> Result<Wal> {
        let mut wal = self.pieces(store, timeline, from).await?;
        wal.gaps = gaps(store, self.layout, timeline).await?;
        Ok(wal)
    }

    /// What these pieces cover.
    pub(crate) async fn coverage(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        from: Lsn,
    ) -> Result<Coverage> {
        Ok(self.pieces(store, timeline, from).await?.coverage)
    }

    async fn pieces(&self, store: &dyn Store, timeline: TimelineId, from: Lsn) -> Result<Wal> {
        let from = object_start(self.size, from);
        let mut wal = Wal::default();
        self.segments(store, timeline, from, &mut wal).await?;
        for open in open_ranges(from, &wal.coverage.runs()) {
            self.tails(store, timeline, open, &mut wal).await?;
        }
        Ok(wal)
    }

    /// Everything that holds a byte of `range`, chunks that a segment object hides included.
    pub(crate) async fn around(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<Vec<Piece>> {
        let mut wal = Wal::default();
        self.segments(store, timeline, object_start(self.size, range.start), &mut wal)
            .await?;
        wal.pieces.retain(|piece| piece.range.start < range.end);
        self.tails(store, timeline, range, &mut wal).await?;
        Ok(wal.pieces)
    }

    async fn segments(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        from: Lsn,
        into: &mut Wal,
    ) -> Result<()> {
        let before = self.size.segment_number(from).checked_sub(1);
        let before = before.map(|number| self.layout.segment(SegmentName { timeline, number }, self.size));
        for meta in list_all(store, &self.layout.segment_dir(timeline), before.as_deref()).await? {
            let Some(Key::Segment(name)) = self.layout.parse(&meta.key) else {
                continue;
            };
            if let Some(name) = name.resolve(self.size) {
                into.insert(Piece {
                    range: name.range(self.size),
                    kind: PieceKind::Segment,
                    size: meta.size,
                });
            }
        }
        Ok(())
    }

    /// Tail chunks that reach into `open`. None begins before the object that holds its start.
    async fn tails(
        &self,
        store: &dyn Store,
        timeline: TimelineId,
        open: LsnRange,
        into: &mut Wal,
    ) -> Result<()> {
        let directory = self.layout.tail_dir(timeline);
        // A chunk that begins there sorts after this: its key goes on.
        let mut after = format!("{directory}{}", object_start(self.size, open.start).hex16());
        loop {
            let page = store.list(&directory, Some(&after), LIST_PAGE).await?;
            let Some(last) = page.entries.last().map(|meta| meta.key.clone()) else {
                return match page.more {
                    true => Err(stuck(store, &directory)),
                    false => Ok(()),
                };
            };
            for meta in page.entries {
                let Some(Key::Tail(_, range)) = self.layout.parse(&meta.key) else {
                    continue;
                };
                if range.start >= open.end {
                    return Ok(());
                }
                if range.end > open.start {
                    into.insert(Piece {
                        range,
                        kind: PieceKind::Tail,
                        size: meta.size,
                    });
                }
            }
            if !page.more {
                return Ok(());
            }
            if last <= after {
                return Err(stuck(store, &directory));
            }
            after = last;
        }
    }

    /// Every base backup of which the region holds anything.
    pub(crate) async fn backups(&self, store: &dyn Store) -> Result<BTreeMap<BackupId, Base>> {
        let directory = self.layout.base_dir();
        let (mut found, mut after) = (BTreeMap::<BackupId, Base>::new(), None::<String>);
        loop {
            let page = store.list(&directory, after.as_deref(), LIST_PAGE).await?;
            let last = page.entries.last().map(|meta| meta.key.clone());
            for meta in page.entries {
                match self.layout.parse(&meta.key) {
                    Some(Key::Backup(id)) => found.entry(id).or_default().visible = true,
                    Some(Key::Manifest(id)) => found.entry(id).or_default().manifest = true,
                    Some(Key::Pack(id, number)) => {
                        found.entry(id).or_default().packs.insert(number, meta.size);
                    }
                    _ => {}
                }
            }
            if !page.more || last.is_none() || last <= after {
                return Ok(found);
            }
            after = last;
        }
    }
}

impl Wal {
    fn insert(&mut self, piece: Piece) {
        self.pieces.push(piece);
        self.coverage.insert(piece);
    }
}

/// A listing that ends early would be taken for a hole.
fn stuck(store: &dyn Store, directory: &str) -> AgentError {
    let what = "the listing claims more entries but does not advance";
    StoreError::new(
        ErrorKind::Corrupt,
        store.region(),
        Operation::List,
        directory,
        what,
    )
    .into()
}

/// What segment objects with these runs leave open from `from` on.
fn open_ranges(from: Lsn, runs: &[LsnRange]) -> Vec<LsnRange> {
    let (mut open, mut at) = (Vec::new(), from);
    for run in runs {
        if run.start > at {
            open.push(LsnRange::new(at, run.start));
        }
        at = at.max(run.end);
    }
    open.push(LsnRange::new(at, Lsn::MAX));
    open
}

#[cfg(test)]
mod tests {
    use highwater_format::{ClusterName, SystemId, Time};
    use highwater_store::{MemoryStore, Object, PutMode};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn layout() -> Layout {
        Layout::new("orders".parse::<ClusterName>().unwrap(), SystemId(7))
    }

    async fn put(store: &MemoryStore, key: String) {
        store.put(&key, Object::new("xy"), PutMode::Create).await.unwrap();
    }

    fn range(start: u64, end: u64) -> LsnRange {
        LsnRange::new(Lsn(start), Lsn(end))
    }

    #[tokio::test]
    async fn chunks_are_listed_only_where_segments_leave_something_open() {
        let (layout, store) = (layout(), MemoryStore::new("a"));
        let (timeline, size) = (TimelineId::FIRST, SegmentSize::new(MIB).unwrap());
        for number in [3, 5] {
            put(&store, layout.segment(SegmentName { timeline, number }, size)).await;
        }
        for chunk in [
            range(3 * MIB, 3 * MIB + 10),
            range(4 * MIB, 4 * MIB + 7),
            range(4 * MIB + 7, 5 * MIB),
            range(5 * MIB, 5 * MIB + 9),
            range(6 * MIB, 6 * MIB + 9),
        ] {
            put(&store, layout.tail(timeline, chunk)).await;
        }
        put(&store, layout.gap(timeline, range(MIB, 2 * MIB))).await;
        let listing = Listing {
            layout: &layout,
            size,
        };
        let wal = listing.wal(&store, timeline, Lsn::ZERO).await.unwrap();
        assert_eq!(wal.coverage.runs(), [range(3 * MIB, 6 * MIB + 9)]);
        assert_eq!(wal.pieces.len(), 5, "{:?}", wal.pieces);
        assert_eq!(wal.gaps, [range(MIB, 2 * MIB)]);
        let late = listing.wal(&store, timeline, Lsn(5 * MIB + 3)).await.unwrap();
        assert_eq!(late.coverage.runs(), [range(5 * MIB, 6 * MIB + 9)]);
        // Where the segment object cannot be used its chunks count.
        let hidden = listing
            .around(&store, timeline, range(3 * MIB, 4 * MIB))
            .await
            .unwrap();
        let hidden: Vec<LsnRange> = hidden.iter().map(|piece| piece.range).collect();
        assert_eq!(hidden, [range(3 * MIB, 4 * MIB), range(3 * MIB, 3 * MIB + 10)]);
    }

    #[tokio::test]
    async fn objects_of_base_backups_are_told_apart() {
        let (layout, store) = (layout(), MemoryStore::new("a"));
        let id = |seconds: i64| {
            BackupId::new(
                TimelineId::FIRST,
                Lsn(0x200_0028),
                Time::from_unix_micros(seconds * 1_000_000),
            )
        };
        for key in [
            layout.pack(&id(1), 0),
            layout.pack(&id(1), 2),
            layout.manifest(&id(1)),
            layout.backup(&id(1)),
            layout.pack(&id(2), 0),
        ] {
            put(&store, key).await;
        }
        let listing = Listing {
            layout: &layout,
            size: SegmentSize::DEFAULT,
        };
        let found = listing.backups(&store).await.unwrap();
        let first = Base {
            visible: true,
            manifest: true,
            packs: BTreeMap::from([(0, 2), (2, 2)]),
        };
        assert_eq!(found.get(&id(1)), Some(&first));
        assert!(
            found
                .get(&id(2))
                .is_some_and(|base| !base.visible && !base.manifest)
        );
    }
}
