//! Faults by number: one test for each scenario of `tests/FAULTS.md` that no other suite shows.
//!
//! Each scenario asserts what the table promises, against real PostgreSQL, real processes and endpoints that
//! fail on order, and ends with the oracle of the rig: what was reported as stored comes back from what the
//! regions hold.

mod apart;
mod backup;
mod clock;
mod cold;
mod cuts;
mod damage;
mod memory;
#[path = "../pulse/mod.rs"]
mod pulse;
mod restore;
mod security;
#[path = "../sent/mod.rs"]
mod sent;
#[path = "../pulse/silence.rs"]
mod silence;
mod standby;
mod storage;
mod stream;
mod support;
mod table;
mod versions;
