//! Framing: bytes of the socket to whole protocol messages and back.
//!
//! [`FrameReader`] reads in large steps and hands out each message's body as a slice of the read
//! buffer, never a copy. A body keeps its whole read block (256 KiB) alive while it exists, so
//! whoever keeps a few small messages for long should copy them. Both directions are cancel safe:
//! dropping a future loses neither received nor half-sent bytes.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::backend::Header;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::PgError;
use crate::message::tag;
use crate::stream::{ReadHalf, WriteHalf};

/// How much is read at once. Two of PostgreSQL's largest WAL messages (`MAX_SEND_SIZE` in
/// walsender.c: 16 WAL pages, 128 KiB) fit.
const READ_BLOCK: usize = 256 * 1024;
/// Smallest free space worth a read call; below it a new block is started.
const READ_MIN: usize = 32 * 1024;
/// Used blocks kept for another round (4 MiB): giving them to the allocator and taking new ones costs
/// page faults, up to half of the CPU time of receiving.
const SPARE_BLOCKS: usize = 16;
/// A read that brings less is no bulk; one that brings more has nearly emptied a full Unix socket (208 KiB), so that
/// the server may be waiting.
const TRICKLE: std::ops::Range<usize> = 4 * 1024..96 * 1024;
/// How long more is waited for, and how exactly, in nanoseconds: a thread's sleep is 50 microseconds longer than it was
/// asked for unless it says that it minds (PR_SET_TIMERSLACK of prctl(2)). That much more, and the server, which fills
/// the socket in some 120 microseconds, stands still for as long.
const GATHER: Duration = Duration::from_micros(20);
#[cfg(target_os = "linux")]
const GATHER_SLACK: u64 = 1;
/// Tag byte and length word.
const HEADER_LEN: usize = 5;

/// Longest message accepted before the server has authenticated us (libpq: 30000).
pub(crate) const LIMIT_STARTUP: usize = 64 * 1024;
/// Longest message accepted in a copy stream. `MAX_SEND_SIZE` is 1 MiB with the largest WAL pages.
pub(crate) const LIMIT_COPY: usize = 4 * 1024 * 1024;
/// Longest message accepted otherwise.
pub(crate) const LIMIT_QUERY: usize = 64 * 1024 * 1024;

/// One message of the server.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) tag: u8,
    pub(crate) body: Bytes,
}

/// The reading side of a connection.
#[derive(Debug)]
pub(crate) struct FrameReader {
    half: ReadHalf,
    buffer: BytesMut,
    /// Size of the block behind `buffer`.
    block_size: usize,
    /// Blocks read to their end, oldest first; free again once the messages in them are dropped.
    spares: VecDeque<BytesMut>,
    limit: usize,
    /// See [`Self::gather`].
    gathering: bool,
    trickles: bool,
}

impl FrameReader {
    pub(crate) fn new(half: ReadHalf) -> FrameReader {
        FrameReader {
            half,
            buffer: BytesMut::new(),
            block_size: 0,
            spares: VecDeque::new(),
            limit: LIMIT_STARTUP,
            gathering: false,
            trickles: false,
        }
    }

    /// Longest message body accepted from now on.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Whether to read in larger steps what arrives in many small ones, at the price of a moment's delay. For bulk;
    /// changes nothing under TLS, which hands out at most one record at a time.
    pub(crate) fn set_gathering(&mut self, gathering: bool) {
        self.gathering = gathering && !matches!(self.half, ReadHalf::Tls(_));
    }

    /// The next message, or `None` at a clean end between two messages. Cancel safe.
    pub(crate) async fn next(&mut self, during: &str) -> Result<Option<Frame>, PgError> {
        loop {
            if let Some(frame) = self.take_buffered(during)? {
                return Ok(Some(frame));
            }
            if self.fill(during).await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(PgError::protocol(
                        during,
                        format!(
                            "the connection ended inside a message, after {} bytes of it",
                            self.buffer.len()
                        ),
                    )),
                };
            }
        }
    }

    /// The next message; the end of the connection is an error.
    pub(crate) async fn expect(&mut self, during: &str) -> Result<Frame, PgError> {
        match self.next(during).await? {
            Some(frame) => Ok(frame),
            None => Err(PgError::Closed {
                during: during.to_owned(),
            }),
        }
    }

    /// A message that is already here in full.
    fn take_buffered(&mut self, during: &str) -> Result<Option<Frame>, PgError> {
        match split_frame(&mut self.buffer, self.limit) {
            Ok(frame) => Ok(frame),
            Err(message) => Err(PgError::protocol(during, message)),
        }
    }

    async fn fill(&mut self, during: &str) -> Result<usize, PgError> {
        let missing = missing_bytes(&self.buffer);
        let free = self.buffer.capacity() - self.buffer.len();
        if free < missing.max(READ_MIN) {
            self.next_block(missing.max(READ_MIN));
        }
        self.gather();
        let free = self.buffer.capacity() - self.buffer.len();
        let got = self
            .half
            .read_buf(&mut self.buffer)
            .await
            .map_err(|e| PgError::io(during, e))?;
        self.trickles = got < free && TRICKLE.contains(&got);
        Ok(got)
    }

    /// Lets more arrive when the last read found a stream in full flow that it had outrun.
    ///
    /// A thread that sleeps in the kernel until the socket is readable is woken for every piece that the server
    /// writes, 8 KiB in a base backup up to 16: two switches of threads each, a fifth of the CPU time of both sides. So
    /// this thread waits where nothing wakes it, for less than it takes a fast server to fill a Unix socket.
    fn gather(&mut self) {
        if self.gathering && std::mem::take(&mut self.trickles) {
            moment();
        }
    }

    /// Makes room for `wanted` more bytes: in this block if nothing of it is in use any more, else in
    /// the oldest block that is free, else in a new one. What is left of this block moves along.
    fn next_block(&mut self, wanted: usize) {
        if self.buffer.try_reclaim(wanted) {
            return;
        }
        let size = (self.buffer.len() + wanted).max(READ_BLOCK);
        let mut block = self.spare_block(size);
        block.extend_from_slice(&self.buffer);
        let mut used = std::mem::replace(&mut self.buffer, block);
        // A block for an unusually large message is not kept.
        if self.block_size == READ_BLOCK {
            used.clear();
            self.spares.push_back(used);
        }
        if self.spares.len() > SPARE_BLOCKS {
            self.spares.pop_front();
        }
        self.block_size = size;
    }

    fn spare_block(&mut self, size: usize) -> BytesMut {
        let oldest_is_free = size == READ_BLOCK
            && self
                .spares
                .front_mut()
                .is_some_and(|oldest| oldest.try_reclaim(size));
        match oldest_is_free {
            true => self.spares.pop_front().unwrap_or_default(),
            false => BytesMut::with_capacity(size),
        }
    }
}

/// Sleeps for [`GATHER`], and leaves the thread's own way of sleeping as it is.
fn moment() {
    // That a system knows no such thing, or does not allow it, makes the moment longer and nothing else.
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_timerslack(GATHER_SLACK);
    #[expect(
        clippy::disallowed_methods,
        reason = "shorter than compressing one frame, and no timer of the runtime is this fine; the point is that the \
                  runtime is not woken"
    )]
    std::thread::sleep(GATHER);
    // Zero stands for the thread's default.
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_timerslack(0);
}

/// How many bytes the message at the front still lacks, as far as its header says.
fn missing_bytes(buffer: &BytesMut) -> usize {
    match Header::parse(buffer) {
        Ok(Some(header)) => (usize::try_from(header.len()).unwrap_or(0) + 1).saturating_sub(buffer.len()),
        _ => HEADER_LEN,
    }
}

/// Splits one whole message off the front. The header is checked before anything is waited for, so
/// that a peer that is no PostgreSQL server is found out by its first five bytes.
pub(crate) fn split_frame(buffer: &mut BytesMut, limit: usize) -> Result<Option<Frame>, String> {
    let header = match Header::parse(buffer) {
        Ok(Some(header)) => header,
        Ok(None) => return Ok(None),
        Err(_) => return Err("a message claims a length below its own length word".to_owned()),
    };
    if !tag::is_known(header.tag()) {
        return Err(format!(
            "unknown message type {:?} (0x{:02x})",
            char::from(header.tag()),
            header.tag()
        ));
    }
    // The length counts itself (4 bytes) and not the tag.
    let body_len = usize::try_from(header.len()).unwrap_or(usize::MAX) - 4;
    if body_len > limit {
        return Err(format!(
            "a message of type {:?} claims {body_len} bytes, the limit here is {limit}",
            char::from(header.tag())
        ));
    }
    if buffer.len() < HEADER_LEN + body_len {
        return Ok(None);
    }
    buffer.advance(HEADER_LEN);
    Ok(Some(Frame {
        tag: header.tag(),
        body: buffer.split_to(body_len).freeze(),
    }))
}

/// The writing side of a connection.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    half: WriteHalf,
    /// Encoded and not yet written, left over from a call that was dropped.
    pub(crate) pending: BytesMut,
}

impl FrameWriter {
    pub(crate) fn new(half: WriteHalf) -> FrameWriter {
        FrameWriter {
            half,
            pending: BytesMut::new(),
        }
    }

    /// Sends everything pending. Cancel safe: what was not written stays pending.
    pub(crate) async fn flush(&mut self, during: &str) -> Result<(), PgError> {
        while self.pending.has_remaining() {
            let written = self
                .half
                .write_buf(&mut self.pending)
                .await
                .map_err(|e| PgError::io(during, e))?;
            if written == 0 {
                return Err(PgError::Closed {
                    during: during.to_owned(),
                });
            }
        }
        self.half.flush().await.map_err(|e| PgError::io(during, e))
    }

    /// Says goodbye and closes; errors no longer matter.
    pub(crate) async fn close(mut self) {
        postgres_protocol::message::frontend::terminate(&mut self.pending);
        if self.flush("closing").await.is_ok() {
            // The server closes on Terminate; a failing shutdown changes nothing.
            let _ = self.half.shutdown().await;
        }
    }
}

#[cfg(test)]
mod tests;
