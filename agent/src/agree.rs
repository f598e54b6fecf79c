//! Whether two regions hold the same WAL.
//!
//! Owns: comparing the plain bytes around a region's position with those of another region or of the stream,
//! and objects of one key that differ in size. Reads only; a difference is a conflict that names both sides,
//! and nothing is overwritten. What cannot be compared now is said to be unknown, never equal.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use highwater_format::coverage::Piece;
use highwater_format::{Lsn, LsnRange, Object, TimelineId};
use tokio::time::timeout;

use crate::archived::{ReadBack, read_back};
use crate::blocking;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::inventory::{coverage, piece_key};
use crate::region::{Compared, Region, compare};
use crate::segmenter::object_start;
use crate::uploader::Shared;
use crate::window::What;

/// Most bytes compared at the end of a region's WAL.
const COMPARED: u64 = 16 << 20;

/// Bytes that are shown of either side where they begin to differ.
const SHOWN: usize = 16;

/// What a comparison says when it finds no difference.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Agreement {
    /// The last bytes are those of this region, or of the stream.
    Equal(String),
    /// Nobody holds the same range who could be asked.
    Unknown(String),
}

/// Who may hold some of the last WAL of a region, to be compared with. Knowing it costs no request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Witnesses {
    stream: bool,
    regions: Vec<usize>,
}

impl Witnesses {
    /// Whether there is any.
    pub fn any(&self) -> bool {
        self.stream || !self.regions.is_empty()
    }
}

/// The last WAL of a region before its position.
struct Tail {
    timeline: TimelineId,
    range: LsnRange,
    read: ReadBack,
}

/// Compares the last WAL of `region` before `at` with what is still in memory of the stream, and else with
/// the first of `peers` that holds it.
pub async fn tail(
    shared: &Shared,
    region: &Region,
    at: Position,
    peers: &[Arc<Region>],
) -> Result<Agreement> {
    let Some(tail) = read_tail(shared, region, at).await? else {
        return Ok(Agreement::Unknown("its last WAL cannot be read back".into()));
    };
    if in_window(shared, region, &tail)? {
        return Ok(Agreement::Equal("the stream".into()));
    }
    let mut reasons = Vec::new();
    for peer in peers {
        match with_peer(shared, region, peer, &tail).await {
            Ok(true) => return Ok(Agreement::Equal(format!("region {}", peer.name))),
            Ok(false) => reasons.push(format!("{} does not hold it", peer.name)),
            Err(error @ AgentError::Conflict { .. }) => return Err(error),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    if reasons.is_empty() {
        reasons.push("no other region is known yet".into());
    }
    Ok(Agreement::Unknown(reasons.join("; ")))
}

/// Compares the regions that were read at the start with each other, before any of them counts. One that does
/// not answer in time is not waited for: it is compared later.
pub async fn at_start(
    shared: &Shared,
    positions: &[Option<Option<Position>>],
    patience: Duration,
) -> Result<()> {
    let read: Vec<(&Arc<Region>, Position)> = shared
        .archive
        .regions
        .iter()
        .zip(positions)
        .filter_map(|(region, position)| Some((region, position.flatten()?)))
        .collect();
    let comparisons = read.iter().map(|(region, at)| {
        let further = read.iter().filter(|(other, of)| other.index != region.index && of >= at);
        let peers: Vec<Arc<Region>> = further.map(|(other, _)| (*other).clone()).collect();
        async move {
            if peers.is_empty() {
                return Ok(());
            }
            match timeout(patience, tail(shared, region, *at, &peers)).await {
                Ok(Ok(Agreement::Equal(_))) => Ok(()),
                Ok(Err(error @ AgentError::Conflict { .. })) => Err(error),
                Ok(Ok(Agreement::Unknown(reason))) => {
                    tracing::warn!(region = region.name, reason, "its last WAL could not be compared with another region's yet");
                    Ok(())
                }
                Ok(Err(error)) => {
                    tracing::warn!(region = region.name, %error, "its last WAL could not be compared with another region's yet");
                    Ok(())
                }
                Err(_) => Ok(()),
            }
        }
    });
    join_all(comparisons).await.into_iter().collect()
}

/// The regions that were read already, in the order of the configuration.
pub fn peers(shared: &Shared, region: &Region) -> Vec<Arc<Region>> {
    let others = shared.archive.regions.iter();
    others
        .filter(|other| other.index != region.index && shared.progress.position(other.index).is_some())
        .cloned()
        .collect()
}

/// What is in memory of the stream, and those of `peers` that are past the beginning of what is compared of a region that
/// ends at `at`.
pub fn witnesses(shared: &Shared, at: Position, peers: &[Arc<Region>]) -> Witnesses {
    let from = Position {
        lsn: tail_start(shared, at),
        ..at
    };
    let range = LsnRange {
        start: from.lsn,
        end: at.lsn,
    };
    let is_past = |peer: &&Arc<Region>| shared.progress.position(peer.index).is_some_and(|at| at > from);
    Witnesses {
        stream: !shared.window.overlapping(at.timeline, range).is_empty(),
        regions: peers.iter().filter(is_past).map(|peer| peer.index).collect(),
    }
}

/// Where what is compared of a region that ends at `at` begins at the earliest.
fn tail_start(shared: &Shared, at: Position) -> Lsn {
    object_start(shared.segment_size, at.lsn.saturating_sub(1)).max(at.lsn.saturating_sub(COMPARED))
}

async fn read_tail(shared: &Shared, region: &Region, at: Position) -> Result<Option<Tail>> {
    let (layout, size) = (&shared.archive.layout, shared.segment_size);
    let Some(last) = at.lsn.0.checked_sub(1).map(Lsn) else {
        return Ok(None);
    };
    let from = tail_start(shared, at);
    let wanted = LsnRange::new(from, at.lsn);
    let held = coverage(&*region.quick, layout, size, at.timeline, wanted).await?;
    let run = held
        .runs()
        .into_iter()
        .find(|run| run.start <= last && last < run.end);
    let Some(run) = run else {
        return Ok(None);
    };
    let range = LsnRange::new(run.start.max(from), at.lsn);
    let read = read_back(shared, &*region.quick, at.timeline, range).await?;
    Ok(read.map(|read| Tail {
        timeline: at.timeline,
        range,
        read,
    }))
}

/// Whether what is in memory of the stream reaches into the tail; all of it must be equal.
fn in_window(shared: &Shared, region: &Region, tail: &Tail) -> Result<bool> {
    let mut compared = false;
    for item in shared.window.overlapping(tail.timeline, tail.range) {
        let What::Wal { range, .. } = item.what else {
            continue;
        };
        let _charge = shared.budget.charge(range.len());
        let plain = item.plain()?;
        tail.compare(shared, region, range, &plain, "the server's WAL")?;
        compared = true;
    }
    Ok(compared)
}

/// Compares with another region as far as it holds the tail; false if it holds nothing of it.
async fn with_peer(shared: &Shared, region: &Region, peer: &Region, tail: &Tail) -> Result<bool> {
    let (layout, size) = (&shared.archive.layout, shared.segment_size);
    let held = coverage(&*peer.quick, layout, size, tail.timeline, tail.range).await?;
    let common = held.runs().into_iter().filter_map(|run| {
        let common = run.intersect(tail.range)?;
        (!common.is_empty()).then_some(common)
    });
    let mut compared = false;
    for range in common {
        if let Some(read) = read_back(shared, &*peer.quick, tail.timeline, range).await? {
            tail.compare(
                shared,
                region,
                range,
                &read.plain,
                &format!("region {}", peer.name),
            )?;
            compared = true;
        }
    }
    Ok(compared)
}

impl Tail {
    /// Compares the part that `theirs` (all of `range`, from `source`) has in common with the tail.
    fn compare(
        &self,
        shared: &Shared,
        region: &Region,
        range: LsnRange,
        theirs: &[u8],
        source: &str,
    ) -> Result<()> {
        let Some(common) = range.intersect(self.range).filter(|common| !common.is_empty()) else {
            return Ok(());
        };
        let (ours, theirs) = (
            part(&self.read.plain, self.range, common),
            part(theirs, range, common),
        );
        if ours == theirs {
            return Ok(());
        }
        let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        let identity = |bytes: &[u8]| format!("{common}, there with the bytes {}", shown(bytes, same));
        Err(AgentError::Conflict {
            region: region.name.clone(),
            key: format!(
                "{} at {}",
                shared.archive.layout.timeline_dir(self.timeline),
                common.start + same as u64
            ),
            ours: format!("that of {source}: {}", identity(theirs)),
            theirs: identity(ours),
        })
    }
}

/// A few bytes from `at` on, as `pg_waldump` and hex editors show them.
fn shown(bytes: &[u8], at: usize) -> String {
    let some = bytes.iter().skip(at).take(SHOWN);
    some.map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// The bytes of `wanted` from those of `held`.
pub(crate) fn part(bytes: &[u8], held: LsnRange, wanted: LsnRange) -> &[u8] {
    let from = usize::try_from(wanted.start.distance_from(held.start)).unwrap_or(usize::MAX);
    let to = usize::try_from(wanted.end.distance_from(held.start)).unwrap_or(usize::MAX);
    bytes.get(from..to).unwrap_or_default()
}

/// Compares the objects under one key in two regions. Returns whether ours can be read at all.
pub(crate) async fn piece(
    shared: &Shared,
    region: &Region,
    peer: &Region,
    timeline: TimelineId,
    piece: &Piece,
) -> Result<bool> {
    let key = piece_key(&shared.archive.layout, shared.segment_size, timeline, piece);
    let ours = region.quick.get(&key).await?;
    let theirs = peer.quick.get(&key).await?;
    let readable = |bytes| Object::open(bytes).and_then(|object| object.plain()).is_ok();
    let (ours_reads, theirs_reads, compared) = blocking::run("comparing objects", move || {
        (
            readable(ours.clone()),
            readable(theirs.clone()),
            compare(&theirs, &ours),
        )
    })
    .await?;
    match compared {
        Compared::Different {
            ours: by_peer,
            theirs: by_us,
        } if ours_reads && theirs_reads => Err(AgentError::Conflict {
            region: region.name.clone(),
            key,
            ours: format!("that of region {}: {by_peer}", peer.name),
            theirs: by_us,
        }),
        _ => Ok(ours_reads),
    }
}
