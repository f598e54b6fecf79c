//! What the process's surroundings contribute: environment variables, home directory, user name.
//!
//! Read once into a value, so that tests need not change the process.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// The surroundings a connection string is resolved in.
#[derive(Clone, Default)]
pub struct Environment {
    variables: HashMap<String, String>,
    home: Option<PathBuf>,
    user: Option<String>,
}

impl Environment {
    /// Nothing set.
    pub fn empty() -> Environment {
        Environment::default()
    }

    /// This process: variables that begin with `PG`, the home directory and name of its user.
    pub fn process() -> Environment {
        let account = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
        let home = std::env::var_os("HOME")
            .filter(|home| !home.is_empty())
            .map(PathBuf::from);
        Environment {
            variables: std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .filter(|(name, _)| name.starts_with("PG"))
                .collect(),
            home: home.or_else(|| account.as_ref().map(|account| account.dir.clone())),
            user: account.map(|account| account.name),
        }
    }

    /// Sets one variable.
    #[must_use]
    pub fn with_variable(mut self, name: &str, value: &str) -> Environment {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Sets the home directory.
    #[must_use]
    pub fn with_home(mut self, home: impl Into<PathBuf>) -> Environment {
        self.home = Some(home.into());
        self
    }

    /// Sets the name of the operating system's user.
    #[must_use]
    pub fn with_user(mut self, user: &str) -> Environment {
        self.user = Some(user.to_owned());
        self
    }

    /// A variable; set and empty counts as not set, as in libpq.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.variables
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    pub(super) fn home_file(&self, name: &str) -> Option<PathBuf> {
        self.home.as_deref().map(|home| home.join(name))
    }

    pub(super) fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    pub(super) fn home(&self) -> Option<&Path> {
        self.home.as_deref()
    }
}

/// Names only: `PGPASSWORD` is among the values.
impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<&String> = self.variables.keys().collect();
        names.sort();
        f.debug_struct("Environment")
            .field("variables", &names)
            .field("home", &self.home)
            .field("user", &self.user)
            .finish()
    }
}
