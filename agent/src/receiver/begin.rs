//! With what a stream begins: the part of the archive that it is compared with.
//!
//! Owns: where the comparison begins, and what is done where the archive has lost some of it. Does not own: reading it
//! back and comparing ([`super::overlap`]).

use highwater_format::{History, LsnRange, TimelineId};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Receiver;
use super::overlap::{Overlap, cannot_read};
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::inventory::LISTING_LAG;
use crate::resume::Resume;
use crate::sealer::Work;
use crate::segmenter::object_start;

impl Receiver {
    /// Waits until the sealer is through with earlier streams, and reads back where they ended. When they ended
    /// with an object, the stream is made to begin with that object, if it is in the archive: so there is always
    /// something to compare.
    pub(super) async fn overlap(&mut self, resume: &mut Resume, history: &History) -> Result<Overlap> {
        let (answer, settled) = oneshot::channel();
        self.send(Work::Settle(answer)).await?;
        settled.await.map_err(|_| AgentError::Cancelled)?;
        if let Some(after) = resume.after {
            return self.common_start(resume, after, history).await;
        }
        let (shared, timeline) = (&self.context.shared, resume.timeline);
        let (sealed, size) = (resume.sealed, shared.segment_size);
        if resume.start == sealed && !self.removed {
            let start = object_start(size, sealed.saturating_sub(1));
            let range = LsnRange { start, end: sealed };
            if let Ok(Some(overlap)) = Overlap::load_if_held(shared, timeline, range).await {
                resume.start = start;
                return Ok(overlap);
            }
        }
        let range = LsnRange {
            start: resume.start,
            end: sealed,
        };
        match Overlap::load_if_held(shared, timeline, range).await? {
            Some(overlap) => {
                self.lacking_since = None;
                Ok(overlap)
            }
            None => self.rest(timeline, range).await,
        }
    }

    /// The regions answer that they do not hold all of an object that was only begun: somebody has removed its first
    /// chunks, or a region that holds only what came later is the only one that answers. PostgreSQL has it still, and
    /// sends it again. What is left of it is compared; it is an error only as long as a listing may lag.
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

    /// A timeline's first segment begins with what the server had on the timeline before, and so must the archive.
    /// A server that was rolled back and then promoted is found out here.
    async fn common_start(&self, resume: &Resume, after: Position, history: &History) -> Result<Overlap> {
        let left = history
            .switch_of(after.timeline)
            .map_or(resume.start, |switch| switch.min(after.lsn));
        let range = LsnRange {
            start: resume.start,
            end: left.max(resume.start),
        };
        // Where the archive has a gap there is nothing to compare with.
        let held = Overlap::load_if_held(&self.context.shared, after.timeline, range).await?;
        let nothing = || Overlap::nothing(resume.timeline, resume.start);
        Ok(held.unwrap_or_else(nothing).withholding())
    }
}
