//! Errors of the archive format.
//!
//! Owns: what can be wrong with bytes, names and documents, and how bad that is ([`FormatErrorKind`]).
//! Does not own: which object the bytes came from. A caller that knows key and region adds them.

use crate::Codec;

/// A text that does not name what it should: an LSN, a timeline, a segment, a cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {what}: expected {expected}")]
pub struct ParseError {
    /// What the text should have been, with its article ("an LSN").
    pub what: &'static str,
    /// The text as it was found, shortened to 80 characters.
    pub value: String,
    /// The form that would have been accepted.
    pub expected: &'static str,
}

impl ParseError {
    pub(crate) fn new(what: &'static str, value: &str, expected: &'static str) -> ParseError {
        ParseError {
            what,
            value: value.chars().take(80).collect(),
            expected,
        }
    }
}

/// What a [`FormatError`] asks of its reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormatErrorKind {
    /// The bytes are not what was written. Read another region's copy.
    Corrupt,
    /// A newer release wrote it. Upgrade this program; the object is fine.
    NewerVersion,
    /// Well-formed, but this program cannot read it (unknown kind, codec or cipher).
    Unsupported,
    /// Whole, but not the object that was asked for.
    Mismatch,
    /// The caller asked to write something the format cannot hold.
    Invalid,
}

/// Why bytes could not be read as, or turned into, an object of the archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer or more bytes than the object says it has.
    #[error("{what} has {found} bytes where {expected} are needed")]
    Length {
        /// The part that is too short or too long.
        what: &'static str,
        /// Bytes that are there.
        found: u64,
        /// Bytes that must be there.
        expected: u64,
    },
    /// The first or last bytes are not those of a Highwater object.
    #[error("{what} does not carry the magic bytes of a Highwater object")]
    Magic {
        /// Header or trailer.
        what: &'static str,
    },
    /// A checksum does not match.
    #[error("{what} is damaged: stored CRC-32 {stored:08x}, computed {computed:08x}")]
    Checksum {
        /// The part the checksum covers.
        what: String,
        /// The checksum as stored.
        stored: u32,
        /// The checksum of the bytes as read.
        computed: u32,
    },
    /// Fields contradict each other or the rules of the format.
    #[error("{what} is damaged: {problem}")]
    Damaged {
        /// The part that is wrong.
        what: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A later version of the format.
    #[error("{what} has format version {found}; this program knows up to {known}: upgrade it")]
    NewerVersion {
        /// Container or kind of document.
        what: String,
        /// The version found.
        found: u32,
        /// The newest version this program reads.
        known: u32,
    },
    /// A kind of object this program does not know.
    #[error("the container holds an object of unknown kind {0}; a newer release may know it")]
    UnknownKind(u8),
    /// A codec this program does not know.
    #[error("the container was written with unknown codec {0}; a newer release may know it")]
    UnknownCodec(u8),
    /// A cipher this program does not know.
    #[error("the container was written with unknown cipher {0}; a newer release may know it")]
    UnknownCipher(u8),
    /// An encrypted object: the fields are reserved, this release has no key handling.
    #[error("the container is encrypted with {0}, which this release cannot decrypt; use one that can")]
    Encrypted(crate::Cipher),
    /// A whole object, but another one than the key or the caller said.
    #[error("the object is another one than its key says: {field} is {found}, expected {expected}")]
    Mismatch {
        /// The field that differs.
        field: &'static str,
        /// What the object says.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// A JSON document that cannot be read.
    #[error("{what} is damaged: {problem}")]
    Document {
        /// The kind of document.
        what: String,
        /// What the parser said.
        problem: String,
    },
    /// A value that must not be written.
    #[error("{what} cannot be written: {problem}")]
    Invalid {
        /// What was to be written.
        what: &'static str,
        /// Why not.
        problem: String,
    },
    /// The compressor refused.
    #[error("{codec} compression failed: {problem}")]
    Compress {
        /// The codec in use.
        codec: Codec,
        /// What the library said.
        problem: String,
    },
}

impl FormatError {
    /// What the error asks of its reader.
    pub fn kind(&self) -> FormatErrorKind {
        match self {
            FormatError::Length { .. }
            | FormatError::Magic { .. }
            | FormatError::Checksum { .. }
            | FormatError::Damaged { .. }
            | FormatError::Document { .. } => FormatErrorKind::Corrupt,
            FormatError::NewerVersion { .. } => FormatErrorKind::NewerVersion,
            FormatError::UnknownKind(_)
            | FormatError::UnknownCodec(_)
            | FormatError::UnknownCipher(_)
            | FormatError::Encrypted(_) => FormatErrorKind::Unsupported,
            FormatError::Mismatch { .. } => FormatErrorKind::Mismatch,
            FormatError::Invalid { .. } | FormatError::Compress { .. } => FormatErrorKind::Invalid,
        }
    }

    pub(crate) fn mismatch(
        field: &'static str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> FormatError {
        FormatError::Mismatch {
            field,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}
