//! Builds the regions: names that are missing are taken from the URL, everything is checked that can
//! be checked without the network.

use std::{collections::BTreeSet, str::FromStr, time::Duration};

use highwater_store::RegionConfig;
use secrecy::SecretString;

use crate::{
    error::{ConfigError, Origin},
    raw::{Raw, RawRegion},
    schema,
    units::Interval,
};

/// Below this a timeout only produces errors; above it a frozen endpoint looks like a slow one.
const TIMEOUTS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3600));

/// All regions, names distinct.
pub(crate) fn build(raw: &Raw) -> Result<Vec<RegionConfig>, ConfigError> {
    if raw.regions.is_empty() {
        return Err(ConfigError::Missing {
            setting: "region".to_owned(),
            how: "give at least one [[region]] with a url, HIGHWATER_REGION_1_URL or --archive URL"
                .to_owned(),
        });
    }
    let mut taken: BTreeSet<String> = BTreeSet::new();
    let mut regions = Vec::new();
    for (index, given) in raw.regions.iter().enumerate() {
        let region = One {
            number: index + 1,
            given,
        }
        .build(&taken)?;
        taken.insert(region.name.clone());
        regions.push(region);
    }
    refuse_same_url(&regions)?;
    Ok(regions)
}

/// Two regions in one place are one region: a policy of "all" would promise a safety that is not there.
fn refuse_same_url(regions: &[RegionConfig]) -> Result<(), ConfigError> {
    let mut places: BTreeSet<(&str, Option<&str>)> = BTreeSet::new();
    for region in regions {
        if !places.insert((region.url.trim_end_matches('/'), region.endpoint.as_deref())) {
            let problem = format!(
                "two regions have the url {}; each region needs a place of its own",
                region.url
            );
            return Err(ConfigError::Contradiction { problem });
        }
    }
    Ok(())
}

struct One<'a> {
    number: usize,
    given: &'a RawRegion,
}

impl One<'_> {
    fn build(&self, taken: &BTreeSet<String>) -> Result<RegionConfig, ConfigError> {
        let url = self
            .text("url")
            .ok_or_else(|| self.missing("url", "as in \"s3://bucket/prefix\" or \"file:///directory\""))?;
        self.check_url(&url)?;
        let name = self.name(&url, taken)?;
        let mut region = RegionConfig::new(name, url);
        region.endpoint = self.text("endpoint");
        self.check_endpoint(region.endpoint.as_deref())?;
        region.allow_http = self.flag("allow_http")?.unwrap_or(false);
        region.region = self.text("region");
        region.path_style = self.flag("path_style")?;
        region.ca_file = self.text("ca_file").map(Into::into);
        region.profile = self.text("profile");
        region.access_key_id = self.text("access_key_id");
        region.secret_access_key = self.text("secret_access_key").map(SecretString::from);
        region.storage_class = self.text("storage_class");
        region.connect_timeout = self.timeout("connect_timeout", region.connect_timeout)?;
        region.attempt_timeout = self.timeout("attempt_timeout", region.attempt_timeout)?;
        region.operation_timeout = self.timeout("operation_timeout", region.operation_timeout)?;
        if region.access_key_id.is_some() != region.secret_access_key.is_some() {
            let problem = "access_key_id and secret_access_key go together; give both or neither";
            let present = if region.access_key_id.is_some() {
                "access_key_id"
            } else {
                "secret_access_key"
            };
            return Err(self.bad(present, problem));
        }
        Ok(region)
    }

    fn check_url(&self, url: &str) -> Result<(), ConfigError> {
        let problem = match url.split_once("://") {
            Some(("s3", rest)) if rest.contains('@') => {
                "put no credentials into the url; use the standard chain, or access_key_id and secret_access_key"
            }
            Some(("s3", rest)) if !rest.is_empty() && !rest.starts_with('/') => return Ok(()),
            Some(("s3", _)) => "the bucket is missing; write s3://bucket or s3://bucket/prefix",
            Some(("file", rest)) if rest.starts_with('/') && rest.len() > 1 => return Ok(()),
            Some(("file", _)) => "the directory must be absolute; write file:///directory with three slashes",
            Some(_) => "only s3:// and file:// are known here",
            None => "a url is needed, as in \"s3://bucket/prefix\" or \"file:///directory\"",
        };
        Err(self.bad("url", problem))
    }

    fn check_endpoint(&self, endpoint: Option<&str>) -> Result<(), ConfigError> {
        match endpoint.map(|text| text.split_once("://")) {
            None | Some(Some(("http" | "https", _))) => Ok(()),
            Some(_) => Err(self.bad(
                "endpoint",
                "write it with its scheme, as in \"https://minio.example:9000\"",
            )),
        }
    }

    /// The name as given, or the bucket or directory, made distinct.
    fn name(&self, url: &str, taken: &BTreeSet<String>) -> Result<String, ConfigError> {
        if let Some(name) = self.text("name") {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if name.len() > 63 || !name.chars().all(allowed) {
                return Err(self.bad("name", "use up to 63 letters, digits and any of - _ ."));
            }
            if taken.contains(&name) {
                return Err(self.bad("name", "another region has this name; each needs its own"));
            }
            return Ok(name);
        }
        let base = derived_name(url);
        let numbered = (2..).map(|number| format!("{base}-{number}"));
        let name = std::iter::once(base.clone())
            .chain(numbered)
            .find(|name| !taken.contains(name));
        Ok(name.unwrap_or(base))
    }

    fn text(&self, key: &'static str) -> Option<String> {
        let given = self.given.values.get(key)?;
        Some(given.text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn flag(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.text(key).as_deref() {
            None => Ok(None),
            Some("true" | "on" | "yes" | "1") => Ok(Some(true)),
            Some("false" | "off" | "no" | "0") => Ok(Some(false)),
            Some(other) => Err(self.bad(key, &format!("`{other}` is neither true nor false"))),
        }
    }

    fn timeout(&self, key: &'static str, default: Duration) -> Result<Duration, ConfigError> {
        let Some(text) = self.text(key) else {
            return Ok(default);
        };
        let Interval(given) = Interval::from_str(&text).map_err(|error| self.bad(key, &error.to_string()))?;
        let (least, most) = TIMEOUTS;
        if given < least || given > most {
            let problem = format!(
                "{} is outside {} to {}",
                Interval(given),
                Interval(least),
                Interval(most)
            );
            return Err(self.bad(key, &problem));
        }
        Ok(given)
    }

    fn bad(&self, key: &'static str, problem: &str) -> ConfigError {
        let variable = || Origin::Environment(schema::region_variable(self.number, key));
        let origin = self
            .given
            .values
            .get(key)
            .map_or_else(variable, |given| given.origin.clone());
        ConfigError::BadValue {
            origin,
            setting: format!("{key} of region {}", self.number),
            problem: problem.to_owned(),
        }
    }

    fn missing(&self, key: &str, example: &str) -> ConfigError {
        ConfigError::Missing {
            setting: format!("{key} of region {}", self.number),
            how: format!(
                "give `{key}` in [[region]] or {}, {example}",
                schema::region_variable(self.number, key)
            ),
        }
    }
}

fn derived_name(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let mut parts = rest.split('/').filter(|part| !part.is_empty());
    let part = if scheme == "s3" {
        parts.next()
    } else {
        parts.next_back()
    };
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "-_.".contains(c) {
            c
        } else {
            '-'
        }
    };
    part.unwrap_or("region").chars().take(50).map(plain).collect()
}
