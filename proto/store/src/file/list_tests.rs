use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const LONG: Duration = Duration::from_secs(600);

fn plant(root: &Path, key: &str) {
    let path = root.join(key);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, "x").unwrap();
}

/// Pages of `max` to the end, and how often a directory was read.
fn listed(root: &Path, prefix: &str, max: usize, patience: Duration) -> (Vec<String>, usize) {
    let (mut keys, mut readings) = (Vec::<String>::new(), 0);
    loop {
        let after = keys.last().cloned();
        let mut walk = Walk::new(root, prefix, after.as_deref(), max, patience);
        assert!(walk.run().is_ok());
        readings += walk.readings;
        assert!(walk.page.entries.len() <= max);
        keys.extend(walk.page.entries.into_iter().map(|meta| meta.key));
        if !walk.page.more {
            return (keys, readings);
        }
        assert!(keys.last() > after.as_ref(), "more is promised and nothing comes");
    }
}

#[test]
fn a_directory_is_read_once_per_page_however_many_names_it_has() {
    let dir = TempDir::new().unwrap();
    let keys: Vec<String> = (0..2100)
        .map(|number| format!("wal/segment/{number:024X}"))
        .collect();
    for key in keys.iter().rev() {
        plant(dir.path(), key);
    }
    assert_eq!(
        listed(dir.path(), "wal/segment/", crate::LONG_PAGE, LONG),
        (keys.clone(), 1)
    );
    assert_eq!(listed(dir.path(), "wal/segment/", 1000, LONG), (keys, 3));
}

#[test]
fn a_slow_mount_gives_shorter_pages() {
    let dir = TempDir::new().unwrap();
    let keys: Vec<String> = (0..NAMES + 5).map(|number| format!("a/{number:05}")).collect();
    for key in &keys {
        plant(dir.path(), key);
    }
    let page = list(dir.path(), "", None, crate::LONG_PAGE, Duration::ZERO)
        .ok()
        .unwrap();
    assert_eq!((page.entries.len(), page.more), (NAMES, true));
    assert_eq!(listed(dir.path(), "", crate::LONG_PAGE, Duration::ZERO).0, keys);
}

#[test]
fn names_that_are_not_held_are_read_when_those_held_give_nothing() {
    let dir = TempDir::new().unwrap();
    // What retention leaves: more empty directories than names are held.
    for number in 0..NAMES + 7 {
        fs::create_dir_all(dir.path().join(format!("base/{number:05}/pack"))).unwrap();
    }
    plant(dir.path(), "base/99999/pack/0");
    for max in [1, 10] {
        let (keys, _) = listed(dir.path(), "base/", max, LONG);
        assert_eq!(keys, ["base/99999/pack/0"]);
    }
}

proptest! {
    #[test]
    fn the_smallest_names_are_held(names in proptest::collection::vec("[a-c]{1,3}", 0..40), room in 1_usize..20) {
        let mut smallest = Smallest::new(room);
        for name in &names {
            smallest.offer(name.clone());
        }
        let mut sorted = names.clone();
        sorted.sort();
        sorted.truncate(room);
        prop_assert_eq!(smallest.sorted(), (sorted, names.len() > room));
    }
}
