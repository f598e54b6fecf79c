//! The transaction end at which recovery to a time stops.
//!
//! Owns: finding the first that is too late, as PostgreSQL does, though times step back where a clock was set back or a host
//! with a slower one took over. So nothing is bisected: the headers name the latest time in each object, and they are
//! read in order, many at once, up to the first that is too late. That is one small read for each object that replay
//! will have to read whole. Then the records around that place are read.

use futures::{StreamExt, stream};
use highwater_format::{Lsn, Time, walscan::WalEvent};

use super::{
    Locator, Path, Unanswered,
    trace::{Flow, Seen},
};
use crate::{
    plan::{Answer, Mark},
    progress::Bar,
};

/// Objects that an exact scan begins before the one that the headers point to: the transaction end may have begun there,
/// and the one before it may lie there.
const NEIGHBOURS: usize = 8;
/// Headers read at once: each is 128 bytes, and what it costs is the wait for the answer.
const HEADERS_AT_ONCE: usize = 32;

impl Locator<'_> {
    pub(super) async fn commits(
        &self,
        path: &Path,
        stops: impl Fn(Time) -> bool,
    ) -> Result<Answer, Unanswered> {
        let mut from = 0;
        loop {
            let place = self.first_stopping(path, from, &stops).await?;
            let (last_before, first_after) = self.around(path, place, &stops).await?;
            // What the header tells of may lie in a part of the object that is not on this path.
            if first_after.is_none() && place < path.sources.len() {
                from = place + 1;
                continue;
            }
            return Ok(Answer::Commits {
                last_before,
                first_after,
            });
        }
    }

    /// The index of the first object from `from` on whose latest commit stops recovery, as the headers say; the number of
    /// objects if none does.
    async fn first_stopping(
        &self,
        path: &Path,
        from: usize,
        stops: &impl Fn(Time) -> bool,
    ) -> Result<usize, Unanswered> {
        let left = path.sources.get(from..).unwrap_or_default();
        let bar = Bar::objects("looking for the time", left.len() as u64);
        let headers = stream::iter(left).map(|source| self.header(source));
        let mut headers = headers.buffered(HEADERS_AT_ONCE).enumerate();
        while let Some((index, header)) = headers.next().await {
            bar.add(1);
            if header?.last_commit.is_some_and(stops) {
                return Ok(from + index);
            }
        }
        Ok(path.sources.len())
    }

    /// The first transaction end that stops, if there is one up to the end of the object at `place`, and the last before
    /// it.
    async fn around(
        &self,
        path: &Path,
        place: usize,
        stops: &impl Fn(Time) -> bool,
    ) -> Result<(Option<Mark>, Option<Mark>), Unanswered> {
        let end = path.span.end;
        let (begun, until) = path
            .sources
            .get(place)
            .map_or((end, end), |source| (source.used.start, source.used.end));
        let mut back = NEIGHBOURS;
        loop {
            let begin = place.saturating_sub(back);
            let (kept, left) = self.scan_commits(path, begin, until, stops).await?;
            // A hit before the place is one that the headers do not tell of: there may be an earlier one.
            if begin > 0 && left.is_some_and(|mark| mark.end <= begun) {
                back *= 4;
                continue;
            }
            let last_before = match kept {
                None if begin > 0 => self.last_commit_up_to(path, place, stops).await?,
                kept => kept,
            };
            return Ok((last_before, left));
        }
    }

    /// The last transaction end before the first that stops, and that one, from the object `begin` on.
    async fn scan_commits(
        &self,
        path: &Path,
        begin: usize,
        until: Lsn,
        stops: &impl Fn(Time) -> bool,
    ) -> Result<(Option<Mark>, Option<Mark>), Unanswered> {
        let mut kept: Option<Seen> = None;
        let mut left: Option<Seen> = None;
        self.scan(path, begin, until, |seen| {
            let WalEvent::Commit { time, .. } = seen.event else {
                return Flow::Continue;
            };
            if stops(time) {
                left = Some(seen);
                return Flow::Stop;
            }
            kept = Some(seen);
            Flow::Continue
        })
        .await?;
        Ok((kept.map(|seen| seen.mark()), left.map(|seen| seen.mark())))
    }

    /// The last transaction end before the first that stops, in the objects up to the one at `place`. Also in those that
    /// were scanned: a scan that begins with a segment does not see what began in the one before it, and a transaction end
    /// counts where it ends.
    async fn last_commit_up_to(
        &self,
        path: &Path,
        place: usize,
        stops: &impl Fn(Time) -> bool,
    ) -> Result<Option<Mark>, Unanswered> {
        for index in (0..=place).rev() {
            let Some(source) = path.sources.get(index) else {
                continue;
            };
            if self.header(source).await?.last_commit.is_none() {
                continue;
            }
            let (begin, until) = (segment_before(path, index), source.used.end);
            let (found, _) = self.scan_commits(path, begin, until, stops).await?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

/// The object from which on a scan sees every record that ends in the object `index`: the last one of the segment before.
fn segment_before(path: &Path, index: usize) -> usize {
    let Some(source) = path.sources.get(index) else {
        return 0;
    };
    let segment = path.chain.segment_size.segment_start(source.used.start);
    let before = path
        .sources
        .iter()
        .rposition(|source| source.used.start < segment);
    before.unwrap_or(0)
}
