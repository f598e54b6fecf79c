//! A scripted server: sends exactly what a test tells it to, and records what it was sent.

use std::path::PathBuf;

use highwater_pgwire::{ConnInfo, Environment};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// One message.
pub(crate) fn msg(tag: u8, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len() + 4).unwrap();
    [&[tag][..], &len.to_be_bytes(), body].concat()
}

/// `RowDescription` with text columns of these names.
pub(crate) fn columns(names: &[&str]) -> Vec<u8> {
    let mut body = u16::try_from(names.len()).unwrap().to_be_bytes().to_vec();
    for name in names {
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&[0; 19]);
    }
    msg(b'T', &body)
}

/// `DataRow`.
pub(crate) fn row(values: &[Option<&str>]) -> Vec<u8> {
    let mut body = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
    for value in values {
        match value {
            Some(text) => {
                body.extend_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes());
                body.extend_from_slice(text.as_bytes());
            }
            None => body.extend_from_slice(&[0xff; 4]),
        }
    }
    msg(b'D', &body)
}

pub(crate) fn complete(tag: &str) -> Vec<u8> {
    msg(b'C', &[tag.as_bytes(), b"\0"].concat())
}

pub(crate) fn ready() -> Vec<u8> {
    msg(b'Z', b"I")
}

pub(crate) fn error(code: &str, message: &str) -> Vec<u8> {
    fields(b'E', "ERROR", code, message)
}

pub(crate) fn fields(tag: u8, severity: &str, code: &str, message: &str) -> Vec<u8> {
    msg(
        tag,
        format!("S{severity}\0V{severity}\0C{code}\0M{message}\0\0").as_bytes(),
    )
}

pub(crate) fn copy_both() -> Vec<u8> {
    msg(b'W', b"\0\0\0")
}

pub(crate) fn copy_out() -> Vec<u8> {
    msg(b'H', b"\0\0\0")
}

pub(crate) fn copy_data(body: &[u8]) -> Vec<u8> {
    msg(b'd', body)
}

/// A WAL message.
pub(crate) fn wal(start: u64, data: &[u8]) -> Vec<u8> {
    let end = start.wrapping_add(data.len() as u64);
    copy_data(&[b"w", &start.to_be_bytes()[..], &end.to_be_bytes(), &[0; 8], data].concat())
}

/// A keepalive.
pub(crate) fn keepalive(end: u64, reply: bool) -> Vec<u8> {
    copy_data(&[b"k", &end.to_be_bytes()[..], &[0; 8], &[u8::from(reply)]].concat())
}

/// Server side of one connection.
pub(crate) struct Peer<S = UnixStream> {
    pub(crate) stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        // A client that has seen enough may be gone already.
        let _ = self.stream.write_all(bytes).await;
    }

    /// The next message of the client.
    pub(crate) async fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        let tag = self.stream.read_u8().await.ok()?;
        let len = self.stream.read_u32().await.ok()?;
        let mut body = vec![0; usize::try_from(len).unwrap() - 4];
        self.stream.read_exact(&mut body).await.ok()?;
        Some((tag, body))
    }

    /// The next query's text.
    pub(crate) async fn query(&mut self) -> String {
        let (tag, mut body) = self.receive().await.unwrap();
        assert_eq!(tag, b'Q');
        body.pop();
        String::from_utf8(body).unwrap()
    }

    pub(crate) async fn startup(&mut self) -> String {
        let len = self.stream.read_u32().await.unwrap();
        let mut body = vec![0; usize::try_from(len).unwrap() - 4];
        self.stream.read_exact(&mut body).await.unwrap();
        String::from_utf8_lossy(&body[4..]).replace('\0', " ")
    }

    /// Lets the client in as a server of this version.
    pub(crate) async fn welcome(&mut self, version: &str) -> String {
        let startup = self.startup().await;
        let parameter = msg(b'S', format!("server_version\0{version}\0").as_bytes());
        let hello = [
            msg(b'R', &[0; 4]),
            parameter,
            msg(b'K', &[0, 0, 0x12, 0x34, 0, 0, 0, 1]),
            ready(),
        ]
        .concat();
        self.send(&hello).await;
        startup
    }
}

/// A server that plays `script` to the first client.
pub(crate) struct Fake {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) task: JoinHandle<()>,
}

impl Fake {
    pub(crate) fn start<F, S>(script: S) -> Fake
    where
        S: FnOnce(Peer) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let listener = UnixListener::bind(path.join(".s.PGSQL.5432")).unwrap();
        let task = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            script(Peer { stream }).await;
        });
        Fake {
            _dir: dir,
            path,
            task,
        }
    }

    pub(crate) fn info(&self, extra: &str) -> ConnInfo {
        let text = format!("host={} user=hw {extra}", self.path.display());
        ConnInfo::resolve_in(Some(&text), &Environment::empty()).unwrap()
    }
}
