//! Older versions of objects, in buckets that keep them.
//!
//! Owns: what S3 promises there. A PUT adds a version, a DELETE only a delete marker, and both can be listed. Nobody may delete a
//! version (`backend` refuses it). Does not own: the objects as they are now (`state`).

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::SystemTime;

use super::state::{Bucket, Stored};

/// What objects of before the bucket kept versions are called, and those of a bucket that keeps none.
const FIRST: &str = "null";

/// One version of an object, or a delete marker.
#[derive(Clone, Debug)]
pub(super) struct Version {
    pub(super) id: String,
    pub(super) at: SystemTime,
    /// `None` for a delete marker.
    pub(super) stored: Option<Arc<Stored>>,
}

/// What happened to the keys of one bucket, the oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Past(BTreeMap<String, Vec<Version>>);

/// A version as listed.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) version: Version,
    pub(super) newest: bool,
}

/// What a listing of versions asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Query<'a> {
    pub(super) prefix: &'a str,
    /// Behind this key, or behind one version of it.
    pub(super) after: Option<(&'a str, Option<&'a str>)>,
    pub(super) max: usize,
}

impl Past {
    /// The past of a bucket that kept no versions until now.
    pub(super) fn of(present: &Bucket) -> Self {
        let first = |stored: &Arc<Stored>| Version {
            id: FIRST.to_owned(),
            at: stored.at,
            stored: Some(Arc::clone(stored)),
        };
        let all = present
            .iter()
            .map(|(key, stored)| (key.clone(), vec![first(stored)]));
        Self(all.collect())
    }

    /// A PUT, or without `stored` a DELETE.
    pub(super) fn add(&mut self, key: &str, at: SystemTime, stored: Option<Arc<Stored>>) {
        let versions = self.0.entry(key.to_owned()).or_default();
        // Opaque, and in no order that a client could rely on.
        let id = format!(
            "{:08x}",
            crc32fast::hash(format!("{key} {}", versions.len()).as_bytes())
        );
        versions.push(Version { id, at, stored });
    }

    pub(super) fn get(&self, key: &str, id: &str) -> Option<&Version> {
        self.0.get(key)?.iter().find(|version| version.id == id)
    }

    /// Every key that there ever was, from a place on.
    pub(super) fn keys_from(&self, from: Bound<&str>) -> impl Iterator<Item = &String> {
        self.0
            .range::<str, _>((from, Bound::Unbounded))
            .map(|(key, _)| key)
    }

    /// Up to `max` entries, and whether there are more.
    pub(super) fn list(&self, query: &Query<'_>) -> (Vec<Entry>, bool) {
        let keys = self.0.iter().filter(|(key, _)| key.starts_with(query.prefix));
        let mut entries: Vec<Entry> = keys
            .flat_map(|(key, versions)| behind(key, versions, query))
            .take(query.max.saturating_add(1))
            .collect();
        let more = entries.len() > query.max;
        entries.truncate(query.max);
        (entries, more)
    }
}

/// What is listed of one key, the newest first.
fn behind<'a>(
    key: &'a str,
    versions: &'a [Version],
    query: &Query<'_>,
) -> impl Iterator<Item = Entry> + use<'a> {
    let passed = match query.after {
        Some((after, _)) if key < after => versions.len(),
        Some((after, None)) if key == after => versions.len(),
        Some((after, Some(id))) if key == after => {
            let newest_first = versions.iter().rev();
            newest_first.take_while(|version| version.id != id).count() + 1
        }
        _ => 0,
    };
    let entry = |(index, version): (usize, &Version)| Entry {
        key: key.to_owned(),
        version: version.clone(),
        newest: index == 0,
    };
    versions.iter().rev().enumerate().skip(passed).map(entry)
}
