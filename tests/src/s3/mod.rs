//! An S3 endpoint in memory, with the guarantees Highwater relies on and with faults on order.
//!
//! Signatures (V4), checksums and conditional writes are checked as S3 does. The objects live in
//! this process: nothing is durable, and nothing touches a disk. The endpoint runs on threads of
//! its own, so a test that blocks does not stop it.

mod backend;
mod faults;
mod multipart;
mod serve;
mod state;
mod tls;
mod versions;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub use faults::{Damage, Faults, Operation, Strike};
pub use serve::{Counters, KeyPair, Rights};
pub use state::{S3Snapshot, Stored};

use crate::process::Threads;
use serve::Endpoint;
use state::{Condition, Shared};

/// The access key id of the pair that may do everything; [`S3Server::access_key`] returns it.
const ACCESS_KEY: &str = "HIGHWATERTEST";
/// Its secret.
const SECRET_KEY: &str = "secret-of-the-tests";
/// A free port of the loopback interface.
const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// One pair with each kind of rights.
fn usual_keys() -> Vec<KeyPair> {
    let pair = |access: &str, secret: &str, rights| KeyPair {
        access_key: access.to_owned(),
        secret_key: secret.to_owned(),
        rights,
    };
    vec![
        pair(ACCESS_KEY, SECRET_KEY, Rights::All),
        pair("NODELETE", "secret-without-delete", Rights::NoDelete),
        pair("READONLY", "secret-to-read-only", Rights::ReadOnly),
        pair("DENIED", "secret-of-the-denied", Rights::Nothing),
    ]
}

/// A running endpoint. It stops when dropped.
pub struct S3Server {
    address: SocketAddr,
    keys: Vec<KeyPair>,
    shared: Shared,
    faults: Faults,
    counters: Arc<Counters>,
    /// The PEM of the authority to trust, where the endpoint speaks TLS.
    authority: Option<String>,
    stop: CancellationToken,
    /// Dropped after the signal to stop.
    _runtime: Threads,
}

impl std::fmt::Debug for S3Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl S3Server {
    /// An empty endpoint on a free port of the loopback interface.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn start() -> anyhow::Result<Self> {
        Self::serve(S3Snapshot::default()).await
    }

    /// An endpoint that holds what another one held when the snapshot was taken.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn serve(snapshot: S3Snapshot) -> anyhow::Result<Self> {
        Self::listen(ANYWHERE, usual_keys(), snapshot).await
    }

    /// An empty endpoint on a free port of the loopback interface that speaks TLS with a certificate for `names`, which
    /// need not be its own.
    ///
    /// # Errors
    /// When no port can be had or no certificate can be made.
    pub async fn start_tls(names: &[&str]) -> anyhow::Result<Self> {
        let tls = tls::acceptor(names)?;
        Self::accept(ANYWHERE, usual_keys(), S3Snapshot::default(), Some(tls)).await
    }

    /// An endpoint at `address` with the given key pairs, the first of which is the main one.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn listen(
        address: SocketAddr,
        keys: Vec<KeyPair>,
        snapshot: S3Snapshot,
    ) -> anyhow::Result<Self> {
        Self::accept(address, keys, snapshot, None).await
    }

    /// As [`S3Server::listen`], with TLS; [`S3Server::authority`] is to be trusted.
    ///
    /// # Errors
    /// When the address cannot be had or no certificate can be made.
    pub async fn listen_tls(
        address: SocketAddr,
        keys: Vec<KeyPair>,
        snapshot: S3Snapshot,
    ) -> anyhow::Result<Self> {
        Self::accept(address, keys, snapshot, Some(tls::acceptor(tls::HERE)?)).await
    }

    async fn accept(
        address: SocketAddr,
        keys: Vec<KeyPair>,
        snapshot: S3Snapshot,
        tls: Option<(TlsAcceptor, String)>,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(!keys.is_empty(), "an endpoint needs a key pair");
        let runtime = Threads::start(2, "s3-endpoint")?;
        let (shared, faults, counters) = (
            Shared::new(snapshot),
            Faults::default(),
            Arc::<Counters>::default(),
        );
        let (tls, authority) = tls.unzip();
        let stop = CancellationToken::new();
        let endpoint = Endpoint::new(
            shared.clone(),
            faults.clone(),
            Arc::clone(&counters),
            keys.clone(),
            tls,
        );
        let listening = runtime.spawn(TcpListener::bind(address)).await??;
        let address = listening.local_addr()?;
        runtime.spawn(endpoint.run(listening, stop.clone()));
        Ok(Self {
            address,
            keys,
            shared,
            faults,
            counters,
            authority,
            stop,
            _runtime: runtime,
        })
    }

    /// `http://127.0.0.1:<port>`, or `https` with TLS.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = if self.authority.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The PEM of the authority to trust; none without TLS.
    #[must_use]
    pub fn authority(&self) -> Option<&str> {
        self.authority.as_deref()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The access key id of the main pair, which may do everything.
    #[must_use]
    pub fn access_key(&self) -> &str {
        &self.keys[0].access_key
    }

    /// The secret of the main pair.
    #[must_use]
    pub fn secret_key(&self) -> &str {
        &self.keys[0].secret_key
    }

    /// The pair with exactly these rights.
    ///
    /// # Panics
    /// When the endpoint was started without such a pair.
    #[must_use]
    pub fn key_pair(&self, rights: Rights) -> &KeyPair {
        self.keys
            .iter()
            .find(|pair| pair.rights == rights)
            .expect("a key pair with these rights")
    }

    /// Makes a bucket; one that exists stays as it is.
    pub fn create_bucket(&self, name: &str) {
        self.shared.create_bucket(name);
    }

    /// From now on `bucket` keeps older versions, and a DELETE leaves a delete marker. Nobody has the right to delete versions.
    pub fn keep_versions(&self, bucket: &str) {
        self.shared.keep_versions(bucket);
    }

    /// The switchboard of faults.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// What was asked of it so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// A frozen copy of all buckets, taken at one moment; the bytes are shared, not copied.
    #[must_use]
    pub fn snapshot(&self) -> S3Snapshot {
        self.shared.snapshot()
    }

    /// The keys of a bucket, sorted.
    #[must_use]
    pub fn objects(&self, bucket: &str) -> Vec<String> {
        self.shared.snapshot().keys(bucket)
    }

    /// One object, straight from memory.
    #[must_use]
    pub fn get(&self, bucket: &str, key: &str) -> Option<Arc<Stored>> {
        self.shared.get(bucket, key).flatten()
    }

    /// Stores an object without asking anybody.
    ///
    /// # Panics
    /// When the bucket does not exist.
    pub fn put(&self, bucket: &str, key: &str, bytes: impl Into<Bytes>) {
        let put = self.shared.put(bucket, key, bytes.into(), &Condition::Always);
        assert!(put.is_ok(), "bucket {bucket} does not exist");
    }

    /// Removes an object and says whether it was there.
    pub fn delete(&self, bucket: &str, key: &str) -> bool {
        self.shared.delete(bucket, key).unwrap_or(false)
    }

    /// Flips one bit of a stored object in its middle, and says whether there was one to flip.
    pub fn corrupt(&self, bucket: &str, key: &str) -> bool {
        self.alter(bucket, key, |bytes| {
            let middle = bytes.len() / 2;
            if let Some(byte) = bytes.get_mut(middle) {
                *byte ^= 0x10;
            }
        })
    }

    /// Changes a stored object at will, and says whether it was there.
    pub fn alter(&self, bucket: &str, key: &str, change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let Some(stored) = self.get(bucket, key) else {
            return false;
        };
        let mut bytes = stored.bytes.to_vec();
        change(&mut bytes);
        self.put(bucket, key, bytes);
        true
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
