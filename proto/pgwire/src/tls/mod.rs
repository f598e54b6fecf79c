//! TLS for a PostgreSQL connection: who is trusted, and the handshake.
//!
//! `sslmode` decides, as in libpq: with trusted roots the chain is always checked (so `require` acts as
//! `verify-ca`), the host name only with `verify-full`; without roots nothing is checked, and TLS only
//! keeps passive listeners out. Two differences: a certificate without subject alternative names is
//! not matched by its common name, and one of X.509 version 1 is not taken at all, because rustls does not.
//!
//! rustls with aws-lc-rs is the only provider. Certificate files are read at every connect, and may be caught in the middle of
//! being replaced: what is wrong with them is the operator's to mend, and no reason to give up.

mod binding;
mod verify;

use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::conninfo::{Host, HostSpec, SslMode, SslNegotiation, TlsOptions, TrustRoots};
use crate::error::{PgError, PgErrorKind};

pub(crate) use binding::tls_server_end_point;

/// The protocol's name in ALPN (PostgreSQL 17 and newer check it).
const ALPN: &[u8] = b"postgresql";

/// Does the handshake.
pub(crate) async fn handshake(
    tcp: TcpStream,
    spec: &HostSpec,
    options: &TlsOptions,
) -> Result<Box<TlsStream<TcpStream>>, PgError> {
    let target = spec.to_string();
    let config = client_config(options, &target)?;
    let name = server_name(spec, &target)?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .map_err(|error| handshake_error(target.clone(), &error))?;
    let negotiated = stream.get_ref().1.alpn_protocol();
    if options.negotiation == SslNegotiation::Direct && negotiated != Some(ALPN) {
        return Err(PgError::Tls {
            target,
            message: "the server did not agree on the protocol; sslnegotiation=direct needs PostgreSQL 17"
                .into(),
            kind: PgErrorKind::Operator,
        });
    }
    Ok(Box::new(stream))
}

fn server_name(spec: &HostSpec, target: &str) -> Result<ServerName<'static>, PgError> {
    let name = match &spec.host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(dir) => dir.display().to_string(),
    };
    // A trailing dot marks a fully qualified name for the resolver and is not part of it.
    let plain = name.strip_suffix('.').unwrap_or(&name).to_owned();
    ServerName::try_from(plain).map_err(|_| {
        let message = format!("{name:?} is neither a host name nor an address");
        not_set_up(target, message, PgErrorKind::Config)
    })
}

fn not_set_up(target: &str, message: String, kind: PgErrorKind) -> PgError {
    PgError::Tls {
        target: target.to_owned(),
        message,
        kind,
    }
}

/// What a file holds now, another one may hold in a moment.
fn unusable(target: &str, message: String) -> PgError {
    not_set_up(target, message, PgErrorKind::Operator)
}

fn client_config(options: &TlsOptions, target: &str) -> Result<ClientConfig, PgError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let failed = |error: rustls::Error| not_set_up(target, error.to_string(), PgErrorKind::Config);
    let mut versions = Vec::new();
    if options.tls13 {
        versions.push(&rustls::version::TLS13);
    }
    if options.tls12 {
        versions.push(&rustls::version::TLS12);
    }
    let verifier = verifier(options, &provider, target)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match (&options.cert, &options.key) {
        (Some(cert), Some(key)) => {
            let chain = certificates(cert, "sslcert", target)?;
            builder
                .with_client_auth_cert(chain, private_key(key, target)?)
                .map_err(|error| {
                    let (cert, key) = (cert.display(), key.display());
                    let advice = if is_version_1(&error) { REISSUE } else { "" };
                    unusable(
                        target,
                        format!("sslcert {cert} with sslkey {key}: {error}{advice}"),
                    )
                })?
        }
        _ => builder.with_no_client_auth(),
    };
    config.enable_sni = options.sni;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn verifier(
    options: &TlsOptions,
    provider: &Arc<CryptoProvider>,
    target: &str,
) -> Result<Arc<dyn rustls::client::danger::ServerCertVerifier>, PgError> {
    let roots = match &options.roots {
        TrustRoots::None => return Ok(Arc::new(verify::Unchecked::new(provider))),
        TrustRoots::System => system_roots(target)?,
        TrustRoots::File(path) => certificates(path, "sslrootcert", target)?,
    };
    let check_name = options.mode == SslMode::VerifyFull;
    let checked =
        verify::Checked::new(roots, check_name, provider).map_err(|message| unusable(target, message))?;
    Ok(Arc::new(checked))
}

fn system_roots(target: &str) -> Result<Vec<CertificateDer<'static>>, PgError> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let reasons: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        let message = format!(
            "the system has no trusted certificates ({}); install ca-certificates or give sslrootcert=FILE",
            reasons.join("; ")
        );
        return Err(unusable(target, message));
    }
    Ok(found.certs)
}

fn certificates(path: &Path, keyword: &str, target: &str) -> Result<Vec<CertificateDer<'static>>, PgError> {
    let failed = |what: String| unusable(target, format!("{keyword} file {}: {what}", path.display()));
    let list = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| failed(error.to_string()))?;
    match list.is_empty() {
        true => Err(failed("no PEM certificate in it".to_owned())),
        false => Ok(list),
    }
}

fn private_key(path: &Path, target: &str) -> Result<PrivateKeyDer<'static>, PgError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| {
        let message = format!(
            "sslkey file {}: {error} (encrypted keys are not supported)",
            path.display()
        );
        unusable(target, message)
    })
}

/// Certificate trouble waits for the operator; everything else may be the network.
fn handshake_error(target: String, error: &std::io::Error) -> PgError {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let (kind, advice) = match tls {
        Some(tls) if is_version_1(tls) => (PgErrorKind::Operator, REISSUE),
        Some(rustls::Error::InvalidCertificate(_)) => (
            PgErrorKind::Operator,
            "; check sslrootcert, the host name and the server's certificate",
        ),
        Some(rustls::Error::AlertReceived(_)) => (
            PgErrorKind::Operator,
            "; the server refused: check its log, sslcert and sslkey",
        ),
        Some(_) => (PgErrorKind::Protocol, ""),
        None => (PgErrorKind::Retry, ""),
    };
    PgError::Tls {
        target,
        message: format!("{error}{advice}"),
        kind,
    }
}

/// What `openssl x509 -req` before 3.2 makes without a file of extensions, as in PostgreSQL's manual.
const REISSUE: &str = "; the certificate is X.509 version 1, which this TLS library does not take: issue it again with extensions \
                       (openssl x509 -req -extfile FILE, with subjectAltName=DNS:the.host.name in FILE)";

fn is_version_1(error: &rustls::Error) -> bool {
    let rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) = error else {
        return false;
    };
    other.0.downcast_ref::<webpki::Error>() == Some(&webpki::Error::UnsupportedCertVersion)
}

#[cfg(test)]
mod tests;
