//! Copying a range of WAL from whatever good objects the other regions hold, where the object that should give it
//! cannot be used.
//!
//! Owns: which object is tried next (of those that are not known to be bad the one that reaches furthest; chunks that
//! a segment object made superfluous count), and the proof that nothing gives a range: every region was asked and
//! answered, and what should hold it is damaged. A region that does not answer leaves it unknown. Does not own: how
//! one object is copied, nor what follows from damage.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use highwater_format::coverage::Piece;
use highwater_format::{Lsn, LsnRange, TimelineId};
use highwater_store::ErrorKind;

use crate::error::{AgentError, Result};
use crate::heal::listing::Listing;
use crate::region::Region;
use crate::uploader::Shared;

/// Objects that a text names.
const SHOWN: usize = 3;

/// WAL that is in no region in any form that can be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Damage {
    /// Its timeline.
    pub(crate) timeline: TimelineId,
    /// What cannot be had.
    pub(crate) range: LsnRange,
    /// Region, object and what is wrong with it, for each object that should hold it; nothing where no object does.
    pub(crate) why: Vec<String>,
}

impl Damage {
    /// What a region lacks because of it, and the next step, as what follows the region's name.
    pub(crate) fn as_lack(&self) -> String {
        let start = self.range.start;
        let put_back = match self.is_absent() {
            true => "put the objects back",
            false => "put an intact version back where it is damaged",
        };
        format!(
            "lacks {self}; {put_back}, or take a base backup, because restores from older ones end at {start}"
        )
    }

    /// There is no object that should hold it.
    pub(crate) fn is_absent(&self) -> bool {
        self.why.is_empty()
    }

    /// For whoever cannot tell whether it is gone or a listing lags.
    pub(crate) fn not_listed(&self) -> AgentError {
        AgentError::Trouble {
            what: self.to_string(),
            next: "It is looked for again".into(),
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (range, timeline) = (self.range, self.timeline);
        if self.is_absent() {
            return write!(
                f,
                "WAL {range} of timeline {timeline}, which is in no other region any more"
            );
        }
        let shown: Vec<&str> = self.why.iter().take(SHOWN).map(String::as_str).collect();
        write!(
            f,
            "WAL {range} of timeline {timeline}, which is damaged in every region that holds it and in no other object ({}",
            shown.join("; ")
        )?;
        match self.why.len().saturating_sub(SHOWN) {
            0 => f.write_str(")"),
            more => write!(f, "; and {more} more)"),
        }
    }
}

/// Why a range was not filled to its end.
#[derive(Debug)]
pub(crate) enum Rest {
    /// Proven: nothing gives this part of it.
    Damaged(Damage),
    /// Every region has answered, and none lists this part of it. A listing may lag.
    Missing(Damage),
    /// Something did not answer, so that a later attempt may succeed.
    Unknown(AgentError),
}

/// What was filled.
#[derive(Debug)]
pub(crate) struct Filled<T> {
    /// What came of each object, in order.
    pub(crate) copied: Vec<T>,
    /// The range is there up to here.
    pub(crate) reached: Lsn,
    /// What stands in the way of the rest; none when all of it is there.
    pub(crate) rest: Option<Rest>,
}

/// Fills `range` of `target` from the objects of all other regions, each copied by `one`. Bad objects are passed over;
/// any other error is the caller's.
pub(crate) async fn fill<T, F>(
    shared: &Shared,
    target: &Region,
    timeline: TimelineId,
    range: LsnRange,
    one: impl Fn(Arc<Region>, Piece) -> F,
) -> Result<Filled<T>>
where
    F: Future<Output = Result<T>>,
{
    let sources: Vec<_> = shared
        .archive
        .regions
        .iter()
        .filter(|other| other.index != target.index)
        .cloned()
        .collect();
    let mut search = Search::over(shared, &sources, timeline, range).await?;
    let mut filled = Filled {
        copied: Vec::new(),
        reached: range.start,
        rest: None,
    };
    while filled.reached < range.end {
        let Some((number, piece)) = search.offers.at(filled.reached) else {
            filled.rest = Some(search.verdict(filled.reached));
            break;
        };
        let Some(source) = sources.get(number) else {
            return Err(AgentError::Bug(format!("there is no source {number}")));
        };
        match one(source.clone(), piece).await {
            Ok(copied) => {
                filled.copied.push(copied);
                filled.reached = piece.range.end;
            }
            Err(error) => search.failed(target, number, piece, error)?,
        }
    }
    Ok(filled)
}

/// Whether `error` says that an object is of no use in a region other than `target`, so that another object may give
/// the same bytes.
pub(crate) fn is_about_object(error: &AgentError, target: &Region) -> bool {
    match error {
        AgentError::Object { region, .. } => *region != target.name,
        AgentError::Store(error) => {
            error.region() != target.name && matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound)
        }
        _ => false,
    }
}

/// What is known while a range is being filled.
struct Search {
    timeline: TimelineId,
    range: LsnRange,
    offers: Offers,
    bad: Vec<(LsnRange, String)>,
    trouble: Option<AgentError>,
}

impl Search {
    async fn over(
        shared: &Shared,
        sources: &[Arc<Region>],
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<Self> {
        let listing = Listing {
            layout: &shared.archive.layout,
            size: shared.segment_size,
        };
        let mut search = Self {
            timeline,
            range,
            offers: Offers::default(),
            bad: Vec::new(),
            trouble: None,
        };
        for (number, source) in sources.iter().enumerate() {
            match listing.around(&*source.quick, timeline, range).await {
                Ok(pieces) => search.offers.add(number, pieces),
                Err(error @ AgentError::Store(_)) => search.trouble = Some(error),
                Err(error) => return Err(error),
            }
        }
        Ok(search)
    }

    fn failed(&mut self, target: &Region, number: usize, piece: Piece, error: AgentError) -> Result<()> {
        if is_about_object(&error, target) {
            tracing::warn!(region = target.name, %error, "an object that cannot be used is not copied; the same WAL is looked for elsewhere");
            self.bad.push((piece.range, error.to_string()));
            self.offers.spoil(number, &piece);
            return Ok(());
        }
        match &error {
            AgentError::Store(of) if of.region() != target.name => {
                self.offers.silence(number);
                self.trouble = Some(error);
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// Why nothing gives the byte at `at`.
    fn verdict(self, at: Lsn) -> Rest {
        let next = self.offers.next_start(at).unwrap_or(self.range.end);
        let missing = LsnRange::new(at, next.min(self.range.end));
        if let Some(error) = self.trouble {
            return Rest::Unknown(error);
        }
        let about = |(range, _): &&(LsnRange, String)| {
            range.intersect(missing).is_some_and(|common| !common.is_empty())
        };
        let why: Vec<String> = self
            .bad
            .iter()
            .filter(about)
            .map(|(_, why)| why.clone())
            .collect();
        let damage = Damage {
            timeline: self.timeline,
            range: missing,
            why,
        };
        match damage.is_absent() {
            true => Rest::Missing(damage),
            false => Rest::Damaged(damage),
        }
    }
}

/// Objects by the source that lists them, without those that turned out to be bad.
#[derive(Debug, Default)]
struct Offers {
    pieces: Vec<(usize, Piece)>,
}

impl Offers {
    fn add(&mut self, source: usize, pieces: impl IntoIterator<Item = Piece>) {
        self.pieces
            .extend(pieces.into_iter().map(|piece| (source, piece)));
    }

    fn spoil(&mut self, source: usize, bad: &Piece) {
        self.pieces
            .retain(|(of, piece)| *of != source || (piece.range, piece.kind) != (bad.range, bad.kind));
    }

    fn silence(&mut self, source: usize) {
        self.pieces.retain(|(of, _)| *of != source);
    }

    /// The object that holds the byte at `at` and reaches furthest; of the same in several sources that of the first.
    fn at(&self, at: Lsn) -> Option<(usize, Piece)> {
        let holding = self.pieces.iter().filter(|(_, piece)| piece.range.contains(at));
        holding
            .max_by_key(|(source, piece)| (piece.range.end, std::cmp::Reverse(*source)))
            .copied()
    }

    fn next_start(&self, at: Lsn) -> Option<Lsn> {
        let starts = self.pieces.iter().map(|(_, piece)| piece.range.start);
        starts.filter(|start| *start > at).min()
    }
}

#[cfg(test)]
#[path = "salvage_tests.rs"]
mod tests;
