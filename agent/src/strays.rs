//! Objects behind a region's position: an agent that died had stored them before something that comes before them.
//!
//! They do not count, and the stream brings their WAL again. But they are there, and once the hole before them is filled
//! whoever reads the region takes them for its WAL. Where the server has been rolled back meanwhile they are of another
//! course, and a chunk that is stored beside one has another key: so each is compared with what the stream brings, before
//! that is stored and counts.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use highwater_format::coverage::Piece;
use highwater_format::{LsnRange, TimelineId};
use highwater_store::ErrorKind;

use crate::agree::part;
use crate::archived::read_piece;
use crate::blocking;
use crate::budget::Charge;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::inventory::{coverage, onward};
use crate::region::Region;
use crate::uploader::Shared;
use crate::window::{Item, What};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Strays {
    timeline: Option<TimelineId>,
    pieces: Vec<Piece>,
    /// The one that was read last: many chunks may lie within one segment.
    plain: Mutex<Option<Plain>>,
}

/// A decoded object, and the memory that it stands for.
#[derive(Debug)]
struct Plain {
    range: LsnRange,
    bytes: Bytes,
    _charge: Charge,
}

impl Strays {
    /// Lists what lies behind `position`.
    pub(crate) async fn find(shared: &Shared, region: &Region, position: Position) -> Result<Self> {
        let (layout, size) = (&shared.archive.layout, shared.segment_size);
        let held = coverage(
            &*region.store,
            layout,
            size,
            position.timeline,
            onward(position.lsn),
        )
        .await?;
        let behind = held.pieces().filter(|piece| piece.range.end > position.lsn);
        let pieces: Vec<Piece> = behind.copied().collect();
        if !pieces.is_empty() {
            tracing::info!(
                region = region.name, %position, objects = pieces.len(),
                "objects lie behind the region's position: each is compared when the stream gets there"
            );
        }
        Ok(Self {
            timeline: Some(position.timeline),
            pieces,
            plain: Mutex::default(),
        })
    }

    /// Whether any of them holds some of what `item` does. Nothing is stored behind such an item before it is known to say
    /// the same and is there itself.
    pub(crate) fn meet(&self, item: &Item) -> bool {
        let What::Wal { timeline, range, .. } = item.what else {
            return false;
        };
        let meets = |piece: &Piece| {
            let common = piece.range.intersect(range);
            common.is_some_and(|common| !common.is_empty())
        };
        self.timeline == Some(timeline) && self.pieces.iter().any(meets)
    }

    /// Fails with a conflict if any of them says something else than `item`. What cannot be read is no evidence.
    pub(crate) async fn agree(&self, shared: &Shared, region: &Region, item: &Arc<Item>) -> Result<()> {
        let What::Wal { timeline, range, .. } = item.what else {
            return Ok(());
        };
        if self.timeline != Some(timeline) {
            return Ok(());
        }
        if self.pieces.iter().all(|piece| piece.range.end <= range.start) {
            *self.plain() = None;
        }
        for piece in &self.pieces {
            let common = piece.range.intersect(range).filter(|common| !common.is_empty());
            let Some(common) = common else { continue };
            match self.read(shared, region, timeline, piece).await {
                Ok(theirs) => compare(region, item, range, (piece.range, theirs), common).await?,
                Err(error) if is_about_object(&error) => {
                    tracing::error!(region = region.name, %error, "an object cannot be compared with the stream");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn read(
        &self,
        shared: &Shared,
        region: &Region,
        timeline: TimelineId,
        piece: &Piece,
    ) -> Result<Bytes> {
        if let Some(known) = self.plain().as_ref().filter(|known| known.range == piece.range) {
            return Ok(known.bytes.clone());
        }
        // Charged without waiting: room is only made by what waits for this.
        let charge = shared.budget.charge(piece.range.len());
        let store = &*region.store;
        let (key, _, object) =
            read_piece(&shared.archive, store, shared.segment_size, timeline, piece).await?;
        let plain = blocking::run("decoding an object", move || object.plain()).await?;
        let plain = Bytes::from(plain.map_err(|source| AgentError::Object {
            region: region.name.clone(),
            key,
            source,
        })?);
        *self.plain() = Some(Plain {
            range: piece.range,
            bytes: plain.clone(),
            _charge: charge,
        });
        Ok(plain)
    }

    fn plain(&self) -> MutexGuard<'_, Option<Plain>> {
        self.plain.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether it says that the object is of no use, or gone since it was listed.
fn is_about_object(error: &AgentError) -> bool {
    match error {
        AgentError::Object { .. } => true,
        AgentError::Store(error) => matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound),
        _ => false,
    }
}

async fn compare(
    region: &Region,
    item: &Arc<Item>,
    range: LsnRange,
    (held, theirs): (LsnRange, Bytes),
    common: LsnRange,
) -> Result<()> {
    let sealed = item.clone();
    let ours = blocking::run("decoding an object", move || sealed.plain()).await??;
    let (ours, theirs) = (part(&ours, range, common), part(&theirs, held, common));
    if ours == theirs {
        return Ok(());
    }
    let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    Err(AgentError::Conflict {
        region: region.name.clone(),
        key: item.key.clone(),
        ours: "the server's WAL".into(),
        theirs: format!(
            "an object {held} that was stored earlier and differs from {} on",
            common.start + same as u64
        ),
    })
}
