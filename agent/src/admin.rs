//! The agent's own HTTP answers: is it alive, is it keeping its promise, how does it stand.
//!
//! Owns: the routes `/livez`, `/readyz`, `/status` and `/metrics`, the rule for "ready", and the small client
//! that `status` reads them with. Reads the shared [`State`] only: an answer never waits for PostgreSQL or a
//! region. There is no access control; the default address is loopback.
//! Does not own: the numbers, and what a monitoring system makes of them.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State as Extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use highwater_format::Time;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::error::{AgentError, Result};
use crate::lease::Moment;
use crate::metrics;
use crate::state::{Connection, RegionView, Snapshot, State};

/// The recovery point counts as breached when received WAL has waited this long to become durable. Far above
/// the second or two of normal work, so that one slow PUT alarms nobody; far below the 15 minutes that
/// operators commonly promise.
pub const BREACHED_AFTER: Duration = Duration::from_secs(60);
/// Version of the JSON document at `/status`.
const STATUS_VERSION: u32 = 1;
/// How long answers that are on their way may take when the agent ends.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// How long `status` waits for a running agent.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest answer that the client reads.
const CLIENT_LIMIT: u64 = 4 << 20;

/// What `/status` answers.
#[derive(Debug, Serialize)]
pub struct StatusDocument<'a> {
    version: u32,
    now: Time,
    ready: bool,
    reason: Option<String>,
    lag_bytes: Option<u64>,
    lag_seconds: f64,
    #[serde(flatten)]
    snapshot: &'a Snapshot,
}

/// Why the agent does not keep its promise now; `None` when it does.
pub(crate) fn not_ready(snapshot: &Snapshot, now: Moment) -> Option<String> {
    if let Some(given_up) = snapshot.given_up.as_ref().filter(|given_up| given_up.is_felt) {
        return Some(format!(
            "recovery point breached: {} ({}); the archive has not been current since",
            given_up.reason, given_up.at
        ));
    }
    match &snapshot.connection {
        Connection::Streaming | Connection::Throttled => {}
        Connection::Starting => return Some("not streaming yet: the archive is being read".into()),
        Connection::Reconnecting(why) => return Some(format!("not streaming, connecting again: {why}")),
        Connection::Stopping => return Some("stopping: the last bytes are being stored".into()),
        Connection::Stopped(why) => return Some(format!("stopped: {why}")),
    }
    let lag = metrics::lag_seconds(snapshot, now);
    if lag > BREACHED_AFTER.as_secs_f64() {
        let behind = snapshot
            .lag_of_durable()
            .map_or(String::new(), |bytes| format!(" ({bytes} bytes behind)"));
        let waiting = held_up_by(snapshot);
        return Some(format!(
            "recovery point breached: WAL has waited {lag:.0} s to become durable{behind}{waiting}"
        ));
    }
    too_few_whole(snapshot)
}

/// The regions that hold the durable position where it is, and why.
fn held_up_by(snapshot: &Snapshot) -> String {
    let late = snapshot
        .regions
        .iter()
        .filter(|view| (view.timeline, view.stored) <= (snapshot.durable_timeline, snapshot.durable));
    let names: Vec<String> = late
        .map(|view| match view.blocked.as_ref().or(view.last_error.as_ref()) {
            // A store's own error names its region.
            Some(error) if error.starts_with("region ") => error.clone(),
            Some(error) => format!("region {}: {error}", view.name),
            None => format!("region {} has not stored it yet", view.name),
        })
        .collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("; {}", names.join("; ")),
    }
}

/// A region from which something was removed does not count as holding what was acknowledged; the policy says how many must.
fn too_few_whole(snapshot: &Snapshot) -> Option<String> {
    let (lost, whole): (Vec<_>, Vec<_>) = snapshot.regions.iter().partition(|view| view.lacks.lost);
    if lost.is_empty() || whole.len() >= snapshot.needed {
        return None;
    }
    let says = |view: &&RegionView| {
        let detail = view.lacks.detail.as_deref().unwrap_or("has lost objects");
        format!("region {} {detail}", view.name)
    };
    let all: Vec<String> = lost.iter().map(says).collect();
    Some(format!(
        "fewer regions than the policy asks for hold everything that was acknowledged: {}",
        all.join("; ")
    ))
}

#[derive(Clone, Debug)]
struct Shared {
    state: State,
    clock: Clock,
}

/// The routes.
pub fn router(state: State, clock: Clock) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/metrics", get(scrape))
        .with_state(Shared { state, clock })
}

/// Opens the port; a port that is taken is a matter of configuration.
pub async fn bind(listen: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(listen)
        .await
        .map_err(|error| AgentError::Trouble {
            what: format!("admin.listen: cannot listen on {listen}: {error}"),
            next: "Another agent may use the port: choose another one in [admin] listen, or \"off\"".into(),
        })
}

/// Answers until `cancel`. A client that has sent half a request then, and no more, is not waited for.
pub async fn serve(
    listener: TcpListener,
    state: State,
    clock: Clock,
    cancel: CancellationToken,
) -> Result<()> {
    let serving =
        axum::serve(listener, router(state, clock)).with_graceful_shutdown(cancel.clone().cancelled_owned());
    let late = async {
        cancel.cancelled().await;
        tokio::time::sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        biased;
        ended = serving.into_future() => ended.map_err(|error| AgentError::Trouble {
            what: format!("the admin endpoint ended: {error}"),
            next: "Restart the agent to have metrics again".into(),
        }),
        () = late => Ok(()),
    }
}

async fn readyz(Extract(shared): Extract<Shared>) -> (StatusCode, String) {
    match not_ready(&shared.state.snapshot(), Moment::now()) {
        None => (StatusCode::OK, "ok\n".into()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn status(Extract(shared): Extract<Shared>) -> Response {
    let (snapshot, now) = (shared.state.snapshot(), shared.clock.stamp());
    let reason = not_ready(&snapshot, now.moment);
    let document = StatusDocument {
        version: STATUS_VERSION,
        now: now.time,
        ready: reason.is_none(),
        reason,
        lag_bytes: snapshot.lag_of_durable(),
        lag_seconds: metrics::lag_seconds(&snapshot, now.moment),
        snapshot: &snapshot,
    };
    match serde_json::to_string_pretty(&document) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text + "\n").into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn scrape(Extract(shared): Extract<Shared>) -> Response {
    let text = metrics::render(&shared.state.snapshot(), shared.clock.stamp());
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

/// One GET against a running agent's admin endpoint. The status code and the body.
pub async fn fetch(listen: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    // An agent that listens on every address is reached over loopback.
    let address = match listen {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from(([127, 0, 0, 1], v4.port())),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => {
            SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], v6.port()))
        }
        other => other,
    };
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        // HTTP/1.0: the answer ends with the connection and is never chunked.
        stream
            .write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())
            .await?;
        let mut answer = String::new();
        stream.take(CLIENT_LIMIT).read_to_string(&mut answer).await?;
        parse(&answer)
            .ok_or_else(|| std::io::Error::other("what answers there is not an agent's admin endpoint"))
    };
    timeout(CLIENT_TIMEOUT, exchange)
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let code = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((code, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use highwater_format::{Lsn, SystemId};

    use super::*;
    use crate::state::GivenUp;

    fn at(text: &str) -> Time {
        text.parse().unwrap()
    }

    /// An agent that has been in the state that `change` makes for so many seconds, and whose wall clock was set back meanwhile.
    async fn served(change: impl FnOnce(&mut Snapshot), seconds: u64) -> (SocketAddr, CancellationToken) {
        let state = State::new(["a".to_owned(), "b".to_owned()]);
        state.update(change);
        // Only here: what goes over a socket takes its time.
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(seconds)).await;
        tokio::time::resume();
        let (clock, cancel) = (
            Clock::held_at(at("2026-11-20T09:00:00Z")),
            CancellationToken::new(),
        );
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, state, clock, cancel.clone()));
        (address, cancel)
    }

    fn streaming(snapshot: &mut Snapshot) {
        snapshot.cluster = "orders".into();
        snapshot.system_id = Some(SystemId(7));
        snapshot.connection = Connection::Streaming;
        snapshot.received = Lsn(0x300_0100);
        snapshot.server_end = Lsn(0x300_0200);
        snapshot.durable = Lsn(0x300_0000);
        snapshot.current_at = Some(Clock::held_at(at("2026-11-20T12:00:00Z")).stamp());
    }

    #[tokio::test]
    async fn ready_while_the_recovery_point_is_kept() {
        let (address, cancel) = served(streaming, 50).await;
        assert_eq!(fetch(address, "/readyz").await.unwrap(), (200, "ok\n".into()));
        assert_eq!(fetch(address, "/livez").await.unwrap(), (200, "ok\n".into()));
        let (code, body) = fetch(address, "/status").await.unwrap();
        let document: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((code, document["version"].as_u64()), (200, Some(1)));
        assert_eq!(document["durable"], "0/3000000");
        assert_eq!(
            (&document["cluster"], &document["system_id"]),
            (&"orders".into(), &"7".into())
        );
        assert_eq!(document["lag_bytes"], 512);
        assert_eq!(document["ready"], true);
        assert_eq!(document["connection"]["state"], "streaming");
        assert_eq!(document["regions"][1]["name"], "b");
        let (code, text) = fetch(address, "/metrics").await.unwrap();
        assert_eq!(code, 200);
        assert!(text.contains("\nhighwater_lag_seconds 5"), "{text}");
        cancel.cancel();
    }

    #[tokio::test]
    async fn not_ready_says_why_and_stays_alive() {
        let (address, _cancel) = served(streaming, 61).await;
        let (code, text) = fetch(address, "/readyz").await.unwrap();
        assert_eq!(code, 503);
        assert!(text.contains("waited 6") && text.contains("512 bytes"), "{text}");

        let given_up = |snapshot: &mut Snapshot| {
            streaming(snapshot);
            snapshot.given_up = Some(GivenUp {
                times: 1,
                at: at("2026-11-20T11:59:00Z"),
                reason: "the slot was given up".into(),
                is_felt: true,
            });
        };
        let (address, _cancel) = served(given_up, 0).await;
        let (code, text) = fetch(address, "/readyz").await.unwrap();
        assert_eq!(code, 503);
        assert!(text.contains("given up"), "{text}");

        let gone = |snapshot: &mut Snapshot| snapshot.connection = Connection::Reconnecting("refused".into());
        let (address, _cancel) = served(gone, 0).await;
        let (code, text) = fetch(address, "/readyz").await.unwrap();
        assert_eq!(code, 503);
        assert!(text.contains("refused"), "{text}");
        assert_eq!(fetch(address, "/livez").await.unwrap().0, 200);
        assert_eq!(fetch(address, "/nothing").await.unwrap().0, 404);
    }

    #[tokio::test]
    async fn half_a_request_keeps_no_process() {
        let state = State::new(["a".to_owned()]);
        let (clock, cancel) = (
            Clock::held_at(at("2026-11-20T12:00:00Z")),
            CancellationToken::new(),
        );
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(serve(listener, state, clock, cancel.clone()));
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"GET /livez HT").await.unwrap();
        // What came after it is answered: so the half has been read.
        assert_eq!(fetch(address, "/livez").await.unwrap().0, 200);
        cancel.cancel();
        let ended = timeout(Duration::from_secs(10), serving).await;
        ended.expect("the endpoint ends").unwrap().unwrap();
        assert!(fetch(address, "/livez").await.is_err());
        drop(half);
    }

    #[tokio::test]
    async fn a_taken_port_and_a_silent_one_are_errors() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        assert!(
            bind(address)
                .await
                .unwrap_err()
                .to_string()
                .contains("admin.listen")
        );
        drop(listener);
        assert!(fetch(address, "/status").await.is_err());
    }
}
