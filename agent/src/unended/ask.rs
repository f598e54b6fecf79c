//! Asks the regions whether commits that wait may return.
//!
//! Runs only where commits are meant to wait. Asks until they may, and again when that changes; an archive without gaps costs one
//! listing per timeline, once.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use highwater_format::{BackupId, Gap, Lsn, LsnRange, Time, TimelineId};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Told, Unended};
use crate::backup::list;
use crate::error::{AgentError, Result};
use crate::gap::{ended_by, read};
use crate::inventory::{gaps, timelines};
use crate::progress::Progress;
use crate::region::{Archive, Region};
use crate::state::State;

/// Between two questions while commits wait.
const EVERY: Duration = Duration::from_secs(2);

/// How long one region may take over an answer at first.
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
    pub(crate) progress: Arc<Progress>,
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
        let may_return = self.unended.follow();
        let (mut question, mut since, mut said) = (self.unended.question(), Instant::now(), false);
        loop {
            if std::mem::replace(&mut question, self.unended.question()) != question {
                since = Instant::now();
            }
            // Whoever needs longer gets it the next time.
            let told = self.ask(since.elapsed().max(ANSWER)).await;
            let answered: Vec<usize> = told.iter().map(|(region, _)| *region).collect();
            let told: Vec<Told> = told.into_iter().map(|(_, told)| told).collect();
            let is_late = since.elapsed() >= PATIENCE;
            let all = self.speak_for_all(&answered, is_late).then_some(question);
            self.unended.learn(&told, self.needed, all);
            if *may_return.borrow() {
                return;
            }
            let gaps = self.unended.gaps();
            let held = self.state.snapshot().synchronous.is_waited_for() && (is_late || !gaps.is_empty());
            self.show(held);
            if held && !std::mem::replace(&mut said, true) {
                say(&gaps);
            }
            sleep(EVERY).await;
        }
    }

    /// Whether what these regions tell is all that matters. Not where none of them holds what the stream goes on behind: a region alone may
    /// have got past a gap.
    fn speak_for_all(&self, answered: &[usize], is_late: bool) -> bool {
        if answered.len() == self.archive.regions.len() {
            return true;
        }
        let furthest = self.progress.furthest();
        let holds_it = |region: &usize| furthest.is_none() || self.progress.position(*region) == furthest;
        is_late && answered.iter().any(holds_it)
    }

    fn show(&self, held: bool) {
        self.state.update(|snapshot| snapshot.commits_held_back = held);
    }

    /// What the regions tell that answer.
    async fn ask(&self, patience: Duration) -> Vec<(usize, Told)> {
        let listed = self.each(patience, |region| async move { self.listed_by(&region).await });
        let listed = listed.await;
        // The latest first: what ends that ends all.
        let mut all: Vec<Gap> = listed.iter().flat_map(|(_, gaps)| gaps).cloned().collect();
        all.extend(self.unended.gaps());
        all.sort_by_key(|gap| std::cmp::Reverse((gap.timeline, gap.end)));
        all.dedup_by_key(|gap| (gap.timeline, gap.end));
        let all = &all;
        let answered: Vec<usize> = listed.iter().map(|(index, _)| *index).collect();
        let answered = &answered;
        let backups = self.each(patience, |region| async move {
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
            let own = listed.flat_map(|(_, gaps)| gaps);
            let open =
                own.filter(|gap| is_open(gap) || (!backups.is_empty() && ended_by(gap, backups).is_none()));
            let gaps = self.of_missing_wal(&self.archive.regions[*index], open).await;
            let backups = backups.clone();
            told.push((*index, Told { gaps, backups }));
        }
        told
    }

    /// Puts a question to every region, and returns the answers that came in time.
    async fn each<T, F>(&self, patience: Duration, question: impl Fn(Arc<Region>) -> F) -> Vec<(usize, T)>
    where
        F: Future<Output = Result<T>>,
    {
        let regions = self.archive.regions.iter().cloned();
        let asked = regions.map(|region| timeout(patience, question(region)));
        let answers = join_all(asked).await.into_iter().enumerate();
        answers
            .filter_map(|(index, answer)| Some((index, answer.ok()?.ok()?)))
            .collect()
    }

    async fn listed_by(&self, region: &Region) -> Result<Vec<Gap>> {
        let (store, layout) = (&*region.quick, &self.archive.layout);
        let listed = timelines(store, layout)
            .await?
            .into_iter()
            .map(|timeline| async move {
                let ranges = gaps(store, layout, timeline).await?;
                Ok::<_, AgentError>(ranges.into_iter().map(move |range| by_its_key(timeline, range)))
            });
        Ok(try_join_all(listed).await?.into_iter().flatten().collect())
    }

    /// Base backups of a region that end as many of these gaps as any do, and where that is not all, its first. Whether their records can
    /// be read is not asked: they may be in an archive tier.
    async fn ends(&self, region: &Region, gaps: &[Gap]) -> Result<Vec<BackupId>> {
        let (store, layout) = (&*region.quick, &self.archive.layout);
        let mut found = Vec::new();
        for gap in gaps {
            if ended_by(gap, &found).is_none() {
                found.extend(list::first_behind(store, layout, gap.timeline, gap.end).await?);
            }
        }
        if gaps.iter().any(|gap| ended_by(gap, &found).is_none()) {
            found.extend(list::first_behind(store, layout, TimelineId::FIRST, Lsn::ZERO).await?);
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

fn say(gaps: &[Gap]) {
    if gaps.is_empty() {
        tracing::warn!(
            "COMMITS ARE HELD BACK: it is not known yet whether some wait inside a gap; the regions are asked again"
        );
        return;
    }
    let gaps: Vec<String> = gaps.iter().map(|gap| gap.range().to_string()).collect();
    tracing::warn!(
        gaps = gaps.join(", "),
        "COMMITS ARE HELD BACK: some may wait inside a gap, and return when a base backup that ends it is in as many regions as the policy \
         asks for"
    );
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

    use super::*;
    use crate::frontier::Position;
    use crate::gap::encode;
    use crate::test_world::{World, world};

    /// Whether commits may return after so long.
    async fn may_return_after(world: &World, seconds: u64) -> bool {
        may_return_where(world, 1, seconds).await
    }

    /// The same where a gap has to be ended in so many regions.
    async fn may_return_where(world: &World, needed: usize, seconds: u64) -> bool {
        let unended = Arc::new(Unended::default());
        let asker = Asker {
            unended: unended.clone(),
            archive: world.shared.archive.clone(),
            needed,
            progress: world.shared.progress.clone(),
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
    async fn the_region_that_has_got_furthest_is_not_done_without() {
        let world = world(Policy::Any);
        let at = |lsn| Position {
            timeline: TimelineId::FIRST,
            lsn: Lsn(lsn),
        };
        world.shared.progress.stored(0, at(100));
        world.shared.progress.stored(2, at(500));
        world.silence(2);
        assert!(
            !may_return_after(&world, 60).await,
            "it alone may have got past a gap"
        );
        world.shared.progress.stored(1, at(500));
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
    async fn a_base_backup_in_one_region_is_not_enough_where_two_are_needed() {
        let world = world(Policy::All);
        let layout = &world.shared.archive.layout;
        let id = |lsn| BackupId::new(TimelineId::FIRST, Lsn(lsn), Time::UNIX_EPOCH);
        let (key, record) = encode(layout, &hole()).unwrap();
        for region in 0..2 {
            world.put(region, &key, record.bytes.clone()).await;
        }
        world.put(0, &layout.backup(&id(250)), "behind it").await;
        assert!(
            may_return_where(&world, 2, 1).await,
            "the other may have been emptied since"
        );
        world.put(1, &layout.backup(&id(50)), "before it").await;
        assert!(!may_return_where(&world, 2, 20).await);
        assert!(may_return_where(&world, 1, 1).await);
        world.put(1, &layout.backup(&id(250)), "behind it").await;
        assert!(may_return_where(&world, 2, 1).await);
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
