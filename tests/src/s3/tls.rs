//! TLS for the endpoint, with an authority of its own.

use std::sync::Arc;

use anyhow::Context;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

/// The names of an endpoint on this machine.
pub(super) const HERE: &[&str] = &["localhost", "127.0.0.1"];

/// What accepts connections in these names, and the PEM of the authority to trust.
///
/// # Errors
/// When no key or certificate can be made.
pub(super) fn acceptor(names: &[&str]) -> anyhow::Result<(TlsAcceptor, String)> {
    let mut params = CertificateParams::new(Vec::new())?;
    // Two names, because OpenSSL takes a certificate whose issuer has its own name for self-signed; and not that of
    // another endpoint's authority, which is another stranger then and not the right one with a wrong key.
    let common = format!("authority of the test endpoint {}", names.join(" "));
    params.distinguished_name.push(DnType::CommonName, common);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate = CertificateParams::new(names)?.signed_by(&key, &authority)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .context("the endpoint's certificate")?;
    Ok((TlsAcceptor::from(Arc::new(config)), authority.pem()))
}
