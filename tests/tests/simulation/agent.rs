//! The agent under test: the real one, run in simulated surroundings, killed and started again.

use std::sync::Arc;

use highwater_agent::clock::Clock;
use highwater_agent::error::{AgentError, Kind};
use highwater_agent::region::Region;
use highwater_agent::run::{Options, run_in};
use highwater_agent::state::State;
use highwater_agent::surroundings::Surroundings;
use highwater_agent::writer::Me;
use highwater_config::{Config, Overrides, Policy};
use highwater_format::Time;
use highwater_pgwire::{ByteStream, ConnInfo, Dialer, Environment};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::region::SimRegion;
use crate::rng::Rng;
use crate::walsender;
use crate::world::Sim;

/// Above the agent's own limit: a message of WAL, a frame that is compressed, a chunk that is sealed.
const OVERSHOOT: u64 = 3 << 20;

pub(crate) struct Agent {
    sim: Arc<Sim>,
    config: Config,
    regions: Vec<Arc<SimRegion>>,
    clock: Clock,
    jitter: u64,
    names: Rng,
    running: Option<Running>,
}

struct Running {
    task: JoinHandle<Result<(), AgentError>>,
    cancel: CancellationToken,
    state: State,
}

/// The settings of one schedule.
pub(crate) fn config(regions: usize, policy: Policy, rng: &mut Rng) -> Config {
    let overrides = Overrides {
        archives: (0..regions)
            .map(|index| format!("r{index}=file:///r{index}"))
            .collect(),
        cluster_name: Some("orders".into()),
        ..Overrides::default()
    };
    let mut config = Config::load(None, |_| None, &overrides).unwrap();
    config.admin.listen = None;
    config.durability.policy = policy;
    config.wal.flush_interval = rng.millis(10..2500);
    config.wal.flush_size = rng.pick(&[64 << 10, 200_000, 1 << 20]);
    config.wal.uploads = rng.pick(&[1, 2, 4, 8]);
    // Half of it is for WAL; the agent takes more where segments need it.
    config.wal.memory = rng.pick(&[8 << 20, 64 << 20]);
    config.wal.synchronous = rng.chance(150);
    config.pulse.interval = rng.millis(1000..8000);
    config.heal.interval = rng.millis(5000..60_000);
    config
}

impl Agent {
    pub(crate) fn new(sim: Arc<Sim>, config: Config, regions: Vec<Arc<SimRegion>>, jitter: u64) -> Self {
        Self {
            sim,
            config,
            regions,
            clock: Clock::held_at(Time::from_unix_micros(1_700_000_000_000_000)),
            names: Rng::new(jitter),
            jitter,
            running: None,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub(crate) fn start(&mut self) {
        self.sim.lock().agent_starts();
        let names = self
            .config
            .regions
            .iter()
            .map(|region| region.display_name().to_owned());
        let state = State::new(names);
        let regions = self.regions.iter().enumerate().map(|(index, region)| {
            let name = format!("r{index}");
            Arc::new(Region::over(
                region.clone(),
                name,
                index,
                &state,
                Some(self.jitter),
            ))
        });
        let me = Me {
            instance: format!("{:016x}", self.names.next()),
            host: "simulated".into(),
            pid: 1,
            // What had this number before has ended.
            machine: Some(format!("simulated-{}", self.sim.seat())),
        };
        let surroundings = Surroundings {
            clock: self.clock.clone(),
            state: state.clone(),
            conninfo: conninfo(self.sim.clone()),
            regions: regions.collect(),
            me,
        };
        let cancel = CancellationToken::new();
        let run = run_in(
            self.config.clone(),
            Options::default(),
            surroundings,
            cancel.clone(),
        );
        let task = tokio::spawn(run);
        self.sim.lock().agent = Some(task.abort_handle());
        self.running = Some(Running { task, cancel, state });
    }

    /// Sets the clock to somewhere within two hours.
    pub(crate) fn set_clock(&self, seconds: u64) {
        let micros = (1_700_000_000 + seconds as i64) * 1_000_000;
        self.clock.set(Time::from_unix_micros(micros));
    }

    /// SIGTERM.
    pub(crate) fn stop(&self) {
        if let Some(running) = &self.running {
            self.sim.lock().note("agent is told to stop");
            running.cancel.cancel();
        }
    }

    /// SIGKILL.
    pub(crate) fn kill(&self) {
        if let Some(running) = &self.running {
            self.sim.lock().note("agent is killed");
            running.task.abort();
        }
    }

    /// Whether it ended by itself or was ended, and with what error. Memory is looked at on the way.
    pub(crate) async fn ended(&mut self) -> Option<Option<Kind>> {
        let running = self.running.as_mut()?;
        let snapshot = running.state.snapshot();
        if snapshot.memory_used > snapshot.memory_limit + OVERSHOOT {
            let text = format!("memory: {} of {}", snapshot.memory_used, snapshot.memory_limit);
            self.sim.lock().fail(text);
        }
        if !running.task.is_finished() {
            return None;
        }
        let ended = self.running.take()?.task.await;
        let mut world = self.sim.lock();
        world.agent = None;
        world.crash_in = None;
        match ended {
            Ok(Ok(())) => {
                world.note("agent stopped");
                Some(None)
            }
            Ok(Err(error)) => {
                world.note(format!("agent ended: {error}"));
                Some(Some(error.kind()))
            }
            Err(error) if error.is_cancelled() => Some(None),
            Err(error) => {
                world.fail(format!("the agent panicked: {error}"));
                Some(Some(Kind::Bug))
            }
        }
    }
}

/// The way to the simulated server.
fn conninfo(sim: Arc<Sim>) -> ConnInfo {
    let text = "host=simulated user=highwater sslmode=disable";
    let info = ConnInfo::resolve_in(Some(text), &Environment::empty()).unwrap();
    info.with_dialer(Dialer::new(move |_| {
        let stream = walsender::accept(&sim);
        Box::pin(async move { Ok(Box::new(stream?) as Box<dyn ByteStream>) })
    }))
}
