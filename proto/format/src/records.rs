//! The small documents of the archive: identity, gaps, writers, pulse, finished backups.
//!
//! Owns: their fields and the rules between them. Does not own: the envelope ([`crate::document`]), and when
//! a record is written or believed.

use serde::{Deserialize, Serialize};

use crate::backup_id::BackupId;
use crate::codec::Codec;
pub use crate::document::{Document, crc32_hex, decode, encode, parse_crc32};
use crate::error::FormatError;
use crate::lsn::{Lsn, LsnRange, SegmentSize, SystemId};
use crate::time::Time;
use crate::timeline::TimelineId;

/// What a lineage is. Written once, before anything else; everything that writes later must agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// PostgreSQL's system identifier.
    pub system_id: SystemId,
    /// `server_version_num` at the first write. The major part never changes within a lineage.
    pub server_version: u32,
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// `wal_block_size`, in bytes.
    pub wal_block_size: u32,
    /// `block_size`, in bytes.
    pub block_size: u32,
}

impl Identity {
    /// PostgreSQL's major version: 15 for 150020.
    pub fn major(&self) -> u32 {
        self.server_version / 10_000
    }

    /// Checks that `server` can write into the archive that this identity describes.
    pub fn expect(&self, server: &Identity) -> Result<(), FormatError> {
        let fields = [
            ("system identifier", self.system_id.0, server.system_id.0),
            (
                "major version",
                u64::from(self.major()),
                u64::from(server.major()),
            ),
            (
                "WAL segment size",
                self.segment_size.bytes(),
                server.segment_size.bytes(),
            ),
            (
                "WAL block size",
                u64::from(self.wal_block_size),
                u64::from(server.wal_block_size),
            ),
            (
                "block size",
                u64::from(self.block_size),
                u64::from(server.block_size),
            ),
        ];
        match fields.into_iter().find(|(_, archived, found)| archived != found) {
            Some((field, archived, found)) => Err(FormatError::mismatch(field, archived, found)),
            None => Ok(()),
        }
    }
}

impl Document for Identity {
    const KIND: &'static str = "identity";

    fn validate(&self) -> Result<(), String> {
        if self.server_version < 10_000 {
            return Err(format!(
                "server_version {} is not a server_version_num",
                self.server_version
            ));
        }
        for (name, size) in [
            ("wal_block_size", self.wal_block_size),
            ("block_size", self.block_size),
        ] {
            if !size.is_power_of_two() || !(1 << 10..=1 << 16).contains(&size) {
                return Err(format!("{name} {size} is not a power of two from 1024 to 65536"));
            }
        }
        Ok(())
    }
}

/// The identity as it is stored: also which lineages it was begun in the place of, on purpose. Whoever asks what a lineage is
/// reads [`Identity`] from the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beginning {
    /// What the lineage is.
    #[serde(flatten)]
    pub identity: Identity,
    /// The lineages that the region held under the same cluster name when this one was begun: it came after them, whatever
    /// any clock says. Identities of early agents lack it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub succeeds: Vec<SystemId>,
}

impl Document for Beginning {
    const KIND: &'static str = Identity::KIND;

    fn validate(&self) -> Result<(), String> {
        if self.succeeds.contains(&self.identity.system_id) {
            return Err("a lineage cannot come after itself".to_owned());
        }
        self.identity.validate()
    }
}

/// A range of WAL that the archive does not have and can no longer get, or that PostgreSQL cannot replay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first missing byte.
    pub start: Lsn,
    /// One past the last missing byte.
    pub end: Lsn,
    /// Why, in words for an operator.
    pub reason: String,
    /// When it was found.
    pub recorded_at: Time,
    /// The bytes may be there: what is missing is the way past them. Absent in records of earlier versions, which are of WAL
    /// that is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unreplayable: bool,
}

impl Gap {
    /// The missing bytes.
    pub fn range(&self) -> LsnRange {
        LsnRange::new(self.start, self.end)
    }
}

impl Document for Gap {
    const KIND: &'static str = "gap";

    fn validate(&self) -> Result<(), String> {
        if self.range().is_empty() {
            return Err(format!("the range {} is empty", self.range()));
        }
        Ok(())
    }
}

/// Who writes from an epoch on; each epoch is claimed once. A higher epoch fences those on other timelines; on the
/// same one writers store the same bytes and may go on together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writer {
    /// Rises by one with every claim, from 1.
    pub epoch: u64,
    /// A random name of the process, so that it knows its own claim.
    pub instance: String,
    /// Where it runs.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// The timeline it began to write.
    pub timeline: TimelineId,
    /// When it claimed the epoch.
    pub claimed_at: Time,
    /// Where that timeline left its parent; `0/0` for one without. Two promotions may take the same number, and this
    /// tells them apart. Claims of early agents lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begins: Option<Lsn>,
    /// Where `pid` means that process, and beside which server it is: one boot of one machine, one namespace, one address to connect
    /// to. Claims of early agents lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// How many milliseconds it lets pass between two pulses and looks at the newest claim: others wait for so many of these before
    /// and after they take its place. Claims of early agents lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
}

impl Document for Writer {
    const KIND: &'static str = "writer";

    fn validate(&self) -> Result<(), String> {
        if self.epoch == 0 || self.instance.is_empty() {
            return Err("epochs count from 1, and a writer has a name".to_owned());
        }
        Ok(())
    }
}

/// The proof that somebody is watching: how far the server was and how much of it this region holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulse {
    /// The timeline that is being written.
    pub timeline: TimelineId,
    /// The server's clock.
    pub server_time: Time,
    /// The server's end of WAL at that time.
    pub wal_end: Lsn,
    /// Up to here the durability policy is satisfied.
    pub durable_lsn: Lsn,
    /// Up to here this region holds everything.
    pub stored_lsn: Lsn,
    /// Time of the last commit at or before `stored_lsn`, if one was seen.
    pub last_commit: Option<Time>,
    /// The process that wrote it.
    pub instance: String,
    /// Rises with every pulse of that process.
    pub sequence: u64,
    /// What the durability policy asks for; absent in pulses of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quorum: Option<Quorum>,
    /// Milliseconds between two pulses of that process; absent in pulses of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// How many milliseconds ago the last moment was of which everything satisfies the durability policy that the server had
    /// then, 0 when all that was received does; absent in pulses of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_ms: Option<u64>,
    /// The process's own clock when its server, no standby, last answered a question beside the stream: a sign of life also
    /// while the stream does not get on. Absent where nothing could be asked, and in pulses of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_at: Option<Time>,
}

impl Document for Pulse {
    const KIND: &'static str = "pulse";
}

/// In how many of the regions WAL has to be before it is reported as safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quorum {
    /// So many.
    pub needed: u32,
    /// Of so many that are configured.
    pub regions: u32,
}

impl Quorum {
    /// Whether among this many of the regions at least one holds everything that was reported.
    pub fn is_vouched_for_by(self, regions: usize) -> bool {
        u32::try_from(regions).is_ok_and(|regions| regions > self.regions.saturating_sub(self.needed))
    }
}

/// A tablespace outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its OID, the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it was on the server.
    pub location: String,
}

/// The mark that a base backup is complete. Written last: a backup without it does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// The backup's name.
    pub id: BackupId,
    /// The lineage.
    pub system_id: SystemId,
    /// `server_version_num` of the server that was copied.
    pub server_version: u32,
    /// The timeline of the start LSN.
    pub timeline: TimelineId,
    /// Replay begins here (`START WAL LOCATION`).
    pub start_lsn: Lsn,
    /// Replay is consistent from here on.
    pub stop_lsn: Lsn,
    /// The timeline of the stop LSN.
    pub stop_timeline: TimelineId,
    /// The server's time at the start.
    pub started_at: Time,
    /// The server's time at the end.
    pub finished_at: Time,
    /// The text of `backup_label`.
    pub label: String,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// True if a standby was copied.
    pub from_standby: bool,
    /// Files in the manifest.
    pub files: u64,
    /// Their bytes.
    pub plain_bytes: u64,
    /// Bytes of all packs as stored.
    pub stored_bytes: u64,
    /// How many packs.
    pub packs: u32,
    /// CRC-32 of the manifest object's bytes, as [`crc32_hex`] writes it.
    pub manifest_crc32: String,
    /// True if the manifest has PostgreSQL's own `backup_manifest` as a file.
    pub pg_manifest: bool,
    /// How the packs are compressed.
    pub codec: Codec,
}

impl Backup {
    /// The WAL without which the backup is worthless.
    pub fn required_wal(&self) -> LsnRange {
        LsnRange::new(self.start_lsn, self.stop_lsn)
    }
}

impl Document for Backup {
    const KIND: &'static str = "backup";

    fn validate(&self) -> Result<(), String> {
        if (self.id.timeline(), self.id.start_lsn()) != (self.timeline, self.start_lsn) {
            return Err(format!(
                "backup {} starts at {} on timeline {}",
                self.id, self.start_lsn, self.timeline
            ));
        }
        if self.stop_lsn < self.start_lsn || self.stop_timeline < self.timeline {
            return Err(format!(
                "it stops at {} on timeline {}, before it starts at {} on timeline {}",
                self.stop_lsn, self.stop_timeline, self.start_lsn, self.timeline
            ));
        }
        if parse_crc32(&self.manifest_crc32).is_none() {
            return Err(format!(
                "manifest_crc32 {:?} is not 8 hexadecimal digits",
                self.manifest_crc32
            ));
        }
        Ok(())
    }
}
