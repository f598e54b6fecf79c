//! One schedule: a server, some regions and an agent, to which things happen; then nothing more happens, and all must
//! come to agree.

use std::sync::Arc;
use std::time::Duration;

use highwater_agent::error::Kind;
use highwater_config::Policy;
use tokio::time::sleep;

use crate::agent::{Agent, config};
use crate::company::Company;
use crate::node::Node;
use crate::region::{SimRegion, Weather};
use crate::rng::Rng;
use crate::wal::Cut;
use crate::wire::lsn;
use crate::world::{Power, Sim, World};

/// Within this time after the last fault everything is stored everywhere and reported.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// What a schedule is mostly about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Theme {
    Storage,
    Crashes,
    Server,
    Lineage,
    Rollback,
    Losses,
    Company,
}

/// How a schedule went.
pub(crate) struct Outcome {
    pub(crate) log: Vec<String>,
    /// The invariant that was broken.
    pub(crate) broken: Option<String>,
    pub(crate) statuses: u64,
}

/// Runs the schedule of one seed, in virtual time.
pub(crate) fn run(theme: Theme, seed: u64) -> Outcome {
    runtime().block_on(async {
        let sim = match theme {
            Theme::Company => Company::played(seed).await,
            _ => {
                let mut schedule = Schedule::new(theme, seed);
                schedule.play().await;
                schedule.sim
            }
        };
        let mut world = sim.lock();
        Outcome {
            log: std::mem::take(&mut world.log),
            broken: world.broken.take(),
            statuses: world.statuses,
        }
    })
}

/// One thread, and a clock that moves on when everybody waits.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
}

/// Some policy for so many regions.
pub(crate) fn policy(regions: usize, rng: &mut Rng) -> Policy {
    match rng.range(0..4) {
        0 => Policy::Any,
        1 if regions == 3 => Policy::Count(2.try_into().unwrap()),
        _ => Policy::All,
    }
}

pub(crate) struct Schedule {
    theme: Theme,
    pub(crate) sim: Arc<Sim>,
    rng: Rng,
    pub(crate) regions: Vec<Arc<SimRegion>>,
    pub(crate) agent: Agent,
    /// Earlier states of the server, to go back to.
    snapshots: Vec<(Node, Cut)>,
    /// The server has lost or contradicts something that the agent may know of: it may refuse to go on.
    may_refuse: bool,
    /// How often the agent refused.
    refusals: u32,
    events: u32,
    /// Some region has refused calls.
    denied: bool,
    /// The primary that another one has taken the place of.
    retired: Option<Node>,
    /// The present primary, while a retired one answers in its place.
    proper: Option<Node>,
    /// A retired primary has answered to this agent.
    met_retired: bool,
}

impl Schedule {
    pub(crate) fn new(theme: Theme, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ (theme as u64) << 56);
        let segment = rng.pick(&[1, 1, 1, 2]) << 20;
        let count = rng.pick(&[1, 2, 2, 2, 3]);
        let policy = policy(count, &mut rng);
        let needed = policy.needed(count);
        let world = World::new(rng.fork(), segment, count, needed);
        let sim = Sim::new(world);
        let regions: Vec<_> = (0..count)
            .map(|index| SimRegion::new(sim.clone(), index, rng.fork()))
            .collect();
        let config = config(count, policy, &mut rng);
        sim.lock().note(format!(
            "seed {seed} {theme:?}: {count} regions, {policy:?}, segment {segment}, {:?}",
            config.wal
        ));
        sim.lock().synchronous = config.wal.synchronous;
        let agent = Agent::new(sim.clone(), config, regions.clone(), rng.next());
        Self {
            theme,
            sim,
            regions,
            agent,
            snapshots: Vec::new(),
            may_refuse: false,
            refusals: 0,
            denied: false,
            retired: None,
            proper: None,
            met_retired: false,
            events: rng.range(5..25) as u32,
            rng,
        }
    }

    async fn play(&mut self) {
        let first = self.rng.range(0..1_500_000);
        self.sim.change(|world| world.write(first));
        if self.theme == Theme::Lineage && self.rng.chance(300) {
            self.promote(false);
        }
        self.start_agent();
        for _ in 0..self.events {
            if self.is_over() {
                return;
            }
            self.happen().await;
            let pause = self.rng.pick(&[1, 20, 300, 1500, 6000]);
            let pause = self.rng.millis(0..pause);
            self.wait(pause).await;
        }
        self.settle().await;
    }

    fn is_over(&self) -> bool {
        self.sim.lock().broken.is_some()
    }

    /// Lets time pass, and looks after the agent.
    async fn wait(&mut self, time: Duration) {
        sleep(time).await;
        let Some(ended) = self.agent.ended().await else {
            if !self.agent.is_running() && self.refusals < 3 && self.rng.chance(600) {
                self.start_agent();
            }
            return;
        };
        let (damaged, late) = {
            let world = self.sim.lock();
            (world.damaged_for_good, world.late_signs)
        };
        match ended {
            Some(Kind::Damage | Kind::Refused) if self.may_refuse => self.refusals += 1,
            Some(Kind::Damage | Kind::Refused) if self.met_retired => {}
            // No region could be read at the start, and somebody has to act.
            Some(Kind::Operator) if self.denied => {}
            // What is damaged again and again, and pulses of the dead that arrive late, end an agent with a reason.
            Some(Kind::Damage) if damaged => {}
            Some(Kind::Refused) if late > 0 => {}
            Some(kind) => self
                .sim
                .lock()
                .fail(format!("the agent ended without a reason ({kind:?})")),
            None => {}
        }
    }

    pub(crate) fn start_agent(&mut self) {
        self.met_retired = self.proper.is_some();
        self.agent.start();
    }

    /// One event, after which the agent may be anywhere.
    async fn happen(&mut self) {
        let weights: [u64; 15] = match self.theme {
            //                 wr sw  wx fr th cr st cn sh dn pr rb sl em old
            Theme::Storage => [30, 4, 25, 10, 8, 8, 3, 5, 2, 2, 1, 0, 0, 2, 0],
            Theme::Crashes => [30, 4, 14, 5, 6, 30, 6, 4, 2, 2, 2, 0, 1, 1, 0],
            Theme::Server => [30, 4, 8, 3, 4, 6, 3, 20, 8, 8, 4, 0, 3, 0, 1],
            Theme::Lineage => [30, 4, 10, 5, 5, 10, 3, 5, 3, 3, 20, 0, 1, 1, 5],
            Theme::Rollback => [30, 4, 10, 4, 5, 10, 3, 5, 3, 3, 6, 12, 1, 0, 0],
            Theme::Company => unreachable!("two agents have a schedule of their own"),
            Theme::Losses => [30, 8, 8, 10, 6, 14, 3, 4, 2, 6, 3, 0, 14, 6, 0],
        };
        let mut draw = self.rng.range(0..weights.iter().sum());
        let event = weights.iter().position(|weight| match draw < *weight {
            true => true,
            false => {
                draw -= weight;
                false
            }
        });
        match event {
            Some(0) => self.write(),
            Some(1) => self.sim.change(World::switch_segment),
            Some(2) => self.turn_weather(),
            Some(3) => self.freeze(true),
            Some(4) => self.freeze(false),
            Some(5) => self.crash(),
            Some(6) => self.agent.stop(),
            Some(7) => self.sim.lock().drop_connections(),
            Some(8) => self.shut_down(),
            Some(9) => self.trouble_at_the_server(),
            Some(10) => {
                let elsewhere = self.rng.chance(500);
                self.promote(elsewhere);
            }
            Some(11) => self.roll_back(),
            Some(12) => self.trouble_with_the_slot(),
            Some(13) => self.empty_a_region().await,
            _ => self.revive_or_retire(),
        }
    }

    fn write(&mut self) {
        let most = self.rng.pick(&[200, 9000, 100_000, 1_200_000]);
        let bytes = self.rng.range(0..most);
        self.sim.change(|world| world.write(bytes));
        if self.rng.chance(300) {
            self.remember();
        }
    }

    /// Keeps the server's present state, to go back to.
    pub(crate) fn remember(&mut self) {
        let world = self.sim.lock();
        let cut = world.current().cuts.last().copied();
        let node = world.node.clone();
        drop(world);
        self.snapshots.extend(cut.map(|cut| (node, cut)));
    }

    fn turn_weather(&mut self) {
        let index = self.rng.index(self.regions.len());
        let weather = match self.rng.chance(600) {
            true => Weather::foul(&mut self.rng),
            false => Weather::fair(),
        };
        self.denied |= weather.denied > 0;
        self.sim.lock().note(format!("r{index}: {weather:?}"));
        self.regions[index].set(weather);
    }

    fn freeze(&mut self, frozen: bool) {
        let index = self.rng.index(self.regions.len());
        self.sim.lock().note(format!("r{index} frozen: {frozen}"));
        self.regions[index].freeze(frozen);
    }

    /// The agent dies: now, or at some store call.
    fn crash(&mut self) {
        if self.rng.chance(300) {
            return self.agent.kill();
        }
        let calls = self.rng.range(0..60);
        self.sim.lock().crash_in = Some(calls);
    }

    /// A fast shutdown, or the end of one.
    fn shut_down(&mut self) {
        self.sim.change(|world| {
            world.power = match world.power {
                Power::Up => Power::Stopping,
                _ => Power::Up,
            };
            let power = world.power;
            world.note(format!("server: {power:?}"));
        });
    }

    /// A checkpoint, a flood of questions, a crash and restart, a while of nobody there, a step of the agent's clock.
    fn trouble_at_the_server(&mut self) {
        let what = self.rng.range(0..10);
        let step = self.rng.range(0..7200);
        let agent = &self.agent;
        self.sim.change(|world| match what {
            0 | 1 => world.checkpoint(),
            2 | 3 => world.turn_flood(),
            4 | 5 => world.restart_server(),
            6 | 7 => world.turn_power(),
            _ => agent.set_clock(step),
        });
    }

    /// Somebody drops the slot, makes it anew at the present position, or without anything reserved; the WAL that it
    /// kept is removed at once, or with some later checkpoint.
    fn trouble_with_the_slot(&mut self) {
        let (what, at_once) = (self.rng.range(0..4), self.rng.chance(700));
        self.sim.change(|world| {
            world.disconnect();
            let (end, segment) = (world.end(), world.segment());
            match what {
                0 | 1 => world.node.drop_slot(),
                2 => world.node.replace_slot(None),
                _ => {
                    world.node.replace_slot(Some(end));
                    world.slot_begins_at(end);
                }
            }
            if at_once {
                world.node.checkpoint(end, segment);
            }
            let kept = world.node.kept_from;
            world.gone_before = world.gone_before.max(kept);
            let slot = world.node.slot;
            world.note(format!("slot is now {slot:?}, WAL is kept from {}", lsn(kept)));
        });
    }

    /// Somebody removes everything that a region holds, while another one holds as much.
    async fn empty_a_region(&mut self) {
        let index = self.rng.index(self.regions.len());
        let line = self.sim.lock().node.line.clone();
        let reaches = self.sim.lock().reaches(&line);
        let others = reaches.iter().enumerate().filter(|(other, _)| *other != index);
        if others.map(|(_, reach)| *reach).max() >= Some(reaches[index]) {
            self.regions[index].empty().await;
        }
    }

    /// The primary that was left behind by a promotion elsewhere answers in the place of the new one, and goes on
    /// by itself; or the new one is back.
    fn revive_or_retire(&mut self) {
        if self.proper.is_some() {
            return self.back_to_the_proper_primary();
        }
        let Some(old) = self.retired.clone() else {
            return;
        };
        self.met_retired = true;
        let few = self.rng.range(0..200_000);
        let proper = self.sim.change(|world| {
            world.disconnect();
            world.note("the old primary answers");
            let newer = world.node.line.timeline;
            let proper = std::mem::replace(&mut world.node, old);
            world.node.crash();
            if world.is_known(newer) {
                world.revived = Some((world.node.line.version, world.end()));
            }
            world.power = Power::Up;
            world.write(few);
            proper
        });
        self.proper = Some(proper);
    }

    fn back_to_the_proper_primary(&mut self) {
        let Some(proper) = self.proper.take() else {
            return;
        };
        let old = self.sim.change(|world| {
            world.disconnect();
            world.note("the new primary is back");
            world.power = Power::Up;
            std::mem::replace(&mut world.node, proper)
        });
        self.retired = Some(old);
    }

    /// Promotion of this server, or of a standby `elsewhere` that may lag and has no slot.
    pub(crate) fn promote(&mut self, elsewhere: bool) {
        if self.proper.is_some() {
            return;
        }
        let before = self.sim.lock().node.clone();
        let rng = &mut self.rng;
        let promoted = self.sim.change(|world| {
            let possible = world.cuts();
            let Some(newest) = possible.last().copied() else {
                return false;
            };
            let lag = rng.chance(400) && elsewhere;
            let cut = if lag {
                possible[rng.index(possible.len())]
            } else {
                newest
            };
            let timeline = world.next_timeline(rng);
            world.promote(cut, timeline, rng);
            if elsewhere {
                world.disconnect();
                world.node.slot = None;
                world.node.saved_slot = None;
                world.power = Power::Up;
            }
            world.note(format!(
                "promotion to {timeline} at {}, elsewhere: {elsewhere}",
                lsn(cut.at)
            ));
            let few = rng.range(0..3000);
            world.write(few);
            true
        });
        if promoted && elsewhere {
            self.retired = Some(before);
            self.sim.lock().revived = None;
        }
    }

    /// An older state of the server is put in its place, and goes on differently.
    pub(crate) fn roll_back(&mut self) {
        if self.snapshots.is_empty() || self.proper.is_some() {
            return;
        }
        self.retired = None;
        let (node, cut) = self.snapshots[self.rng.index(self.snapshots.len())].clone();
        self.snapshots.clear();
        self.may_refuse = true;
        let rng = &mut self.rng;
        self.sim.change(|world| {
            world.disconnect();
            world.rolled_back = true;
            let old = &world.versions[node.line.version];
            let new = old.branch(old.timeline, cut, rng);
            world.node = node;
            world.node.line.version = world.versions.len();
            world.node.crash();
            world.versions.push(new);
            world.note(format!("server rolled back to {}", lsn(cut.at)));
            let some = rng.range(0..300_000);
            world.write(some);
        });
    }

    /// No more faults: everything must be stored everywhere and reported, or the agent must have a good reason.
    pub(crate) async fn settle(&mut self) {
        for region in &self.regions {
            region.set(Weather::fair());
            region.freeze(false);
        }
        self.back_to_the_proper_primary();
        self.sim.change(|world| {
            world.note("no more faults");
            world.power = Power::Up;
            world.flood = false;
            world.crash_in = None;
            world.write(500);
        });
        let mut left = PATIENCE;
        while !self.is_over() {
            if !self.agent.is_running() {
                match self.refusals {
                    0..3 => self.start_agent(),
                    _ => return self.judge_refusal(),
                }
            }
            if self.sim.lock().is_settled() {
                return self.sim.lock().note("settled");
            }
            if left.is_zero() {
                let mut world = self.sim.lock();
                let standing = world.standing();
                return world.fail(format!("liveness: {standing}"));
            }
            let pause = Duration::from_millis(500).min(left);
            left -= pause;
            self.wait(pause).await;
        }
    }

    /// The agent refuses again and again: it may, if what it refuses has been there.
    fn judge_refusal(&self) {
        let mut world = self.sim.lock();
        let diverged = world.diverged();
        world.note(format!("refused for good, diverged: {diverged}"));
        if !diverged {
            world
                .fail("the agent refuses for good, and nothing in the archive contradicts the server".into());
        }
    }
}

impl World {
    pub(crate) fn drop_connections(&mut self) {
        self.note("connections are lost");
        self.disconnect();
    }

    /// Whether every region holds all the server has, and the server was told.
    pub(crate) fn is_settled(&mut self) -> bool {
        let (line, end) = (self.node.line.clone(), self.end());
        // A server that was rolled back to before the archive's first byte has nothing that could be held of it.
        let end_of_archive = end.max(self.origin());
        let held = self.reaches(&line).iter().all(|reach| *reach == end_of_archive);
        (self.node.slot == Some(Some(end)) || self.holds_commits_back()) && held
    }
}
