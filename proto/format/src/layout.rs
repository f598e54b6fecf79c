//! Every key of the archive, built and read in one place.
//!
//! Owns: the names of objects, relative to a region's prefix. Does not own: what is in them, and which of
//! them exist. Keys under one directory sort in LSN (or number) order, because every number has a fixed width.

use std::fmt;
use std::str::FromStr;

use crate::backup_id::BackupId;
use crate::error::ParseError;
use crate::lsn::{Lsn, LsnRange, SegmentSize, SystemId};
use crate::text::serde_as_text;
use crate::timeline::TimelineId;
use crate::walname::{SegmentName, WalName};

/// What the operator calls one PostgreSQL instance: the first part of every key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(String);

impl ClusterName {
    /// The longest name, in characters.
    pub const MAX_LEN: usize = 63;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for ClusterName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<ClusterName, ParseError> {
        let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let allowed = |b: u8| alphanumeric(b) || matches!(b, b'.' | b'_' | b'-');
        let good = text.bytes().next().is_some_and(alphanumeric)
            && text.bytes().all(allowed)
            && text.len() <= Self::MAX_LEN;
        if good {
            Ok(ClusterName(text.to_owned()))
        } else {
            let expected = "1 to 63 of a-z, 0-9, dot, underscore and dash, beginning with a letter or digit";
            Err(ParseError::new("a cluster name", text, expected))
        }
    }
}

serde_as_text!(ClusterName);

/// What a key names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Key {
    /// What the lineage is: see [`crate::Identity`].
    Identity,
    /// A history file, verbatim.
    History(TimelineId),
    /// One whole WAL segment. Its LSN follows from the segment size in the identity.
    Segment(WalName),
    /// A tail chunk: this run of WAL bytes.
    Tail(TimelineId, LsnRange),
    /// A hole: see [`crate::Gap`].
    Gap(TimelineId, LsnRange),
    /// Base-backup bytes, by their number within the backup.
    Pack(BackupId, u32),
    /// What the backup consists of: see [`crate::Manifest`].
    Manifest(BackupId),
    /// The mark that the backup is complete: see [`crate::Backup`].
    Backup(BackupId),
    /// Who writes from this epoch on: see [`crate::Writer`].
    Writer(u64),
    /// The latest pulse: see [`crate::Pulse`]. The only object that is rewritten.
    Pulse,
}

/// The keys of one lineage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    cluster: ClusterName,
    system_id: SystemId,
    root: String,
}

impl Layout {
    /// The keys of `system_id` under `cluster`.
    pub fn new(cluster: ClusterName, system_id: SystemId) -> Layout {
        let root = format!("{cluster}/{system_id}/");
        Layout {
            cluster,
            system_id,
            root,
        }
    }

    /// The cluster.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// The lineage.
    pub fn system_id(&self) -> SystemId {
        self.system_id
    }

    /// `<cluster>/`: below it one directory per system identifier.
    pub fn cluster_dir(cluster: &ClusterName) -> String {
        format!("{cluster}/")
    }

    /// The system identifier in a key of `cluster`.
    pub fn parse_system_id(cluster: &ClusterName, key: &str) -> Option<SystemId> {
        let rest = key.strip_prefix(cluster.as_str())?.strip_prefix('/')?;
        rest.split_once('/')?.0.parse().ok()
    }

    /// `<cluster>/<system id>/`.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// `wal/`.
    pub fn wal_dir(&self) -> String {
        format!("{}wal/", self.root)
    }

    /// `wal/<TLI>/`.
    pub fn timeline_dir(&self, timeline: TimelineId) -> String {
        format!("{}wal/{}/", self.root, timeline.hex8())
    }

    /// `wal/<TLI>/segment/`.
    pub fn segment_dir(&self, timeline: TimelineId) -> String {
        format!("{}segment/", self.timeline_dir(timeline))
    }

    /// `wal/<TLI>/tail/`.
    pub fn tail_dir(&self, timeline: TimelineId) -> String {
        format!("{}tail/", self.timeline_dir(timeline))
    }

    /// `wal/<TLI>/gap/`.
    pub fn gap_dir(&self, timeline: TimelineId) -> String {
        format!("{}gap/", self.timeline_dir(timeline))
    }

    /// `base/`.
    pub fn base_dir(&self) -> String {
        format!("{}base/", self.root)
    }

    /// `base/<backup id>/`.
    pub fn backup_dir(&self, id: &BackupId) -> String {
        format!("{}base/{id}/", self.root)
    }

    /// `writer/`.
    pub fn writer_dir(&self) -> String {
        format!("{}writer/", self.root)
    }

    /// `identity.json`.
    pub fn identity(&self) -> String {
        self.key(&Key::Identity)
    }

    /// `wal/<TLI>/history`.
    pub fn history(&self, timeline: TimelineId) -> String {
        self.key(&Key::History(timeline))
    }

    /// `wal/<TLI>/segment/<24 hex>`.
    pub fn segment(&self, name: SegmentName, size: SegmentSize) -> String {
        self.key(&Key::Segment(name.wal_name(size)))
    }

    /// `wal/<TLI>/tail/<start>-<end>`.
    pub fn tail(&self, timeline: TimelineId, range: LsnRange) -> String {
        self.key(&Key::Tail(timeline, range))
    }

    /// `wal/<TLI>/gap/<start>-<end>`.
    pub fn gap(&self, timeline: TimelineId, range: LsnRange) -> String {
        self.key(&Key::Gap(timeline, range))
    }

    /// `base/<backup id>/pack/<number>`.
    pub fn pack(&self, id: &BackupId, number: u32) -> String {
        self.key(&Key::Pack(id.clone(), number))
    }

    /// `base/<backup id>/manifest`.
    pub fn manifest(&self, id: &BackupId) -> String {
        self.key(&Key::Manifest(id.clone()))
    }

    /// `base/<backup id>/backup.json`.
    pub fn backup(&self, id: &BackupId) -> String {
        self.key(&Key::Backup(id.clone()))
    }

    /// `writer/<epoch>`.
    pub fn writer(&self, epoch: u64) -> String {
        self.key(&Key::Writer(epoch))
    }

    /// `pulse.json`.
    pub fn pulse(&self) -> String {
        self.key(&Key::Pulse)
    }

    /// The key of any object.
    pub fn key(&self, key: &Key) -> String {
        let root = &self.root;
        match key {
            Key::Identity => format!("{root}identity.json"),
            Key::History(timeline) => format!("{}history", self.timeline_dir(*timeline)),
            Key::Segment(name) => format!("{}{name}", self.segment_dir(name.timeline)),
            Key::Tail(timeline, range) => format!("{}{}", self.tail_dir(*timeline), hex_range(*range)),
            Key::Gap(timeline, range) => format!("{}{}", self.gap_dir(*timeline), hex_range(*range)),
            Key::Pack(id, number) => format!("{root}base/{id}/pack/{number:010}"),
            Key::Manifest(id) => format!("{root}base/{id}/manifest"),
            Key::Backup(id) => format!("{root}base/{id}/backup.json"),
            Key::Writer(epoch) => format!("{root}writer/{epoch:020}"),
            Key::Pulse => format!("{root}pulse.json"),
        }
    }

    /// What `key` names, or `None` for a key that this release does not write in this lineage.
    pub fn parse(&self, key: &str) -> Option<Key> {
        let parts: Vec<&str> = key.strip_prefix(&self.root)?.split('/').collect();
        match parts.as_slice() {
            ["identity.json"] => Some(Key::Identity),
            ["pulse.json"] => Some(Key::Pulse),
            ["writer", epoch] => fixed_decimal(epoch, 20).map(Key::Writer),
            ["wal", timeline, rest @ ..] => parse_wal(TimelineId::from_hex8(timeline)?, rest),
            ["base", id, rest @ ..] => parse_base(BackupId::parse(id).ok()?, rest),
            _ => None,
        }
    }
}

fn parse_wal(timeline: TimelineId, rest: &[&str]) -> Option<Key> {
    match rest {
        ["history"] => Some(Key::History(timeline)),
        ["segment", name] => WalName::parse(name)
            .filter(|name| name.timeline == timeline)
            .map(Key::Segment),
        ["tail", range] => Some(Key::Tail(timeline, parse_hex_range(range)?)),
        ["gap", range] => Some(Key::Gap(timeline, parse_hex_range(range)?)),
        _ => None,
    }
}

fn parse_base(id: BackupId, rest: &[&str]) -> Option<Key> {
    match rest {
        ["manifest"] => Some(Key::Manifest(id)),
        ["backup.json"] => Some(Key::Backup(id)),
        ["pack", number] => Some(Key::Pack(id, u32::try_from(fixed_decimal(number, 10)?).ok()?)),
        _ => None,
    }
}

fn hex_range(range: LsnRange) -> String {
    format!("{}-{}", range.start.hex16(), range.end.hex16())
}

/// An empty or backward range is no key: nothing writes one, so nothing may be concluded from one.
fn parse_hex_range(text: &str) -> Option<LsnRange> {
    let (start, end) = text.split_once('-')?;
    let range = LsnRange::new(Lsn::from_hex16(start)?, Lsn::from_hex16(end)?);
    (!range.is_empty()).then_some(range)
}

fn fixed_decimal(text: &str, width: usize) -> Option<u64> {
    (text.len() == width && text.bytes().all(|b| b.is_ascii_digit()))
        .then(|| text.parse().ok())
        .flatten()
}
