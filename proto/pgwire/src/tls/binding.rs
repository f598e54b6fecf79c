//! `tls-server-end-point` channel binding (RFC 5929): a hash of the server's certificate.
//!
//! The hash is the one of the certificate's signature, except that MD5 and SHA-1 give way to SHA-256.
//! Finding it needs a few bytes of DER: `Certificate ::= SEQUENCE { tbs, SEQUENCE { algorithm,
//! parameters }, signature }`.

use aws_lc_rs::digest::{Algorithm, SHA224, SHA256, SHA384, SHA512, digest};

const SEQUENCE: u8 = 0x30;
const OBJECT_ID: u8 = 0x06;
/// `[0]`, constructed: the hash in RSASSA-PSS parameters.
const CONTEXT_0: u8 = 0xa0;

/// RSA PKCS #1: 1.2.840.113549.1.1.x
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
/// ECDSA with SHA-2: 1.2.840.10045.4.3.x
const ECDSA_SHA2: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03];
/// ECDSA with SHA-1: 1.2.840.10045.4.1
const ECDSA_SHA1: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01];
/// SHA-2 hashes: 2.16.840.1.101.3.4.2.x
const NIST_HASH: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02];

/// The binding data of a certificate; `None` if its signature names no hash (Ed25519).
pub(crate) fn tls_server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let algorithm = signature_hash(certificate)?;
    Some(digest(algorithm, certificate).as_ref().to_vec())
}

fn signature_hash(certificate: &[u8]) -> Option<&'static Algorithm> {
    let (body, _) = element(certificate, SEQUENCE)?;
    let (_, rest) = element(body, SEQUENCE)?;
    let (identifier, _) = element(rest, SEQUENCE)?;
    let (oid, parameters) = element(identifier, OBJECT_ID)?;
    let (last, family) = oid.split_last()?;
    match (family, last) {
        (RSA, 4 | 5) => Some(&SHA256),
        (RSA, 10) => pss_hash(parameters),
        (RSA, 11) => Some(&SHA256),
        (RSA, 12) => Some(&SHA384),
        (RSA, 13) => Some(&SHA512),
        (RSA, 14) => Some(&SHA224),
        (ECDSA_SHA2, 1) => Some(&SHA224),
        (ECDSA_SHA2, 2) => Some(&SHA256),
        (ECDSA_SHA2, 3) => Some(&SHA384),
        (ECDSA_SHA2, 4) => Some(&SHA512),
        _ if oid == ECDSA_SHA1 => Some(&SHA256),
        _ => None,
    }
}

/// RSASSA-PSS names its hash in the parameters; left out it is SHA-1.
fn pss_hash(parameters: &[u8]) -> Option<&'static Algorithm> {
    let (fields, _) = element(parameters, SEQUENCE)?;
    let Some((hash, _)) = element(fields, CONTEXT_0) else {
        return Some(&SHA256);
    };
    let (identifier, _) = element(hash, SEQUENCE)?;
    let (oid, _) = element(identifier, OBJECT_ID)?;
    let (last, family) = oid.split_last()?;
    match (family, last) {
        (NIST_HASH, 1) => Some(&SHA256),
        (NIST_HASH, 2) => Some(&SHA384),
        (NIST_HASH, 3) => Some(&SHA512),
        (NIST_HASH, 4) => Some(&SHA224),
        _ => None,
    }
}

/// Content of the DER element at the front, if it has this tag, and what follows it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    if *found != tag {
        return None;
    }
    let (len, rest) = match first {
        len @ 0..=0x7f => (usize::from(*len), rest),
        count @ 0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(count & 0x7f))?;
            (
                digits.iter().fold(0, |len, digit| len << 8 | usize::from(*digit)),
                rest,
            )
        }
        _ => return None,
    };
    rest.split_at_checked(len)
}

#[cfg(test)]
mod tests;
