//! One region's settings, as they stand in the configuration file.
//!
//! Owns: names, defaults, and units. Does not own: reading files or environment variables (the
//! configuration crate), nor whether the region answers ([`crate::open`], [`crate::probe`]).

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use secrecy::SecretString;
use serde::{Deserialize, Deserializer};

/// One `[[region]]` of the configuration.
///
/// Durations are written as text with a unit: `"500ms"`, `"20s"`, `"2m"`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionConfig {
    /// Name in messages, metrics and status. Default: the URL; see [`RegionConfig::display_name`].
    #[serde(default)]
    pub name: String,
    /// `s3://bucket/prefix` or `file:///absolute/directory`.
    pub url: String,
    /// S3: endpoint of a compatible store, `https://host[:port]`. Plain `http://` is refused unless it is
    /// loopback or `allow_http` is set. Default: AWS, or `AWS_ENDPOINT_URL_S3`.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// S3: allow an endpoint on another machine without TLS: whoever is on the way reads and changes WAL and
    /// backups. Default false.
    #[serde(default)]
    pub allow_http: bool,
    /// S3: region to sign for. Default: the standard chain (environment, profile, instance metadata), then
    /// `us-east-1` when an endpoint is given.
    #[serde(default)]
    pub region: Option<String>,
    /// S3: address the bucket in the path instead of the host name. Default: true when an endpoint is given.
    #[serde(default)]
    pub path_style: Option<bool>,
    /// S3: PEM file with certificate authorities trusted in addition to the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// S3: profile of the shared AWS configuration files.
    #[serde(default)]
    pub profile: Option<String>,
    /// S3: static key id. Discouraged: prefer the standard credential chain.
    #[serde(default)]
    pub access_key_id: Option<String>,
    /// S3: secret of `access_key_id`. Never printed.
    #[serde(default)]
    pub secret_access_key: Option<SecretString>,
    /// S3: storage class of new objects, such as `STANDARD_IA`. Default: the bucket's.
    #[serde(default)]
    pub storage_class: Option<String>,
    /// S3: TCP and TLS set-up of a new connection. Default 5 s, at least 100 ms.
    #[serde(
        default = "RegionConfig::default_connect_timeout",
        deserialize_with = "duration"
    )]
    pub connect_timeout: Duration,
    /// S3: from sending a request to the head of its answer; one second per MiB sent is added, so that a
    /// slow line is not mistaken for a dead one. Default 20 s, at least 100 ms.
    #[serde(
        default = "RegionConfig::default_attempt_timeout",
        deserialize_with = "duration"
    )]
    pub attempt_timeout: Duration,
    /// Bound of one whole call, bodies included, without retries. Default 2 min, at least 100 ms.
    #[serde(
        default = "RegionConfig::default_operation_timeout",
        deserialize_with = "duration"
    )]
    pub operation_timeout: Duration,
    /// S3: read the bucket as it was at this moment, by the versions that it keeps; nothing can be written then. Never from
    /// a configuration file: who restores asks for it. Default: as it is now.
    #[serde(skip)]
    pub as_of: Option<SystemTime>,
}

/// Below this a timeout only produces errors.
pub(crate) const MIN_TIMEOUT: Duration = Duration::from_millis(100);

impl RegionConfig {
    /// A region with every other setting at its default.
    pub fn new(name: impl Into<String>, url: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            url: url.into(),
            endpoint: None,
            allow_http: false,
            region: None,
            path_style: None,
            ca_file: None,
            profile: None,
            access_key_id: None,
            secret_access_key: None,
            storage_class: None,
            connect_timeout: Self::default_connect_timeout(),
            attempt_timeout: Self::default_attempt_timeout(),
            operation_timeout: Self::default_operation_timeout(),
            as_of: None,
        }
    }

    /// The name, or the URL where none is given.
    pub fn display_name(&self) -> &str {
        if self.name.is_empty() {
            &self.url
        } else {
            &self.name
        }
    }

    fn default_connect_timeout() -> Duration {
        Duration::from_secs(5)
    }

    fn default_attempt_timeout() -> Duration {
        Duration::from_secs(20)
    }

    fn default_operation_timeout() -> Duration {
        Duration::from_secs(120)
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_duration(&text).ok_or_else(|| {
        serde::de::Error::custom(format!(
            "{text:?} is not a duration; write a number and ms, s, m or h, such as \"20s\""
        ))
    })
}

fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    let millis = match text[digits..].trim() {
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    Some(Duration::from_millis(number.checked_mul(millis)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_needs_only_a_url() {
        let config: RegionConfig = toml::from_str("url = \"s3://bucket/prefix\"").unwrap();
        assert_eq!(config.display_name(), "s3://bucket/prefix");
        assert_eq!(config.connect_timeout, Duration::from_secs(5));
        assert_eq!(config.attempt_timeout, Duration::from_secs(20));
        assert_eq!(config.operation_timeout, Duration::from_secs(120));
    }

    #[test]
    fn mistakes_in_the_file_are_errors_and_secrets_stay_secret() {
        for text in [
            "attempt_timeout = \"20\"",
            "attempt_timeout = 20",
            "attempt_timeout = \"-1s\"",
            "retries = 5",
        ] {
            assert!(
                toml::from_str::<RegionConfig>(&format!("url = \"s3://b\"\n{text}")).is_err(),
                "{text}"
            );
        }
        let text = "url = \"s3://b\"\naccess_key_id = \"id\"\nsecret_access_key = \"hush\"";
        let config: RegionConfig = toml::from_str(text).unwrap();
        assert!(!format!("{config:?}").contains("hush"));
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, millis) in [
            ("500ms", 500),
            ("20s", 20_000),
            ("2m", 120_000),
            ("1 h", 3_600_000),
            (" 3 min ", 180_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Some(Duration::from_millis(millis)),
                "{text}"
            );
        }
        for text in [
            "",
            "s",
            "20",
            "1.5s",
            "20 parsecs",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
