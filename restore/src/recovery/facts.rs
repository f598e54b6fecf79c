//! What `wal-fetch` must know, in a file beside the data it serves: `highwater-recovery.json` in the data directory.
//!
//! Owns: the form of this file. PostgreSQL calls `restore_command` with a bare environment and from its own account,
//! so everything is in here except credentials: those come from the configuration file it names, if that can be
//! read, or from the standard credential chain of the server's user. It also carries what the plan proved about the
//! end of WAL, because "there is no more" is an answer that loses data when it is wrong.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use highwater_format::layout::{ClusterName, Layout};
use highwater_format::lsn::{Lsn, SegmentSize, SystemId};
use highwater_format::{Time, timeline::TimelineId};
use highwater_store::RegionConfig;
use serde::{Deserialize, Serialize};

use crate::clock;

/// The file's name in the data directory.
pub const NAME: &str = "highwater-recovery.json";

/// The newest form of the file that this program reads.
const FORMAT: u32 = 1;

/// The content of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The form of the file.
    pub format: u32,
    /// For the one who finds it.
    pub note: String,
    /// Which cluster.
    pub cluster: ClusterName,
    /// Which lineage.
    pub system_id: SystemId,
    /// Bytes in a WAL segment.
    pub segment_size: u64,
    /// The configuration file, where there is one, for credentials that it may hold.
    pub config: Option<PathBuf>,
    /// The regions, the preferred one first.
    pub regions: Vec<RegionFacts>,
    /// The regions that this restore was told to do without. Files of before this field name none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// The timelines that recovery follows, oldest first.
    pub timelines: Vec<TimelineFacts>,
    /// Every timeline that any region had when the restore was planned.
    pub known_timelines: Vec<TimelineId>,
    /// Those before the timeline that recovery goes to of which no region had a usable history file then. PostgreSQL asks
    /// for it and does without. Files of before this field have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without_history: Vec<TimelineId>,
    /// Recovery needs nothing past this position; `None` when it runs to the end.
    pub needed_until: Option<Lsn>,
    /// Bytes of WAL fetched ahead of replay.
    pub prefetch_bytes: u64,
}

/// A region without its secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionFacts {
    /// Its name.
    pub name: String,
    /// Its address.
    pub url: String,
    /// Address of an S3-compatible store.
    pub endpoint: Option<String>,
    /// That address may be plain http on another machine. Files of before this field were made where it was not.
    #[serde(default)]
    pub allow_http: bool,
    /// The provider's region.
    pub region: Option<String>,
    /// Bucket in the path instead of the host name.
    pub path_style: Option<bool>,
    /// Own certificate authority.
    pub ca_file: Option<PathBuf>,
    /// Profile of the credential chain.
    pub profile: Option<String>,
    /// Longest wait for a connection, in milliseconds.
    pub connect_timeout_ms: u64,
    /// Longest wait for one attempt, in milliseconds.
    pub attempt_timeout_ms: u64,
    /// Longest wait for a call with its body, in milliseconds.
    pub operation_timeout_ms: u64,
    /// The bucket is read as it was at this moment; as it is now where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub as_of: Option<Time>,
    /// It was read completely when the restore was planned, so what it had then is part of the proof.
    pub was_read: bool,
}

/// What recovery takes from one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineFacts {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it begins in this line of descent; 0/0 for the first.
    pub begin: Lsn,
    /// The proven end of its WAL in the archive (of all regions together), or where the next timeline left it.
    pub end: Lsn,
    /// Objects lie behind `end`, after a break that this restore does not cross: they were never acknowledged, or
    /// the target lies before the break. Files of before this field have none.
    #[serde(default)]
    pub ragged: bool,
}

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// It cannot be read.
    #[error(
        "cannot read {path}: {source}; it is written by `highwater-restore run` and needed until recovery has ended"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{path} is damaged: {problem}; run the restore again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A newer program wrote it.
    #[error(
        "{path} has format {found} and this program knows up to {FORMAT}: use the program that made the restore"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

impl Facts {
    /// The form that this program writes, and the note in it.
    #[must_use]
    pub fn format_and_note() -> (u32, String) {
        let note = "Written by highwater-restore for its restore_command. Needed until recovery has ended; holds no secrets.";
        (FORMAT, note.to_owned())
    }

    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read or used.
    pub fn read(path: &Path) -> Result<Self, FactsError> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let bytes = std::fs::read(path).map_err(|source| FactsError::Read {
            path: path.to_owned(),
            source,
        })?;
        let damaged = |problem: String| FactsError::Damaged {
            path: path.to_owned(),
            problem,
        };
        let version: Version = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if version.format > FORMAT {
            return Err(FactsError::Newer {
                path: path.to_owned(),
                found: version.format,
            });
        }
        let facts: Self = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        SegmentSize::new(facts.segment_size).map_err(|error| damaged(error.to_string()))?;
        if facts.regions.is_empty() {
            return Err(damaged("it names no region".to_owned()));
        }
        Ok(facts)
    }

    /// The file's content.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Nothing in it can fail to be written as JSON: no maps with odd keys, no floating point.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// The segment size; the default where the file was not read by [`Facts::read`] and is wrong.
    #[must_use]
    pub fn segments(&self) -> SegmentSize {
        SegmentSize::new(self.segment_size).unwrap_or(SegmentSize::DEFAULT)
    }

    /// The archive's keys.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout::new(self.cluster.clone(), self.system_id)
    }

    /// What is known of a timeline.
    #[must_use]
    pub fn timeline(&self, timeline: TimelineId) -> Option<&TimelineFacts> {
        self.timelines.iter().find(|facts| facts.timeline == timeline)
    }

    /// Where the line of descent left a timeline for the next one; `None` for the last, and for one that is not on it.
    /// What the archive has of it from there on belongs to an abandoned branch.
    #[must_use]
    pub fn left_at(&self, timeline: TimelineId) -> Option<Lsn> {
        let index = self
            .timelines
            .iter()
            .position(|facts| facts.timeline == timeline)?;
        self.timelines.get(index.checked_add(1)?).map(|next| next.begin)
    }
}

impl RegionFacts {
    /// Keeps what is not secret.
    #[must_use]
    pub fn of(config: &RegionConfig, was_read: bool) -> Self {
        // In full, so that a new setting cannot be forgotten here.
        let RegionConfig {
            name,
            url,
            endpoint,
            allow_http,
            region,
            path_style,
            ca_file,
            profile,
            access_key_id: _,
            secret_access_key: _,
            storage_class: _,
            connect_timeout,
            attempt_timeout,
            operation_timeout,
            as_of,
        } = config.clone();
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Self {
            name,
            url,
            endpoint,
            allow_http,
            region,
            path_style,
            ca_file,
            profile,
            connect_timeout_ms: millis(connect_timeout),
            attempt_timeout_ms: millis(attempt_timeout),
            operation_timeout_ms: millis(operation_timeout),
            as_of: as_of.map(clock::from_system),
            was_read,
        }
    }

    /// The settings to open the region with; credentials are taken from `configured` if it is the same region.
    #[must_use]
    pub fn settings(&self, configured: &[RegionConfig]) -> RegionConfig {
        let same = configured
            .iter()
            .find(|config| config.name == self.name && config.url == self.url);
        let Self {
            name,
            url,
            endpoint,
            allow_http,
            region,
            path_style,
            ca_file,
            profile,
            connect_timeout_ms,
            attempt_timeout_ms,
            operation_timeout_ms,
            as_of,
            was_read: _,
        } = self.clone();
        RegionConfig {
            name,
            url,
            endpoint,
            allow_http,
            region,
            path_style,
            ca_file,
            profile,
            access_key_id: same.and_then(|same| same.access_key_id.clone()),
            secret_access_key: same.and_then(|same| same.secret_access_key.clone()),
            // Nothing is written here.
            storage_class: None,
            connect_timeout: Duration::from_millis(connect_timeout_ms),
            attempt_timeout: Duration::from_millis(attempt_timeout_ms),
            operation_timeout: Duration::from_millis(operation_timeout_ms),
            as_of: as_of.map(clock::to_system),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn facts() -> Facts {
        let (format, note) = Facts::format_and_note();
        Facts {
            format,
            note,
            cluster: "orders".parse().unwrap(),
            system_id: SystemId(7),
            segment_size: 16 << 20,
            config: None,
            regions: vec![RegionFacts::of(&RegionConfig::new("a", "file:///srv/a"), true)],
            left_out: vec!["b".to_owned()],
            timelines: vec![TimelineFacts {
                timeline: TimelineId::FIRST,
                begin: Lsn(0),
                end: Lsn(0x0300_0000),
                ragged: false,
            }],
            known_timelines: vec![TimelineId::FIRST],
            without_history: Vec::new(),
            needed_until: None,
            prefetch_bytes: 1 << 27,
        }
    }

    #[test]
    fn it_survives_a_round_trip_and_refuses_a_newer_form() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let mut facts = facts();
        std::fs::write(&path, facts.to_json()).unwrap();
        assert_eq!(Facts::read(&path).unwrap(), facts);
        facts.format = 2;
        std::fs::write(&path, facts.to_json()).unwrap();
        assert!(matches!(
            Facts::read(&path),
            Err(FactsError::Newer { found: 2, .. })
        ));
    }

    #[test]
    fn a_file_of_before_the_mark_of_a_ragged_end_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let facts = facts();
        let mut json: serde_json::Value = serde_json::from_slice(&facts.to_json()).unwrap();
        let timeline = json["timelines"][0].as_object_mut().unwrap();
        assert!(timeline.remove("ragged").is_some());
        std::fs::write(&path, json.to_string()).unwrap();
        assert_eq!(Facts::read(&path).unwrap(), facts);
    }

    #[test]
    fn every_setting_that_reading_needs_survives() {
        let mut config = RegionConfig::new("a", "s3://bucket/x");
        config.endpoint = Some("http://minio:9000".to_owned());
        config.allow_http = true;
        config.region = Some("eu-west-1".to_owned());
        config.path_style = Some(false);
        config.ca_file = Some("/etc/ca.pem".into());
        config.profile = Some("reader".to_owned());
        config.connect_timeout = Duration::from_millis(1_500);
        config.attempt_timeout = Duration::from_secs(7);
        config.operation_timeout = Duration::from_secs(70);
        config.as_of = Some(clock::to_system("2026-11-20T03:10:00.25Z".parse().unwrap()));
        let text = serde_json::to_string(&RegionFacts::of(&config, true)).unwrap();
        let facts: RegionFacts = serde_json::from_str(&text).unwrap();
        assert_eq!(format!("{:?}", facts.settings(&[])), format!("{config:?}"));
        let old = text.replace("\"allow_http\":true,", "");
        let facts: RegionFacts = serde_json::from_str(&old).unwrap();
        assert!(!facts.allow_http);
    }

    #[test]
    fn secrets_are_not_written_and_are_found_again_by_region() {
        let mut config = RegionConfig::new("a", "s3://bucket/x");
        config.access_key_id = Some("planted-key".to_owned());
        config.secret_access_key = Some("planted-secret".to_owned().into());
        let mut facts = facts();
        facts.regions = vec![RegionFacts::of(&config, true)];
        let text = String::from_utf8(facts.to_json()).unwrap();
        assert!(!text.contains("planted"), "{text}");
        assert_eq!(
            facts.regions[0].settings(&[config]).access_key_id.as_deref(),
            Some("planted-key")
        );
        assert_eq!(facts.regions[0].settings(&[]).access_key_id, None);
    }
}
