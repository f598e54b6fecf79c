//! What a server's words about itself are worth for the stream's timeline. Pure.

use highwater_format::{Lsn, Time, TimelineId};

use crate::resume::ServerView;
use crate::sealer::Stamp;

/// What a server's clock proves of the stream's timeline: nothing if it is a standby, or has left that timeline.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words {
    /// The server was in recovery when the stream began.
    pub(super) standby: bool,
    /// Where its WAL ended when the stream began, if the stream is of a timeline before its own.
    pub(super) left_behind: Option<Lsn>,
}

impl Words {
    /// For a stream of `timeline` from a server that was just looked at.
    pub(super) fn of(view: &ServerView, timeline: TimelineId) -> Self {
        Self {
            standby: view.in_recovery,
            left_behind: (view.timeline != timeline).then_some(view.end),
        }
    }

    /// A standby's end of WAL is what it has received: its clock proves nothing about what the primary has committed by
    /// then. On a timeline that the server has left it names the end of that one, and commits went on elsewhere. So
    /// that end is put where no reader can reach it.
    pub(super) fn stamp(self, time: Time, server_end: Lsn) -> Stamp {
        let proves = !self.standby && self.left_behind.is_none();
        let end = if proves { server_end } else { Lsn::MAX };
        Stamp { time, end }
    }

    /// The server's own end of WAL, where it names that of the streamed timeline.
    pub(super) fn server_end(self, said: Lsn) -> Lsn {
        self.left_behind.map_or(said, |end| end.max(said))
    }
}

#[cfg(test)]
mod tests {
    use highwater_format::History;

    use super::*;

    /// A promoted server sends the rest of timeline 1 an hour after it left it at 0/500: commits of that hour lie on timeline 2.
    #[test]
    fn the_clock_of_a_server_that_has_left_the_timeline_proves_nothing() {
        let (old, new) = (TimelineId::FIRST, TimelineId::new(2).unwrap());
        let view = |in_recovery| ServerView {
            timeline: new,
            end: Lsn(0x900),
            in_recovery,
            history: History::parse(new, b"1\t0/500\tx\n").unwrap(),
            slot: None,
            slot_event: None,
            slot_is_new: false,
        };
        let said = |in_recovery, timeline, end| {
            let words = Words::of(&view(in_recovery), timeline);
            let stamp = words.stamp(Time::UNIX_EPOCH, Lsn(end));
            (stamp.end, words.server_end(Lsn(end)))
        };
        assert_eq!(said(false, old, 0x500), (Lsn::MAX, Lsn(0x900)));
        assert_eq!(said(true, old, 0x500), (Lsn::MAX, Lsn(0x900)));
        assert_eq!(said(true, new, 0x800), (Lsn::MAX, Lsn(0x800)));
        assert_eq!(said(false, new, 0x800), (Lsn(0x800), Lsn(0x800)));
    }
}
