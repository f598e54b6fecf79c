//! Page headers: gathering them, checking them, and what they mean for the record that runs across.

use crate::lsn::Lsn;
use crate::timeline::TimelineId;
use crate::walpage::{
    ALL_FLAGS, FIRST_IS_CONTRECORD, FIRST_IS_OVERWRITE_CONTRECORD, HAS_LONG_HEADER, LongHeader, SHORT_HEADER,
};

use super::{Damage, PageHeader, State, WalDamage, WalScanner, check_length, major_of_magic};

impl WalScanner {
    /// Takes bytes of a page header and acts on it once it is whole.
    pub(super) fn read_page_header(&mut self, data: &[u8]) -> Result<usize, WalDamage> {
        let filled = self.page_header_filled;
        let length = PageHeader::length(&self.page_header[..filled]).unwrap_or(SHORT_HEADER);
        let used = data.len().min(length - filled);
        self.page_header[filled..filled + used].copy_from_slice(&data[..used]);
        self.page_header_filled += used;
        self.advance(used);
        // The length becomes known on the way, so a long header takes a second round.
        let gathered = &self.page_header[..self.page_header_filled];
        if PageHeader::length(gathered) == Some(gathered.len()) {
            if let Some(header) = PageHeader::read(gathered) {
                let address = self.position - gathered.len() as u64;
                self.begin_page(address, &header)?;
            }
            self.page_header_filled = 0;
            self.page_left = self.left_on_page();
        }
        Ok(used)
    }

    fn begin_page(&mut self, address: Lsn, header: &PageHeader) -> Result<(), WalDamage> {
        if header.magic == 0 && header.address == Lsn::ZERO && header.info == 0 {
            return Err(Damage::Zeros.at(address));
        }
        self.check_identity(address, header)
            .map_err(|damage| damage.at(address))?;
        self.continue_record(address, header)?;
        self.first_page = false;
        Ok(())
    }

    /// Is this the page that belongs here?
    fn check_identity(&mut self, address: Lsn, header: &PageHeader) -> Result<(), Damage> {
        let found = header.magic;
        let major = major_of_magic(found).ok_or(Damage::UnknownMagic { found })?;
        if let Some(expected) = self.major().filter(|expected| *expected != major) {
            return Err(Damage::Magic { found, expected });
        }
        let begins_segment = self.segment_size.segment_start(address) == address;
        if header.info & !ALL_FLAGS != 0 || (begins_segment && !header.has(HAS_LONG_HEADER)) {
            return Err(Damage::PageFlags { found: header.info });
        }
        if header.address != address {
            return Err(Damage::PageAddress {
                found: header.address,
            });
        }
        if let Some(long) = &header.long {
            self.check_long(long)?;
        }
        self.check_timeline(header.timeline)?;
        self.magic = Some(found);
        Ok(())
    }

    fn check_long(&self, long: &LongHeader) -> Result<(), Damage> {
        if let Some(expected) = self.system_id.filter(|expected| expected.0 != long.system_id) {
            return Err(Damage::SystemId {
                found: long.system_id,
                expected: expected.0,
            });
        }
        let expected_segment = self.segment_size.bytes();
        if u64::from(long.segment_size) != expected_segment || long.page_size != self.page_size {
            return Err(Damage::Sizes {
                segment: long.segment_size,
                page: long.page_size,
                expected_segment,
                expected_page: self.page_size,
            });
        }
        Ok(())
    }

    /// A new timeline's first segment begins with pages copied from its parent; after that, timelines only rise.
    fn check_timeline(&mut self, found: u32) -> Result<(), Damage> {
        let lowest = self.timeline.unwrap_or(TimelineId::FIRST);
        let highest = self
            .highest_timeline
            .or(TimelineId::new(u32::MAX))
            .unwrap_or(lowest);
        let timeline = TimelineId::new(found)
            .filter(|timeline| lowest <= *timeline && *timeline <= highest)
            .ok_or(Damage::PageTimeline {
                found,
                lowest,
                highest,
            })?;
        self.timeline = Some(timeline);
        Ok(())
    }

    /// Does the page go on where the one before stopped?
    fn continue_record(&mut self, address: Lsn, header: &PageHeader) -> Result<(), WalDamage> {
        let found = if header.has(FIRST_IS_CONTRECORD) {
            header.remaining
        } else {
            0
        };
        if header.has(FIRST_IS_OVERWRITE_CONTRECORD) && found == 0 {
            // The server crashed before it had written the rest of this record: it never counted.
            self.state = State::Boundary;
            return Ok(());
        }
        let expected = self.still_to_come()?;
        if self.first_page && expected == 0 {
            if found > 0 {
                self.state = State::Unseen { left: found };
            }
            return Ok(());
        }
        if found == expected {
            Ok(())
        } else {
            Err(Damage::Continuation { found, expected }.at(address))
        }
    }

    /// How many bytes of the current record belong on this page and those after it.
    fn still_to_come(&self) -> Result<u32, WalDamage> {
        match &self.state {
            State::Boundary | State::Unused { .. } => Ok(0),
            State::Unseen { left } => Ok(*left),
            State::Body(record) => Ok(record.left),
            State::Header { start, bytes, filled } => {
                // Records begin at multiples of 8, so the length, at least, stood on the page before.
                let [a, b, c, d, ..] = *bytes;
                let total = u32::from_le_bytes([a, b, c, d]);
                check_length(total).map_err(|damage| damage.at(*start))?;
                Ok(total - u32::try_from(*filled).unwrap_or(0))
            }
        }
    }
}
