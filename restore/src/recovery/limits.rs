//! The limits of the original that a server must not go below while it recovers: all of them if it is to be read
//! meanwhile, and one in any case.
//!
//! Owns: which five settings these are and their values: the greater of what the original ran with when the backup was
//! taken (its control file; a command line may have raised them) and what the restored configuration says. A limit that was
//! raised later is not known here; the server then says so, and [`crate::run::watch`] passes it on.

use std::path::Path;

use crate::datadir::DataDirError;

/// In the order of the control file; `CheckRequiredParameterValues` in PostgreSQL's `xlogrecovery.c`.
pub const NAMES: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

/// The one that stops replay of a server that cannot be read, too: each prepared transaction in the WAL takes one of its
/// places (`PrepareRedoAdd` in `twophase.c`).
pub const PREPARED: &str = "max_prepared_transactions";
/// Its place in [`NAMES`].
pub const PREPARED_AT: usize = 3;

/// The values for a server on `root`, where the original ran with `original`.
///
/// # Errors
/// A configuration file cannot be read.
pub fn at_least(root: &Path, original: [u32; 5]) -> Result<Vec<(&'static str, u32)>, DataDirError> {
    let one = |(name, original): (&'static str, u32)| {
        let configured = super::configured(root, name)?.and_then(|value| value.parse().ok());
        Ok((name, original.max(configured.unwrap_or(0))))
    };
    NAMES.into_iter().zip(original).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_for_prepared_transactions_is_where_it_is_looked_for() {
        assert_eq!(NAMES[PREPARED_AT], PREPARED);
    }

    #[test]
    fn the_greater_of_original_and_configuration_counts() {
        let dir = tempfile::tempdir().unwrap();
        let conf = "max_connections = 200\nmax_wal_senders = 3\n";
        std::fs::write(dir.path().join("postgresql.conf"), conf).unwrap();
        let limits = at_least(dir.path(), [150, 8, 10, 0, 64]).unwrap();
        assert_eq!(
            limits.iter().map(|(_, value)| *value).collect::<Vec<_>>(),
            [200, 8, 10, 0, 64]
        );
    }
}
