//! The regions of one archive, opened; and the one way to write an object that must never be replaced.
//!
//! Owns: opening stores with the right retry policy, reporting a region's health into [`State`], the
//! write-once rule. Does not own: what is written when (uploader, backup) or what durable means (frontier).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use highwater_config::Config;
use highwater_format::{ClusterName, FormatError, Header, Identity, Layout, Object as Container};
use highwater_store::{
    ErrorKind, Object, Put, PutMode, RegionConfig, RetryObserver, RetryPolicy, Retrying, Store, StoreError,
};

use crate::blocking;
use crate::error::{AgentError, Result};
use crate::lease::{Lease, Leased};
use crate::places::Place;
use crate::state::{RegionView, State};

/// For how long a quick call is repeated. Whoever waits has other regions to ask, or a person in front of it.
const QUICK: Duration = Duration::from_secs(10);

/// A line that is shown whole when objects that are text differ.
const LONGEST_LINE: usize = 300;

/// One home of the archive.
#[derive(Debug)]
pub struct Region {
    /// Name from the configuration.
    pub name: String,
    /// Place in the configuration, and in every list of regions.
    pub index: usize,
    /// Tries for ever, and writes as long as the claim is known to hold: for work that must be done sooner or later.
    pub store: Arc<dyn Store>,
    /// Gives up after ten seconds: for commands, probes and reads that another region can answer.
    pub quick: Arc<dyn Store>,
    /// What `store` may write.
    pub(crate) lease: Arc<Lease>,
}

/// All regions of one lineage.
#[derive(Clone, Debug)]
pub struct Archive {
    /// Keys of this cluster and system identifier.
    pub layout: Layout,
    /// What was fixed at the first write.
    pub identity: Identity,
    /// In the order of the configuration; never empty.
    pub regions: Vec<Arc<Region>>,
    /// Whether this lineage may begin under a cluster name that holds another one.
    pub new_lineage: bool,
}

impl Archive {
    /// The archive of `cluster` for the server that `identity` describes.
    pub fn new(cluster: ClusterName, identity: Identity, regions: Vec<Arc<Region>>) -> Self {
        let layout = Layout::new(cluster, identity.system_id);
        Self {
            layout,
            identity,
            regions,
            new_lineage: false,
        }
    }
}

/// Opens every configured region; wrong settings fail, unreachable endpoints do not.
pub async fn open(config: &Config, state: &State) -> Result<Vec<Arc<Region>>> {
    let mut regions = Vec::with_capacity(config.regions.len());
    for (index, settings) in config.regions.iter().enumerate() {
        regions.push(Arc::new(open_one(settings, index, state).await?));
    }
    Ok(regions)
}

/// Opens one of them, number `index`.
pub(crate) async fn open_one(settings: &RegionConfig, index: usize, state: &State) -> Result<Region> {
    let plain = highwater_store::open(settings).await?;
    let name = settings.display_name().to_owned();
    Ok(Region::over(plain, name, index, state, None))
}

impl Region {
    /// The region that `plain`, which does not retry by itself, leads to. `jitter` makes the pauses between
    /// attempts repeatable.
    pub fn over(
        plain: Arc<dyn Store>,
        name: String,
        index: usize,
        state: &State,
        jitter: Option<u64>,
    ) -> Self {
        let [hears_patient, hears_quick] = Health::pair(index, state);
        let policy = |policy: RetryPolicy| match jitter {
            Some(seed) => policy.with_seed(seed),
            None => policy,
        };
        let patient = policy(RetryPolicy::patient());
        let quick = policy(RetryPolicy::interactive().with_budget(Some(QUICK)));
        let lease = Arc::<Lease>::default();
        let leased = Arc::new(Leased::new(plain.clone(), lease.clone()));
        Self {
            name,
            index,
            store: Arc::new(Retrying::new(leased, patient, hears_patient)),
            quick: Arc::new(Retrying::new(plain, quick, hears_quick)),
            lease,
        }
    }

    /// A region whose calls are not repeated.
    #[cfg(test)]
    pub(crate) fn bare(name: impl Into<String>, index: usize, store: Arc<dyn Store>) -> Self {
        let lease = Arc::<Lease>::default();
        Self {
            name: name.into(),
            index,
            store: Arc::new(Leased::new(store.clone(), lease.clone())),
            quick: store,
            lease,
        }
    }

    /// What tells it from the others.
    pub(crate) fn place(&self) -> Place<'_> {
        (&self.name, &*self.quick)
    }
}

/// Tells the state how a region's calls go: those that must be done, or the quick ones. Each is cleared by its
/// own kind only: a region that can be listed but takes no writes is failing. What the pipeline says stands beside it.
#[derive(Debug)]
struct Health {
    index: usize,
    state: State,
    failing: Arc<AtomicBool>,
    /// The other kind of calls.
    other_failing: Arc<AtomicBool>,
}

impl Health {
    /// One for patient calls and one for quick ones.
    fn pair(index: usize, state: &State) -> [Arc<Self>; 2] {
        let (patient, quick) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let health = |failing: &Arc<AtomicBool>, other: &Arc<AtomicBool>| {
            Arc::new(Self {
                index,
                state: state.clone(),
                failing: failing.clone(),
                other_failing: other.clone(),
            })
        };
        [health(&patient, &quick), health(&quick, &patient)]
    }
}

impl RetryObserver for Health {
    fn on_retry(&self, error: &StoreError, attempt: u32, wait: Duration) {
        tracing::warn!(region = error.region(), key = error.key(), attempt, wait_ms = wait.as_millis(), %error, "store call failed, trying again");
        self.failing.store(true, Ordering::Release);
        self.state.update_region(self.index, |view| {
            view.retries += 1;
            view.calls(Some(error.to_string()));
        });
    }

    fn on_success(&self) {
        self.failing.store(false, Ordering::Release);
        if self.other_failing.load(Ordering::Acquire) {
            return;
        }
        let index = self.index;
        let failing = self
            .state
            .subscribe()
            .borrow()
            .regions
            .get(index)
            .is_some_and(RegionView::calls_fail);
        if failing {
            self.state.update_region(index, |view| view.calls(None));
        }
    }
}

/// How a write-once object came to be there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Written {
    /// It was written now.
    Created,
    /// The same content was there already.
    Same,
}

/// Writes an object that must never be replaced. Where the key is taken, the same content counts as
/// written and other content is a [`AgentError::Conflict`]; nothing is ever overwritten. What is there and cannot be read
/// is no evidence of another course: damage is this region's alone ([`AgentError::Object`]).
///
/// Containers are the same when they carry the same WAL or pack bytes under the same identity, however
/// they were compressed and whenever they were sealed; everything else is compared byte by byte.
pub async fn write_once(store: &dyn Store, key: &str, object: Object) -> Result<Written> {
    if store.put(key, object.clone(), PutMode::Create).await? == Put::Created {
        return Ok(Written::Created);
    }
    let theirs = store.get(key).await?;
    let ours = object.bytes;
    match blocking::run("comparing objects", move || compare(&ours, &theirs)).await? {
        Compared::Same => Ok(Written::Same),
        Compared::Unreadable(problem) => Err(damaged(store.region(), key, &problem)),
        Compared::Different { ours, theirs } => Err(AgentError::Conflict {
            region: store.region().to_owned(),
            key: key.to_owned(),
            ours,
            theirs,
        }),
    }
}

/// An object that a region holds and nobody can read: it stays, and nothing is written in its place.
pub(crate) fn damaged(region: &str, key: &str, problem: &str) -> AgentError {
    AgentError::Object {
        region: region.to_owned(),
        key: key.to_owned(),
        source: FormatError::Damaged {
            what: "the object that is there",
            problem: format!("{problem}. Nothing is replaced: remove it, and it is stored here again"),
        },
    }
}

/// What two objects of one key are to each other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Compared {
    /// They carry the same content.
    Same,
    /// Both can be read and say something else; how each calls itself.
    Different {
        /// The first.
        ours: String,
        /// The second.
        theirs: String,
    },
    /// The second cannot be read, or is the first, cut off.
    Unreadable(String),
}

/// Compares two objects of one key.
pub(crate) fn compare(ours: &Bytes, theirs: &Bytes) -> Compared {
    if ours == theirs {
        return Compared::Same;
    }
    let (our_length, their_length) = (ours.len(), theirs.len());
    let unreadable = |error: &FormatError| {
        Compared::Unreadable(format!("{their_length} bytes that cannot be read: {error}"))
    };
    match (Container::open(ours.clone()), Container::open(theirs.clone())) {
        (Ok(ours), Ok(theirs)) => {
            let different = Compared::Different {
                ours: describe(ours.header()),
                theirs: describe(theirs.header()),
            };
            if !same_identity(ours.header(), theirs.header()) {
                return different;
            }
            match (ours.plain(), theirs.plain()) {
                (Ok(a), Ok(b)) if a == b => Compared::Same,
                (_, Err(error)) => unreadable(&error),
                _ => different,
            }
        }
        // Neither is one: documents and history files are as they are.
        (Err(_), Err(_)) if is_cut_off(theirs, ours) => {
            Compared::Unreadable(format!("{their_length} of {our_length} bytes"))
        }
        (Err(_), Err(_)) => Compared::Different {
            ours: text(ours),
            theirs: text(theirs),
        },
        (Ok(_), Err(error)) => unreadable(&error),
        (Err(_), Ok(theirs)) => Compared::Different {
            ours: format!("{our_length} bytes"),
            theirs: describe(theirs.header()),
        },
    }
}

/// Whether `part` is what a write that was cut off, or a crash, has left of `whole`: nothing, zeros, or its beginning.
/// A history that ends with a line may be that of another timeline of this number, which left an ancestor of ours.
fn is_cut_off(part: &[u8], whole: &[u8]) -> bool {
    part.iter().all(|byte| *byte == 0) || (whole.starts_with(part) && part.last() != Some(&b'\n'))
}

/// The end of a history file or document, for people: in its last line two histories differ.
fn text(bytes: &[u8]) -> String {
    let length = bytes.len();
    let last = std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.lines().rfind(|line| !line.trim().is_empty()));
    match last {
        Some(line) if line.len() <= LONGEST_LINE => format!("{length} bytes ending with {line:?}"),
        _ => format!("{length} bytes"),
    }
}

fn same_identity(a: &Header, b: &Header) -> bool {
    (a.kind, a.system_id, a.timeline, a.start, a.end) == (b.kind, b.system_id, b.timeline, b.start, b.end)
}

fn describe(header: &Header) -> String {
    format!(
        "{} of system identifier {}, timeline {}, {}, sealed at {}",
        header.kind,
        header.system_id,
        header.timeline,
        header.range(),
        header.sealed_at
    )
}

/// Reads an object that may be absent.
pub async fn get_optional(store: &dyn Store, key: &str) -> Result<Option<Bytes>> {
    match store.get(key).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[path = "region_tests.rs"]
mod tests;
