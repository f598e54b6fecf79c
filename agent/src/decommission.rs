//! `highwater-agent decommission`: the server stops keeping WAL for the agent.
//!
//! Owns: dropping the slot, and the statement of what stays. Deletes nothing from any region: that the archive
//! of a cluster outlives the cluster is its purpose. Refuses while an agent streams, unless forced.

use std::fmt;
use std::time::Duration;

use highwater_config::{Acknowledge, Config, Exit};
use highwater_format::Layout;
use serde::Serialize;
use tokio::time::sleep;

use crate::error::{AgentError, Result};
use crate::{admin, run, server, sql, synchronous};

/// How often, and after which pause, a drop is repeated after the walsender was terminated.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(250);

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
    let slot = &config.cluster.slot;
    let mut conn = server::connect(&run::connection(config)?).await?;
    let system_id = conn.identify_system().await?.system_id;
    let names = conn.show(synchronous::SETTING).await.unwrap_or_default();
    if !force {
        refuse_beside_an_agent(config).await?;
    }
    let dropped = match conn.drop_replication_slot(slot).await {
        Ok(()) => true,
        Err(error) if error.sqlstate() == Some("42704") => false,
        Err(error) if error.sqlstate() == Some("55006") && force => {
            terminate(config).await?;
            drop_patiently(&mut conn, slot).await?;
            true
        }
        Err(error) if error.sqlstate() == Some("55006") => {
            return Err(AgentError::refused(
                format!("slot {slot} is in use: {error}"),
                "Stop the agent first, or pass --force to end its connection",
            ));
        }
        Err(error) => return Err(error.into()),
    };
    conn.close().await;
    let layout = Layout::new(config.cluster.name.clone(), system_id);
    let mut stays: Vec<String> = config
        .regions
        .iter()
        .map(|region| {
            format!(
                "region {}: everything under {}/{}",
                region.display_name(),
                region.url,
                layout.root()
            )
        })
        .collect();
    stays.push("the role, its grants and its lines in pg_hba.conf".into());
    if !names.trim().is_empty() {
        stays.push(format!(
            "synchronous_standby_names = '{names}': if it names the agent, commits wait for ever until it is changed"
        ));
    }
    Ok(Decommissioned {
        version: 1,
        slot: slot.clone(),
        dropped,
        stays,
    })
}

/// An agent that moves its slot by SQL does not stream from it, and would make it anew.
async fn refuse_beside_an_agent(config: &Config) -> Result<()> {
    let Some(listen) = config
        .admin
        .listen
        .filter(|_| config.wal.acknowledge == Acknowledge::Slot)
    else {
        return Ok(());
    };
    if admin::fetch(listen, "/livez").await.is_err() {
        return Ok(());
    }
    Err(AgentError::refused(
        format!("an agent answers at {listen}, and would make the slot anew"),
        "Stop the agent first",
    ))
}

async fn terminate(config: &Config) -> Result<()> {
    let mut sql = sql::connect(&run::connection(config)?).await?;
    // The configuration allows only [a-z0-9_] in the name.
    let query = format!(
        "SELECT pg_catalog.pg_terminate_backend(active_pid) FROM pg_catalog.pg_replication_slots \
         WHERE slot_name = '{}' AND active_pid IS NOT NULL",
        config.cluster.slot
    );
    sql.simple_query(&query).await?;
    sql.close().await;
    Ok(())
}

/// The walsender needs a moment to end, and an agent that was not stopped may come back in between.
async fn drop_patiently(conn: &mut highwater_pgwire::Connection, slot: &str) -> Result<()> {
    let mut attempt = 1;
    loop {
        match conn.drop_replication_slot(slot).await {
            Ok(()) => return Ok(()),
            Err(error) if error.sqlstate() == Some("55006") && attempt < ATTEMPTS => {
                attempt += 1;
                sleep(PAUSE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
