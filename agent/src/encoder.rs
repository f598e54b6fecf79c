//! Compression, here or on a bounded number of blocking threads.
//!
//! Owns the encoders (each keeps its tables between frames), how many of them work at once, and the one decision
//! where that happens. Frames are compressed as soon as they are complete, in any order; the [`crate::sealer`] puts
//! them back in order.
//!
//! A codec that keeps up with a walsender on one core works where the bytes arrive: there they are still in that
//! core's cache, and no thread has to be woken. With lz4 that is an eighth of the CPU time of archiving a backlog.
//! A slower one gets threads of its own, so that catching up after an outage is not bound to one core.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use highwater_format::{Codec, Frame, FrameEncoder};
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;

use crate::blocking;
use crate::budget::Charge;
use crate::error::{AgentError, Result};

/// A compressed frame, and the memory it stands for.
#[derive(Debug)]
pub struct Encoded {
    /// The frame.
    pub frame: Frame,
    /// Its stored size.
    pub charge: Charge,
}

/// A frame that is being compressed, or has been. To be awaited once.
#[derive(Debug)]
pub struct Pending(At);

#[derive(Debug)]
enum At {
    Here(Option<Result<Encoded>>),
    Thread(AbortOnDropHandle<Result<Encoded>>),
}

impl Future for Pending {
    type Output = Result<Encoded>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Encoded>> {
        match &mut self.0 {
            At::Here(done) => Poll::Ready(
                done.take()
                    .unwrap_or_else(|| Err(AgentError::Bug("a frame was taken twice".into()))),
            ),
            At::Thread(task) => Pin::new(task)
                .poll(context)
                .map(|joined| joined.map_err(|error| ended(&error))?),
        }
    }
}

fn ended(error: &JoinError) -> AgentError {
    AgentError::Bug(format!("compressing a frame: {error}"))
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Encoder {
    codec: Codec,
    idle: Arc<Mutex<Vec<FrameEncoder>>>,
    /// None: everything happens here.
    threads: Option<Arc<Semaphore>>,
}

impl Encoder {
    /// At most `threads` frames are compressed at once.
    pub fn new(codec: Codec, threads: usize) -> Self {
        let threads = match codec {
            Codec::None | Codec::Lz4 => None,
            Codec::Zstd => Some(Arc::new(Semaphore::new(threads.max(1)))),
        };
        Self {
            threads,
            ..Self::without_threads(codec)
        }
    }

    /// Compresses every frame where it is handed in, whatever the codec: the same input gives the same order of events.
    pub fn without_threads(codec: Codec) -> Self {
        Self {
            codec,
            idle: Arc::default(),
            threads: None,
        }
    }

    /// The codec of every frame.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Starts compressing one frame; its charge shrinks to what the compressed frame needs.
    pub fn start(&self, plain: Bytes, mut charge: Charge) -> Pending {
        let finish = move |frame: Frame| {
            charge.resize(frame.bytes.len() as u64);
            Encoded { frame, charge }
        };
        let Some(threads) = self.threads.clone() else {
            return Pending(At::Here(Some(self.encode(&plain).map(finish))));
        };
        let encoder = self.clone();
        Pending(At::Thread(AbortOnDropHandle::new(tokio::spawn(async move {
            let _permit = threads.acquire_owned().await.map_err(|_| AgentError::Cancelled)?;
            let frame = blocking::run("compressing a frame", move || encoder.encode(&plain)).await??;
            Ok(finish(frame))
        }))))
    }

    /// Compresses one frame here and now.
    pub fn encode(&self, plain: &[u8]) -> Result<Frame> {
        let failed = |source| AgentError::Encode {
            what: format!("a frame of {} bytes", plain.len()),
            source,
        };
        let taken = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut encoder = taken.unwrap_or_else(|| FrameEncoder::new(self.codec));
        let frame = encoder.encode(plain).map_err(failed);
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(encoder);
        frame
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::budget::Budget;

    fn plain() -> Bytes {
        Bytes::from(b"nothing to see here; ".repeat(5000))
    }

    #[test]
    fn what_is_quick_is_done_when_it_is_handed_in_and_without_threads_everything_is() {
        let budget = Budget::new(1 << 20);
        for encoder in [
            Encoder::new(Codec::None, 2),
            Encoder::new(Codec::Lz4, 2),
            Encoder::without_threads(Codec::Zstd),
        ] {
            let pending = encoder.start(plain(), budget.charge(plain().len() as u64));
            let encoded = pending
                .now_or_never()
                .expect("no runtime is needed")
                .expect("compressed");
            assert_eq!(encoded.frame, encoder.encode(&plain()).unwrap());
            assert_eq!(budget.used(), encoded.frame.bytes.len() as u64);
        }
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn threads_give_the_same_frames() {
        let budget = Budget::new(1 << 20);
        let (threads, here) = (
            Encoder::new(Codec::Zstd, 2),
            Encoder::without_threads(Codec::Zstd),
        );
        let pending: Vec<_> = (0..8)
            .map(|_| threads.start(plain(), budget.charge(plain().len() as u64)))
            .collect();
        for pending in pending {
            assert_eq!(pending.await.unwrap().frame, here.encode(&plain()).unwrap());
        }
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_cannot_be_compressed_is_an_error_where_it_is_awaited() {
        let budget = Budget::new(1 << 20);
        let pending = Encoder::new(Codec::Lz4, 2).start(Bytes::new(), budget.charge(0));
        assert!(matches!(
            pending.now_or_never(),
            Some(Err(AgentError::Encode { .. }))
        ));
    }
}
