//! Everything that a cluster's archive holds, read from all regions together: what can be restored from where.
//!
//! Owns: the facts and the questions asked of them (which regions hold a piece, which timelines exist, how they
//! descend). Does not own: reading them from the stores (`catalog::read`), choosing among them (`plan`), and whether
//! an object's content is whole: a catalog knows bulk objects by their keys alone; they are verified when used, and
//! what turns out to be damaged then is noted here (`catalog::damage`).
//!
//! Invariant: a region that could not be read is a fact in here and never looks like an empty one.

mod chain;
mod combine;
mod damage;
mod lineages;
pub mod read;
pub(crate) mod wal;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use highwater_format::{
    Backup, BackupId, Branch, Gap, History, Identity, Layout, Lsn, LsnRange, Pulse, SegmentName, SystemId,
    TimelineId,
    branches::branches,
    coverage::{Coverage, Piece, PieceKind},
};

pub use chain::{BrokenChain, Chain, Source};
pub use damage::Damaged;

/// The archive of one lineage, as all regions together show it.
#[derive(Debug, Clone)]
pub struct Catalog {
    /// The keys of the lineage.
    pub layout: Layout,
    /// What the lineage is.
    pub identity: Identity,
    /// Other lineages under the same cluster name.
    pub other_lineages: Vec<SystemId>,
    /// In the order of preference; the index is how a region is named elsewhere.
    pub regions: Vec<RegionView>,
    /// What is wrong, or differs between regions.
    pub findings: Vec<Finding>,
    /// Objects that were read and that no region has a good copy of.
    pub damaged: Vec<Damaged>,
}

/// One region's part of it.
#[derive(Debug, Clone)]
pub struct RegionView {
    /// Its name in the configuration.
    pub name: String,
    /// Its URL without secrets.
    pub place: String,
    /// Whether it could be read.
    pub reading: Reading,
    /// WAL by timeline.
    pub timelines: BTreeMap<TimelineId, TimelineView>,
    /// Backups with their commit mark, by id.
    pub backups: BTreeMap<BackupId, Backup>,
    /// Backups of which there are objects but no commit mark: in progress, or abandoned.
    pub unfinished: BTreeSet<BackupId>,
    /// The sign of life.
    pub pulse: Option<Pulse>,
}

/// Whether a region could be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// Everything that was asked was answered.
    Readable,
    /// It did not answer; what it holds is unknown.
    Unreadable {
        /// The store's error.
        error: String,
    },
    /// The operator said to do without it.
    LeftOut,
}

/// One timeline in one region.
#[derive(Debug, Clone, Default)]
pub struct TimelineView {
    /// What the pieces cover.
    pub coverage: Coverage,
    /// Every piece that was listed with its size, those hidden by others too.
    pub pieces: BTreeMap<(Lsn, Lsn, PieceKind), u64>,
    /// Holes recorded on purpose.
    pub gaps: Vec<Gap>,
    /// The history file, verbatim, if it is there and can be read.
    pub history: Option<(History, Vec<u8>)>,
}

/// Something that an operator should know about the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The region it is about; all of them when `None`.
    pub region: Option<String>,
    /// The object, or what stands for it.
    pub key: String,
    /// What is wrong.
    pub problem: String,
    /// A newer release wrote it, and this program must not draw conclusions from what it cannot read.
    pub newer_format: bool,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(region) = &self.region {
            write!(f, "region {region}: ")?;
        }
        write!(f, "{}: {}", self.key, self.problem)
    }
}

impl RegionView {
    /// A region of which nothing is known yet.
    #[must_use]
    pub fn new(name: impl Into<String>, place: impl Into<String>, reading: Reading) -> Self {
        Self {
            name: name.into(),
            place: place.into(),
            reading,
            timelines: BTreeMap::new(),
            backups: BTreeMap::new(),
            unfinished: BTreeSet::new(),
            pulse: None,
        }
    }

    /// Everything that was asked was answered.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        self.reading == Reading::Readable
    }

    /// Whether that very object is here.
    #[must_use]
    pub fn holds(&self, timeline: TimelineId, piece: &Piece) -> bool {
        let key = (piece.range.start, piece.range.end, piece.kind);
        self.timelines
            .get(&timeline)
            .is_some_and(|view| view.pieces.contains_key(&key))
    }
}

impl TimelineView {
    /// Notes a piece.
    pub fn insert(&mut self, piece: Piece) {
        self.pieces
            .insert((piece.range.start, piece.range.end, piece.kind), piece.size);
        self.coverage.insert(piece);
    }
}

/// The ancestors, each with where it was left; what PostgreSQL noted beside it is of no matter.
pub(crate) fn descent(history: &History) -> impl Iterator<Item = (TimelineId, Lsn)> {
    history.entries.iter().map(|entry| (entry.timeline, entry.switch))
}

/// The history of an ancestor, with which that of its descendant begins (`writeTimeLineHistory` copies the parent's file).
fn history_within(descendant: &History, ancestor: TimelineId) -> Option<History> {
    let entries = &descendant.entries;
    let position = entries.iter().position(|entry| entry.timeline == ancestor)?;
    Some(History {
        timeline: ancestor,
        entries: entries.get(..position)?.to_vec(),
    })
}

impl Catalog {
    /// The indices of all readable regions, in order of preference.
    #[must_use]
    pub fn readable(&self) -> Vec<usize> {
        self.indices(RegionView::is_readable)
    }

    /// The regions that could not be read, with their errors.
    pub fn unreadable(&self) -> impl Iterator<Item = (&RegionView, &str)> {
        self.regions.iter().filter_map(|region| match &region.reading {
            Reading::Unreadable { error } => Some((region, error.as_str())),
            Reading::Readable | Reading::LeftOut => None,
        })
    }

    /// The name of a region by its index.
    #[must_use]
    pub fn region_name(&self, index: usize) -> &str {
        self.regions.get(index).map_or("?", |region| region.name.as_str())
    }

    /// The regions that hold a piece as an object of its own.
    #[must_use]
    pub fn holders(&self, timeline: TimelineId, piece: &Piece) -> Vec<usize> {
        self.indices(|region| region.holds(timeline, piece))
    }

    /// The regions in which a backup is visible.
    #[must_use]
    pub fn backup_regions(&self, id: &BackupId) -> Vec<usize> {
        self.indices(|region| region.backups.contains_key(id))
    }

    /// Every visible backup once, oldest first within its timeline.
    #[must_use]
    pub fn backups(&self) -> BTreeMap<&BackupId, &Backup> {
        self.regions
            .iter()
            .rev()
            .flat_map(|region| &region.backups)
            .collect()
    }

    /// Every timeline of which there is WAL or a history, and those that a pulse names.
    #[must_use]
    pub fn timelines(&self) -> BTreeSet<TimelineId> {
        let listed = self
            .regions
            .iter()
            .flat_map(|region| region.timelines.keys().copied());
        listed
            .chain(
                self.regions
                    .iter()
                    .filter_map(|region| Some(region.pulse.as_ref()?.timeline)),
            )
            .collect()
    }

    /// The history of a timeline: the first one has none and needs none.
    #[must_use]
    pub fn history(&self, timeline: TimelineId) -> Option<History> {
        if timeline == TimelineId::FIRST {
            return Some(History::root(timeline));
        }
        self.history_file(timeline).map(|(history, _)| history.clone())
    }

    /// The history file of a timeline with its bytes.
    #[must_use]
    pub fn history_file(&self, timeline: TimelineId) -> Option<&(History, Vec<u8>)> {
        self.regions
            .iter()
            .find_map(|region| region.timelines.get(&timeline)?.history.as_ref())
    }

    /// The readable regions' histories of a timeline where they do not all tell the same descent; else nothing.
    #[must_use]
    pub fn differing_histories(&self, timeline: TimelineId) -> Vec<(&str, &History)> {
        let readable = self.regions.iter().filter(|region| region.is_readable());
        let copies: Vec<(&str, &History)> = readable
            .filter_map(|region| {
                let (history, _) = region.timelines.get(&timeline)?.history.as_ref()?;
                Some((region.name.as_str(), history))
            })
            .collect();
        let same = copies
            .windows(2)
            .all(|pair| matches!(pair, [(_, one), (_, other)] if descent(one).eq(descent(other))));
        if same { Vec::new() } else { copies }
    }

    /// The recorded gaps of a timeline, from all of the given regions, each once; that WAL cannot be replayed is true whichever
    /// region says so.
    #[must_use]
    pub fn gaps(&self, timeline: TimelineId, regions: &[usize]) -> Vec<Gap> {
        let views = self
            .regions
            .iter()
            .enumerate()
            .filter_map(|(index, region)| Some((index, region.timelines.get(&timeline)?)));
        let counts = |index, gap: &Gap| gap.unreplayable || regions.contains(&index);
        let mut gaps: Vec<Gap> = views
            .flat_map(|(index, view)| view.gaps.iter().filter(move |gap| counts(index, gap)).cloned())
            .collect();
        gaps.sort_by_key(|gap| (gap.start, gap.end));
        gaps.dedup_by_key(|gap| (gap.start, gap.end));
        gaps
    }

    /// What the given regions together cover of one timeline, without what any region has on record as unreplayable.
    #[must_use]
    pub fn coverage(&self, timeline: TimelineId, regions: &[usize]) -> Coverage {
        let views = regions
            .iter()
            .filter_map(|index| self.regions.get(*index)?.timelines.get(&timeline));
        let mut coverage: Coverage = views.flat_map(|view| view.coverage.pieces().copied()).collect();
        let all = self
            .regions
            .iter()
            .filter_map(|region| region.timelines.get(&timeline));
        let gaps = all.flat_map(|view| &view.gaps).filter(|gap| gap.unreplayable);
        gaps.for_each(|gap| coverage.exclude(gap.range()));
        coverage
    }

    /// The furthest that any of the given regions' pulses claims of a timeline: what it says is stored there. Listings
    /// that end before it have lost something, or were answered by a stale replica.
    #[must_use]
    pub fn claimed_end(&self, timeline: TimelineId, regions: &[usize]) -> Lsn {
        let pulses = regions
            .iter()
            .filter_map(|index| self.regions.get(*index)?.pulse.as_ref());
        pulses
            .filter(|pulse| pulse.timeline == timeline)
            .map(|pulse| pulse.stored_lsn)
            .max()
            .unwrap_or(Lsn::ZERO)
    }

    /// The WAL in the given regions that is not in the newest timeline's history.
    #[must_use]
    pub fn branches(&self, regions: &[usize]) -> Vec<Branch> {
        let known = self.timelines();
        let newest = known.iter().rev().find_map(|timeline| self.history(*timeline));
        // Where an ancestor was left, the newest one's history tells, too.
        let within = |timeline| history_within(newest.as_ref()?, timeline);
        let told = known
            .iter()
            .map(|timeline| self.history(*timeline).or_else(|| within(*timeline)));
        let histories: Vec<History> = told.flatten().collect();
        branches(&histories, |timeline, start| {
            self.coverage(timeline, regions).contiguous_end(start)
        })
    }

    /// The line of descent of a timeline over the WAL of the given regions.
    ///
    /// # Errors
    ///
    /// [`BrokenChain`] when its history file is missing or contradicts that of an ancestor.
    pub fn chain(&self, timeline: TimelineId, regions: &[usize]) -> Result<Chain, BrokenChain> {
        Chain::build(self, timeline, regions)
    }

    /// The recorded gap that explains a hole, if there is one.
    #[must_use]
    pub fn gap_for(&self, timeline: TimelineId, hole: LsnRange, regions: &[usize]) -> Option<Gap> {
        self.gaps(timeline, regions)
            .into_iter()
            .find(|gap| gap.range().intersect(hole).is_some())
    }

    /// The key of a piece.
    #[must_use]
    pub fn piece_key(&self, timeline: TimelineId, piece: &Piece) -> String {
        match piece.kind {
            PieceKind::Segment => {
                let size = self.identity.segment_size;
                self.layout
                    .segment(SegmentName::of(timeline, piece.range.start, size), size)
            }
            PieceKind::Tail => self.layout.tail(timeline, piece.range),
        }
    }

    fn indices(&self, which: impl Fn(&RegionView) -> bool) -> Vec<usize> {
        let numbered = self.regions.iter().enumerate();
        numbered
            .filter(|(_, region)| which(region))
            .map(|(index, _)| index)
            .collect()
    }
}
