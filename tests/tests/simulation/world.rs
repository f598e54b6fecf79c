//! Everything that the parts of one schedule share, behind one lock that is never held across an await.
//!
//! Owns the log, the servers' states, what the checker knows, and where an agent is made to crash. A broken
//! invariant is noted here and ends the schedule. Every server with the agent beside it has a seat, and who locks the
//! world sees it from one.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use highwater_format::{Key, Layout, LsnRange, SegmentSize, SystemId};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::checker::{Holdings, Model};
use crate::node::{Line, Node};
use crate::rng::Rng;
use crate::wal::{Cut, Version};
use crate::wire::{Status, lsn};

/// A schedule with more events than this goes round in circles.
const RUNAWAY: usize = 400_000;

/// Whether the server lets anybody in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Power {
    Up,
    /// A fast shutdown: it waits until the receiver has reported everything.
    Stopping,
    Down,
}

/// A server, and the agent beside it.
pub(crate) struct Seat {
    pub(crate) node: Node,
    pub(crate) power: Power,
    /// It is a standby of the other one.
    pub(crate) standby: bool,
    /// How far a standby has received what its primary writes.
    pub(crate) received: u64,
    /// A part of a version that this server has as its recycled file held it before: it has replayed the switch, and the zeros behind it
    /// have not come.
    pub(crate) leftovers: Option<(usize, Range<u64>)>,
    pub(crate) flood: bool,
    /// Commands that begin with this get no answer.
    pub(crate) unanswered: Option<&'static str>,
    /// New connections read nothing while they stream.
    pub(crate) deaf: bool,
    /// The network is as slow as this: nothing behind it has arrived yet.
    pub(crate) sends_up_to: u64,
    pub(crate) connections: BTreeMap<u64, CancellationToken>,
    /// Which connection streams from the slot.
    pub(crate) slot_holder: Option<u64>,
    /// Ends of the gaps that were on record anywhere when this agent started.
    known_gaps: BTreeSet<u64>,
    /// End of what was sent of a version to this agent.
    pub(crate) sent_now: BTreeMap<usize, u64>,
    /// Claims and pulses of dead agents that arrived while this one ran.
    pub(crate) late_signs: u32,
    /// Damaged reads in a row of each key by this agent.
    damaged: BTreeMap<(usize, String), u32>,
    /// Some object came damaged so often that this agent need not believe in an accident.
    pub(crate) damaged_for_good: bool,
    /// Number of the agent's process.
    pub(crate) process: u32,
    pub(crate) agent: Option<AbortHandle>,
    /// The agent dies at this many store calls from now.
    pub(crate) crash_in: Option<u64>,
    /// First byte of the archive: where the first stream of which anything was stored began.
    origin: Option<u64>,
    /// Where a stream into the empty archive was asked for, by this agent and by one before it.
    asked: Option<u64>,
    asked_before: Option<u64>,
    /// Per region: where the newest slot began that was made while the region was empty. Nobody has told this server that
    /// what comes before is there.
    promised_from: BTreeMap<usize, u64>,
    /// Up to here it is known that nothing of a line is missing without a record.
    explained: Option<(Line, u64)>,
    /// By region: the newest claim, and the one under which WAL was last sent there.
    claimed: BTreeMap<usize, u64>,
    wrote: BTreeMap<usize, u64>,
}

impl Seat {
    pub(crate) fn new(node: Node, standby: bool) -> Self {
        Self {
            node,
            power: Power::Up,
            standby,
            received: u64::MAX,
            leftovers: None,
            flood: false,
            unanswered: None,
            deaf: false,
            sends_up_to: u64::MAX,
            connections: BTreeMap::new(),
            slot_holder: None,
            known_gaps: BTreeSet::new(),
            sent_now: BTreeMap::new(),
            late_signs: 0,
            damaged: BTreeMap::new(),
            damaged_for_good: false,
            process: 0,
            agent: None,
            crash_in: None,
            origin: None,
            asked: None,
            asked_before: None,
            promised_from: BTreeMap::new(),
            explained: None,
            claimed: BTreeMap::new(),
            wrote: BTreeMap::new(),
        }
    }

    /// Ends every connection.
    pub(crate) fn disconnect(&mut self) {
        for connection in self.connections.values() {
            connection.cancel();
        }
        self.connections.clear();
        self.slot_holder = None;
    }
}

pub(crate) struct World {
    started: Instant,
    pub(crate) log: Vec<String>,
    pub(crate) broken: Option<String>,
    pub(crate) rng: Rng,
    pub(crate) system_id: SystemId,
    pub(crate) size: SegmentSize,
    pub(crate) layout: Layout,
    pub(crate) versions: Vec<Version>,
    pub(crate) histories: BTreeMap<u32, Vec<u8>>,
    pub(crate) seats: Vec<Seat>,
    /// The seat from which the world is seen now.
    at: usize,
    pub(crate) next_connection: u64,
    /// End of what was ever sent of a version.
    pub(crate) sent: BTreeMap<usize, u64>,
    /// Everything that each region was ever seen to store.
    pub(crate) holdings: Vec<Holdings>,
    /// What is left of it where somebody has emptied the region.
    pub(crate) remaining: Vec<Option<Holdings>>,
    /// An older state of a server has been put in its place: what the archive holds may be of another course.
    pub(crate) rolled_back: bool,
    /// An old primary answers although the archive knows what came after it: its version, and where that ended.
    pub(crate) revived: Option<(usize, u64)>,
    pub(crate) needed: usize,
    /// Some server had removed its WAL up to here.
    pub(crate) gone_before: u64,
    pub(crate) statuses: u64,
    /// Two primaries never write to a region at the same time: where nothing worse happens than that regions are out of reach.
    pub(crate) one_writer: bool,
    /// Commits wait for the agent. Nobody takes base backups here, so that no commit returns behind a gap.
    pub(crate) synchronous: bool,
}

impl Deref for World {
    type Target = Seat;

    fn deref(&self) -> &Seat {
        &self.seats[self.at]
    }
}

impl DerefMut for World {
    fn deref_mut(&mut self) -> &mut Seat {
        &mut self.seats[self.at]
    }
}

/// Shared by all parts; the world as it is seen from one seat.
pub(crate) struct Sim {
    world: Arc<Mutex<World>>,
    /// Wakes the servers' connections.
    pub(crate) changed: Arc<Notify>,
    seat: usize,
}

impl Sim {
    pub(crate) fn new(world: World) -> Arc<Self> {
        Arc::new(Self {
            world: Arc::new(Mutex::new(world)),
            changed: Arc::new(Notify::new()),
            seat: 0,
        })
    }

    /// The same world from another seat.
    pub(crate) fn at(&self, seat: usize) -> Arc<Self> {
        Arc::new(Self {
            world: self.world.clone(),
            changed: self.changed.clone(),
            seat,
        })
    }

    pub(crate) fn seat(&self) -> usize {
        self.seat
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, World> {
        let mut world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
        world.at = self.seat;
        world
    }

    /// Changes the server and wakes its connections.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let value = change(&mut self.lock());
        self.changed.notify_waiters();
        value
    }
}

impl World {
    pub(crate) fn new(mut rng: Rng, segment: u64, regions: usize, needed: usize) -> Self {
        let system_id = SystemId(7_300_000_000_000_000_000 + rng.range(0..1_000_000));
        let start = rng.range(3..200) * segment;
        let first = Version::new(1, start, segment, system_id.0, &mut rng);
        let cluster = "orders".parse().unwrap();
        Self {
            started: Instant::now(),
            log: Vec::new(),
            broken: None,
            system_id,
            size: SegmentSize::new(segment).unwrap(),
            layout: Layout::new(cluster, system_id),
            versions: vec![first],
            histories: BTreeMap::new(),
            seats: vec![Seat::new(Node::new(0, 1, start, rng.pick(&[0, 0, 1, 3])), false)],
            at: 0,
            next_connection: 0,
            sent: BTreeMap::new(),
            holdings: (0..regions).map(|_| Holdings::default()).collect(),
            remaining: (0..regions).map(|_| None).collect(),
            rolled_back: false,
            revived: None,
            needed,
            gone_before: start,
            statuses: 0,
            one_writer: false,
            synchronous: false,
            rng,
        }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The server's clock: virtual time, in PostgreSQL's microseconds.
    pub(crate) fn micros(&self) -> i64 {
        800_000_000_000_000 + self.elapsed().as_micros() as i64
    }

    pub(crate) fn note(&mut self, what: impl AsRef<str>) {
        let at = self.elapsed();
        let who = match self.seats.len() {
            1 => String::new(),
            _ => format!("#{} ", self.at),
        };
        let line = format!(
            "{:>7}.{:03} {who}{}",
            at.as_secs(),
            at.subsec_millis(),
            what.as_ref()
        );
        tracing::info!(target: "world", "{line}");
        self.log.push(line);
        assert!(self.log.len() < RUNAWAY, "the schedule does not come to an end");
    }

    /// An invariant is broken: the first one counts.
    pub(crate) fn fail(&mut self, what: String) {
        self.note(format!("BROKEN {what}"));
        self.broken.get_or_insert(what);
    }

    pub(crate) fn segment(&self) -> u64 {
        self.size.bytes()
    }

    /// The version that the server writes to.
    pub(crate) fn current(&self) -> &Version {
        &self.versions[self.node.line.version]
    }

    pub(crate) fn end(&self) -> u64 {
        let end = self.current().end().min(self.received);
        // Whoever has replayed a switch is at the end of the segment.
        let behind = self.current().unused_at(end);
        behind.map_or(end, |unused| unused.end)
    }

    /// The server writes about `bytes` of WAL.
    pub(crate) fn write(&mut self, bytes: u64) {
        let (micros, version) = (self.micros(), self.node.line.version);
        self.versions[version].write(bytes, micros, &mut self.rng);
        let end = self.end();
        self.note(format!("server writes to {}", lsn(end)));
    }

    /// The server of this seat goes on from `cut` on a new timeline.
    pub(crate) fn promote(&mut self, cut: Cut, timeline: u32, rng: &mut Rng) {
        let new = self.seats[self.at]
            .node
            .promote(&self.versions, cut, timeline, rng);
        self.versions.push(new);
        let history = self.node.line.history();
        self.histories.insert(timeline, history);
    }

    /// Where the server of this seat could be promoted: the ends of records that it has, and has not been started from.
    pub(crate) fn cuts(&self) -> Vec<Cut> {
        let begun = self.node.line.ancestors.last().map_or(0, |at| at.switch);
        let from = begun.max(self.node.kept_from).max(self.node.checkpoint);
        let cuts = self.current().cuts.iter();
        cuts.filter(|cut| cut.at > from && cut.at <= self.end())
            .copied()
            .collect()
    }

    /// A number for a new timeline.
    pub(crate) fn next_timeline(&self, rng: &mut Rng) -> u32 {
        let highest = self.histories.keys().last().copied().unwrap_or(1);
        highest.max(self.node.line.timeline) + rng.pick(&[1, 1, 1, 2, 4])
    }

    /// The rest of the segment is zeros.
    pub(crate) fn switch_segment(&mut self) {
        let version = self.node.line.version;
        self.versions[version].switch();
        let end = self.end();
        self.note(format!("segment switch, server at {}", lsn(end)));
    }

    /// This standby has received the switch that the primary's WAL ends with, and not all that follows it.
    pub(crate) fn receive_half_a_switch(&mut self) {
        let Some(unused) = self.current().unused_at_its_end() else {
            return;
        };
        self.received = self.rng.range(unused.clone());
        self.leftovers = Some((self.node.line.version, self.received..unused.end));
        self.note(format!(
            "the standby has received the switch, up to {}",
            lsn(self.received)
        ));
    }

    /// The bytes of a version as this server has them.
    pub(crate) fn served(&self, version: usize, from: u64, to: u64) -> Cow<'_, [u8]> {
        let data = self.versions[version].slice(from, to);
        let Some((_, kept)) = self.leftovers.as_ref().filter(|(of, _)| *of == version) else {
            return Cow::Borrowed(data);
        };
        let mut data = data.to_vec();
        for (at, byte) in (from..to).zip(&mut data) {
            if kept.contains(&at) {
                *byte = 0xEE;
            }
        }
        Cow::Owned(data)
    }

    /// The server asks without end, or no more.
    pub(crate) fn turn_flood(&mut self) {
        self.flood = !self.flood;
        self.note("flood");
    }

    pub(crate) fn restart_server(&mut self) {
        self.note("server crashes and starts again");
        self.disconnect();
        self.node.crash();
    }

    /// The server is gone, or back.
    pub(crate) fn turn_power(&mut self) {
        self.power = match self.power {
            Power::Down => Power::Up,
            _ => Power::Down,
        };
        let power = self.power;
        self.note(format!("server: {power:?}"));
        self.disconnect();
    }

    /// How far everything has come, for people.
    pub(crate) fn standing(&mut self) -> String {
        let line = self.node.line.clone();
        let held: Vec<_> = self.reaches(&line).into_iter().map(lsn).collect();
        let (end, slot) = (lsn(self.end()), self.node.slot.flatten().map(lsn));
        format!("the server is at {end}, slot {slot:?}, held {held:?}")
    }

    /// A checkpoint, which may remove WAL.
    pub(crate) fn checkpoint(&mut self) {
        let (end, segment) = (self.end(), self.segment());
        self.node.checkpoint(end, segment);
        if !self.standby {
            self.gone_before = self.gone_before.max(self.node.kept_from);
        }
        let kept = self.node.kept_from;
        self.note(format!("checkpoint, WAL is kept from {}", lsn(kept)));
    }

    /// Every store call passes here, before and after it takes effect.
    pub(crate) fn crash_point(&mut self) {
        match self.crash_in {
            Some(0) => {
                self.crash_in = None;
                self.note("the agent dies at a store call");
                if let Some(agent) = self.agent.take() {
                    agent.abort();
                }
            }
            Some(calls) => self.crash_in = Some(calls - 1),
            None => {}
        }
    }

    /// A stream is asked for while no region holds anything: so the archive begins there.
    pub(crate) fn begins_at(&mut self, from: u64) {
        self.asked = Some(from);
        self.origin = None;
        self.explained = None;
    }

    /// First byte of the archive for this seat. Two that begin it in the same moment begin at different places.
    pub(crate) fn origin(&self) -> u64 {
        let any = self.seats.iter().filter_map(|seat| seat.origin).min();
        self.asked.or(self.origin).or(any).unwrap_or(0)
    }

    /// A new process begins: what it knows is what it finds.
    pub(crate) fn agent_starts(&mut self) {
        self.note("agent starts");
        // Where the other one has begun the archive meanwhile, that is where it begins.
        let asked = self.asked.take().or(self.asked_before);
        self.asked_before = asked.filter(|_| self.is_empty());
        self.known_gaps = self.holdings.iter().flat_map(Holdings::gap_ends).collect();
        self.sent_now.clear();
        self.damaged.clear();
        self.damaged_for_good = false;
        self.late_signs = 0;
        self.process += 1;
    }

    /// A read gave bytes that were not stored. The agent reads three times before it believes it.
    pub(crate) fn read_damaged(&mut self, region: usize, key: &str) {
        let times = self.damaged.entry((region, key.to_owned())).or_default();
        *times += 1;
        let enough = *times >= 3;
        self.damaged_for_good |= enough;
    }

    pub(crate) fn read_whole(&mut self, region: usize, key: &str) {
        self.damaged.remove(&(region, key.to_owned()));
    }

    /// A write of process number `process` was carried out long after its call.
    pub(crate) fn arrived_late(&mut self, key: &str, process: u32) {
        if !key.ends_with("/pulse.json") && !key.contains("/writer/") {
            return;
        }
        let (at, process_now) = (self.at, self.process);
        for (index, seat) in self.seats.iter_mut().enumerate() {
            if index != at || process < process_now {
                seat.late_signs += 1;
            }
        }
    }

    /// I8: a request to store WAL sets out from this seat. Whoever has claimed later, and has begun to write, is the only one
    /// but for what the servers have in common.
    pub(crate) fn sets_out(&mut self, region: usize, key: &str) {
        if !self.one_writer || self.standby {
            return;
        }
        let Some((timeline, range)) = self.wal_in(key) else {
            return;
        };
        let version = self.node.line.part(timeline).map(|(version, _)| version);
        let has = |seat: &Seat| {
            let part = seat.node.line.part(timeline);
            part.is_some_and(|(other, limit)| Some(other) == version && range.end.0 <= limit)
        };
        if self
            .seats
            .iter()
            .enumerate()
            .any(|(index, seat)| index != self.at && has(seat))
        {
            return;
        }
        let own = self.claimed.get(&region).copied().unwrap_or(0);
        self.wrote.insert(region, own);
        let wrote = |seat: &Seat| seat.wrote.get(&region).copied().filter(|_| !seat.standby);
        let newest = self.seats.iter().filter_map(wrote).max().unwrap_or(0);
        if newest > own {
            self.fail(format!(
                "I8: {key} sets out to region {region} under claim {own}, and another one writes under {newest}"
            ));
        }
    }

    /// An object was stored in a region.
    pub(crate) fn stored(&mut self, region: usize, key: &str, bytes: &Bytes) {
        if let Some(Key::Writer(epoch)) = self.layout.parse(key) {
            self.claimed.insert(region, epoch);
        }
        if let Some(Key::Gap(timeline, range)) = self.layout.parse(key) {
            self.gap_appears(timeline.get(), range.start.0, range.end.0);
        }
        if self.is_of_the_revived(key) {
            self.fail(format!("I8: {key} comes from a primary that was replaced"));
        }
        let model = Model {
            layout: &self.layout,
            size: self.size,
            versions: &self.versions,
            histories: &self.histories,
            gone_before: self.gone_before,
        };
        let was_empty = self.holdings.iter().all(Holdings::is_empty);
        let mut result = self.holdings[region].store(&model, key, bytes);
        if let Some(remaining) = &mut self.remaining[region] {
            result = result.and_then(|()| remaining.store_again(&model, key, bytes));
        }
        if let Err(broken) = result {
            self.fail(format!("region {region}: {broken}"));
        }
        if was_empty && !self.is_empty() {
            let at = self.at;
            for (_, seat) in self
                .seats
                .iter_mut()
                .enumerate()
                .filter(|(index, _)| *index != at)
            {
                seat.asked_before = None;
            }
        }
        if self.origin.is_none() && !self.is_empty() {
            self.origin = self.asked.or(self.asked_before);
        }
    }

    /// Whether this is WAL that an old primary has written after another one had taken its place.
    fn is_of_the_revived(&self, key: &str) -> bool {
        let Some((version, end)) = self.revived else {
            return false;
        };
        let old = self.versions[version].timeline;
        self.wal_in(key)
            .is_some_and(|(timeline, range)| timeline == old && range.end.0 > end)
    }

    /// The timeline and range of the WAL that a key stands for, if it does.
    fn wal_in(&self, key: &str) -> Option<(u32, LsnRange)> {
        match self.layout.parse(key)? {
            Key::Segment(name) => {
                let at = name.resolve(self.size)?;
                Some((at.timeline.get(), at.range(self.size)))
            }
            Key::Tail(timeline, range) => Some((timeline.get(), range)),
            _ => None,
        }
    }

    /// A gap begins where the archive ends: WAL that regions hold is no gap, unless the policy lets the agent go on
    /// without those that do.
    fn gap_appears(&mut self, timeline: u32, start: u64, end: u64) {
        let line = self.node.line.clone();
        let ends = |region: &Holdings| region.gap_ends().any(|at| at == end);
        if line.part(timeline).is_none() || self.holdings.iter().any(ends) {
            return;
        }
        // The first segment of a timeline begins with what is held on the one before.
        let begins = line.begins(timeline);
        let reaches = self.reaches(&line);
        let start = start.max(begins);
        if reaches.iter().filter(|reach| **reach <= start).count() < self.needed {
            let held: Vec<String> = reaches.into_iter().map(lsn).collect();
            let (start, end) = (lsn(start), lsn(end));
            self.fail(format!(
                "I5: a gap from {start} to {end} is recorded, the regions hold {held:?}"
            ));
        }
    }

    /// Whether some region has learned of `timeline`.
    pub(crate) fn is_known(&self, timeline: u32) -> bool {
        self.holdings.iter().any(|region| region.knows(timeline))
    }

    /// Somebody removes everything that a region holds.
    pub(crate) fn emptied(&mut self, region: usize) {
        self.remaining[region] = Some(Holdings::default());
        self.note(format!("r{region} is emptied"));
    }

    /// Commits may wait inside a gap, in which they are in no region.
    pub(crate) fn holds_commits_back(&self) -> bool {
        let mut gaps = self.holdings.iter().flat_map(Holdings::missing);
        self.synchronous && gaps.next().is_some()
    }

    pub(crate) fn is_without_gaps(&self) -> bool {
        self.holdings
            .iter()
            .all(|region| region.gap_ends().next().is_none())
    }

    /// Whether no region ever held any WAL.
    pub(crate) fn is_empty(&self) -> bool {
        self.holdings.iter().all(Holdings::is_empty)
    }

    /// What each region holds now.
    fn present(&mut self) -> impl Iterator<Item = &mut Holdings> {
        let remaining = self.remaining.iter_mut();
        let all = self.holdings.iter_mut().zip(remaining);
        all.map(|(ever, remaining)| remaining.as_mut().unwrap_or(ever))
    }

    /// How far a restore from each region alone would get.
    pub(crate) fn reaches(&mut self, line: &Line) -> Vec<u64> {
        let origin = self.origin();
        let versions = std::mem::take(&mut self.versions);
        let reach = |region: &mut Holdings| region.reach(&versions, line, origin);
        let reaches = self.present().map(reach).collect();
        self.versions = versions;
        reaches
    }

    /// The same, of everything that was ever stored there: nobody can promise that it is not taken away.
    fn reached_from(&mut self, line: &Line, from: u64) -> Vec<u64> {
        let versions = &self.versions;
        let reach = |region: &mut Holdings| region.reach(versions, line, from);
        self.holdings.iter_mut().map(reach).collect()
    }

    /// The end of what follows `from` without a silent gap: some region holds the WAL, or `enough` of them, which may
    /// depend on where the gap ends, have the record that it is lost.
    fn explained_from(&mut self, line: &Line, from: u64, enough: impl Fn(&Self, u64) -> usize) -> u64 {
        let mut at = from;
        loop {
            let versions = &self.versions;
            let ends = |region: &mut Holdings| region.wal_end(versions, line, at);
            let mut next = self.holdings.iter_mut().map(ends).max().unwrap_or(at);
            if next == at {
                let gaps = |region: &mut Holdings| region.gaps_at(versions, line, at).into_iter().max();
                let mut gaps: Vec<u64> = self.holdings.iter_mut().filter_map(gaps).collect();
                gaps.sort_unstable_by(|a, b| b.cmp(a));
                let recorded = (1..).zip(gaps).find(|(count, end)| *count >= enough(self, *end));
                next = recorded.map_or(at, |(_, end)| end);
            }
            if next == at {
                return at;
            }
            at = next;
        }
    }

    /// I5 for what is reported: before it nothing is missing that is not on record in as many regions as must hold it.
    fn is_explained(&mut self, line: &Line, flush: u64) -> bool {
        let known = self.explained.take().filter(|(of, _)| of == line);
        let from = known.map_or(self.origin(), |(_, at)| at);
        let at = if from < flush {
            self.explained_from(line, from, |world, _| world.needed)
        } else {
            from
        };
        self.explained = Some((line.clone(), at));
        at >= flush
    }

    /// I5 for what is asked for: a stream goes past a gap only when the record is durable. One that an earlier agent
    /// has left in a region counts: that is where the archive ends.
    pub(crate) fn resumed(&mut self, line: &Line, from: u64) {
        if self.is_empty() || self.rolled_back {
            return;
        }
        let old = |world: &Self, end: u64| {
            if world.known_gaps.contains(&end) {
                1
            } else {
                world.needed
            }
        };
        let sent = |(version, limit)| self.sent_now.get(&version).map(|sent: &u64| (*sent).min(limit));
        let sent = line.parts().filter_map(sent).max().unwrap_or(0);
        let origin = self.origin();
        let mut at = self.explained_from(line, origin, old);
        if at < sent {
            at = self.explained_from(line, sent, old);
        }
        if at < from {
            let (from, at) = (lsn(from), lsn(at));
            self.fail(format!(
                "I5: a stream begins at {from}, and nobody has the WAL from {at} on or a durable record that it is lost"
            ));
        }
    }

    /// A slot is made that keeps WAL from `at` on.
    pub(crate) fn slot_begins_at(&mut self, at: u64) {
        let empty: Vec<bool> = self.present().map(|region| region.is_empty()).collect();
        for (region, _) in (0..).zip(empty).filter(|(_, empty)| *empty) {
            let from = self.promised_from.entry(region).or_default();
            *from = at.max(*from);
        }
    }

    /// The end of what as many regions hold as the policy asks for, byte for byte: a region that came later has what
    /// came later, and is filled up with the rest behind it.
    fn durable(&mut self, line: &Line) -> u64 {
        let mut at = self.origin();
        loop {
            let mut reaches = self.reached_from(line, at);
            for (region, reach) in reaches.iter_mut().enumerate() {
                let promised = self.promised_from.get(&region).copied();
                *reach = (*reach).max(promised.unwrap_or(0));
            }
            reaches.sort_unstable_by(|a, b| b.cmp(a));
            match reaches.get(self.needed - 1) {
                Some(reach) if *reach > at => at = *reach,
                _ => return at,
            }
        }
    }

    /// Whether some region holds bytes that the server contradicts, or knows a timeline that the server does not.
    pub(crate) fn diverged(&mut self) -> bool {
        let line = self.node.line.clone();
        let versions = std::mem::take(&mut self.versions);
        let differs = |region: &mut Holdings| {
            region.differs(&versions, &line).is_some() || region.knows_another_timeline(&line)
        };
        let diverged = self.present().any(differs);
        self.versions = versions;
        diverged
    }

    /// The receiver reports its positions on a stream of `line`, of which everything before `sent` was sent.
    pub(crate) fn reported(&mut self, line: &Line, status: Status, sent: u64, last: u64) {
        self.statuses += 1;
        let Status {
            write, flush, apply, ..
        } = status;
        if flush != last {
            self.note(format!("reported {} of {}", lsn(flush), lsn(write)));
        }
        if apply != flush || write > sent {
            self.fail(format!(
                "I1: apply {} or write {} is too high",
                lsn(apply),
                lsn(write)
            ));
        }
        if flush == 0 {
            return;
        }
        let is_behind = |(gap, _): &(u64, u64)| *gap < flush;
        let missing = self.holdings.iter().flat_map(Holdings::missing).find(is_behind);
        if let Some((gap, _)) =
            missing.filter(|_| self.synchronous && !self.rolled_back && self.revived.is_none())
        {
            let (flush, gap) = (lsn(flush), lsn(gap));
            self.fail(format!(
                "{flush} is reported, and commits may wait in the gap at {gap}"
            ));
        }
        if flush < last || flush > write {
            let (flush, last, write) = (lsn(flush), lsn(last), lsn(write));
            self.fail(format!("I2: {flush} after {last}, received {write}"));
        }
        if let Some(Some(kept)) = self.node.slot
            && flush < kept
        {
            self.fail(format!(
                "I2: {} moves the slot back from {}",
                lsn(flush),
                lsn(kept)
            ));
        }
        // What the slot keeps from is nothing that the server is told: somebody may have made it there.
        if self.durable(line) < flush && self.node.slot != Some(Some(flush)) {
            let reaches = self.reaches(line);
            let held: Vec<String> = reaches.into_iter().map(lsn).collect();
            self.fail(format!(
                "I1/I5/I6/I7: {} is reported, the regions hold {held:?}, {} must",
                lsn(flush),
                self.needed
            ));
        }
        if !self.is_explained(line, flush) {
            self.fail(format!(
                "I5: {} is reported, and WAL before it is missing without a record",
                lsn(flush)
            ));
        }
        self.node.slot = Some(Some(flush));
    }
}
