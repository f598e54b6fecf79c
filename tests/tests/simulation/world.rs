//! Everything that the parts of one schedule share, behind one lock that is never held across an await.
//!
//! Owns the log, the server's state, what the checker knows, and where the agent is made to crash. A broken
//! invariant is noted here and ends the schedule.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use highwater_format::{Layout, SegmentSize, SystemId};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::checker::{Holdings, Model};
use crate::node::{Line, Node};
use crate::rng::Rng;
use crate::wal::Version;
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
    pub(crate) node: Node,
    pub(crate) power: Power,
    pub(crate) flood: bool,
    pub(crate) connections: BTreeMap<u64, CancellationToken>,
    pub(crate) next_connection: u64,
    /// Which connection streams from the slot.
    pub(crate) slot_holder: Option<u64>,
    /// End of what was ever sent of a version.
    pub(crate) sent: BTreeMap<usize, u64>,
    pub(crate) holdings: Vec<Holdings>,
    /// First byte of the archive: where the first stream of which anything was stored began.
    pub(crate) origin: Option<u64>,
    /// The newest slot began here: the server never took what comes before for safe because of what it was told.
    pub(crate) promised_from: u64,
    pub(crate) needed: usize,
    /// Some server had removed its WAL up to here.
    pub(crate) gone_before: u64,
    pub(crate) agent: Option<AbortHandle>,
    /// The agent dies at this many store calls from now.
    pub(crate) crash_in: Option<u64>,
    pub(crate) statuses: u64,
}

/// Shared by all parts.
pub(crate) struct Sim {
    world: Mutex<World>,
    /// Wakes the server's connections.
    pub(crate) changed: Notify,
}

impl Sim {
    pub(crate) fn new(world: World) -> Arc<Self> {
        Arc::new(Self {
            world: Mutex::new(world),
            changed: Notify::new(),
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
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
            node: Node::new(0, 1, start),
            power: Power::Up,
            flood: false,
            connections: BTreeMap::new(),
            next_connection: 0,
            slot_holder: None,
            sent: BTreeMap::new(),
            holdings: (0..regions).map(|_| Holdings::default()).collect(),
            origin: None,
            promised_from: start,
            needed,
            gone_before: start,
            agent: None,
            crash_in: None,
            statuses: 0,
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
        let line = format!("{:>7}.{:03} {}", at.as_secs(), at.subsec_millis(), what.as_ref());
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
        self.current().end()
    }

    /// The server writes about `bytes` of WAL.
    pub(crate) fn write(&mut self, bytes: u64) {
        let (micros, version) = (self.micros(), self.node.line.version);
        self.versions[version].write(bytes, micros, &mut self.rng);
        let end = self.end();
        self.note(format!("server writes to {}", lsn(end)));
    }

    /// Ends every connection.
    pub(crate) fn disconnect(&mut self) {
        for connection in self.connections.values() {
            connection.cancel();
        }
        self.connections.clear();
        self.slot_holder = None;
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

    /// An object was stored in a region.
    pub(crate) fn stored(&mut self, region: usize, key: &str, bytes: &Bytes) {
        let model = Model {
            layout: &self.layout,
            size: self.size,
            versions: &self.versions,
            histories: &self.histories,
            gone_before: self.gone_before,
        };
        let result = self.holdings[region].store(&model, key, bytes);
        if let Err(broken) = result {
            self.fail(format!("region {region}: {broken}"));
        }
    }

    /// Whether no region holds any WAL.
    pub(crate) fn is_empty(&self) -> bool {
        self.holdings.iter().all(Holdings::is_empty)
    }

    /// How far a restore from each region alone would get.
    pub(crate) fn reaches(&mut self, line: &Line) -> Vec<u64> {
        let origin = self.origin.unwrap_or(0);
        self.reaches_from(line, origin)
    }

    fn reaches_from(&mut self, line: &Line, from: u64) -> Vec<u64> {
        let versions = &self.versions;
        let reach = |region: &mut Holdings| region.reach(versions, line, from);
        self.holdings.iter_mut().map(reach).collect()
    }

    /// The end of what as many regions hold as the policy asks for, byte for byte: a region that came later has what
    /// came later, and is filled up with the rest behind it.
    fn durable(&mut self, line: &Line) -> u64 {
        let mut at = self.origin.unwrap_or(0).max(self.promised_from);
        loop {
            let mut reaches = self.reaches_from(line, at);
            reaches.sort_unstable_by(|a, b| b.cmp(a));
            match reaches.get(self.needed - 1) {
                Some(reach) if *reach > at => at = *reach,
                _ => return at,
            }
        }
    }

    /// Whether some region holds bytes that the server contradicts.
    pub(crate) fn diverged(&mut self) -> bool {
        let line = self.node.line.clone();
        let versions = &self.versions;
        self.holdings
            .iter_mut()
            .any(|region| region.differs(versions, &line).is_some())
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
        if self.durable(line) < flush {
            let reaches = self.reaches(line);
            let held: Vec<String> = reaches.into_iter().map(lsn).collect();
            self.fail(format!(
                "I1/I5/I6/I7: {} is reported, the regions hold {held:?}, {} must",
                lsn(flush),
                self.needed
            ));
        }
        self.node.slot = Some(Some(flush));
    }
}
