//! The ledger: clients that insert numbered rows and note every commit that PostgreSQL
//! acknowledged, and the check of a restored cluster against these notes.
//!
//! Each client numbers its rows from 1. For each acknowledged row the ledger knows a WAL position
//! and a time before it was sent, and a WAL position and a time after it was acknowledged; the
//! commit record lies between them. That is enough to say of every row whether a restore to a
//! position or a time must hold it, must not hold it, or may do either.

mod check;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

pub use check::{Expect, Report};

use crate::clock;
use crate::lsn;
use crate::postgres::PgCluster;

/// One acknowledged commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The client that made it.
    pub client: u32,
    /// Its number at this client, from 1, without gaps.
    pub number: u64,
    /// A WAL position that was reached before the row was sent.
    pub before: u64,
    /// A WAL position at or after the end of the commit; `None` when the server went away in between.
    pub after: Option<u64>,
    /// When it was sent.
    pub sent: SystemTime,
    /// When PostgreSQL acknowledged it.
    pub acknowledged: SystemTime,
}

/// All acknowledged commits of one ledger.
#[derive(Clone, Debug, Default)]
pub struct LedgerLog {
    /// In the order of acknowledgement.
    pub entries: Vec<Entry>,
}

impl LedgerLog {
    /// Forgets what a server lacks that was promoted at `switch` and goes on from there.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn falls_back_to(&mut self, promoted: &PgCluster, switch: u64) -> anyhow::Result<()> {
        let client = promoted.client().await?;
        let rows = client
            .query("SELECT client, max(number) FROM ledger GROUP BY client", &[])
            .await?;
        let mut held = BTreeMap::new();
        for row in rows {
            held.insert(
                u32::try_from(row.get::<_, i32>(0))?,
                u64::try_from(row.get::<_, i64>(1))?,
            );
        }
        self.entries
            .retain(|entry| held.get(&entry.client).is_some_and(|last| entry.number <= *last));
        for entry in &mut self.entries {
            // Positions behind it were read of WAL that is another line's.
            entry.before = entry.before.min(switch);
            entry.after = entry.after.map(|after| after.min(switch));
        }
        Ok(())
    }
}

/// A running ledger.
#[derive(Debug)]
pub struct Ledger {
    log: Arc<Mutex<LedgerLog>>,
    stop: CancellationToken,
    clients: Vec<JoinHandle<()>>,
}

/// How a ledger behaves.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How many clients insert at the same time.
    pub clients: u32,
    /// How long each waits after a commit.
    pub pause: Duration,
    /// How many bytes of filling each row carries.
    pub filling: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            clients: 1,
            pause: Duration::from_millis(2),
            filling: 100,
        }
    }
}

impl Ledger {
    /// Makes the table `ledger` if it is not there and starts `clients` clients at the default pace.
    ///
    /// # Errors
    /// When the cluster does not take the connections.
    pub async fn start(cluster: &PgCluster, clients: u32) -> anyhow::Result<Self> {
        Self::start_paced(
            cluster,
            Pace {
                clients,
                ..Pace::default()
            },
        )
        .await
    }

    /// The same at another pace.
    ///
    /// # Errors
    /// When the cluster does not take the connections.
    pub async fn start_paced(cluster: &PgCluster, pace: Pace) -> anyhow::Result<Self> {
        Self::resume(cluster, pace, LedgerLog::default()).await
    }

    /// Goes on where an earlier ledger on the same cluster ended, with as many or more clients.
    ///
    /// # Errors
    /// When the cluster does not take the connections.
    pub async fn resume(cluster: &PgCluster, pace: Pace, log: LedgerLog) -> anyhow::Result<Self> {
        cluster
            .sql("CREATE TABLE IF NOT EXISTS ledger (client int, number bigint, filling text, PRIMARY KEY (client, number))")
            .await?;
        let mut workers = Vec::new();
        for client in 0..pace.clients {
            let connection = cluster.client().await?;
            let held = connection
                .query_one(
                    "SELECT coalesce(max(number), 0) FROM ledger WHERE client = $1",
                    &[&i32::try_from(client)?],
                )
                .await?;
            let held = u64::try_from(held.get::<_, i64>(0))?;
            let before = position(&connection).await?;
            workers.push(Worker {
                connection,
                client,
                next: held + 1,
                before,
                pace,
            });
        }
        let log = Arc::new(Mutex::new(log));
        let stop = CancellationToken::new();
        let start = |worker: Worker| tokio::spawn(worker.work(Arc::clone(&log), stop.clone()));
        let clients = workers.into_iter().map(start).collect();
        Ok(Self { log, stop, clients })
    }

    /// What has been acknowledged so far.
    #[must_use]
    pub fn log(&self) -> LedgerLog {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many commits have been acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entries
            .len()
    }

    /// Waits until `count` more commits are acknowledged.
    ///
    /// # Errors
    /// When that takes longer than a minute.
    pub async fn grow(&self, count: usize) -> anyhow::Result<()> {
        let goal = self.acknowledged() + count;
        let grown = || async { (self.acknowledged() >= goal).then_some(()) };
        clock::eventually("the ledger to grow", Duration::from_secs(60), grown).await
    }

    /// Stops the clients and returns what was acknowledged. Clients whose server is gone have stopped already.
    pub async fn stop(self) -> LedgerLog {
        self.stop.cancel();
        for mut client in self.clients {
            // A server that hangs keeps its client waiting: its last row counts as not acknowledged.
            if tokio::time::timeout(Duration::from_secs(5), &mut client)
                .await
                .is_err()
            {
                client.abort();
            }
        }
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn position(connection: &Client) -> anyhow::Result<u64> {
    let row = connection
        .query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
        .await?;
    lsn::parse(row.get(0)).context("pg_current_wal_insert_lsn()")
}

struct Worker {
    connection: Client,
    client: u32,
    next: u64,
    before: u64,
    pace: Pace,
}

impl Worker {
    async fn work(mut self, log: Arc<Mutex<LedgerLog>>, stop: CancellationToken) {
        let filling = "x".repeat(self.pace.filling);
        while !stop.is_cancelled() {
            match self.commit(&filling, &log).await {
                Ok(()) => self.next += 1,
                Err(error) => {
                    tracing::debug!(%error, client = self.client, "a client of the ledger stops");
                    return;
                }
            }
            tokio::time::sleep(self.pace.pause).await;
        }
    }

    async fn commit(&mut self, filling: &str, log: &Mutex<LedgerLog>) -> anyhow::Result<()> {
        let sent = clock::now();
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&i32::try_from(self.client)?, &i64::try_from(self.next)?, &filling];
        self.connection
            .execute("INSERT INTO ledger VALUES ($1, $2, $3)", &values)
            .await?;
        let acknowledged = clock::now();
        let entry = Entry {
            client: self.client,
            number: self.next,
            before: self.before,
            after: None,
            sent,
            acknowledged,
        };
        let place = {
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            log.entries.push(entry);
            log.entries.len() - 1
        };
        let after = position(&self.connection).await?;
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        log.entries[place].after = Some(after);
        self.before = after;
        Ok(())
    }
}
