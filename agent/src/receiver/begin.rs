//! With what a stream begins: the part of the archive that it is compared with.
//!
//! Owns: where the comparison begins, and what is done where the archive has lost some of it. Does not own: reading it
//! back and comparing ([`super::overlap`]).

use bytes::Bytes;
use highwater_format::{History, Lsn, LsnRange, TimelineId};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Receiver;
use super::overlap::{Overlap, Unread, cannot_read};
use crate::backup::course::Served;
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::gap::{Ends, Span};
use crate::inventory::LISTING_LAG;
use crate::resume::{Resume, ServerView};
use crate::sealer::Work;
use crate::segmenter::object_start;
use crate::uploader::Shared;

/// As much WAL tells two courses of it apart: commits and checkpoints have times in them. Less may be a page header and what an idle
/// server notes by itself, which are the same wherever as much was written before.
const TELLING: u64 = 64 * 1024;

impl Receiver {
    /// Waits until the sealer is through with earlier streams, and reads back where they ended. When they ended
    /// with an object, the stream is made to begin with that object, if it is in the archive: so there is always
    /// something to compare. When they ended right behind one, that is compared first.
    pub(super) async fn overlap(
        &mut self,
        resume: &mut Resume,
        history: &History,
        view: &ServerView,
    ) -> Result<Overlap> {
        let (answer, settled) = oneshot::channel();
        self.send(Work::Settle(answer)).await?;
        settled.await.map_err(|_| AgentError::Cancelled)?;
        self.compares_before = false;
        if let Some(after) = resume.after {
            return self.common_start(resume, after, history, view).await;
        }
        let timeline = resume.timeline;
        let range = LsnRange {
            start: resume.start,
            end: resume.sealed,
        };
        if range.is_empty()
            && !self.removed
            && let Some(overlap) = self.object_before(timeline, resume.sealed, view).await?
        {
            resume.start = overlap.range().start;
            return Ok(overlap);
        }
        let held = Overlap::load_if_held(&self.context.shared, timeline, range).await?;
        let Some(mut overlap) = held else {
            return self.rest(timeline, range).await;
        };
        self.lacking_since = None;
        if !range.is_empty()
            && range.len() < TELLING
            && !self.removed
            && let Some(before) = readable_before(&self.context.shared, timeline, range.start).await?
        {
            overlap = before.followed_by(overlap);
            self.compares_before = true;
        }
        Ok(overlap)
    }

    /// The object that ends with `end`; none where the archive does not hold it. One that should be there and cannot be read
    /// keeps the stream from beginning, as long as the server still has that WAL: it could be another course.
    async fn object_before(
        &mut self,
        timeline: TimelineId,
        end: Lsn,
        view: &ServerView,
    ) -> Result<Option<Overlap>> {
        let shared = &self.context.shared;
        let range = object_ending_with(shared, end);
        let start = range.start;
        let error = match read_before(shared, timeline, range, &mut self.lacking_since).await? {
            Before::Held(overlap) => return Ok(Some(overlap)),
            Before::Unheld => return Ok(None),
            Before::Unread(error) => error,
        };
        let from = Span {
            timeline,
            range: LsnRange { start, end: start },
            ends: Ends::Stream,
        };
        let cancel = self.context.cancel.clone();
        let is_there = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(AgentError::Cancelled),
            is_there = self.streams_from(&from, view) => is_there,
        };
        match is_there {
            Ok(false) => {
                tracing::warn!(
                    %error, %end,
                    "the server no longer has the WAL before it either: the stream goes on from there without comparing it"
                );
                self.removed = true;
                Ok(None)
            }
            Ok(true) => Err(error),
            Err(unknown) => {
                tracing::warn!(%unknown, from = %start, "the server cannot be asked whether it still has this WAL");
                Err(error)
            }
        }
    }

    /// The regions answer that they do not hold all of an object that was only begun: somebody has removed its first
    /// chunks, or a region that holds only what came later is the only one that answers. PostgreSQL has it still, and
    /// sends it again. What is left of it is compared, and all of it is sealed once more then: a chunk behind the hole would
    /// be of no use before the object is complete. It is an error only as long as a listing may lag.
    async fn rest(&mut self, timeline: TimelineId, range: LsnRange) -> Result<Overlap> {
        let since = *self.lacking_since.get_or_insert_with(Instant::now);
        if since.elapsed() < LISTING_LAG {
            let next = format!(
                "Listings may lag, so the regions are asked again; after {} s the stream is compared with what they hold",
                LISTING_LAG.as_secs()
            );
            let why = "the regions that answer do not hold all of it";
            return Err(cannot_read(timeline, range, why, &next));
        }
        let rest = Overlap::load_rest(&self.context.shared, timeline, range).await?;
        self.lacking_since = None;
        let unheld = LsnRange {
            start: range.start,
            end: rest.range().start,
        };
        tracing::warn!(
            %timeline, %unheld, compared = %rest.range(),
            "no region that answers holds the WAL before what is compared, though it was stored: it is taken from the server \
             once more, uncompared. Look whether a lifecycle rule or somebody removes objects"
        );
        Ok(rest)
    }

    /// A timeline's first object begins with what the server had on the timeline before, and so must the archive. A
    /// server that was rolled back and then promoted is found out here. A timeline that begins with an object has nothing of
    /// the one before in it, which is asked for by itself then.
    async fn common_start(
        &mut self,
        resume: &Resume,
        after: Position,
        history: &History,
        view: &ServerView,
    ) -> Result<Overlap> {
        let left = history
            .switch_of(after.timeline)
            .map_or(resume.start, |switch| switch.min(after.lsn));
        let range = LsnRange {
            start: resume.start,
            end: left.max(resume.start),
        };
        if range.is_empty() && !self.removed {
            self.compare_before(after.timeline, range.start, view).await?;
        }
        // Where the archive has a gap there is nothing to compare with.
        let held = Overlap::load_if_held(&self.context.shared, after.timeline, range).await?;
        let nothing = || Overlap::nothing(resume.timeline, resume.start);
        Ok(held.unwrap_or_else(nothing).withholding())
    }

    /// Compares the object that ends with `end` with what the server has there, on a timeline that the server has left. What
    /// the server no longer has cannot be compared.
    async fn compare_before(&mut self, timeline: TimelineId, end: Lsn, view: &ServerView) -> Result<()> {
        let Some(held) = self.object_before(timeline, end, view).await? else {
            return Ok(());
        };
        let (context, archive) = (&self.context, &self.context.shared.archive);
        let _charge = context.shared.budget.charge(held.range().len());
        match Served::before(&context.conninfo, archive, timeline, end).await {
            Ok(served) => {
                let mut held = held.but_for_what_is_unused(&context.tools.identity);
                held.pass(Bytes::from(served.into_plain())).map(drop)
            }
            Err(AgentError::Postgres(error)) if error.is_segment_removed() => {
                tracing::warn!(
                    %timeline, %end,
                    "the server no longer has the end of the timeline before, so that it is not compared with the archive's"
                );
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// What the object covers that ends with `end`.
fn object_ending_with(shared: &Shared, end: Lsn) -> LsnRange {
    let start = object_start(shared.segment_size, end.saturating_sub(1));
    LsnRange { start, end }
}

/// The object that ends with `end`, as far as it can be read: what follows it is compared in any case.
async fn readable_before(shared: &Shared, timeline: TimelineId, end: Lsn) -> Result<Option<Overlap>> {
    match read_before(shared, timeline, object_ending_with(shared, end), &mut None).await? {
        Before::Held(overlap) => Ok(Some(overlap)),
        Before::Unheld => Ok(None),
        Before::Unread(error) => {
            tracing::warn!(%error, "only what follows is compared with the server");
            Ok(None)
        }
    }
}

/// What the archive has of the object that ends where the stream goes on.
#[derive(Debug)]
enum Before {
    /// All of it.
    Held(Overlap),
    /// Nothing to compare with: the archive begins here, or there is a gap before.
    Unheld,
    /// It should be there.
    Unread(AgentError),
}

/// Reads back the object `range`. A region that does not answer while another one does, and does not hold
/// it, is waited for as long as a listing may lag (`lacking` remembers since when). One that holds it and cannot read it is
/// no such case.
async fn read_before(
    shared: &Shared,
    timeline: TimelineId,
    range: LsnRange,
    lacking: &mut Option<Instant>,
) -> Result<Before> {
    let unread: Unread = match Overlap::load(shared, timeline, range).await? {
        Ok(overlap) => {
            *lacking = None;
            return Ok(Before::Held(overlap));
        }
        Err(unread) => unread,
    };
    if unread.is_unheld() || unread.is_nobodys() {
        return Ok(Before::Unheld);
    }
    if unread.is_silence_beside_answers() && lacking.get_or_insert_with(Instant::now).elapsed() >= LISTING_LAG
    {
        let error = unread.into_error(timeline);
        tracing::warn!(%error, "the regions that answer do not hold it: the stream begins without comparing it");
        return Ok(Before::Unheld);
    }
    Ok(Before::Unread(unread.into_error(timeline)))
}

#[cfg(test)]
#[path = "begin_tests.rs"]
mod tests;
