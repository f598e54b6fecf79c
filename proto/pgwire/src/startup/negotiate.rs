//! Agreeing on encryption before the first message.

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::socket;
use crate::conninfo::{ConnInfo, Host, HostSpec, SslNegotiation};
use crate::dial::Dialer;
use crate::error::{PgError, PgErrorKind};
use crate::stream::Transport;
use crate::tls;

/// What to do about TLS in one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encryption {
    Plain,
    TlsIfOffered,
    Tls,
}

/// An open transport.
pub(super) struct Channel {
    pub(super) transport: Transport,
    pub(super) encrypted: bool,
    /// Channel-binding data, if the server's certificate allows it.
    pub(super) binding: Option<Vec<u8>>,
}

pub(super) async fn open(
    info: &ConnInfo,
    spec: &HostSpec,
    encryption: Encryption,
) -> Result<Channel, PgError> {
    if let Some(dialer) = &info.dialer {
        return given(dialer, info, spec, encryption).await;
    }
    let name = match &spec.host {
        Host::Unix(dir) => {
            let stream = socket::unix(info, spec, dir).await?;
            return Ok(Channel {
                transport: Transport::Unix(stream),
                encrypted: false,
                binding: None,
            });
        }
        Host::Tcp(name) => name,
    };
    let mut tcp = socket::tcp(info, spec, name).await?;
    if encryption == Encryption::Plain || !server_agrees(info, spec, encryption, &mut tcp).await? {
        refuse_by_default(info, spec, &tcp)?;
        return Ok(Channel {
            transport: Transport::Tcp(tcp),
            encrypted: false,
            binding: None,
        });
    }
    let stream = tls::handshake(tcp, spec, &info.tls).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let binding = certificate.and_then(|certificate| tls::tls_server_end_point(certificate));
    Ok(Channel {
        transport: Transport::Tls(stream),
        encrypted: true,
        binding,
    })
}

/// libpq's default, `prefer`, goes on in clear where the server has no TLS, or somebody in between says so. Here that takes
/// a word of the operator's, unless the bytes never leave this machine.
fn refuse_by_default(info: &ConnInfo, spec: &HostSpec, tcp: &TcpStream) -> Result<(), PgError> {
    let stays_here = tcp
        .peer_addr()
        .is_ok_and(|peer| peer.ip().to_canonical().is_loopback());
    if info.tls.chosen || stays_here {
        return Ok(());
    }
    Err(PgError::Tls {
        target: spec.to_string(),
        message: "the server offers no TLS, and WAL, backups and passwords would travel to another machine in clear; turn ssl on \
                  there, or say sslmode=prefer (or PGSSLMODE) if the network is to be trusted"
            .to_owned(),
        kind: PgErrorKind::Operator,
    })
}

/// A stream that somebody else opens, and encrypts or not: nothing is promised about it here.
async fn given(
    dialer: &Dialer,
    info: &ConnInfo,
    spec: &HostSpec,
    encryption: Encryption,
) -> Result<Channel, PgError> {
    if encryption == Encryption::Tls {
        return Err(PgError::config(
            format!(
                "sslmode={} cannot be kept over a stream that was given",
                info.tls.mode
            ),
            "encrypt below the stream, and set sslmode=disable",
        ));
    }
    let stream = dialer.dial(spec).await.map_err(|source| PgError::Connect {
        target: spec.to_string(),
        source,
    })?;
    Ok(Channel {
        transport: Transport::Given(stream),
        encrypted: false,
        binding: None,
    })
}

/// Asks for TLS; `false` means going on without.
async fn server_agrees(
    info: &ConnInfo,
    spec: &HostSpec,
    encryption: Encryption,
    tcp: &mut TcpStream,
) -> Result<bool, PgError> {
    if info.tls.negotiation == SslNegotiation::Direct {
        return Ok(true);
    }
    match ask(tcp).await.map_err(|source| PgError::Connect {
        target: spec.to_string(),
        source,
    })? {
        b'S' => Ok(true),
        b'N' if encryption == Encryption::TlsIfOffered => Ok(false),
        b'N' => Err(PgError::Tls {
            target: spec.to_string(),
            message: format!(
                "the server does not offer TLS (ssl = off), and sslmode={} needs it",
                info.tls.mode
            ),
            kind: PgErrorKind::Operator,
        }),
        // The text of an error that came before TLS is not to be trusted, so it is not shown.
        b'E' => Err(PgError::Tls {
            target: spec.to_string(),
            message: "the server answered the request for TLS with an error; see its log".to_owned(),
            kind: PgErrorKind::Retry,
        }),
        other => Err(PgError::protocol(
            &format!("asking {spec} for TLS"),
            format!("unexpected answer {:?} (0x{other:02x})", char::from(other)),
        )),
    }
}

/// Reads exactly one byte: whatever an attacker put behind it in clear goes into the handshake, which
/// then fails.
async fn ask(tcp: &mut TcpStream) -> std::io::Result<u8> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    tcp.write_all(&request).await?;
    tcp.read_u8().await
}
