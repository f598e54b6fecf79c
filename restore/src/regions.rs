//! The regions of the archive, opened for reading with the patience of someone who waits at a terminal.
//!
//! Owns: the order of preference, and that a region which cannot be opened stays in the list with its error. Does not
//! own: retries (the store's one retry layer) and what is read.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use highwater_config::{Config, Exit};
use highwater_format::{FormatErrorKind, Time};
use highwater_store::{ErrorKind, NoObserver, RegionConfig, RetryPolicy, Retrying, Store, StoreError};

use crate::{clock, error::RestoreError};

/// One region, by the index that the catalog uses for it.
#[derive(Debug, Clone)]
pub struct Region {
    /// Its name in the configuration.
    pub name: String,
    /// Its URL without secrets.
    pub place: String,
    /// The store, or why there is none.
    pub access: Access,
}

/// Whether a region can be asked at all.
#[derive(Debug, Clone)]
pub enum Access {
    /// Yes.
    Store(Arc<dyn Store>),
    /// It could not be opened.
    Failed {
        /// Why.
        error: String,
        /// What kind of failure.
        kind: ErrorKind,
    },
    /// The operator said to do without it.
    LeftOut,
}

impl Region {
    /// A region over a store that is open already.
    #[must_use]
    pub fn over(store: Arc<dyn Store>) -> Self {
        Self {
            name: store.region().to_owned(),
            place: store.describe(),
            access: Access::Store(store),
        }
    }

    /// The store, if the region can be asked.
    #[must_use]
    pub fn store(&self) -> Option<&Arc<dyn Store>> {
        match &self.access {
            Access::Store(store) => Some(store),
            Access::Failed { .. } | Access::LeftOut => None,
        }
    }
}

/// Passing failures of one call are retried for this long: a region that was lost for good must not cost the person
/// who waits for a restore half a minute, and another region is asked next.
const RETRY_BUDGET: Duration = Duration::from_secs(10);

/// Has every region but those in `without` read as it was at `time`.
///
/// # Errors
///
/// A region is a directory, which has no past: the others alone may have less than the operator thinks, so he says so.
pub fn read_as_of(config: &mut Config, time: Time, without: &[String]) -> Result<(), RestoreError> {
    let asked = |region: &&mut RegionConfig| !without.contains(&region.name);
    for region in config.regions.iter_mut().filter(asked) {
        if region.url.starts_with("file:") {
            let message = format!(
                "region {} is a directory, which keeps no versions and cannot be read as of {time}; leave it out with \
                 --without-region {}",
                region.name, region.name
            );
            return Err(RestoreError::failed(Exit::Usage, message));
        }
        region.as_of = Some(clock::to_system(time));
    }
    Ok(())
}

/// Opens all regions of the configuration, the preferred one first.
///
/// # Errors
///
/// A name in `preferred` or `without` that is not configured. A region that cannot be opened is not an error here.
pub async fn open(
    config: &Config,
    preferred: Option<&str>,
    without: &[String],
) -> Result<Vec<Region>, RestoreError> {
    let preferred = preferred.or(config.restore.region.as_deref());
    for name in preferred.into_iter().chain(without.iter().map(String::as_str)) {
        check_name(&config.regions, name)?;
    }
    let mut settings: Vec<&RegionConfig> = config.regions.iter().collect();
    settings.sort_by_key(|region| preferred != Some(region.name.as_str()));
    let open = settings.into_iter().map(|settings| async move {
        if without.contains(&settings.name) {
            return Region {
                name: settings.name.clone(),
                place: settings.url.clone(),
                access: Access::LeftOut,
            };
        }
        open_one(settings).await
    });
    Ok(futures::future::join_all(open).await)
}

async fn open_one(settings: &RegionConfig) -> Region {
    match highwater_store::open(settings).await {
        Ok(store) => {
            let store: Arc<dyn Store> = Arc::new(Retrying::new(
                store,
                RetryPolicy::interactive().with_budget(Some(RETRY_BUDGET)),
                Arc::new(NoObserver),
            ));
            Region {
                name: settings.name.clone(),
                place: store.describe(),
                access: Access::Store(store),
            }
        }
        Err(error) => Region {
            name: settings.name.clone(),
            place: settings.url.clone(),
            access: Access::Failed {
                error: error.to_string(),
                kind: error.kind(),
            },
        },
    }
}

fn check_name(regions: &[RegionConfig], name: &str) -> Result<(), RestoreError> {
    if regions.iter().any(|region| region.name == name) {
        return Ok(());
    }
    let known: Vec<&str> = regions.iter().map(|region| region.name.as_str()).collect();
    let message = format!("there is no region `{name}`; configured are {}", known.join(", "));
    Err(RestoreError::failed(Exit::Usage, message))
}

/// The next step where something is lacking and regions were left out on purpose; `None` where none were.
pub(crate) fn left_out_note<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let names: BTreeSet<&str> = names.into_iter().collect();
    let listed: Vec<&str> = names.into_iter().collect();
    let named = match listed.as_slice() {
        [] => return None,
        [one] => format!("region {one} was"),
        more => format!("regions {} were", more.join(" and ")),
    };
    let flags: Vec<String> = listed
        .iter()
        .map(|name| format!("--without-region {name}"))
        .collect();
    Some(format!(
        "{named} left out and may hold it: try the restore without {}",
        flags.join(" ")
    ))
}

/// What the failure of one object means for the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// It is not there.
    Absent,
    /// It is there and no good.
    Bad,
    /// The region does not answer: nothing is known.
    Silent,
}

/// Sorts a store's failure.
pub(crate) fn meaning(error: &StoreError) -> Meaning {
    match error.kind() {
        ErrorKind::NotFound => Meaning::Absent,
        ErrorKind::Corrupt => Meaning::Bad,
        ErrorKind::Retry | ErrorKind::Operator | ErrorKind::Config | ErrorKind::Conflict | ErrorKind::Bug => {
            Meaning::Silent
        }
    }
}

/// Whether a newer release wrote what could not be read.
pub(crate) fn is_newer(kind: FormatErrorKind) -> bool {
    matches!(kind, FormatErrorKind::NewerVersion | FormatErrorKind::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::left_out_note;

    #[test]
    fn every_region_that_was_left_out_is_named_once() {
        assert_eq!(left_out_note([]), None);
        assert_eq!(
            left_out_note(["b", "a", "b"]).as_deref(),
            Some(
                "regions a and b were left out and may hold it: try the restore without --without-region a --without-region b"
            )
        );
    }
}
