//! What the agent runs in, apart from its configuration: the clock, the regions, the way to PostgreSQL.
//!
//! Owns nothing of how they are used. [`Surroundings::of`] gives the real ones; a simulation brings its own
//! and runs the same agent in them.

use std::sync::Arc;

use highwater_config::Config;
use highwater_pgwire::ConnInfo;

use crate::clock::Clock;
use crate::error::Result;
use crate::region::{self, Region};
use crate::run;
use crate::state::State;
use crate::writer::Me;

/// See the module.
#[derive(Debug)]
pub struct Surroundings {
    /// Wall-clock time.
    pub clock: Clock,
    /// What the agent knows about itself, for whoever looks.
    pub state: State,
    /// The way to PostgreSQL.
    pub conninfo: ConnInfo,
    /// In the order of the configuration.
    pub regions: Vec<Arc<Region>>,
    /// How this process names itself in claims and pulses.
    pub me: Me,
}

impl Surroundings {
    /// The machine's clock, the configured regions and connection. Wrong settings fail here.
    pub async fn of(config: &Config) -> Result<Self> {
        let clock = Clock::system();
        let state = State::new(
            config
                .regions
                .iter()
                .map(|region| region.display_name().to_owned()),
        );
        let conninfo = run::connection(config)?;
        let regions = region::open(config, &state).await?;
        let me = Me::beside(&conninfo.describe());
        Ok(Self {
            clock,
            state,
            conninfo,
            regions,
            me,
        })
    }
}
