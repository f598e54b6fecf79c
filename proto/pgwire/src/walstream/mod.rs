//! Physical streaming: `START_REPLICATION`, the WAL that follows, and the status messages going back.
//!
//! [`WalReader`] and [`StatusWriter`] are two halves that do not wait for each other. They share the
//! sending side behind a lock that is held only while bytes are being handed to the socket; the
//! reader takes it once, to confirm the end of a timeline, and never while it waits for WAL.

mod reader;
mod writer;

use bytes::Bytes;
use highwater_format::{Lsn, Time, TimelineId};

use crate::commands::{self, check_slot_name};
use crate::connection::{Connection, read_row};
use crate::error::PgError;
use crate::message::{self, Row, tag};

pub use reader::WalReader;
pub use writer::{Status, StatusWriter};

/// Where a server's history goes on after the timeline that was streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextTimeline {
    /// The timeline that follows.
    pub timeline: TimelineId,
    /// Where it begins. This can be below what was already received: WAL past it belongs to the old
    /// timeline only.
    pub switch: Lsn,
}

/// Why a stream ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    /// The server shut down cleanly, after everything sent was acknowledged.
    Shutdown,
    /// The timeline ended; the connection can be used again.
    Timeline(NextTimeline),
}

/// What a stream delivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamMessage {
    /// WAL that directly follows the WAL before it.
    Data {
        /// LSN of the first byte.
        start: Lsn,
        /// The server's end of WAL when it sent this, not the end of this message.
        server_end: Lsn,
        /// The server's clock when it sent this.
        server_time: Time,
        /// The WAL. A slice of the read buffer: it keeps up to 256 KiB alive, so copy small pieces
        /// that are kept for long.
        data: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// How far the server has sent WAL.
        server_end: Lsn,
        /// The server's clock when it sent this.
        server_time: Time,
        /// The server wants a status message at once.
        reply_requested: bool,
    },
    /// Nothing more comes.
    Ended(StreamEnd),
}

/// Answer to `START_REPLICATION`.
#[derive(Debug)]
pub enum Started {
    /// WAL follows.
    Streaming(WalReader, StatusWriter),
    /// The start is exactly the end of a historic timeline: there is nothing to stream on it.
    AtEnd(Connection, NextTimeline),
}

impl Connection {
    /// Starts streaming at `start` on `timeline`. Start at the beginning of a segment. Errors may also
    /// come from the first [`WalReader::next`]: the server checks some things only after it agreed.
    pub async fn start_replication(
        mut self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Started, PgError> {
        let slot = match slot {
            Some(slot) => {
                check_slot_name(slot)?;
                format!("SLOT \"{slot}\" ")
            }
            None => String::new(),
        };
        let command = format!("START_REPLICATION {slot}PHYSICAL {start} TIMELINE {timeline}");
        self.send_query(&command, &command).await?;
        let frame = self.next(&command).await?;
        match frame.tag {
            tag::COPY_BOTH => {
                let (reader, writer) = reader::begin(self, command, start);
                Ok(Started::Streaming(reader, writer))
            }
            tag::ROW_DESCRIPTION => {
                let mut end = EndOfTimeline {
                    described: true,
                    next: None,
                };
                loop {
                    let frame = self.next(&command).await?;
                    if frame.tag == tag::ERROR {
                        return Err(self.recover(&command, &frame).await);
                    }
                    if let Some(next) = end.take(frame, &command)? {
                        self.done();
                        return Ok(Started::AtEnd(self, next));
                    }
                }
            }
            tag::ERROR => Err(self.recover(&command, &frame).await),
            _ => Err(message::unexpected(&frame, &command)),
        }
    }
}

/// Reads the answer after the end of a timeline: `RowDescription`, `DataRow` with the next timeline
/// and its start, `CommandComplete` (twice), `ReadyForQuery`.
#[derive(Debug, Default)]
struct EndOfTimeline {
    described: bool,
    next: Option<NextTimeline>,
}

impl EndOfTimeline {
    fn take(&mut self, frame: crate::frame::Frame, during: &str) -> Result<Option<NextTimeline>, PgError> {
        match frame.tag {
            tag::ROW_DESCRIPTION if !self.described => self.described = true,
            tag::DATA_ROW if self.described && self.next.is_none() => {
                self.next = Some(next_timeline(&read_row(frame.body, during)?, during)?);
            }
            tag::COMMAND_COMPLETE => {}
            tag::READY => {
                return self.next.map(Some).ok_or_else(|| {
                    PgError::protocol(
                        during,
                        "the timeline ended and the server did not name the next one",
                    )
                });
            }
            _ => return Err(message::unexpected(&frame, during)),
        }
        Ok(None)
    }
}

fn next_timeline(row: &Row, during: &str) -> Result<NextTimeline, PgError> {
    Ok(NextTimeline {
        timeline: commands::timeline(message::parsed(row, 0, "next_tli", during)?, during)?,
        switch: message::parsed(row, 1, "next_tli_startpos", during)?,
    })
}
