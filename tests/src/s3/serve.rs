//! The endpoint's HTTP side: connections, faults around each request, counters, access rights.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, S3Result, s3_error};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::backend::Backend;
use super::faults::{Damage, Faults, Operation, Verdict};
use super::multipart::Uploads;
use super::state::Shared;

/// What a key pair may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Everything.
    All,
    /// All but deleting: what the agent needs.
    NoDelete,
    /// Reading and listing: what a restore needs.
    ReadOnly,
    /// Nothing: every request is answered with 403.
    Nothing,
}

/// A key pair of the endpoint. Beside these, key ids `UNTIL<seconds since 1970>` with the main pair's secret
/// may do everything until that time, as temporary credentials do.
#[derive(Clone, Debug)]
pub struct KeyPair {
    /// The access key id.
    pub access_key: String,
    /// The secret.
    pub secret_key: String,
    /// What it may do.
    pub rights: Rights,
}

#[derive(Clone, Debug)]
struct Keys(Arc<Vec<KeyPair>>);

/// A key id with this prefix and a time in seconds since 1970 is valid until then.
const TEMPORARY: &str = "UNTIL";

/// When a temporary key id ends.
fn ends(access_key: &str) -> Option<i64> {
    access_key.strip_prefix(TEMPORARY)?.parse().ok()
}

fn expired(access_key: &str) -> bool {
    let now = crate::clock::unix_micros(crate::clock::now()) / 1_000_000;
    ends(access_key).is_some_and(|end| end <= now)
}

impl Keys {
    fn find(&self, access_key: &str) -> Option<&KeyPair> {
        self.0.iter().find(|pair| pair.access_key == access_key)
    }
}

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        if let Some((_, main)) = ends(access_key).zip(self.0.first()) {
            return Ok(SecretKey::from(main.secret_key.as_str()));
        }
        match self.find(access_key) {
            Some(pair) => Ok(SecretKey::from(pair.secret_key.as_str())),
            None => Err(s3_error!(
                InvalidAccessKeyId,
                "The access key id you provided does not exist in our records"
            )),
        }
    }
}

#[async_trait::async_trait]
impl S3Access for Keys {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        let key = context.credentials().map(|who| who.access_key.clone());
        let key = key.unwrap_or_default();
        if expired(&key) {
            return Err(s3_error!(ExpiredToken, "The provided token has expired"));
        }
        let rights = match ends(&key) {
            Some(_) => Some(Rights::All),
            None => self.find(&key).map(|pair| pair.rights),
        };
        let operation = context.s3_op().name();
        let reads =
            operation.starts_with("Get") || operation.starts_with("Head") || operation.starts_with("List");
        let allowed = match rights {
            Some(Rights::All) => true,
            Some(Rights::NoDelete) => !operation.starts_with("Delete"),
            Some(Rights::ReadOnly) => reads,
            Some(Rights::Nothing) | None => false,
        };
        if allowed {
            Ok(())
        } else {
            Err(s3_error!(AccessDenied, "Access Denied"))
        }
    }
}

/// Requests and bytes since the start of the endpoint.
#[derive(Debug, Default)]
pub struct Counters {
    gets: AtomicU64,
    heads: AtomicU64,
    puts: AtomicU64,
    lists: AtomicU64,
    deletes: AtomicU64,
    others: AtomicU64,
    failed: AtomicU64,
    /// How often each error code was answered.
    codes: Mutex<BTreeMap<String, u64>>,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

impl Counters {
    fn of(&self, operation: Operation) -> &AtomicU64 {
        match operation {
            Operation::Get => &self.gets,
            Operation::Head => &self.heads,
            Operation::Put => &self.puts,
            Operation::List => &self.lists,
            Operation::Delete => &self.deletes,
            Operation::Other => &self.others,
        }
    }

    /// Requests of one kind, failed ones included.
    #[must_use]
    pub fn requests(&self, operation: Operation) -> u64 {
        self.of(operation).load(Ordering::Relaxed)
    }

    /// Requests of all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        let all = [
            &self.gets,
            &self.heads,
            &self.puts,
            &self.lists,
            &self.deletes,
            &self.others,
        ];
        all.iter().map(|counter| counter.load(Ordering::Relaxed)).sum()
    }

    /// Requests answered with a status of 400 or more, by a fault or in earnest.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Requests answered with this error code, by a fault or in earnest.
    #[must_use]
    pub fn answered(&self, code: &str) -> u64 {
        let codes = self.codes.lock().unwrap_or_else(PoisonError::into_inner);
        codes.get(code).copied().unwrap_or(0)
    }

    /// Counts an error; its document, which is small, is read for that.
    async fn count_error(&self, response: Response<Body>) -> Result<Response<Body>, Broken> {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.map_err(|_| Broken)?.to_bytes();
        let text = String::from_utf8_lossy(&bytes);
        let code = text
            .split("<Code>")
            .nth(1)
            .and_then(|rest| rest.split('<').next());
        if let Some(code) = code {
            let mut codes = self.codes.lock().unwrap_or_else(PoisonError::into_inner);
            *codes.entry(code.to_owned()).or_default() += 1;
        }
        drop(text);
        Ok(Response::from_parts(parts, Body::from(bytes)))
    }

    /// Bytes of request bodies, as announced.
    #[must_use]
    pub fn bytes_in(&self) -> u64 {
        self.bytes_in.load(Ordering::Relaxed)
    }

    /// Bytes of response bodies, as announced.
    #[must_use]
    pub fn bytes_out(&self) -> u64 {
        self.bytes_out.load(Ordering::Relaxed)
    }
}

/// Everything a connection needs; clones share it.
#[derive(Clone)]
pub(super) struct Endpoint {
    service: S3Service,
    faults: Faults,
    counters: Arc<Counters>,
    tls: Option<TlsAcceptor>,
}

/// A reply that will not be sent: hyper closes the connection instead.
#[derive(Debug)]
struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("connection broken on order of the test")
    }
}

impl std::error::Error for Broken {}

impl Endpoint {
    pub(super) fn new(
        shared: Shared,
        faults: Faults,
        counters: Arc<Counters>,
        keys: Vec<KeyPair>,
        tls: Option<TlsAcceptor>,
    ) -> Self {
        let keys = Keys(Arc::new(keys));
        let mut builder = S3ServiceBuilder::new(Backend {
            shared,
            faults: faults.clone(),
            uploads: Uploads::default(),
        });
        builder.set_auth(keys.clone());
        builder.set_access(keys);
        Self {
            service: builder.build(),
            faults,
            counters,
            tls,
        }
    }

    /// Accepts connections until `stop`.
    pub(super) async fn run(self, listener: TcpListener, stop: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((socket, _)) = accepted else { continue };
            if self.faults.refusing() {
                reset(&socket);
                continue;
            }
            let (endpoint, stop) = (self.clone(), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = endpoint.connection(socket) => {}
                }
            });
        }
    }

    async fn connection(self, socket: TcpStream) {
        drop(socket.set_nodelay(true));
        match self.tls.clone() {
            None => self.serve(socket).await,
            Some(tls) => match tls.accept(socket).await {
                Ok(stream) => self.serve(stream).await,
                Err(error) => tracing::debug!(%error, "no TLS"),
            },
        }
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = service_fn(move |request| {
            let endpoint = self.clone();
            async move { endpoint.request(request).await }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .max_buf_size(1 << 20)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "connection ended");
        }
    }

    async fn request(&self, request: Request<Incoming>) -> Result<Response<Body>, Broken> {
        let operation = Operation::of(
            request.method(),
            request.uri().path(),
            request.uri().query().unwrap_or_default(),
        );
        let verdict = self.faults.verdict(operation, request.uri().path());
        if verdict.refuse {
            return Err(Broken);
        }
        self.faults.until_thawed().await;
        if let Some(delay) = verdict.delay {
            tokio::time::sleep(delay).await;
        }
        self.counters.of(operation).fetch_add(1, Ordering::Relaxed);
        self.counters
            .bytes_in
            .fetch_add(request.body().size_hint().exact().unwrap_or(0), Ordering::Relaxed);
        if verdict.hold_before {
            self.faults.strikes();
            std::future::pending::<()>().await;
        }
        let response = match verdict.status {
            Some(status) => scripted_error(request, status).await,
            None if verdict.archived => {
                let message = "The operation is not valid for the object's storage class";
                error_document(StatusCode::FORBIDDEN, "InvalidObjectState", message)
            }
            None => self
                .service
                .call(request.map(Body::from))
                .await
                .map_err(|_| Broken)?,
        };
        let response = match response.status().as_u16() {
            400.. => self.counters.count_error(response).await?,
            _ => response,
        };
        self.counters.bytes_out.fetch_add(
            HttpBody::size_hint(response.body()).exact().unwrap_or(0),
            Ordering::Relaxed,
        );
        if verdict.hold_after {
            self.faults.strikes();
            std::future::pending::<()>().await;
        }
        if verdict.lose_reply {
            self.faults.strikes();
        }
        finish(response, verdict).await
    }
}

fn reset(socket: &TcpStream) {
    drop(socket.set_zero_linger());
}

async fn finish(response: Response<Body>, verdict: Verdict) -> Result<Response<Body>, Broken> {
    if verdict.lose_reply {
        return Err(Broken);
    }
    match verdict.damage.filter(|_| response.status().is_success()) {
        Some(damage) => spoil(response, damage).await,
        None => Ok(response),
    }
}

/// The error document that S3 sends with a status.
async fn scripted_error(request: Request<Incoming>, status: u16) -> Response<Body> {
    drop(request.into_body().collect().await);
    let (code, message) = match status {
        400 => ("InvalidRequest", "The request is invalid"),
        403 => ("AccessDenied", "Access Denied"),
        404 => ("NoSuchKey", "The specified key does not exist"),
        409 => (
            "ConditionalRequestConflict",
            "The conditional request cannot succeed due to a conflicting operation",
        ),
        412 => (
            "PreconditionFailed",
            "At least one of the preconditions did not hold",
        ),
        503 => ("SlowDown", "Please reduce your request rate"),
        _ => (
            "InternalError",
            "We encountered an internal error. Please try again.",
        ),
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    error_document(status, code, message)
}

fn error_document(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let document = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    );
    let mut response = Response::new(Body::from(document));
    *response.status_mut() = status;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/xml"),
    );
    response
}

async fn spoil(response: Response<Body>, damage: Damage) -> Result<Response<Body>, Broken> {
    let (mut parts, body) = response.into_parts();
    let bytes = body.collect().await.map_err(|_| Broken)?.to_bytes();
    let whole = bytes.len();
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(whole);
    let body = match damage {
        Damage::FlipAt(offset) => {
            let mut flipped = bytes.to_vec();
            if let Some(byte) = flipped.get_mut(at(offset)) {
                *byte ^= 1;
            }
            Body::from(flipped)
        }
        Damage::Shorten(keep) => {
            let kept = bytes.slice(..at(keep));
            parts
                .headers
                .insert(http::header::CONTENT_LENGTH, http::HeaderValue::from(kept.len()));
            parts.headers.remove("x-amz-checksum-crc32");
            Body::from(kept)
        }
        Damage::CutAfter(keep) => Body::http_body(CutBody {
            left: Some(bytes.slice(..at(keep))),
            whole,
        }),
    };
    Ok(Response::from_parts(parts, body))
}

/// A body that announces more than it gives, and then breaks.
struct CutBody {
    left: Option<Bytes>,
    whole: usize,
}

impl HttpBody for CutBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        Poll::Ready(Some(match self.left.take() {
            Some(bytes) => Ok(Frame::data(bytes)),
            None => Err(std::io::Error::other("cut on order of the test")),
        }))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.whole as u64)
    }
}
