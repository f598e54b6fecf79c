//! One region of the archive is one [`Store`]: a bucket and prefix, or a directory.
//!
//! Owns: the storage trait and its implementations ([`open`] for `file://` and `s3://`, [`MemoryStore`],
//! [`FaultyStore`]), the classification of every failure into what the caller can do about it
//! ([`ErrorKind`]), and the only retry layer of the product ([`Retrying`]).
//!
//! Does not own: what the bytes mean (the format crate), which regions must hold them before they count
//! as durable (the agent), and when to delete (retention). Nothing outside this crate names an SDK type.
//!
//! `docs/stores.md` is the operator's page: URL forms, settings, permissions, what is verified.

mod config;
pub mod conformance;
mod error;
mod faulty;
mod file;
mod key;
mod location;
mod memory;
mod open;
mod probe;
mod retry;
mod s3;
mod store;

pub use config::RegionConfig;
pub use error::{ErrorKind, Operation, StoreError};
pub use faulty::{Fault, FaultRates, FaultyStore, Rule};
pub use key::MAX_KEY_LEN;
pub use location::Location;
pub use memory::MemoryStore;
pub use open::open;
pub use probe::{Capabilities, probe};
pub use retry::{NoObserver, RetryObserver, RetryPolicy, Retrying};
pub use store::{LIST_PAGE, LONG_PAGE, Meta, Object, Page, Put, PutMode, Store, list_all, list_parts};
