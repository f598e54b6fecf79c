//! Opening the socket: name resolution, options, peer check.

use std::net::SocketAddr;
use std::path::Path;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UnixStream};

use crate::conninfo::{ConnInfo, HostSpec};
use crate::error::{PgError, PgErrorKind};

pub(super) async fn unix(info: &ConnInfo, spec: &HostSpec, dir: &Path) -> Result<UnixStream, PgError> {
    let path = dir.join(format!(".s.PGSQL.{}", spec.port));
    let stream = UnixStream::connect(&path)
        .await
        .map_err(|source| PgError::Connect {
            target: path.display().to_string(),
            source,
        })?;
    if let Some(wanted) = &info.require_peer {
        check_peer(&stream, wanted, spec, info)?;
    }
    Ok(stream)
}

fn check_peer(stream: &UnixStream, wanted: &str, spec: &HostSpec, info: &ConnInfo) -> Result<(), PgError> {
    let uid = stream.peer_cred().ok().map(|credentials| credentials.uid());
    let name = uid
        .and_then(|uid| {
            nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid))
                .ok()
                .flatten()
        })
        .map(|user| user.name);
    if name.as_deref() == Some(wanted) {
        return Ok(());
    }
    Err(PgError::Auth {
        target: spec.to_string(),
        user: info.user.clone(),
        message: format!(
            "requirepeer asks for a server run by {wanted:?}, this one is run by {}",
            name.unwrap_or_else(|| "an unknown user".to_owned())
        ),
        kind: PgErrorKind::Operator,
    })
}

pub(super) async fn tcp(info: &ConnInfo, spec: &HostSpec, name: &str) -> Result<TcpStream, PgError> {
    let failed = |source| PgError::Connect {
        target: spec.to_string(),
        source,
    };
    let stream = match spec.hostaddr {
        Some(address) => TcpStream::connect(SocketAddr::new(address, spec.port)).await,
        // Tries the name's addresses in the resolver's order.
        None => TcpStream::connect((name, spec.port)).await,
    }
    .map_err(failed)?;
    set_options(&stream, info).map_err(failed)?;
    Ok(stream)
}

fn set_options(stream: &TcpStream, info: &ConnInfo) -> std::io::Result<()> {
    // Status messages are small and must not wait for each other.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_keepalive(info.keepalives.enabled)?;
    if info.keepalives.enabled {
        socket.set_tcp_keepalive(&keepalive(info))?;
    }
    #[cfg(target_os = "linux")]
    if let Some(timeout) = info.tcp_user_timeout {
        socket.set_tcp_user_timeout(Some(timeout))?;
    }
    Ok(())
}

fn keepalive(info: &ConnInfo) -> TcpKeepalive {
    let mut keepalive = TcpKeepalive::new();
    if let Some(idle) = info.keepalives.idle {
        keepalive = keepalive.with_time(idle);
    }
    if let Some(interval) = info.keepalives.interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(count) = info.keepalives.count {
        keepalive = keepalive.with_retries(count);
    }
    keepalive
}
