//! The threads that compress the frames of a base backup.
//!
//! Owns: how many there are, their priority, and the encoders and plain buffers they use again; gives back the memory
//! that compression saves. Does not own: how many bytes may wait, the order of frames.
//!
//! They run at a lower priority than the rest. PostgreSQL's backends beside them go first, and so do the walsender and
//! the thread that reads from it: both do little per byte and wait for each other through a socket's buffer of some
//! 200 KiB, so that a compressor which holds a core for a time slice stops all three.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use highwater_format::codec::Codec;
use highwater_format::container::{FRAME_SIZE, Frame, FrameEncoder};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::error::{AgentError, Result};

/// Added to the process's own niceness, where the system knows such a thing per thread. A third of the weight of a
/// thread without it: on a machine whose processors are all busy a base backup is slow, and still goes on.
const NICENESS: i32 = 5;

/// The compressing threads of one base backup. They end when this is dropped and their last frame is done.
#[derive(Debug)]
pub(crate) struct Compressors {
    queue: mpsc::Sender<Job>,
    buffers: Buffers,
}

#[derive(Debug)]
struct Job {
    plain: Vec<u8>,
    memory: OwnedSemaphorePermit,
    done: oneshot::Sender<Result<(Frame, OwnedSemaphorePermit)>>,
}

/// A frame that will be compressed, with the memory that it still needs.
pub(crate) type Compressed = oneshot::Receiver<Result<(Frame, OwnedSemaphorePermit)>>;

/// Bytes per memory permit; coarse, so that the permits of large budgets fit the semaphore.
pub(crate) const UNIT: usize = 1024;

/// Plain buffers that are not in use; few, because idle ones are outside the memory bound.
#[derive(Debug, Clone)]
struct Buffers {
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
    most: usize,
}

impl Compressors {
    /// Starts the threads; at most `waiting` frames wait for them.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn start(codec: Codec, threads: usize, waiting: usize) -> Result<Self> {
        let (queue, jobs) = mpsc::channel(waiting.max(1));
        let jobs = Arc::new(Mutex::new(jobs));
        let buffers = Buffers {
            idle: Arc::default(),
            most: threads + 1,
        };
        for _ in 0..threads.max(1) {
            let (jobs, buffers) = (jobs.clone(), buffers.clone());
            let work = move || compress(codec, &jobs, &buffers);
            let name = "compressor".to_owned();
            thread::Builder::new()
                .name(name)
                .spawn(work)
                .map_err(|error| AgentError::Trouble {
                    what: format!("no thread to compress a base backup: {error}"),
                    next: "Raise the limit of threads or processes of the account or container".into(),
                })?;
        }
        Ok(Self { queue, buffers })
    }

    /// An empty buffer with room for a frame.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        lock(&self.buffers.idle)
            .pop()
            .unwrap_or_else(|| Vec::with_capacity(FRAME_SIZE as usize))
    }

    /// Has one frame compressed. Frames are begun in the order in which they are given.
    pub(crate) async fn compress(&self, plain: Vec<u8>, memory: OwnedSemaphorePermit) -> Compressed {
        let (done, compressed) = oneshot::channel();
        // Without threads the job is dropped, and with it `done`: the receiver tells.
        let _ = self.queue.send(Job { plain, memory, done }).await;
        compressed
    }
}

/// What a compressing thread does.
fn compress(codec: Codec, jobs: &Mutex<mpsc::Receiver<Job>>, buffers: &Buffers) {
    give_way();
    let mut encoder = FrameEncoder::new(codec);
    while let Some(Job { plain, memory, done }) = next(jobs) {
        let frame = encoder.encode(&plain);
        buffers.keep(plain);
        let frame = frame.map_err(|source| AgentError::Encode {
            what: "a frame of a pack".into(),
            source,
        });
        // Nobody waits any more when the backup was given up.
        let _ = done.send(frame.map(|frame| {
            let memory = shrunk(memory, frame.bytes.len());
            (frame, memory)
        }));
    }
}

/// Gives back what is not needed for so many bytes.
fn shrunk(mut memory: OwnedSemaphorePermit, bytes: usize) -> OwnedSemaphorePermit {
    let needed = bytes.div_ceil(UNIT);
    drop(memory.split(memory.num_permits().saturating_sub(needed)));
    memory
}

/// Its own function, so that the lock is free while the job is done.
fn next(jobs: &Mutex<mpsc::Receiver<Job>>) -> Option<Job> {
    lock(jobs).blocking_recv()
}

/// Lowers the priority of this thread. That it may not is no reason not to work.
fn give_way() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(NICENESS) {
        tracing::debug!(%error, "compressing at the usual priority");
    }
}

impl Buffers {
    fn keep(&self, mut plain: Vec<u8>) {
        let mut idle = lock(&self.idle);
        if idle.len() < self.most {
            plain.clear();
            idle.push(plain);
        }
    }
}

/// A panic elsewhere leaves nothing half-done behind these locks, so a poisoned one is as good as any.
fn lock<T>(list: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn frames_come_back_with_the_memory_they_need_and_those_of_the_dead_never() {
        let memory = Arc::new(Semaphore::new(2048));
        let permit = |units| memory.clone().try_acquire_many_owned(units).unwrap();
        let compressors = Compressors::start(Codec::Zstd, 2, 4).unwrap();
        let compressed = compressors.compress(vec![7; 1 << 20], permit(1024)).await;
        let (frame, kept) = compressed.await.unwrap().unwrap();
        assert!(frame.bytes.len() < 4096, "{} bytes", frame.bytes.len());
        assert_eq!(kept.num_permits(), frame.bytes.len().div_ceil(UNIT));
        assert_eq!(memory.available_permits(), 2048 - kept.num_permits());

        let dead = Compressors {
            queue: mpsc::channel(1).0,
            buffers: compressors.buffers.clone(),
        };
        let lost = dead.compress(vec![7; 1 << 20], permit(1024)).await;
        assert!(lost.await.is_err());
        assert_eq!(memory.available_permits(), 2048 - kept.num_permits());
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_threads_give_way() {
        let nice_of = |stat: &str| -> i32 {
            let (_, fields) = stat.rsplit_once(')').unwrap();
            fields.split_whitespace().nth(16).unwrap().parse().unwrap()
        };
        let own = nice_of(&std::fs::read_to_string("/proc/thread-self/stat").unwrap());
        let compressors = Compressors::start(Codec::Lz4, 1, 1).unwrap();
        let memory = Arc::new(Semaphore::new(1));
        let frame = compressors.compress(vec![1], memory.try_acquire_owned().unwrap());
        let _compressed = frame.await.await.unwrap().unwrap();
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        let stats =
            threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap());
        let compressing: Vec<_> = stats.filter(|stat| stat.contains("(compressor)")).collect();
        assert!(!compressing.is_empty());
        assert!(
            compressing
                .iter()
                .all(|stat| nice_of(stat) == (own + NICENESS).min(19))
        );
    }
}
