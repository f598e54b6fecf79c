//! `verify`: every object, every chain, every gap, in each region.
//!
//! Owns: what counts as damage and the report. Each region is judged by itself, because each must be able to restore what
//! it claims alone; then the regions are compared, because bytes under the same name must be the same everywhere. Does
//! not own: mending anything.

mod backup;
mod good;
mod holes;
mod wal;
mod writers;

use std::{collections::BTreeMap, fmt};

use futures::{StreamExt, stream};
use highwater_config::Exit;
use highwater_format::{Key, LsnRange, TimelineId, coverage::Piece, coverage::PieceKind};
use highwater_store::{Meta, list_all};
use serde::Serialize;

use crate::{
    catalog::{Catalog, Reading, RegionView},
    progress::Bar,
    regions::{Meaning, Region, meaning},
};

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verified {
    /// One line per region that was checked.
    pub regions: Vec<RegionCount>,
    /// Objects that cannot be trusted, and contradictions.
    pub damage: Vec<Problem>,
    /// WAL that is in no region in any form that can be used, because objects are damaged.
    pub lost: Vec<Problem>,
    /// WAL and objects that should be there and are not.
    pub missing: Vec<Problem>,
    /// What is worth knowing and not wrong.
    pub notes: Vec<Problem>,
    /// Regions and objects that could not be read: nothing is known of them.
    pub unreadable: Vec<Problem>,
}

/// How much was checked in a region.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RegionCount {
    /// The region.
    pub region: String,
    /// Objects read and found good.
    pub objects: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The region.
    pub region: String,
    /// The object, or the range.
    pub what: String,
    /// What is wrong.
    pub problem: String,
}

impl Problem {
    pub(crate) fn new(region: &str, what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            region: region.to_owned(),
            what: what.into(),
            problem: problem.into(),
        }
    }
}

impl Verified {
    /// Damage and holes are the answer "no"; a region that says nothing is trouble that may pass.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match (
            self.damage.is_empty() && self.missing.is_empty(),
            self.unreadable.is_empty(),
        ) {
            (false, _) => Exit::No,
            (true, false) => Exit::Trouble,
            (true, true) => Exit::Done,
        }
    }

    pub(crate) fn good(&mut self, index: usize, bytes: u64) {
        if let Some(count) = self.regions.get_mut(index) {
            count.objects += 1;
            count.bytes += bytes;
        }
    }

    /// Notes an object that the store did not deliver.
    pub(crate) fn failed(&mut self, region: &str, key: &str, error: &highwater_store::StoreError) {
        let problem = |what: String| Problem::new(region, key, what);
        match meaning(error) {
            Meaning::Absent => self.missing.push(problem(error.message().to_owned())),
            Meaning::Bad => self.damage.push(problem(error.message().to_owned())),
            // The object may be whole: what has to be done first is not `verify`'s to know.
            Meaning::Silent => {
                let told = format!("{} ({})", error.message(), error.next_step());
                self.unreadable.push(problem(told));
            }
        }
    }
}

/// One region with everything it lists.
pub(crate) struct Subject<'a> {
    pub(crate) index: usize,
    pub(crate) region: &'a Region,
    pub(crate) view: RegionView,
    /// Claims of writers, by epoch: a restore needs none, and an agent begins with them.
    pub(crate) writers: BTreeMap<u64, String>,
}

/// Reads and checks everything, `parallel` objects at a time.
pub async fn verify(catalog: &Catalog, regions: &[Region], parallel: usize) -> Verified {
    let mut found = Verified::default();
    for view in &catalog.regions {
        found.regions.push(RegionCount {
            region: view.name.clone(),
            ..RegionCount::default()
        });
        if let Reading::Unreadable { error } = &view.reading {
            found
                .unreadable
                .push(Problem::new(&view.name, &view.place, error));
        }
    }
    for finding in &catalog.findings {
        let region = finding.region.as_deref().unwrap_or("all");
        found
            .damage
            .push(Problem::new(region, &finding.key, &finding.problem));
    }
    let subjects = list_everything(catalog, regions, &mut found).await;
    let total = subjects
        .iter()
        .flat_map(|subject| subject.view.timelines.values());
    let bar = Bar::objects("verifying WAL", total.map(|view| view.pieces.len() as u64).sum());
    wal::verify(catalog, &subjects, parallel, &bar, &mut found).await;
    drop(bar);
    for subject in &subjects {
        backup::verify(catalog, &subjects, subject, parallel, &mut found).await;
        writers::verify(subject, parallel, &mut found).await;
    }
    backup::none(catalog, &mut found);
    found
}

/// Lists every region in full: the catalog leaves out what segment objects have made superfluous.
async fn list_everything<'a>(
    catalog: &Catalog,
    regions: &'a [Region],
    found: &mut Verified,
) -> Vec<Subject<'a>> {
    let readable = catalog.readable();
    let listings = readable.iter().filter_map(|index| {
        let region = regions.get(*index)?;
        let store = region.store()?.clone();
        let root = catalog.layout.root().to_owned();
        Some(async move { (*index, region, list_all(store.as_ref(), &root, None).await) })
    });
    let listings: Vec<_> = stream::iter(listings).buffered(8).collect().await;
    let mut subjects = Vec::new();
    for (index, region, listing) in listings {
        match listing {
            Ok(metas) => {
                let Some(view) = catalog.regions.get(index) else {
                    continue;
                };
                let mut view = view.clone();
                let mut writers = BTreeMap::new();
                for meta in metas {
                    if let Some(Key::Writer(epoch)) = catalog.layout.parse(&meta.key) {
                        writers.insert(epoch, meta.key);
                    } else {
                        sort_in(catalog, &mut view, &meta, found, index);
                    }
                }
                subjects.push(Subject {
                    index,
                    region,
                    view,
                    writers,
                });
            }
            Err(error) => found
                .unreadable
                .push(Problem::new(&region.name, &region.place, error.to_string())),
        }
    }
    subjects
}

fn sort_in(catalog: &Catalog, view: &mut RegionView, meta: &Meta, found: &mut Verified, index: usize) {
    let size = catalog.identity.segment_size;
    let mut piece = |timeline: TimelineId, range: LsnRange, kind| {
        let piece = Piece {
            range,
            kind,
            size: meta.size,
        };
        view.timelines.entry(timeline).or_default().insert(piece);
    };
    match catalog.layout.parse(&meta.key) {
        Some(Key::Segment(name)) => match name.resolve(size) {
            Some(segment) => piece(name.timeline, segment.range(size), PieceKind::Segment),
            None => {
                let problem = "no segment of this size has that name";
                found.damage.push(Problem::new(&view.name, &meta.key, problem));
            }
        },
        Some(Key::Tail(timeline, range)) => piece(timeline, range, PieceKind::Tail),
        // Read with the catalog, which keeps what was wrong with them.
        Some(Key::Identity | Key::History(_) | Key::Gap(..) | Key::Pulse | Key::Backup(_)) => {
            found.good(index, meta.size);
        }
        // Read of each finished backup; claims of writers are read on their own.
        Some(Key::Pack(..) | Key::Manifest(_) | Key::Writer(_)) => {}
        // What is left of the question whether the store honours conditional writes.
        None if meta.key.contains("/probe/") => {}
        None => found.notes.push(Problem::new(
            &view.name,
            &meta.key,
            "this release does not know what that is",
        )),
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for count in &self.regions {
            let bytes = crate::report::bytes(count.bytes);
            writeln!(
                f,
                "region {}: {} objects, {bytes} good",
                count.region, count.objects
            )?;
        }
        let groups = [
            ("damaged", &self.damage),
            ("LOST", &self.lost),
            ("missing", &self.missing),
            ("not readable", &self.unreadable),
            ("note", &self.notes),
        ];
        for (label, problems) in groups {
            for problem in problems {
                writeln!(
                    f,
                    "{label}: region {}: {}: {}",
                    problem.region, problem.what, problem.problem
                )?;
            }
        }
        match self.exit() {
            Exit::Done => writeln!(f, "everything is whole"),
            Exit::No => writeln!(f, "the archive is NOT whole"),
            _ => writeln!(f, "what could be read is whole, and not everything could be read"),
        }
    }
}
