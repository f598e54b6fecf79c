//! A tap on the connection between a replication client and PostgreSQL.
//!
//! Owns: a listening Unix socket and TCP port that forward to a server, the log of every status
//! message the client sent, and what the server sent. Every message is logged before it is
//! forwarded, so what PostgreSQL knows is never ahead of the log. Encrypted connections pass
//! unread. The tap runs on a thread of its own.

mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::dir::TestDir;
use crate::postgres::PgCluster;
use crate::process::Threads;

/// One standby status update, as it went over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feedback {
    /// When the tap read it.
    pub at: SystemTime,
    /// Which connection through the tap, counted from 1.
    pub connection: u32,
    /// Written.
    pub write: u64,
    /// Flushed: what PostgreSQL takes for safe.
    pub flush: u64,
    /// Applied.
    pub apply: u64,
    /// Whether the client asks for a reply.
    pub reply_requested: bool,
}

/// What the server sent so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of WAL.
    pub wal_bytes: u64,
    /// Messages with WAL.
    pub wal_messages: u64,
    /// Keepalives.
    pub keepalives: u64,
    /// Where the WAL sent last ended.
    pub wal_end: u64,
}

/// WAL by the timeline that was asked for, and where it starts.
pub type Recorded = BTreeMap<(u32, u64), Bytes>;

type Hook = Box<dyn Fn(&Feedback) + Send + Sync>;

#[derive(Default)]
struct Log {
    feedback: Vec<Feedback>,
    sent: Sent,
    connections: u32,
    recorded: Option<Recorded>,
}

struct Shared {
    log: Mutex<Log>,
    hook: Mutex<Option<Hook>>,
    frozen: watch::Sender<bool>,
    refuse: AtomicBool,
    late: AtomicBool,
    sever: Mutex<CancellationToken>,
    upstream: Mutex<Upstream>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.log)
    }

    fn feedback(&self, feedback: Feedback) {
        self.log().feedback.push(feedback);
        if let Some(hook) = lock(&self.hook).as_ref() {
            hook(&feedback);
        }
    }
}

/// Where the tap forwards to.
#[derive(Clone, Debug)]
enum Upstream {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// Fails unless each status message came sooner than `limit` after the one before, on the same connection.
///
/// # Errors
///
/// The first two that did not.
pub fn came_in_time(messages: &[Feedback], limit: Duration) -> Result<()> {
    for (one, next) in messages.iter().zip(messages.iter().skip(1)) {
        let gap = next.at.duration_since(one.at).unwrap_or_default();
        ensure!(
            gap < limit && one.connection == next.connection,
            "{gap:?} between two status messages on the connections {} and {}",
            one.connection,
            next.connection
        );
    }
    Ok(())
}

/// A running tap. It stops, and its connections break, when dropped.
pub struct FeedbackTap {
    dir: TestDir,
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
    /// Dropped after the signal to stop.
    _runtime: Threads,
}

impl std::fmt::Debug for FeedbackTap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FeedbackTap")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl FeedbackTap {
    /// A tap before `cluster`. It goes on working when the cluster is started again.
    ///
    /// # Errors
    /// When no socket can be had.
    pub async fn start(cluster: &PgCluster) -> Result<Self> {
        Self::listen(Upstream::Unix(cluster.socket())).await
    }

    /// A tap before a server's Unix socket.
    ///
    /// # Errors
    /// When no socket can be had.
    pub async fn start_unix(socket: &Path) -> Result<Self> {
        Self::listen(Upstream::Unix(socket.to_owned())).await
    }

    /// A tap before a server's TCP port.
    ///
    /// # Errors
    /// When no socket can be had.
    pub async fn start_tcp(address: SocketAddr) -> Result<Self> {
        Self::listen(Upstream::Tcp(address)).await
    }

    async fn listen(upstream: Upstream) -> Result<Self> {
        let dir = TestDir::new()?;
        let runtime = Threads::start(1, "tap")?;
        let shared = Arc::new(Shared {
            log: Mutex::default(),
            hook: Mutex::default(),
            frozen: watch::Sender::new(false),
            refuse: AtomicBool::new(false),
            late: AtomicBool::new(false),
            sever: Mutex::new(CancellationToken::new()),
            upstream: Mutex::new(upstream),
        });
        let socket = dir.join(".s.PGSQL.5432");
        let path = socket.clone();
        let (unix, tcp) =
            runtime
                .spawn(async move {
                    anyhow::Ok((UnixListener::bind(path)?, TcpListener::bind("127.0.0.1:0").await?))
                })
                .await??;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777))?;
        let address = tcp.local_addr()?;
        let stop = CancellationToken::new();
        runtime.spawn(accept(unix, tcp, Arc::clone(&shared), stop.clone()));
        Ok(Self {
            dir,
            address,
            shared,
            stop,
            _runtime: runtime,
        })
    }

    /// A connection string for the superuser through the tap's Unix socket.
    #[must_use]
    pub fn connection_string(&self) -> String {
        self.connection_string_as("postgres")
    }

    /// A connection string for another user.
    #[must_use]
    pub fn connection_string_as(&self, user: &str) -> String {
        format!(
            "host={} port=5432 user={user} dbname=postgres",
            self.dir.path().display()
        )
    }

    /// The tap's TCP address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Every status message so far, in order.
    #[must_use]
    pub fn feedback(&self) -> Vec<Feedback> {
        self.shared.log().feedback.clone()
    }

    /// The last status message.
    #[must_use]
    pub fn last_feedback(&self) -> Option<Feedback> {
        self.shared.log().feedback.last().copied()
    }

    /// The highest flush position that was ever reported; 0 when there was none.
    #[must_use]
    pub fn highest_flush(&self) -> u64 {
        self.shared
            .log()
            .feedback
            .iter()
            .map(|feedback| feedback.flush)
            .max()
            .unwrap_or(0)
    }

    /// What the server sent so far.
    #[must_use]
    pub fn sent(&self) -> Sent {
        self.shared.log().sent
    }

    /// How many connections went through the tap.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.shared.log().connections
    }

    /// Called with every status message after it is logged and before PostgreSQL gets it, for
    /// instance to freeze copies of the regions at that very moment.
    pub fn on_feedback(&self, hook: impl Fn(&Feedback) + Send + Sync + 'static) {
        *lock(&self.shared.hook) = Some(Box::new(hook));
    }

    /// From now on keeps the WAL that the server sends, by timeline and start position.
    pub fn record(&self) {
        self.shared.log().recorded.get_or_insert_default();
    }

    /// The WAL kept since [`FeedbackTap::record`].
    #[must_use]
    pub fn recorded(&self) -> Recorded {
        self.shared.log().recorded.clone().unwrap_or_default()
    }

    /// Breaks all connections; new ones are taken.
    pub fn sever(&self) {
        let old = std::mem::take(&mut *lock(&self.shared.sever));
        old.cancel();
    }

    /// New connections go to another cluster from now on, as after a failover; old ones break.
    pub fn redirect(&self, cluster: &PgCluster) {
        self.lead_to(cluster);
        self.sever();
    }

    /// New connections go to another cluster from now on, and old ones stay, as behind a name with several servers.
    pub fn lead_to(&self, cluster: &PgCluster) {
        *lock(&self.shared.upstream) = Upstream::Unix(cluster.socket());
    }

    /// Nothing is forwarded in either direction, until called with `false`.
    pub fn freeze(&self, frozen: bool) {
        self.shared.frozen.send_replace(frozen);
    }

    /// When the server ends a connection, its last bytes arrive late, and nothing is taken from the client any more before that.
    /// For clients on the Unix socket.
    pub fn end_late(&self, late: bool) {
        self.shared.late.store(late, Ordering::SeqCst);
    }

    /// New connections are closed at once, until called with `false`.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refuse.store(refuse, Ordering::SeqCst);
    }
}

impl Drop for FeedbackTap {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

type Reading = Box<dyn AsyncRead + Send + Unpin>;
type Writing = Box<dyn AsyncWrite + Send + Unpin>;

fn halves<S: AsyncRead + AsyncWrite + Send + 'static>(stream: S) -> (Reading, Writing) {
    let (read, write) = tokio::io::split(stream);
    (Box::new(read), Box::new(write))
}

async fn accept(unix: UnixListener, tcp: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = unix.accept() => accepted.and_then(|(stream, _)| {
                let ear = std::os::unix::net::UnixStream::from(stream.as_fd().try_clone_to_owned()?);
                Ok((halves(stream), Some(ear)))
            }),
            accepted = tcp.accept() => accepted.map(|(stream, _)| (halves(stream), None)),
        };
        let Ok((client, ear)) = accepted else { continue };
        if shared.refuse.load(Ordering::SeqCst) {
            continue;
        }
        let sever = lock(&shared.sever).clone();
        let (upstream, shared) = (lock(&shared.upstream).clone(), Arc::clone(&shared));
        tokio::spawn(async move {
            tokio::select! {
                () = sever.cancelled() => {}
                () = forward(client, ear, &upstream, &shared) => {}
            }
        });
    }
}

async fn connect(upstream: &Upstream) -> std::io::Result<(Reading, Writing)> {
    match upstream {
        Upstream::Unix(path) => Ok(halves(UnixStream::connect(path).await?)),
        Upstream::Tcp(address) => Ok(halves(TcpStream::connect(address).await?)),
    }
}

async fn forward(
    client: (Reading, Writing),
    ear: Option<std::os::unix::net::UnixStream>,
    upstream: &Upstream,
    shared: &Shared,
) {
    let Ok(server) = connect(upstream).await else {
        return;
    };
    let connection = {
        let mut log = shared.log();
        log.connections += 1;
        log.connections
    };
    let conversation = wire::Conversation::default();
    let mut from_client = wire::Frontend::new(conversation.clone());
    let mut from_server = wire::Backend::new(conversation);
    let requests = pump(client.0, server.1, None, shared, |bytes| {
        for status in from_client.feed(bytes) {
            let wire::Status {
                write,
                flush,
                apply,
                reply_requested,
            } = status;
            shared.feedback(Feedback {
                at: clock::now(),
                connection,
                write,
                flush,
                apply,
                reply_requested,
            });
        }
    });
    let replies = pump(server.0, client.1, ear, shared, |bytes| {
        from_server.feed(bytes, &mut shared.log())
    });
    // Each direction closes its own half, as PostgreSQL's clean shutdown does; the connection ends with both.
    tokio::join!(requests, replies);
}

/// So long nothing follows the last bytes of a connection that is still open.
const NOTHING_FOLLOWS: Duration = Duration::from_millis(300);
/// So late the last bytes arrive: a client that writes every second has noticed by then.
const LATE: Duration = Duration::from_millis(1500);

async fn pump(
    mut from: Reading,
    mut to: Writing,
    ear: Option<std::os::unix::net::UnixStream>,
    shared: &Shared,
    mut look: impl FnMut(&Bytes),
) {
    let mut frozen = shared.frozen.subscribe();
    let mut buffer = bytes::BytesMut::new();
    loop {
        buffer.reserve(256 * 1024);
        match from.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        if let Some(ear) = ear.as_ref().filter(|_| shared.late.load(Ordering::SeqCst)) {
            let ended = loop {
                match tokio::time::timeout(NOTHING_FOLLOWS, from.read_buf(&mut buffer)).await {
                    Ok(Ok(0) | Err(_)) => break true,
                    Ok(Ok(_)) => buffer.reserve(256 * 1024),
                    Err(_) => break false,
                }
            };
            if ended {
                drop(ear.shutdown(std::net::Shutdown::Read));
                tokio::time::sleep(LATE).await;
            }
        }
        drop(frozen.wait_for(|frozen| !frozen).await);
        let chunk = buffer.split().freeze();
        look(&chunk);
        if to.write_all(&chunk).await.is_err() {
            break;
        }
    }
    drop(to.shutdown().await);
}
