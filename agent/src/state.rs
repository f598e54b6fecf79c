//! What the agent knows about itself, for everyone who asks: admin routes, metrics, status, logs.
//!
//! Owns one [`Snapshot`] behind a watch channel; tasks publish their own part with [`State::update`].
//! Nothing that decides about data reads from here: the frontier, the window and the regions keep their
//! own truth, and this is its shadow.

use std::sync::Arc;

use highwater_format::{Branch, Gap, Lsn, LsnRange, SystemId, Time, TimelineId};
use serde::Serialize;
use tokio::sync::watch;

use crate::branches::common_end;
use crate::clock::Stamp;
use crate::lease::Moment;
use crate::synchronous::Role;

/// How the agent stands with PostgreSQL.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "detail")]
pub enum Connection {
    /// Not connected yet.
    #[default]
    Starting,
    /// WAL is being received.
    Streaming,
    /// Connected, but nothing is read: the memory budget is spent because storage does not keep up.
    Throttled,
    /// The connection was lost or refused; a new one is tried. The text says why.
    Reconnecting(String),
    /// Told to stop: the last bytes are being stored.
    Stopping,
    /// The agent cannot go on until somebody acts. The text says why and what to do.
    Stopped(String),
}

/// How a region does.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RegionState {
    /// Its content is being read.
    #[default]
    Starting,
    /// It takes what it is given.
    Ok,
    /// It works, but lacks WAL that another region has; it is being filled from there.
    CatchingUp,
    /// The last call failed; it is tried again.
    Failing,
}

/// What a region lacks below its position and another one has, as the last comparison found.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Lacks {
    /// Bytes of WAL.
    pub wal_bytes: u64,
    /// Objects that have to be copied.
    pub objects: u64,
    /// Base backups that are not visible here.
    pub backups: u64,
    /// The region had some of it before: something outside the agent removed it.
    pub lost: bool,
    /// Of the WAL, bytes that are damaged wherever else they are, so that they cannot be filled in.
    pub damaged_bytes: u64,
    /// In words: which WAL and which base backups, and what is done about it.
    pub detail: Option<String>,
}

/// One region's part of a [`Snapshot`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct RegionView {
    /// Name from the configuration.
    pub name: String,
    /// End of the region's own gap-free WAL on its newest timeline: of the run that is being appended to. What
    /// is missing before that run is in `lacks`.
    pub stored: Lsn,
    /// Timeline of `stored`; none before the region was read.
    pub timeline: Option<TimelineId>,
    /// How it does: the worst of what its pipeline, its calls and the looks at the writer claims say.
    pub state: RegionState,
    /// Text of the last error of what is worse, cleared by the next success of the same.
    pub last_error: Option<String>,
    /// What the region's pipeline says: a call that succeeds does not cure it.
    #[serde(skip)]
    pub(crate) pipeline: (RegionState, Option<String>),
    /// The last error of the calls, none while they succeed.
    #[serde(skip)]
    pub(crate) calls: Option<String>,
    /// Why nothing is stored there although it would be taken: another writer may have this one's place.
    #[serde(skip)]
    pub(crate) beside: Option<String>,
    /// WAL that was acknowledged, that no region lists any more, and that the region went on behind.
    #[serde(skip)]
    pub(crate) passed: Vec<(TimelineId, LsnRange)>,
    /// How often it was noticed that somebody had emptied it.
    #[serde(skip)]
    pub(crate) emptied: u32,
    /// Why it cannot be filled beyond `stored` although others hold more, and what to do; none when it can.
    pub blocked: Option<String>,
    /// Calls that had to be repeated since the start.
    pub retries: u64,
    /// Objects stored since the start.
    pub objects: u64,
    /// Bytes of these objects.
    pub bytes: u64,
    /// What it lacks below `stored`; empty before the first comparison.
    pub lacks: Lacks,
    /// The agent's clock when it was last compared with the other regions.
    pub compared_at: Option<Time>,
    /// Objects copied from another region since the start because they were missing here.
    pub healed_objects: u64,
    /// Bytes of these objects.
    pub healed_bytes: u64,
}

/// The newest base backup that the agent knows of.
#[derive(Clone, Debug, Serialize)]
pub struct LastBackup {
    /// Its id; none for an attempt that failed before it had one.
    pub id: Option<String>,
    /// When it ended.
    pub finished_at: Time,
    /// Why it failed; none when it succeeded.
    pub error: Option<String>,
    /// Plain bytes.
    pub bytes: u64,
}

/// What is on record as lost.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Gaps {
    /// Records.
    pub recorded: usize,
    /// Of these, gaps that no base backup has ended yet: nothing behind them can be restored.
    pub open: usize,
    /// The newest.
    pub last: Option<Gap>,
}

/// The slot, as the server shows it.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct SlotView {
    /// WAL that the server keeps for it.
    pub held_bytes: u64,
    /// WAL that may still be written before the server gives the slot up or the disk is full; none if not known.
    pub room_bytes: Option<u64>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// By how much `held_bytes` grows.
    pub growth_bytes_per_second: u64,
    /// When the room is used up at that rate; none: never, or not known.
    pub seconds_until_full: Option<u64>,
}

/// That the slot was given up.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct GivenUp {
    /// How often since the start.
    pub times: u64,
    /// The last time.
    pub at: Time,
    /// Why.
    pub reason: String,
    /// The archive has not been current since.
    pub is_felt: bool,
}

/// Everything at one moment. `received >= sealed >= stored(region)`, and `durable` is what the policy
/// makes of the regions' positions.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Snapshot {
    /// Name of the cluster that is archived.
    pub cluster: String,
    /// Its system identifier; none before the server was asked.
    pub system_id: Option<SystemId>,
    /// The server is in recovery: this agent is a second stream and not the archive's writer.
    pub standby: bool,
    /// What the server's `synchronous_standby_names` makes of this agent.
    pub synchronous: Role,
    /// Commits that wait for the agent wait for a base backup that ends a gap, too.
    pub commits_held_back: bool,
    /// The epoch of this agent's claim; 0 while it has none.
    pub writer_epoch: u64,
    /// WAL in the archive that the newest timeline never had.
    pub branches: Vec<Branch>,
    /// Timeline that is being streamed.
    pub timeline: Option<TimelineId>,
    /// End of what was received.
    pub received: Lsn,
    /// The server's own end of WAL, from its last message.
    pub server_end: Lsn,
    /// The server's clock in its last message.
    pub server_time: Option<Time>,
    /// The agent's clock when its server, no standby, last answered a question beside the stream, which may not get on meanwhile.
    pub answered_at: Option<Time>,
    /// End of what was sealed into objects.
    pub sealed: Lsn,
    /// The high-water mark: nothing before it can be lost any more.
    pub durable: Lsn,
    /// Timeline of `durable`, which may be an older one than is streamed; none before anything was durable.
    pub durable_timeline: Option<TimelineId>,
    /// Time of the newest commit at or before `durable`.
    pub durable_commit: Option<Time>,
    /// Time of the newest commit that was received.
    pub received_commit: Option<Time>,
    /// The last moment of which it is known that all is durable that the server had then.
    pub current_at: Option<Stamp>,
    /// What the server had at a later moment, until all of that is durable.
    #[serde(skip)]
    pub(crate) awaited: Option<(TimelineId, Lsn, Stamp)>,
    /// In how many regions WAL must be stored to count as durable.
    pub needed: usize,
    /// Every region, in the order of the configuration.
    pub regions: Vec<RegionView>,
    /// How the agent stands with PostgreSQL.
    pub connection: Connection,
    /// WAL received since the start, in bytes.
    pub received_bytes: u64,
    /// Bytes of WAL in memory, plain and sealed.
    pub memory_used: u64,
    /// The bound of `memory_used`.
    pub memory_limit: u64,
    /// A damaged WAL record that the server sent: where and what.
    pub wal_damage: Option<String>,
    /// Newest base backup.
    pub last_backup: Option<LastBackup>,
    /// WAL that is on record as lost; none until a region was read.
    pub gaps: Option<Gaps>,
    /// What the server keeps for the slot; none while it cannot be asked.
    pub slot: Option<SlotView>,
    /// The last time the slot was given up by the outage policy.
    pub given_up: Option<GivenUp>,
    /// Start of the agent.
    pub started_at: Option<Time>,
    /// The same by the clock that nobody sets.
    #[serde(skip)]
    pub(crate) begun: Option<Moment>,
}

/// Shared, cheap to clone.
#[derive(Clone, Debug)]
pub struct State {
    cell: Arc<watch::Sender<Snapshot>>,
}

impl RegionView {
    /// Notes how the region's pipeline does, and why not better. Only the pipeline itself says so.
    pub fn pipeline(&mut self, state: RegionState, why: Option<String>) {
        self.pipeline = (state, why);
        self.show();
    }

    /// How the pipeline does, whatever the calls say.
    pub fn pipeline_state(&self) -> RegionState {
        self.pipeline.0
    }

    /// Notes that calls fail, or that they succeed again.
    pub fn calls(&mut self, error: Option<String>) {
        self.calls = error;
        self.show();
    }

    /// Whether the last calls failed.
    pub fn calls_fail(&self) -> bool {
        self.calls.is_some()
    }

    /// Notes that nothing is stored because another writer may live, or that this is over.
    pub fn beside(&mut self, why: Option<String>) {
        self.beside = why;
        self.show();
    }

    fn show(&mut self) {
        let (state, why) = self.pipeline.clone();
        (self.state, self.last_error) = match self.calls.as_ref().or(self.beside.as_ref()) {
            Some(error) if state != RegionState::Failing => (RegionState::Failing, Some(error.clone())),
            _ => (state, why),
        };
    }
}

impl Snapshot {
    /// What the server has that is not durable, in bytes: see [`Snapshot::lag_of`].
    pub fn lag_of_durable(&self) -> Option<u64> {
        self.lag_of(self.durable_timeline, self.durable)
    }

    /// What the server has beyond `position`, in bytes. `None` as long as one of the two is not known: the server has
    /// said nothing yet, or no WAL was found or stored yet; and where `position` lies on an older timeline, behind the
    /// place where that was left, as far as that place is known.
    pub fn lag_of(&self, timeline: Option<TimelineId>, position: Lsn) -> Option<u64> {
        let elsewhere = timeline != self.timeline;
        let common = common_end(&self.branches, timeline, position, self.timeline);
        let known = self.server_end > Lsn::ZERO && position > Lsn::ZERO;
        let is_told = known && !(elsewhere && common > self.server_end);
        is_told.then(|| self.server_end.distance_from(common))
    }

    /// Sees up to which moment the archive is current. Under a load that never pauses there is always WAL that is not durable
    /// yet; what the server had a moment ago is.
    pub(crate) fn look(&mut self, now: Stamp) {
        let Some(timeline) = self.timeline.filter(|_| self.server_end > Lsn::ZERO) else {
            return;
        };
        if self.received >= self.server_end && self.is_all_durable() {
            self.awaited = None;
            self.note_current(now);
            return;
        }
        // A moment of another timeline says nothing of this one.
        self.awaited.take_if(|(of, ..)| *of != timeline);
        let on_it = self.durable_timeline == Some(timeline);
        let reached = self.awaited.take_if(|(_, end, _)| on_it && self.durable >= *end);
        if let Some((.., at)) = reached {
            self.note_current(at);
        }
        self.awaited.get_or_insert((timeline, self.server_end, now));
    }

    fn note_current(&mut self, at: Stamp) {
        self.current_at = Some(at);
        if let Some(given_up) = &mut self.given_up {
            given_up.is_felt = false;
        }
    }

    /// Notes that the slot was given up. What the server had at an earlier moment is not awaited any more: that it becomes
    /// durable does not say that the archive is current again.
    pub(crate) fn gave_up(&mut self, at: Time, reason: String) {
        let times = self.given_up.as_ref().map_or(0, |before| before.times) + 1;
        self.awaited = None;
        self.given_up = Some(GivenUp {
            times,
            at,
            reason,
            is_felt: true,
        });
    }

    /// Whether all that was received on this timeline is durable. A position on another one says nothing of it.
    pub fn is_all_durable(&self) -> bool {
        self.durable_timeline == self.timeline && self.durable >= self.received
    }
}

impl State {
    /// A state in which nothing is known but the regions' names.
    pub fn new(regions: impl IntoIterator<Item = String>) -> Self {
        let regions = regions
            .into_iter()
            .map(|name| RegionView {
                name,
                ..RegionView::default()
            })
            .collect();
        let (sender, _) = watch::channel(Snapshot {
            regions,
            begun: Some(Moment::now()),
            ..Snapshot::default()
        });
        Self {
            cell: Arc::new(sender),
        }
    }

    /// Changes the snapshot.
    pub fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        self.cell.send_modify(change);
    }

    /// Changes the snapshot without waking those who follow it; the next [`State::update`] does.
    pub fn update_quietly(&self, change: impl FnOnce(&mut Snapshot)) {
        self.cell.send_if_modified(|snapshot| {
            change(snapshot);
            false
        });
    }

    /// Changes one region's part; an unknown index changes nothing.
    pub fn update_region(&self, index: usize, change: impl FnOnce(&mut RegionView)) {
        self.cell.send_modify(|snapshot| {
            if let Some(view) = snapshot.regions.get_mut(index) {
                change(view);
            }
        });
    }

    /// A copy of the snapshot.
    pub fn snapshot(&self) -> Snapshot {
        self.cell.borrow().clone()
    }

    /// Follows the changes.
    pub fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.cell.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::Clock;

    fn at(second: u64) -> Time {
        Time::from_unix_micros(i64::try_from(second).unwrap() * 1_000_000)
    }

    fn stamp(second: u64) -> Stamp {
        Clock::held_at(at(second)).stamp()
    }

    /// Every second 10 bytes more, each durable two seconds later: never all at once.
    #[test]
    fn the_archive_is_current_under_a_load_that_never_pauses() {
        let timeline = Some(TimelineId::FIRST);
        let current = |snapshot: &Snapshot| snapshot.current_at.map(|at| at.time);
        let mut snapshot = Snapshot {
            timeline,
            durable_timeline: timeline,
            ..Snapshot::default()
        };
        for second in 10..200 {
            snapshot.server_end = Lsn(second * 10);
            snapshot.received = snapshot.server_end;
            snapshot.durable = Lsn(second * 10 - 20);
            snapshot.look(stamp(second));
        }
        let reached = current(&snapshot).unwrap();
        assert!(reached >= at(195) && reached < at(198), "{reached}");
        // What follows it does not hide that it stands still.
        for second in 200..300 {
            snapshot.server_end = Lsn(second * 10);
            snapshot.received = snapshot.server_end;
            snapshot.look(stamp(second));
        }
        assert!(current(&snapshot) < Some(at(198)));
        // All that was received is durable, and the server has more.
        snapshot.server_end = Lsn(5_000);
        snapshot.durable = snapshot.received;
        snapshot.look(stamp(300));
        assert!(current(&snapshot) < Some(at(200)));
        // Another timeline begins anew.
        let before = current(&snapshot);
        snapshot.timeline = TimelineId::new(2);
        snapshot.look(stamp(301));
        snapshot.durable = Lsn(9_999);
        snapshot.look(stamp(302));
        assert_eq!(current(&snapshot), before);
        snapshot.durable_timeline = snapshot.timeline;
        snapshot.look(stamp(303));
        assert_eq!(current(&snapshot), Some(at(301)));
    }

    /// The clock was two hours fast, is set right when the slot is given up, and then once more by some seconds.
    #[tokio::test(start_paused = true)]
    async fn what_became_of_the_archive_since_does_not_depend_on_the_wall_clock() {
        let timeline = Some(TimelineId::FIRST);
        let mut snapshot = Snapshot {
            timeline,
            durable_timeline: timeline,
            server_end: Lsn(100),
            received: Lsn(100),
            durable: Lsn(100),
            ..Snapshot::default()
        };
        snapshot.look(stamp(7_200));
        let passed = Duration::from_secs(90);
        tokio::time::advance(passed).await;
        // The server goes on, and nothing of that is durable.
        snapshot.server_end = Lsn(200);
        snapshot.look(stamp(7_290));
        let since = |snapshot: &Snapshot, now: Stamp| now.moment.since(snapshot.current_at.unwrap().moment);
        assert_eq!(since(&snapshot, stamp(90)), passed);
        snapshot.gave_up(at(90), "full".into());
        let is_felt = |snapshot: &Snapshot| snapshot.given_up.as_ref().unwrap().is_felt;
        // What the server had before has become durable in the end.
        (snapshot.server_end, snapshot.durable) = (Lsn(400), Lsn(200));
        snapshot.look(stamp(80));
        assert!(is_felt(&snapshot));
        assert_eq!(snapshot.current_at.unwrap().time, at(7_200));
        // And what it had since, though the clock said less then than when the slot was given up.
        (snapshot.server_end, snapshot.durable) = (Lsn(500), Lsn(400));
        snapshot.look(stamp(81));
        assert!(!is_felt(&snapshot));
        assert_eq!(snapshot.current_at.unwrap().time, at(80));
    }

    #[test]
    fn the_moment_up_to_which_the_archive_is_current_is_shown_as_a_time() {
        let snapshot = Snapshot {
            current_at: Some(stamp(1)),
            begun: Some(Moment::now()),
            ..Snapshot::default()
        };
        let document = serde_json::to_value(&snapshot).unwrap();
        assert_eq!(document["current_at"], at(1).to_string());
        assert!(document.get("begun").is_none());
    }

    #[test]
    fn a_region_does_as_well_as_the_worse_of_its_pipeline_and_its_calls() {
        let mut view = RegionView::default();
        let shown = |view: &RegionView| (view.state, view.last_error.clone());
        let text = |text: &str| Some(text.to_owned());
        view.pipeline(RegionState::CatchingUp, text("behind"));
        view.calls(text("503"));
        assert_eq!(shown(&view), (RegionState::Failing, text("503")));
        view.calls(None);
        assert_eq!(shown(&view), (RegionState::CatchingUp, text("behind")));
        view.pipeline(RegionState::Failing, text("damaged"));
        for calls in [text("503"), None] {
            view.calls(calls);
            assert_eq!(shown(&view), (RegionState::Failing, text("damaged")));
        }
        view.pipeline(RegionState::Ok, None);
        assert_eq!(shown(&view), (RegionState::Ok, None));
    }
}
