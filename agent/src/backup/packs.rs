//! Packs: the bytes of a base backup on their way into the regions.
//!
//! Owns: cutting one stream of content into packs of equal plain size and frames of 1 MiB, compressing the
//! frames in parallel, sealing each pack and writing it to all regions. Small files share a pack and large
//! ones span several: a pack does not know about files.
//! Keeps: at most `memory` bytes are held between the first byte of a frame and the end of its pack's last
//! PUT; when they are spent [`Packs::append`] waits, and with it the socket and PostgreSQL.
//! Does not own: which bytes belong to which file (`entries`), regions (`regions`).

use std::sync::Arc;

use highwater_format::BackupId;
use highwater_format::container::{FRAME_SIZE, Frame, Header, Sealed, seal};
use highwater_format::layout::Layout;
use highwater_format::manifest::{Extent, PackInfo};
use highwater_store::Object;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::compressors::{Compressed, Compressors, UNIT};
use super::progress::Progress;
use super::regions::Targets;
use crate::blocking;
use crate::error::{AgentError, Result};

const FRAME: usize = FRAME_SIZE as usize;

/// What every pack of one backup has in common.
#[derive(Debug)]
pub(crate) struct PackSettings {
    pub(crate) backup: BackupId,
    pub(crate) layout: Layout,
    /// A header with everything but the pack's own range and length.
    pub(crate) header: Header,
    /// Plain bytes per pack.
    pub(crate) pack_size: u64,
    /// Frames compressed at the same time.
    pub(crate) threads: usize,
    /// Bound of the bytes in flight; at least one pack and one frame are always allowed.
    pub(crate) memory: u64,
}

/// The writing end of a backup's packs.
#[derive(Debug)]
pub(crate) struct Packs {
    shared: Arc<Shared>,
    pack: u32,
    /// Plain bytes of the current pack, those in `frame` included.
    used: u64,
    frame: Option<OpenFrame>,
    compressors: Compressors,
    /// The current pack's frames, in order.
    encoding: Vec<Compressed>,
    storing: JoinSet<Result<PackInfo>>,
    stored: Vec<PackInfo>,
}

#[derive(Debug)]
struct Shared {
    settings: PackSettings,
    targets: Arc<Targets>,
    progress: Progress,
    /// One permit per [`UNIT`] bytes in flight.
    memory: Arc<Semaphore>,
}

#[derive(Debug)]
struct OpenFrame {
    plain: Vec<u8>,
    permit: OwnedSemaphorePermit,
}

const FRAME_UNITS: u32 = FRAME_SIZE / 1024;

impl Packs {
    pub(crate) fn new(settings: PackSettings, targets: Arc<Targets>, progress: Progress) -> Result<Packs> {
        let least = settings.pack_size + FRAME as u64;
        let units =
            usize::try_from(settings.memory.max(least) / UNIT as u64).unwrap_or(Semaphore::MAX_PERMITS);
        let frames = units / FRAME_UNITS as usize;
        let compressors = Compressors::start(settings.header.codec, settings.threads, frames)?;
        let shared = Shared {
            memory: Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS))),
            settings,
            targets,
            progress,
        };
        Ok(Packs {
            shared: Arc::new(shared),
            pack: 0,
            used: 0,
            frame: None,
            compressors,
            encoding: Vec::new(),
            storing: JoinSet::new(),
            stored: Vec::new(),
        })
    }

    /// Takes the next bytes of content and tells `placed` where they will lie. Waits while the memory is
    /// spent; fails as soon as an earlier pack has failed.
    pub(crate) async fn append(&mut self, mut data: &[u8], mut placed: impl FnMut(Extent)) -> Result<()> {
        while !data.is_empty() {
            let mut frame = match self.frame.take() {
                Some(frame) => frame,
                None => self.open_frame().await?,
            };
            let left = usize::try_from(self.shared.settings.pack_size - self.used).unwrap_or(usize::MAX);
            let count = data.len().min(FRAME - frame.plain.len()).min(left);
            let (now, later) = data.split_at(count);
            frame.plain.extend_from_slice(now);
            placed(Extent {
                pack: self.pack,
                offset: self.used,
                len: count as u64,
            });
            self.used += count as u64;
            data = later;
            let pack_full = self.used >= self.shared.settings.pack_size;
            if pack_full || frame.plain.len() >= FRAME {
                self.encode(frame).await;
            } else {
                self.frame = Some(frame);
            }
            if pack_full {
                self.close_pack();
            }
        }
        Ok(())
    }

    /// Waits until some pack is stored; pending for ever when none is on its way. For a `select!` beside the
    /// socket, so that a lost cause is noticed while PostgreSQL is silent.
    pub(crate) async fn watch(&mut self) -> Result<()> {
        match self.storing.join_next().await {
            Some(result) => self.note(result),
            None => std::future::pending().await,
        }
    }

    /// Stores what is left; returns every pack in order once all of them are stored.
    pub(crate) async fn finish(mut self) -> Result<Vec<PackInfo>> {
        if let Some(frame) = self.frame.take() {
            self.encode(frame).await;
        }
        if self.used > 0 {
            self.close_pack();
        }
        while let Some(result) = self.storing.join_next().await {
            self.note(result)?;
        }
        self.stored.sort_unstable_by_key(|pack| pack.number);
        Ok(self.stored)
    }

    async fn open_frame(&mut self) -> Result<OpenFrame> {
        let memory = self.shared.memory.clone();
        let mut permit = std::pin::pin!(memory.acquire_many_owned(FRAME_UNITS));
        let permit = loop {
            tokio::select! {
                biased;
                permit = &mut permit => break permit.map_err(|_| closed("memory"))?,
                Some(result) = self.storing.join_next() => note(&mut self.stored, result)?,
            }
        };
        let plain = self.compressors.buffer();
        Ok(OpenFrame { plain, permit })
    }

    async fn encode(&mut self, frame: OpenFrame) {
        let OpenFrame { plain, permit } = frame;
        self.encoding.push(self.compressors.compress(plain, permit).await);
    }

    fn close_pack(&mut self) {
        let frames = std::mem::take(&mut self.encoding);
        self.storing.spawn(self.shared.clone().store(self.pack, frames));
        self.pack += 1;
        self.used = 0;
    }

    fn note(&mut self, result: Joined) -> Result<()> {
        note(&mut self.stored, result)
    }
}

type Joined = std::result::Result<Result<PackInfo>, tokio::task::JoinError>;

fn note(stored: &mut Vec<PackInfo>, result: Joined) -> Result<()> {
    stored.push(result.map_err(|error| AgentError::Bug(format!("storing a pack: {error}")))??);
    Ok(())
}

impl Shared {
    /// Seals one pack and writes it to the regions.
    async fn store(self: Arc<Self>, number: u32, encoding: Vec<Compressed>) -> Result<PackInfo> {
        let mut frames = Vec::with_capacity(encoding.len());
        let mut permits = Vec::with_capacity(encoding.len());
        for compressed in encoding {
            let (frame, permit) = compressed
                .await
                .map_err(|_| AgentError::Bug("a compressing thread ended".into()))??;
            frames.push(frame);
            permits.push(permit);
        }
        let shared = self.clone();
        let sealed = blocking::run("sealing a pack", move || shared.seal(number, &frames)).await??;
        let info = PackInfo {
            number,
            plain_len: sealed.header.plain_len,
            stored_len: sealed.bytes.len() as u64,
            crc32: format!("{:08x}", sealed.crc32),
        };
        let key = self.settings.layout.pack(&self.settings.backup, number);
        self.targets
            .put(&key, Object::with_crc32(sealed.bytes, sealed.crc32))
            .await?;
        self.progress.add_stored(info.stored_len);
        drop(permits);
        Ok(info)
    }

    fn seal(&self, number: u32, frames: &[Frame]) -> Result<Sealed> {
        let mut header = self.settings.header.clone();
        header.start = u64::from(number);
        header.end = u64::from(number) + 1;
        seal(header, frames).map_err(|source| AgentError::Encode {
            what: format!("pack {number}"),
            source,
        })
    }
}

fn closed(what: &str) -> AgentError {
    AgentError::Bug(format!("the {what} budget was closed"))
}

#[cfg(test)]
#[path = "packs_tests.rs"]
mod tests;
