//! Which PostgreSQL majors are there, and where their programs are.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::skip;

/// A supported PostgreSQL major version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PgVersion {
    /// PostgreSQL 14.
    V14,
    /// PostgreSQL 15.
    V15,
    /// PostgreSQL 16.
    V16,
    /// PostgreSQL 17.
    V17,
    /// PostgreSQL 18.
    V18,
}

impl PgVersion {
    /// All of them, oldest first.
    pub const ALL: [Self; 5] = [Self::V14, Self::V15, Self::V16, Self::V17, Self::V18];

    /// Its number.
    #[must_use]
    pub fn major(self) -> u32 {
        match self {
            Self::V14 => 14,
            Self::V15 => 15,
            Self::V16 => 16,
            Self::V17 => 17,
            Self::V18 => 18,
        }
    }

    /// The directory of its programs, when it is installed: the distribution's, or else the one
    /// that `scripts/setup.sh` unpacked.
    #[must_use]
    pub fn available(self) -> Option<PathBuf> {
        let major = self.major();
        let unpacked = target_dir().join(format!("pg/{major}/native/bin"));
        let distribution = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
        [distribution, unpacked]
            .into_iter()
            .find(|bin| bin.join("postgres").exists() && bin.join("initdb").exists())
    }

    /// Those that are installed, oldest first, for tests of every major.
    ///
    /// # Errors
    /// Where `CI` is set and one is missing; elsewhere that is only said.
    pub fn installed() -> anyhow::Result<Vec<Self>> {
        let mut found = Vec::new();
        for version in Self::ALL {
            match version.available() {
                Some(_) => found.push(version),
                None => skip::not_installed(&version.to_string())?,
            }
        }
        Ok(found)
    }

    /// The directory of its programs, for tests that cannot do without.
    ///
    /// # Errors
    /// When it is not installed; the message says how to install it.
    pub fn bin(self) -> anyhow::Result<PathBuf> {
        self.available()
            .ok_or_else(|| anyhow::anyhow!("{self} is not installed on this machine: run scripts/setup.sh"))
    }
}

impl fmt::Display for PgVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgreSQL {}", self.major())
    }
}

/// `pgbench` of any installed major: it works with servers of all of them.
#[must_use]
pub fn pgbench() -> Option<PathBuf> {
    PgVersion::ALL
        .iter()
        .rev()
        .filter_map(|version| version.available())
        .map(|bin| bin.join("pgbench"))
        .find(|path| path.exists())
}

/// Cargo's target directory, where programs are built and PostgreSQL is unpacked.
#[must_use]
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target"),
    }
}
