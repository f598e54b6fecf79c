//! Settings as text, each with where it came from, before anything is read into types. Sources are
//! laid over one another here: file, then environment, then flags; the last one given wins.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::{
    error::{ConfigError, Origin},
    schema,
};

/// One value as it was written. `Debug` leaves the text out: it may be a secret.
#[derive(Clone)]
pub(crate) struct Given {
    pub(crate) text: String,
    pub(crate) origin: Origin,
}

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "given in {}", self.origin)
    }
}

/// The settings of one region.
#[derive(Debug, Clone, Default)]
pub(crate) struct RawRegion {
    pub(crate) values: BTreeMap<&'static str, Given>,
}

/// All settings given, known by name, not yet understood.
#[derive(Debug, Clone, Default)]
pub(crate) struct Raw {
    pub(crate) scalars: BTreeMap<(&'static str, &'static str), Given>,
    pub(crate) regions: Vec<RawRegion>,
}

impl Raw {
    /// Notes `section.key`; names must come from the schema.
    pub(crate) fn set(&mut self, section: &'static str, key: &'static str, given: Given) {
        self.scalars.insert((section, key), given);
    }

    pub(crate) fn get(&self, section: &'static str, key: &'static str) -> Option<&Given> {
        self.scalars
            .get(&(section, key))
            .filter(|given| !given.text.trim().is_empty())
    }

    /// The text of a setting, if it is given and not empty.
    pub(crate) fn text(&self, section: &'static str, key: &'static str) -> Option<String> {
        self.get(section, key).map(|given| given.text.clone())
    }

    /// A setting read into its type, or its default.
    pub(crate) fn read<T>(
        &self,
        section: &'static str,
        key: &'static str,
        default: T,
    ) -> Result<T, ConfigError>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        Ok(self.read_optional(section, key)?.unwrap_or(default))
    }

    /// A setting read into its type, if it is given.
    pub(crate) fn read_optional<T>(
        &self,
        section: &'static str,
        key: &'static str,
    ) -> Result<Option<T>, ConfigError>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        self.get(section, key)
            .map(|given| {
                given
                    .text
                    .trim()
                    .parse()
                    .map_err(|error: T::Err| self.bad(section, key, &error.to_string()))
            })
            .transpose()
    }

    /// As [`Raw::read`], refusing values outside `[least, most]`.
    pub(crate) fn bounded<T>(
        &self,
        section: &'static str,
        key: &'static str,
        default: T,
        (least, most): (T, T),
    ) -> Result<T, ConfigError>
    where
        T: FromStr + PartialOrd + fmt::Display,
        T::Err: fmt::Display,
    {
        let value = self.read(section, key, default)?;
        if value < least || value > most {
            return Err(self.bad(section, key, &format!("{value} is outside {least} to {most}")));
        }
        Ok(value)
    }

    /// The error for a value that cannot be used, naming where it stands.
    pub(crate) fn bad(&self, section: &'static str, key: &'static str, problem: &str) -> ConfigError {
        let origin = self.scalars.get(&(section, key)).map_or_else(
            || Origin::Environment(schema::variable(section, key)),
            |given| given.origin.clone(),
        );
        ConfigError::BadValue {
            origin,
            setting: format!("{section}.{key}"),
            problem: problem.to_owned(),
        }
    }
}
