//! The fault sweep: an error, a lost reply and a crash at every single request that an operation makes to a store,
//! each followed by a clean run, after which the archive is in the state of a run without faults.
//!
//! Owns: which request is struck, and what "the same state" is. The request is the n-th that a region gets, for
//! n = 1, 2, ... until the operation makes fewer. In one run the n-th request to one region fails and the n-th to
//! the other takes effect without a reply; in another one the process is killed at the n-th request of one region,
//! before it takes effect or after it did. Regions and sides take turns from request to request, and of the many
//! requests of a long operation every fifth is struck; `HIGHWATER_SWEEP=all` strikes every one, with the error in either
//! region and all four crashes.
//!
//! The same state: in both regions WAL without a hole to the end that was asked for, but for gaps that both have on record,
//! equal bytes, the same histories, and base backups that both have. After every run each visible base backup is planned
//! with, from each region alone; each state that differs in what base backups are visible or unfinished where is, once,
//! verified object by object, restored and started from each region. What an operation must hold to at every moment, like
//! a history that comes before its timeline, is looked at when the process was killed, before the next one starts.

mod backup;
mod bench;
mod blow;
mod gap;
mod heal;
mod judge;
mod stream;
mod takeover;
mod timeline;
