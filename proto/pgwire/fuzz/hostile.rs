//! A server that sends whatever bytes it is given, and a client that asks it for everything.
//!
//! What must hold: every call returns, with a value or an error. The first byte chooses the question, the second
//! whether the login goes well, and the rest is what the server says.

use highwater_format::{Lsn, Time, TimelineId};
use highwater_pgwire::{
    BaseBackupOptions, ByteStream, ConnInfo, Connection, Dialer, Dialing, Environment, Mode, PgError,
    Started, Status, StreamMessage,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Room on the way to the client: the server sends in pieces of this size at most.
const PIPE: usize = 4096;

/// What a server of version 15 sends to let a client in.
pub(crate) const WELCOME: &[u8] =
    b"R\0\0\0\x08\0\0\0\0S\0\0\0\x18server_version\x0015.4\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x01Z\0\0\0\x05I";

/// Number of questions.
pub(crate) const QUESTIONS: u8 = 7;

/// Asks one question of a server that says these bytes. None: too few of them to ask anything.
pub(crate) fn hostile(data: &[u8]) -> Option<Result<(), PgError>> {
    let [question, login, said @ ..] = data else {
        return None;
    };
    let mut script = if login % 4 == 0 {
        Vec::new()
    } else {
        WELCOME.to_vec()
    };
    script.extend_from_slice(said);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Some(runtime.ok()?.block_on(ask(question % QUESTIONS, script)))
}

fn dialer(script: Vec<u8>) -> Dialer {
    Dialer::new(move |_| -> Dialing {
        let script = script.clone();
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(PIPE);
            tokio::spawn(serve(theirs, script));
            let stream: Box<dyn ByteStream> = Box::new(ours);
            Ok(stream)
        })
    })
}

/// Says everything, says no more, and listens until the client has gone.
async fn serve(stream: tokio::io::DuplexStream, script: Vec<u8>) {
    let (mut read, mut write) = tokio::io::split(stream);
    let say = async move {
        let _ = write.write_all(&script).await;
        let _ = write.shutdown().await;
    };
    let listen = async move {
        let mut buffer = [0; 512];
        while matches!(read.read(&mut buffer).await, Ok(count) if count > 0) {}
    };
    tokio::join!(say, listen);
}

async fn ask(question: u8, script: Vec<u8>) -> Result<(), PgError> {
    let text = "host=nowhere user=u password=p sslmode=disable";
    let info = ConnInfo::resolve_in(Some(text), &Environment::empty())?.with_dialer(dialer(script));
    let mut conn = Connection::connect(&info, Mode::Replication).await?;
    match question {
        0 => conn.identify_system().await.map(drop),
        1 => conn.show("wal_segment_size").await.map(drop),
        2 => conn
            .timeline_history(TimelineId::new(2).unwrap_or(TimelineId::FIRST))
            .await
            .map(drop),
        3 => conn.read_replication_slot("s").await.map(drop),
        4 => conn.simple_query("SELECT 1").await.map(drop),
        5 => stream(conn).await,
        _ => backup(conn).await,
    }
}

async fn stream(conn: Connection) -> Result<(), PgError> {
    let started = conn
        .start_replication(Some("s"), Lsn(0x100_0000), TimelineId::FIRST)
        .await?;
    let Started::Streaming(mut reader, mut writer) = started else {
        return Ok(());
    };
    let status = Status {
        write: Lsn(0),
        flush: Lsn(0),
        apply: Lsn(0),
        reply_requested: true,
        now: Time::UNIX_EPOCH,
    };
    loop {
        if let StreamMessage::Ended(_) = reader.next().await? {
            let mut conn = reader.into_connection(writer)?;
            return conn.identify_system().await.map(drop);
        }
        writer.send(status).await?;
    }
}

async fn backup(conn: Connection) -> Result<(), PgError> {
    let mut backup = conn.base_backup(BaseBackupOptions::default()).await?;
    while backup.next().await?.is_some() {}
    backup.into_connection()?.identify_system().await.map(drop)
}
