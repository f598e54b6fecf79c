//! Where a region is: its URL, taken apart.

use std::fmt;
use std::path::PathBuf;

use crate::key;
use crate::{ErrorKind, Operation, StoreError};

/// A parsed region URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `file:///absolute/directory`.
    File(PathBuf),
    /// `s3://bucket/prefix`; the prefix has no slash at either end and may be empty.
    S3 {
        /// Bucket name.
        bucket: String,
        /// What stands before every key, without the slash that follows it.
        prefix: String,
    },
}

impl Location {
    /// Takes a region URL apart; `region` is its name, for the message.
    pub fn parse(region: &str, url: &str) -> Result<Self, StoreError> {
        let config =
            |message: String| StoreError::new(ErrorKind::Config, region, Operation::Open, "", message);
        let forms = "write s3://bucket/prefix or file:///absolute/directory";
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(config(format!("the URL {url:?} has no scheme")).with_next_step(forms));
        };
        match scheme {
            "file" => {
                file(rest).map_err(|fault| config(format!("the URL {url:?} {fault}")).with_next_step(forms))
            }
            "s3" => {
                s3(rest).map_err(|fault| config(format!("the URL {url:?} {fault}")).with_next_step(forms))
            }
            _ => Err(config(format!("the URL scheme {scheme:?} is not known")).with_next_step(forms)),
        }
    }
}

fn file(rest: &str) -> Result<Location, &'static str> {
    // A host part, as in file://data/x, is always a forgotten slash.
    if !rest.starts_with('/') {
        return Err("does not name an absolute directory: three slashes are needed");
    }
    if rest.contains('\0') || rest.split('/').any(|part| part == "..") {
        return Err("holds .. or a NUL");
    }
    if rest.contains(['%', '?', '#']) {
        return Err("holds %, ? or #, which are not decoded; use a plain path");
    }
    let path = rest.trim_end_matches('/');
    if path.is_empty() {
        return Err("names the root directory");
    }
    Ok(Location::File(PathBuf::from(path)))
}

fn s3(rest: &str) -> Result<Location, &'static str> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.contains('@') {
        return Err("holds credentials, which do not belong into a URL");
    }
    let bucket_ok = (3..=255).contains(&bucket.len())
        && bucket
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':'));
    if !bucket_ok {
        return Err("does not name a bucket");
    }
    let prefix = prefix.trim_end_matches('/');
    if prefix.contains(['?', '#']) {
        return Err("holds ? or #; settings go into the region's own keys");
    }
    let prefix_ok = prefix.is_empty() || prefix.split('/').all(key::is_key_part);
    if !prefix_ok || prefix.len() > MAX_PREFIX_LEN {
        return Err("has a prefix with an empty part, ., .., control characters, or more than 200 bytes");
    }
    Ok(Location::S3 {
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
    })
}

/// Prefix and key together stay below S3's 1024 bytes.
const MAX_PREFIX_LEN: usize = 200;

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_parse_and_print() {
        for (url, printed) in [
            ("file:///var/backups/hw/", "file:///var/backups/hw"),
            ("s3://orders-archive/prod/", "s3://orders-archive/prod"),
            ("s3://orders-archive", "s3://orders-archive"),
            ("s3://orders.archive/a/b", "s3://orders.archive/a/b"),
        ] {
            assert_eq!(Location::parse("r", url).unwrap().to_string(), printed);
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (url, word) in [
            ("/var/backups", "scheme"),
            ("file://var/backups", "three slashes"),
            ("file:///", "root directory"),
            ("file:///a/../b", ".."),
            ("gs://bucket/x", "gs"),
            ("s3:///prefix", "bucket"),
            ("s3://key:secret@bucket/x", "credentials"),
            ("s3://bucket/a//b", "empty part"),
            ("s3://bucket/a?region=x", "settings"),
        ] {
            let err = Location::parse("eu", url).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::Config, "{url}");
            assert!(err.to_string().contains(word), "{url}: {err}");
        }
    }
}
