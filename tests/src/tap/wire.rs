//! Just enough of PostgreSQL's protocol to read status messages and WAL from a byte stream.
//!
//! Written for the tap and independent of the product's own implementation on purpose.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use bytes::{Buf, Bytes, BytesMut};

use super::Log;

const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;

/// What both directions of a connection must know.
#[derive(Clone, Debug, Default)]
pub(super) struct Conversation {
    encryption_asked: Arc<AtomicBool>,
    encryption_granted: Arc<AtomicBool>,
    /// The timeline that was asked for last.
    timeline: Arc<AtomicU32>,
}

/// A standby status update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) write: u64,
    pub(super) flush: u64,
    pub(super) apply: u64,
    pub(super) reply_requested: bool,
}

/// Reads what the client sends.
#[derive(Debug)]
pub(super) struct Frontend {
    buffer: BytesMut,
    started: bool,
    conversation: Conversation,
}

impl Frontend {
    pub(super) fn new(conversation: Conversation) -> Self {
        Self {
            buffer: BytesMut::new(),
            started: false,
            conversation,
        }
    }

    /// Takes the next bytes and returns the status messages that they complete.
    pub(super) fn feed(&mut self, bytes: &Bytes) -> Vec<Status> {
        let mut found = Vec::new();
        if self.conversation.encryption_granted.load(Ordering::SeqCst) {
            return found;
        }
        self.buffer.extend_from_slice(bytes);
        while let Some((tag, mut body)) = self.message() {
            if let Some(timeline) = (tag == b'Q').then(|| timeline_of(&body)).flatten() {
                self.conversation.timeline.store(timeline, Ordering::SeqCst);
            }
            if tag == b'd' && body.first() == Some(&b'r') && body.len() >= 34 {
                body.advance(1);
                let (write, flush, apply) = (body.get_u64(), body.get_u64(), body.get_u64());
                body.advance(8);
                found.push(Status {
                    write,
                    flush,
                    apply,
                    reply_requested: body.get_u8() != 0,
                });
            }
        }
        found
    }

    /// The next whole message; the start-up packet has no tag and gets 0.
    fn message(&mut self) -> Option<(u8, BytesMut)> {
        let tag_len = usize::from(self.started);
        let length = self.buffer.get(tag_len..tag_len + 4)?;
        let length = u32::from_be_bytes(length.try_into().ok()?) as usize;
        if self.buffer.len() < tag_len + length {
            return None;
        }
        let mut message = self.buffer.split_to(tag_len + length);
        let tag = if self.started { message.get_u8() } else { 0 };
        message.advance(4);
        if !self.started {
            let code = message
                .get(..4)
                .map_or(0, |code| u32::from_be_bytes([code[0], code[1], code[2], code[3]]));
            let asks = matches!(code, SSL_REQUEST | GSS_REQUEST);
            self.conversation.encryption_asked.store(asks, Ordering::SeqCst);
            self.started = !asks;
        }
        Some((tag, message))
    }
}

/// Of a command that begins a stream.
fn timeline_of(command: &[u8]) -> Option<u32> {
    let command = std::str::from_utf8(command).ok()?.trim_end_matches('\0');
    let mut words = command.split_ascii_whitespace();
    words
        .next()?
        .eq_ignore_ascii_case("START_REPLICATION")
        .then_some(())?;
    words.find(|word| word.eq_ignore_ascii_case("TIMELINE"))?;
    words.next()?.trim_end_matches(';').parse().ok()
}

/// Reads what the server sends, without keeping more than the head of a message.
#[derive(Debug)]
pub(super) struct Backend {
    head: Vec<u8>,
    left: usize,
    /// Where the WAL bytes that follow begin, while inside a WAL message.
    wal: Option<u64>,
    conversation: Conversation,
}

/// Tag, length, `w`, start, end and time.
const WAL_HEAD: usize = 1 + 4 + 1 + 24;

impl Backend {
    pub(super) fn new(conversation: Conversation) -> Self {
        Self {
            head: Vec::new(),
            left: 0,
            wal: None,
            conversation,
        }
    }

    pub(super) fn feed(&mut self, bytes: &Bytes, log: &mut Log) {
        let mut rest = bytes.clone();
        if self.conversation.encryption_asked.swap(false, Ordering::SeqCst) && !rest.is_empty() {
            self.conversation
                .encryption_granted
                .store(rest.get_u8() != b'N', Ordering::SeqCst);
        }
        if self.conversation.encryption_granted.load(Ordering::SeqCst) {
            return;
        }
        while !rest.is_empty() {
            if self.left > 0 {
                let taken = rest.split_to(self.left.min(rest.len()));
                self.left -= taken.len();
                self.body(taken, log);
            } else {
                self.head.push(rest.get_u8());
                self.head_grown(log);
            }
        }
    }

    fn body(&mut self, data: Bytes, log: &mut Log) {
        let Some(start) = self.wal else { return };
        let end = start + data.len() as u64;
        log.sent.wal_bytes += data.len() as u64;
        log.sent.wal_end = end;
        if let Some(recorded) = log.recorded.as_mut() {
            let timeline = self.conversation.timeline.load(Ordering::SeqCst);
            let known = recorded.entry((timeline, start)).or_default();
            // A connection that broke may have brought less of it.
            if !known.starts_with(&data) {
                *known = data;
            }
        }
        self.wal = (self.left > 0).then_some(end);
    }

    /// Decides, as soon as enough of the head is there, what the rest of the message is.
    fn head_grown(&mut self, log: &mut Log) {
        if self.head.len() < 5 {
            return;
        }
        let length = u32::from_be_bytes([self.head[1], self.head[2], self.head[3], self.head[4]]) as usize;
        let whole = 1 + length;
        let copy_data = self.head[0] == b'd' && whole > 5;
        if copy_data && self.head.len() == 5 {
            return;
        }
        if copy_data && self.head[5] == b'w' && whole >= WAL_HEAD {
            if self.head.len() < WAL_HEAD {
                return;
            }
            let start = self.head[6..14].try_into().map_or(0, u64::from_be_bytes);
            log.sent.wal_messages += 1;
            self.wal = Some(start);
        } else if copy_data && self.head[5] == b'k' {
            log.sent.keepalives += 1;
        }
        self.left = whole.saturating_sub(self.head.len());
        if self.left == 0 {
            self.wal = None;
        }
        self.head.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy_data(payload: &[u8]) -> Vec<u8> {
        let mut message = vec![b'd'];
        message.extend(u32::try_from(payload.len() + 4).unwrap().to_be_bytes());
        message.extend(payload);
        message
    }

    fn status(flush: u64) -> Vec<u8> {
        let mut payload = vec![b'r'];
        for word in [flush + 1, flush, flush, 99] {
            payload.extend(word.to_be_bytes());
        }
        payload.push(1);
        copy_data(&payload)
    }

    /// SSL request, start-up packet, a query, and two status messages.
    fn conversation() -> Vec<u8> {
        let mut bytes = vec![0, 0, 0, 8];
        bytes.extend(SSL_REQUEST.to_be_bytes());
        bytes.extend([0, 0, 0, 12, 0, 3, 0, 0, b'u', 0, b'x', 0]);
        bytes.extend([b'Q', 0, 0, 0, 6, b'r', 0]);
        bytes.extend(status(7));
        bytes.extend(status(9));
        bytes
    }

    #[test]
    fn status_messages_are_found_however_the_stream_is_cut() {
        let whole = conversation();
        for cut in 1..whole.len() {
            let mut frontend = Frontend::new(Conversation::default());
            let mut found = Vec::new();
            for chunk in whole.chunks(cut) {
                found.extend(frontend.feed(&Bytes::copy_from_slice(chunk)));
            }
            let flushes: Vec<u64> = found.iter().map(|status| status.flush).collect();
            assert_eq!(flushes, [7, 9], "cut at every {cut} bytes");
        }
    }

    fn wal(start: u64, data: &[u8]) -> Vec<u8> {
        let mut payload = vec![b'w'];
        for word in [start, 500, 0] {
            payload.extend(word.to_be_bytes());
        }
        payload.extend(data);
        copy_data(&payload)
    }

    #[test]
    fn wal_is_counted_and_recorded_however_the_stream_is_cut() {
        let mut keepalive = vec![b'k'];
        keepalive.extend([0; 17]);
        let ready = vec![b'Z', 0, 0, 0, 5, b'I'];
        let whole = [
            ready,
            wal(100, b"01234"),
            copy_data(&keepalive),
            wal(105, b"56789"),
        ]
        .concat();
        for cut in 1..whole.len() {
            let mut backend = Backend::new(Conversation::default());
            let mut log = Log {
                recorded: Some(std::collections::BTreeMap::new()),
                ..Log::default()
            };
            for chunk in whole.chunks(cut) {
                backend.feed(&Bytes::copy_from_slice(chunk), &mut log);
            }
            assert_eq!(
                (log.sent.wal_bytes, log.sent.wal_messages, log.sent.keepalives),
                (10, 2, 1)
            );
            assert_eq!(log.sent.wal_end, 110);
            let recorded: Vec<u8> = log.recorded.unwrap().into_values().flatten().collect();
            assert_eq!(recorded, b"0123456789");
        }
    }

    #[test]
    fn wal_is_kept_by_the_timeline_that_was_asked_for() {
        let conversation = Conversation::default();
        let mut frontend = Frontend::new(conversation.clone());
        let mut backend = Backend::new(conversation);
        let mut log = Log {
            recorded: Some(std::collections::BTreeMap::new()),
            ..Log::default()
        };
        let mut bytes = vec![0, 0, 0, 12, 0, 3, 0, 0, b'u', 0, b'x', 0];
        for (timeline, sent) in [(3, &b"0123"[..]), (12, b"abcd"), (12, b"ab")] {
            let command = format!("START_REPLICATION SLOT \"s\" PHYSICAL 0/64 TIMELINE {timeline}\0");
            bytes.push(b'Q');
            bytes.extend(u32::try_from(command.len() + 4).unwrap().to_be_bytes());
            bytes.extend(command.as_bytes());
            frontend.feed(&Bytes::from(std::mem::take(&mut bytes)));
            backend.feed(&Bytes::from(wal(100, sent)), &mut log);
        }
        let recorded: Vec<_> = log.recorded.unwrap().into_iter().collect();
        let expected = [((3, 100), &b"0123"[..]), ((12, 100), b"abcd")];
        assert_eq!(recorded.len(), 2);
        for ((key, bytes), (expected, sent)) in recorded.iter().zip(expected) {
            assert_eq!((*key, &bytes[..]), (expected, sent));
        }
    }
}
