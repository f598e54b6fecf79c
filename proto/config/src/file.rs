//! Reads the TOML file into [`Raw`], checking every name against the schema. Owns line numbers and
//! suggestions; knows nothing of what the values mean.

use std::{
    fs,
    io::{self, Read as _},
    ops::Range,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use toml::de::{DeTable, DeValue};

use crate::{
    error::{ConfigError, Origin},
    nearest::nearest,
    raw::{Given, Raw, RawRegion},
    schema,
};

/// A file of settings is a page or two; a device or a database given by mistake is not read whole.
const MAX_FILE: u64 = 1 << 20;

/// Reads the file at `path`.
pub(crate) fn read(path: &Path) -> Result<Raw, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let file = fs::File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    let mut text = String::new();
    file.take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE {
        return Err(unreadable(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "it is larger than 1 MiB",
        )));
    }
    let raw = parse(path, &text)?;
    refuse_exposed(path, &metadata, &raw)?;
    Ok(raw)
}

/// Reads the text of a file; `path` is only for messages.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Raw, ConfigError> {
    let reader = Reader { path, text };
    let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        origin: reader.origin(&error.span().unwrap_or(0..0)),
        message: error.message().trim().to_owned(),
    })?;
    let mut raw = Raw::default();
    for (name, value) in table.get_ref() {
        reader.section(&mut raw, name.get_ref(), &name.span(), value.get_ref())?;
    }
    Ok(raw)
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn origin(&self, span: &Range<usize>) -> Origin {
        let before = self.text.as_bytes().iter().take(span.start);
        let line = 1 + before.filter(|byte| **byte == b'\n').count();
        Origin::File {
            path: self.path.to_owned(),
            line,
        }
    }

    fn section(
        &self,
        raw: &mut Raw,
        name: &str,
        span: &Range<usize>,
        value: &DeValue<'_>,
    ) -> Result<(), ConfigError> {
        if name == schema::REGION {
            return self.regions(raw, span, value);
        }
        let (Some(section), Some(table)) = (schema::section(name), value.as_table()) else {
            return Err(self.unknown_section(name, span, value));
        };
        for (key, value) in table {
            let known = section.keys.iter().find(|known| **known == key.get_ref());
            let Some(known) = known else {
                return Err(self.unknown_key(&format!("[{name}]"), key.get_ref(), section.keys, &key.span()));
            };
            let given = self.given(name, known, value.get_ref(), &key.span())?;
            raw.set(section.name, known, given);
        }
        Ok(())
    }

    fn regions(&self, raw: &mut Raw, span: &Range<usize>, value: &DeValue<'_>) -> Result<(), ConfigError> {
        let Some(tables) = value.as_array() else {
            return Err(ConfigError::BadValue {
                origin: self.origin(span),
                setting: "region".to_owned(),
                problem: "regions are a list: write [[region]] with two brackets, once per region".to_owned(),
            });
        };
        for table in tables {
            let mut region = RawRegion::default();
            for (key, value) in table.get_ref().as_table().into_iter().flatten() {
                let known = schema::REGION_KEYS.iter().find(|known| **known == key.get_ref());
                let Some(known) = known else {
                    return Err(self.unknown_key(
                        "[[region]]",
                        key.get_ref(),
                        schema::REGION_KEYS,
                        &key.span(),
                    ));
                };
                let given = self.given(schema::REGION, known, value.get_ref(), &key.span())?;
                region.values.insert(known, given);
            }
            raw.regions.push(region);
        }
        Ok(())
    }

    fn given(
        &self,
        section: &str,
        key: &str,
        value: &DeValue<'_>,
        span: &Range<usize>,
    ) -> Result<Given, ConfigError> {
        let origin = self.origin(span);
        let text = match value {
            DeValue::String(text) => text.to_string(),
            DeValue::Integer(number) if number.radix() == 10 => number.as_str().to_owned(),
            DeValue::Boolean(flag) => flag.to_string(),
            other => {
                let problem = format!(
                    "this takes a text, a number or true/false, and this is of type {}",
                    other.type_str()
                );
                return Err(ConfigError::BadValue {
                    origin,
                    setting: format!("{section}.{key}"),
                    problem,
                });
            }
        };
        Ok(Given { text, origin })
    }

    fn unknown_section(&self, name: &str, span: &Range<usize>, value: &DeValue<'_>) -> ConfigError {
        let origin = self.origin(span);
        if !value.is_table() && !value.is_array() {
            let hint = schema::home_of(name).map_or_else(
                || "; settings stand in sections, as in [cluster]".to_owned(),
                |home| format!("; it belongs in [{home}]"),
            );
            return ConfigError::UnknownKey {
                origin,
                section: "the top level".to_owned(),
                key: name.to_owned(),
                hint,
            };
        }
        if schema::section(name).is_some() {
            let problem = format!("this is one section: write [{name}] with one pair of brackets, once");
            return ConfigError::BadValue {
                origin,
                setting: name.to_owned(),
                problem,
            };
        }
        ConfigError::UnknownSection {
            origin,
            section: name.to_owned(),
            hint: section_hint(name),
        }
    }

    fn unknown_key(&self, section: &str, key: &str, known: &[&str], span: &Range<usize>) -> ConfigError {
        ConfigError::UnknownKey {
            origin: self.origin(span),
            section: section.to_owned(),
            key: key.to_owned(),
            hint: key_hint(key, known),
        }
    }
}

/// The clause that names the nearest section.
pub(crate) fn section_hint(name: &str) -> String {
    let known = schema::SECTIONS
        .iter()
        .map(|section| section.name)
        .chain([schema::REGION]);
    match nearest(name, known) {
        Some(schema::REGION) => "; did you mean [[region]]?".to_owned(),
        Some(near) => format!("; did you mean [{near}]?"),
        None => {
            let names: Vec<_> = schema::SECTIONS.iter().map(|section| section.name).collect();
            format!("; sections are {} and [[region]]", names.join(", "))
        }
    }
}

/// The clause that names the nearest key of the section, or the section that knows the key.
pub(crate) fn key_hint(key: &str, known: &[&str]) -> String {
    match (schema::home_of(key), nearest(key, known.iter().copied())) {
        (Some(home), _) => format!("; it belongs in [{home}]"),
        (None, Some(near)) => format!("; did you mean `{near}`?"),
        (None, None) => format!("; known there: {}", known.join(", ")),
    }
}

/// A file with a secret in it must be its owner's alone. Root's files may be readable by a group:
/// that is how orchestrators hand secrets to a process that is not root.
fn refuse_exposed(path: &Path, metadata: &fs::Metadata, raw: &Raw) -> Result<(), ConfigError> {
    let Some(setting) = secret_setting(raw) else {
        return Ok(());
    };
    let mode = metadata.permissions().mode() & 0o777;
    let allowed = if metadata.uid() == 0 { 0o740 } else { 0o700 };
    if mode & !allowed == 0 {
        return Ok(());
    }
    Err(ConfigError::Exposed {
        path: path.to_owned(),
        setting,
        mode,
    })
}

fn secret_setting(raw: &Raw) -> Option<String> {
    let connection = raw
        .get("cluster", "connection")
        .filter(|given| holds_password(&given.text));
    if connection.is_some() {
        return Some("cluster.connection".to_owned());
    }
    let secrets = raw.regions.iter().flat_map(|region| region.values.keys());
    secrets
        .copied()
        .find(|key| schema::is_secret(schema::REGION, key))
        .map(|key| format!("region.{key}"))
}

fn holds_password(connection: &str) -> bool {
    let user = connection
        .split_once("://")
        .and_then(|(_, rest)| rest.split('/').next());
    let in_uri = user
        .and_then(|rest| rest.rsplit_once('@'))
        .is_some_and(|(user, _)| user.contains(':'));
    in_uri
        || connection
            .split(|c: char| matches!(c, '=' | '?' | '&') || c.is_whitespace())
            .any(|word| word == "password")
}
