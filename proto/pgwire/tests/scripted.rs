//! The client against a scripted server: everything a real one does rarely, and what a hostile one does.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "tests"
)]

mod fake;

use std::time::Duration;

use fake::{
    Fake, Peer, columns, complete, copy_both, copy_data, copy_out, error, fields, keepalive, msg, ready, row,
    wal,
};
use highwater_format::{Lsn, Time, TimelineId};
use highwater_pgwire::{
    BackupMessage, BaseBackupOptions, ByteStream, ConnInfo, Connection, Dialer, Environment, Mode,
    NextTimeline, PgError, PgErrorKind, Started, Status, StatusWriter, StreamEnd, StreamMessage, WalReader,
};

async fn connect(fake: &Fake) -> Connection {
    Connection::connect(&fake.info(""), Mode::Replication)
        .await
        .unwrap()
}

async fn stream(fake: &Fake) -> (WalReader, StatusWriter) {
    let started = connect(fake)
        .await
        .start_replication(Some("s"), Lsn(0x100_0000), TimelineId::FIRST)
        .await;
    match started.unwrap() {
        Started::Streaming(reader, writer) => (reader, writer),
        Started::AtEnd(..) => panic!("expected a stream"),
    }
}

fn status(flush: u64) -> Status {
    Status {
        write: Lsn(flush),
        flush: Lsn(flush),
        apply: Lsn(flush),
        reply_requested: false,
        now: Time::UNIX_EPOCH,
    }
}

/// A server that welcomes, agrees to stream, and then sends these bytes and waits.
fn streaming(bytes: Vec<u8>) -> Fake {
    Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        peer.query().await;
        peer.send(&[copy_both(), bytes].concat()).await;
        while peer.receive().await.is_some() {}
    })
}

async fn first_error(fake: &Fake) -> PgError {
    let (mut reader, _writer) = stream(fake).await;
    loop {
        match tokio::time::timeout(Duration::from_secs(20), reader.next())
            .await
            .expect("an answer in time")
        {
            Ok(StreamMessage::Ended(end)) => panic!("ended as {end:?}"),
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}

#[tokio::test]
async fn startup_says_what_a_physical_receiver_says() {
    let fake = Fake::start(|mut peer| async move {
        let startup = peer.welcome("16.4 (Debian)").await;
        for part in ["user hw", "replication true", "application_name me"] {
            assert!(startup.contains(part), "{startup}");
        }
        assert!(!startup.contains("database"), "{startup}");
    });
    let info = fake.info("").with_application_name("me");
    let connection = Connection::connect(&info, Mode::Replication).await.unwrap();
    assert_eq!(connection.server_version(), 160_004);
    assert_eq!(connection.backend_pid(), 0x1234);
    fake.task.await.unwrap();
}

#[tokio::test]
async fn messages_between_answers_are_taken_in_passing() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        assert_eq!(peer.query().await, "SHOW wal_segment_size");
        let parameter = msg(b'S', b"application_name\0x\0");
        let notification = msg(b'A', b"\0\0\0\0a\0b\0");
        let answer = [
            fields(b'N', "WARNING", "01000", "careful"),
            columns(&["wal_segment_size"]),
            notification,
            row(&[Some("16MB")]),
            complete("SHOW"),
            parameter,
            ready(),
        ];
        peer.send(&answer.concat()).await;
    });
    let mut connection = connect(&fake).await;
    assert_eq!(connection.show("wal_segment_size").await.unwrap(), "16MB");
    assert_eq!(connection.parameter("application_name"), Some("x"));
    assert_eq!(connection.notices()[0].message, "careful");
}

#[tokio::test]
async fn after_a_server_error_the_connection_goes_on() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        peer.query().await;
        peer.send(&[error("42704", "replication slot \"x\" does not exist"), ready()].concat())
            .await;
        peer.query().await;
        peer.send(&[error("58P01", "could not open file"), ready()].concat())
            .await;
    });
    let mut connection = connect(&fake).await;
    let missing = connection.drop_replication_slot("x").await.unwrap_err();
    assert!(missing.is_slot_missing());
    assert!(missing.to_string().contains("next: create the slot"), "{missing}");
    assert_eq!(
        connection.timeline_history(TimelineId::FIRST).await.unwrap(),
        None
    );
}

#[tokio::test]
async fn a_fatal_error_is_told_although_the_connection_ends() {
    let fake = Fake::start(|mut peer| async move {
        peer.startup().await;
        peer.send(&fields(
            b'E',
            "FATAL",
            "28000",
            "no pg_hba.conf entry for replication connection",
        ))
        .await;
    });
    let refused = Connection::connect(&fake.info(""), Mode::Replication)
        .await
        .unwrap_err();
    assert!(refused.is_not_authorized());
    assert_eq!(refused.kind(), PgErrorKind::Operator);
    assert!(refused.to_string().contains("pg_hba.conf a line"), "{refused}");
}

#[tokio::test]
async fn a_dropped_command_makes_the_connection_unusable() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        while peer.receive().await.is_some() {}
    });
    let mut connection = connect(&fake).await;
    let slow = tokio::time::timeout(Duration::from_millis(50), connection.identify_system()).await;
    assert!(slow.is_err());
    let next = connection.identify_system().await.unwrap_err();
    assert!(matches!(next, PgError::Unusable { .. }), "{next}");
}

#[tokio::test]
async fn history_files_must_be_the_ones_asked_for() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        for name in ["00000002.history", "00000003.history"] {
            assert_eq!(peer.query().await, "TIMELINE_HISTORY 2");
            let content = "1\t0/5000060\tno recovery target specified\n";
            let answer = [
                columns(&["filename", "content"]),
                row(&[Some(name), Some(content)]),
                complete("T"),
                ready(),
            ];
            peer.send(&answer.concat()).await;
        }
    });
    let mut connection = connect(&fake).await;
    let two = TimelineId::new(2).unwrap();
    let file = connection.timeline_history(two).await.unwrap().unwrap();
    assert_eq!(file.name, "00000002.history");
    assert!(file.content.starts_with(b"1\t0/5000060"));
    assert_eq!(
        connection.timeline_history(two).await.unwrap_err().kind(),
        PgErrorKind::Protocol
    );
}

#[tokio::test]
async fn slots_of_old_servers_cannot_be_read() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("14.23").await;
    });
    let refused = connect(&fake).await.read_replication_slot("s").await.unwrap_err();
    assert_eq!(refused.kind(), PgErrorKind::Unsupported);
    assert!(
        refused.to_string().contains("15 or newer, the server is 14.23"),
        "{refused}"
    );
}

#[tokio::test]
async fn names_that_would_break_out_of_a_command_are_refused() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        assert_eq!(peer.receive().await, None);
    });
    let mut connection = connect(&fake).await;
    for name in ["", "A", "a\"; DROP", "a b", &"x".repeat(64)] {
        assert!(
            connection.create_physical_slot(name, true, false).await.is_err(),
            "{name}"
        );
    }
    assert!(connection.show("a; b").await.is_err());
}

#[tokio::test]
async fn data_and_keepalives_arrive_in_order() {
    let fake = streaming(
        [
            wal(0x100_0000, b"abc"),
            keepalive(0x100_0003, true),
            wal(0x100_0003, b"de"),
        ]
        .concat(),
    );
    let (mut reader, _writer) = stream(&fake).await;
    let StreamMessage::Data {
        start,
        server_end,
        data,
        ..
    } = reader.next().await.unwrap()
    else {
        panic!()
    };
    assert_eq!(
        (start, server_end, &data[..]),
        (Lsn(0x100_0000), Lsn(0x100_0003), &b"abc"[..])
    );
    let next = reader.next().await.unwrap();
    assert!(matches!(
        next,
        StreamMessage::Keepalive {
            reply_requested: true,
            server_end: Lsn(0x100_0003),
            ..
        }
    ));
    assert!(matches!(
        reader.next().await.unwrap(),
        StreamMessage::Data {
            start: Lsn(0x100_0003),
            ..
        }
    ));
    assert_eq!(reader.position(), Lsn(0x100_0005));
}

#[tokio::test]
async fn jumps_in_the_stream_are_errors_that_name_both_ends() {
    for (bytes, found) in [
        (wal(0x100_0008, b"x"), 0x100_0008),
        (
            [wal(0x100_0000, b"abc"), wal(0x100_0004, b"x")].concat(),
            0x100_0004,
        ),
        (
            [wal(0x100_0000, b"abc"), wal(0x100_0002, b"x")].concat(),
            0x100_0002,
        ),
    ] {
        let fake = streaming(bytes);
        match first_error(&fake).await {
            PgError::Jump { found: Lsn(at), .. } => assert_eq!(at, found),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn nonsense_in_the_stream_is_a_protocol_error() {
    for bytes in [
        copy_data(b""),
        copy_data(b"w\0\0"),
        copy_data(&[&b"w"[..], &[0; 23]].concat()),
        copy_data(b"k\0"),
        copy_data(b"q12345678"),
        msg(b'T', b""),
        msg(b'?', b"x"),
        b"d\x7f\xff\xff\xff".to_vec(),
        b"d\0\0\0\x01".to_vec(),
        ready(),
        copy_both(),
    ] {
        let fake = streaming(bytes.clone());
        let error = first_error(&fake).await;
        assert_eq!(error.kind(), PgErrorKind::Protocol, "{bytes:?}: {error}");
    }
}

#[tokio::test]
async fn wal_past_the_last_lsn_is_refused() {
    let last = u64::MAX - 1;
    let fake = Fake::start(move |mut peer: Peer| async move {
        peer.welcome("15.20").await;
        peer.query().await;
        peer.send(&[copy_both(), wal(last, b"abcd")].concat()).await;
        while peer.receive().await.is_some() {}
    });
    let started = connect(&fake)
        .await
        .start_replication(None, Lsn(last), TimelineId::FIRST)
        .await
        .unwrap();
    let Started::Streaming(mut reader, _writer) = started else {
        panic!()
    };
    assert_eq!(reader.next().await.unwrap_err().kind(), PgErrorKind::Protocol);
}

#[tokio::test]
async fn errors_after_the_stream_began_are_told_with_the_request() {
    let fake = streaming(error(
        "58P01",
        "requested WAL segment 000000010000000000000001 has already been removed",
    ));
    let removed = first_error(&fake).await;
    assert!(removed.is_segment_removed());
    assert!(
        removed
            .to_string()
            .contains("START_REPLICATION SLOT \"s\" PHYSICAL 0/1000000 TIMELINE 1"),
        "{removed}"
    );
    let fake = streaming(error(
        "XX000",
        "requested starting point 0/9000000 is ahead of the WAL flush position of this server 0/3000148",
    ));
    assert_eq!(first_error(&fake).await.ahead_of_server(), Some(Lsn(0x300_0148)));
}

#[tokio::test]
async fn a_clean_shutdown_is_an_end_and_a_lost_connection_is_not() {
    let fake = streaming([wal(0x100_0000, b"abc"), complete("COPY 0")].concat());
    let (mut reader, writer) = stream(&fake).await;
    reader.next().await.unwrap();
    for _ in 0..2 {
        assert_eq!(
            reader.next().await.unwrap(),
            StreamMessage::Ended(StreamEnd::Shutdown)
        );
    }
    assert!(reader.into_connection(writer).is_err());

    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        peer.query().await;
        peer.send(&[copy_both(), wal(0x100_0000, b"abc")].concat()).await;
    });
    let lost = first_error(&fake).await;
    assert!(lost.is_connection_lost());
    assert_eq!(lost.kind(), PgErrorKind::Retry);
}

fn next_timeline() -> Vec<u8> {
    [
        columns(&["next_tli", "next_tli_startpos"]),
        row(&[Some("2"), Some("0/1000002")]),
        complete("START_STREAMING"),
        complete("START_REPLICATION"),
        ready(),
    ]
    .concat()
}

const NEXT: (u32, Lsn) = (2, Lsn(0x100_0002));

fn is_next(next: NextTimeline) -> bool {
    (next.timeline.get(), next.switch) == NEXT
}

#[tokio::test]
async fn the_end_of_a_timeline_gives_the_connection_back() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        peer.query().await;
        peer.send(&[copy_both(), wal(0x100_0000, b"abc"), msg(b'c', b"")].concat())
            .await;
        // The switch is only told once we have ended our side, and nothing may follow that.
        assert_eq!(peer.receive().await.unwrap().0, b'd');
        assert_eq!(peer.receive().await.unwrap().0, b'c');
        peer.send(&next_timeline()).await;
        assert_eq!(peer.query().await, "SHOW x");
        peer.send(&[columns(&["x"]), row(&[Some("1")]), complete("SHOW"), ready()].concat())
            .await;
    });
    let (mut reader, mut writer) = stream(&fake).await;
    reader.next().await.unwrap();
    writer.send(status(0x100_0000)).await.unwrap();
    match reader.next().await.unwrap() {
        StreamMessage::Ended(StreamEnd::Timeline(next)) => assert!(is_next(next)),
        other => panic!("{other:?}"),
    }
    writer.send(status(0x100_0003)).await.unwrap();
    let mut connection = reader.into_connection(writer).unwrap();
    assert_eq!(connection.show("x").await.unwrap(), "1");
    fake.task.await.unwrap();
}

#[tokio::test]
async fn the_end_of_a_timeline_survives_dropped_reads() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        peer.query().await;
        peer.send(&[copy_both(), msg(b'c', b"")].concat()).await;
        assert_eq!(peer.receive().await.unwrap().0, b'c');
        for byte in next_timeline() {
            peer.send(&[byte]).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(peer.receive().await, None, "our end of the copy is sent once");
    });
    let (mut reader, _writer) = stream(&fake).await;
    let ended = loop {
        if let Ok(message) = tokio::time::timeout(Duration::from_micros(50), reader.next()).await {
            break message.unwrap();
        }
    };
    assert!(matches!(ended, StreamMessage::Ended(StreamEnd::Timeline(next)) if is_next(next)));
    drop((reader, _writer));
    fake.task.await.unwrap();
}

#[tokio::test]
async fn a_start_at_the_end_of_a_timeline_has_no_stream() {
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        peer.query().await;
        peer.send(&next_timeline()).await;
        assert_eq!(peer.query().await, "SHOW x");
        peer.send(&[columns(&["x"]), row(&[Some("1")]), complete("SHOW"), ready()].concat())
            .await;
    });
    let started = connect(&fake)
        .await
        .start_replication(None, Lsn(0x100_0002), TimelineId::FIRST)
        .await
        .unwrap();
    let Started::AtEnd(mut connection, next) = started else {
        panic!("a stream")
    };
    assert!(is_next(next));
    assert_eq!(connection.show("x").await.unwrap(), "1");
}

#[tokio::test]
async fn a_timeline_that_ends_without_a_next_is_refused() {
    let fake = streaming([msg(b'c', b""), complete("START_STREAMING"), ready()].concat());
    assert_eq!(first_error(&fake).await.kind(), PgErrorKind::Protocol);
}

#[tokio::test]
async fn a_waiting_reader_does_not_hold_up_the_writer() {
    let (seen, mut sent) = tokio::sync::mpsc::channel(10);
    let fake = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
        peer.query().await;
        peer.send(&copy_both()).await;
        while let Some((tag, body)) = peer.receive().await {
            assert_eq!(tag, b'd');
            seen.send(body).await.unwrap();
        }
    });
    let (mut reader, mut writer) = stream(&fake).await;
    let reading = tokio::spawn(async move { reader.next().await });
    for flush in [5_u64, 6] {
        writer.send(status(flush)).await.unwrap();
        let body = tokio::time::timeout(Duration::from_secs(20), sent.recv())
            .await
            .unwrap()
            .unwrap();
        assert_eq!((body.len(), body[0]), (34, b'r'));
        assert_eq!(body[9..17], flush.to_be_bytes());
    }
    reading.abort();
}

fn backup_opening() -> Vec<u8> {
    [
        columns(&["recptr", "tli"]),
        row(&[Some("0/2000028"), Some("1")]),
        complete("SELECT"),
        columns(&["spcoid", "spclocation", "size"]),
        row(&[Some("16385"), Some("/space"), Some("7")]),
        row(&[None, None, Some("9")]),
        complete("SELECT"),
    ]
    .concat()
}

fn backup_stop() -> Vec<u8> {
    [
        columns(&["recptr", "tli"]),
        row(&[Some("0/2000138"), Some("1")]),
        complete("SELECT"),
    ]
    .concat()
}

fn backup_15() -> Vec<u8> {
    [
        copy_out(),
        copy_data(b"n16385.tar\0/space\0"),
        copy_data(b"dspace"),
        fields(b'N', "WARNING", "01000", "page verification failed"),
        copy_data(b"nbase.tar\0\0"),
        copy_data(b"dba"),
        copy_data(b"p\0\0\0\0\0\0\0\x07"),
        copy_data(b"dse"),
        copy_data(b"m"),
        copy_data(b"d{}"),
        msg(b'c', b""),
    ]
    .concat()
}

fn backup_14() -> Vec<u8> {
    let archive = |pieces: &[&[u8]]| {
        let data: Vec<u8> = pieces.iter().flat_map(|piece| copy_data(piece)).collect();
        [copy_out(), data, msg(b'c', b"")].concat()
    };
    let warning = fields(b'N', "WARNING", "01000", "page verification failed");
    [
        archive(&[b"space"]),
        warning,
        archive(&[b"ba", b"se"]),
        archive(&[b"{}"]),
    ]
    .concat()
}

fn backup_server(version: &'static str, bytes: Vec<u8>) -> Fake {
    Fake::start(move |mut peer| async move {
        peer.welcome(version).await;
        let command = peer.query().await;
        assert_eq!(
            command.starts_with("BASE_BACKUP ("),
            version.starts_with("15"),
            "{command}"
        );
        peer.send(&bytes).await;
        while peer.receive().await.is_some() {}
    })
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Contents {
    archives: Vec<(String, Option<u32>, Vec<u8>)>,
    manifest: Vec<u8>,
    start: Option<Lsn>,
    stop: Option<Lsn>,
}

async fn read_backup(fake: &Fake) -> Result<(Contents, usize), PgError> {
    let mut backup = connect(fake)
        .await
        .base_backup(BaseBackupOptions::default())
        .await?;
    let mut contents = Contents::default();
    while let Some(message) = backup.next().await? {
        match message {
            BackupMessage::Start { lsn, .. } => contents.start = Some(lsn),
            BackupMessage::Stop { lsn, .. } => contents.stop = Some(lsn),
            BackupMessage::Archive { name, oid, .. } => contents.archives.push((name, oid, Vec::new())),
            BackupMessage::Data(data) => contents.archives.last_mut().unwrap().2.extend_from_slice(&data),
            BackupMessage::ManifestData(data) => contents.manifest.extend_from_slice(&data),
            BackupMessage::Tablespaces(_) | BackupMessage::ManifestBegin | BackupMessage::Progress(_) => {}
        }
    }
    let warnings = backup.warnings().len();
    backup.into_connection()?;
    Ok((contents, warnings))
}

#[tokio::test]
async fn both_base_backup_framings_read_the_same() {
    let end = [complete("BASE_BACKUP"), ready()].concat();
    for (version, middle) in [("15.20", backup_15()), ("14.23", backup_14())] {
        let fake = backup_server(
            version,
            [backup_opening(), middle, backup_stop(), end.clone()].concat(),
        );
        let (contents, warnings) = read_backup(&fake).await.unwrap();
        let expected = Contents {
            archives: vec![
                ("16385.tar".into(), Some(16385), b"space".to_vec()),
                ("base.tar".into(), None, b"base".to_vec()),
            ],
            manifest: b"{}".to_vec(),
            start: Some(Lsn(0x200_0028)),
            stop: Some(Lsn(0x200_0138)),
        };
        assert_eq!(contents, expected, "{version}");
        assert_eq!(warnings, 1);
    }
}

#[tokio::test]
async fn an_error_after_the_stop_position_is_not_success() {
    let late = [
        error("XX001", "checksum verification failure during base backup"),
        ready(),
    ]
    .concat();
    for (version, middle) in [("15.20", backup_15()), ("14.23", backup_14())] {
        let fake = backup_server(
            version,
            [backup_opening(), middle, backup_stop(), late.clone()].concat(),
        );
        let failed = read_backup(&fake).await.unwrap_err();
        assert_eq!(failed.sqlstate(), Some("XX001"), "{version}");
    }
}

#[tokio::test]
async fn a_backup_cut_off_anywhere_is_not_success() {
    let whole = [
        backup_opening(),
        backup_15(),
        backup_stop(),
        complete("BASE_BACKUP"),
        ready(),
    ]
    .concat();
    for len in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
        let cut = whole[..len].to_vec();
        let fake = Fake::start(move |mut peer| async move {
            peer.welcome("15.20").await;
            peer.query().await;
            peer.send(&cut).await;
        });
        assert!(read_backup(&fake).await.is_err(), "cut at {len}");
    }
}

#[tokio::test]
async fn a_server_cannot_claim_the_login_without_its_part_of_scram() {
    let fake = Fake::start(|mut peer| async move {
        peer.startup().await;
        peer.send(&msg(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0")).await;
        peer.receive().await;
        peer.send(
            &[
                msg(b'R', &[0; 4]),
                msg(b'S', b"server_version\x0015.20\0"),
                ready(),
            ]
            .concat(),
        )
        .await;
    });
    let refused = Connection::connect(&fake.info("password=x"), Mode::Sql)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("do not trust it"), "{refused}");
}

#[tokio::test]
async fn logins_that_ask_for_less_than_required_are_refused() {
    for (request, extra, part) in [
        (
            msg(b'R', b"\0\0\0\x03"),
            "require_auth=scram-sha-256 password=x",
            "require_auth",
        ),
        (
            msg(b'R', &[0; 4]),
            "require_auth=scram-sha-256 password=x",
            "require_auth",
        ),
        (msg(b'R', &[0; 4]), "channel_binding=require", "channel_binding"),
        (
            msg(b'R', b"\0\0\0\x03"),
            "channel_binding=require password=x",
            "channel_binding",
        ),
        (
            msg(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0"),
            "channel_binding=require password=x",
            "channel_binding",
        ),
        (msg(b'R', b"\0\0\0\x03"), "", ".pgpass"),
        (msg(b'R', b"\0\0\0\x07"), "password=x", "GSSAPI"),
        (msg(b'R', b"\0\0\0\x0aOTHER\0\0"), "password=x", "SASL mechanism"),
    ] {
        let fake = Fake::start(|mut peer| async move {
            peer.startup().await;
            peer.send(&request).await;
            assert_eq!(peer.receive().await, None, "no password may be sent");
        });
        let refused = Connection::connect(&fake.info(extra), Mode::Sql)
            .await
            .unwrap_err();
        assert!(refused.to_string().contains(part), "{extra}: {refused}");
        assert!(refused.to_string().contains("hw"), "{refused}");
        fake.task.await.unwrap();
    }
}

#[tokio::test]
async fn hostile_scram_answers_are_errors() {
    for first in [
        "",
        "r=",
        "r=abc,s=AAAA,i=4096",
        "r=\u{fffd},i=1",
        "m=x",
        "e=other-error",
    ] {
        let fake = Fake::start(move |mut peer| async move {
            peer.startup().await;
            peer.send(&msg(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0")).await;
            peer.receive().await;
            peer.send(&msg(b'R', &[b"\0\0\0\x0b", first.as_bytes()].concat()))
                .await;
            peer.receive().await;
        });
        let refused = Connection::connect(&fake.info("password=x"), Mode::Sql)
            .await
            .unwrap_err();
        assert_eq!(refused.kind(), PgErrorKind::Operator, "{first}: {refused}");
    }
}

#[tokio::test]
async fn hostile_greetings_are_errors() {
    for bytes in [
        b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        msg(b'R', b""),
        msg(b'R', &[0; 4]).into_iter().chain(ready()).collect(),
        [msg(b'R', &[0; 4]), msg(b'S', b"server_version\0?\0"), ready()].concat(),
        [msg(b'R', &[0; 4]), msg(b'K', b"\0")].concat(),
        msg(b'S', b"unterminated"),
        ready(),
        b"E\x7f\xff\xff\xff".to_vec(),
    ] {
        let fake = Fake::start({
            let bytes = bytes.clone();
            move |mut peer| async move {
                peer.startup().await;
                peer.send(&bytes).await;
                while peer.receive().await.is_some() {}
            }
        });
        let refused = Connection::connect(&fake.info(""), Mode::Sql).await.unwrap_err();
        assert_eq!(refused.kind(), PgErrorKind::Protocol, "{bytes:?}: {refused}");
    }
}

#[tokio::test]
async fn a_silent_server_runs_into_the_connect_timeout() {
    let fake = Fake::start(|mut peer| async move {
        peer.startup().await;
        while peer.receive().await.is_some() {}
    });
    let late = Connection::connect(&fake.info("connect_timeout=2"), Mode::Sql)
        .await
        .unwrap_err();
    assert!(matches!(late, PgError::ConnectTimeout { .. }), "{late}");
    assert_eq!(late.kind(), PgErrorKind::Retry);
}

#[tokio::test]
async fn the_next_host_is_tried_unless_the_login_was_refused() {
    let good = Fake::start(|mut peer| async move {
        peer.welcome("15.20").await;
    });
    let mut info = good.info("");
    info.hosts.insert(
        0,
        highwater_pgwire::HostSpec {
            port: 1,
            ..info.hosts[0].clone()
        },
    );
    Connection::connect(&info, Mode::Sql).await.unwrap();

    let bad = Fake::start(|mut peer| async move {
        peer.startup().await;
        peer.send(&fields(
            b'E',
            "FATAL",
            "28P01",
            "password authentication failed for user \"hw\"",
        ))
        .await;
    });
    let mut info = bad.info("");
    info.hosts.push(info.hosts[0].clone());
    let refused = Connection::connect(&info, Mode::Sql).await.unwrap_err();
    assert!(refused.is_wrong_password());
    assert!(!matches!(refused, PgError::AllHosts { .. }));
}

#[tokio::test]
async fn the_role_of_the_server_is_checked() {
    let standby = || {
        Fake::start(|mut peer| async move {
            peer.startup().await;
            let parameters = [
                msg(b'S', b"server_version\x0015.20\0"),
                msg(b'S', b"in_hot_standby\0on\0"),
                msg(b'S', b"default_transaction_read_only\0off\0"),
            ];
            peer.send(&[msg(b'R', &[0; 4]), parameters.concat(), ready()].concat())
                .await;
            while peer.receive().await.is_some() {}
        })
    };
    for (wanted, suits) in [
        ("any", true),
        ("standby", true),
        ("read-only", true),
        ("primary", false),
        ("read-write", false),
    ] {
        let fake = standby();
        let info = fake.info(&format!("target_session_attrs={wanted}"));
        let result = Connection::connect(&info, Mode::Replication).await;
        assert_eq!(result.is_ok(), suits, "{wanted}");
    }
}

/// Parameters whose connections go to a peer that plays `script`, without any socket.
fn dialed(sslmode: &str) -> ConnInfo {
    let text = format!("host=nowhere.invalid user=hw sslmode={sslmode}");
    let info = ConnInfo::resolve_in(Some(&text), &Environment::empty()).unwrap();
    info.with_dialer(Dialer::new(|spec| {
        assert_eq!(spec.to_string(), "nowhere.invalid port 5432");
        let (ours, theirs) = tokio::io::duplex(64);
        tokio::spawn(async move {
            let mut peer = Peer { stream: theirs };
            peer.welcome("17.2").await;
            peer.query().await;
            peer.send(&[columns(&["x"]), row(&[Some("1")]), complete("SHOW"), ready()].concat())
                .await;
        });
        Box::pin(async move { Ok(Box::new(ours) as Box<dyn ByteStream>) })
    }))
}

#[tokio::test]
async fn a_dialed_stream_takes_the_place_of_a_socket() {
    let mut conn = Connection::connect(&dialed("prefer"), Mode::Replication)
        .await
        .unwrap();
    assert_eq!(conn.server_version(), 170_002);
    assert_eq!(conn.show("x").await.unwrap(), "1");
}

#[tokio::test]
async fn encryption_that_was_asked_for_is_not_dropped_for_a_dialed_stream() {
    let error = Connection::connect(&dialed("require"), Mode::Replication)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), PgErrorKind::Config);
    assert!(error.to_string().contains("sslmode=require"), "{error}");
}

/// An address of this machine that is not loopback, if it has one; asking the routes for it sends nothing.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.200:9").ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_loopback() && !own.is_unspecified()).then_some(own)
}

/// A server without TLS, not on loopback: libpq's silent default is refused, what somebody asked for is not.
#[tokio::test]
async fn nothing_goes_to_another_machine_in_clear_unless_somebody_said_so() {
    let Some(address) = own_address() else {
        eprintln!("SKIPPED: this machine has no address but loopback");
        return;
    };
    for (sslmode, refused) in [("", true), ("sslmode=prefer", false), ("sslmode=disable", false)] {
        let listener = tokio::net::TcpListener::bind((address, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let text = format!("host={address} port={port} user=hw {sslmode}");
        let info = ConnInfo::resolve_in(Some(&text), &Environment::empty()).unwrap();
        let server = tokio::spawn(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut request = [0; 8];
            socket.read_exact(&mut request).await.unwrap();
            let asks_for_tls = request[4..] == 80_877_103_u32.to_be_bytes();
            if asks_for_tls {
                socket.write_all(b"N").await.unwrap();
            }
            let mut login = Vec::new();
            let more = tokio::time::timeout(Duration::from_secs(5), socket.read_buf(&mut login)).await;
            (asks_for_tls, more.unwrap().unwrap_or(0) > 0)
        });
        let connecting = tokio::spawn(async move { Connection::connect(&info, Mode::Sql).await.map(drop) });
        let (asked, logged_in) = server.await.unwrap();
        let error = connecting.await.unwrap().unwrap_err();
        assert_eq!(asked, sslmode != "sslmode=disable");
        assert_eq!(logged_in, !refused, "{sslmode}: {error}");
        assert_eq!(
            error.to_string().contains("in clear"),
            refused,
            "{sslmode}: {error}"
        );
        assert!(!refused || error.kind() == PgErrorKind::Operator, "{error}");
    }
}

/// A directory in `PGHOST` says nothing about a connection whose address is given.
#[tokio::test]
async fn an_address_beside_a_socket_directory_is_asked_for_tls() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut request = [0; 8];
        socket.read_exact(&mut request).await.unwrap();
        socket.write_all(b"N").await.unwrap();
        request[4..] == 80_877_103_u32.to_be_bytes()
    });
    let surroundings = Environment::empty().with_variable("PGHOST", "/var/run/postgresql");
    let text = format!("hostaddr=127.0.0.1 port={port} user=hw sslmode=require");
    let info = ConnInfo::resolve_in(Some(&text), &surroundings).unwrap();
    let error = Connection::connect(&info, Mode::Replication).await.unwrap_err();
    assert!(server.await.unwrap(), "the first message was no request for TLS");
    assert!(error.to_string().contains("needs it"), "{error}");
}
