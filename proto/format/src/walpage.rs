//! The fixed layouts inside PostgreSQL's WAL: page headers and record headers.
//!
//! Owns: which bytes mean what, per major version where they differ. Does not own: reading a stream (`walscan`).
//! All integers are little-endian; big-endian servers are not supported.
//!
//! Page header, `XLogPageHeaderData` in PostgreSQL's `access/xlog_internal.h`:
//!
//! | offset | size | field | |
//! |---|---|---|---|
//! | 0 | 2 | `xlp_magic` | one value per major version, see [`page_magic`] |
//! | 2 | 2 | `xlp_info` | bit 0: starts inside a record, bit 1: long header, bit 2: replaces a missing continuation |
//! | 4 | 4 | `xlp_tli` | timeline of the first record on the page |
//! | 8 | 8 | `xlp_pageaddr` | LSN of the page |
//! | 16 | 4 | `xlp_rem_len` | bytes still to come of the record that the page starts inside of |
//! | 20 | 4 | padding | |
//! | 24 | 8 | `xlp_sysid` | long header only, as are the next two |
//! | 32 | 4 | `xlp_seg_size` | |
//! | 36 | 4 | `xlp_xlog_blcksz` | |
//!
//! Record header, `XLogRecord` in `access/xlogrecord.h`; records begin at multiples of 8:
//!
//! | offset | size | field | |
//! |---|---|---|---|
//! | 0 | 4 | `xl_tot_len` | whole record with this header |
//! | 4 | 4 | `xl_xid` | |
//! | 8 | 8 | `xl_prev` | LSN of the record before |
//! | 16 | 1 | `xl_info` | |
//! | 17 | 1 | `xl_rmid` | resource manager |
//! | 18 | 2 | padding | |
//! | 20 | 4 | `xl_crc` | CRC-32C of the bytes after this header, then of bytes 0 to 19 |

use crate::lsn::Lsn;

/// Length of the header of most pages.
pub const SHORT_HEADER: usize = 24;
/// Length of the header of a segment's first page.
pub const LONG_HEADER: usize = 40;
/// Length of a record's header.
pub const RECORD_HEADER: usize = 24;
/// The same, as records count their length.
pub const RECORD_HEADER_LEN: u32 = 24;
/// How much of a record's header its CRC covers.
pub const RECORD_HEADER_IN_CRC: usize = 20;
/// `XLOG_BLCKSZ` of every packaged PostgreSQL.
pub const DEFAULT_PAGE_SIZE: u32 = 8192;
/// The longest record: PostgreSQL cannot allocate more for one (`MaxAllocSize`, `utils/memutils.h`).
pub const MAX_RECORD: u32 = 0x3fff_ffff;

/// Oldest and newest major version whose pages are understood, with `XLOG_PAGE_MAGIC` of each.
const MAGICS: [(u32, u16); 6] = [
    (13, 0xD106),
    (14, 0xD10D),
    (15, 0xD110),
    (16, 0xD113),
    (17, 0xD116),
    (18, 0xD118),
];

/// What every page of this major version starts with.
#[must_use]
pub fn page_magic(major: u32) -> Option<u16> {
    MAGICS
        .iter()
        .find(|(known, _)| *known == major)
        .map(|(_, magic)| *magic)
}

/// The major version whose pages start with this.
#[must_use]
pub fn major_of_magic(magic: u16) -> Option<u32> {
    MAGICS
        .iter()
        .find(|(_, known)| *known == magic)
        .map(|(major, _)| *major)
}

/// The page starts inside a record that began on an earlier one.
pub const FIRST_IS_CONTRECORD: u16 = 0x0001;
/// The page has the long header.
pub const HAS_LONG_HEADER: u16 = 0x0002;
/// No base backup was running: on most pages, and of no consequence for reading them.
pub const BACKUP_BLOCKS_REMOVABLE: u16 = 0x0004;
/// The continuation that belongs here was lost in a crash; a new record begins instead.
pub const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
/// Every bit of `xlp_info` that means something (`XLP_ALL_FLAGS` in PostgreSQL's `xlog_internal.h`).
pub const ALL_FLAGS: u16 = 0x000F;

/// What only a segment's first page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongHeader {
    /// System identifier of the cluster that wrote the page.
    pub system_id: u64,
    /// Bytes per segment.
    pub segment_size: u32,
    /// Bytes per page.
    pub page_size: u32,
}

/// A page header as it stands there, unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// `xlp_magic`.
    pub magic: u16,
    /// `xlp_info`.
    pub info: u16,
    /// `xlp_tli`.
    pub timeline: u32,
    /// `xlp_pageaddr`.
    pub address: Lsn,
    /// `xlp_rem_len`.
    pub remaining: u32,
    /// The rest, where `info` says that the header is long.
    pub long: Option<LongHeader>,
}

impl PageHeader {
    /// How many bytes the header has that begins with these; `None` while they are too few to tell.
    #[must_use]
    pub fn length(bytes: &[u8]) -> Option<usize> {
        let info = u16::from_le_bytes(*bytes.get(2..)?.first_chunk()?);
        Some(if info & HAS_LONG_HEADER == 0 {
            SHORT_HEADER
        } else {
            LONG_HEADER
        })
    }

    /// Reads a header; `None` when there are too few bytes.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let short: &[u8; SHORT_HEADER] = bytes.first_chunk()?;
        let info = u16_at(short, 2);
        let long = if info & HAS_LONG_HEADER == 0 {
            None
        } else {
            let long: &[u8; LONG_HEADER] = bytes.first_chunk()?;
            Some(LongHeader {
                system_id: u64_at(long, 24),
                segment_size: u32_at(long, 32),
                page_size: u32_at(long, 36),
            })
        };
        Some(Self {
            magic: u16_at(short, 0),
            info,
            timeline: u32_at(short, 4),
            address: Lsn(u64_at(short, 8)),
            remaining: u32_at(short, 16),
            long,
        })
    }

    /// Whether a flag of `xlp_info` is set.
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.info & flag != 0
    }
}

/// A record header as it stands there, unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// `xl_tot_len`.
    pub total_len: u32,
    /// `xl_xid`.
    pub xid: u32,
    /// `xl_prev`.
    pub previous: Lsn,
    /// `xl_info`.
    pub info: u8,
    /// `xl_rmid`.
    pub resource_manager: u8,
    /// `xl_crc`.
    pub crc: u32,
}

impl RecordHeader {
    /// Reads a header.
    #[inline]
    #[must_use]
    pub fn read(bytes: &[u8; RECORD_HEADER]) -> Self {
        Self {
            total_len: u32_at(bytes, 0),
            xid: u32_at(bytes, 4),
            previous: Lsn(u64_at(bytes, 8)),
            info: bytes[16],
            resource_manager: bytes[17],
            crc: u32_at(bytes, 20),
        }
    }
}

/// Reads fields of a header whose length is known when this is compiled, so that no bounds check is left.
#[inline]
fn u16_at<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline]
fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_header_of_postgresql_15_reads_as_pg_waldump_sees_it() {
        let mut bytes = [0_u8; LONG_HEADER];
        bytes[..8].copy_from_slice(&[0x10, 0xD1, 0x0F, 0, 2, 0, 0, 0]);
        bytes[8..16].copy_from_slice(&0x1_0300_0000_u64.to_le_bytes());
        bytes[16..20].copy_from_slice(&77_u32.to_le_bytes());
        bytes[24..32].copy_from_slice(&7_560_000_000_000_000_001_u64.to_le_bytes());
        bytes[32..36].copy_from_slice(&(16_u32 << 20).to_le_bytes());
        bytes[36..40].copy_from_slice(&8192_u32.to_le_bytes());

        assert_eq!(PageHeader::length(&bytes[..3]), None);
        assert_eq!(PageHeader::length(&bytes[..4]), Some(LONG_HEADER));
        assert_eq!(PageHeader::read(&bytes[..39]), None);
        let header = PageHeader::read(&bytes).unwrap();
        assert_eq!(major_of_magic(header.magic), Some(15));
        assert_eq!((header.timeline, header.remaining), (2, 77));
        assert_eq!(header.address, Lsn(0x1_0300_0000));
        assert!(header.has(FIRST_IS_CONTRECORD) && header.has(FIRST_IS_OVERWRITE_CONTRECORD));
        let long = header.long.unwrap();
        assert_eq!(long.system_id, 7_560_000_000_000_000_001);
        assert_eq!((long.segment_size, long.page_size), (16 << 20, 8192));
    }

    #[test]
    fn magics_and_majors_agree() {
        for major in 13..=18 {
            assert_eq!(page_magic(major).and_then(major_of_magic), Some(major));
        }
        assert_eq!((page_magic(12), page_magic(19)), (None, None));
        assert_eq!(major_of_magic(0), None);
    }
}
