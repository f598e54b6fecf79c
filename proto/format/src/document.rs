//! The envelope of every JSON document of the archive.
//!
//! ```json
//! {"format":1,"kind":"pulse","crc32":"0a1b2c3d","body":{...}}
//! ```
//!
//! Owns: writing and reading the envelope, its checksum and its version. Does not own: what the bodies mean.
//! A body is checked by [`Document::validate`] on the way out as well as on the way in, so that nothing is
//! stored that a reader would refuse. Unknown fields are skipped: a minor release may add some.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::FormatError;

/// The document version that this release writes, and the newest that it reads.
pub const DOCUMENT_FORMAT: u32 = 1;

/// A value that is stored as a JSON document.
pub trait Document: Serialize + DeserializeOwned {
    /// The name of the kind in the envelope.
    const KIND: &'static str;

    /// The rules that the types alone do not enforce; the problem as text where one is broken.
    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    format: u32,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    crc32: Cow<'a, str>,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// The bytes of a document: one line without a line feed, always the same for the same value.
pub fn encode<T: Document>(document: &T) -> Result<Vec<u8>, FormatError> {
    let invalid = |problem: String| FormatError::Invalid {
        what: T::KIND,
        problem,
    };
    document.validate().map_err(invalid)?;
    let body = serde_json::value::to_raw_value(document).map_err(|error| invalid(error.to_string()))?;
    let envelope = Envelope {
        format: DOCUMENT_FORMAT,
        kind: Cow::Borrowed(T::KIND),
        crc32: Cow::Owned(crc32_hex(crc32fast::hash(body.get().as_bytes()))),
        body: &body,
    };
    serde_json::to_vec(&envelope).map_err(|error| invalid(error.to_string()))
}

/// Reads a document; checks its checksum, version, kind and rules, in this order.
pub fn decode<T: Document>(bytes: &[u8]) -> Result<T, FormatError> {
    let damaged = |problem: String| FormatError::Document {
        what: document_name(T::KIND),
        problem,
    };
    let envelope: Envelope<'_> = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    check_checksum(&envelope, T::KIND)?;
    if envelope.format > DOCUMENT_FORMAT {
        let (what, found) = (document_name(T::KIND), envelope.format);
        return Err(FormatError::NewerVersion {
            what,
            found,
            known: DOCUMENT_FORMAT,
        });
    }
    if envelope.format == 0 {
        return Err(damaged("there is no format 0".to_owned()));
    }
    if envelope.kind != T::KIND {
        return Err(FormatError::mismatch("kind of document", &envelope.kind, T::KIND));
    }
    let document: T =
        serde_json::from_str(envelope.body.get()).map_err(|error| damaged(error.to_string()))?;
    document.validate().map_err(damaged)?;
    Ok(document)
}

fn check_checksum(envelope: &Envelope<'_>, kind: &str) -> Result<(), FormatError> {
    let what = document_name(kind);
    let Some(stored) = parse_crc32(&envelope.crc32) else {
        let problem = format!(
            "crc32 {:?} is not 8 lower-case hexadecimal digits",
            envelope.crc32
        );
        return Err(FormatError::Document { what, problem });
    };
    let computed = crc32fast::hash(envelope.body.get().as_bytes());
    if stored == computed {
        Ok(())
    } else {
        Err(FormatError::Checksum {
            what,
            stored,
            computed,
        })
    }
}

fn document_name(kind: &str) -> String {
    format!("the {kind} document")
}

/// How documents write a CRC-32: eight lower-case hexadecimal digits.
pub fn crc32_hex(crc32: u32) -> String {
    format!("{crc32:08x}")
}

/// Reads the form of [`crc32_hex`], and no other.
pub fn parse_crc32(text: &str) -> Option<u32> {
    let canonical = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != 8 || !text.bytes().all(canonical) {
        return None;
    }
    u32::from_str_radix(text, 16).ok()
}
