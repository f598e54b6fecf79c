//! Cuts the stream of WAL bytes into what is stored: frames, tail chunks and whole objects.
//!
//! Owns: where cuts are, and when. Takes bytes and a monotonic `now`, gives [`Cut`]s in stream order; does
//! no I/O, holds at most one frame (1 MiB) of plain bytes, and knows nothing of compression or regions.
//!
//! - A **frame** is handed over when its 1 MiB is complete; all frames of an object follow each other.
//! - A **tail chunk** is cut when the oldest byte that is in no chunk has waited for the flush interval,
//!   when asked to ([`Segmenter::seal`]), or by size. By size only if the object will not be complete
//!   within the interval at the present rate: at high rates whole objects are stored soon enough and
//!   chunks would only store their bytes twice.
//! - An **object** is a whole segment, or a 64 MiB piece of a larger one.
//!
//! So that a slow segment is not thousands of chunks to read, a chunk may begin earlier than the last one
//! ended: every [`FANOUT`]th chunk of a frame covers the run before it, every `FANOUT`th of those the runs
//! before, and a frame that was cut into chunks is stored once more as a whole when it is complete. A reader
//! needs at most one chunk per frame and about `3 * FANOUT` for the newest frame.

use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use highwater_format::container::{FRAME_SIZE as FRAME_BYTES, MAX_OBJECT_PLAIN};
use highwater_format::{Lsn, LsnRange, SegmentSize};

use crate::commits::CommitSpan;

/// Runs of this many chunks of one size are covered by one larger chunk.
pub const FANOUT: usize = 32;

const FRAME: u64 = FRAME_BYTES as u64;
const FRAME_SIZE: usize = FRAME_BYTES as usize;

/// When tail chunks are cut.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// A received byte waits at most this long before it is in a chunk.
    pub interval: Duration,
    /// A chunk is cut at this many bytes, unless its object is complete soon anyway.
    pub size: u64,
}

/// One decision of the segmenter. Ranges are in stream order; see the module.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Cut {
    /// A complete frame of the current object.
    Frame {
        /// Its bytes, at most 1 MiB.
        plain: Bytes,
    },
    /// A tail chunk: the named frames of the current object, then `rest`.
    Tail {
        /// What it covers.
        range: LsnRange,
        /// Frames of the current object, by number.
        frames: Range<usize>,
        /// Bytes after these frames; empty if there are none.
        rest: Bytes,
        /// Commits that end within it.
        commits: CommitSpan,
    },
    /// The current object is complete: it consists of all frames since the last one.
    Object {
        /// What it covers.
        range: LsnRange,
        /// Commits that end within it.
        commits: CommitSpan,
    },
}

/// A chunk of the current frame, or several that a larger one has covered.
#[derive(Debug)]
struct Run {
    start: Lsn,
    level: u8,
    commits: CommitSpan,
}

/// See the module.
#[derive(Debug)]
pub struct Segmenter {
    rules: Rules,
    object_size: u64,
    object_start: Lsn,
    object_since: Duration,
    received: Lsn,
    sealed: Lsn,
    unsealed_since: Option<Duration>,
    frame: BytesMut,
    frames: Vec<CommitSpan>,
    frame_commits: CommitSpan,
    open_commits: CommitSpan,
    runs: Vec<Run>,
}

impl Segmenter {
    /// Begins at `start`, the first byte of an object; what lies before `sealed` is already stored in
    /// chunks and is only gathered for its object.
    pub fn new(rules: Rules, segment_size: SegmentSize, start: Lsn, sealed: Lsn, now: Duration) -> Self {
        Self {
            rules,
            object_size: object_size(segment_size),
            object_start: start,
            object_since: now,
            received: start,
            sealed: sealed.max(start),
            unsealed_since: None,
            frame: BytesMut::new(),
            frames: Vec::new(),
            frame_commits: CommitSpan::default(),
            open_commits: CommitSpan::default(),
            runs: Vec::new(),
        }
    }

    /// End of what was pushed.
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// End of what is in a chunk or an object.
    pub fn sealed(&self) -> Lsn {
        self.sealed
    }

    /// Whether something received is in no chunk yet.
    pub fn has_unsealed(&self) -> bool {
        self.received > self.sealed
    }

    /// When the interval of the oldest unsealed byte ends; none while everything is sealed.
    pub fn deadline(&self) -> Option<Duration> {
        self.unsealed_since.map(|since| since + self.rules.interval)
    }

    /// How many of the bytes that follow may be pushed in one call: to the end of the frame.
    pub fn room(&self) -> usize {
        FRAME_SIZE - self.frame.len()
    }

    /// Takes the next bytes, at most [`Segmenter::room`] of them, with the commits that end in them.
    pub fn push(&mut self, data: &[u8], commits: CommitSpan, now: Duration, out: &mut Vec<Cut>) {
        debug_assert!(data.len() <= self.room());
        if self.received == self.object_start {
            self.object_since = now;
        }
        // Only now: whoever compressed the last frame where it was cut has let go of its memory, which is taken again.
        self.frame.reserve(FRAME_SIZE - self.frame.len());
        self.frame.extend_from_slice(data);
        self.received = self.received + data.len() as u64;
        self.frame_commits.merge(commits);
        if self.has_unsealed() {
            self.open_commits.merge(commits);
            self.unsealed_since.get_or_insert(now);
        }
        if self.frame.len() == FRAME_SIZE {
            self.finish_frame(now, out);
        }
        let unsealed = self.received.distance_from(self.sealed);
        if unsealed >= self.rules.size && !self.completes_soon(now) {
            self.seal(out);
        }
    }

    /// Cuts a chunk if the interval of the oldest unsealed byte has passed.
    pub fn tick(&mut self, now: Duration, out: &mut Vec<Cut>) {
        if self.deadline().is_some_and(|deadline| now >= deadline) {
            self.seal(out);
        }
    }

    /// Cuts a chunk of all that is unsealed, if anything is.
    pub fn seal(&mut self, out: &mut Vec<Cut>) {
        if !self.has_unsealed() {
            return;
        }
        let cut = if self.sealed < self.frame_start() {
            self.cut_across_frames()
        } else {
            self.cut_in_frame()
        };
        out.push(cut);
        self.mark_sealed();
    }

    /// The current object counts as unsealed from its start on: what was stored of it before is not all there.
    pub fn seal_again(&mut self, now: Duration) {
        self.sealed = self.object_start;
        self.runs.clear();
        self.open_commits = self.frame_commits;
        self.frames
            .iter()
            .for_each(|frame| self.open_commits.merge(*frame));
        self.unsealed_since = self.has_unsealed().then_some(now);
    }

    fn mark_sealed(&mut self) {
        self.sealed = self.sealed.max(self.received);
        self.unsealed_since = None;
        self.open_commits = CommitSpan::default();
    }

    fn frame_start(&self) -> Lsn {
        self.object_start + self.frames.len() as u64 * FRAME
    }

    /// A chunk within the current frame; begins where the run that it completes began.
    fn cut_in_frame(&mut self) -> Cut {
        let (start, commits) = self.push_run(self.sealed, self.open_commits);
        let offset = usize::try_from(start.distance_from(self.frame_start())).unwrap_or(0);
        Cut::Tail {
            range: LsnRange {
                start,
                end: self.received,
            },
            frames: self.frames.len()..self.frames.len(),
            rest: Bytes::copy_from_slice(self.frame.get(offset..).unwrap_or_default()),
            commits,
        }
    }

    /// A chunk of whole frames, and of what the current frame holds.
    fn cut_across_frames(&mut self) -> Cut {
        let first = usize::try_from(self.sealed.distance_from(self.object_start) / FRAME).unwrap_or(0);
        let mut commits = self.frame_commits;
        for frame in self.frames.iter().skip(first) {
            commits.merge(*frame);
        }
        if !self.frame.is_empty() {
            self.push_run(self.frame_start(), self.frame_commits);
        }
        Cut::Tail {
            range: LsnRange {
                start: self.object_start + first as u64 * FRAME,
                end: self.received,
            },
            frames: first..self.frames.len(),
            rest: Bytes::copy_from_slice(&self.frame),
            commits,
        }
    }

    /// Notes a chunk of the current frame and merges full runs; returns where the chunk has to begin.
    fn push_run(&mut self, start: Lsn, commits: CommitSpan) -> (Lsn, CommitSpan) {
        self.runs.push(Run {
            start,
            level: 0,
            commits,
        });
        loop {
            let level = self.runs.last().map_or(0, |run| run.level);
            let same = self
                .runs
                .iter()
                .rev()
                .take_while(|run| run.level == level)
                .count();
            if same < FANOUT {
                break;
            }
            let first = self.runs.len() - same;
            let merged = self.runs.drain(first..).reduce(|mut a, b| {
                a.commits.merge(b.commits);
                a
            });
            self.runs.extend(merged.map(|run| Run {
                level: level + 1,
                ..run
            }));
        }
        self.runs
            .last()
            .map_or((start, commits), |run| (run.start, run.commits))
    }

    fn finish_frame(&mut self, now: Duration, out: &mut Vec<Cut>) {
        let start = self.frame_start();
        let plain = self.frame.split().freeze();
        out.push(Cut::Frame { plain });
        self.frames.push(self.frame_commits);
        let commits = std::mem::take(&mut self.frame_commits);
        self.runs.clear();
        if self.received.distance_from(self.object_start) == self.object_size {
            self.finish_object(now, out);
        } else if self.sealed > start && self.sealed < self.received {
            let number = self.frames.len() - 1;
            out.push(Cut::Tail {
                range: LsnRange {
                    start,
                    end: self.received,
                },
                frames: number..number + 1,
                rest: Bytes::new(),
                commits,
            });
            self.mark_sealed();
        }
    }

    fn finish_object(&mut self, now: Duration, out: &mut Vec<Cut>) {
        let mut commits = CommitSpan::default();
        for frame in self.frames.drain(..) {
            commits.merge(frame);
        }
        out.push(Cut::Object {
            range: LsnRange {
                start: self.object_start,
                end: self.received,
            },
            commits,
        });
        self.object_start = self.received;
        self.object_since = now;
        self.mark_sealed();
    }

    /// Whether, at the rate since its first byte, the object is complete within the interval.
    fn completes_soon(&self, now: Duration) -> bool {
        let got = self.received.distance_from(self.object_start);
        if got == 0 {
            return false;
        }
        let left = self.object_size.saturating_sub(got);
        let elapsed = now.saturating_sub(self.object_since);
        elapsed.as_micros().saturating_mul(u128::from(left))
            < self.rules.interval.as_micros().saturating_mul(u128::from(got))
    }
}

/// Bytes in one object: a segment, or a piece of one that is too large for an object.
pub fn object_size(segment_size: SegmentSize) -> u64 {
    segment_size.bytes().min(MAX_OBJECT_PLAIN)
}

/// The first byte of the object that holds `lsn`.
pub fn object_start(segment_size: SegmentSize, lsn: Lsn) -> Lsn {
    lsn.align_down(object_size(segment_size))
}

#[cfg(test)]
#[path = "segmenter_tests.rs"]
mod tests;
