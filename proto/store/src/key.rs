//! Which keys a store accepts.
//!
//! The rules are those of the strictest store, so that a key that works in one region works in all: a key
//! must be a safe relative path and a plain S3 object name.

use crate::{ErrorKind, Operation, StoreError};

/// Longest key in bytes. S3 allows 1024 for the region's prefix and the key together.
pub const MAX_KEY_LEN: usize = 800;

/// Longest part between slashes in bytes: `NAME_MAX` of Linux file systems.
const MAX_PART_LEN: usize = 255;

/// First part that the directory store keeps for files being written.
pub(crate) const TMP_PART: &str = ".tmp";

/// Refuses a key that some store could not hold, or that would leave its root.
pub(crate) fn check_key(region: &str, operation: Operation, key: &str) -> Result<(), StoreError> {
    let fault = if key.is_empty() {
        Some("is empty")
    } else {
        path_fault(key)
    };
    refuse(region, operation, key, fault)
}

/// Refuses a listing prefix that could never match a key. The last part may be incomplete.
pub(crate) fn check_prefix(region: &str, operation: Operation, prefix: &str) -> Result<(), StoreError> {
    let whole_parts = prefix.rsplit_once('/').map_or("", |(parts, _)| parts);
    let fault = if prefix.starts_with('/') {
        Some("is absolute")
    } else if prefix.chars().any(char::is_control) {
        Some("holds a control character")
    } else if whole_parts.is_empty() {
        None
    } else {
        path_fault(whole_parts)
    };
    refuse(region, operation, prefix, fault)
}

/// Whether a name found in a directory can be part of a key.
pub(crate) fn is_key_part(part: &str) -> bool {
    part_fault(part).is_none()
}

fn refuse(region: &str, operation: Operation, key: &str, fault: Option<&str>) -> Result<(), StoreError> {
    match fault {
        None => Ok(()),
        Some(fault) => Err(StoreError::new(
            ErrorKind::Bug,
            region,
            operation,
            key.escape_debug().to_string(),
            format!("the key {fault}"),
        )),
    }
}

fn path_fault(key: &str) -> Option<&'static str> {
    if key.len() > MAX_KEY_LEN {
        return Some("is longer than 800 bytes");
    }
    if key.starts_with('/') {
        return Some("is absolute");
    }
    if key.split('/').next() == Some(TMP_PART) {
        return Some("begins with .tmp, which is kept for files being written");
    }
    key.split('/').find_map(part_fault)
}

fn part_fault(part: &str) -> Option<&'static str> {
    if part.is_empty() {
        Some("has an empty part")
    } else if part == "." || part == ".." {
        Some("has a part . or ..")
    } else if part.len() > MAX_PART_LEN {
        Some("has a part longer than 255 bytes")
    } else if part.chars().any(|c| c.is_control() || c == '\\') {
        Some("holds a control character or a backslash")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::{Component, Path};

    fn accepts(key: &str) -> bool {
        check_key("r", Operation::Put, key).is_ok()
    }

    #[test]
    fn ordinary_keys_pass() {
        for key in [
            "a",
            "orders/7301/wal/00000001/segment/000000010000000000000002",
            "a..b/c.d",
            "..a",
            "ü",
        ] {
            assert!(accepts(key), "{key}");
        }
    }

    #[test]
    fn keys_that_leave_the_root_or_name_nothing_are_refused() {
        let long = "x".repeat(256);
        let very_long = "ab/".repeat(300);
        for key in [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            "..",
            "a/../b",
            "../a",
            ".",
            "a/./b",
            "a\0b",
            "a\nb",
            "a\\b",
            ".tmp/x",
            ".tmp",
            long.as_str(),
            very_long.as_str(),
        ] {
            assert!(!accepts(key), "{key:?}");
        }
        let err = check_key("eu", Operation::Put, "a/../b").unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Bug);
        assert!(
            err.to_string().contains("a/../b") && err.to_string().contains("eu"),
            "{err}"
        );
    }

    #[test]
    fn prefixes_may_end_anywhere() {
        for prefix in ["", "a", "a/", "a/b", "a/..", "."] {
            assert!(check_prefix("r", Operation::List, prefix).is_ok(), "{prefix:?}");
        }
        for prefix in ["/", "a/../b", "a//b", "../", ".tmp/"] {
            assert!(check_prefix("r", Operation::List, prefix).is_err(), "{prefix:?}");
        }
    }

    proptest! {
        #[test]
        fn an_accepted_key_stays_below_its_root(key in "[a./\\\\\0\u{e9}-]{0,12}") {
            if accepts(&key) {
                let path = Path::new(&key);
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
                prop_assert_eq!(path.components().count(), key.split('/').count());
            }
        }
    }
}
