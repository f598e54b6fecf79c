//! Two servers, an agent beside each, one archive: a primary and its standby, a failover from one to the other, and a standby
//! that is promoted beside a primary that lives.
//!
//! Owns: what happens to the two, and when they must have come to agree. Each agent has its own ways to the regions, so that
//! one may be cut off from them while the other goes on.

use std::sync::Arc;
use std::time::Duration;

use highwater_agent::error::Kind;
use highwater_config::Standby;
use tokio::time::sleep;

use crate::agent::{Agent, config};
use crate::node::Node;
use crate::region::{SimRegion, Weather};
use crate::rng::Rng;
use crate::schedule::{PATIENCE, policy};
use crate::wire::lsn;
use crate::world::{Power, Seat, Sim, World};

/// What a machine's server is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Primary,
    Standby,
    /// Another one was promoted beside it, and it goes on by itself.
    Rival,
    /// It does not come back as it was; the agent may go on without it.
    Lost,
}

/// One machine: a server, the agent beside it, and its ways to the regions.
struct Machine {
    sim: Arc<Sim>,
    agent: Agent,
    regions: Vec<Arc<SimRegion>>,
    role: Role,
}

pub(crate) struct Company {
    rng: Rng,
    machines: [Machine; 2],
    /// Which of them has the primary.
    primary: usize,
    /// Regions are out of reach at times, and do nothing worse: who writes where is looked at closely.
    partitions: bool,
    /// Another server became the primary: an agent that found itself beside one that was not any more is refused.
    failed_over: bool,
    /// There were two primaries: one of them is fenced.
    rivals: bool,
    /// Some region has refused calls.
    denied: bool,
}

impl Company {
    /// Plays the schedule of one seed, and returns what is left.
    pub(crate) async fn played(seed: u64) -> Arc<Sim> {
        let mut company = Self::new(seed);
        company.play().await;
        company.machines[0].sim.clone()
    }

    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x77 << 56);
        let segment = rng.pick(&[1, 1, 1, 2]) << 20;
        let count = rng.pick(&[1, 2, 2, 2, 3]);
        let policy = policy(count, &mut rng);
        let mut world = World::new(rng.fork(), segment, count, policy.needed(count));
        let standby = Node {
            keep: rng.pick(&[0, 1, 3]),
            ..world.node.clone()
        };
        world.seats.push(Seat::new(standby, true));
        let sim = Sim::new(world);
        let regions: Vec<_> = (0..count)
            .map(|index| SimRegion::new(sim.clone(), index, rng.fork()))
            .collect();
        let mut config = config(count, policy, &mut rng);
        config.cluster.standby = Standby::Stream;
        sim.lock().note(format!(
            "seed {seed} Company: {count} regions, {policy:?}, {:?}",
            config.wal
        ));
        sim.lock().synchronous = config.wal.synchronous;
        let mut machine = |seat| {
            let sim = sim.at(seat);
            let mut way = |region: &Arc<SimRegion>| region.seen_by(sim.clone(), rng.fork());
            let regions: Vec<_> = regions.iter().map(&mut way).collect();
            Machine {
                agent: Agent::new(sim.clone(), config.clone(), regions.clone(), rng.next()),
                sim,
                regions,
                role: [Role::Primary, Role::Standby][seat],
            }
        };
        let machines = [machine(0), machine(1)];
        let partitions = rng.chance(400);
        sim.lock().one_writer = partitions;
        Self {
            machines,
            primary: 0,
            partitions,
            failed_over: false,
            rivals: false,
            denied: false,
            rng,
        }
    }

    async fn play(&mut self) {
        let first = self.rng.range(0..1_500_000);
        self.primary().sim.change(|world| world.write(first));
        self.start(self.primary);
        for _ in 0..self.rng.range(10..50) {
            if self.is_over() {
                return;
            }
            self.happen();
            let pause = self.rng.pick(&[1, 20, 300, 1500, 6000]);
            let pause = self.rng.millis(0..pause);
            self.wait(pause).await;
        }
        self.settle().await;
    }

    fn is_over(&self) -> bool {
        self.machines[0].sim.lock().broken.is_some()
    }

    fn primary(&self) -> &Machine {
        &self.machines[self.primary]
    }

    /// The standby, if there is one.
    fn standby(&self) -> Option<&Machine> {
        Some(&self.machines[1 - self.primary]).filter(|machine| machine.role == Role::Standby)
    }

    fn either(&mut self) -> usize {
        self.rng.index(2)
    }

    /// Starts the agent of a machine. One beside a standby joins an archive that the primary's has begun.
    fn start(&mut self, index: usize) {
        let begun = !self.machines[index].sim.lock().is_empty();
        if index == self.primary || begun {
            self.machines[index].agent.start();
        }
    }

    /// Lets time pass, and looks after both agents.
    async fn wait(&mut self, time: Duration) {
        sleep(time).await;
        for index in 0..2 {
            if let Some(ended) = self.machines[index].agent.ended().await {
                self.judge(index, ended);
            } else if !self.machines[index].agent.is_running()
                && self.machines[index].role != Role::Lost
                && self.rng.chance(600)
            {
                self.start(index);
            }
        }
    }

    /// Whether an agent had a reason to end.
    fn judge(&self, index: usize, ended: Option<Kind>) {
        let mut world = self.machines[index].sim.lock();
        match ended {
            None => {}
            Some(Kind::Operator) if self.denied => {}
            Some(Kind::Damage) if world.damaged_for_good => {}
            Some(Kind::Refused) if world.late_signs > 0 => {}
            Some(Kind::Refused) if self.failed_over => {}
            Some(Kind::Damage) if self.rivals => {}
            // It was fenced, or another one stored where it was: it begins anew.
            Some(Kind::Retry) if self.failed_over || self.rivals => {}
            Some(kind) => world.fail(format!("the agent ended without a reason ({kind:?})")),
        }
    }

    /// One event, after which both agents may be anywhere.
    fn happen(&mut self) {
        match self.rng.range(0..100) {
            0..30 => self.write(),
            30..34 => self.switch_segment(),
            34..46 => self.turn_weather(),
            46..51 => self.freeze(true),
            51..58 => self.freeze(false),
            58..72 => self.crash(),
            72..75 => {
                let which = self.either();
                self.machines[which].agent.stop();
            }
            75..79 => {
                let which = self.either();
                self.machines[which].sim.lock().drop_connections();
            }
            79..85 => self.lag(),
            85..91 => self.trouble_at_a_server(),
            91..94 => self.fail_over(false),
            94..96 => self.fail_over(true),
            _ => self.rejoin(),
        }
    }

    fn write(&mut self) {
        let most = self.rng.pick(&[200, 9000, 100_000, 1_200_000]);
        let bytes = self.rng.range(0..most);
        let which = self.either();
        let which = match self.machines[which].role {
            Role::Rival => which,
            _ => self.primary,
        };
        self.machines[which].sim.change(|world| world.write(bytes));
    }

    fn turn_weather(&mut self) {
        let which = self.either();
        let index = self.rng.index(self.machines[which].regions.len());
        let weather = match self.rng.chance(600) {
            true if self.partitions => Weather {
                delay: self.rng.pick(&[1, 30, 300]),
                ..Weather::fair()
            },
            true => Weather::foul(&mut self.rng),
            false => Weather::fair(),
        };
        self.denied |= weather.denied > 0;
        let machine = &self.machines[which];
        machine.sim.lock().note(format!("r{index}: {weather:?}"));
        machine.regions[index].set(weather);
    }

    fn freeze(&mut self, frozen: bool) {
        let which = self.either();
        let machine = &self.machines[which];
        let index = self.rng.index(machine.regions.len());
        machine.sim.lock().note(format!("r{index} frozen: {frozen}"));
        machine.regions[index].freeze(frozen);
    }

    /// An agent dies: now, or at some store call.
    fn crash(&mut self) {
        let which = self.either();
        if self.rng.chance(300) {
            return self.machines[which].agent.kill();
        }
        let calls = self.rng.range(0..60);
        self.machines[which].sim.lock().crash_in = Some(calls);
    }

    /// A segment ends early, and the standby may not have all of it yet.
    fn switch_segment(&mut self) {
        self.primary().sim.change(World::switch_segment);
        let is_half = self.rng.chance(500);
        let standby = self.standby().filter(|_| is_half);
        if let Some(standby) = standby {
            standby.sim.change(|world| {
                if world.received == u64::MAX {
                    world.receive_half_a_switch();
                }
            });
        }
    }

    /// The standby receives nothing any more, or goes on.
    fn lag(&mut self) {
        let Some(standby) = self.standby() else {
            return;
        };
        standby.sim.change(|world| {
            world.received = match world.received {
                u64::MAX => world.end(),
                _ => u64::MAX,
            };
            // A receiver that has broken off begins with the next segment.
            if world.rng.chance(700) {
                world.leftovers = None;
            }
            let end = world.end();
            world.note(format!("the standby has received up to {}", lsn(end)));
        });
    }

    /// A checkpoint, a flood of questions, a crash and restart, a while of nobody there, a step of the agent's clock.
    fn trouble_at_a_server(&mut self) {
        let (which, what, step) = (self.either(), self.rng.range(0..10), self.rng.range(0..7200));
        let machine = &self.machines[which];
        if machine.role == Role::Lost {
            return;
        }
        machine.sim.change(|world| match what {
            0..4 => world.checkpoint(),
            4 => world.turn_flood(),
            5 | 6 => world.restart_server(),
            7 | 8 => world.turn_power(),
            _ => machine.agent.set_clock(step),
        });
    }

    /// The standby goes on with what it has received. The primary's machine is lost, and the agent may die with it
    /// or, if it ran elsewhere, go on without a server; or the primary lives.
    fn fail_over(&mut self, lives: bool) {
        let (old, new) = (self.primary, 1 - self.primary);
        if self.standby().is_none() || self.machines[new].sim.lock().cuts().is_empty() {
            return;
        }
        self.failed_over = true;
        self.rivals |= lives;
        match lives {
            true => self.machines[old].role = Role::Rival,
            false => self.lose(old),
        }
        let rng = &mut self.rng;
        self.machines[new].sim.change(|world| {
            let Some(cut) = world.cuts().pop() else {
                return;
            };
            let timeline = world.next_timeline(rng);
            world.promote(cut, timeline, rng);
            (world.standby, world.received, world.power) = (false, u64::MAX, Power::Up);
            world.gone_before = world.gone_before.max(world.node.kept_from);
            let beside = if lives { ", and the other lives" } else { "" };
            world.note(format!(
                "failover to timeline {timeline} at {}{beside}",
                lsn(cut.at)
            ));
            let few = rng.range(0..3000);
            world.write(few);
        });
        self.primary = new;
        self.machines[new].role = Role::Primary;
    }

    fn lose(&mut self, which: usize) {
        self.machines[which].role = Role::Lost;
        self.machines[which].sim.change(|world| {
            world.note("the server is lost");
            world.power = Power::Down;
            world.disconnect();
        });
        if self.rng.chance(600) {
            self.machines[which].agent.kill();
        }
    }

    /// The machine that was lost is back, or that of a rival: with a copy of the primary that follows it.
    fn rejoin(&mut self) {
        let other = 1 - self.primary;
        if self.machines[other].role == Role::Standby {
            return;
        }
        let of_the_primary = self.primary().sim.lock().node.clone();
        self.machines[other].role = Role::Standby;
        self.machines[other].sim.change(|world| {
            world.disconnect();
            let segment = world.segment();
            let from = of_the_primary.checkpoint - of_the_primary.checkpoint % segment;
            world.node = Node {
                slot: None,
                saved_slot: None,
                kept_from: of_the_primary.kept_from.max(from),
                ..of_the_primary
            };
            (world.standby, world.received, world.power) = (true, u64::MAX, Power::Up);
            world.leftovers = None;
            world.note("the other machine is back, as a standby");
        });
    }

    /// No more faults: everything must be stored everywhere, and reported to every server that is left.
    async fn settle(&mut self) {
        if self.machines[1 - self.primary].role == Role::Rival {
            self.lose(1 - self.primary);
        }
        for machine in &self.machines {
            for region in &machine.regions {
                region.set(Weather::fair());
                region.freeze(false);
            }
            machine.sim.change(|world| {
                world.flood = false;
                world.crash_in = None;
                world.received = u64::MAX;
                if machine.role != Role::Lost {
                    world.power = Power::Up;
                }
            });
        }
        self.primary().sim.change(|world| {
            world.note("no more faults");
            world.write(500);
        });
        let mut left = PATIENCE;
        while !self.is_over() {
            for index in 0..2 {
                if self.machines[index].role != Role::Lost && !self.machines[index].agent.is_running() {
                    self.start(index);
                }
            }
            let settled = |machine: &Machine| machine.role == Role::Lost || machine.sim.lock().is_settled();
            if self.machines.iter().all(settled) {
                return self.primary().sim.lock().note("settled");
            }
            if left.is_zero() {
                return self.complain();
            }
            let pause = Duration::from_millis(500).min(left);
            left -= pause;
            self.wait(pause).await;
        }
    }

    fn complain(&self) {
        for machine in &self.machines {
            let mut world = machine.sim.lock();
            let (role, standing) = (machine.role, world.standing());
            world.note(format!("{role:?}: {standing}"));
        }
        self.primary()
            .sim
            .lock()
            .fail("liveness: not everything is stored everywhere and reported".into());
    }
}
