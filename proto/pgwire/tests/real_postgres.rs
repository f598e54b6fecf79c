//! The client against a real PostgreSQL 15, which each test starts for itself.
//!
//! The programs come from `HIGHWATER_PG15_BIN`, or from where Debian has them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "tests"
)]

mod pg;

use std::collections::BTreeSet;
use std::time::Duration;

use highwater_format::{Lsn, SegmentSize, Time, TimelineId};
use highwater_pgwire::{
    BackupMessage, BaseBackupOptions, Connection, ManifestOption, Mode, PgErrorKind, Started, Status,
    StatusWriter, StreamEnd, StreamMessage, WalReader,
};
use nix::sys::signal::Signal;
use pg::Server;

/// Nothing here takes longer, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

async fn start(
    connection: Connection,
    slot: Option<&str>,
    lsn: Lsn,
    timeline: u32,
) -> (WalReader, StatusWriter) {
    let timeline = TimelineId::new(timeline).unwrap();
    match connection.start_replication(slot, lsn, timeline).await.unwrap() {
        Started::Streaming(reader, writer) => (reader, writer),
        Started::AtEnd(_, next) => panic!("no stream, next is {next:?}"),
    }
}

fn status(lsn: Lsn) -> Status {
    Status {
        write: lsn,
        flush: lsn,
        apply: lsn,
        reply_requested: false,
        now: Time::UNIX_EPOCH,
    }
}

async fn next(reader: &mut WalReader) -> StreamMessage {
    tokio::time::timeout(PATIENCE, reader.next())
        .await
        .expect("a message in time")
        .unwrap()
}

async fn lsn(server: &Server, function: &str) -> Lsn {
    server
        .sql(&[&format!("SELECT {function}()")])
        .await
        .parse()
        .unwrap()
}

/// Reads WAL up to `end`, acknowledging it.
async fn read_until(reader: &mut WalReader, writer: &mut StatusWriter, end: Lsn) -> Vec<u8> {
    let mut bytes = Vec::new();
    while reader.position() < end {
        match next(reader).await {
            StreamMessage::Data { data, .. } => bytes.extend_from_slice(&data),
            StreamMessage::Keepalive { .. } => writer.send(status(reader.position())).await.unwrap(),
            StreamMessage::Ended(end) => panic!("ended: {end:?}"),
        }
    }
    writer.send(status(reader.position())).await.unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords() {
    let hba = "host all,replication open 127.0.0.1/32 trust\n\
               host all,replication clear 127.0.0.1/32 password\n\
               host all,replication hashed 127.0.0.1/32 md5\n\
               host all,replication scram 127.0.0.1/32 scram-sha-256\n\
               host all plain 127.0.0.1/32 trust\n";
    let server = Server::start("", hba).await;
    server
        .sql(&[
            "CREATE ROLE open LOGIN REPLICATION",
            "CREATE ROLE clear LOGIN REPLICATION PASSWORD 'pässwörd'",
            "CREATE ROLE scram LOGIN REPLICATION PASSWORD 's3cr3t'",
            "CREATE ROLE plain LOGIN",
            "SET password_encryption = 'md5'",
            "CREATE ROLE hashed LOGIN REPLICATION PASSWORD 's3cr3t'",
        ])
        .await;
    for (user, password) in [
        ("open", "x"),
        ("clear", "pässwörd"),
        ("hashed", "s3cr3t"),
        ("scram", "s3cr3t"),
    ] {
        for mode in [Mode::Replication, Mode::Sql] {
            let extra = format!("user={user} password='{password}'");
            let mut connection = server.tcp(&extra, mode).await.unwrap();
            assert_eq!(connection.server_version() / 10_000, 15);
            assert_eq!(connection.show("wal_segment_size").await.unwrap(), "16MB");
        }
        if user != "open" {
            let wrong = server
                .tcp(&format!("user={user} password=no"), Mode::Replication)
                .await
                .unwrap_err();
            assert!(wrong.is_wrong_password(), "{user}: {wrong}");
            assert_eq!(wrong.kind(), PgErrorKind::Operator);
            let none = server
                .tcp(&format!("user={user}"), Mode::Replication)
                .await
                .unwrap_err();
            assert!(none.to_string().contains(".pgpass"), "{user}: {none}");
        }
    }
    server
        .tcp("user=scram password=s3cr3t require_auth=scram-sha-256", Mode::Sql)
        .await
        .unwrap();
    server
        .tcp(
            "user=hashed password=s3cr3t require_auth=scram-sha-256",
            Mode::Sql,
        )
        .await
        .unwrap_err();

    let no_line = server.tcp("user=plain", Mode::Replication).await.unwrap_err();
    assert!(no_line.is_not_authorized(), "{no_line}");
    let no_right = server.connect("user=plain", Mode::Replication).await.unwrap_err();
    assert_eq!(no_right.kind(), PgErrorKind::Operator, "{no_right}");
    let no_role = server
        .connect("user=nobody", Mode::Replication)
        .await
        .unwrap_err();
    assert_eq!(no_role.kind(), PgErrorKind::Operator, "{no_role}");
    let no_database = server
        .connect("user=hw dbname=none", Mode::Sql)
        .await
        .unwrap_err();
    assert_eq!(no_database.kind(), PgErrorKind::Config, "{no_database}");
}

/// Makes an authority, a server certificate for `localhost` and a client certificate for `cert`.
fn make_certificates(dir: &std::path::Path) {
    let openssl = |line: &str| pg::run(pg::command("openssl", dir).args(line.split_whitespace()));
    let key = "-newkey rsa:2048 -nodes -days 2";
    for ca in ["ca", "other"] {
        openssl(&format!(
            "req -x509 {key} -subj /CN={ca} -keyout {ca}.key -out {ca}.crt"
        ));
    }
    let sign = |name: &str, subject: &str, extension: &str| {
        std::fs::write(dir.join("ext"), extension).unwrap();
        openssl(&format!(
            "req {key} -subj /CN={subject} -keyout {name}.key -out {name}.csr"
        ));
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -sha384 -extfile ext -out {name}.crt"
        ));
    };
    sign("server", "localhost", "subjectAltName=DNS:localhost\n");
    openssl(
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days -1 -extfile ext -out expired.crt",
    );
    sign("client", "cert", "extendedKeyUsage=clientAuth\n");
    openssl(&format!(
        "req -x509 {key} -subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout self.key -out self.crt"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn tls() {
    let certificates = pg::temp_dir();
    let dir = certificates.path();
    make_certificates(dir);
    let file = |name: &str| dir.join(name).display().to_string();
    let hba = "hostssl all,replication scram 127.0.0.1/32 scram-sha-256\n\
               hostssl all tlsonly 127.0.0.1/32 trust\n\
               hostssl all cert 127.0.0.1/32 cert\n\
               hostnossl all never 127.0.0.1/32 trust\n";
    let settings = format!(
        "ssl = on\nssl_cert_file = '{}'\nssl_key_file = '{}'\nssl_ca_file = '{}'",
        file("server.crt"),
        file("server.key"),
        file("ca.crt")
    );
    let server = Server::start(&settings, hba).await;
    server
        .sql(&[
            "CREATE ROLE scram LOGIN REPLICATION PASSWORD 's3cr3t'",
            "CREATE ROLE tlsonly LOGIN",
            "CREATE ROLE cert LOGIN",
            "CREATE ROLE never LOGIN",
        ])
        .await;
    let local = "host=localhost hostaddr=127.0.0.1 user=scram password=s3cr3t";
    let ca = format!("sslrootcert={}", file("ca.crt"));
    let encrypted = async |extra: &str| {
        let mut connection = server.tcp(extra, Mode::Sql).await?;
        let result = connection
            .simple_query("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            .await?;
        Ok::<bool, highwater_pgwire::PgError>(result.rows[0][0].as_deref() == Some(b"t"))
    };

    // Bound SCRAM in every mode that encrypts, and streaming over it.
    for mode in ["prefer", "require"] {
        assert!(
            encrypted(&format!("{local} sslmode={mode} channel_binding=require"))
                .await
                .unwrap(),
            "{mode}"
        );
    }
    for mode in ["require", "verify-ca", "verify-full"] {
        let extra = format!("{local} {ca} sslmode={mode} channel_binding=require");
        assert!(encrypted(&extra).await.unwrap(), "{mode}");
        let mut connection = server.tcp(&extra, Mode::Replication).await.unwrap();
        connection.identify_system().await.unwrap();
    }
    for version in ["TLSv1.2", "TLSv1.3"] {
        let versions = format!("ssl_min_protocol_version={version} ssl_max_protocol_version={version}");
        assert!(
            encrypted(&format!(
                "{local} sslmode=require channel_binding=require {versions}"
            ))
            .await
            .unwrap()
        );
    }
    assert!(
        encrypted(&format!("{local} sslmode=require channel_binding=disable"))
            .await
            .unwrap()
    );

    // Names and authorities.
    let wrong_host = format!("host=db.example hostaddr=127.0.0.1 user=scram password=s3cr3t {ca}");
    assert!(
        encrypted(&format!("{wrong_host} sslmode=verify-ca"))
            .await
            .unwrap()
    );
    let refused = encrypted(&format!("{wrong_host} sslmode=verify-full"))
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), PgErrorKind::Operator, "{refused}");
    assert!(refused.to_string().contains("db.example"), "{refused}");
    for mode in ["require", "verify-ca", "verify-full"] {
        let other = format!("{local} sslrootcert={} sslmode={mode}", file("other.crt"));
        let refused = encrypted(&other).await.unwrap_err();
        assert!(refused.to_string().contains("sslrootcert"), "{mode}: {refused}");
    }
    let missing = encrypted(&format!("{local} sslrootcert=/nonexistent sslmode=verify-ca"))
        .await
        .unwrap_err();
    assert_eq!(missing.kind(), PgErrorKind::Operator, "{missing}");

    // A client certificate instead of a password.
    let with_cert = format!(
        "user=cert sslmode=require sslcert={} sslkey={}",
        file("client.crt"),
        file("client.key")
    );
    assert!(encrypted(&with_cert).await.unwrap());
    encrypted("user=cert sslmode=require").await.unwrap_err();

    // Falling back, in both directions, only where sslmode allows it.
    assert!(encrypted("user=tlsonly sslmode=allow").await.unwrap());
    assert!(
        encrypted("user=tlsonly sslmode=disable")
            .await
            .unwrap_err()
            .is_not_authorized()
    );
    assert!(!encrypted("user=never sslmode=prefer").await.unwrap());
    assert!(
        encrypted("user=never sslmode=require")
            .await
            .unwrap_err()
            .is_not_authorized()
    );

    // A certificate whose time is over is no certificate, for every mode that checks one.
    let set = |name: &str, file: String| format!("ALTER SYSTEM SET {name} = '{file}'");
    server
        .sql(&[
            &set("ssl_cert_file", file("expired.crt")),
            "SELECT pg_reload_conf()",
        ])
        .await;
    for mode in ["verify-full", "verify-ca", "require"] {
        let checked = format!("{local} {ca} sslmode={mode}");
        // Only the first has to wait for the server to have reloaded.
        let refused = loop {
            match encrypted(&checked).await {
                Err(refused) => break refused,
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        assert_eq!(refused.kind(), PgErrorKind::Operator, "{mode}: {refused}");
        assert!(
            refused.to_string().to_lowercase().contains("expired"),
            "{mode}: {refused}"
        );
    }

    // A self-signed server certificate that is itself the trusted one.
    server
        .sql(&[
            &set("ssl_cert_file", file("self.crt")),
            &set("ssl_key_file", file("self.key")),
            "SELECT pg_reload_conf()",
        ])
        .await;
    let pinned = format!(
        "{local} sslrootcert={} sslmode=verify-full channel_binding=require",
        file("self.crt")
    );
    let mut tries = 0;
    while let Err(error) = encrypted(&pinned).await {
        tries += 1;
        assert!(tries < 100, "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        encrypted(&pinned.replace("host=localhost", "host=db.example"))
            .await
            .is_err()
    );

    // Streaming over TLS: a waiting reader and a writer at the same time.
    let connection = server
        .tcp(&format!("{local} sslmode=require"), Mode::Replication)
        .await
        .unwrap();
    let begin = SegmentSize::DEFAULT.segment_start(lsn(&server, "pg_current_wal_flush_lsn").await);
    let (mut reader, mut writer) = start(connection, None, begin, 1).await;
    server
        .sql(&["CREATE TABLE t AS SELECT generate_series(1, 100000) i"])
        .await;
    let end = lsn(&server, "pg_current_wal_flush_lsn").await;
    read_until(&mut reader, &mut writer, end).await;
    let waiting = tokio::spawn(async move {
        loop {
            if let StreamMessage::Keepalive { .. } = next(&mut reader).await {
                return;
            }
        }
    });
    tokio::task::yield_now().await;
    tokio::time::timeout(
        PATIENCE,
        writer.send(Status {
            reply_requested: true,
            ..status(end)
        }),
    )
    .await
    .unwrap()
    .unwrap();
    waiting.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tls_on_the_server() {
    let server = Server::start("", "host all all 127.0.0.1/32 trust\n").await;
    let refused = server
        .tcp("user=hw sslmode=require", Mode::Sql)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("ssl = off"), "{refused}");
    server.tcp("user=hw sslmode=prefer", Mode::Sql).await.unwrap();
    let closed = server
        .connect("user=hw host=/nonexistent", Mode::Sql)
        .await
        .unwrap_err();
    assert_eq!(closed.kind(), PgErrorKind::Retry, "{closed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn streaming_slots_and_a_fast_shutdown() {
    let mut server = Server::start("", "").await;
    let mut connection = server.replication().await;
    let system = connection.identify_system().await.unwrap();
    assert_eq!(system.timeline, TimelineId::FIRST);
    let id = server
        .sql(&["SELECT system_identifier FROM pg_control_system()"])
        .await;
    assert_eq!(system.system_id.to_string(), id);
    assert_eq!(
        connection.timeline_history(TimelineId::FIRST).await.unwrap(),
        None
    );

    assert_eq!(connection.read_replication_slot("hw").await.unwrap(), None);
    connection.create_physical_slot("hw", true, false).await.unwrap();
    assert!(
        connection
            .create_physical_slot("hw", true, false)
            .await
            .unwrap_err()
            .is_slot_exists()
    );
    // Not earlier: an error ends temporary slots.
    connection
        .create_physical_slot("idle", false, true)
        .await
        .unwrap();
    let unreserved = connection.read_replication_slot("idle").await.unwrap().unwrap();
    assert_eq!(unreserved.restart_lsn, None);
    let position = connection.read_replication_slot("hw").await.unwrap().unwrap();
    assert_eq!(position.restart_timeline, Some(TimelineId::FIRST));
    let refused = connection.simple_query("SELECT 1").await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("0A000"));

    // About 40 MB of WAL, compared with the server's files.
    let size = SegmentSize::DEFAULT;
    let begin = size.segment_start(position.restart_lsn.unwrap());
    let (mut reader, mut writer) = start(connection, Some("hw"), begin, 1).await;
    server
        .sql(&["CREATE TABLE t AS SELECT i, repeat('x', 100) FROM generate_series(1, 250000) i"])
        .await;
    let end = lsn(&server, "pg_current_wal_flush_lsn").await;
    assert!(end.distance_from(begin) > 2 * size.bytes());
    let streamed = read_until(&mut reader, &mut writer, end).await;
    compare_with_files(&server, begin, &streamed);

    let busy = server
        .replication()
        .await
        .start_replication(Some("hw"), begin, TimelineId::FIRST)
        .await
        .unwrap_err();
    assert!(busy.is_slot_busy() && busy.slot_busy_pid().is_some(), "{busy}");

    // The slot follows what was acknowledged.
    let wanted = reader.position();
    let mut side = server.replication().await;
    let mut moved = false;
    for _ in 0..600 {
        let now = side.read_replication_slot("hw").await.unwrap().unwrap();
        moved = now.restart_lsn >= Some(wanted);
        if moved {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(moved, "slot did not reach {wanted}");
    side.close().await;

    // A fast shutdown waits for the acknowledgement of everything, and then ends the stream.
    server.signal(Signal::SIGINT);
    let mut last = reader.position();
    // The shutdown checkpoint is streamed.
    while last <= wanted {
        match next(&mut reader).await {
            StreamMessage::Ended(end) => panic!("ended as {end:?} before it was acknowledged"),
            StreamMessage::Data { .. } => last = reader.position(),
            StreamMessage::Keepalive { .. } => {}
        }
    }
    loop {
        // Whoever has said everything may find the server gone: what it said at the end is still to be read.
        drop(writer.send(status(reader.position())).await);
        match next(&mut reader).await {
            StreamMessage::Ended(end) => {
                assert_eq!(end, StreamEnd::Shutdown);
                break;
            }
            StreamMessage::Data { .. } | StreamMessage::Keepalive { .. } => {}
        }
    }
    server.gone().await;
}

fn compare_with_files(server: &Server, begin: Lsn, streamed: &[u8]) {
    let size = SegmentSize::DEFAULT;
    let mut at = begin;
    for piece in streamed.chunks(usize::try_from(size.bytes()).unwrap()) {
        let name = highwater_format::SegmentName {
            timeline: TimelineId::FIRST,
            number: size.segment_number(at),
        };
        let file = std::fs::read(server.data().join("pg_wal").join(name.to_string(size))).unwrap();
        assert!(
            file[..piece.len()] == *piece,
            "WAL at {at} differs from the server's file"
        );
        at = at + piece.len() as u64;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals() {
    let server = Server::start("max_wal_senders = 2\nwal_keep_size = 0\n", "").await;
    let first = TimelineId::FIRST;
    let begin = SegmentSize::DEFAULT.segment_start(lsn(&server, "pg_current_wal_flush_lsn").await);

    let missing = server
        .replication()
        .await
        .start_replication(Some("none"), begin, first)
        .await
        .unwrap_err();
    assert!(missing.is_slot_missing(), "{missing}");

    // Errors that come after the server agreed to stream, or before: both are told the same way.
    let refused = async |at: Lsn, timeline: TimelineId| match server
        .replication()
        .await
        .start_replication(None, at, timeline)
        .await
    {
        Ok(Started::Streaming(mut reader, _writer)) => reader.next().await.unwrap_err(),
        Ok(Started::AtEnd(..)) => panic!("no stream"),
        Err(error) => error,
    };
    let ahead = refused(Lsn(0xff_0000_0000), first).await;
    assert!(ahead.ahead_of_server().is_some(), "{ahead}");
    let unknown = refused(begin, TimelineId::new(9).unwrap()).await;
    assert!(unknown.is_not_in_history(), "{unknown}");
    for _ in 0..3 {
        server
            .sql(&[
                "CREATE TABLE IF NOT EXISTS t (i int)",
                "INSERT INTO t VALUES (1)",
                "SELECT pg_switch_wal()",
            ])
            .await;
    }
    server.sql(&["CHECKPOINT"]).await;
    server.sql(&["CHECKPOINT"]).await;
    let removed = refused(begin, first).await;
    assert!(removed.is_segment_removed(), "{removed}");
    assert!(removed.to_string().contains("gap"), "{removed}");

    let mut held = Vec::new();
    let full = loop {
        match server.connect("user=hw", Mode::Replication).await {
            Ok(connection) => held.push(connection),
            Err(error) => break error,
        }
        assert!(held.len() < 10);
    };
    assert!(full.is_too_many_connections(), "{full}");
    assert_eq!(full.walsender_limit(), Some(2), "{full}");
    assert_eq!(full.kind(), PgErrorKind::Retry);
}

#[tokio::test(flavor = "multi_thread")]
async fn base_backup_is_whole_and_verified_by_postgresql() {
    let server = Server::start("", "").await;
    let space = server.dir().join("space");
    std::fs::create_dir(&space).unwrap();
    pg::own(&space);
    server
        .sql(&[
            &format!("CREATE TABLESPACE extra LOCATION '{}'", space.display()),
            "CREATE TABLE t AS SELECT i, repeat('x', 100) FROM generate_series(1, 100000) i",
            "CREATE TABLE u TABLESPACE extra AS SELECT generate_series(1, 1000) i",
        ])
        .await;
    let options = BaseBackupOptions {
        label: "it's a test".into(),
        manifest: ManifestOption::Sha256,
        ..BaseBackupOptions::default()
    };
    let mut backup = server.replication().await.base_backup(options).await.unwrap();
    let target = pg::temp_dir();
    let mut archives: Vec<(Option<u32>, Vec<u8>)> = Vec::new();
    let (mut manifest, mut start, mut stop, mut listed, mut progress) =
        (Vec::new(), None, None, Vec::new(), 0);
    while let Some(message) = tokio::time::timeout(PATIENCE, backup.next())
        .await
        .unwrap()
        .unwrap()
    {
        match message {
            BackupMessage::Start { lsn, .. } => start = Some(lsn),
            BackupMessage::Tablespaces(list) => listed = list,
            BackupMessage::Archive { oid, .. } => archives.push((oid, Vec::new())),
            BackupMessage::Data(data) => archives.last_mut().unwrap().1.extend_from_slice(&data),
            BackupMessage::ManifestBegin => assert!(manifest.is_empty()),
            BackupMessage::ManifestData(data) => manifest.extend_from_slice(&data),
            BackupMessage::Progress(bytes) => progress = bytes,
            BackupMessage::Stop { lsn, .. } => stop = Some(lsn),
        }
    }
    assert!(start < stop && progress > 0 && backup.warnings().is_empty());
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0].location.as_deref(), space.to_str());
    assert_eq!(
        archives.iter().map(|(oid, _)| *oid).collect::<Vec<_>>(),
        [listed[0].oid, None]
    );
    let mut connection = backup.into_connection().unwrap();
    connection.identify_system().await.unwrap();

    // The data directory, complete enough for PostgreSQL's own verification.
    let names = unpack(&archives[1].1, target.path());
    assert_eq!(names.first().map(String::as_str), Some("backup_label"));
    assert_eq!(names.last().map(String::as_str), Some("global/pg_control"));
    let oid = listed[0].oid.unwrap().to_string();
    let link = target.path().join("pg_tblspc").join(&oid);
    let _ = std::fs::remove_file(&link);
    std::fs::create_dir_all(&link).unwrap();
    unpack(&archives[0].1, &link);
    std::fs::write(target.path().join("backup_manifest"), manifest).unwrap();
    let mut verify = std::process::Command::new(pg::bin().join("pg_verifybackup"));
    pg::run(verify.arg("--no-parse-wal").arg(target.path()));
}

/// Unpacks an archive and names its files in order.
fn unpack(archive: &[u8], into: &std::path::Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut tar = tar::Archive::new(archive);
    for entry in tar.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.header().entry_type().is_file() {
            names.push(entry.path().unwrap().display().to_string());
        }
        entry.unpack_in(into).unwrap();
    }
    let distinct: BTreeSet<&String> = names.iter().collect();
    assert_eq!(distinct.len(), names.len(), "every file once");
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_ends_the_timeline_and_the_next_one_streams() {
    let primary = Server::start("", "").await;
    primary.sql(&["CREATE TABLE t (i int)"]).await;
    let dir = pg::temp_dir();
    let source = format!("host={} port={} user=hw", primary.dir().display(), primary.port);
    let mut basebackup = pg::command(pg::bin().join("pg_basebackup"), dir.path());
    pg::run(
        basebackup
            .args(["-X", "stream", "-c", "fast", "-D"])
            .arg(dir.path().join("data"))
            .args(["-d", &source]),
    );
    std::fs::write(dir.path().join("data/standby.signal"), "").unwrap();
    let standby = Server::launch(dir, &format!("primary_conninfo = '{source}'\nhot_standby = on")).await;

    let size = SegmentSize::DEFAULT;
    let begin = size.segment_start(lsn(&primary, "pg_current_wal_flush_lsn").await);
    let (mut reader, mut writer) = start(standby.replication().await, None, begin, 1).await;
    primary
        .sql(&["INSERT INTO t SELECT generate_series(1, 10000)"])
        .await;
    let end = lsn(&primary, "pg_current_wal_flush_lsn").await;
    let before = read_until(&mut reader, &mut writer, end).await;
    standby.sql(&["SELECT pg_promote()"]).await;
    let next_timeline = loop {
        match next(&mut reader).await {
            StreamMessage::Ended(StreamEnd::Timeline(next)) => break next,
            StreamMessage::Ended(StreamEnd::Shutdown) => panic!("shutdown"),
            StreamMessage::Data { .. } => {}
            StreamMessage::Keepalive { .. } => writer.send(status(reader.position())).await.unwrap(),
        }
    };
    assert_eq!(next_timeline.timeline.get(), 2);
    assert!(next_timeline.switch >= end);

    // The same connection goes on: history, then the new timeline from the start of its segment.
    let mut connection = reader.into_connection(writer).unwrap();
    let history = connection
        .timeline_history(next_timeline.timeline)
        .await
        .unwrap()
        .unwrap();
    let parsed = highwater_format::History::parse(next_timeline.timeline, &history.content).unwrap();
    assert_eq!(parsed.switch_of(TimelineId::FIRST), Some(next_timeline.switch));
    standby.sql(&["INSERT INTO t VALUES (1)"]).await;
    let end = lsn(&standby, "pg_current_wal_flush_lsn").await;
    let from = size.segment_start(next_timeline.switch);
    let (mut reader, mut writer) = start(connection, None, from, 2).await;
    let after = read_until(&mut reader, &mut writer, end).await;
    let common = usize::try_from(next_timeline.switch.distance_from(from)).unwrap();
    let offset = usize::try_from(from.distance_from(begin)).unwrap();
    let shared = common.min(before.len() - offset);
    assert!(shared > 0 && before[offset..offset + shared] == after[..shared]);

    // Exactly at the end of the old timeline there is no stream, past it an error that says where it forked.
    let started = standby
        .replication()
        .await
        .start_replication(None, next_timeline.switch, TimelineId::FIRST)
        .await;
    let Started::AtEnd(_, again) = started.unwrap() else {
        panic!("a stream past the end")
    };
    assert_eq!(again, next_timeline);
    let past = standby
        .replication()
        .await
        .start_replication(None, end + 0x100_0000, TimelineId::FIRST)
        .await;
    let past = past.unwrap_err();
    assert_eq!(
        past.fork_point().map(|fork| fork.lsn),
        Some(next_timeline.switch),
        "{past}"
    );
}
