//! Lays the environment and the flags over the file. Owns variable names and the order of sources;
//! what the values mean is read later.

use crate::{
    Overrides,
    error::{ConfigError, Origin},
    file::{key_hint, section_hint},
    nearest::nearest,
    raw::{Given, Raw, RawRegion},
    schema,
};

/// Every `HIGHWATER_<SECTION>_<KEY>` and `HIGHWATER_REGION_<n>_<KEY>` that is set. An empty variable
/// counts as not set: that is what an orchestrator leaves of an optional value.
pub(crate) fn environment(raw: &mut Raw, env: &impl Fn(&str) -> Option<String>) {
    let lookup = |name: String| {
        let text = env(&name).filter(|text| !text.trim().is_empty())?;
        Some(Given {
            text,
            origin: Origin::Environment(name),
        })
    };
    for section in schema::SECTIONS {
        for key in section.keys {
            if let Some(given) = lookup(schema::variable(section.name, key)) {
                raw.set(section.name, key, given);
            }
        }
    }
    for number in 1..=schema::MAX_REGIONS {
        let values = schema::REGION_KEYS
            .iter()
            .filter_map(|key| lookup(schema::region_variable(number, key)).map(|given| (*key, given)));
        for (key, given) in values {
            if raw.regions.len() < number {
                raw.regions.resize(number, RawRegion::default());
            }
            if let Some(region) = raw.regions.get_mut(number - 1) {
                region.values.insert(key, given);
            }
        }
    }
}

/// `--archive` replaces the list of regions, of file and environment. One that names a configured URL keeps its settings,
/// also where the environment has put another in its place (`of_the_file`: as it was before);
/// any other takes what the environment says of the region with its number, which is how a secret gets to it.
pub(crate) fn archives(raw: &mut Raw, of_the_file: &[RawRegion], archives: &[String]) {
    if archives.is_empty() {
        return;
    }
    let known = std::mem::take(&mut raw.regions);
    raw.regions = archives
        .iter()
        .enumerate()
        .map(|(index, archive)| {
            let (name, url) = match archive.split_once('=') {
                Some((name, url)) if !name.contains(['/', ':']) => (Some(name), url),
                _ => (None, archive.as_str()),
            };
            let same = |region: &&RawRegion| region.values.get("url").is_some_and(|given| given.text == url);
            let mut region = match known.iter().chain(of_the_file).find(same) {
                Some(configured) => configured.clone(),
                None => known.get(index).map(for_another_place).unwrap_or_default(),
            };
            let given = |text: &str| Given {
                text: text.to_owned(),
                origin: Origin::Flag("--archive".to_owned()),
            };
            region.values.insert("url", given(url));
            if let Some(name) = name {
                region.values.insert("name", given(name));
            }
            region
        })
        .collect();
}

/// What the environment says of a region's access. Its url gives way to the flag, and with it the name that belongs to that
/// url; what the file says is of another place.
fn for_another_place(region: &RawRegion) -> RawRegion {
    let leads_elsewhere = region.values.contains_key("url");
    let values = region.values.iter().filter(|(key, given)| {
        let identity = **key == "url" || (**key == "name" && leads_elsewhere);
        matches!(given.origin, Origin::Environment(_)) && !identity
    });
    RawRegion {
        values: values.map(|(key, given)| (*key, given.clone())).collect(),
    }
}

/// All other flags.
pub(crate) fn flags(raw: &mut Raw, overrides: &Overrides) -> Result<(), ConfigError> {
    let plain = [
        ("cluster", "name", "--cluster", &overrides.cluster_name),
        ("cluster", "connection", "--connection", &overrides.connection),
        ("cluster", "slot", "--slot", &overrides.slot),
    ];
    for (section, key, flag, value) in plain {
        if let Some(text) = value {
            raw.set(
                section,
                key,
                Given {
                    text: text.clone(),
                    origin: Origin::Flag(flag.to_owned()),
                },
            );
        }
    }
    for (name, text) in &overrides.settings {
        let origin = Origin::Flag(format!("--set {name}"));
        let (section, key) = setting(name, &origin)?;
        raw.set(
            section,
            key,
            Given {
                text: text.clone(),
                origin,
            },
        );
    }
    Ok(())
}

/// The schema's own names for `section.key`.
fn setting(name: &str, origin: &Origin) -> Result<(&'static str, &'static str), ConfigError> {
    let Some((section_name, key)) = name.split_once('.') else {
        let hint = schema::home_of(name).map_or_else(
            || "; write it as section.key".to_owned(),
            |home| format!("; did you mean `{home}.{name}`?"),
        );
        return Err(ConfigError::UnknownKey {
            origin: origin.clone(),
            section: "the top level".to_owned(),
            key: name.to_owned(),
            hint,
        });
    };
    let Some(section) = schema::section(section_name) else {
        return Err(ConfigError::UnknownSection {
            origin: origin.clone(),
            section: section_name.to_owned(),
            hint: section_hint(section_name),
        });
    };
    let known = section.keys.iter().find(|known| **known == key);
    known
        .map(|known| (section.name, *known))
        .ok_or_else(|| ConfigError::UnknownKey {
            origin: origin.clone(),
            section: format!("[{section_name}]"),
            key: key.to_owned(),
            hint: key_hint(key, section.keys),
        })
}

/// `HIGHWATER_*` variables that no setting reads, each with the nearest one that exists. `names` are
/// the names in the environment; `also` are further names that a program reads itself.
pub(crate) fn unknown_variables(names: impl Iterator<Item = String>, also: &[&str]) -> Vec<String> {
    let known = known_variables();
    let own = |name: &String| {
        name.starts_with("HIGHWATER_") && !known.contains(name) && !also.contains(&name.as_str())
    };
    names
        .filter(own)
        .map(
            |name| match nearest(&name.to_ascii_lowercase(), known.iter().map(String::as_str)) {
                Some(near) => format!("environment variable {name} means nothing here; did you mean {near}?"),
                None => format!("environment variable {name} means nothing here"),
            },
        )
        .collect()
}

fn known_variables() -> Vec<String> {
    let scalars = schema::SECTIONS
        .iter()
        .flat_map(|section| section.keys.iter().map(|key| schema::variable(section.name, key)));
    let regions = (1..=schema::MAX_REGIONS).flat_map(|number| {
        schema::REGION_KEYS
            .iter()
            .map(move |key| schema::region_variable(number, key))
    });
    scalars
        .chain(regions)
        .chain([crate::CONFIG_VARIABLE.to_owned()])
        .collect()
}
