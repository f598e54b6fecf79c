//! Reads the catalog from the stores.
//!
//! Owns: which listings and small documents are read, and in which order. Keys sort by LSN, so whole directories are
//! stepped over and tail chunks are listed only where segment objects leave holes: an archive of a month costs a few
//! dozen calls. The pulse is read first, so that what it claims must be in the listings that follow.
//!
//! Does not own: judging what was found (`plan`).

use std::collections::BTreeSet;

use futures::future::join_all;
use highwater_format::{
    BackupId, ClusterName, Document, FormatError, History, Identity, Key, Layout, Lsn, LsnRange, SegmentSize,
    SystemId, TimelineId, decode,
};
use highwater_store::{Store, StoreError, list_all, list_parts};

use super::{
    Catalog, Finding, Reading, RegionView, combine,
    lineages::{Silence, choose, lineages, refuse_all_silent},
    wal,
};
use crate::{
    error::RestoreError,
    regions::{Meaning, Region, is_newer, meaning},
};

/// Reads everything but bulk data of one lineage of `cluster`.
///
/// # Errors
///
/// No region can be read, there is no such archive, the lineage is ambiguous, or its identity cannot be trusted.
pub async fn read(
    regions: &[Region],
    cluster: &ClusterName,
    wanted: Option<SystemId>,
) -> Result<Catalog, RestoreError> {
    let lineages = join_all(regions.iter().map(|region| lineages(region, cluster))).await;
    refuse_all_silent(regions, &lineages)?;
    let found: BTreeSet<SystemId> = lineages.iter().flatten().flatten().copied().collect();
    let system_id = choose(regions, cluster, &found, wanted, &lineages).await?;
    let layout = Layout::new(cluster.clone(), system_id);
    let silent = |index: usize| lineages.get(index).and_then(|read| read.as_ref().err()).cloned();
    let views = regions
        .iter()
        .enumerate()
        .map(|(index, region)| view(region, &layout, silent(index)));
    let read = join_all(views).await;
    let others = found.into_iter().filter(|other| *other != system_id).collect();
    combine::combine(layout, others, read)
}

/// What one region said, and what was wrong with it.
pub(super) struct Read {
    pub(super) view: RegionView,
    pub(super) identity: Option<Identity>,
    pub(super) findings: Vec<Finding>,
    /// It answered, and holds objects without the identity that says what they are: asking again changes nothing.
    pub(super) lacks_identity: bool,
}

/// Everything one region shows; a region that stops answering half-way is unreadable, not half empty.
async fn view(region: &Region, layout: &Layout, silent: Option<Silence>) -> Read {
    let blank = |reading| Read {
        view: RegionView::new(region.name.clone(), region.place.clone(), reading),
        identity: None,
        findings: Vec::new(),
        lacks_identity: false,
    };
    if let Some(silence) = silent {
        return blank(Reading::Unreadable { error: silence.error });
    }
    let Some(store) = region.store() else {
        return blank(Reading::LeftOut);
    };
    let mut reader = RegionReader {
        store: store.as_ref(),
        layout,
        read: blank(Reading::Readable),
    };
    match reader.fill().await {
        Ok(()) => reader.read,
        Err(error) => blank(Reading::Unreadable {
            error: error.to_string(),
        }),
    }
}

pub(super) struct RegionReader<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) layout: &'a Layout,
    pub(super) read: Read,
}

impl RegionReader<'_> {
    async fn fill(&mut self) -> Result<(), StoreError> {
        self.read.view.pulse = self.document(&self.layout.pulse()).await?;
        self.read.identity = self.document(&self.layout.identity()).await?;
        if let Some(size) = self.read.identity.as_ref().map(|identity| identity.segment_size) {
            self.timelines(size).await?;
            return self.backups().await;
        }
        // Without its identity nothing of a region can be interpreted. Where there is nothing at all, too, it may be the
        // wrong place (a directory that is not mounted), and what it should hold is not known: no witness of an end.
        let root = self.layout.root();
        let page = self.store.list(root, None, 1).await?;
        let error = if page.entries.is_empty() {
            format!(
                "there is nothing under {root}: the region is new or was emptied, its url is wrong, or its directory is not mounted"
            )
        } else {
            self.read.lacks_identity = true;
            format!("{} is missing or cannot be used", self.layout.identity())
        };
        self.read.view.reading = Reading::Unreadable { error };
        Ok(())
    }

    async fn timelines(&mut self, size: SegmentSize) -> Result<(), StoreError> {
        let directory = self.layout.wal_dir();
        let parts = list_parts(self.store, &directory).await?;
        let timelines = parts.iter().filter_map(|(name, _)| TimelineId::from_hex8(name));
        for timeline in timelines.collect::<BTreeSet<_>>() {
            let mut view =
                wal::pieces(self.store, self.layout, timeline, size, self.claimed(timeline)).await?;
            view.history = self.history(timeline).await?;
            for meta in list_all(self.store, &self.layout.gap_dir(timeline), None).await? {
                if let Some(Key::Gap(..)) = self.layout.parse(&meta.key) {
                    view.gaps.extend(self.document(&meta.key).await?);
                }
            }
            self.read.view.timelines.insert(timeline, view);
        }
        Ok(())
    }

    fn claimed(&self, timeline: TimelineId) -> Lsn {
        let pulse = self
            .read
            .view
            .pulse
            .as_ref()
            .filter(|pulse| pulse.timeline == timeline);
        pulse.map_or(Lsn::ZERO, |pulse| pulse.stored_lsn)
    }

    async fn history(&mut self, timeline: TimelineId) -> Result<Option<(History, Vec<u8>)>, StoreError> {
        let key = self.layout.history(timeline);
        let Some(bytes) = self.bytes(&key).await? else {
            return Ok(None);
        };
        match whole_history(timeline, &bytes) {
            Ok(history) => Ok(Some((history, bytes.to_vec()))),
            Err(problem) => {
                self.finding(key, problem, false);
                Ok(None)
            }
        }
    }

    /// The commit mark sorts before everything else of its backup, so the first key of each tells; unless somebody
    /// else's sorts before it (`.DS_Store`, the empty object of a "directory"), and then it is looked up.
    async fn backups(&mut self) -> Result<(), StoreError> {
        let directory = self.layout.base_dir();
        for (name, first) in list_parts(self.store, &directory).await? {
            let Ok(id) = BackupId::parse(&name) else { continue };
            let mark = self.layout.backup(&id);
            if first != mark && !self.exists(&mark).await? {
                self.read.view.unfinished.insert(id);
                continue;
            }
            let Some(backup) = self.document::<highwater_format::Backup>(&mark).await? else {
                continue;
            };
            if backup.id == id && backup.system_id == self.layout.system_id() {
                self.read.view.backups.insert(id, backup);
            } else {
                let found = format!("it is about backup {} of system {}", backup.id, backup.system_id);
                self.finding(mark, found, false);
            }
        }
        Ok(())
    }

    async fn exists(&self, key: &str) -> Result<bool, StoreError> {
        match self.store.head(key).await {
            Ok(_) => Ok(true),
            Err(error) if meaning(&error) == Meaning::Absent => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn document<T: Document>(&mut self, key: &str) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.bytes(key).await? else {
            return Ok(None);
        };
        match decode::<T>(&bytes) {
            Ok(document) => Ok(Some(document)),
            Err(error) => {
                self.bad(key, &error);
                Ok(None)
            }
        }
    }

    async fn bytes(&mut self, key: &str) -> Result<Option<bytes::Bytes>, StoreError> {
        match self.store.get(key).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) => match meaning(&error) {
                Meaning::Absent => Ok(None),
                Meaning::Bad => {
                    self.finding(key.to_owned(), error.message().to_owned(), false);
                    Ok(None)
                }
                Meaning::Silent => Err(error),
            },
        }
    }

    fn bad(&mut self, key: &str, error: &FormatError) {
        self.finding(key.to_owned(), error.to_string(), is_newer(error.kind()));
    }

    fn finding(&mut self, key: String, problem: String, newer_format: bool) {
        let region = Some(self.read.view.name.clone());
        self.read.findings.push(Finding {
            region,
            key,
            problem,
            newer_format,
        });
    }
}

/// Reads a history file. PostgreSQL writes none without an ancestor: one that names none was cut off, and would make its
/// timeline a beginning without a past.
pub(crate) fn whole_history(timeline: TimelineId, bytes: &[u8]) -> Result<History, String> {
    let history = History::parse(timeline, bytes).map_err(|error| error.to_string())?;
    if history.entries.is_empty() && timeline != TimelineId::FIRST {
        return Err(format!(
            "{} bytes that name no ancestor of timeline {timeline}",
            bytes.len()
        ));
    }
    Ok(history)
}

/// The ranges of `coverage` in which tail chunks matter.
pub(super) fn open_ranges(runs: &[LsnRange]) -> Vec<LsnRange> {
    let mut at = Lsn::ZERO;
    let mut open = Vec::new();
    for run in runs {
        if at < run.start {
            open.push(LsnRange::new(at, run.start));
        }
        at = run.end;
    }
    open.push(LsnRange::new(at, Lsn::MAX));
    open
}
