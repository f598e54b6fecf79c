//! The oracle: what a region really holds, worked out from its raw objects and from the bytes that servers sent.
//!
//! Shares no code with the agent's own view (inventory, coverage, frontier). Every object is decoded when it
//! is stored and compared with the model; what a region holds of a line of descent is the unbroken run from
//! the archive's first byte on, ends before the first byte that differs, and does not enter a timeline whose
//! history file the region lacks.

use std::collections::BTreeMap;

use bytes::Bytes;
use highwater_format::{Key, Layout, LsnRange, Object, SegmentSize};

use crate::node::Line;
use crate::wal::Version;
use crate::wire::lsn;

#[derive(Debug)]
struct Piece {
    timeline: u32,
    start: u64,
    end: u64,
    /// None: a gap that was recorded, which counts as held.
    plain: Option<Vec<u8>>,
}

impl Piece {
    /// Up to where this equals `version`, looking no further than `limit`.
    fn equals_to(&self, version: &Version, limit: u64) -> u64 {
        let end = self.end.min(limit).max(self.start);
        let ours = self.plain.as_deref().unwrap_or_default();
        let ours = &ours[..(end - self.start) as usize];
        let theirs = version.slice(self.start, end);
        if self.start >= version.start && ours == theirs {
            return end;
        }
        let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        self.start + same as u64
    }
}

/// What of one line a region holds, brought up to date piece by piece.
#[derive(Debug)]
struct Reached {
    line: Line,
    seen: usize,
    /// First bytes that differ from the line's, one of each piece that does.
    differs: Vec<u64>,
    wal: Runs,
    /// Gaps count as held.
    with_gaps: Runs,
    gaps: Vec<(u64, u64)>,
}

impl Reached {
    /// How far `runs` go on from `from` without a byte that differs. What lies before a gap cannot be compared any more
    /// with a server that has lost it: no restore goes over the gap.
    fn end(&self, runs: &Runs, from: u64) -> u64 {
        let cut_off = |at: u64| self.gaps.iter().any(|(_, end)| at < *end && *end <= from);
        let bad = |at: &u64| *at >= from || !cut_off(*at);
        let bad = self.differs.iter().copied().filter(bad).min();
        runs.end_of_run(from).min(bad.unwrap_or(u64::MAX))
    }

    /// Where it goes on for one who stands before bytes that differ and that a gap has cut off.
    fn behind_a_gap(&self, at: u64) -> Option<u64> {
        let stands = self.differs.contains(&at);
        let ends = self.gaps.iter().map(|(_, end)| *end);
        ends.filter(|end| stands && *end > at).min()
    }
}

/// Stretches by start; none touches another.
#[derive(Debug, Default)]
struct Runs(BTreeMap<u64, u64>);

impl Runs {
    fn add(&mut self, mut start: u64, mut end: u64) {
        while let Some((&first, &last)) = self.0.range(..=end).next_back() {
            if last < start {
                break;
            }
            self.0.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        if start < end {
            self.0.insert(start, end);
        }
    }

    /// The end of the run that holds `at`; `at` itself if it is not held.
    fn end_of_run(&self, at: u64) -> u64 {
        let run = self.0.range(..=at).next_back();
        run.map_or(at, |(_, end)| (*end).max(at))
    }
}

/// Everything one region was seen to store.
#[derive(Debug, Default)]
pub(crate) struct Holdings {
    pieces: Vec<Piece>,
    histories: BTreeMap<u32, Bytes>,
    reached: Option<Reached>,
}

/// What the objects are judged by.
pub(crate) struct Model<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) size: SegmentSize,
    pub(crate) versions: &'a [Version],
    /// Of every timeline that ever was.
    pub(crate) histories: &'a BTreeMap<u32, Vec<u8>>,
    /// No server has the WAL before this any more.
    pub(crate) gone_before: u64,
}

impl Holdings {
    /// Takes in an object that was stored now. The error is the invariant that it breaks.
    pub(crate) fn store(&mut self, model: &Model<'_>, key: &str, bytes: &Bytes) -> Result<(), String> {
        let (timeline, range) = match model.layout.parse(key) {
            Some(Key::History(timeline)) => return self.store_history(model, timeline.get(), bytes),
            Some(Key::Segment(name)) => {
                let resolved = name
                    .resolve(model.size)
                    .ok_or("a segment's name makes no sense")?;
                (resolved.timeline, resolved.range(model.size))
            }
            Some(Key::Tail(timeline, range)) => (timeline, range),
            Some(Key::Gap(timeline, range)) => return self.store_gap(model, timeline.get(), range),
            _ => return Ok(()),
        };
        let object = Object::open(bytes.clone()).map_err(|error| format!("I3: {key}: {error}"))?;
        let header = object.header();
        if header.timeline != timeline || header.range() != range {
            return Err(format!(
                "I3: {key} calls itself {} on {}",
                header.range(),
                header.timeline
            ));
        }
        let plain = object.plain().map_err(|error| format!("I3: {key}: {error}"))?;
        if plain.len() as u64 != range.len() {
            return Err(format!("I3: {key} holds {} bytes", plain.len()));
        }
        let piece = Piece {
            timeline: timeline.get(),
            start: range.start.0,
            end: range.end.0,
            plain: Some(plain),
        };
        let mut sent = model
            .versions
            .iter()
            .filter(|version| version.timeline == piece.timeline);
        if !sent.any(|version| piece.equals_to(version, u64::MAX) == piece.end) {
            return Err(format!("I3: {key} holds bytes that no server ever sent"));
        }
        if model.histories.contains_key(&piece.timeline) && !self.histories.contains_key(&piece.timeline) {
            return Err(format!("I7: {key} is stored before its timeline's history"));
        }
        self.pieces.push(piece);
        Ok(())
    }

    fn store_history(&mut self, model: &Model<'_>, timeline: u32, bytes: &Bytes) -> Result<(), String> {
        if model.histories.get(&timeline).map(Vec::as_slice) != Some(&bytes[..]) {
            return Err(format!(
                "I3: the history of timeline {timeline} is not the server's"
            ));
        }
        self.histories.insert(timeline, bytes.clone());
        Ok(())
    }

    /// A gap may be recorded only where the server has no WAL any more. What it has removed stays removed, so that the
    /// moment of the record may come as late as storage makes it.
    fn store_gap(&mut self, model: &Model<'_>, timeline: u32, range: LsnRange) -> Result<(), String> {
        if range.end.0 > model.gone_before {
            return Err(format!(
                "I5: a gap {range} is recorded, and the server has the WAL from {} on",
                lsn(model.gone_before)
            ));
        }
        self.pieces.push(Piece {
            timeline,
            start: range.start.0,
            end: range.end.0,
            plain: None,
        });
        Ok(())
    }

    /// The same, of an object that is known to be right, in a region that was emptied since.
    pub(crate) fn store_again(&mut self, model: &Model<'_>, key: &str, bytes: &Bytes) -> Result<(), String> {
        // A history may have been removed while WAL of its timeline was on its way.
        let histories = BTreeMap::new();
        let lenient = Model {
            histories: match model.layout.parse(key) {
                Some(Key::History(_)) => model.histories,
                _ => &histories,
            },
            ..*model
        };
        self.store(&lenient, key, bytes)
    }

    /// Where WAL is missing and that is on record, with more than a place that no recovery gets past.
    pub(crate) fn missing(&self) -> impl Iterator<Item = (u64, u64)> {
        let gaps = self.pieces.iter().filter(|piece| piece.plain.is_none());
        gaps.map(|piece| (piece.start, piece.end))
            .filter(|(start, end)| end - start > 8)
    }

    /// The ends of all gaps on record.
    pub(crate) fn gap_ends(&self) -> impl Iterator<Item = u64> {
        let gaps = self.pieces.iter().filter(|piece| piece.plain.is_none());
        gaps.map(|piece| piece.end)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Up to where a restore from this region alone would get on `line`, beginning at `from`.
    pub(crate) fn reach(&mut self, versions: &[Version], line: &Line, from: u64) -> u64 {
        let known = self.update(versions, line);
        let mut reach = known.end(&known.with_gaps, from);
        while let Some(end) = known.behind_a_gap(reach) {
            reach = known.end(&known.with_gaps, end);
        }
        let children = line.ancestors.iter().skip(1).map(|at| at.timeline);
        let children = children.chain([line.timeline]);
        let lacking = line.ancestors.iter().zip(children);
        lacking
            .filter(|(_, child)| !self.histories.contains_key(child))
            .map(|(before, _)| before.switch)
            .fold(reach, u64::min)
    }

    /// The end of the WAL on `line` that goes on from `from`, without any gap.
    pub(crate) fn wal_end(&mut self, versions: &[Version], line: &Line, from: u64) -> u64 {
        let known = self.update(versions, line);
        known.end(&known.wal, from).max(from)
    }

    /// The ends of the gaps on `line` that hold `at` and are on record here.
    pub(crate) fn gaps_at(&mut self, versions: &[Version], line: &Line, at: u64) -> Vec<u64> {
        let known = self.update(versions, line);
        let around = known
            .gaps
            .iter()
            .filter(|(start, end)| (*start..*end).contains(&at));
        let around = around.map(|(_, end)| *end);
        around.chain(known.behind_a_gap(at)).collect()
    }

    /// Whether any WAL of `timeline` is here: its history alone says that it began, not that it is archived.
    pub(crate) fn knows(&self, timeline: u32) -> bool {
        self.pieces.iter().any(|piece| piece.timeline == timeline)
    }

    /// Whether anything is here of a timeline that is not on `line`.
    pub(crate) fn knows_another_timeline(&self, line: &Line) -> bool {
        let timelines = self.pieces.iter().map(|piece| piece.timeline);
        let mut timelines = timelines.chain(self.histories.keys().copied());
        timelines.any(|timeline| line.part(timeline).is_none())
    }

    /// The first byte on `line` that an object here contradicts.
    pub(crate) fn differs(&mut self, versions: &[Version], line: &Line) -> Option<u64> {
        self.update(versions, line).differs.iter().min().copied()
    }

    fn update(&mut self, versions: &[Version], line: &Line) -> &Reached {
        let fits = |known: &Reached| known.line == *line;
        let mut known = self.reached.take().filter(fits).unwrap_or_else(|| Reached {
            line: line.clone(),
            seen: 0,
            differs: Vec::new(),
            wal: Runs::default(),
            with_gaps: Runs::default(),
            gaps: Vec::new(),
        });
        for piece in &self.pieces[known.seen..] {
            let Some((version, switch)) = line.part(piece.timeline) else {
                continue;
            };
            let end = match &piece.plain {
                Some(_) => piece.equals_to(&versions[version], switch),
                None => piece.end.min(switch),
            };
            if end < piece.end.min(switch) {
                known.differs.push(end);
            }
            known.with_gaps.add(piece.start, end);
            match &piece.plain {
                Some(_) => known.wal.add(piece.start, end),
                None => known.gaps.push((piece.start, end)),
            }
        }
        known.seen = self.pieces.len();
        self.reached.insert(known)
    }
}
