//! PostgreSQL's own list of what a base backup holds: its `backup_manifest` file.
//!
//! Owns: reading versions 1 (PostgreSQL 13 to 16) and 2 (17 on), checking the file against the SHA-256 in its last
//! line, and computing the checksums that it lists. Does not own: comparing it with a backup, nor our own manifest.
//!
//! The file is JSON with one thing outside JSON: the checksum in its last line covers the bytes of all lines before
//! it, so it is taken over the text and not over values. Format: PostgreSQL's documentation, "Backup Manifest
//! Format". Checksums are written as the bytes in memory, which makes a CRC-32C little-endian.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

use crate::error::{FormatError, ParseError};
use crate::lsn::{Lsn, LsnRange, SystemId};
use crate::timeline::TimelineId;

const WHAT: &str = "backup_manifest";
/// The newest version of the file that is understood.
const NEWEST: u32 = 2;

/// A `backup_manifest` whose own checksum was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PgManifest {
    /// Version of the file's format.
    pub version: u32,
    /// The cluster, from version 2 on.
    pub system_id: Option<SystemId>,
    /// Every file of the backup but the manifest itself and WAL.
    pub files: Vec<PgFile>,
    /// The WAL that the backup needs to become consistent.
    pub wal_ranges: Vec<PgWalRange>,
}

/// One file of the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PgFile {
    /// Relative to the data directory; tablespaces under `pg_tblspc/<oid>/`. Any bytes, as on disk.
    pub path: Vec<u8>,
    /// Length in bytes.
    pub size: u64,
    /// Of the content; `None` when the backup was taken without checksums.
    pub checksum: Option<Checksum>,
}

/// WAL of one timeline that the backup needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PgWalRange {
    /// The timeline.
    pub timeline: TimelineId,
    /// From the checkpoint's redo point to the end of the backup.
    pub range: LsnRange,
}

/// How a backup's files are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChecksumAlgorithm {
    /// Not at all.
    None,
    /// CRC-32C, the default.
    Crc32c,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl fmt::Display for ChecksumAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "NONE",
            Self::Crc32c => "CRC32C",
            Self::Sha224 => "SHA224",
            Self::Sha256 => "SHA256",
            Self::Sha384 => "SHA384",
            Self::Sha512 => "SHA512",
        })
    }
}

impl FromStr for ChecksumAlgorithm {
    type Err = ParseError;

    /// In any case, as PostgreSQL reads it.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        [
            Self::None,
            Self::Crc32c,
            Self::Sha224,
            Self::Sha256,
            Self::Sha384,
            Self::Sha512,
        ]
        .into_iter()
        .find(|known| known.to_string().eq_ignore_ascii_case(text))
        .ok_or_else(|| {
            ParseError::new(
                "a checksum algorithm",
                text,
                "NONE, CRC32C, SHA224, SHA256, SHA384 or SHA512",
            )
        })
    }
}

/// A checksum and how it was computed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Checksum {
    /// How.
    pub algorithm: ChecksumAlgorithm,
    /// The value; empty for [`ChecksumAlgorithm::None`].
    pub value: Vec<u8>,
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.algorithm)?;
        self.value.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Computes one file's checksum as its bytes pass.
#[derive(Debug, Clone)]
pub struct Checksummer(State);

#[derive(Debug, Clone)]
enum State {
    None,
    Crc32c(u32),
    Sha224(Sha224),
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Checksummer {
    /// For the next file.
    #[must_use]
    pub fn new(algorithm: ChecksumAlgorithm) -> Self {
        Self(match algorithm {
            ChecksumAlgorithm::None => State::None,
            ChecksumAlgorithm::Crc32c => State::Crc32c(0),
            ChecksumAlgorithm::Sha224 => State::Sha224(Sha224::new()),
            ChecksumAlgorithm::Sha256 => State::Sha256(Sha256::new()),
            ChecksumAlgorithm::Sha384 => State::Sha384(Sha384::new()),
            ChecksumAlgorithm::Sha512 => State::Sha512(Sha512::new()),
        })
    }

    /// Takes the file's next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::None => {}
            State::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            State::Sha224(hash) => hash.update(bytes),
            State::Sha256(hash) => hash.update(bytes),
            State::Sha384(hash) => hash.update(bytes),
            State::Sha512(hash) => hash.update(bytes),
        }
    }

    /// After the file's last byte.
    #[must_use]
    pub fn finish(self) -> Checksum {
        let (algorithm, value) = match self.0 {
            State::None => (ChecksumAlgorithm::None, Vec::new()),
            State::Crc32c(crc) => (ChecksumAlgorithm::Crc32c, crc.to_le_bytes().to_vec()),
            State::Sha224(hash) => (ChecksumAlgorithm::Sha224, hash.finalize().to_vec()),
            State::Sha256(hash) => (ChecksumAlgorithm::Sha256, hash.finalize().to_vec()),
            State::Sha384(hash) => (ChecksumAlgorithm::Sha384, hash.finalize().to_vec()),
            State::Sha512(hash) => (ChecksumAlgorithm::Sha512, hash.finalize().to_vec()),
        };
        Checksum { algorithm, value }
    }
}

impl PgManifest {
    /// Reads the file and checks it against the checksum in its last line.
    ///
    /// # Errors
    /// [`FormatError::Document`] when it is not whole, [`FormatError::NewerVersion`] when a later PostgreSQL wrote it.
    pub fn parse(text: &[u8]) -> Result<Self, FormatError> {
        // The version first: what follows it may differ in a later one.
        let version: Versioned = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
        let version = version.version;
        if version > NEWEST {
            return Err(FormatError::NewerVersion {
                what: WHAT.into(),
                found: version,
                known: NEWEST,
            });
        }
        let document: Document = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
        check_own(text, &document.checksum)?;
        let files = document
            .files
            .into_iter()
            .map(FileLine::read)
            .collect::<Result<_, _>>()?;
        let wal_ranges = document
            .wal_ranges
            .into_iter()
            .map(WalLine::read)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            version,
            system_id: document.system_id.map(SystemId),
            files,
            wal_ranges,
        })
    }
}

/// Compares the checksum with the bytes of all lines before the last.
fn check_own(text: &[u8], listed: &str) -> Result<(), FormatError> {
    let lines = text
        .strip_suffix(b"\n")
        .ok_or_else(|| damaged("its last line does not end".into()))?;
    let covered = lines
        .iter()
        .rposition(|byte| *byte == b'\n')
        .ok_or_else(|| damaged("it is a single line".into()))?;
    let listed = unhex(listed).ok_or_else(|| damaged("its own checksum is no hexadecimal text".into()))?;
    let computed = Sha256::digest(&text[..=covered]);
    if listed.as_slice() == computed.as_slice() {
        Ok(())
    } else {
        Err(damaged(
            "its text does not match the SHA-256 in its last line".into(),
        ))
    }
}

fn damaged(problem: String) -> FormatError {
    FormatError::Document {
        what: WHAT.into(),
        problem,
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
        .collect()
}

#[derive(Deserialize)]
struct Versioned {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
}

#[derive(Deserialize)]
struct Document<'a> {
    #[serde(rename = "System-Identifier")]
    system_id: Option<u64>,
    #[serde(rename = "Files", borrow)]
    files: Vec<FileLine<'a>>,
    #[serde(rename = "WAL-Ranges", borrow)]
    wal_ranges: Vec<WalLine<'a>>,
    #[serde(rename = "Manifest-Checksum")]
    checksum: String,
}

/// Text that is borrowed where it has no escapes, as almost all has not.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] std::borrow::Cow<'a, str>);

#[derive(Deserialize)]
struct FileLine<'a> {
    #[serde(rename = "Path", borrow, default, deserialize_with = "present")]
    path: Option<Text<'a>>,
    #[serde(rename = "Encoded-Path", borrow, default, deserialize_with = "present")]
    encoded_path: Option<Text<'a>>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm", borrow, default, deserialize_with = "present")]
    algorithm: Option<Text<'a>>,
    #[serde(rename = "Checksum", borrow, default, deserialize_with = "present")]
    checksum: Option<Text<'a>>,
}

/// A field that may be left out but not be null.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Text<'de>>, D::Error> {
    Text::deserialize(deserializer).map(Some)
}

impl FileLine<'_> {
    fn read(self) -> Result<PgFile, FormatError> {
        let path = match (self.path, self.encoded_path) {
            (Some(plain), None) => plain.0.into_owned().into_bytes(),
            (None, Some(encoded)) => unhex(&encoded.0)
                .ok_or_else(|| damaged(format!("the encoded path {:?} is no hexadecimal text", encoded.0)))?,
            _ => {
                return Err(damaged(
                    "a file has not exactly one of Path and Encoded-Path".into(),
                ));
            }
        };
        let name = || String::from_utf8_lossy(&path).into_owned();
        let checksum = match (self.algorithm, self.checksum) {
            (None, None) => None,
            (Some(algorithm), Some(checksum)) => {
                let algorithm = algorithm
                    .0
                    .parse()
                    .map_err(|error| damaged(format!("{}: {error}", name())))?;
                let value = unhex(&checksum.0)
                    .filter(|value| value.len() == Checksummer::new(algorithm).finish().value.len())
                    .ok_or_else(|| damaged(format!("{}: {:?} is no {algorithm}", name(), checksum.0)))?;
                Some(Checksum { algorithm, value })
            }
            _ => {
                return Err(damaged(format!(
                    "{}: a checksum without its algorithm, or the reverse",
                    name()
                )));
            }
        };
        Ok(PgFile {
            path,
            size: self.size,
            checksum: checksum.filter(|sum| !sum.value.is_empty()),
        })
    }
}

#[derive(Deserialize)]
struct WalLine<'a> {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN", borrow)]
    start: Text<'a>,
    #[serde(rename = "End-LSN", borrow)]
    end: Text<'a>,
}

impl WalLine<'_> {
    fn read(self) -> Result<PgWalRange, FormatError> {
        let lsn = |text: &Text<'_>| text.0.parse::<Lsn>().map_err(|error| damaged(error.to_string()));
        let timeline =
            TimelineId::new(self.timeline).ok_or_else(|| damaged("a WAL range is of timeline 0".into()))?;
        let range = LsnRange {
            start: lsn(&self.start)?,
            end: lsn(&self.end)?,
        };
        if range.start > range.end {
            return Err(damaged(format!("the WAL range {range} runs backwards")));
        }
        Ok(PgWalRange { timeline, range })
    }
}

#[cfg(test)]
#[path = "pg_manifest_tests.rs"]
mod tests;
