//! `highwater-agent decommission`: the server stops keeping WAL for the agent.
//!
//! Owns: dropping the slot, and the statement of what stays. Deletes nothing from any region: that the archive
//! of a cluster outlives the cluster is its purpose. Refuses a server that is not the archive's, a slot that is somebody
//! else's, and an agent that runs: it would make the slot anew. One that does not answer on this machine shows by using the
//! slot, where only `--force` ends its connection, and by making it anew.

use std::fmt;
use std::time::Duration;

use futures::future::join_all;
use highwater_config::{Config, Exit};
use highwater_format::Layout;
use highwater_pgwire::{ConnInfo, Connection};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::answering;
use crate::error::{AgentError, Result};
use crate::receiver::LONGEST_PAUSE;
use crate::slot::{self, LET_GO};
use crate::sql::{self, Rows};
use crate::state::State;
use crate::synchronous::{self, APPLICATION_NAME};
use crate::{identity, region, run, server};

/// For so long the slot has to stay away: an agent that has lost its connection is back before, and has made it anew.
const WATCHED: Duration = Duration::from_secs(LONGEST_PAUSE.as_secs() + 3);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// What was done and what stays.
#[derive(Debug, Serialize)]
pub struct Decommissioned {
    version: u32,
    /// The slot.
    pub slot: String,
    /// False: it did not exist.
    pub dropped: bool,
    /// Everything that is still there, each with where it is.
    pub stays: Vec<String>,
}

impl Decommissioned {
    /// The command's exit code.
    pub fn exit(&self) -> Exit {
        Exit::Done
    }
}

impl fmt::Display for Decommissioned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dropped {
            true => write!(
                f,
                "slot {} is dropped: the server keeps no WAL for the agent any more",
                self.slot
            )?,
            false => write!(
                f,
                "there is no slot {}: the server keeps no WAL for the agent",
                self.slot
            )?,
        }
        write!(f, "\nwhat stays:")?;
        self.stays.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

/// Drops the slot. `force` ends the connection of an agent that still streams.
pub async fn run(config: &Config, force: bool) -> Result<Decommissioned> {
    let (info, slot) = (run::connection(config)?, &config.cluster.slot);
    let mut conn = server::connect(&info).await?;
    let system_id = conn.identify_system().await?.system_id;
    let layout = Layout::new(config.cluster.name.clone(), system_id);
    refuse_another_server(config, &layout).await?;
    refuse_beside_an_agent(config, &layout).await?;
    let names = conn.show(synchronous::SETTING).await.unwrap_or_default();
    let dropped = drop_it(&mut conn, &info, slot, force).await?;
    if dropped {
        stays_away(&mut conn, &info, slot).await?;
    }
    conn.close().await;
    Ok(Decommissioned {
        version: 1,
        slot: slot.clone(),
        dropped,
        stays: what_stays(config, &layout, &names),
    })
}

fn what_stays(config: &Config, layout: &Layout, names: &str) -> Vec<String> {
    let regions = config.regions.iter().map(|region| {
        let (name, url) = (region.display_name(), &region.url);
        format!("region {name}: everything under {url}/{}", layout.root())
    });
    let mut stays: Vec<String> = regions.collect();
    stays.push("the role, its grants and its lines in pg_hba.conf".into());
    if !names.trim().is_empty() {
        stays.push(format!(
            "synchronous_standby_names = '{names}': if it names the agent, commits wait for ever until it is changed"
        ));
    }
    stays
}

/// The address may lead to another server, with a slot of the same name. One region that holds the lineage is enough; one
/// that does not answer, or cannot even be opened, says nothing.
async fn refuse_another_server(config: &Config, layout: &Layout) -> Result<()> {
    let names = config
        .regions
        .iter()
        .map(|region| region.display_name().to_owned());
    let state = State::new(names);
    let asked = config.regions.iter().enumerate().map(|(index, settings)| {
        let state = &state;
        async move {
            let region = region::open_one(settings, index, state).await?;
            identity::holds(&*region.quick, layout).await
        }
    });
    let mut another = None;
    for answer in join_all(asked).await {
        match answer {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error @ AgentError::OtherCluster { .. }) => another = Some(error),
            Err(error) => tracing::warn!(%error, "this region does not say whose archive it is"),
        }
    }
    another.map_or(Ok(()), Err)
}

/// An agent makes its slot anew whenever it finds none, in each of its ways to acknowledge.
async fn refuse_beside_an_agent(config: &Config, layout: &Layout) -> Result<()> {
    let Some(listen) = config.admin.listen else {
        return Ok(());
    };
    let Ok(said) = answering::ask(listen).await else {
        return Ok(());
    };
    match said.why_strange(layout.cluster(), Some(layout.system_id())) {
        Some(why) if said.is_unnamed() => Err(AgentError::refused(
            format!("{why}. It may be this cluster's, which would make the slot anew"),
            "Stop the agent first",
        )),
        Some(_) => Ok(()),
        None => Err(AgentError::refused(
            format!("the agent of this cluster answers at {listen}, and would make the slot anew"),
            "Stop the agent first",
        )),
    }
}

/// Drops the slot if it is a physical one: another one of that name is somebody else's. False: there is none.
async fn drop_it(conn: &mut Connection, info: &ConnInfo, slot: &str, force: bool) -> Result<bool> {
    let busy = match slot::drop_when_free(conn, info, slot, Duration::ZERO, |_| true).await {
        Err(AgentError::Postgres(error)) if error.is_slot_busy() => error,
        other => return other,
    };
    if !force {
        return Err(AgentError::refused(
            format!("slot {slot} is in use: {busy}"),
            "Stop the agent first, or pass --force to end its connection",
        ));
    }
    end_the_stream(info, slot).await?;
    match slot::drop_when_free(conn, info, slot, LET_GO, |_| true).await {
        Err(AgentError::Postgres(error)) if error.is_slot_busy() => Err(AgentError::refused(
            format!("slot {slot} is in use again, after the connection that used it was ended: {error}"),
            "An agent that was not stopped has come back: stop it first",
        )),
        other => other,
    }
}

/// An agent that nobody has stopped, here or on another machine, comes back after a pause and makes the slot anew.
async fn stays_away(conn: &mut Connection, info: &ConnInfo, slot: &str) -> Result<()> {
    tracing::info!(
        slot,
        seconds = WATCHED.as_secs(),
        "dropped; looking whether an agent that was not stopped makes it anew"
    );
    let began = Instant::now();
    while began.elapsed() < WATCHED {
        sleep(PAUSE).await;
        let found = slot::position(conn, info, slot).await;
        if found.map_err(|error| unwatched(slot, &error))?.is_some() {
            return Err(AgentError::refused(
                format!(
                    "slot {slot} was dropped, and is there again: an agent that was not stopped has made it anew"
                ),
                "Stop the agent, on whichever machine it runs, and decommission again",
            ));
        }
    }
    Ok(())
}

fn unwatched(slot: &str, error: &AgentError) -> AgentError {
    AgentError::Trouble {
        what: format!("slot {slot} is dropped; whether an agent makes it anew could not be seen: {error}"),
        next: "Decommission again".into(),
    }
}

/// Ends the agent's stream. Whoever else holds the slot is none of ours, whatever the slot's name.
async fn end_the_stream(info: &ConnInfo, slot: &str) -> Result<()> {
    // The configuration allows only [a-z0-9_] in the slot's name.
    let query = format!(
        "SELECT active_pid, application_name, \
         CASE WHEN application_name = '{APPLICATION_NAME}' THEN pg_catalog.pg_terminate_backend(active_pid) END AS ended \
         FROM pg_catalog.pg_replication_slots LEFT JOIN pg_catalog.pg_stat_replication ON pid = active_pid \
         WHERE slot_name = '{slot}' AND active_pid IS NOT NULL"
    );
    let mut sql = sql::connect(info).await?;
    let rows = Rows(sql.simple_query(&query).await?);
    sql.close().await;
    // No row: nobody holds it any more.
    if rows.len() == 0 || rows.flag(0, "ended").is_some() {
        return Ok(());
    }
    let pid = rows.text(0, "active_pid").unwrap_or_default();
    let name = rows.text(0, "application_name").unwrap_or_default();
    Err(AgentError::refused(
        format!("slot {slot} is used by PID {pid}, which streams as \"{name}\" and is not the agent"),
        "Its connection was not ended. Stop it, or give the agent's own slot with `slot` in [cluster]",
    ))
}
