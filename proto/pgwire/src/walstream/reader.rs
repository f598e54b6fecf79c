//! The receiving half of a stream.
//!
//! Keeps the one invariant of streaming: data is handed out without a gap or an overlap, from the
//! LSN that was asked for. Decides nothing about what to acknowledge.

use std::sync::Arc;

use bytes::Bytes;
use highwater_format::{Lsn, Time};
use tokio::sync::Mutex;

use super::writer::{SendSide, StatusWriter};
use super::{EndOfTimeline, StreamEnd, StreamMessage};
use crate::connection::{Connection, Session};
use crate::error::{PgError, ServerError};
use crate::frame::{Frame, FrameReader, LIMIT_COPY};
use crate::message::{self, tag, take_u8, take_u64};

/// WAL message and keepalive inside `CopyData`.
const WAL_DATA: u8 = b'w';
const KEEPALIVE: u8 = b'k';

/// How far the end of the stream has come.
#[derive(Debug)]
enum Phase {
    Streaming,
    /// The server ended the copy; our own end may still have to go out, then the answer is read.
    Ending(EndOfTimeline),
    Ended(StreamEnd),
    /// An error was returned: nothing more can be read.
    Failed,
}

/// The receiving half. Dropping a [`WalReader::next`] future loses nothing.
#[derive(Debug)]
pub struct WalReader {
    frames: FrameReader,
    session: Session,
    send_side: Arc<Mutex<SendSide>>,
    command: String,
    expected: Lsn,
    phase: Phase,
}

/// Splits a connection that has just entered `CopyBoth`.
pub(super) fn begin(connection: Connection, command: String, start: Lsn) -> (WalReader, StatusWriter) {
    let Connection {
        mut reader,
        writer,
        session,
        ..
    } = connection;
    reader.set_limit(LIMIT_COPY);
    let send_side = Arc::new(Mutex::new(SendSide::new(writer)));
    let status = StatusWriter::new(Arc::clone(&send_side), command.clone());
    let reader = WalReader {
        frames: reader,
        session,
        send_side,
        command,
        expected: start,
        phase: Phase::Streaming,
    };
    (reader, status)
}

impl WalReader {
    /// The next message. Cancel safe. After [`StreamMessage::Ended`] it returns the same end again;
    /// after an error the stream is finished.
    pub async fn next(&mut self) -> Result<StreamMessage, PgError> {
        let result = self.advance().await;
        if result.is_err() {
            self.phase = Phase::Failed;
        }
        result
    }

    /// LSN of the next byte of WAL.
    pub fn position(&self) -> Lsn {
        self.expected
    }

    /// Puts the connection together again after [`StreamEnd::Timeline`]. Fails, and closes the
    /// connection, at any other time or with the writer of another stream.
    pub fn into_connection(self, writer: StatusWriter) -> Result<Connection, PgError> {
        if !matches!(self.phase, Phase::Ended(StreamEnd::Timeline(_))) {
            return Err(PgError::Unusable {
                why: "the stream has not reached the end of a timeline",
            });
        }
        if !writer.belongs_to(&self.send_side) {
            return Err(PgError::Unusable {
                why: "the status writer belongs to another stream",
            });
        }
        drop(writer);
        let send_side = Arc::into_inner(self.send_side).ok_or(PgError::Unusable {
            why: "the status writer is still in use",
        })?;
        Ok(Connection::assemble(
            self.frames,
            send_side.into_inner().frames,
            self.session,
        ))
    }

    async fn advance(&mut self) -> Result<StreamMessage, PgError> {
        loop {
            match &mut self.phase {
                Phase::Streaming => {
                    if let Some(message) = self.advance_streaming().await? {
                        return Ok(message);
                    }
                }
                Phase::Ending(_) => self.advance_ending().await?,
                Phase::Ended(end) => return Ok(StreamMessage::Ended(*end)),
                Phase::Failed => {
                    return Err(PgError::Unusable {
                        why: "the stream ended with an error before",
                    });
                }
            }
        }
    }

    async fn advance_streaming(&mut self) -> Result<Option<StreamMessage>, PgError> {
        let frame = self.frames.expect(&self.command).await?;
        match frame.tag {
            tag::COPY_DATA => self.read_copy_data(frame.body).map(Some),
            tag::COPY_DONE => {
                self.phase = Phase::Ending(EndOfTimeline::default());
                Ok(None)
            }
            // A clean shutdown: CommandComplete without CopyDone, then the connection closes.
            tag::COMMAND_COMPLETE => {
                self.phase = Phase::Ended(StreamEnd::Shutdown);
                Ok(None)
            }
            _ => match self.absorb(frame)? {
                Some(frame) => Err(message::unexpected(&frame, &self.command)),
                None => Ok(None),
            },
        }
    }

    /// Confirms the end of the copy, then reads what follows the timeline.
    async fn advance_ending(&mut self) -> Result<(), PgError> {
        self.send_side.lock().await.finish(&self.command).await?;
        let frame = self.frames.expect(&self.command).await?;
        let Some(frame) = self.absorb(frame)? else {
            return Ok(());
        };
        let Phase::Ending(end) = &mut self.phase else {
            return Ok(());
        };
        if let Some(next) = end.take(frame, &self.command)? {
            self.phase = Phase::Ended(StreamEnd::Timeline(next));
        }
        Ok(())
    }

    fn absorb(&mut self, frame: Frame) -> Result<Option<Frame>, PgError> {
        if frame.tag == tag::ERROR {
            return Err(PgError::Server(Box::new(ServerError::parse(
                &self.command,
                &frame.body,
            ))));
        }
        // Nobody reads the notices of a stream, and it may run for months.
        self.session.notices.clear();
        self.session.absorb(frame, &self.command)
    }

    fn read_copy_data(&mut self, mut body: Bytes) -> Result<StreamMessage, PgError> {
        match take_u8(&mut body) {
            Some(WAL_DATA) => self.read_wal(body),
            Some(KEEPALIVE) => read_keepalive(body).ok_or_else(|| message::short("keepalive", &self.command)),
            Some(other) => Err(PgError::protocol(
                &self.command,
                format!("unknown stream message {:?} (0x{other:02x})", char::from(other)),
            )),
            None => Err(message::short("stream message", &self.command)),
        }
    }

    fn read_wal(&mut self, mut body: Bytes) -> Result<StreamMessage, PgError> {
        let mut field = || take_u64(&mut body);
        let (Some(start), Some(server_end), Some(server_time)) = (field(), field(), field()) else {
            return Err(message::short("WAL message header", &self.command));
        };
        let start = Lsn(start);
        if start != self.expected {
            return Err(PgError::Jump {
                expected: self.expected,
                found: start,
            });
        }
        let Some(end) = start.checked_add(body.len() as u64) else {
            return Err(PgError::protocol(
                &self.command,
                format!("WAL at {start} runs past the last LSN"),
            ));
        };
        self.expected = end;
        Ok(StreamMessage::Data {
            start,
            server_end: Lsn(server_end),
            server_time: Time::from_pg(server_time.cast_signed()),
            data: body,
        })
    }
}

fn read_keepalive(mut body: Bytes) -> Option<StreamMessage> {
    let server_end = Lsn(take_u64(&mut body)?);
    let server_time = Time::from_pg(take_u64(&mut body)?.cast_signed());
    let reply_requested = take_u8(&mut body)? != 0;
    Some(StreamMessage::Keepalive {
        server_end,
        server_time,
        reply_requested,
    })
}
