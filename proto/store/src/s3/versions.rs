//! Which version of each key was there at a moment. Pure.
//!
//! Owns: the choice from listed versions. Does not own: how pages are asked for (`as_of`).
//!
//! S3 lists by key, and what happened to one key newest first: versions, and delete markers where an object was deleted.
//! The SDK hands both over in separate lists, so their order is made anew from their times. AWS keeps those to the second.
//! Of a version and a marker of one second the one that is the newest of all is known; otherwise the version counts, because
//! to miss an object of an archive is worse than to read one in the second in which it was deleted.

use std::time::SystemTime;

/// A version of an object, or a delete marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    /// Key relative to the region's prefix.
    pub(super) key: String,
    /// What the store calls it.
    pub(super) id: String,
    /// Size in bytes; 0 for a marker.
    pub(super) size: u64,
    /// When it was made, by the store's clock.
    pub(super) made: SystemTime,
    /// It is a delete marker.
    pub(super) deleted: bool,
    /// Nothing happened to the key since.
    pub(super) newest: bool,
}

/// The choice, over the pages of one listing.
#[derive(Debug)]
pub(super) struct Choice {
    time: SystemTime,
    /// The last key that was decided: what follows of it, on the next page too, is older.
    decided: Option<String>,
}

impl Choice {
    /// What was there at `time`.
    pub(super) fn at(time: SystemTime) -> Self {
        Self { time, decided: None }
    }

    /// Whether it is known what was there of `key`.
    pub(super) fn has_decided(&self, key: &str) -> bool {
        self.decided.as_deref() == Some(key)
    }

    /// The objects of the next page that were there, ascending by key. A page may begin in the middle of a key.
    pub(super) fn of_page(&mut self, mut page: Vec<Version>) -> Vec<Version> {
        page.sort_by(|a, b| {
            let newer_first = b.made.cmp(&a.made).then(b.newest.cmp(&a.newest));
            a.key
                .cmp(&b.key)
                .then(newer_first)
                .then(a.deleted.cmp(&b.deleted))
        });
        let mut there = Vec::new();
        for version in page {
            if version.made > self.time || self.has_decided(&version.key) {
                continue;
            }
            self.decided = Some(version.key.clone());
            if !version.deleted {
                there.push(version);
            }
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn second(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn version(key: &str, id: &str, made: u64) -> Version {
        Version {
            key: key.to_owned(),
            id: id.to_owned(),
            size: 1,
            made: second(made),
            deleted: false,
            newest: false,
        }
    }

    fn marker(key: &str, made: u64) -> Version {
        Version {
            deleted: true,
            size: 0,
            ..version(key, "marker", made)
        }
    }

    fn newest(version: Version) -> Version {
        Version {
            newest: true,
            ..version
        }
    }

    /// What is chosen of these pages, as the SDK gives them: versions first, then markers.
    fn chosen(time: u64, pages: &[Vec<Version>]) -> Vec<String> {
        let mut choice = Choice::at(second(time));
        let pages = pages.iter().map(|page| {
            let (markers, versions): (Vec<_>, Vec<_>) = page.iter().cloned().partition(|one| one.deleted);
            [versions, markers].concat()
        });
        pages
            .flat_map(|page| choice.of_page(page))
            .map(|one| format!("{}={}", one.key, one.id))
            .collect()
    }

    #[test]
    fn the_newest_at_or_before_the_moment_counts() {
        let page = [vec![
            version("a", "3", 30),
            version("a", "2", 20),
            version("a", "1", 10),
        ]];
        assert_eq!(chosen(9, &page), Vec::<String>::new());
        assert_eq!(chosen(10, &page), ["a=1"]);
        assert_eq!(chosen(29, &page), ["a=2"]);
        assert_eq!(chosen(99, &page), ["a=3"]);
    }

    #[test]
    fn a_deleted_object_was_there_until_it_was_deleted() {
        let page = [vec![
            version("a", "2", 30),
            marker("a", 20),
            version("a", "1", 10),
            version("b", "1", 10),
        ]];
        assert_eq!(chosen(19, &page), ["a=1", "b=1"]);
        assert_eq!(chosen(20, &page), ["b=1"]);
        assert_eq!(chosen(30, &page), ["a=2", "b=1"]);
    }

    #[test]
    fn a_page_that_ends_within_a_key_does_not_bring_back_what_was_deleted() {
        let pages = [
            vec![version("a", "1", 10), marker("b", 20)],
            vec![version("b", "1", 10), version("c", "2", 40)],
            vec![version("c", "1", 10)],
        ];
        assert_eq!(chosen(25, &pages), ["a=1", "c=1"]);
        assert_eq!(chosen(15, &pages), ["a=1", "b=1", "c=1"]);
    }

    #[test]
    fn within_one_second_only_the_very_newest_is_known() {
        let gone = [vec![newest(marker("a", 20)), version("a", "1", 20)]];
        assert_eq!(chosen(20, &gone), Vec::<String>::new());
        let back = [vec![
            newest(version("a", "2", 20)),
            marker("a", 20),
            version("a", "1", 20),
        ]];
        assert_eq!(chosen(20, &back), ["a=2"]);
        let unknown = [vec![
            version("a", "2", 30),
            marker("a", 20),
            version("a", "1", 20),
        ]];
        assert_eq!(chosen(20, &unknown), ["a=1"]);
    }

    proptest! {
        /// Against a model that replays what happened, at every moment, whatever the pages are.
        #[test]
        fn it_is_what_was_there(
            happened in proptest::collection::vec((0..4_usize, any::<bool>()), 0..40),
            page in 1..7_usize,
            time in 0..45_u64,
        ) {
            let keys = ["a", "a/b", "b", "c"];
            let mut model = std::collections::BTreeMap::new();
            let mut all = Vec::new();
            for (made, (key, deleted)) in (1_u64..).zip(&happened) {
                let one = if *deleted {
                    marker(keys[*key], made)
                } else {
                    version(keys[*key], &made.to_string(), made)
                };
                if made <= time {
                    model.insert(one.key.clone(), one.clone());
                }
                all.push(one);
            }
            all.sort_by(|a, b| a.key.cmp(&b.key).then(b.made.cmp(&a.made)));
            let pages: Vec<Vec<Version>> = all.chunks(page).map(<[Version]>::to_vec).collect();
            let there = model.into_values().filter(|one| !one.deleted);
            let expected: Vec<String> = there.map(|one| format!("{}={}", one.key, one.id)).collect();
            prop_assert_eq!(chosen(time, &pages), expected);
        }
    }
}
