//! A stupid model of an archive for tests: every byte of WAL is one unit, every record one slot, everything is a list.
//!
//! The model knows the truth (which bytes are on which timeline, where transactions ended) and answers the planner's
//! questions from it; the planner sees only the catalog that is made from the model.

use std::collections::{BTreeMap, BTreeSet};

use highwater_format::{
    Backup, BackupId, Codec, History, HistoryEntry, Identity, Layout, Lsn, LsnRange, Pulse, SegmentSize,
    SystemId, Time, TimelineId,
    coverage::{Piece, PieceKind},
};

use super::{Answer, Answers, Mark, Plan, Question, Refusal, Span, Step, plan};
use crate::{
    catalog::{Catalog, Reading, RegionView, TimelineView},
    target::Request,
};

/// Bytes in a segment, and in a slot: one record and one object each.
pub(crate) const SEGMENT: u64 = 1 << 20;
pub(crate) const SLOT: u64 = SEGMENT / 4;

pub(crate) fn tli(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

pub(crate) fn lsn(slot: u64) -> Lsn {
    Lsn(SEGMENT + slot * SLOT)
}

pub(crate) fn time(second: i64) -> Time {
    Time::from_unix_micros(1_700_000_000_000_000 + second * 1_000_000)
}

/// One timeline.
#[derive(Debug, Clone)]
pub(crate) struct Branch {
    pub(crate) parent: Option<(u32, u64)>,
    /// The first slot behind its WAL.
    pub(crate) end: u64,
}

/// The truth.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    pub(crate) branches: BTreeMap<u32, Branch>,
    /// Transaction ends by timeline and slot, with their second. Other slots hold records of no interest.
    pub(crate) commits: BTreeMap<(u32, u64), i64>,
    /// Slots that are in no region, by timeline.
    pub(crate) lost: BTreeSet<(u32, u64)>,
    /// Backups: timeline, first slot, slot behind the last.
    pub(crate) backups: Vec<(u32, u64, u64)>,
    /// The server time at which each timeline was seen at its end.
    pub(crate) pulses: BTreeMap<u32, i64>,
    /// The timelines whose history file is lost.
    pub(crate) forgotten: BTreeSet<u32>,
    /// The backups were taken from a standby.
    pub(crate) standby: bool,
    /// A second region exists and does not answer.
    pub(crate) silent: bool,
}

impl Model {
    /// The timelines that lead to `timeline`, the oldest first, each with the slot where it is left.
    pub(crate) fn ancestry(&self, timeline: u32) -> Vec<(u32, u64)> {
        let mut path = vec![(timeline, u64::MAX)];
        let mut at = timeline;
        while let Some((parent, switch)) = self.branches[&at].parent {
            path.push((parent, switch));
            at = parent;
        }
        path.reverse();
        path
    }

    /// Which timeline a slot is on, going to `timeline`.
    pub(crate) fn timeline_of(&self, timeline: u32, slot: u64) -> u32 {
        let path = self.ancestry(timeline);
        path.iter()
            .find(|(_, switch)| slot < *switch)
            .map_or(timeline, |(id, _)| *id)
    }

    /// Whether a slot can be read, going to `timeline`: from its own timeline, or from a later one's copy of the segment
    /// in which it began.
    pub(crate) fn readable(&self, timeline: u32, slot: u64) -> bool {
        let path = self.ancestry(timeline);
        path.iter().enumerate().any(|(index, (id, switch))| {
            let begin = index.checked_sub(1).map_or(0, |before| path[before].1);
            let copied = begin - begin % (SEGMENT / SLOT);
            let held = (copied..self.branches[id].end).contains(&slot) && !self.lost.contains(&(*id, slot));
            held && slot < *switch && (slot >= copied)
        })
    }

    pub(crate) fn history(&self, timeline: u32) -> History {
        let path = self.ancestry(timeline);
        let entries = path.iter().take(path.len() - 1);
        let entry = |(id, switch): &(u32, u64)| HistoryEntry {
            timeline: tli(*id),
            switch: lsn(*switch),
            reason: "model".to_owned(),
        };
        History {
            timeline: tli(timeline),
            entries: entries.map(entry).collect(),
        }
    }

    fn timeline_view(&self, timeline: u32) -> TimelineView {
        let mut view = TimelineView::default();
        let begin = self.branches[&timeline].parent.map_or(0, |(_, switch)| switch);
        let copied = begin - begin % (SEGMENT / SLOT);
        for slot in
            (copied..self.branches[&timeline].end).filter(|slot| !self.lost.contains(&(timeline, *slot)))
        {
            let range = LsnRange::new(lsn(slot), lsn(slot + 1));
            view.insert(Piece {
                range,
                kind: PieceKind::Tail,
                size: 100,
            });
        }
        if timeline > 1 && !self.forgotten.contains(&timeline) {
            view.history = Some((self.history(timeline), Vec::new()));
        }
        view
    }

    pub(crate) fn backup(&self, index: usize) -> Backup {
        let (timeline, start, stop) = self.backups[index];
        let started = self.time_at(timeline, start);
        Backup {
            id: BackupId::new(tli(timeline), lsn(start), started),
            system_id: SystemId(7),
            server_version: 150_020,
            timeline: tli(timeline),
            start_lsn: lsn(start),
            stop_lsn: lsn(stop),
            stop_timeline: tli(timeline),
            started_at: started,
            finished_at: self.time_at(timeline, stop),
            label: String::new(),
            tablespaces: Vec::new(),
            from_standby: self.standby,
            files: 1,
            plain_bytes: 1,
            stored_bytes: 1,
            packs: 1,
            manifest_crc32: "00000000".to_owned(),
            pg_manifest: true,
            codec: Codec::Zstd,
        }
    }

    /// The server's time when its WAL ended at `slot`.
    pub(crate) fn time_at(&self, timeline: u32, slot: u64) -> Time {
        let before = (0..slot)
            .rev()
            .find_map(|at| self.commits.get(&(self.timeline_of(timeline, at), at)));
        time(before.copied().unwrap_or(0))
    }

    pub(crate) fn catalog(&self) -> Catalog {
        let mut region = RegionView::new("a", "memory", Reading::Readable);
        for timeline in self.branches.keys() {
            region
                .timelines
                .insert(tli(*timeline), self.timeline_view(*timeline));
        }
        for index in 0..self.backups.len() {
            let backup = self.backup(index);
            region.backups.insert(backup.id.clone(), backup);
        }
        if let Some((timeline, second)) = self.pulses.last_key_value() {
            let end = lsn(self.branches[timeline].end);
            region.pulse = Some(Pulse {
                timeline: tli(*timeline),
                server_time: time(*second),
                wal_end: end,
                durable_lsn: end,
                stored_lsn: end,
                last_commit: None,
                instance: "model".to_owned(),
                sequence: 1,
                quorum: None,
                interval_ms: None,
                waiting_ms: None,
                answered_at: None,
            });
        }
        let mut regions = vec![region];
        if self.silent {
            regions.push(RegionView::new(
                "b",
                "memory",
                Reading::Unreadable {
                    error: "timed out".to_owned(),
                },
            ));
        }
        Catalog {
            layout: Layout::new("model".parse().unwrap(), SystemId(7)),
            identity: Identity {
                system_id: SystemId(7),
                server_version: 150_020,
                segment_size: SegmentSize::new(SEGMENT).unwrap(),
                wal_block_size: 8192,
                block_size: 8192,
            },
            other_lineages: Vec::new(),
            regions,
            findings: Vec::new(),
            damaged: Vec::new(),
        }
    }

    /// Plans with every question answered from the truth.
    pub(crate) fn plan(&self, request: &Request) -> Result<Plan, Refusal> {
        self.plan_for(&self.catalog(), request)
    }

    /// The same with a catalog that was changed.
    pub(crate) fn plan_for(&self, catalog: &Catalog, request: &Request) -> Result<Plan, Refusal> {
        let mut answers = Answers::new();
        for _ in 0..1000 {
            match plan(catalog, request, &answers)? {
                Step::Done(plan) => return Ok(*plan),
                Step::Ask(question) => {
                    let answer = self.answer(&question);
                    assert!(answers.insert(question, answer).is_none(), "asked twice");
                }
            }
        }
        panic!("the planner does not come to an end");
    }

    fn slots(&self, span: &Span) -> std::ops::Range<u64> {
        let slot = |lsn: Lsn| (lsn.0 - SEGMENT) / SLOT;
        let range = slot(span.start)..slot(span.end);
        for at in range.clone() {
            assert!(
                self.readable(span.timeline.get(), at),
                "asked about slot {at}, which is not there"
            );
        }
        range
    }

    fn mark(slot: u64, second: Option<i64>) -> Mark {
        Mark {
            start: lsn(slot),
            end: lsn(slot + 1),
            time: second.map(time),
        }
    }

    fn commits_in(&self, span: &Span) -> Vec<(u64, i64)> {
        let timeline = span.timeline.get();
        let slots = self.slots(span);
        slots
            .filter_map(|slot| {
                Some((
                    slot,
                    *self.commits.get(&(self.timeline_of(timeline, slot), slot))?,
                ))
            })
            .collect()
    }

    fn answer(&self, question: &Question) -> Answer {
        match question {
            Question::Commits {
                span,
                time: limit,
                or_at,
            } => {
                let commits = self.commits_in(span);
                let stops = |second: i64| time(second) > *limit || (*or_at && time(second) == *limit);
                let first = commits.iter().position(|(_, second)| stops(*second));
                let mark = |index: usize| {
                    commits
                        .get(index)
                        .map(|(slot, second)| Self::mark(*slot, Some(*second)))
                };
                let kept = first.unwrap_or(commits.len()).checked_sub(1);
                Answer::Commits {
                    last_before: kept.and_then(mark),
                    first_after: first.and_then(mark),
                }
            }
            Question::Records { span, lsn: at } => {
                let slots = self.slots(span);
                let before = slots.clone().rev().find(|slot| lsn(*slot) < *at);
                let after = slots.clone().find(|slot| lsn(*slot) >= *at);
                let commits = self.commits_in(span);
                let second = |slot| {
                    commits
                        .iter()
                        .find(|(at, _)| *at == slot)
                        .map(|(_, second)| *second)
                };
                let mark = |slot| Self::mark(slot, second(slot));
                Answer::Records {
                    before: before.map(mark),
                    at_or_after: after.map(mark),
                }
            }
            // The model's transaction ids are their slots.
            Question::Xid { span, xid } => {
                let found = self
                    .commits_in(span)
                    .into_iter()
                    .find(|(slot, _)| *slot == u64::from(*xid));
                Answer::Mark(found.map(|(slot, second)| Self::mark(slot, Some(second))))
            }
            Question::Name { .. } => Answer::Mark(None),
            Question::Proven { .. } => Answer::Time(None),
        }
    }
}
