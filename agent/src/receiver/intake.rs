//! WAL bytes in, work for the sealer out: one stream on one timeline.
//!
//! Owns the segmenter and the reading of WAL records on the way. What no recovery gets past is noticed here: a damaged
//! record, and what the server writes after it ran with `wal_level = minimal`. The bytes are kept all the same (they are what
//! the server has), but that they are a dead end is reported loudly and goes on record before what follows is stored.
//! Behind damage records are read again from the next object on.
//!
//! What nobody reads ([`crate::unused`]) is kept as zeros, whatever comes.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use highwater_format::walscan::{WalDamage, WalEvent, WalScanner};
use highwater_format::{Gap, Identity, Lsn, LsnRange, Time, TimelineId};
use tokio::sync::mpsc;

use crate::budget::Budget;
use crate::commits::CommitSpan;
use crate::encoder::Encoder;
use crate::error::{AgentError, Result};
use crate::resume::Resume;
use crate::sealer::{Stamp, Work};
use crate::segmenter::{Cut, Rules, Segmenter, object_start};
use crate::state::State;
use crate::unused::{Rest, scanner};

/// `WAL_LEVEL_MINIMAL`, `access/xlog.h`.
const WAL_LEVEL_MINIMAL: i32 = 0;
/// Records begin and end at multiples of this; as many bytes are enough to say where recovery ends.
const ALIGNED: u64 = 8;

/// Before `range` everything can be reached, and what comes later from a base backup that was taken later.
#[derive(Debug)]
struct DeadEnd {
    range: LsnRange,
    reason: String,
}

impl DeadEnd {
    /// The record that ends there is the last one that a recovery reads.
    fn minimal_wal(end: Lsn) -> Self {
        Self {
            range: LsnRange::new(end.saturating_sub(ALIGNED), end),
            reason: "the server ran with wal_level = minimal, and PostgreSQL stops every recovery here"
                .into(),
        }
    }

    /// Without the first byte: what is stored ends right there when this goes on record, and must not seem to go on.
    fn damage(damage: &WalDamage) -> Self {
        Self {
            range: LsnRange::new(damage.lsn + 1, damage.lsn.saturating_add(ALIGNED)),
            reason: format!("the server sent damaged WAL, check its storage: {damage}"),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Intake {
    segmenter: Segmenter,
    scanner: Option<WalScanner>,
    /// What follows a switch that is archived already.
    unused: Option<Rest>,
    timeline: TimelineId,
    identity: Identity,
    encoder: Encoder,
    budget: Arc<Budget>,
    queue: mpsc::Sender<Work>,
    state: State,
    stamp: Stamp,
    newest_commit: Option<Time>,
    /// Where recovery ends although the WAL goes on.
    dead_ends: Vec<DeadEnd>,
    /// The end of the last one of which the record is on its way.
    on_record: Option<Lsn>,
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
    /// `unused`: what nobody reads of the segment where it begins.
    pub(super) fn new(tools: &Tools, resume: &Resume, unused: Option<Rest>, now: Duration) -> Self {
        let size = tools.identity.segment_size;
        let scanner = || scanner(&tools.identity, resume.timeline, resume.start);
        Self {
            segmenter: Segmenter::new(tools.rules, size, resume.start, resume.sealed, now),
            scanner: unused.is_none().then(scanner),
            unused,
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
            dead_ends: Vec::new(),
            on_record: None,
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
            self.is_left_over(head)?;
            let commits = self.scan(head);
            for dead_end in std::mem::take(&mut self.dead_ends) {
                self.record(dead_end).await?;
            }
            let kept = self.without_leftovers(head);
            self.segmenter.push(&kept, commits, now, &mut self.cuts);
            self.hand_over().await?;
            data = rest;
        }
        Ok(())
    }

    /// Fails if the server has written WAL where the archive has nothing but what follows a switch.
    fn is_left_over(&self, data: &[u8]) -> Result<()> {
        let at = self.segmenter.received();
        let rest = self.unused.as_ref().filter(|rest| rest.range.contains(at));
        match rest.and_then(|rest| Some((rest.range, rest.first_wal(at, data)?))) {
            Some((range, at)) => Err(AgentError::Diverged {
                timeline: self.timeline,
                at,
                range,
            }),
            None => Ok(()),
        }
    }

    /// The same bytes, with zeros behind a switch. They have been read, and are about to be pushed.
    fn without_leftovers<'a>(&self, data: &'a [u8]) -> Cow<'a, [u8]> {
        let at = self.segmenter.received();
        let here = LsnRange::new(at, at + data.len() as u64);
        let seen = self.scanner.as_ref().and_then(WalScanner::unused);
        let known = self.unused.map(|rest| rest.range);
        let unused = known.filter(|unused| unused.contains(at)).or(seen);
        let Some(unused) = unused.and_then(|unused| unused.intersect(here)) else {
            return Cow::Borrowed(data);
        };
        let offset = |lsn: Lsn| usize::try_from(lsn.distance_from(at)).unwrap_or(data.len());
        let unused = offset(unused.start)..offset(unused.end);
        if data[unused.clone()].iter().all(|byte| *byte == 0) {
            return Cow::Borrowed(data);
        }
        let mut kept = data.to_vec();
        kept[unused].fill(0);
        Cow::Owned(kept)
    }

    async fn record(&mut self, dead_end: DeadEnd) -> Result<()> {
        let DeadEnd { range, reason } = dead_end;
        tracing::error!(
            timeline = %self.timeline, at = %range.start, reason,
            "NO RECOVERY GETS PAST THIS WAL. That goes on record like a gap, and a new base backup is taken at once; moments \
             between the two cannot be restored"
        );
        self.seal().await?;
        let gap = Gap {
            timeline: self.timeline,
            start: range.start,
            end: range.end,
            reason,
            recorded_at: self.stamp.time,
            unreplayable: true,
        };
        let after = self.segmenter.sealed();
        let work = Work::Unreplayable { gap, after };
        self.queue.send(work).await.map_err(|_| AgentError::Cancelled)?;
        self.on_record = Some(range.end);
        Ok(())
    }

    /// The end of WAL that no recovery gets past, once its record is on its way; told once.
    pub(super) fn take_recorded(&mut self) -> Option<Lsn> {
        self.on_record.take()
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
        let is_used = self.unused.is_none_or(|unused| !unused.range.contains(at));
        if self.scanner.is_none() && is_used && object_start(self.identity.segment_size, at) == at {
            self.scanner = Some(scanner(&self.identity, self.timeline, at));
        }
        let Some(scanner) = &mut self.scanner else {
            return commits;
        };
        let dead_ends = &mut self.dead_ends;
        let result = scanner.feed(data, &mut |event| match event {
            WalEvent::Commit { time, .. } => commits.add(time),
            WalEvent::ParameterChange {
                end,
                wal_level: WAL_LEVEL_MINIMAL,
                ..
            } => dead_ends.push(DeadEnd::minimal_wal(end)),
            _ => {}
        });
        self.newest_commit = commits.last.max(self.newest_commit);
        if let Err(damage) = result {
            // Where nothing is archived yet that would tell.
            let may_be_unused = scanner.behind_unseen_switch().is_some();
            self.scanner = None;
            if may_be_unused {
                return commits;
            }
            // A standby's copy may be damaged where its primary's is not; what of it is stored first meets the other.
            match self.state.snapshot().standby {
                true => {
                    tracing::error!(timeline = %self.timeline, %damage, "the standby sends damaged WAL: check its storage")
                }
                false => self.dead_ends.push(DeadEnd::damage(&damage)),
            }
            self.state.update(|snapshot| {
                snapshot.wal_damage = Some(format!("timeline {}: {damage}", self.timeline));
            });
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

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use highwater_config::Policy;
    use highwater_format::walpage::page_magic;
    use highwater_format::{Codec, SegmentSize, SystemId};

    use super::*;
    use crate::test_world::{MIB, World, world};
    use crate::unused::Unseen;

    /// The beginning of a record that is longer, from the second segment on.
    fn one_record(identity: &Identity, size: SegmentSize, length: u64) -> Vec<u8> {
        const LENGTH: u32 = 1 << 29;
        let (start, page) = (size.bytes(), u64::from(identity.wal_block_size));
        let mut wal = Vec::new();
        let mut left = LENGTH;
        while (wal.len() as u64) < length {
            let at = start + wal.len() as u64;
            let (first, long) = (wal.is_empty(), at.is_multiple_of(start));
            wal.extend(page_magic(identity.major()).unwrap().to_le_bytes());
            wal.extend((u16::from(!first) | u16::from(long) << 1).to_le_bytes());
            wal.extend(1_u32.to_le_bytes());
            wal.extend(at.to_le_bytes());
            wal.extend((if first { 0 } else { left }).to_le_bytes());
            wal.extend([0; 4]);
            if long {
                wal.extend(identity.system_id.0.to_le_bytes());
                wal.extend(u32::try_from(start).unwrap().to_le_bytes());
                wal.extend(identity.wal_block_size.to_le_bytes());
            }
            let body = page - (wal.len() as u64) % page;
            let mut body = vec![0; usize::try_from(body).unwrap()];
            if first {
                body[..4].copy_from_slice(&LENGTH.to_le_bytes());
                body[8..16].copy_from_slice(&(start - 32).to_le_bytes());
            }
            left -= u32::try_from(body.len()).unwrap();
            wal.extend(body);
        }
        wal
    }

    /// On an empty archive with segments of that size, before a queue with that much room.
    fn intake(world: &World, size: SegmentSize, start: Lsn, room: usize) -> (Intake, mpsc::Receiver<Work>) {
        let (queue, taken) = mpsc::channel(room);
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
        let resume = Resume {
            timeline: TimelineId::FIRST,
            start,
            sealed: start,
            after: None,
        };
        (Intake::new(&tools, &resume, None, Duration::ZERO), taken)
    }

    /// Waits for more than the queue takes, is dropped, and seals what was received: everything that was handed over.
    async fn dropped_half_way(size: SegmentSize, received: u64) -> Vec<Work> {
        let world = world(Policy::All);
        let start = Lsn(size.bytes());
        let (mut intake, mut taken) = intake(&world, size, start, 1);
        let data = one_record(&world.shared.archive.identity, size, 3 * MIB);
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

    /// Whether zeros that a stream begins with go on record.
    async fn are_zeros_a_dead_end(start: Lsn) -> bool {
        let world = world(Policy::All);
        let size = SegmentSize::new(256 * MIB).unwrap();
        let (mut intake, mut taken) = intake(&world, size, start, 64);
        let zeros = vec![0; usize::try_from(MIB).unwrap()];
        intake.push(&zeros, Duration::ZERO).await.unwrap();
        let is_damage = world.shared.state.snapshot().wal_damage.is_some();
        let work = taken.try_recv();
        assert_eq!(
            matches!(work, Ok(Work::Unreplayable { .. })),
            is_damage,
            "{work:?}"
        );
        is_damage
    }

    /// A switch leaves zeros up to the segment's end, and a large segment is streamed again from the middle.
    #[tokio::test]
    async fn zeros_behind_a_switch_are_no_damage_to_who_begins_there() {
        assert!(!are_zeros_a_dead_end(Lsn(256 * MIB + 192 * MIB)).await);
        assert!(are_zeros_a_dead_end(Lsn(256 * MIB)).await, "no segment begins so");
    }

    /// Segment 7 of a server with segments of 1 MiB, up to the page in which `pg_switch_wal()` ended it.
    const SWITCHED: &[u8] =
        include_bytes!("../../../proto/format/testdata/wal/pg15/000000010000000000000007.head");

    /// What is stored of that segment when `leftovers` are sent behind the switch, in messages of that length.
    async fn stored(leftovers: u8, message: usize) -> Vec<u8> {
        let mut world = world(Policy::All);
        let size = SegmentSize::new(MIB).unwrap();
        let system_id = u64::from_le_bytes(SWITCHED[24..32].try_into().unwrap());
        world.shared.archive.identity.system_id = SystemId(system_id);
        let (mut intake, mut taken) = intake(&world, size, Lsn(7 * MIB), 64);
        let mut sent = SWITCHED.to_vec();
        let written = sent.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        sent.truncate(written.next_multiple_of(8));
        sent.resize(usize::try_from(MIB).unwrap(), leftovers);
        for message in sent.chunks(message) {
            intake.push(message, Duration::ZERO).await.unwrap();
        }
        assert!(world.shared.state.snapshot().wal_damage.is_none());
        let mut stored = Vec::new();
        while let Ok(work) = taken.try_recv() {
            if let Work::Frame(frame) = work {
                stored.extend_from_slice(&frame.await.unwrap().frame.bytes);
            }
        }
        assert!(stored.len() >= sent.len(), "not compressed");
        stored
    }

    #[tokio::test]
    async fn i6_what_a_standby_leaves_behind_a_switch_makes_no_other_wal() {
        let primary = stored(0, 1 << 20).await;
        for message in [1 << 20, 128 << 10, 8192, 1000] {
            assert!(stored(0xEE, message).await == primary, "{message}");
        }
    }

    /// A large segment is streamed again from the middle, by a standby that has kept what its recycled file held there.
    #[tokio::test]
    async fn i6_what_follows_a_switch_that_the_archive_knows_of_is_stored_as_zeros() {
        let world = world(Policy::All);
        let size = SegmentSize::new(256 * MIB).unwrap();
        let start = Lsn(256 * MIB + 128 * MIB);
        let (mut intake, mut taken) = intake(&world, size, start, 1024);
        let unused = Rest {
            range: LsnRange::new(start, Lsn(512 * MIB)),
            unseen: Some(Unseen {
                timeline: TimelineId::FIRST,
                page: 8192,
            }),
        };
        (intake.scanner, intake.unused) = (None, Some(unused));
        let message = vec![0xEE; usize::try_from(MIB).unwrap()];
        let mut written = message.clone();
        written[8192 + 4..8192 + 8].copy_from_slice(&1_u32.to_le_bytes());
        written[8192 + 8..8192 + 16].copy_from_slice(&(start.0 + 8192).to_le_bytes());
        let refused = intake.push(&written, Duration::ZERO).await;
        assert!(
            matches!(refused, Err(AgentError::Diverged { at, .. }) if at == start + 8192),
            "{refused:?}"
        );
        for _ in 0..128 {
            intake.push(&message, Duration::ZERO).await.unwrap();
        }
        assert!(world.shared.state.snapshot().wal_damage.is_none());
        let (mut frames, mut objects) = (0, 0);
        while let Ok(work) = taken.try_recv() {
            match work {
                Work::Frame(frame) => {
                    let bytes = &frame.await.unwrap().frame.bytes;
                    assert!(
                        bytes.iter().filter(|byte| **byte == 0xEE).count() < 64,
                        "zeros are kept"
                    );
                    frames += 1;
                }
                Work::Object { .. } => objects += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((frames, objects), (128, 2));
        // The next segment is read again.
        intake.push(&message, Duration::ZERO).await.unwrap();
        assert!(world.shared.state.snapshot().wal_damage.is_some());
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
