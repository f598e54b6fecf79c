//! Whether the server's WAL is the archive's.
//!
//! Where a listing says that the archive reaches the server's position, it may hold another course of it: a server that was
//! rolled back and went on stands inside what is archived of before. A base backup of that server could never be restored
//! with that WAL; nor may a stream go on behind it unseen. Owns: reading the WAL right before a position from the server, and comparing it with a region's.
//! Does not own: that the region holds any ([`super::wal`]).

use std::time::Duration;

use bytes::Bytes;
use highwater_format::{Lsn, LsnRange, TimelineId};
use highwater_pgwire::{ConnInfo, Started, StreamMessage, WalReader};
use highwater_store::Store;
use tokio::time::timeout;

use super::regions::Targets;
use crate::archived::read_range;
use crate::error::{AgentError, Result};
use crate::inventory::coverage;
use crate::region::Archive;
use crate::segmenter::object_start;
use crate::server;
use crate::unused::Unused;

/// How long the server may take over the next WAL, all of which it has.
const PATIENCE: Duration = Duration::from_secs(30);

/// The WAL of one object as the server has it, up to a position.
#[derive(Debug)]
pub(crate) struct Served {
    timeline: TimelineId,
    range: LsnRange,
    plain: Vec<u8>,
}

impl Served {
    /// Reads what the server has before `end`, without its slot: nothing is acknowledged by that.
    pub(crate) async fn before(
        conn: &ConnInfo,
        archive: &Archive,
        timeline: TimelineId,
        end: Lsn,
    ) -> Result<Self> {
        let start = object_start(archive.identity.segment_size, end - 1);
        let range = LsnRange::new(start, end);
        let connection = server::connect(conn).await?;
        let mut plain = Vec::with_capacity(usize::try_from(range.len()).unwrap_or(0));
        match connection.start_replication(None, start, timeline).await? {
            Started::AtEnd(..) => return Err(promoted(timeline)),
            Started::Streaming(mut reader, _writer) => {
                while (plain.len() as u64) < range.len() {
                    let next = timeout(PATIENCE, next(&mut reader, timeline)).await;
                    plain.extend_from_slice(&next.map_err(|_| silent(range))??);
                }
            }
        }
        plain.truncate(usize::try_from(range.len()).unwrap_or(usize::MAX));
        Ok(Self {
            timeline,
            range,
            plain,
        })
    }

    /// The bytes themselves.
    pub(crate) fn into_plain(self) -> Vec<u8> {
        self.plain
    }

    /// Where it ends.
    pub(crate) fn end(&self) -> Lsn {
        self.range.end
    }

    /// Fails if the region holds something else. False: it holds none of it, because that is on record as lost.
    pub(crate) async fn is_held(&self, archive: &Archive, store: &dyn Store) -> Result<bool> {
        let (layout, size) = (&archive.layout, archive.identity.segment_size);
        let (range, timeline) = (self.range, self.timeline);
        let held = coverage(store, layout, size, timeline, range).await?;
        let reaches = |run: &LsnRange| run.start < range.end && run.end >= range.end;
        let Some(run) = held.runs().into_iter().find(reaches) else {
            return Ok(false);
        };
        let common = LsnRange::new(run.start.max(range.start), range.end);
        let Some(theirs) = read_range(archive, store, size, timeline, common).await? else {
            return Ok(false);
        };
        let skipped = usize::try_from(common.start.distance_from(range.start)).unwrap_or(usize::MAX);
        let ours = self.plain.get(skipped..).unwrap_or_default();
        // A standby that has just replayed a segment switch is no other course.
        let unused = Unused::of(&archive.identity, timeline, common.start, &theirs);
        let Some(same) = unused.first_difference(common.start, &theirs, ours) else {
            return Ok(true);
        };
        Err(AgentError::Diverged {
            timeline,
            at: common.start + same as u64,
            range: common,
        })
    }

    /// Compares it with every region that is in. A difference ends the backup; an object that is damaged ends it only where
    /// no other region could be compared, because a new base backup is what helps against damage.
    pub(crate) async fn is_held_by_all(&self, archive: &Archive, targets: &Targets) -> Result<()> {
        let (mut results, mut compared, mut damage) = (Vec::new(), false, None);
        for target in targets.live() {
            match self.is_held(archive, &*target.region.quick).await {
                Ok(equal) => compared |= equal,
                Err(error @ AgentError::Diverged { .. }) => return Err(error),
                Err(error @ AgentError::Object { .. }) => {
                    tracing::warn!(region = %target.region.name, %error, "its WAL cannot be compared with the server's");
                    damage = Some(error);
                }
                Err(error) => results.push((target, Err(error))),
            }
        }
        targets.settle(results)?;
        damage.filter(|_| !compared).map_or(Ok(()), Err)
    }
}

/// The next WAL of the stream.
async fn next(reader: &mut WalReader, timeline: TimelineId) -> Result<Bytes> {
    loop {
        match reader.next().await? {
            StreamMessage::Data { data, .. } => return Ok(data),
            StreamMessage::Keepalive { .. } => {}
            StreamMessage::Ended(_) => return Err(promoted(timeline)),
        }
    }
}

fn promoted(timeline: TimelineId) -> AgentError {
    AgentError::Trouble {
        what: format!("the server's stream of timeline {timeline} ended before its own end of WAL"),
        next: "It was promoted or stopped just now; try again".into(),
    }
}

fn silent(range: LsnRange) -> AgentError {
    AgentError::Trouble {
        what: format!(
            "the server has not sent its WAL {range} for {} s, which has to be compared with the archive's",
            PATIENCE.as_secs()
        ),
        next: "See its log; then try again".into(),
    }
}

#[cfg(test)]
mod tests {
    use highwater_config::Policy;
    use highwater_format::coverage::PieceKind;

    use super::*;
    use crate::test_world::{MIB, World, piece, wal, world};

    const END: u64 = MIB + 900;

    fn served(plain: Vec<u8>) -> Served {
        Served {
            timeline: TimelineId::FIRST,
            range: LsnRange::new(Lsn(MIB), Lsn(END)),
            plain,
        }
    }

    fn targets(world: &World) -> Targets {
        Targets::new(&world.shared.archive.regions, 1, Duration::from_secs(1))
    }

    #[tokio::test]
    async fn what_the_server_has_is_compared_as_far_as_it_is_held() {
        let world = world(Policy::Any);
        let all = wal(LsnRange::new(Lsn(MIB), Lsn(END)));
        let (archive, targets) = (&world.shared.archive, targets(&world));
        // Behind a gap the region holds nothing yet.
        let same = served(all.clone());
        assert!(!same.is_held(archive, &*world.region(0).quick).await.unwrap());
        same.is_held_by_all(archive, &targets).await.unwrap();

        world
            .put_wal(0, piece(PieceKind::Tail, MIB + 300, MIB + 700))
            .await;
        let key = world
            .put_wal(0, piece(PieceKind::Tail, MIB + 700, END + 50))
            .await;
        assert!(same.is_held(archive, &*world.region(0).quick).await.unwrap());
        let mut other = all.clone();
        other[299] ^= 1;
        let before = served(other.clone());
        assert!(before.is_held(archive, &*world.region(0).quick).await.unwrap());
        other[750] ^= 1;
        let error = served(other).is_held_by_all(archive, &targets).await.unwrap_err();
        assert!(
            matches!(error, AgentError::Diverged { at, .. } if at == Lsn(MIB + 750)),
            "{error}"
        );

        world.damage(0, &key).await;
        let damaged = same.is_held_by_all(archive, &targets).await;
        assert!(matches!(damaged, Err(AgentError::Object { .. })), "{damaged:?}");
        world.put_wal(1, piece(PieceKind::Tail, MIB, END)).await;
        same.is_held_by_all(archive, &targets).await.unwrap();
    }
}
