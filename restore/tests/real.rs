//! A real PostgreSQL 15: an archive made by hand from it, restored by the program, started, counted.
//!
//! Skipped with a note where PostgreSQL 15 is not installed as a distribution installs it; where `CI` is set, that is a
//! failure.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test that fails here should stop here"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use highwater_format::{
    Backup, BackupId, Codec, Entry, EntryKind, Extent, FrameEncoder, Header, Identity, Kind, Layout, Lsn,
    LsnRange, Manifest, PackInfo, SegmentName, SegmentSize, SystemId, Time, TimelineId, crc32_hex, encode,
    seal,
};
use highwater_store::{Object, PutMode, RegionConfig, Store};
use nix::unistd::{Uid, User};

const BIN: &str = "/usr/lib/postgresql/15/bin";
const SEGMENT: u64 = 1 << 20;

/// The account that PostgreSQL runs under: our own, or `nobody` for root.
fn account() -> Option<User> {
    Uid::effective()
        .is_root()
        .then(|| User::from_name("nobody").unwrap().unwrap())
}

fn pg(program: &str) -> Command {
    let mut command = Command::new(Path::new(BIN).join(program));
    if let Some(user) = account() {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command.env("LC_ALL", "C").current_dir("/");
    command
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    output
}

/// A directory that the account can use; everything in it dies with it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("hwr").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        if let Some(user) = account() {
            std::os::unix::fs::chown(dir.path(), Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// A server; stopped at the end of the test, whatever happens.
struct Server {
    data: PathBuf,
    sockets: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = pg("pg_ctl")
            .arg("-D")
            .arg(&self.data)
            .args(["-m", "immediate", "-w", "stop"])
            .output();
    }
}

/// What an earlier recovery and an administrator left in the configuration; none of it may act on a restored copy.
fn old_settings(place: &Place, data: &Path) -> String {
    let touch = |name| format!("touch {}", place.path(name).display());
    format!(
        "recovery_target_time = '2001-01-01 00:00:00+00'\nrecovery_target_inclusive = off\n\
         recovery_target_action = shutdown\nrecovery_min_apply_delay = '1h'\n\
         archive_cleanup_command = '{}'\nrecovery_end_command = '{}'\nrestore_command = 'false'\n\
         data_directory = '{}'\nhba_file = '{}'\nexternal_pid_file = '{}'\n",
        touch("cleaned-up"),
        touch("ended"),
        data.display(),
        place.path("gone_hba.conf").display(),
        place.path("primary.pid").display(),
    )
}

impl Server {
    fn create(place: &Place) -> Self {
        let data = place.path("primary");
        run(pg("initdb").arg("-D").arg(&data).args([
            "-A",
            "trust",
            "-U",
            "postgres",
            "-N",
            "--wal-segsize=1",
        ]));
        let this = Self {
            data,
            sockets: place.dir.path().to_owned(),
        };
        let settings = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nfsync = off\nwal_keep_size = '1GB'\n",
            this.sockets.display()
        );
        let conf = this.data.join("postgresql.conf");
        let old = old_settings(place, &this.data);
        fs::write(&conf, fs::read_to_string(&conf).unwrap() + &settings + &old).unwrap();
        fs::copy(this.data.join("pg_hba.conf"), place.path("gone_hba.conf")).unwrap();
        if let Some(user) = account() {
            std::os::unix::fs::chown(place.path("gone_hba.conf"), Some(user.uid.as_raw()), None).unwrap();
        }
        this.start(place, "start", 150);
        this
    }

    /// The limit is on the command line, so that no backup knows it from the configuration.
    fn start(&self, place: &Place, how: &str, max_connections: u32) {
        let limit = format!("-c max_connections={max_connections}");
        let log = place.path("primary.log");
        let args = ["-o", &limit, "-w", how];
        run(pg("pg_ctl")
            .arg("-D")
            .arg(&self.data)
            .arg("-l")
            .arg(log)
            .args(args));
    }

    fn sql(&self, sql: &str) -> String {
        let output = run(pg("psql")
            .arg("-h")
            .arg(&self.sockets)
            .args(["-U", "postgres", "-XAtqc", sql]));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn lsn(&self) -> Lsn {
        self.sql("select pg_current_wal_flush_lsn()").parse().unwrap()
    }
}

/// An archive in two directories, filled from a server's files.
struct Archive {
    layout: Layout,
    regions: Vec<Arc<dyn Store>>,
    config: PathBuf,
    backup: Backup,
}

impl Archive {
    async fn open(place: &Place, server: &Server) -> Self {
        let mut regions = Vec::new();
        let mut text = "[cluster]\nname = \"orders\"\n".to_owned();
        for name in ["a", "b"] {
            let directory = place.path(&format!("region-{name}"));
            fs::create_dir(&directory).unwrap();
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
            let url = format!("file://{}", directory.display());
            text += &format!("[[region]]\nname = \"{name}\"\nurl = \"{url}\"\n");
            regions.push(
                highwater_store::open(&RegionConfig::new(name, url))
                    .await
                    .unwrap(),
            );
        }
        let config = place.path("highwater.toml");
        fs::write(&config, text).unwrap();
        let system_id = SystemId(
            server
                .sql("select system_identifier from pg_control_system()")
                .parse()
                .unwrap(),
        );
        let layout = Layout::new("orders".parse().unwrap(), system_id);
        let identity = Identity {
            system_id,
            server_version: 150_000,
            segment_size: SegmentSize::new(SEGMENT).unwrap(),
            wal_block_size: 8192,
            block_size: 8192,
        };
        let backup_id = BackupId::new(TimelineId::FIRST, Lsn(1), Time::from_unix_micros(0));
        let this = Self {
            layout,
            regions,
            config,
            backup: no_backup(backup_id, system_id),
        };
        this.put(&this.layout.identity(), encode(&identity).unwrap())
            .await;
        this
    }

    async fn put(&self, key: &str, bytes: Vec<u8>) {
        for region in &self.regions {
            region
                .put(key, Object::new(bytes.clone()), PutMode::Create)
                .await
                .unwrap();
        }
    }

    async fn base_backup(&mut self, place: &Place, server: &Server) {
        let copy = place.path("copy");
        let args = ["-U", "postgres", "-X", "none", "-c", "fast", "--no-sync", "-D"];
        run(pg("pg_basebackup")
            .arg("-h")
            .arg(&server.sockets)
            .args(args)
            .arg(&copy));
        let stop = server.lsn();
        let label = fs::read_to_string(copy.join("backup_label")).unwrap();
        let start: Lsn = label.split_whitespace().nth(3).unwrap().parse().unwrap();
        let now = Time::from_unix_micros(1_790_000_000_000_000);
        let id = BackupId::new(TimelineId::FIRST, start, now);
        let mut manifest = Manifest {
            backup: id.clone(),
            packs: Vec::new(),
            entries: Vec::new(),
        };
        let mut plain = Vec::new();
        walk(&copy, &copy, &mut manifest.entries, &mut plain);
        let system = self.layout.system_id();
        for (number, content) in (0u32..).zip(plain.chunks(PACK)) {
            let sealed = sealed(
                Header::pack(Codec::Zstd, system, TimelineId::FIRST, number),
                content,
            );
            let (plain_len, stored_len) = (content.len() as u64, sealed.bytes.len() as u64);
            manifest.packs.push(PackInfo {
                number,
                plain_len,
                stored_len,
                crc32: crc32_hex(sealed.crc32),
            });
            self.put(&self.layout.pack(&id, number), sealed.bytes.to_vec())
                .await;
        }
        let bytes = encode(&manifest).unwrap();
        self.backup = Backup {
            start_lsn: start,
            stop_lsn: stop,
            started_at: now,
            finished_at: now,
            label,
            packs: u32::try_from(manifest.packs.len()).unwrap(),
            plain_bytes: plain.len() as u64,
            manifest_crc32: crc32_hex(crc32fast::hash(&bytes)),
            pg_manifest: true,
            ..no_backup(id.clone(), system)
        };
        self.put(&self.layout.manifest(&id), bytes).await;
        self.put(&self.layout.backup(&id), encode(&self.backup).unwrap())
            .await;
    }

    /// Stores the WAL from the backup's start to `end`: whole segments, and the newest one in two tail chunks.
    async fn wal(&self, server: &Server, end: Lsn) {
        let size = SegmentSize::new(SEGMENT).unwrap();
        let mut at = size.segment_start(self.backup.start_lsn);
        while at < end {
            let name = SegmentName::of(TimelineId::FIRST, at, size);
            let bytes = fs::read(server.data.join("pg_wal").join(name.to_string(size))).unwrap();
            let whole = name.range(size);
            if whole.end <= end {
                let key = self.layout.segment(name, size);
                self.wal_object(Kind::Segment, whole, &bytes, key).await;
            } else {
                let middle = Lsn(u64::midpoint(at.0, end.0));
                for range in [LsnRange::new(at, middle), LsnRange::new(middle, end)] {
                    let from = range.start.distance_from(at) as usize;
                    let part = &bytes[from..from + range.len() as usize];
                    self.wal_object(
                        Kind::Tail,
                        range,
                        part,
                        self.layout.tail(TimelineId::FIRST, range),
                    )
                    .await;
                }
            }
            at = whole.end;
        }
    }

    async fn wal_object(&self, kind: Kind, range: LsnRange, plain: &[u8], key: String) {
        let header = Header::wal(
            kind,
            Codec::Lz4,
            self.layout.system_id(),
            TimelineId::FIRST,
            range,
        );
        self.put(&key, sealed(header, plain).bytes.to_vec()).await;
    }

    /// As an agent that runs under the server's account would have left it.
    fn give_away(&self, place: &Place) {
        if let Some(user) = account() {
            let owner = format!("{}:{}", user.uid, user.gid);
            run(Command::new("chown")
                .args(["-R", &owner])
                .arg(place.path("region-a"))
                .arg(place.path("region-b")));
        }
    }

    fn restore(&self, place: &Place, into: &str, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_highwater-restore"));
        command
            .arg("--config")
            .arg(&self.config)
            .args(["--output", "json", "run", "--into"])
            .arg(place.path(into));
        command
            .args(more)
            .args(["--start", "--bin", BIN, "--socket-directory"])
            .arg(place.dir.path());
        command.args(["--port", port(into)]);
        command.env("HIGHWATER_LOG", "info").output().unwrap()
    }
}

const PACK: usize = 4 << 20;

fn no_backup(id: BackupId, system_id: SystemId) -> Backup {
    Backup {
        id,
        system_id,
        server_version: 150_000,
        timeline: TimelineId::FIRST,
        start_lsn: Lsn(1),
        stop_lsn: Lsn(1),
        stop_timeline: TimelineId::FIRST,
        started_at: Time::from_unix_micros(0),
        finished_at: Time::from_unix_micros(0),
        label: String::new(),
        tablespaces: Vec::new(),
        from_standby: false,
        files: 0,
        plain_bytes: 0,
        stored_bytes: 0,
        packs: 0,
        manifest_crc32: "00000000".to_owned(),
        pg_manifest: false,
        codec: Codec::Zstd,
    }
}

fn sealed(header: Header, plain: &[u8]) -> highwater_format::Sealed {
    let mut encoder = FrameEncoder::new(header.codec);
    let frames: Vec<_> = plain
        .chunks(1 << 20)
        .map(|chunk| encoder.encode(chunk).unwrap())
        .collect();
    seal(header, &frames).unwrap()
}

fn walk(root: &Path, at: &Path, entries: &mut Vec<Entry>, plain: &mut Vec<u8>) {
    let mut paths: Vec<_> = fs::read_dir(at)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    for path in paths {
        let meta = fs::metadata(&path).unwrap();
        let content = if meta.is_dir() {
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        entries.push(Entry {
            path: path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(),
            kind: if meta.is_dir() {
                EntryKind::Directory
            } else {
                EntryKind::File
            },
            mode: meta.permissions().mode() & 0o777,
            mtime: 0,
            size: content.len() as u64,
            link: None,
            extents: extents(plain.len(), content.len()),
        });
        plain.extend_from_slice(&content);
        if meta.is_dir() {
            walk(root, &path, entries, plain);
        }
    }
}

fn extents(mut offset: usize, len: usize) -> Vec<Extent> {
    let (end, mut extents) = (offset + len, Vec::new());
    while offset < end {
        let pack = offset / PACK;
        let len = ((pack + 1) * PACK).min(end) - offset;
        let number = u32::try_from(pack).unwrap();
        extents.push(Extent {
            pack: number,
            offset: (offset % PACK) as u64,
            len: len as u64,
        });
        offset += len;
    }
    extents
}

fn restored(place: &Place, into: &str) -> Server {
    Server {
        data: place.path(into),
        sockets: place.dir.path().to_owned(),
    }
}

fn port(into: &str) -> &'static str {
    match into {
        "first" => "54991",
        "second" => "54992",
        "third" => "54993",
        _ => "54994",
    }
}

fn count(place: &Place, port: &str) -> String {
    let args = [
        "-p",
        port,
        "-U",
        "postgres",
        "-XAtqc",
        "select count(*) from ledger",
    ];
    let output = run(pg("psql").arg("-h").arg(place.dir.path()).args(args));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn a_lost_cluster_comes_back_at_the_end_and_at_an_lsn() {
    if !Path::new(BIN).exists() {
        let ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
        assert!(!ci, "{BIN} is not there: scripts/setup.sh has to see to it");
        eprintln!("SKIPPED: {BIN} is not there: run scripts/setup.sh");
        return;
    }
    let place = Place::new();
    let server = Server::create(&place);
    server.sql("create table ledger (id int, filler text)");
    let mut archive = Archive::open(&place, &server).await;
    archive.base_backup(&place, &server).await;
    server.sql("insert into ledger select n, repeat('x', 500) from generate_series(1, 20000) n");
    let before_mistake = server.lsn();
    server.start(&place, "restart", 160);
    server.sql("insert into ledger select n, repeat('y', 100) from generate_series(1, 4999) n");
    let late = server.lsn().to_string();
    server.sql("insert into ledger values (5000, 'y')");
    let end = server.lsn();
    archive.wal(&server, end).await;
    drop(server);
    fs::remove_file(place.path("gone_hba.conf")).unwrap();

    if account().is_some() {
        let output = archive.restore(&place, "first", &["--owner", "nobody"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.code() == Some(2) && text.contains("cannot read"),
            "{text}"
        );
        assert!(!place.path("first").exists());
    }
    archive.give_away(&place);
    let output = archive.restore(&place, "first", &["--owner", "nobody"]);
    let _first = restored(&place, "first");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}", output.status);
    assert!(text.contains("\"reached\""), "{text}");
    assert_eq!(count(&place, "54991"), "25000");
    let conf = fs::read_to_string(place.path("first/postgresql.auto.conf")).unwrap();
    assert!(
        !conf.contains("restore_command") && conf.contains("archive_mode = off"),
        "{conf}"
    );
    assert!(!place.path("first/recovery.signal").exists());
    assert!(!place.path("first/highwater-recovery.json").exists());

    let lsn = before_mistake.to_string();
    let output = archive.restore(
        &place,
        "second",
        &["--owner", "nobody", "--to-lsn", &lsn, "--exclusive"],
    );
    let _second = restored(&place, "second");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}", output.status);
    assert_eq!(count(&place, "54992"), "20000");
    assert!(!place.path("ended").exists() && !place.path("cleaned-up").exists());

    // The original ran with more connections than its configuration says.
    let pause = [
        "--owner",
        "nobody",
        "--exclusive",
        "--action",
        "pause",
        "--to-lsn",
    ];
    let output = archive.restore(&place, "third", &[&pause[..], &[&lsn]].concat());
    let _third = restored(&place, "third");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}", output.status);
    assert!(
        text.contains("highwater-recovery.json"),
        "no word on what is left: {text}"
    );
    assert_eq!(count(&place, "54993"), "20000");

    // And with still more later, which only the WAL tells.
    let output = archive.restore(&place, "fourth", &[&pause[..], &[&late]].concat());
    let _fourth = restored(&place, "fourth");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.code() == Some(3) && text.contains("max_connections = 160"),
        "{text}"
    );
}
