//! The few records whose content matters, and what they say.
//!
//! Owns: which records are of interest, the layout of their main data, and the small buffer it is gathered in.
//! Does not own: whether the bytes are whole; the scanner asks for the event only after the CRC was right.
//!
//! A record's body is a list of headers (block references, replication origin, top-level transaction, main data)
//! and then the data. No record of interest refers to blocks, so its main data follow the headers directly; a
//! record that does refer to blocks, or whose body is too short, gives no event.

use crate::lsn::Lsn;
use crate::time::Time;
use crate::timeline::TimelineId;
use crate::walpage::RecordHeader;

use super::WalEvent;

/// Enough for the longest fixed part (a checkpoint, a restore point) behind 13 bytes of headers.
const HEAD: usize = 128;

/// Resource managers, `access/rmgrlist.h`.
const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;

/// The half of `xl_info` that belongs to the resource manager; transactions use its top bit as a flag.
const INFO_OPERATION: u8 = 0xF0;
const XACT_OPERATION: u8 = 0x70;
const XACT_HAS_INFO: u8 = 0x80;

/// Ids of headers without a block, `access/xlogrecord.h`.
const ID_MAIN_SHORT: u8 = 255;
const ID_MAIN_LONG: u8 = 254;
const ID_ORIGIN: u8 = 253;
const ID_TOP_LEVEL_XID: u8 = 252;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Transaction { abort: bool, prepared: bool },
    Switch,
    Checkpoint { shutdown: bool },
    ParameterChange,
    RestorePoint,
    EndOfRecovery,
}

/// Whether this is the record after which the rest of the segment is not used.
#[inline]
pub(super) fn is_switch(header: &RecordHeader) -> bool {
    header.resource_manager == RM_XLOG && header.info & INFO_OPERATION == 0x40
}

/// Whether the record is of one of the two resource managers; most of theirs are of no interest after all.
#[inline]
pub(super) fn may_interest(header: &RecordHeader) -> bool {
    header.resource_manager <= RM_XACT
}

fn sort_of(header: &RecordHeader) -> Option<Sort> {
    match (header.resource_manager, header.info & INFO_OPERATION) {
        (RM_XLOG, 0x00) => Some(Sort::Checkpoint { shutdown: true }),
        (RM_XLOG, 0x10) => Some(Sort::Checkpoint { shutdown: false }),
        (RM_XLOG, 0x40) => Some(Sort::Switch),
        (RM_XLOG, 0x60) => Some(Sort::ParameterChange),
        (RM_XLOG, 0x70) => Some(Sort::RestorePoint),
        (RM_XLOG, 0x90) => Some(Sort::EndOfRecovery),
        (RM_XACT, info) => match info & XACT_OPERATION {
            0x00 => Some(Sort::Transaction {
                abort: false,
                prepared: false,
            }),
            0x20 => Some(Sort::Transaction {
                abort: true,
                prepared: false,
            }),
            0x30 => Some(Sort::Transaction {
                abort: false,
                prepared: true,
            }),
            0x40 => Some(Sort::Transaction {
                abort: true,
                prepared: true,
            }),
            _ => None,
        },
        _ => None,
    }
}

/// What the header says of a record of interest.
#[derive(Debug, Clone, Copy)]
struct Subject {
    sort: Sort,
    xid: u32,
    has_info: bool,
    /// Bytes per item in the list of dropped statistics: 16 from version 18 on, where their ids grew.
    stats_item: u32,
}

impl Subject {
    /// Decides by the header alone. `None` for almost every record.
    fn new(header: &RecordHeader, major: u32) -> Option<Self> {
        Some(Self {
            sort: sort_of(header)?,
            xid: header.xid,
            has_info: header.info & XACT_HAS_INFO != 0,
            stats_item: if major >= 18 { 16 } else { 12 },
        })
    }

    /// Starts to look for the transaction id of a prepared transaction, in the beginning of the body.
    fn walk(&self, head: &[u8]) -> Option<PreparedXid> {
        if !self.has_info || !matches!(self.sort, Sort::Transaction { prepared: true, .. }) {
            return None;
        }
        let (at, main) = main_data(head)?;
        let flags = u32::from_le_bytes(*main.get(8..)?.first_chunk()?);
        let mut walk = PreparedXid::new(flags, at + 12, self.stats_item)?;
        walk.take(head);
        Some(walk)
    }

    /// What the record said, from the beginning of its body.
    fn event(&self, head: &[u8], prepared_xid: Option<u32>, end: Lsn) -> Option<WalEvent> {
        if self.sort == Sort::Switch {
            return Some(WalEvent::Switch { end });
        }
        let (_, main) = main_data(head)?;
        match self.sort {
            Sort::Transaction { abort, prepared } => {
                let xid = if prepared {
                    prepared_xid.unwrap_or(0)
                } else {
                    self.xid
                };
                Some(WalEvent::Commit {
                    end,
                    time: time_at(main, 0)?,
                    xid,
                    abort,
                })
            }
            Sort::Switch => None,
            Sort::Checkpoint { shutdown } => checkpoint(main, end, shutdown),
            Sort::ParameterChange => parameter_change(main, end),
            Sort::RestorePoint => restore_point(main, end),
            Sort::EndOfRecovery => Some(WalEvent::EndOfRecovery {
                end,
                time: time_at(main, 0)?,
                timeline: timeline_at(main, 8)?,
                previous: timeline_at(main, 12)?,
            }),
        }
    }
}

/// What a record said of which the whole body is at hand.
pub(super) fn event_of(header: &RecordHeader, major: u32, body: &[u8], end: Lsn) -> Option<WalEvent> {
    let subject = Subject::new(header, major)?;
    subject.event(body, subject.walk(body).and_then(|walk| walk.found), end)
}

/// A record of interest while its body arrives.
#[derive(Debug, Clone)]
pub(super) struct Interest {
    subject: Subject,
    head: [u8; HEAD],
    filled: usize,
    /// For prepared transactions, from when the head is complete.
    walk: Option<PreparedXid>,
}

impl Interest {
    /// Begins to gather, if the record is of interest.
    pub(super) fn new(header: &RecordHeader, major: u32) -> Option<Self> {
        Some(Self {
            subject: Subject::new(header, major)?,
            head: [0; HEAD],
            filled: 0,
            walk: None,
        })
    }

    /// Takes the next bytes of the body.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        let into_head = bytes.len().min(HEAD - self.filled);
        let (head, rest) = bytes.split_at(into_head);
        self.head[self.filled..self.filled + into_head].copy_from_slice(head);
        self.filled += into_head;
        if rest.is_empty() {
            return;
        }
        if self.walk.is_none() {
            self.walk = self.subject.walk(&self.head);
        }
        if let Some(walk) = &mut self.walk {
            walk.take(rest);
        }
    }

    /// What the whole record said.
    pub(super) fn event(&self, end: Lsn) -> Option<WalEvent> {
        let head = &self.head[..self.filled];
        let walk = self.walk.or_else(|| self.subject.walk(head));
        self.subject.event(head, walk.and_then(|walk| walk.found), end)
    }
}

/// Finds the main data behind the headers: where they begin in the body, and as many as are at hand.
fn main_data(body: &[u8]) -> Option<(usize, &[u8])> {
    let mut at = 0;
    loop {
        at += match *body.get(at)? {
            ID_MAIN_SHORT => return Some((at + 2, body.get(at + 2..)?)),
            ID_MAIN_LONG => return Some((at + 5, body.get(at + 5..)?)),
            ID_ORIGIN => 3,
            ID_TOP_LEVEL_XID => 5,
            _ => return None,
        };
    }
}

/// `CheckPoint`, `catalog/pg_control.h`. Version 17 put `wal_level` into what was padding; nothing else moved.
fn checkpoint(main: &[u8], end: Lsn, shutdown: bool) -> Option<WalEvent> {
    let redo = Lsn(u64::from_le_bytes(*main.first_chunk()?));
    let seconds = i64::from_le_bytes(*main.get(64..)?.first_chunk()?);
    let time = Time::from_unix_micros(seconds.saturating_mul(1_000_000));
    Some(WalEvent::Checkpoint {
        end,
        redo,
        timeline: timeline_at(main, 8)?,
        time,
        shutdown,
    })
}

/// `xl_parameter_change`, `access/xlog_internal.h`: six ints, two bools.
fn parameter_change(main: &[u8], end: Lsn) -> Option<WalEvent> {
    Some(WalEvent::ParameterChange {
        end,
        max_connections: int_at(main, 0)?,
        max_worker_processes: int_at(main, 4)?,
        max_wal_senders: int_at(main, 8)?,
        max_prepared_xacts: int_at(main, 12)?,
        max_locks_per_xact: int_at(main, 16)?,
        wal_level: int_at(main, 20)?,
    })
}

/// `xl_restore_point`, `access/xlog_internal.h`: time, then the name in 64 bytes that end in zeros.
fn restore_point(main: &[u8], end: Lsn) -> Option<WalEvent> {
    let field: &[u8; 64] = main.get(8..)?.first_chunk()?;
    let name = field.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(WalEvent::RestorePoint {
        end,
        name: String::from_utf8_lossy(name).into_owned(),
        time: time_at(main, 0)?,
    })
}

fn time_at(main: &[u8], at: usize) -> Option<Time> {
    Some(Time::from_pg(i64::from_le_bytes(*main.get(at..)?.first_chunk()?)))
}

fn int_at(main: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_le_bytes(*main.get(at..)?.first_chunk()?))
}

fn timeline_at(main: &[u8], at: usize) -> Option<TimelineId> {
    TimelineId::new(u32::from_le_bytes(*main.get(at..)?.first_chunk()?))
}

/// Looks for the transaction id that `COMMIT PREPARED` and `ROLLBACK PREPARED` finish.
///
/// It stands behind lists of any length, so the lists are stepped over as they arrive: each is a count of four
/// bytes and that many items, present when its flag is set (`access/xact.h`, `ParseCommitRecord`).
#[derive(Debug, Clone, Copy)]
struct PreparedXid {
    /// Flags of the lists not yet stepped over.
    flags: u32,
    stats_item: u32,
    /// Bytes of the body still to pass before the next word.
    skip: u64,
    word: [u8; 4],
    word_filled: usize,
    found: Option<u32>,
}

const HAS_DBINFO: u32 = 1 << 0;
const HAS_SUBXACTS: u32 = 1 << 1;
const HAS_RELATIONS: u32 = 1 << 2;
const HAS_INVALIDATIONS: u32 = 1 << 3;
const HAS_TWO_PHASE: u32 = 1 << 4;
const HAS_DROPPED_STATS: u32 = 1 << 8;

impl PreparedXid {
    /// `at`: where the lists begin in the body.
    fn new(flags: u32, at: usize, stats_item: u32) -> Option<Self> {
        let database = if flags & HAS_DBINFO == 0 { 0 } else { 8 };
        let skip = u64::try_from(at).ok()? + database;
        Some(Self {
            flags,
            stats_item,
            skip,
            word: [0; 4],
            word_filled: 0,
            found: None,
        })
    }

    fn take(&mut self, mut bytes: &[u8]) {
        while self.found.is_none() && self.flags & HAS_TWO_PHASE != 0 {
            // A skip that does not fit into memory passes everything there is.
            let passed = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= u64::try_from(passed).unwrap_or(self.skip);
            bytes = &bytes[passed..];
            if bytes.is_empty() {
                return;
            }
            let (now, later) = bytes.split_at(bytes.len().min(4 - self.word_filled));
            self.word[self.word_filled..self.word_filled + now.len()].copy_from_slice(now);
            self.word_filled += now.len();
            bytes = later;
            if self.word_filled == 4 {
                self.word_filled = 0;
                self.next_word(u32::from_le_bytes(self.word));
            }
        }
    }

    /// A count steps over its list; without a list left, the word is the id.
    fn next_word(&mut self, word: u32) {
        let lists = [
            (HAS_SUBXACTS, 4),
            (HAS_RELATIONS, 12),
            (HAS_DROPPED_STATS, self.stats_item),
            (HAS_INVALIDATIONS, 16),
        ];
        match lists.into_iter().find(|(flag, _)| self.flags & flag != 0) {
            Some((flag, item)) => {
                self.flags &= !flag;
                self.skip = u64::from(word) * u64::from(item);
            }
            None => self.found = Some(word),
        }
    }
}
