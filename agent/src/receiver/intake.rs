//! WAL bytes in, work for the sealer out: one stream on one timeline.
//!
//! Owns the segmenter and the reading of WAL records on the way. A damaged record is noticed here; the
//! bytes are kept all the same (they are what the server has), the damage is reported loudly, and records
//! are read again from the next object on.

use std::sync::Arc;
use std::time::Duration;

use highwater_format::walscan::{WalEvent, WalScanner};
use highwater_format::{Identity, Lsn, Time, TimelineId};
use tokio::sync::mpsc;

use crate::budget::Budget;
use crate::commits::CommitSpan;
use crate::encoder::Encoder;
use crate::error::{AgentError, Result};
use crate::resume::Resume;
use crate::sealer::{Stamp, Work};
use crate::segmenter::{Cut, Rules, Segmenter, object_start};
use crate::state::State;

/// See the module.
#[derive(Debug)]
pub(super) struct Intake {
    segmenter: Segmenter,
    scanner: Option<WalScanner>,
    timeline: TimelineId,
    identity: Identity,
    encoder: Encoder,
    budget: Arc<Budget>,
    queue: mpsc::Sender<Work>,
    state: State,
    stamp: Stamp,
    newest_commit: Option<Time>,
    cuts: Vec<Cut>,
}

/// What an intake works with.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) rules: Rules,
    pub(crate) identity: Identity,
    pub(crate) encoder: Encoder,
    pub(crate) budget: Arc<Budget>,
    pub(crate) queue: mpsc::Sender<Work>,
    pub(crate) state: State,
}

impl Intake {
    pub(super) fn new(tools: &Tools, resume: &Resume, now: Duration) -> Self {
        let size = tools.identity.segment_size;
        Self {
            segmenter: Segmenter::new(tools.rules, size, resume.start, resume.sealed, now),
            scanner: Some(scanner(&tools.identity, resume.timeline, resume.start)),
            timeline: resume.timeline,
            identity: tools.identity.clone(),
            encoder: tools.encoder.clone(),
            budget: tools.budget.clone(),
            queue: tools.queue.clone(),
            state: tools.state.clone(),
            stamp: Stamp {
                time: Time::UNIX_EPOCH,
                end: Lsn::ZERO,
            },
            newest_commit: None,
            cuts: Vec::new(),
        }
    }

    pub(super) fn received(&self) -> Lsn {
        self.segmenter.received()
    }

    pub(super) fn sealed(&self) -> Lsn {
        self.segmenter.sealed()
    }

    pub(super) fn has_unsealed(&self) -> bool {
        self.segmenter.has_unsealed()
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.segmenter.deadline()
    }

    pub(super) fn newest_commit(&self) -> Option<Time> {
        self.newest_commit
    }

    /// Notes what the server last said about itself.
    pub(super) fn stamp(&mut self, stamp: Stamp) {
        self.stamp = stamp;
    }

    /// Hands over what comes before all WAL.
    pub(super) async fn open(&mut self, opening: Work) -> Result<()> {
        self.queue.send(opening).await.map_err(|_| AgentError::Cancelled)
    }

    pub(super) async fn push(&mut self, mut data: &[u8], now: Duration) -> Result<()> {
        while !data.is_empty() {
            let (head, rest) = data.split_at(data.len().min(self.segmenter.room()));
            let commits = self.scan(head);
            self.segmenter.push(head, commits, now, &mut self.cuts);
            self.hand_over().await?;
            data = rest;
        }
        Ok(())
    }

    /// Cuts what is due.
    pub(super) async fn tick(&mut self, now: Duration) -> Result<()> {
        self.segmenter.tick(now, &mut self.cuts);
        self.hand_over().await
    }

    /// Seals all of the current object once more.
    pub(super) fn seal_again(&mut self, now: Duration) {
        self.segmenter.seal_again(now);
    }

    /// Cuts everything that was received.
    pub(super) async fn seal(&mut self) -> Result<()> {
        self.segmenter.seal(&mut self.cuts);
        self.hand_over().await
    }

    /// Reads the records of `data`, which is about to be pushed.
    fn scan(&mut self, data: &[u8]) -> CommitSpan {
        let mut commits = CommitSpan::default();
        let at = self.segmenter.received();
        if self.scanner.is_none() && object_start(self.identity.segment_size, at) == at {
            self.scanner = Some(scanner(&self.identity, self.timeline, at));
        }
        let Some(scanner) = &mut self.scanner else {
            return commits;
        };
        let result = scanner.feed(data, &mut |event| {
            if let WalEvent::Commit { time, .. } = event {
                commits.add(time);
            }
        });
        self.newest_commit = commits.last.max(self.newest_commit);
        if let Err(damage) = result {
            tracing::error!(timeline = %self.timeline, %damage, "the server sends damaged WAL: replay will stop there. \
                 The bytes are archived as they are; take a base backup now and check the server's storage");
            self.state.update(|snapshot| {
                snapshot.wal_damage = Some(format!("timeline {}: {damage}", self.timeline));
            });
            self.scanner = None;
        }
        commits
    }

    /// A call that is dropped while the queue is full, as one is when the server has gone, leaves the rest to the next:
    /// the segmenter counts a cut as sealed, and the sealer must get every one.
    async fn hand_over(&mut self) -> Result<()> {
        while !self.cuts.is_empty() {
            let place = self.queue.reserve().await.map_err(|_| AgentError::Cancelled)?;
            let cut = self.cuts.remove(0);
            place.send(self.work(cut));
        }
        Ok(())
    }

    fn work(&self, cut: Cut) -> Work {
        let stamp = self.stamp;
        match cut {
            Cut::Frame { plain } => {
                let charge = self.budget.charge(plain.len() as u64);
                Work::Frame(self.encoder.start(plain, charge))
            }
            Cut::Tail {
                range,
                frames,
                rest,
                commits,
            } => Work::Tail {
                range,
                frames,
                rest,
                commits,
                stamp,
            },
            Cut::Object { range, commits } => Work::Object {
                range,
                commits,
                stamp,
            },
        }
    }
}

/// A reader of this server's records from `start` on.
fn scanner(identity: &Identity, timeline: TimelineId, start: Lsn) -> WalScanner {
    WalScanner::new(
        start,
        identity.segment_size,
        Some(timeline),
        Some(identity.major()),
    )
    .with_page_size(identity.wal_block_size)
    .with_system_id(identity.system_id)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use highwater_config::Policy;
    use highwater_format::{Codec, LsnRange, SegmentSize};

    use super::*;
    use crate::test_world::{MIB, world};

    /// Waits for more than the queue takes, is dropped, and seals what was received: everything that was handed over.
    async fn dropped_half_way(size: SegmentSize, received: u64) -> Vec<Work> {
        let world = world(Policy::All);
        let (queue, mut taken) = mpsc::channel(1);
        let tools = Tools {
            rules: Rules {
                interval: Duration::from_secs(1),
                size: 64 * MIB,
            },
            identity: Identity {
                segment_size: size,
                ..world.shared.archive.identity.clone()
            },
            encoder: Encoder::without_threads(Codec::None),
            budget: Budget::new(64 * MIB),
            queue,
            state: world.shared.state.clone(),
        };
        let start = Lsn(size.bytes());
        let resume = Resume {
            timeline: TimelineId::FIRST,
            start,
            sealed: start,
            after: None,
        };
        let mut intake = Intake::new(&tools, &resume, Duration::ZERO);
        drop(tools);
        let data = vec![0; usize::try_from(3 * MIB).unwrap()];
        let waits = intake.push(&data, Duration::ZERO).now_or_never();
        assert!(waits.is_none(), "the queue has no room");
        assert_eq!(intake.received(), start + received);
        let rest = async move {
            intake.seal().await.unwrap();
            assert_eq!(intake.sealed(), start + received);
        };
        let all = async {
            let mut all = Vec::new();
            while let Some(work) = taken.recv().await {
                all.push(work);
            }
            all
        };
        tokio::join!(rest, all).1
    }

    #[tokio::test]
    async fn a_stream_that_is_dropped_while_it_waits_for_the_sealer_loses_no_object() {
        let all = dropped_half_way(SegmentSize::new(MIB).unwrap(), MIB).await;
        let [Work::Frame(_), Work::Object { range, .. }] = &all[..] else {
            panic!("{all:?}");
        };
        assert_eq!(*range, LsnRange::new(Lsn(MIB), Lsn(2 * MIB)));
    }

    #[tokio::test]
    async fn a_stream_that_is_dropped_while_it_waits_for_the_sealer_loses_no_frame() {
        let all = dropped_half_way(SegmentSize::DEFAULT, 2 * MIB).await;
        let [Work::Frame(_), Work::Frame(_), Work::Tail { range, frames, .. }] = &all[..] else {
            panic!("{all:?}");
        };
        let start = Lsn(SegmentSize::DEFAULT.bytes());
        assert_eq!((range.start, range.end), (start, start + 2 * MIB));
        assert_eq!(*frames, 0..2);
    }
}
