//! The files of a backup: what is refused, what is verified, and what an interruption leaves.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test that fails here should stop here"
)]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use highwater_config::Exit;
use highwater_format::{Backup, Manifest, Tablespace};
use highwater_restore::datadir::{DataDir, DataDirError, Request};
use highwater_restore::fetch::{self, FetchError, Fetched, Job, Limits, Progress, Sources};
use highwater_store::{ErrorKind, Fault, FaultyStore, Rule, Store};
use support::*;

/// The owner a test run by root restores for.
fn owner() -> Option<&'static str> {
    nix::unistd::Uid::effective().is_root().then_some("nobody")
}

async fn manifest_of(sources: &Sources, backup: &Backup) -> Manifest {
    fetch::manifest(sources, &layout(), backup).await.unwrap()
}

fn prepare(into: &Path, backup: &Backup, manifest: Manifest) -> Result<DataDir, DataDirError> {
    let request = Request {
        into,
        backup,
        tablespaces: &[],
        owner: owner(),
        wal_bytes: 0,
    };
    DataDir::prepare(&request, manifest)
}

async fn fill(
    sources: &Sources,
    backup: &Backup,
    into: &DataDir,
    manifest: Manifest,
) -> Result<Fetched, FetchError> {
    let job = Job {
        sources,
        layout: &layout(),
        backup,
        packs: manifest.packs,
        into,
        limits: Limits {
            packs: 3,
            bytes: 1 << 16,
        },
        progress: Arc::new(Progress::default()),
    };
    fetch::fetch(job).await
}

async fn restore(regions: Vec<Arc<dyn Store>>, backup: &Backup, into: &Path) -> Result<Fetched, String> {
    let sources = Sources::new(regions);
    let manifest = manifest_of(&sources, backup).await;
    let datadir = prepare(into, backup, manifest.clone()).map_err(|error| error.to_string())?;
    let _lock = datadir.begin().map_err(|error| error.to_string())?;
    let fetched = fill(&sources, backup, &datadir, manifest)
        .await
        .map_err(|error| error.to_string())?;
    datadir.finish().map_err(|error| error.to_string())?;
    Ok(fetched)
}

fn assert_complete(into: &Path) {
    for file in small_cluster() {
        let found = fs::read(into.join(&file.path)).unwrap_or_else(|error| panic!("{}: {error}", file.path));
        assert!(found == file.content, "{} differs", file.path);
        let meta = fs::metadata(into.join(&file.path)).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o600, "{}", file.path);
    }
    assert_eq!(fs::metadata(into).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(
        !into.join("highwater.restore").exists(),
        "the mark of an unfinished restore is left"
    );
}

#[tokio::test]
async fn files_come_back_byte_for_byte_with_mode_and_owner() {
    let a = memory("a");
    let backup = put_backup(&[&a], &small_cluster(), 100_000).await;
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("new/data");
    let fetched = restore(vec![shared(&a)], &backup, &into).await.unwrap();
    assert_complete(&into);
    assert_eq!((fetched.fell_back, fetched.packs > 5), (0, true));
    if owner().is_some() {
        assert_ne!(fs::metadata(into.join("base/1/1000")).unwrap().uid(), 0);
        assert_ne!(fs::metadata(into.join("base")).unwrap().uid(), 0);
    }
}

#[tokio::test]
async fn fault_41_packs_lost_or_damaged_in_one_region_come_from_the_other() {
    let (a, b) = (memory("a"), memory("b"));
    let backup = put_backup(&[&a, &b], &small_cluster(), 100_000).await;
    a.delete(&layout().pack(&backup.id, 1)).await.unwrap();
    a.corrupt(&layout().pack(&backup.id, 3), |bytes| bytes[300] ^= 4);
    b.corrupt(&layout().pack(&backup.id, 4), |bytes| bytes.truncate(200));
    let dir = tempfile::tempdir().unwrap();
    let fetched = restore(vec![shared(&a), shared(&b)], &backup, &dir.path().join("data"))
        .await
        .unwrap();
    assert_complete(&dir.path().join("data"));
    assert_eq!(fetched.fell_back, 2);
}

#[tokio::test]
async fn a_pack_that_no_region_has_is_named_and_the_result_cannot_start() {
    let (a, b) = (memory("a"), memory("b"));
    let backup = put_backup(&[&a, &b], &small_cluster(), 100_000).await;
    let lost = layout().pack(&backup.id, 2);
    a.delete(&lost).await.unwrap();
    b.corrupt(&lost, |bytes| bytes[300] ^= 4);
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("data");
    let error = restore(vec![shared(&a), shared(&b)], &backup, &into)
        .await
        .unwrap_err();
    assert!(
        error.contains(&lost) && error.contains("a: ") && error.contains("b: "),
        "{error}"
    );
    assert!(!into.join("global/pg_control").exists());
}

#[tokio::test]
async fn fault_61_interrupted_at_any_pack_it_cannot_start_and_starts_over() {
    let a = memory("a");
    let backup = put_backup(&[&a], &small_cluster(), 100_000).await;
    let packs = u64::from(backup.packs);
    for failing in 0..packs {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("data");
        let faulty = Arc::new(FaultyStore::new(shared(&a)));
        let key = layout().pack(&backup.id, u32::try_from(failing).unwrap());
        faulty.inject(Rule::once(Fault::FailBefore(ErrorKind::Operator)).key(key));
        restore(vec![faulty], &backup, &into).await.unwrap_err();
        assert!(
            !into.join("global/pg_control").exists(),
            "startable after pack {failing} failed"
        );
        fs::write(into.join("base/1/leftover"), "of the first try").unwrap();
        restore(vec![shared(&a)], &backup, &into).await.unwrap();
        assert_complete(&into);
        assert!(!into.join("base/1/leftover").exists());
    }
}

#[tokio::test]
async fn a_finished_restore_is_not_overwritten_and_neither_is_a_started_one() {
    let a = memory("a");
    let backup = put_backup(&[&a], &small_cluster(), 100_000).await;
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("data");
    restore(vec![shared(&a)], &backup, &into).await.unwrap();
    let error = restore(vec![shared(&a)], &backup, &into).await.unwrap_err();
    assert!(error.contains("not empty"), "{error}");
    // Killed between the last two steps, then started by hand: the mark is there, and so is somebody's work.
    let mark = serde_json::json!({"note": "", "backup": backup.id.to_string(), "system_id": SYSTEM.to_string(),
        "tablespaces": [], "control_crc32": "00000000"});
    fs::write(into.join("highwater.restore"), mark.to_string()).unwrap();
    let error = restore(vec![shared(&a)], &backup, &into).await.unwrap_err();
    assert!(error.contains("started since"), "{error}");
    assert_eq!(fs::read(into.join("base/1/1001")).unwrap(), vec![7; 10]);
}

#[tokio::test]
async fn fault_60_tablespaces_go_where_they_are_sent_and_nowhere_else() {
    let a = memory("a");
    let mut files = small_cluster();
    files.push(file("pg_tblspc/16384/PG_15_202209061/5/77", "in the tablespace"));
    files.push(file("tablespace_map", "16384 /was/there\n"));
    let mut backup = put_backup(&[&a], &files, 100_000).await;
    backup.tablespaces = vec![Tablespace {
        oid: 16384,
        location: "/was/there".to_owned(),
    }];
    let sources = Sources::new(vec![shared(&a)]);
    let manifest = manifest_of(&sources, &backup).await;
    let dir = tempfile::tempdir().unwrap();
    let (into, space) = (dir.path().join("data"), dir.path().join("space"));
    let remaps = [format!("/was/there={}", space.display()).parse().unwrap()];
    let request = Request {
        into: &into,
        backup: &backup,
        tablespaces: &remaps,
        owner: owner(),
        wal_bytes: 0,
    };
    fs::create_dir(&space).unwrap();
    fs::write(space.join("occupied"), "").unwrap();
    let error = DataDir::prepare(&request, manifest.clone()).unwrap_err();
    assert!(matches!(error, DataDirError::NotEmpty { .. }), "{error}");
    assert!(!into.exists(), "something was written before the refusal");
    fs::remove_file(space.join("occupied")).unwrap();
    let datadir = DataDir::prepare(&request, manifest.clone()).unwrap();
    let _lock = datadir.begin().unwrap();
    fill(&sources, &backup, &datadir, manifest).await.unwrap();
    datadir.finish().unwrap();
    assert_eq!(
        fs::read(space.join("PG_15_202209061/5/77")).unwrap(),
        b"in the tablespace"
    );
    assert_eq!(fs::read_link(into.join("pg_tblspc/16384")).unwrap(), space);
    let map = fs::read_to_string(into.join("tablespace_map")).unwrap();
    assert_eq!(map, format!("16384 {}\n", space.display()));
    assert!(!space.join("highwater.restore").exists());
}

/// A backup with a tablespace, and where it goes.
async fn with_tablespace(a: &Memory) -> (Backup, Sources, Manifest) {
    let mut files = small_cluster();
    files.push(file("pg_tblspc/16384/PG_15_202209061/5/77", "in the tablespace"));
    let mut backup = put_backup(&[a], &files, 100_000).await;
    backup.tablespaces = vec![Tablespace {
        oid: 16384,
        location: "/was/there".to_owned(),
    }];
    let sources = Sources::new(vec![shared(a)]);
    let manifest = manifest_of(&sources, &backup).await;
    (backup, sources, manifest)
}

fn prepare_with(
    into: &Path,
    space: &Path,
    backup: &Backup,
    manifest: &Manifest,
) -> Result<DataDir, DataDirError> {
    let request = Request {
        into,
        backup,
        tablespaces: &[format!("/was/there={}", space.display()).parse().unwrap()],
        owner: owner(),
        wal_bytes: 0,
    };
    DataDir::prepare(&request, manifest.clone())
}

/// A directory, and a link that leads to it.
fn linked(dir: &Path) -> (PathBuf, PathBuf) {
    let (real, link) = (dir.join("real"), dir.join("link"));
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    (real, link)
}

#[tokio::test]
async fn what_an_interrupted_restore_left_in_a_tablespace_is_cleared() {
    let a = memory("a");
    let (backup, sources, manifest) = with_tablespace(&a).await;
    let dir = tempfile::tempdir().unwrap();
    let space = dir.path().join("space");
    let first = prepare_with(&dir.path().join("first"), &space, &backup, &manifest).unwrap();
    drop(first.begin().unwrap());
    let left = space.join("PG_15_202209061/5/77");
    fs::write(&left, vec![9; 100_000]).unwrap();
    fs::write(space.join("PG_15_202209061/5/78"), "of another backup").unwrap();
    // The operator removes the data directory alone and restores somewhere else.
    fs::remove_dir_all(dir.path().join("first")).unwrap();
    let second = prepare_with(&dir.path().join("second"), &space, &backup, &manifest).unwrap();
    let _locks = second.begin().unwrap();
    fill(&sources, &backup, &second, manifest).await.unwrap();
    second.finish().unwrap();
    assert_eq!(fs::read(&left).unwrap(), b"in the tablespace");
    assert!(!space.join("PG_15_202209061/5/78").exists());
}

#[tokio::test]
async fn a_restore_over_a_link_starts_over_in_its_own_tablespace() {
    let a = memory("a");
    let (backup, _, manifest) = with_tablespace(&a).await;
    let dir = tempfile::tempdir().unwrap();
    let (real, link) = linked(dir.path());
    let space = dir.path().join("space");
    for into in [link.join("data"), link.join("data"), real.join("data")] {
        let datadir = prepare_with(&into, &space, &backup, &manifest).unwrap();
        drop(datadir.begin().unwrap());
    }
    let mark = fs::read_to_string(space.join("highwater.restore")).unwrap();
    assert!(mark.contains(real.join("data").to_str().unwrap()), "{mark}");
    // A mark that names the link, as a link made later would have it.
    let other = mark.replace(real.to_str().unwrap(), link.to_str().unwrap());
    fs::write(space.join("highwater.restore"), other).unwrap();
    let datadir = prepare_with(&real.join("data"), &space, &backup, &manifest).unwrap();
    drop(datadir.begin().unwrap());
}

/// A location that is a link is followed before anything is compared or written.
#[tokio::test]
async fn fault_60_a_tablespace_behind_a_link_goes_where_the_link_leads() {
    let a = memory("a");
    let (backup, sources, manifest) = with_tablespace(&a).await;
    let dir = tempfile::tempdir().unwrap();
    let (into, real, link) = (
        dir.path().join("data"),
        dir.path().join("real"),
        dir.path().join("link"),
    );
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let error = prepare_with(&into, &link, &backup, &manifest).unwrap_err();
    assert!(matches!(error, DataDirError::Unusable { .. }), "{error}");
    fs::create_dir(&real).unwrap();
    fs::write(real.join("occupied"), "").unwrap();
    let error = prepare_with(&into, &link, &backup, &manifest).unwrap_err();
    assert!(matches!(error, DataDirError::NotEmpty { .. }), "{error}");
    fs::remove_file(real.join("occupied")).unwrap();
    let datadir = prepare_with(&into, &link, &backup, &manifest).unwrap();
    let _locks = datadir.begin().unwrap();
    fill(&sources, &backup, &datadir, manifest).await.unwrap();
    datadir.finish().unwrap();
    assert_eq!(
        fs::read(real.join("PG_15_202209061/5/77")).unwrap(),
        b"in the tablespace"
    );
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(!real.join("highwater.restore").exists());
    // The server knows it by the name that was given, as the original did.
    assert_eq!(fs::read_link(into.join("pg_tblspc/16384")).unwrap(), link);
    let map = fs::read_to_string(into.join("tablespace_map")).unwrap();
    assert_eq!(map, format!("16384 {}\n", link.display()));
}

#[tokio::test]
async fn a_tablespace_is_not_put_into_the_data_directory_by_way_of_a_link() {
    let a = memory("a");
    let (backup, _, manifest) = with_tablespace(&a).await;
    let dir = tempfile::tempdir().unwrap();
    let (real, link) = linked(dir.path());
    for (into, space) in [
        (real.join("data"), link.join("data/space")),
        (link.join("data"), link.join("data/space")),
        (real.join("data/in"), link.join("data")),
    ] {
        let error = prepare_with(&into, &space, &backup, &manifest).unwrap_err();
        assert!(error.to_string().contains("overlaps"), "{error}");
    }
    assert_eq!(fs::read_dir(&real).unwrap().count(), 0);
}

/// Killed after the tablespaces' marks were removed and before the data directory's.
#[tokio::test]
async fn fault_61_a_restore_that_lost_some_of_its_marks_starts_over() {
    let a = memory("a");
    let (backup, sources, manifest) = with_tablespace(&a).await;
    let dir = tempfile::tempdir().unwrap();
    let (into, space) = (dir.path().join("data"), dir.path().join("space"));
    let prepared = || prepare_with(&into, &space, &backup, &manifest);
    let mark = into.join("highwater.restore");
    let finished = async || {
        let datadir = prepared().unwrap();
        let _locks = datadir.begin().unwrap();
        let begun = fs::read_to_string(&mark).unwrap();
        fill(&sources, &backup, &datadir, manifest.clone()).await.unwrap();
        datadir.finish().unwrap();
        let control = fs::read(into.join("global/pg_control")).unwrap();
        let crc = format!("\"{:08x}\"", crc32fast::hash(&control));
        let last = begun.replace("\"control_crc32\": null", &format!("\"control_crc32\": {crc}"));
        assert_ne!(begun, last);
        fs::write(&mark, &last).unwrap();
        (begun, last)
    };
    finished().await;
    fs::write(space.join("PG_15_202209061/5/78"), "of the first").unwrap();
    let (begun, last) = finished().await;
    let left = space.join("PG_15_202209061/5/77");
    assert!(left.exists() && !space.join("PG_15_202209061/5/78").exists());
    // Not by a mark that does not prove it, and not with what no restore writes there.
    let refused = || {
        matches!(
            prepared().unwrap_err(),
            DataDirError::NotEmpty { .. } | DataDirError::Started { .. }
        )
    };
    fs::write(&mark, begun).unwrap();
    assert!(refused());
    fs::write(&mark, last.replace(space.to_str().unwrap(), "/srv/elsewhere")).unwrap();
    assert!(refused());
    fs::write(&mark, &last).unwrap();
    fs::write(space.join("notes.txt"), "somebody's").unwrap();
    assert!(refused());
    fs::remove_file(space.join("notes.txt")).unwrap();
    // Killed again while it is cleared: the control file is the first to go, and the tablespace is known by its own mark.
    drop(prepared().unwrap().begin().unwrap());
    assert!(!left.exists());
    finished().await;
    assert!(left.exists());
}

#[tokio::test]
async fn a_file_that_is_longer_than_its_content_is_cut() {
    let a = memory("a");
    let backup = put_backup(&[&a], &small_cluster(), 100_000).await;
    let sources = Sources::new(vec![shared(&a)]);
    let manifest = manifest_of(&sources, &backup).await;
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("data");
    let datadir = prepare(&into, &backup, manifest.clone()).unwrap();
    let _locks = datadir.begin().unwrap();
    fs::write(into.join("base/1/1000"), vec![9; 1_000_000]).unwrap();
    fill(&sources, &backup, &datadir, manifest).await.unwrap();
    datadir.finish().unwrap();
    assert_complete(&into);
}

#[tokio::test]
async fn a_tablespace_of_another_restore_is_left_alone() {
    let a = memory("a");
    let (backup, sources, manifest) = with_tablespace(&a).await;
    let dir = tempfile::tempdir().unwrap();
    let (home, space) = (dir.path().join("first"), dir.path().join("space"));
    let first = prepare_with(&home, &space, &backup, &manifest).unwrap();
    let refused = || prepare_with(&dir.path().join("second"), &space, &backup, &manifest).unwrap_err();
    {
        let _running = first.begin().unwrap();
        assert!(
            matches!(refused(), DataDirError::OfAnother { .. }),
            "{}",
            refused()
        );
    }
    // Killed between the control file and the removal of the marks: it can be started.
    let locks = first.begin().unwrap();
    let mark = fs::read(space.join("highwater.restore")).unwrap();
    fill(&sources, &backup, &first, manifest.clone()).await.unwrap();
    first.finish().unwrap();
    drop(locks);
    fs::write(space.join("highwater.restore"), mark).unwrap();
    assert!(
        matches!(refused(), DataDirError::OfAnother { .. }),
        "{}",
        refused()
    );
    assert!(!dir.path().join("second").exists() && space.join("PG_15_202209061/5/77").exists());
}

#[tokio::test]
async fn parents_that_are_made_can_be_passed_whatever_the_umask() {
    if owner().is_none() {
        return;
    }
    let a = memory("a");
    let backup = put_backup(&[&a], &small_cluster(), 100_000).await;
    let dir = tempfile::tempdir().unwrap();
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    restore(vec![shared(&a)], &backup, &dir.path().join("new/er/data"))
        .await
        .unwrap();
    nix::sys::stat::umask(before);
    for made in ["new", "new/er"] {
        let mode = fs::metadata(dir.path().join(made)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755, "{made}");
    }
}

#[tokio::test]
async fn fault_94_a_hostile_manifest_writes_nothing() {
    let a = memory("a");
    for bad in [
        "../escaped",
        "/tmp/highwater-escaped",
        "pg_tblspc/1/x",
        "base/../../escaped",
    ] {
        let mut files = small_cluster();
        files.push(file("harmless", "x"));
        let backup = put_backup(&[&a], &files, 100_000).await;
        let sources = Sources::new(vec![shared(&a)]);
        let mut manifest = manifest_of(&sources, &backup).await;
        manifest.entries.last_mut().unwrap().path = bad.to_owned();
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("data");
        let error = prepare(&into, &backup, manifest).unwrap_err();
        assert!(
            matches!(error, DataDirError::Hostile { .. }) && error.exit() == Exit::Damage,
            "{bad}: {error}"
        );
        assert!(!into.exists());
    }
}

#[tokio::test]
async fn fault_64_a_backup_without_its_label_is_refused() {
    let a = memory("a");
    let files: Vec<_> = small_cluster()
        .into_iter()
        .filter(|file| file.path != "backup_label")
        .collect();
    let backup = put_backup(&[&a], &files, 100_000).await;
    let sources = Sources::new(vec![shared(&a)]);
    let manifest = manifest_of(&sources, &backup).await;
    let error = prepare(&PathBuf::from("/nonexistent/data"), &backup, manifest).unwrap_err();
    assert!(error.to_string().contains("backup_label"), "{error}");
}

#[tokio::test]
async fn a_manifest_that_is_not_the_one_the_backup_was_finished_with_is_refused() {
    let a = memory("a");
    let mut backup = put_backup(&[&a], &small_cluster(), 100_000).await;
    backup.manifest_crc32 = "00000000".to_owned();
    let error = fetch::manifest(&Sources::new(vec![shared(&a)]), &layout(), &backup)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("manifest") && error.exit() == Exit::Damage,
        "{error}"
    );
}
