//! The fault sweep: an error and a crash at every single request that an operation makes to a store, each followed by a clean
//! run, after which the archive is in the state of a run without faults.
//!
//! Owns: which request is struck, and what "the same state" is. The request is the n-th that a region gets, for
//! n = 1, 2, ... until the operation makes fewer. There are eight blows:
//!
//! - a passing error at the n-th request to one region, while the n-th to the other takes effect without a reply (two: either
//!   region); calls are made again, and the operation should not notice;
//! - a refusal of the n-th request to one region (two), which the operation itself has to bear: as for a missing right (403)
//!   or, every other four requests, as of a malformed request (400). An agent that ends for it is started again;
//! - the death of the process at the n-th request to one region, before it takes effect or after it did (four).
//!
//! By default a request gets two of them: the passing error or the refusal, and one death. Which, and in which region, changes
//! from request to request, so that no request gets every blow; and behind the twentieth request of an operation only every
//! fifth is struck. Those about a gap's record get all eight. With `HIGHWATER_SWEEP=every` no request is left out, and with
//! `HIGHWATER_SWEEP=all` every request gets all eight.
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
