//! A region: a store in memory whose calls are late, fail, fail after they were carried out, hang, or are
//! carried out long after everybody has given up on them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use highwater_store::{
    ErrorKind, MemoryStore, Meta, Object, Operation, Page, Put, PutMode, Store, StoreError,
};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use crate::rng::Rng;
use crate::world::Sim;

/// An attempt is given up after this long, as the S3 client does.
const ATTEMPT: Duration = Duration::from_secs(30);

/// Chances of a call in a thousand, and how long things take.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    /// Fails, nothing was done.
    pub(crate) fail: u64,
    /// Fails, but was carried out: a lost reply.
    pub(crate) lost: u64,
    /// A write fails and is carried out later all the same.
    pub(crate) late: u64,
    /// Somebody has to act (403, a full bucket).
    pub(crate) denied: u64,
    /// What was read is not what was stored, and the store notices.
    pub(crate) corrupt: u64,
    /// Longest time to the store or back.
    pub(crate) delay: u64,
    /// Listings leave out what is newer than this.
    pub(crate) hide: Duration,
}

impl Weather {
    pub(crate) fn fair() -> Self {
        Self {
            delay: 30,
            ..Self::default()
        }
    }

    pub(crate) fn foul(rng: &mut Rng) -> Self {
        let rate = |rng: &mut Rng| rng.pick(&[0, 0, 20, 100, 400]);
        Self {
            fail: rate(rng),
            lost: rate(rng),
            late: rate(rng),
            denied: rng.pick(&[0, 0, 0, 100]),
            corrupt: rng.pick(&[0, 0, 0, 50]),
            delay: rng.pick(&[1, 30, 300, 3000]),
            hide: Duration::from_secs(rng.pick(&[0, 0, 0, 1, 5, 60])),
        }
    }
}

#[derive(Debug)]
struct Sky {
    rng: Rng,
    weather: Weather,
    /// Calls until the next one may find its bytes damaged: what is damaged on its way arrives the next time.
    spared: u32,
}

#[derive(Debug)]
enum Fate {
    Fine,
    Fails(ErrorKind),
    Lost,
    Late(Duration),
}

/// One call: how it ends, how long it takes there and back.
struct Trip {
    fate: Fate,
    there: Duration,
    back: Duration,
}

/// What is stored, whatever becomes of the calls.
struct Bucket {
    index: usize,
    objects: MemoryStore,
    /// When a key became visible.
    born: Mutex<BTreeMap<String, Instant>>,
}

/// One agent's way to a bucket.
pub(crate) struct SimRegion {
    name: String,
    sim: Arc<Sim>,
    bucket: Arc<Bucket>,
    sky: Mutex<Sky>,
    frozen: AtomicBool,
    thawed: Notify,
}

impl std::fmt::Debug for SimRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl Bucket {
    async fn put(&self, sim: &Sim, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        let rewritable = key.ends_with("/pulse.json") || key.contains("/probe/");
        let bytes = object.bytes.clone();
        let taken = self.objects.head(key).await.is_ok();
        let put = self.objects.put(key, object, mode).await?;
        if put == Put::Created {
            lock(&self.born)
                .entry(key.to_owned())
                .or_insert_with(Instant::now);
            let mut world = sim.lock();
            if taken && !rewritable {
                world.fail(format!("I4: {key} is replaced in region {}", self.index));
            }
            if !rewritable {
                world.note(format!("r{} holds {}", self.index, short(key)));
            }
            world.stored(self.index, key, &bytes);
        }
        Ok(put)
    }
}

impl SimRegion {
    pub(crate) fn new(sim: Arc<Sim>, index: usize, rng: Rng) -> Arc<Self> {
        let bucket = Bucket {
            index,
            objects: MemoryStore::new(format!("r{index}")),
            born: Mutex::default(),
        };
        Self::over(sim, Arc::new(bucket), rng)
    }

    /// The way to the same bucket from another seat.
    pub(crate) fn seen_by(&self, sim: Arc<Sim>, rng: Rng) -> Arc<Self> {
        Self::over(sim, self.bucket.clone(), rng)
    }

    fn over(sim: Arc<Sim>, bucket: Arc<Bucket>, rng: Rng) -> Arc<Self> {
        let sky = Sky {
            rng,
            weather: Weather::fair(),
            spared: 0,
        };
        Arc::new(Self {
            name: format!("r{}", bucket.index),
            sim,
            bucket,
            sky: Mutex::new(sky),
            frozen: AtomicBool::new(false),
            thawed: Notify::new(),
        })
    }

    pub(crate) fn set(&self, weather: Weather) {
        lock(&self.sky).weather = weather;
    }

    /// Calls wait from now on, or go on.
    pub(crate) fn freeze(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::SeqCst);
        self.thawed.notify_waiters();
    }

    /// Waits while calls have to wait. Those that do go on in the order in which they came.
    async fn thaw(&self) {
        while self.frozen.load(Ordering::SeqCst) {
            self.thawed.notified().await;
        }
    }

    fn draw(&self, operation: Operation) -> Trip {
        let mut sky = lock(&self.sky);
        let weather = sky.weather;
        sky.spared = sky.spared.saturating_sub(1);
        let spared = sky.spared > 0;
        let rng = &mut sky.rng;
        let (there, back) = (rng.millis(0..weather.delay + 1), rng.millis(0..weather.delay + 1));
        let reads = matches!(operation, Operation::Get | Operation::GetRange);
        let fate = if rng.chance(weather.fail) {
            Fate::Fails(ErrorKind::Retry)
        } else if rng.chance(weather.denied) {
            Fate::Fails(ErrorKind::Operator)
        } else if rng.chance(weather.corrupt) && reads && !spared {
            sky.spared = 30;
            Fate::Fails(ErrorKind::Corrupt)
        } else if rng.chance(weather.lost) {
            Fate::Lost
        } else if rng.chance(weather.late) && operation == Operation::Put {
            Fate::Late(rng.millis(0..20_000))
        } else {
            Fate::Fine
        };
        Trip { fate, there, back }
    }

    fn error(&self, kind: ErrorKind, operation: Operation, key: &str, how: &str) -> StoreError {
        let mut world = self.sim.lock();
        world.note(format!("{} {operation} {} {how}", self.name, short(key)));
        StoreError::new(kind, &self.name, operation, key, format!("simulated: {how}"))
    }

    /// Takes a call through its trip.
    async fn pass<T>(
        &self,
        trip: Trip,
        operation: Operation,
        key: &str,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        self.sim.lock().crash_point();
        sleep(trip.there).await;
        if timeout(ATTEMPT, self.thaw()).await.is_err() {
            return Err(self.error(ErrorKind::Retry, operation, key, "timed out"));
        }
        if let Fate::Fails(kind) = trip.fate {
            if kind == ErrorKind::Corrupt {
                self.sim.lock().read_damaged(self.bucket.index, key);
            }
            return Err(self.error(kind, operation, key, "failed"));
        }
        let value = call.await;
        self.sim.lock().crash_point();
        sleep(trip.back).await;
        match trip.fate {
            Fate::Lost => Err(self.error(ErrorKind::Retry, operation, key, "done, reply lost")),
            _ => {
                self.sim.lock().read_whole(self.bucket.index, key);
                value
            }
        }
    }

    /// Somebody removes everything, but for the object by which the store itself is tried out: without it in the middle
    /// of that, a store looks like one that ignores conditions.
    pub(crate) async fn empty(&self) {
        self.sim.lock().emptied(self.bucket.index);
        let keys = self.bucket.objects.keys().into_iter();
        for key in keys.filter(|key| !key.contains("/probe/")) {
            self.bucket.objects.delete(&key).await.unwrap();
            lock(&self.bucket.born).remove(&key);
        }
    }

    /// Somebody removes the first chunk of the newest WAL, as a lifecycle rule does. Returns its key.
    pub(crate) async fn expire_first_chunk(&self) -> String {
        let key = self.keys("/tail/").into_iter().next().unwrap();
        self.bucket.objects.delete(&key).await.unwrap();
        lock(&self.bucket.born).remove(&key);
        let mut world = self.sim.lock();
        world.note(format!("r{} has lost {}", self.bucket.index, short(&key)));
        key
    }

    /// The keys that contain `part`, in order.
    pub(crate) fn keys(&self, part: &str) -> Vec<String> {
        let mut keys = self.bucket.objects.keys();
        keys.retain(|key| key.contains(part));
        keys.sort_unstable();
        keys
    }
}

#[async_trait]
impl Store for SimRegion {
    fn region(&self) -> &str {
        &self.name
    }

    fn describe(&self) -> String {
        format!("simulated:{}", self.name)
    }

    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        self.sim.lock().sets_out(self.bucket.index, key);
        let trip = self.draw(Operation::Put);
        if let Fate::Late(wait) = trip.fate {
            // The request is on its way; nobody will hear how it ended.
            let (sim, bucket, name) = (self.sim.clone(), self.bucket.clone(), key.to_owned());
            let process = sim.lock().process;
            tokio::spawn(async move {
                sleep(wait).await;
                if matches!(bucket.put(&sim, &name, object, mode).await, Ok(Put::Created)) {
                    sim.lock().arrived_late(&name, process);
                }
            });
            sleep(trip.there).await;
            return Err(self.error(ErrorKind::Retry, Operation::Put, key, "delayed"));
        }
        let call = self.bucket.put(&self.sim, key, object, mode);
        self.pass(trip, Operation::Put, key, call).await
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        let call = self.bucket.objects.get(key);
        self.pass(self.draw(Operation::Get), Operation::Get, key, call)
            .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let call = self.bucket.objects.get_range(key, range);
        self.pass(self.draw(Operation::GetRange), Operation::GetRange, key, call)
            .await
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        let call = self.bucket.objects.head(key);
        self.pass(self.draw(Operation::Head), Operation::Head, key, call)
            .await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        let mut after = start_after.map(str::to_owned);
        loop {
            let call = self.bucket.objects.list(prefix, after.as_deref(), max);
            let trip = self.draw(Operation::List);
            let mut page = self.pass(trip, Operation::List, prefix, call).await?;
            let last = page.entries.last().map(|meta| meta.key.clone());
            let born = lock(&self.bucket.born);
            let hide = lock(&self.sky).weather.hide;
            page.entries.retain(|meta| !is_hidden(&born, &meta.key, hide));
            // The last entry is what the caller goes on from.
            if !page.entries.is_empty() || !page.more {
                return Ok(page);
            }
            after = last;
        }
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.sim.lock().fail(format!("{key} is deleted"));
        self.bucket.objects.delete(key).await
    }
}

/// Whether a listing leaves a key out. It lags, and shows what came before: the first object of a timeline is never left
/// out, because a region that shows nothing of one cannot be told from a region that never had it.
fn is_hidden(born: &BTreeMap<String, Instant>, key: &str, hide: Duration) -> bool {
    let Some(at) = born.get(key).filter(|at| at.elapsed() < hide) else {
        return false;
    };
    let Some((before, timeline)) = key.split_once("/wal/") else {
        return true;
    };
    let timeline = &key[..before.len() + "/wal/".len() + timeline.find('/').unwrap_or(0)];
    let mut others = born.iter().filter(|(other, _)| other.starts_with(timeline));
    others.any(|(_, other)| other < at)
}

/// A key without what all keys have in common.
fn short(key: &str) -> &str {
    key.split_once("/wal/").map_or(key, |(_, rest)| rest)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
