//! The regions that a base backup goes to, and which of them are still in.
//!
//! Owns: writing one object to all regions at once from one copy of its bytes, and giving a region up for
//! this backup when it does not take an object in time. Keeps: as long as no error is returned, at least as
//! many regions as the policy asks for hold every object written so far. A region that was given up never
//! gets the backup's commit mark, so nothing half-stored becomes visible there.
//! Does not own: retries (the store's), nor what is written.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::join_all;
use highwater_store::Object;
use tokio::time::timeout;

use crate::error::{AgentError, Result};
use crate::region::{Region, write_once};

/// How long one region may take over one object before the backup goes on without it. Long enough for a
/// storage service to fail over, short against the hours that a backup is worth.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// One region and, once it is out, why.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) region: Arc<Region>,
    lost: OnceLock<String>,
}

/// All regions of the archive as this backup sees them.
#[derive(Debug)]
pub(crate) struct Targets {
    all: Vec<Target>,
    needed: usize,
    patience: Duration,
}

impl Targets {
    /// Every region is in; `needed` of them must stay in.
    pub(crate) fn new(regions: &[Arc<Region>], needed: usize, patience: Duration) -> Targets {
        let target = |region: &Arc<Region>| Target {
            region: region.clone(),
            lost: OnceLock::new(),
        };
        Targets {
            all: regions.iter().map(target).collect(),
            needed,
            patience,
        }
    }

    /// The regions that hold everything written so far.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Target> {
        self.all.iter().filter(|target| target.lost.get().is_none())
    }

    /// The regions that were given up, with the reason.
    pub(crate) fn lost(&self) -> Vec<(String, String)> {
        let reason = |target: &Target| Some((target.region.name.clone(), target.lost.get()?.clone()));
        self.all.iter().filter_map(reason).collect()
    }

    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    /// Takes the results of a step that ran in the live regions. Regions that failed are given up; the error
    /// is returned when fewer than the policy asks for are left.
    pub(crate) fn settle(&self, results: Vec<(&Target, Result<()>)>) -> Result<()> {
        let mut first = None;
        for (target, result) in results {
            let Err(error) = result else { continue };
            tracing::warn!(region = %target.region.name, %error, "this region is given up for this base backup");
            let _ = target.lost.set(error.to_string());
            first.get_or_insert(error);
        }
        match first {
            Some(error) if self.live().count() < self.needed => Err(error),
            _ => Ok(()),
        }
    }

    /// Writes one object to every live region; returns when each has it or was given up.
    pub(crate) async fn put(&self, key: &str, object: Object) -> Result<()> {
        let puts = self.live().map(|target| {
            let object = object.clone();
            async move { (target, self.put_one(target, key, object).await) }
        });
        self.settle(join_all(puts).await)
    }

    /// Writes one object to one region.
    pub(crate) async fn put_one(&self, target: &Target, key: &str, object: Object) -> Result<()> {
        let size = object.bytes.len();
        match timeout(self.patience, write_once(&*target.region.store, key, object)).await {
            Ok(written) => written.map(|_| ()),
            Err(_) => Err(AgentError::Trouble {
                what: format!(
                    "region {}: {key} ({size} bytes) could not be stored within {} s",
                    target.region.name,
                    self.patience.as_secs()
                ),
                next: "Look for the region's own errors in the log, mend it and back up again".into(),
            }),
        }
    }
}
