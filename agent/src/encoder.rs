//! Compression on a bounded number of blocking threads.
//!
//! Owns the encoders (each keeps its tables between frames) and how many of them work at once. Frames are
//! compressed as soon as they are complete, in any order; the [`crate::sealer`] puts them back in order.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use highwater_format::{Codec, Frame, FrameEncoder};
use tokio::sync::Semaphore;
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

/// A frame that is being compressed.
pub type Pending = AbortOnDropHandle<Result<Encoded>>;

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Encoder {
    codec: Codec,
    idle: Arc<Mutex<Vec<FrameEncoder>>>,
    threads: Arc<Semaphore>,
}

impl Encoder {
    /// At most `threads` frames are compressed at once.
    pub fn new(codec: Codec, threads: usize) -> Self {
        Self {
            codec,
            idle: Arc::default(),
            threads: Arc::new(Semaphore::new(threads.max(1))),
        }
    }

    /// The codec of every frame.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Starts compressing one frame; its charge shrinks to what the compressed frame needs.
    pub fn start(&self, plain: Bytes, mut charge: Charge) -> Pending {
        let encoder = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            let _permit = encoder
                .threads
                .clone()
                .acquire_owned()
                .await
                .map_err(|_| AgentError::Cancelled)?;
            let frame = blocking::run("compressing a frame", move || encoder.encode(&plain)).await??;
            charge.resize(frame.bytes.len() as u64);
            Ok(Encoded { frame, charge })
        }))
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
