//! Turns the segmenter's cuts into sealed objects, in stream order.
//!
//! Owns: the compressed frames of the object that is being received, and the one place where headers of
//! WAL objects are filled in. Takes [`Work`] from a bounded queue, puts [`Item`]s into the window.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use highwater_format::container;
use highwater_format::{Frame, Gap, Header, Kind, Sealed};
use highwater_format::{Layout, Lsn, LsnRange, SegmentName, SegmentSize, SystemId, Time, TimelineId};
use highwater_store::Object;
use tokio::sync::{mpsc, oneshot};

use crate::blocking;
use crate::budget::{Budget, Charge};
use crate::commits::CommitSpan;
use crate::encoder::{Encoded, Encoder, Pending};
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::gap;
use crate::progress::Progress;
use crate::state::State;
use crate::uploader::Shared;
use crate::window::{Item, What, Window};

/// What the server said with the newest bytes of a cut: stamps for the object's header.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// The server's clock.
    pub time: Time,
    /// The server's end of WAL.
    pub end: Lsn,
}

/// One thing to seal. Order matters.
#[derive(Debug)]
pub enum Work {
    /// The stream begins (again) at an object's start on this timeline: earlier frames are void.
    Begin(TimelineId),
    /// The next frame of the current object.
    Frame(Pending),
    /// A tail chunk; `rest` follows the named frames.
    Tail {
        /// What it covers.
        range: LsnRange,
        /// Frames of the current object.
        frames: Range<usize>,
        /// Bytes after them.
        rest: Bytes,
        /// Commits that end within it.
        commits: CommitSpan,
        /// Header stamps.
        stamp: Stamp,
    },
    /// The current object is complete.
    Object {
        /// What it covers.
        range: LsnRange,
        /// Commits that end within it.
        commits: CommitSpan,
        /// Header stamps.
        stamp: Stamp,
    },
    /// A history file, to be stored before anything of its timeline.
    History {
        /// The timeline that it begins.
        timeline: TimelineId,
        /// Where that timeline's WAL begins in the archive.
        begins: Lsn,
        /// Everything that was streamed before it.
        after: Position,
        /// The file, verbatim.
        content: Bytes,
    },
    /// The record of WAL that can no longer be had, to be stored before anything behind it.
    Gap(Gap),
    /// The record of WAL that is there and cannot be replayed, to be stored before it.
    Unreplayable {
        /// The record.
        gap: Gap,
        /// Where the stream was sealed.
        after: Lsn,
    },
    /// Answers when everything before it is in the window.
    Settle(oneshot::Sender<()>),
}

/// A frame of the current object: still at work, or done.
#[derive(Debug)]
enum Slot {
    Pending(Pending),
    Done(Encoded),
}

/// See the module.
#[derive(Debug)]
pub struct Sealer {
    layout: Layout,
    system_id: SystemId,
    segment_size: SegmentSize,
    encoder: Encoder,
    budget: Arc<Budget>,
    window: Arc<Window>,
    progress: Arc<Progress>,
    state: State,
    timeline: TimelineId,
    /// Timeline of what the state shows as sealed.
    shown: Option<TimelineId>,
    slots: Vec<Slot>,
}

impl Sealer {
    /// A sealer for the objects of one lineage.
    pub fn new(shared: &Shared, system_id: SystemId, encoder: Encoder, budget: Arc<Budget>) -> Self {
        Self {
            layout: shared.archive.layout.clone(),
            system_id,
            segment_size: shared.segment_size,
            encoder,
            budget,
            window: shared.window.clone(),
            progress: shared.progress.clone(),
            state: shared.state.clone(),
            timeline: TimelineId::FIRST,
            shown: None,
            slots: Vec::new(),
        }
    }

    /// Works until the queue ends.
    pub async fn run(mut self, mut queue: mpsc::Receiver<Work>) -> Result<()> {
        while let Some(work) = queue.recv().await {
            self.handle(work).await?;
        }
        Ok(())
    }

    async fn handle(&mut self, work: Work) -> Result<()> {
        match work {
            Work::Begin(timeline) => {
                self.timeline = timeline;
                self.slots.clear();
            }
            Work::Frame(pending) => self.slots.push(Slot::Pending(pending)),
            Work::Tail {
                range,
                frames,
                rest,
                commits,
                stamp,
            } => {
                let mut parts = self.frames(frames).await?;
                if !rest.is_empty() {
                    let charge = self.budget.charge(rest.len() as u64);
                    parts.push(self.encoder.start(rest, charge).await?.frame);
                }
                self.seal(Kind::Tail, range, parts, commits, stamp, Vec::new())
                    .await?;
            }
            Work::Object {
                range,
                commits,
                stamp,
            } => {
                let parts = self.frames(0..self.slots.len()).await?;
                let kind = if range.len() == self.segment_size.bytes() {
                    Kind::Segment
                } else {
                    Kind::Tail
                };
                let charges = self.slots.drain(..).filter_map(|slot| match slot {
                    Slot::Done(encoded) => Some(encoded.charge),
                    Slot::Pending(_) => None,
                });
                let charges = charges.collect();
                self.seal(kind, range, parts, commits, stamp, charges).await?;
            }
            Work::History {
                timeline,
                begins,
                after,
                content,
            } => self.window.push(Item {
                key: self.layout.history(timeline),
                object: Object::new(content),
                what: What::History {
                    timeline,
                    begins,
                    after,
                },
                charge: None,
            }),
            Work::Gap(gap) => {
                let (key, object) = gap::encode(&self.layout, &gap)?;
                self.window.push(Item {
                    key,
                    object,
                    what: What::Gap {
                        timeline: gap.timeline,
                        range: gap.range(),
                    },
                    charge: None,
                });
            }
            Work::Unreplayable { gap, after } => {
                let (key, object) = gap::encode(&self.layout, &gap)?;
                let after = Position {
                    timeline: gap.timeline,
                    lsn: after,
                };
                self.window.push(Item {
                    key,
                    object,
                    what: What::Unreplayable { after },
                    charge: None,
                });
            }
            Work::Settle(answer) => drop(answer.send(())),
        }
        Ok(())
    }

    /// The compressed frames with these numbers, waiting for those still at work.
    async fn frames(&mut self, numbers: Range<usize>) -> Result<Vec<Frame>> {
        let mut frames = Vec::with_capacity(numbers.len() + 1);
        for number in numbers {
            let slot = self.slots.get_mut(number).ok_or_else(|| missing_frame(number))?;
            if let Slot::Pending(pending) = slot {
                let encoded = pending.await?;
                *slot = Slot::Done(encoded);
            }
            if let Slot::Done(encoded) = slot {
                frames.push(encoded.frame.clone());
            }
        }
        Ok(frames)
    }

    /// Seals the frames into one object and hands it to the regions. `charges` pays for the frames that
    /// the object replaces.
    async fn seal(
        &mut self,
        kind: Kind,
        range: LsnRange,
        parts: Vec<Frame>,
        commits: CommitSpan,
        stamp: Stamp,
        charges: Vec<Charge>,
    ) -> Result<()> {
        let header = Header {
            first_commit: commits.first,
            last_commit: commits.last,
            sealed_at: stamp.time,
            server_end: stamp.end,
            ..Header::wal(kind, self.encoder.codec(), self.system_id, self.timeline, range)
        };
        let key = match kind {
            Kind::Segment => {
                let number = self.segment_size.segment_number(range.start);
                self.layout.segment(
                    SegmentName {
                        timeline: self.timeline,
                        number,
                    },
                    self.segment_size,
                )
            }
            _ => self.layout.tail(self.timeline, range),
        };
        let sealed = blocking::run("sealing an object", move || container::seal(header, &parts)).await?;
        let Sealed { bytes, crc32, .. } = sealed.map_err(|source| AgentError::Encode {
            what: format!("{range}"),
            source,
        })?;
        drop(charges);
        let charge = Some(self.budget.charge(bytes.len() as u64));
        if let Some(time) = commits.last {
            self.progress.commit(
                Position {
                    timeline: self.timeline,
                    lsn: range.end,
                },
                time,
            );
        }
        let what = What::Wal {
            timeline: self.timeline,
            range,
            last_commit: commits.last,
        };
        self.window.push(Item {
            key,
            object: Object::with_crc32(bytes, crc32),
            what,
            charge,
        });
        // A timeline may begin before the end of what was sealed on the one before.
        let goes_on = self.shown.replace(self.timeline) == Some(self.timeline);
        self.state.update(|snapshot| {
            let before = if goes_on { snapshot.sealed } else { Lsn::ZERO };
            snapshot.sealed = before.max(range.end);
        });
        Ok(())
    }
}

fn missing_frame(number: usize) -> AgentError {
    AgentError::Bug(format!("a chunk names frame {number}, which was not handed over"))
}
