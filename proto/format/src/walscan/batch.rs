//! Checks the CRCs of all records on a page with one pass.
//!
//! Most records are shorter than a hundred bytes, and starting a CRC costs more than running it over that little. So
//! the records that lie whole on a page are laid out as one message whose CRC is a constant exactly when every
//! single one is right:
//!
//! - A record's CRC covers body, then header; its last four header bytes are the CRC. Body followed by header is
//!   therefore a code word: after it the CRC register holds a constant, [`AFTER_RECORD`], whatever the record.
//! - On a page the header stands before the body. A copy of it goes behind the body, over the padding and the next
//!   record's header, which ends where the next body begins: nothing that is still needed is lost.
//! - The padding leaves 0 to 7 bytes between that copy and the next body. As zeros they turn the constant into one
//!   of eight others.
//! - The next code word must begin with the register's initial value. A CRC register is only ever combined with the
//!   message by XOR, so the difference is put into its first four bytes.
//!
//! A wrong record leaves a difference in the register which the steps after it, being one-to-one, cannot remove. The
//! check is as strong as one record at a time; what it does not tell is which record, so the scanner then goes
//! through them one by one.

use crate::lsn::Lsn;
use crate::walpage::{RECORD_HEADER, RecordHeader};

use super::interest::{event_of, is_switch, may_interest};
use super::{ALIGNMENT, WalEvent, WalScanner, padding_after};

/// Records of interest per pass. There are rarely more on a page; if so, another pass begins.
const MAX_INTERESTING: usize = 64;
/// A header's copy and the padding may reach this far beyond the page.
const OVERHANG: usize = RECORD_HEADER + ALIGNMENT as usize;

/// The CRC-32C polynomial, reflected.
const POLYNOMIAL: u32 = 0x82F6_3B78;
const INITIAL: u32 = u32::MAX;
/// The register after any record: its CRC, which is the register inverted, cancels it to all ones, and four more
/// bytes pass.
const AFTER_RECORD: u32 = zero_bytes(INITIAL, 4);
/// What must be changed in the next record's first four bytes, by the number of zeros before it.
const JOINTS: [u32; 8] = joints();

/// The register after this many zero bytes.
const fn zero_bytes(mut register: u32, count: u32) -> u32 {
    let mut bit = 0;
    while bit < count * 8 {
        register = (register >> 1) ^ (POLYNOMIAL & (register & 1).wrapping_neg());
        bit += 1;
    }
    register
}

const fn joints() -> [u32; 8] {
    let mut joints = [0; 8];
    let mut zeros = 0;
    let mut register = AFTER_RECORD;
    while zeros < joints.len() {
        joints[zeros] = register ^ INITIAL;
        register = zero_bytes(register, 1);
        zeros += 1;
    }
    joints
}

/// Room for one page and what was found on it; allocated once.
#[derive(Debug, Clone)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    interesting: [usize; MAX_INTERESTING],
    interesting_count: usize,
}

/// Where a pass over a page came to.
struct Pass {
    /// End of the last record taken.
    end: usize,
    /// Where the next record begins, beyond the slice when padding was cut off.
    next: usize,
    /// Where the last record taken begins.
    last: usize,
}

impl Batch {
    pub(super) fn new(page_size: u32) -> Self {
        let room = page_size as usize + OVERHANG;
        Self {
            bytes: vec![0; room],
            interesting: [0; MAX_INTERESTING],
            interesting_count: 0,
        }
    }

    /// Lays out the record at `at`, which is a code word afterwards.
    #[inline]
    fn lay_out(&mut self, at: usize, end: usize, next: usize, header: &[u8; RECORD_HEADER], joint: u32) {
        // The zeros first: where the padding is shorter, the header's copy goes over them.
        self.bytes[next + 16..next + RECORD_HEADER].copy_from_slice(&[0; 8]);
        self.bytes[end..end + RECORD_HEADER].copy_from_slice(header);
        // Last, because in a record with hardly a body these bytes belong to the header's copy.
        if let Some(first) = self
            .bytes
            .get_mut(at + RECORD_HEADER..)
            .and_then(<[u8]>::first_chunk_mut::<4>)
        {
            *first = (u32::from_le_bytes(*first) ^ joint).to_le_bytes();
        }
    }

    fn all_right(&self, end: usize) -> bool {
        crc32c::crc32c(&self.bytes[RECORD_HEADER..end + RECORD_HEADER]) == !AFTER_RECORD
    }
}

impl WalScanner {
    /// Takes all whole records at the beginning of `page`. 0 when there is none or one of them is wrong in any way:
    /// then they are for the way that names what is wrong.
    pub(super) fn read_batch(&mut self, page: &[u8], on: &mut impl FnMut(WalEvent)) -> usize {
        if self.position < self.one_by_one_until || page.len() > self.batch.bytes.len() - OVERHANG {
            return 0;
        }
        let Some(pass) = self.lay_out_page(page) else {
            return 0;
        };
        let used = pass.next.min(page.len());
        if !self.batch.all_right(pass.end) {
            self.one_by_one_until = self.position + used as u64;
            return 0;
        }
        let start = self.position;
        self.previous = Some(start + pass.last as u64);
        self.last_record_end = start + pass.next as u64;
        self.advance(used);
        self.report_interesting(start, page, on);
        used
    }

    /// Walks the headers and lays the records out, up to the first that is not whole, is odd, or ends the segment.
    fn lay_out_page(&mut self, page: &[u8]) -> Option<Pass> {
        let start = self.position;
        let mut previous = self.previous?;
        let (mut at, mut joint, mut taken) = (0, 0, None);
        self.batch.interesting_count = 0;
        while let Some(bytes) = page.get(at..).and_then(<[u8]>::first_chunk::<RECORD_HEADER>) {
            let header = RecordHeader::read(bytes);
            let length = header.total_len as usize;
            if length < RECORD_HEADER || length > page.len() - at || header.previous != previous {
                break;
            }
            if may_interest(&header) {
                if is_switch(&header) || self.batch.interesting_count == MAX_INTERESTING {
                    break;
                }
                self.batch.interesting[self.batch.interesting_count] = at;
                self.batch.interesting_count += 1;
            }
            if taken.is_none() {
                self.batch.bytes[..page.len()].copy_from_slice(page);
            }
            let end = at + length;
            let next = end.next_multiple_of(usize::from(ALIGNMENT));
            self.batch.lay_out(at, end, next, bytes, joint);
            joint = JOINTS[next - end];
            previous = start + at as u64;
            taken = Some(Pass { end, next, last: at });
            at = next;
        }
        taken
    }

    fn report_interesting(&mut self, start: Lsn, page: &[u8], on: &mut impl FnMut(WalEvent)) {
        for &at in &self.batch.interesting[..self.batch.interesting_count] {
            let Some(bytes) = page.get(at..).and_then(<[u8]>::first_chunk::<RECORD_HEADER>) else {
                continue;
            };
            let header = RecordHeader::read(bytes);
            let length = header.total_len as usize;
            let body = page.get(at + RECORD_HEADER..at + length).unwrap_or_default();
            let end = start + (at + length) as u64;
            if let Some(event) = event_of(&header, self.layout(), body, end + padding_after(end) as u64) {
                on(event);
            }
        }
    }
}
