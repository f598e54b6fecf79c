use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::SystemTime;

use tempfile::TempDir;

use super::*;
use crate::{FaultyStore, conformance, list_all, open as open_region};

fn config(dir: &Path) -> RegionConfig {
    RegionConfig::new("disk", format!("file://{}", dir.display()))
}

async fn store_in(dir: &Path) -> Arc<dyn Store> {
    open_region(&config(dir)).await.unwrap()
}

async fn put(store: &dyn Store, key: &str, bytes: &'static str, mode: PutMode) -> Result<Put, StoreError> {
    store.put(key, Object::new(bytes), mode).await
}

fn temporary_files(root: &Path) -> Vec<PathBuf> {
    match fs::read_dir(root.join(".tmp")) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => Vec::new(),
    }
}

#[tokio::test]
async fn conforms() {
    let dirs = std::sync::Mutex::new(Vec::new());
    conformance::run(|| {
        let dir = TempDir::new().unwrap();
        let config = config(&dir.path().join("region"));
        dirs.lock().unwrap().push(dir);
        async move { open_region(&config).await }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn two_processes_on_one_directory_see_one_winner() {
    let dir = TempDir::new().unwrap();
    // Separate stores share nothing in memory, as two processes would.
    let mut racers = tokio::task::JoinSet::new();
    for racer in 0..8u8 {
        let store = store_in(dir.path()).await;
        racers.spawn(async move {
            store
                .put("a/b/c", Object::new(vec![racer; 5000]), PutMode::Create)
                .await
                .unwrap()
        });
    }
    let outcomes = racers.join_all().await;
    assert_eq!(
        outcomes.iter().filter(|put| **put == Put::Created).count(),
        1,
        "{outcomes:?}"
    );
    assert_eq!(temporary_files(dir.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn what_a_crash_leaves_is_neither_listed_nor_read_and_goes_when_it_is_old() {
    let dir = TempDir::new().unwrap();
    let tmp = dir.path().join(".tmp");
    fs::create_dir(&tmp).unwrap();
    let (old, young) = (tmp.join("77-0"), tmp.join(format!("{}-0", std::process::id())));
    fs::write(&old, "half an obj").unwrap();
    fs::write(&young, "half an object of a running writer").unwrap();
    let an_hour_ago = fs::metadata(&old).unwrap().modified().unwrap() - Duration::from_secs(3700);
    set_modified(&old, an_hour_ago);

    let store = store_in(dir.path()).await;
    assert_eq!(list_all(store.as_ref(), "", None).await.unwrap(), vec![]);
    assert_eq!(store.get(".tmp/77-0").await.unwrap_err().kind(), ErrorKind::Bug);
    // The name that the young file holds is the first that this process would take.
    assert_eq!(
        put(store.as_ref(), "key", "whole", PutMode::Create)
            .await
            .unwrap(),
        Put::Created
    );
    assert!(!old.exists(), "the stale file stays");
    assert_eq!(fs::read(&young).unwrap(), b"half an object of a running writer");
    assert_eq!(temporary_files(dir.path()), vec![young]);
    let keys = list_all(store.as_ref(), "", None).await.unwrap();
    assert_eq!(
        keys,
        vec![Meta {
            key: "key".to_owned(),
            size: 5
        }]
    );
}

fn set_modified(path: &Path, at: SystemTime) {
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_modified(at)
        .unwrap();
}

#[tokio::test]
async fn a_failed_write_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let store = store_in(dir.path()).await;
    put(store.as_ref(), "taken", "file", PutMode::Create)
        .await
        .unwrap();
    // A key below an object fits no directory.
    let error = put(store.as_ref(), "taken/below", "x", PutMode::Create)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Bug, "{error}");
    fs::create_dir(dir.path().join("dir")).unwrap();
    for mode in [PutMode::Create, PutMode::Overwrite] {
        let error = put(store.as_ref(), "dir", "x", mode).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Bug, "{error}");
    }
    assert_eq!(temporary_files(dir.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn only_the_last_part_of_the_root_is_created() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("region");
    let store = store_in(&root).await;
    assert!(!root.exists(), "opening wrote something");
    assert_eq!(store.list("", None, 10).await.unwrap(), Page::default());
    assert_eq!(store.get("key").await.unwrap_err().kind(), ErrorKind::NotFound);
    put(store.as_ref(), "a/b", "x", PutMode::Create).await.unwrap();
    assert!(root.join("a/b").is_file());

    let away = store_in(&dir.path().join("not/mounted")).await;
    for error in [
        away.list("", None, 10).await.unwrap_err(),
        away.get("key").await.unwrap_err(),
        put(away.as_ref(), "key", "x", PutMode::Create).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Operator);
        assert!(
            error.to_string().contains("not/mounted") && error.to_string().contains("mount"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_root_that_disappears_or_changes_is_not_an_empty_region() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("region");
    let store = store_in(&root).await;
    put(store.as_ref(), "key", "x", PutMode::Create).await.unwrap();
    fs::rename(&root, dir.path().join("elsewhere")).unwrap();
    for replaced in [false, true] {
        if replaced {
            fs::create_dir(&root).unwrap();
        }
        let errors = [
            store.get("key").await.unwrap_err(),
            store.head("key").await.unwrap_err(),
            store.list("", None, 10).await.unwrap_err(),
            put(store.as_ref(), "other", "x", PutMode::Create)
                .await
                .unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Operator, "{error}");
        }
    }
    assert!(!root.join("other").exists());
}

#[test]
fn a_root_that_goes_during_a_listing_is_not_the_end_of_it() {
    for replaced in [false, true] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("region");
        fs::create_dir_all(path.join("a")).unwrap();
        fs::write(path.join("a/key"), "x").unwrap();
        let root = Root::new(path.clone());
        let walk = |path: &Path| list::list(path, "a/", None, 10, Duration::from_secs(600));
        assert_eq!(listed(&root, walk).unwrap().entries.len(), 1);
        let failure = listed(&root, |path| {
            fs::rename(path, dir.path().join("elsewhere")).unwrap();
            if replaced {
                fs::create_dir(path).unwrap();
            }
            walk(path)
        });
        assert!(matches!(failure, Err(Failure::Root { .. })), "{failure:?}");
    }
}

#[tokio::test]
async fn a_directory_removed_behind_our_back_is_made_again() {
    let dir = TempDir::new().unwrap();
    let store = store_in(dir.path()).await;
    put(store.as_ref(), "a/b/1", "x", PutMode::Create).await.unwrap();
    fs::remove_dir_all(dir.path().join("a")).unwrap();
    assert_eq!(
        put(store.as_ref(), "a/b/2", "y", PutMode::Create).await.unwrap(),
        Put::Created
    );
    assert_eq!(store.get("a/b/2").await.unwrap(), "y");
}

#[tokio::test]
async fn a_file_of_any_size_costs_no_memory() {
    let dir = TempDir::new().unwrap();
    let store = store_in(dir.path()).await;
    let file = File::create(dir.path().join("pulse.json")).unwrap();
    file.set_len(1 << 40).unwrap();
    let error = store.get("pulse.json").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_eq!(store.get_range("pulse.json", 0..8).await.unwrap().len(), 8);
}

#[tokio::test]
async fn listing_reads_only_directories_that_can_match() {
    // Root may read everything, so the proof would not hold for it; an unreadable name does for all.
    let dir = TempDir::new().unwrap();
    let store = store_in(dir.path()).await;
    for key in ["m/1", "m/2", "z/1"] {
        put(store.as_ref(), key, "x", PutMode::Create).await.unwrap();
    }
    // A loop of links fails to open, whoever asks.
    std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
    let error = store.list("", None, 10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Bug, "{error}");
    assert_eq!(store.list("m", None, 10).await.unwrap().entries.len(), 2);
    assert_eq!(store.list("", Some("loop"), 10).await.unwrap().entries.len(), 3);
    // Names that can't be keys are someone else's.
    fs::write(dir.path().join("m/odd\\name"), "").unwrap();
    assert_eq!(store.list("m/", None, 10).await.unwrap().entries.len(), 2);
}

#[test]
fn errors_of_the_system_say_what_to_do() {
    use nix::errno::Errno;
    for (errno, kind) in [
        (Errno::ENOSPC, ErrorKind::Operator),
        (Errno::EDQUOT, ErrorKind::Operator),
        (Errno::EROFS, ErrorKind::Operator),
        (Errno::EACCES, ErrorKind::Operator),
        (Errno::EIO, ErrorKind::Operator),
        (Errno::ESTALE, ErrorKind::Retry),
        (Errno::EMFILE, ErrorKind::Retry),
        (Errno::ENOTDIR, ErrorKind::Bug),
        (Errno::EXDEV, ErrorKind::Config),
    ] {
        assert_eq!(faults::classify(&io::Error::from(errno)).0, kind, "{errno}");
    }
    let failure = Failure::Io {
        path: "/srv/archive/wal/x".into(),
        error: Errno::ENOSPC.into(),
    };
    let error = failure.into_error("disk", Operation::Put, "wal/x");
    let text = error.to_string();
    assert!(
        text.contains("/srv/archive/wal/x") && text.contains("free space"),
        "{text}"
    );
}

#[tokio::test]
async fn a_full_device_is_for_the_operator() {
    // /dev/full answers every write as a full disk does.
    let Ok(mut full) = File::options().write(true).open("/dev/full") else {
        return;
    };
    let error = io::Write::write_all(&mut full, b"x").unwrap_err();
    assert_eq!(faults::classify(&error).0, ErrorKind::Operator);
}

#[tokio::test]
async fn objects_are_not_for_everyone() {
    let dir = TempDir::new().unwrap();
    let store = store_in(dir.path()).await;
    put(store.as_ref(), "key", "x", PutMode::Create).await.unwrap();
    let mode = fs::metadata(dir.path().join("key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0, "{mode:o}");
}

#[tokio::test]
async fn a_whole_listing_takes_few_pages() {
    let dir = TempDir::new().unwrap();
    for number in 0..1200 {
        fs::write(dir.path().join(format!("{number:05}")), "x").unwrap();
    }
    let store = FaultyStore::new(store_in(dir.path()).await);
    assert_eq!(list_all(&store, "", None).await.unwrap().len(), 1200);
    assert_eq!(store.calls(Operation::List), 1);
}
