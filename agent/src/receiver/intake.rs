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

    async fn hand_over(&mut self) -> Result<()> {
        for cut in self.cuts.drain(..) {
            let stamp = self.stamp;
            let work = match cut {
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
            };
            self.queue.send(work).await.map_err(|_| AgentError::Cancelled)?;
        }
        Ok(())
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
