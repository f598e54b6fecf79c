//! Whether the point that was reached is the one that was asked for. Pure.
//!
//! Owns: the comparison. The end of recovery is taken from the history file that PostgreSQL writes for the new
//! timeline (it names the exact position), and compared with the end that was found in the archive when the restore was
//! planned. Two positions are the same if no record fits between them: PostgreSQL counts the padding behind a record
//! and a page's header now to the one, now to the other.

use highwater_format::{History, Lsn, SegmentSize, TimelineId};

use super::serverlog::StoppedAt;
use crate::target::Target;

/// `XLOG_BLCKSZ` unless PostgreSQL was built otherwise.
const PAGE: u64 = 8192;
/// `SizeOfXLogShortPHD` in `access/xlog_internal.h`.
const SHORT_HEADER: u64 = 24;
/// `SizeOfXLogLongPHD`: on the first page of a segment.
const LONG_HEADER: u64 = 40;
/// `MAXALIGN`.
const ALIGN: u64 = 8;

/// Where the next record would begin.
fn next_record(lsn: Lsn, size: SegmentSize) -> Lsn {
    let aligned = lsn.0.div_ceil(ALIGN).saturating_mul(ALIGN);
    let header = if aligned.is_multiple_of(size.bytes()) {
        LONG_HEADER
    } else {
        SHORT_HEADER
    };
    Lsn(if aligned.is_multiple_of(PAGE) {
        aligned.saturating_add(header)
    } else {
        aligned
    })
}

/// Compares the end of recovery with the planned one.
///
/// # Errors
/// What differs.
pub fn check(asked: &Target, planned: Lsn, reached: Lsn, size: SegmentSize) -> Result<(), String> {
    let (at, wanted) = (next_record(reached, size), next_record(planned, size));
    match asked {
        // The archive may have grown since, and consistency may be reached with the record after the backup's end.
        Target::Latest | Target::Immediate if at >= wanted => Ok(()),
        _ if at == wanted => Ok(()),
        _ if at < wanted => Err(format!(
            "recovery ended at {reached}, before {planned}, which was asked for ({asked})"
        )),
        _ => Err(format!(
            "recovery ended at {reached}, past {planned}, which was asked for ({asked})"
        )),
    }
}

/// The same for a server that stays at its target, by the record at which it stopped: one that it replayed begins before the
/// planned end, and PostgreSQL takes none that begins before the target.
///
/// # Errors
/// What differs.
pub fn stopped(asked: &Target, planned: Lsn, at: StoppedAt, size: SegmentSize) -> Result<(), String> {
    match at {
        StoppedAt::After(record) if record < planned => Ok(()),
        StoppedAt::After(record) => Err(format!(
            "recovery stopped behind the record at {record}, past {planned}, which was asked for ({asked})"
        )),
        StoppedAt::Before(record) => check(asked, planned, record, size),
    }
}

/// Where the timeline `child` left its parent, and which that was: the last line of its history.
#[must_use]
pub fn end_of_recovery(child: TimelineId, history: &[u8]) -> Option<(TimelineId, Lsn)> {
    let history = History::parse(child, history).ok()?;
    history.parent().map(|entry| (entry.timeline, entry.switch))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn reached(asked: &Target, planned: u64, reached: u64) -> bool {
        check(asked, Lsn(planned), Lsn(reached), SIZE).is_ok()
    }

    #[test]
    fn padding_and_page_headers_are_no_difference() {
        for (planned, at) in [
            (0x300_0101, 0x300_0108),
            (0x300_2000, 0x300_2018),
            (0x400_0000, 0x400_0028),
        ] {
            assert!(reached(&Target::Lsn(Lsn(1)), planned, at) && reached(&Target::Lsn(Lsn(1)), at, planned));
        }
    }

    #[test]
    fn invariant_11_less_or_more_than_asked_is_never_success() {
        let target = Target::Lsn(Lsn(1));
        assert!(
            !reached(&target, 0x300_0100, 0x300_00e8),
            "one small record is missing"
        );
        assert!(
            !reached(&target, 0x300_0100, 0x300_0118),
            "one small record too many"
        );
        assert!(!reached(&Target::Latest, 0x300_0100, 0x300_00e8));
        assert!(
            reached(&Target::Latest, 0x300_0100, 0x900_0000),
            "the archive has grown"
        );
    }

    #[test]
    fn invariant_11_a_server_that_stays_at_its_target_stopped_at_the_planned_record() {
        let stopped = |at| stopped(&Target::Lsn(Lsn(1)), Lsn(0x300_0100), at, SIZE).is_ok();
        assert!(stopped(StoppedAt::After(Lsn(0x300_00c0))));
        assert!(!stopped(StoppedAt::After(Lsn(0x300_0100))), "one more");
        assert!(stopped(StoppedAt::Before(Lsn(0x300_0100))));
        assert!(!stopped(StoppedAt::Before(Lsn(0x300_0118))), "one more");
        assert!(!stopped(StoppedAt::Before(Lsn(0x300_00c0))), "one less");
    }

    #[test]
    fn the_end_is_read_from_the_new_timelines_history() {
        let history = b"1\t0/5000060\tafter LSN 0/5000028\n";
        let child = TimelineId::new(2).unwrap();
        assert_eq!(
            end_of_recovery(child, history),
            Some((TimelineId::FIRST, Lsn(0x500_0060)))
        );
    }
}
