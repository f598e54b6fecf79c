//! Gaps: WAL that the archive does not have and can no longer get.
//!
//! Owns: which range a gap may have and where to look for a smaller one (pure), its record, and reading and copying
//! records. Does not own: the proof (receiver), the order in which regions store it (window), the base backup that
//! ends it (schedule).
//!
//! A record is written once, like WAL. Two records of one key name the same hole, whoever found it and when: the one
//! that is there stays. Records may overlap, when two agents found the same hole at different times; what counts is
//! what they cover together.

use highwater_format::{BackupId, Gap, Key, Layout, Lsn, LsnRange, SegmentSize, Time, TimelineId, records};
use highwater_store::{Object, Put, PutMode, Store, list_all};

use crate::error::{AgentError, Kind, Result};
use crate::frontier::Position;
use crate::inventory::timelines;
use crate::region::{Archive, Region};
use crate::resume::ServerView;

/// How a gap ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ends {
    /// With the first WAL of its timeline that the server still has: proven only by a stream that begins there.
    Stream,
    /// With its timeline: the server's history left it there, and has nothing older either.
    Switch,
}

/// A gap from the archive's end to where the server can be read again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Span {
    /// The timeline of the archive's end.
    pub timeline: TimelineId,
    /// What is missing.
    pub range: LsnRange,
    /// How it ends.
    pub ends: Ends,
}

/// The gaps that may lie between the archive's end and the server's WAL, the smaller first: up to where the slot
/// keeps WAL from, or, where that promise turns out to be broken, up to where the server writes now. Behind them the
/// server can be read; what it has of them is found with a [`Search`].
pub fn spans(frontier: Position, server: &ServerView, size: SegmentSize) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for place in server.slot.into_iter().chain([server.end]) {
        let found = span(frontier, server, size.segment_start(place));
        spans.extend(found.filter(|span| !spans.contains(span)));
    }
    spans
}

/// Finds the part of a gap that the server really lacks. It may have WAL from before the slot's position, until the next
/// checkpoint: a slot that was just made keeps nothing of it, and it is there all the same.
///
/// WAL is removed from its old end, so that what is there is one stretch; between a segment that is gone and one that
/// can be read lies its beginning. The segment that is tried first is the one right before the gap's end: mostly that
/// is gone, and with it all the others.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    size: SegmentSize,
    /// Number of the last segment that is known to be gone.
    gone: u64,
    found: Span,
    begun: bool,
}

impl Search {
    /// `span` begins in a segment that is gone, and what follows it can be read.
    pub fn new(span: Span, size: SegmentSize) -> Self {
        Self {
            size,
            gone: size.segment_number(span.range.start),
            found: span,
            begun: false,
        }
    }

    /// The next smaller gap to be tried; none when what was found is all that is missing.
    pub fn next(&self) -> Option<Span> {
        let end = self.found.range.end.saturating_sub(1);
        let between = self.gone + 1..self.size.segment_number(end) + 1;
        let number = match self.begun {
            false => between.clone().next_back()?,
            true => between.start + (between.end.checked_sub(between.start)?) / 2,
        };
        let end = Lsn(number.checked_mul(self.size.bytes())?);
        let range = LsnRange {
            end,
            ..self.found.range
        };
        let smaller = between.contains(&number) && end < self.found.range.end && !range.is_empty();
        smaller.then_some(Span {
            range,
            ends: Ends::Stream,
            ..self.found
        })
    }

    /// Whether the server could be read behind the gap that was tried.
    pub fn tried(&mut self, span: Span, can_be_read: bool) {
        self.begun = true;
        match can_be_read {
            true => self.found = span,
            false => self.gone = self.size.segment_number(span.range.end),
        }
    }

    /// The smallest gap so far.
    pub fn found(&self) -> Span {
        self.found
    }
}

fn span(frontier: Position, server: &ServerView, place: Lsn) -> Option<Span> {
    let left = match frontier.timeline == server.timeline {
        true => None,
        false => Some(server.history.switch_of(frontier.timeline)?),
    };
    let (end, ends) = match left {
        Some(switch) if place >= switch => (switch, Ends::Switch),
        _ => (place, Ends::Stream),
    };
    let range = LsnRange {
        start: frontier.lsn,
        end,
    };
    (!range.is_empty()).then_some(Span {
        timeline: frontier.timeline,
        range,
        ends,
    })
}

/// Key and bytes of a record.
pub fn encode(layout: &Layout, gap: &Gap) -> Result<(String, Object)> {
    let document = records::encode(gap).map_err(|source| AgentError::Encode {
        what: format!("the record of the gap {}", gap.range()),
        source,
    })?;
    Ok((layout.gap(gap.timeline, gap.range()), Object::new(document)))
}

/// Writes a record into one region. One that is there already says the same.
pub async fn write(store: &dyn Store, layout: &Layout, key: &str, record: Object) -> Result<()> {
    if store.put(key, record, PutMode::Create).await? == Put::Created {
        return Ok(());
    }
    read(store, layout, key).await.map(drop)
}

/// Reads a record and checks that it names the hole that its key names.
pub async fn read(store: &dyn Store, layout: &Layout, key: &str) -> Result<Gap> {
    let bytes = store.get(key).await?;
    let damaged = |source| AgentError::Object {
        region: store.region().to_owned(),
        key: key.to_owned(),
        source,
    };
    let gap: Gap = records::decode(&bytes).map_err(damaged)?;
    if layout.gap(gap.timeline, gap.range()) != key {
        return Err(damaged(highwater_format::FormatError::Invalid {
            what: "a gap",
            problem: format!("it names {} of timeline {}", gap.range(), gap.timeline),
        }));
    }
    Ok(gap)
}

/// Copies a record from one region into another.
pub async fn copy(
    archive: &Archive,
    source: &Region,
    target: &Region,
    timeline: TimelineId,
    range: LsnRange,
) -> Result<()> {
    let layout = &archive.layout;
    let key = layout.gap(timeline, range);
    let gap = read(&*source.quick, layout, &key).await?;
    let (key, record) = encode(layout, &gap)?;
    write(&*target.store, layout, &key, record).await
}

/// Every record of a region, in order. One that cannot be read is a gap all the same: its key names the hole.
pub async fn read_all(store: &dyn Store, layout: &Layout) -> Result<Vec<Gap>> {
    let mut gaps = Vec::new();
    for timeline in timelines(store, layout).await? {
        for meta in list_all(store, &layout.gap_dir(timeline), None).await? {
            if let Some(Key::Gap(timeline, range)) = layout.parse(&meta.key) {
                gaps.push(match read(store, layout, &meta.key).await {
                    Err(error) if error.kind() == Kind::Damage => unreadable(timeline, range, &error),
                    gap => gap?,
                });
            }
        }
    }
    Ok(gaps)
}

fn unreadable(timeline: TimelineId, range: LsnRange, error: &AgentError) -> Gap {
    tracing::error!(%error, "a gap is on record, and its record cannot be read");
    Gap {
        timeline,
        start: range.start,
        end: range.end,
        reason: format!("the record cannot be read: {error}"),
        recorded_at: Time::UNIX_EPOCH,
        unreplayable: false,
    }
}

/// The first of these base backups that can be restored to without the gap: everything later can be, from there on.
/// One of a later timeline ends it too: it was taken after the archive had gone on there, and where that timeline left
/// the gap's own one before the gap, the gap concerns nothing that still grows.
pub fn ended_by<'a>(gap: &Gap, backups: impl IntoIterator<Item = &'a BackupId>) -> Option<&'a BackupId> {
    let after = |id: &&BackupId| {
        id.timeline() > gap.timeline || (id.timeline() == gap.timeline && id.start_lsn() >= gap.end)
    };
    backups
        .into_iter()
        .filter(after)
        .min_by_key(|id| (id.timeline(), id.start_lsn()))
}

#[cfg(test)]
#[path = "gap_tests.rs"]
mod tests;
