//! Answers the planner's questions from the WAL itself.
//!
//! Owns: which objects are read for an answer, and how few (for a time: `times`). Does not own: what is done with an
//! answer (`plan`), and what a record is (`trace`).

mod bytes;
mod damage;
mod times;
mod trace;

use std::collections::BTreeMap;

use futures::{StreamExt, stream};
use highwater_config::Exit;
use highwater_format::{History, Lsn, LsnRange, Time, coverage::Hole, walscan::WalEvent};

use crate::{
    catalog::{Catalog, Chain, Source},
    error::RestoreError,
    fetch::Sources,
    plan::{Answer, Answers, Plan, Question, Span, Step, plan},
    progress::Bar,
    regions::Region,
    target::Request,
};
pub(crate) use bytes::{expectation, open as open_object};
pub use damage::{Unanswered, learn};
use trace::{Flow, Seen, Trace};

/// Objects at the end of a span whose headers are asked when the archive was last known to be complete.
const LAST_HEADERS: usize = 32;
/// Bytes of stored WAL held ahead of a scan are bounded by this many objects.
const READ_AHEAD: usize = 4;

/// Plans for `request`, reading whatever WAL that takes. What is found to be damaged on the way is noted in the catalog,
/// and planned around where other objects hold the same WAL.
///
/// # Errors
///
/// A refusal, or WAL that cannot be read.
pub async fn resolve(
    catalog: &mut Catalog,
    regions: &[Region],
    request: &Request,
) -> Result<Plan, RestoreError> {
    let mut answers = Answers::new();
    let stores = Stores::of(catalog, regions);
    loop {
        let question = match plan(catalog, request, &answers)? {
            Step::Done(plan) => return Ok(*plan),
            Step::Ask(question) => question,
        };
        match Locator::with(catalog, stores.clone()).answer(&question).await {
            Ok(answer) => drop(answers.insert(question, answer)),
            Err(unanswered) => {
                learn(catalog, regions, unanswered).await?;
                answers.clear();
            }
        }
    }
}

/// The readable regions of a catalog.
#[derive(Debug, Clone)]
struct Stores {
    /// All of them.
    all: Sources,
    /// Each of them alone, by its index: for objects that only one holds.
    alone: BTreeMap<usize, Sources>,
}

impl Stores {
    fn of(catalog: &Catalog, regions: &[Region]) -> Self {
        let store = |index: usize| Some((index, regions.get(index)?.store()?.clone()));
        let stores: Vec<_> = catalog.readable().into_iter().filter_map(store).collect();
        Self {
            all: Sources::new(stores.iter().map(|(_, store)| store.clone()).collect()),
            alone: stores
                .into_iter()
                .map(|(index, store)| (index, Sources::new(vec![store])))
                .collect(),
        }
    }
}

/// Reads WAL of one catalog.
#[derive(Debug)]
pub struct Locator<'a> {
    catalog: &'a Catalog,
    readable: Vec<usize>,
    stores: Stores,
}

/// The objects of one span.
struct Path {
    span: Span,
    chain: Chain,
    sources: Vec<Source>,
}

impl<'a> Locator<'a> {
    /// A locator over the regions that the catalog was read from.
    #[must_use]
    pub fn new(catalog: &'a Catalog, regions: &[Region]) -> Self {
        Self::with(catalog, Stores::of(catalog, regions))
    }

    fn with(catalog: &'a Catalog, stores: Stores) -> Self {
        Self {
            catalog,
            readable: catalog.readable(),
            stores,
        }
    }

    /// The regions to ask for an object.
    fn sources(&self, source: &Source) -> &Sources {
        match self.catalog.holders(source.timeline, &source.piece).as_slice() {
            [only] => self.stores.alone.get(only).unwrap_or(&self.stores.all),
            _ => &self.stores.all,
        }
    }

    /// The answer to one question.
    ///
    /// # Errors
    ///
    /// No region gives an object that is needed, or the WAL in it is damaged.
    pub async fn answer(&self, question: &Question) -> Result<Answer, Unanswered> {
        match question {
            Question::Commits { span, time, or_at } => {
                let (time, or_at) = (*time, *or_at);
                let stops = move |at: Time| if or_at { at >= time } else { at > time };
                self.commits(&self.path(span)?, stops).await
            }
            Question::Records { span, lsn } => self.records(&self.path(span)?, *lsn).await,
            Question::Xid { span, xid } => {
                let wanted = *xid;
                let hit =
                    move |event: &WalEvent| matches!(event, WalEvent::Commit { xid, .. } if *xid == wanted);
                self.first(&self.path(span)?, hit).await
            }
            Question::Name { span, name: wanted } => {
                let hit =
                    |event: &WalEvent| matches!(event, WalEvent::RestorePoint { name, .. } if name == wanted);
                self.first(&self.path(span)?, hit).await
            }
            Question::Proven { span } => Ok(Answer::Time(self.proven(&self.path(span)?).await?)),
        }
    }

    fn path(&self, span: &Span) -> Result<Path, Unanswered> {
        let chain = self
            .catalog
            .chain(span.timeline, &self.readable)
            .map_err(|broken| RestoreError::lacking(Exit::Damage, broken.to_string()))?;
        let sources = chain
            .cover(LsnRange::new(span.start, span.end))
            .map_err(|Hole(hole)| RestoreError::lacking(Exit::No, format!("the WAL {hole} is missing")))?;
        Ok(Path {
            span: *span,
            chain,
            sources,
        })
    }

    /// The latest time at which the server's WAL was seen to end within the path.
    async fn proven(&self, path: &Path) -> Result<Option<Time>, Unanswered> {
        let first = path.sources.len().saturating_sub(LAST_HEADERS);
        let last = path.sources.get(first..).unwrap_or_default();
        let headers = stream::iter(last).map(|source| async move { (source, self.header(source).await) });
        let mut headers = headers.buffered(8);
        let mut proven: Option<Time> = None;
        while let Some((source, header)) = headers.next().await {
            let header = header?;
            let limit = leg_end(&path.chain.history, source).min(path.span.end);
            let sealed = (header.server_end <= limit).then_some(header.sealed_at);
            proven = proven
                .max(sealed)
                .max(header.last_commit.filter(|_| source.piece.range.end <= limit));
        }
        Ok(proven)
    }

    /// The first event that `hit` accepts.
    async fn first(&self, path: &Path, hit: impl Fn(&WalEvent) -> bool) -> Result<Answer, Unanswered> {
        let mut found: Option<Seen> = None;
        self.scan(path, 0, path.span.end, |seen| {
            if !hit(&seen.event) {
                return Flow::Continue;
            }
            found = Some(seen);
            Flow::Stop
        })
        .await?;
        Ok(Answer::Mark(found.map(|seen| seen.mark())))
    }

    /// The records around an LSN, scanning from further back until the one before it is known.
    async fn records(&self, path: &Path, lsn: Lsn) -> Result<Answer, Unanswered> {
        let at = path
            .sources
            .iter()
            .position(|source| lsn <= source.used.end)
            .unwrap_or(path.sources.len());
        let mut back = 1;
        loop {
            let begin = at.saturating_sub(back);
            let mut trace = self.trace(path, begin);
            trace.look_around(lsn);
            self.feed(path, begin, path.span.end, &mut trace, |_| Flow::Continue)
                .await?;
            let (before, at_or_after) = trace.around();
            if before.is_some() || begin == 0 {
                return Ok(Answer::Records { before, at_or_after });
            }
            back *= 4;
        }
    }

    async fn scan(
        &self,
        path: &Path,
        begin: usize,
        until: Lsn,
        on: impl FnMut(Seen) -> Flow,
    ) -> Result<(), Unanswered> {
        let mut trace = self.trace(path, begin);
        self.feed(path, begin, until, &mut trace, on).await
    }

    fn trace(&self, path: &Path, begin: usize) -> Trace {
        Trace::new(
            self.start(path, begin),
            &self.catalog.identity,
            path.chain.timeline(),
        )
    }

    /// Scans begin where a page begins: at the segment's start, or where the span does.
    fn start(&self, path: &Path, begin: usize) -> Lsn {
        let first = path
            .sources
            .get(begin)
            .map_or(path.span.start, |source| source.used.start);
        path.chain.segment_size.segment_start(first).max(path.span.start)
    }

    /// Feeds the objects from `begin` on to a trace, up to the one that holds `until`, reading ahead, until it or `on`
    /// has enough.
    async fn feed(
        &self,
        path: &Path,
        begin: usize,
        until: Lsn,
        trace: &mut Trace,
        mut on: impl FnMut(Seen) -> Flow,
    ) -> Result<(), Unanswered> {
        let start = self.start(path, begin);
        let wanted: Vec<Source> = path
            .sources
            .iter()
            .filter(|source| source.used.end > start && source.used.start < until)
            .map(|source| Source {
                used: LsnRange::new(source.used.start.max(start), source.used.end),
                ..*source
            })
            .collect();
        let bar = Bar::bytes("reading WAL", wanted.iter().map(|source| source.used.len()).sum());
        let mut read = stream::iter(&wanted)
            .map(|source| self.plain(source))
            .buffered(READ_AHEAD);
        while let Some(bytes) = read.next().await {
            let bytes = bytes?;
            bar.add(bytes.len() as u64);
            match trace.feed(&bytes, &mut on) {
                Ok(Flow::Continue) => {}
                Ok(Flow::Stop) => return Ok(()),
                Err(damage) if damage.is_end_of_wal() => return Ok(()),
                Err(damage) => {
                    let message = format!(
                        "{damage} (timeline {}); recovery would end there without a word, so nothing is planned past it: \
                         run `highwater-restore verify`, and restore to before it with --to-lsn",
                        path.span.timeline
                    );
                    return Err(RestoreError::lacking(Exit::Damage, message).into());
                }
            }
        }
        Ok(())
    }
}

/// Where the timeline that an object belongs to was left by the chain.
fn leg_end(history: &History, source: &Source) -> Lsn {
    history.switch_of(source.timeline).unwrap_or(Lsn::MAX)
}
