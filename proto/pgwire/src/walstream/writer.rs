//! The sending half of a stream: status messages.
//!
//! Reports exactly the positions it is given. Hot-standby feedback has no message here on purpose: it
//! would hold back vacuum on the primary.

use std::sync::Arc;

use bytes::BufMut;
use highwater_format::{Lsn, Time};
use postgres_protocol::message::frontend;
use tokio::sync::Mutex;

use crate::connection::put_copy_data;
use crate::error::PgError;
use crate::frame::FrameWriter;

/// Type byte, three LSNs, time, flag.
const STATUS_LEN: usize = 1 + 3 * 8 + 8 + 1;

/// What the server is told. Its slot moves to `flush`, and a commit that waits for this receiver
/// returns when `flush` has passed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Received.
    pub write: Lsn,
    /// Safe. Zero means "no opinion": the slot stays, and a shutdown waits for `write` instead.
    pub flush: Lsn,
    /// Applied.
    pub apply: Lsn,
    /// Whether the server shall answer with a keepalive at once.
    pub reply_requested: bool,
    /// Our clock.
    pub now: Time,
}

/// The sending side, shared by both halves of a stream.
#[derive(Debug)]
pub(super) struct SendSide {
    pub(super) frames: FrameWriter,
    finished: bool,
}

impl SendSide {
    pub(super) fn new(frames: FrameWriter) -> SendSide {
        SendSide {
            frames,
            finished: false,
        }
    }

    /// Ends our side of the copy, once. Cancel safe: a second call sends what the first left.
    pub(super) async fn finish(&mut self, during: &str) -> Result<(), PgError> {
        if !self.finished {
            frontend::copy_done(&mut self.frames.pending);
            self.finished = true;
        }
        self.frames.flush(during).await
    }
}

/// The sending half. Works from another task than the reader's.
#[derive(Debug)]
pub struct StatusWriter {
    shared: Arc<Mutex<SendSide>>,
    command: String,
}

impl StatusWriter {
    pub(super) fn new(shared: Arc<Mutex<SendSide>>, command: String) -> StatusWriter {
        StatusWriter { shared, command }
    }

    pub(super) fn belongs_to(&self, shared: &Arc<Mutex<SendSide>>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    /// Sends one status message. Cancel safe: a message that was begun is completed by the next call.
    ///
    /// Once the timeline has ended nothing may be sent any more, and this does nothing: the server
    /// has stopped listening, and the status task need not know before the reader tells it.
    pub async fn send(&mut self, status: Status) -> Result<(), PgError> {
        let mut side = self.shared.lock().await;
        if side.finished {
            return Ok(());
        }
        // First what a dropped call left, so that a peer that does not read costs one message of memory.
        side.frames.flush(&self.command).await?;
        put_copy_data(&mut side.frames.pending, &encode(status));
        side.frames.flush(&self.command).await
    }
}

fn encode(status: Status) -> [u8; STATUS_LEN] {
    let mut message = [0; STATUS_LEN];
    let mut out = message.as_mut_slice();
    out.put_u8(b'r');
    for lsn in [status.write, status.flush, status.apply] {
        out.put_u64(lsn.0);
    }
    out.put_i64(status.now.to_pg());
    out.put_u8(u8::from(status.reply_requested));
    message
}
