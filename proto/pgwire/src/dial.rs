//! A way to a server that is not a socket of this crate's making.
//!
//! [`ConnInfo::with_dialer`](crate::ConnInfo::with_dialer) puts a [`Dialer`] in the place of name resolution,
//! sockets and TLS: every connection that is opened with these parameters then speaks the protocol over
//! the stream that the dialer gives. For tunnels, proxies and simulated servers.
//!
//! Does not own what is said over the stream: login, the time limit of each try and the order of hosts stay the
//! same. This crate does not encrypt a given stream, so `sslmode=require` and stronger refuse one.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::conninfo::HostSpec;

/// What a connection needs of its transport.
pub trait ByteStream: AsyncRead + AsyncWrite + fmt::Debug + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + fmt::Debug + Send + Sync + Unpin> ByteStream for T {}

/// A stream that is being opened.
pub type Dialing = Pin<Box<dyn Future<Output = io::Result<Box<dyn ByteStream>>> + Send>>;

/// Opens streams to servers. Cheap to clone.
#[derive(Clone)]
pub struct Dialer(Arc<dyn Fn(&HostSpec) -> Dialing + Send + Sync>);

impl Dialer {
    /// Opens streams as `dial` does.
    pub fn new(dial: impl Fn(&HostSpec) -> Dialing + Send + Sync + 'static) -> Dialer {
        Dialer(Arc::new(dial))
    }

    pub(crate) fn dial(&self, spec: &HostSpec) -> Dialing {
        (self.0)(spec)
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer")
    }
}
