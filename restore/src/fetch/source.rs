//! Reading one object from whichever region has a good copy.
//!
//! Owns: the order of regions, the fallback from one to the next for each object, and remembering which region does
//! not answer, so that a dead one costs its time-out once and not for every object. Does not own: retries (the store's
//! one retry layer is below), and what makes a copy good (the caller's check says).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use highwater_config::Exit;
use highwater_store::{ErrorKind, Store, StoreError};

/// The regions of one archive, the preferred one first.
#[derive(Debug, Clone)]
pub struct Sources {
    regions: Vec<Region>,
}

#[derive(Debug, Clone)]
struct Region {
    store: Arc<dyn Store>,
    /// Its last answer was a failure that retries did not cure: asked last.
    failing: Arc<AtomicBool>,
}

/// What a check says about a copy that it does not accept.
#[derive(Debug)]
pub enum Reject<E> {
    /// The copy is bad; another region's may be good.
    Copy(String),
    /// It is not the copy: stop.
    Fatal(E),
}

/// One region's reason.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The region.
    pub region: String,
    /// What is wrong there.
    pub reason: String,
    /// What the store said; `None` if it delivered a copy that was not accepted.
    pub kind: Option<ErrorKind>,
}

/// No region has a good copy.
#[derive(Debug, Clone, thiserror::Error)]
pub struct Nowhere {
    /// The object.
    pub key: String,
    /// What each region said.
    pub attempts: Vec<Attempt>,
}

impl fmt::Display for Nowhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no region has a good copy of {}", self.key)?;
        for attempt in &self.attempts {
            write!(f, "; {}: {}", attempt.region, attempt.reason)?;
        }
        f.write_str(if self.may_pass() {
            "; try again when the regions answer"
        } else {
            "; run `highwater-restore verify`"
        })
    }
}

impl Nowhere {
    /// What each region said, without the key.
    #[must_use]
    pub fn reasons(&self) -> String {
        let said = self.attempts.iter();
        let said: Vec<String> = said
            .map(|attempt| format!("{}: {}", attempt.region, attempt.reason))
            .collect();
        said.join("; ")
    }

    /// Every region answered, and none has the object.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        self.attempts
            .iter()
            .all(|attempt| attempt.kind == Some(ErrorKind::NotFound))
    }

    /// A region did not answer, so that a later attempt may succeed.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        let passing = |kind| matches!(kind, ErrorKind::Retry | ErrorKind::Operator | ErrorKind::Config);
        self.attempts
            .iter()
            .any(|attempt| attempt.kind.is_some_and(passing))
    }

    /// What the program ends with.
    #[must_use]
    pub fn exit(&self) -> Exit {
        if self.may_pass() {
            Exit::Trouble
        } else {
            Exit::Damage
        }
    }
}

/// Why an object could not be had.
#[derive(Debug)]
pub enum ReadError<E> {
    /// No region has a good copy.
    Nowhere(Nowhere),
    /// The check stopped the search.
    Fatal(E),
}

/// An object and the region it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Had<T> {
    /// What the check made of it.
    pub value: T,
    /// Where it came from.
    pub region: String,
    /// Whether a region before it failed.
    pub fell_back: bool,
}

impl Sources {
    /// Regions in order of preference.
    #[must_use]
    pub fn new(regions: Vec<Arc<dyn Store>>) -> Self {
        let region = |store| Region {
            store,
            failing: Arc::new(AtomicBool::new(false)),
        };
        Self {
            regions: regions.into_iter().map(region).collect(),
        }
    }

    /// Asks the regions marked here, in the order of preference, after the others until they answer: it is known from
    /// before that they did not.
    #[must_use]
    pub fn asking_last(self, marks: &[bool]) -> Self {
        for (region, last) in self.regions.iter().zip(marks) {
            region.failing.store(*last, Ordering::Relaxed);
        }
        self
    }

    /// The stores, in order.
    pub fn stores(&self) -> impl Iterator<Item = &Arc<dyn Store>> {
        self.regions.iter().map(|region| &region.store)
    }

    /// The names of the regions.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.stores().map(|store| store.region().to_owned()).collect()
    }

    /// Reads `key` from the first region whose copy `check` accepts.
    ///
    /// # Errors
    /// [`ReadError::Nowhere`] with every region's reason, or what `check` stops with.
    pub async fn read<T, E, F, C>(&self, key: &str, mut check: C) -> Result<Had<T>, ReadError<E>>
    where
        C: FnMut(Bytes) -> F,
        F: Future<Output = Result<T, Reject<E>>>,
    {
        let mut attempts = Vec::new();
        for region in self.in_order() {
            let name = region.store.region();
            let attempt = match region.get(key).await {
                Ok(bytes) => match check(bytes).await {
                    Ok(value) => {
                        return Ok(Had {
                            value,
                            region: name.to_owned(),
                            fell_back: !attempts.is_empty(),
                        });
                    }
                    Err(Reject::Copy(reason)) => Attempt {
                        region: name.to_owned(),
                        reason,
                        kind: None,
                    },
                    Err(Reject::Fatal(error)) => return Err(ReadError::Fatal(error)),
                },
                Err(error) => Attempt {
                    region: name.to_owned(),
                    reason: error.to_string(),
                    kind: Some(error.kind()),
                },
            };
            match attempt.kind {
                // A standby asks for the next segment until it is there.
                Some(ErrorKind::NotFound) => {
                    tracing::info!(key, region = name, "this region does not have it")
                }
                _ => {
                    tracing::warn!(key, region = name, reason = %attempt.reason, "this region's copy cannot be used")
                }
            }
            attempts.push(attempt);
        }
        Err(ReadError::Nowhere(Nowhere {
            key: key.to_owned(),
            attempts,
        }))
    }

    /// Regions that answer first, each group in the order of preference.
    fn in_order(&self) -> Vec<&Region> {
        let (failing, answering): (Vec<_>, Vec<_>) = self
            .regions
            .iter()
            .partition(|region| region.failing.load(Ordering::Relaxed));
        answering.into_iter().chain(failing).collect()
    }
}

impl Region {
    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        let got = self.store.get(key).await;
        let silent =
            matches!(&got, Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt));
        self.failing.store(silent, Ordering::Relaxed);
        got
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
