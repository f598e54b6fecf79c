//! Asks the regions whether commits that wait may return.
//!
//! Runs only where commits are meant to wait. Asks until they may, and again when that changes; an archive without gaps costs one
//! listing per timeline, once.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use highwater_format::{BackupId, Gap, LsnRange, Time, TimelineId};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Told, Unended};
use crate::backup::list;
use crate::error::{AgentError, Result};
use crate::gap::{ended_by, read};
use crate::inventory::{gaps, timelines};
use crate::region::{Archive, Region};
use crate::state::State;

/// Between two questions while commits wait.
const EVERY: Duration = Duration::from_secs(2);

/// How long one region may take over an answer.
const ANSWER: Duration = Duration::from_secs(5);

/// For so long regions that do not answer are waited for: a gap may be on record in one of them alone. Not longer, because with a policy
/// that does without them commits go on.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
pub(crate) struct Asker {
    pub(crate) unended: Arc<Unended>,
    pub(crate) archive: Archive,
    /// In so many regions a gap has to be ended.
    pub(crate) needed: usize,
    pub(crate) state: State,
    pub(crate) cancel: CancellationToken,
}

impl Asker {
    /// Runs until cancelled.
    pub(crate) async fn run(self) -> Result<()> {
        let cancel = self.cancel.clone();
        cancel.run_until_cancelled(self.repeat()).await;
        Ok(())
    }

    async fn repeat(&self) {
        let mut may_return = self.unended.follow();
        loop {
            self.until_they_may().await;
            tracing::info!("commits that wait for the agent return as soon as their WAL is stored");
            self.show(false);
            if may_return.wait_for(|may| !*may).await.is_err() {
                return;
            }
        }
    }

    /// Returns when commits may.
    async fn until_they_may(&self) {
        let (began, may_return, mut said) = (Instant::now(), self.unended.follow(), false);
        loop {
            let told = self.ask().await;
            let all = told.len() == self.archive.regions.len() || began.elapsed() >= PATIENCE;
            if !told.is_empty() {
                self.unended.learn(&told, self.needed, all);
            }
            if *may_return.borrow() {
                return;
            }
            let gaps = self.unended.gaps();
            if !gaps.is_empty() && !std::mem::replace(&mut said, true) {
                let gaps: Vec<String> = gaps.iter().map(|gap| gap.range().to_string()).collect();
                tracing::warn!(
                    gaps = gaps.join(", "),
                    "COMMITS ARE HELD BACK: some may wait inside a gap, and return when a base backup that ends it is in as many regions as \
                     the policy asks for"
                );
                self.show(true);
            }
            sleep(EVERY).await;
        }
    }

    fn show(&self, held: bool) {
        self.state.update(|snapshot| snapshot.commits_held_back = held);
    }

    /// What the regions tell that answer.
    async fn ask(&self) -> Vec<Told> {
        let listed = self
            .each(|region| async move { self.listed_by(&region).await })
            .await;
        // The latest first: what ends that ends all.
        let mut all: Vec<Gap> = listed.iter().flat_map(|(_, gaps)| gaps).cloned().collect();
        all.extend(self.unended.gaps());
        all.sort_by_key(|gap| std::cmp::Reverse((gap.timeline, gap.end)));
        all.dedup_by_key(|gap| (gap.timeline, gap.end));
        let all = &all;
        let answered: Vec<usize> = listed.iter().map(|(index, _)| *index).collect();
        let answered = &answered;
        let backups = self.each(|region| async move {
            match answered.contains(&region.index) {
                true => self.ends(&region, all).await,
                false => Err(AgentError::Cancelled),
            }
        });
        let backups = backups.await;
        let is_open = |gap: &Gap| {
            backups
                .iter()
                .all(|(_, backups)| ended_by(gap, backups).is_none())
        };
        let mut told = Vec::new();
        for (index, backups) in &backups {
            let listed = listed.iter().filter(|(region, _)| region == index);
            let open = listed.flat_map(|(_, gaps)| gaps).filter(|gap| is_open(gap));
            told.push(Told {
                gaps: self.of_missing_wal(&self.archive.regions[*index], open).await,
                backups: backups.clone(),
            });
        }
        told
    }

    /// Puts a question to every region, and returns the answers that came in time.
    async fn each<T, F>(&self, question: impl Fn(Arc<Region>) -> F) -> Vec<(usize, T)>
    where
        F: Future<Output = Result<T>>,
    {
        let regions = self.archive.regions.iter().cloned();
        let asked = regions.map(|region| timeout(ANSWER, question(region)));
        let answers = join_all(asked).await.into_iter().enumerate();
        answers
            .filter_map(|(index, answer)| Some((index, answer.ok()?.ok()?)))
            .collect()
    }

    async fn listed_by(&self, region: &Region) -> Result<Vec<Gap>> {
        let (store, layout) = (&*region.quick, &self.archive.layout);
        let mut listed = Vec::new();
        for timeline in timelines(store, layout).await? {
            let ranges = gaps(store, layout, timeline).await?;
            listed.extend(ranges.into_iter().map(|range| by_its_key(timeline, range)));
        }
        Ok(listed)
    }

    /// Base backups of a region that end as many of these gaps as any do. Whether their records can be read is not asked: they may be
    /// in an archive tier.
    async fn ends(&self, region: &Region, gaps: &[Gap]) -> Result<Vec<BackupId>> {
        let mut found = Vec::new();
        for gap in gaps {
            if ended_by(gap, &found).is_none() {
                let (store, layout) = (&*region.quick, &self.archive.layout);
                found.extend(list::first_behind(store, layout, gap.timeline, gap.end).await?);
            }
        }
        Ok(found)
    }

    /// Those in which WAL is missing. Elsewhere it is archived and only cannot be replayed: no commit is in no region. A record that cannot
    /// be read may be of either.
    async fn of_missing_wal(&self, region: &Region, gaps: impl Iterator<Item = &Gap>) -> Vec<Gap> {
        let layout = &self.archive.layout;
        let mut missing = Vec::new();
        for gap in gaps {
            let key = layout.gap(gap.timeline, gap.range());
            match timeout(ANSWER, read(&*region.quick, layout, &key)).await {
                Ok(Ok(record)) if record.unreplayable => {}
                Ok(Ok(record)) => missing.push(record),
                _ => missing.push(gap.clone()),
            }
        }
        missing
    }
}

fn by_its_key(timeline: TimelineId, range: LsnRange) -> Gap {
    Gap {
        timeline,
        start: range.start,
        end: range.end,
        reason: String::new(),
        recorded_at: Time::UNIX_EPOCH,
        unreplayable: false,
    }
}

#[cfg(test)]
mod tests {
    use highwater_config::Policy;
    use highwater_format::Lsn;

    use super::*;
    use crate::gap::encode;
    use crate::test_world::{World, world};

    /// Whether commits may return after so long.
    async fn may_return_after(world: &World, seconds: u64) -> bool {
        let unended = Arc::new(Unended::default());
        let asker = Asker {
            unended: unended.clone(),
            archive: world.shared.archive.clone(),
            needed: 1,
            state: world.shared.state.clone(),
            cancel: CancellationToken::new(),
        };
        let asking = tokio::spawn(asker.run());
        sleep(Duration::from_secs(seconds)).await;
        asking.abort();
        *unended.follow().borrow()
    }

    fn hole() -> Gap {
        by_its_key(TimelineId::FIRST, LsnRange::new(Lsn(100), Lsn(200)))
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_gap_nobody_waits_and_for_a_silent_region_not_long() {
        let world = world(Policy::Any);
        assert!(may_return_after(&world, 1).await);
        world.silence(2);
        assert!(!may_return_after(&world, 5).await, "it may know of a gap");
        assert!(may_return_after(&world, 20).await);
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_gap_holds_commits_until_a_base_backup_is_there() {
        let world = world(Policy::Any);
        let layout = &world.shared.archive.layout;
        let (key, record) = encode(layout, &hole()).unwrap();
        world.put(1, &key, record.bytes).await;
        assert!(!may_return_after(&world, 20).await);
        let id = |lsn| BackupId::new(TimelineId::FIRST, Lsn(lsn), Time::UNIX_EPOCH);
        world.put(0, &layout.backup(&id(50)), "before it").await;
        world.put(0, &layout.pack(&id(300), 0), "not complete").await;
        assert!(!may_return_after(&world, 20).await);
        world.put(0, &layout.backup(&id(250)), "in another region").await;
        assert!(may_return_after(&world, 1).await);
    }

    #[tokio::test(start_paused = true)]
    async fn wal_that_only_cannot_be_replayed_holds_nobody_up_and_a_damaged_record_does() {
        let world = world(Policy::Any);
        let unreplayable = Gap {
            unreplayable: true,
            ..hole()
        };
        let (key, record) = encode(&world.shared.archive.layout, &unreplayable).unwrap();
        world.put(0, &key, record.bytes).await;
        assert!(may_return_after(&world, 1).await);
        world.put(0, &key, "rubbish").await;
        assert!(!may_return_after(&world, 20).await);
    }
}
