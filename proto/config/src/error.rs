//! What can be wrong with a configuration, told so that it can be mended: where the setting came
//! from, what it said (unless it is a secret), what is accepted.

use std::{fmt, io, path::PathBuf};

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of the configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A flag of the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}, line {line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why there is no usable configuration. All of these end a program with [`crate::Exit::Usage`].
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read configuration file {}: {source}; check the path given with --config", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{origin}: this is not valid TOML: {message}")]
    Syntax {
        /// File and line.
        origin: Origin,
        /// The parser's words.
        message: String,
    },
    /// A section that does not exist.
    #[error("{origin}: there is no section [{section}]{hint}")]
    UnknownSection {
        /// Where it was found.
        origin: Origin,
        /// The name as given.
        section: String,
        /// The nearest known section, as a clause, or nothing.
        hint: String,
    },
    /// A key that does not exist.
    #[error("{origin}: there is no setting `{key}` in {section}{hint}")]
    UnknownKey {
        /// Where it was found.
        origin: Origin,
        /// The section it was found in, as it is written in a file.
        section: String,
        /// The name as given.
        key: String,
        /// The nearest known setting, as a clause, or nothing.
        hint: String,
    },
    /// A value that cannot be used.
    #[error("{origin}: {setting}: {problem}")]
    BadValue {
        /// Where it was found.
        origin: Origin,
        /// `section.key`.
        setting: String,
        /// What is wrong and what would be accepted.
        problem: String,
    },
    /// A setting without which nothing works.
    #[error("{setting} is not set; {how}")]
    Missing {
        /// `section.key`.
        setting: String,
        /// How to give it.
        how: String,
    },
    /// Settings that are fine one by one and not together.
    #[error("{problem}")]
    Contradiction {
        /// The settings involved and what to change.
        problem: String,
    },
    /// The file holds a secret that others may read.
    #[error(
        "{} holds a secret ({setting}) and its mode {mode:03o} lets others read it; run `chmod 600 {}`",
        path.display(), path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// The secret setting.
        setting: String,
        /// The permission bits found.
        mode: u32,
    },
}
