//! An endpoint behind TLS whose authority only `ca_file` names.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, also in the functions that its cases share"
)]

use std::path::Path;
use std::sync::Arc;

use highwater_store::{ErrorKind, Object, Put, PutMode, RegionConfig, open};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

const FAR_OFF: i32 = 4000;

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Speaks TLS with a certificate for `localhost` that is good until the end of this year.
fn acceptor(authority: &CertifiedIssuer<'static, KeyPair>, until: i32) -> TlsAcceptor {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.not_after = rcgen::date_time_ymd(until, 12, 31);
    let certificate = params.signed_by(&key, authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

/// Reads one request and says that it was stored; the endpoint's URL.
async fn serve(acceptor: TlsAcceptor) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(socket).await else {
                    return;
                };
                let mut request = Vec::new();
                while !request.ends_with(b"whole content") {
                    if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let answer = b"HTTP/1.1 200 OK\r\nETag: \"e\"\r\nContent-Length: 0\r\n\r\n";
                stream.write_all(answer).await.unwrap();
                stream.flush().await.unwrap();
                let _ = stream.read_buf(&mut request).await;
            });
        }
    });
    format!("https://localhost:{port}")
}

fn config(endpoint: &str, ca_file: &Path) -> RegionConfig {
    let mut config = RegionConfig::new("eu", "s3://bucket/prefix");
    config.endpoint = Some(endpoint.to_owned());
    config.access_key_id = Some("KEYID".to_owned());
    config.secret_access_key = Some("secret".to_owned().into());
    config.ca_file = Some(ca_file.to_owned());
    config
}

#[tokio::test]
async fn the_named_authority_is_trusted_and_no_other() {
    let (ours, other) = (authority(), authority());
    let endpoint = serve(acceptor(&ours, FAR_OFF)).await;
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("ours.pem"), dir.path().join("other.pem"));
    std::fs::write(&good, ours.pem()).unwrap();
    std::fs::write(&bad, other.pem()).unwrap();

    let store = open(&config(&endpoint, &good)).await.unwrap();
    let put = store
        .put("key", Object::new("whole content"), PutMode::Create)
        .await;
    assert_eq!(put.unwrap(), Put::Created);

    let store = open(&config(&endpoint, &bad)).await.unwrap();
    let error = store
        .put("key", Object::new("whole content"), PutMode::Create)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Operator, "{error:?}");
    assert!(error.next_step().contains("ca_file"), "{error}");
}

#[tokio::test]
async fn a_certificate_whose_time_is_over_is_refused() {
    let ours = authority();
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ours.pem");
    std::fs::write(&ca, ours.pem()).unwrap();
    for (until, trusted) in [(FAR_OFF, true), (2020, false)] {
        let endpoint = serve(acceptor(&ours, until)).await;
        let store = open(&config(&endpoint, &ca)).await.unwrap();
        let put = store
            .put("key", Object::new("whole content"), PutMode::Create)
            .await;
        assert_eq!(put.is_ok(), trusted, "{until}: {put:?}");
        if let Err(error) = put {
            assert_eq!(error.kind(), ErrorKind::Operator, "{error:?}");
            assert!(error.to_string().to_lowercase().contains("expired"), "{error}");
        }
    }
}
