//! How long an answer is waited for: against a server that is there and says nothing, in virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

#[expect(dead_code, reason = "another test uses the rest")]
mod fake;

use std::time::Duration;

use fake::{Peer, columns, complete, copy_data, copy_out, ready, row};
use highwater_format::{Lsn, TimelineId};
use highwater_pgwire::{
    BackupMessage, BaseBackup, BaseBackupOptions, ByteStream, ConnInfo, Connection, Dialer, Environment,
    Mode, PgError, PgErrorKind,
};
use tokio::io::DuplexStream;
use tokio::time::{Instant, sleep, timeout};

/// Nothing lasts this long.
const FOR_EVER: Duration = Duration::from_secs(7200);

/// A connection to a peer that lets everybody in and then plays `script`, over a stream in memory.
async fn connect<F>(script: impl Fn(Peer<DuplexStream>) -> F + Send + Sync + Copy + 'static) -> Connection
where
    F: Future<Output = ()> + Send + 'static,
{
    let text = "host=nowhere.invalid user=hw sslmode=disable";
    let info = ConnInfo::resolve_in(Some(text), &Environment::empty()).unwrap();
    let info = info.with_dialer(Dialer::new(move |_| {
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(async move {
            let mut peer = Peer { stream: theirs };
            peer.welcome("17.2").await;
            script(peer).await;
        });
        Box::pin(async move { Ok(Box::new(ours) as Box<dyn ByteStream>) })
    }));
    Connection::connect(&info, Mode::Replication).await.unwrap()
}

async fn silent(mut peer: Peer<DuplexStream>) {
    while peer.receive().await.is_some() {}
}

/// The error, and how long it was in coming.
async fn given_up<T: std::fmt::Debug>(question: impl Future<Output = Result<T, PgError>>) -> (PgError, u64) {
    let began = Instant::now();
    let answer = timeout(FOR_EVER, question).await.expect("it is given up");
    (answer.unwrap_err(), began.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_question_without_an_answer_is_given_up_after_a_minute() {
    let mut connection = connect(silent).await;
    let (error, after) = given_up(connection.identify_system()).await;
    assert!(matches!(error, PgError::Silent { .. }), "{error}");
    assert_eq!((error.kind(), after), (PgErrorKind::Retry, 60));
    assert!(error.is_connection_lost());
    assert!(
        error.to_string().contains("60s during IDENTIFY_SYSTEM"),
        "{error}"
    );
    let next = connection.show("x").await.unwrap_err();
    assert!(matches!(next, PgError::Unusable { .. }), "{next}");

    let started = connect(silent)
        .await
        .start_replication(None, Lsn(0x100_0000), TimelineId::FIRST);
    assert_eq!(given_up(started).await.1, 60);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_stops_half_way_is_given_up_and_one_that_goes_on_is_not() {
    let half = |mut peer: Peer<DuplexStream>| async move {
        peer.query().await;
        for part in [columns(&["x"]), row(&[Some("1")])] {
            sleep(Duration::from_secs(50)).await;
            peer.send(&part).await;
        }
        silent(peer).await;
    };
    let mut connection = connect(half).await;
    assert_eq!(given_up(connection.show("x")).await.1, 50 + 50 + 60);

    let slow = |mut peer: Peer<DuplexStream>| async move {
        peer.query().await;
        for part in [columns(&["x"]), row(&[Some("1")]), complete("SHOW"), ready()] {
            sleep(Duration::from_secs(50)).await;
            peer.send(&part).await;
        }
    };
    assert_eq!(connect(slow).await.show("x").await.unwrap(), "1");
}

/// The server writes to its disk before it answers; after that plain questions have their own limit again.
#[tokio::test(start_paused = true)]
async fn slots_may_take_longer_and_not_for_ever() {
    let slow = |mut peer: Peer<DuplexStream>| async move {
        for tag in ["CREATE_REPLICATION_SLOT", "DROP_REPLICATION_SLOT"] {
            assert!(peer.query().await.starts_with(tag));
            sleep(Duration::from_secs(200)).await;
            peer.send(&[complete(tag), ready()].concat()).await;
        }
        silent(peer).await;
    };
    let mut connection = connect(slow).await;
    connection.create_physical_slot("s", true, false).await.unwrap();
    connection.drop_replication_slot("s").await.unwrap();
    assert_eq!(given_up(connection.show("x")).await.1, 60);

    let mut connection = connect(silent).await;
    let made = connection.create_physical_slot("s", true, false);
    assert_eq!(given_up(made).await.1, 300);
}

/// It begins with a checkpoint, which may be spread over a large part of `checkpoint_timeout`.
#[tokio::test(start_paused = true)]
async fn a_base_backup_may_take_its_time() {
    let slow = |mut peer: Peer<DuplexStream>| async move {
        peer.query().await;
        sleep(Duration::from_secs(3000)).await;
        let start = [columns(&["recptr", "tli"]), row(&[Some("0/2000028"), Some("1")])];
        peer.send(&start.concat()).await;
        silent(peer).await;
    };
    let backup = connect(slow).await.base_backup(BaseBackupOptions::default());
    let first = backup.await.unwrap().next().await.unwrap();
    assert!(matches!(first, Some(BackupMessage::Start { .. })), "{first:?}");
}

/// The content of a base backup: two pieces after four minutes each, and no more.
async fn content(mut peer: Peer<DuplexStream>) {
    peer.query().await;
    let head = [
        columns(&["recptr", "tli"]),
        row(&[Some("0/2000028"), Some("1")]),
        complete("SELECT"),
        columns(&["spcoid", "spclocation", "size"]),
        row(&[None, None, Some("1")]),
        complete("SELECT"),
        copy_out(),
        copy_data(b"nbase.tar\0\0"),
    ];
    peer.send(&head.concat()).await;
    for _ in 0..2 {
        sleep(Duration::from_secs(240)).await;
        peer.send(&copy_data(b"dx")).await;
    }
    silent(peer).await;
}

async fn until_the_last_piece(options: BaseBackupOptions) -> BaseBackup {
    let mut backup = connect(content).await.base_backup(options).await.unwrap();
    let mut pieces = 0;
    while pieces < 2 {
        let message = backup.next().await.unwrap().unwrap();
        pieces += usize::from(matches!(message, BackupMessage::Data(_)));
    }
    backup
}

#[tokio::test(start_paused = true)]
async fn the_content_of_a_base_backup_is_not_waited_for_for_ever() {
    let mut backup = until_the_last_piece(BaseBackupOptions::default()).await;
    // Whoever stores what came takes nothing from the server's time.
    sleep(Duration::from_secs(1000)).await;
    let (error, after) = given_up(backup.next()).await;
    assert!(matches!(error, PgError::Silent { .. }), "{error}");
    assert_eq!((error.kind(), after), (PgErrorKind::Retry, 300));

    let archived = BaseBackupOptions {
        wait_wal: true,
        ..BaseBackupOptions::default()
    };
    let mut waiting = until_the_last_piece(archived).await;
    assert!(timeout(FOR_EVER, waiting.next()).await.is_err());
}
