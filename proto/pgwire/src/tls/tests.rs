use std::fs;

use super::*;
use crate::{ConnInfo, Environment};

/// A certificate and its key, as PEM.
fn pair() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["db.example".to_owned()]).unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

/// Of version 1, as `openssl x509 -req` 3.0 makes it without extensions.
const VERSION_1: &str = "\
-----BEGIN CERTIFICATE-----
MIIBJjCBzQIULOEUlyVMZ/gkT7TefqFbPsLWVz0wCgYIKoZIzj0EAwIwFTETMBEG
A1UEAwwKZGIuZXhhbXBsZTAgFw0yNjExMjIwNjI3MTdaGA8yMTI2MTAyOTA2Mjcx
N1owFTETMBEGA1UEAwwKZGIuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABMH+FUQUnLrkSzGott0cpAWlMs6VZQKMVUm5YAedZXkIi5ZGbU+yL6K0Kzcp
Jn5UtSQ4Nf895V/UQFl1U7sodjEwCgYIKoZIzj0EAwIDSAAwRQIgQbYBdUnjHePz
MDE7wpi+Pwg6jhsClucrACmQgidnHIkCIQD1yOc1VjZsQmxcithSHbg+jTIRX7aU
c+8qq2PeTCmNsw==
-----END CERTIFICATE-----
";

fn half(text: &str) -> &str {
    &text[..text.len() / 2]
}

/// Another program replaces the files while this one connects: the next attempt may find them whole.
#[test]
fn files_that_cannot_be_used_now_are_for_the_operator() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (cert, key) = pair();
    let (other_cert, other_key) = pair();
    let no_certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let whole = [("root.crt", &cert), ("client.crt", &cert), ("client.key", &key)];
    let text = format!(
        "host=db.example user=x sslmode=verify-full sslrootcert={0}/root.crt sslcert={0}/client.crt sslkey={0}/client.key",
        dir.path().display()
    );
    let tls = ConnInfo::resolve_in(Some(&text), &Environment::empty())
        .unwrap()
        .tls;
    let put_all = || {
        whole
            .iter()
            .for_each(|(name, text)| fs::write(path(name), text).unwrap())
    };

    for (name, content, said) in [
        ("root.crt", None, "sslrootcert"),
        ("root.crt", Some(""), "no PEM certificate"),
        ("root.crt", Some(half(&cert)), "sslrootcert"),
        (
            "root.crt",
            Some(no_certificate),
            "none of the trusted certificates",
        ),
        ("client.crt", None, "sslcert"),
        ("client.crt", Some(half(&cert)), "sslcert"),
        ("client.crt", Some(other_cert.as_str()), "sslkey"),
        ("client.key", None, "sslkey"),
        ("client.key", Some(half(&key)), "sslkey"),
        ("client.key", Some(other_key.as_str()), "sslcert"),
    ] {
        put_all();
        match content {
            Some(content) => fs::write(path(name), content).unwrap(),
            None => fs::remove_file(path(name)).unwrap(),
        }
        let error = client_config(&tls, "db.example").unwrap_err();
        assert_eq!(error.kind(), PgErrorKind::Operator, "{name}: {error}");
        assert!(error.to_string().contains(said), "{name}: {error}");
    }
    put_all();
    client_config(&tls, "db.example").unwrap();
}

#[test]
fn a_host_that_is_no_name_stays_wrong() {
    let info = ConnInfo::resolve_in(Some("host='no host' user=x"), &Environment::empty()).unwrap();
    let error = server_name(&info.hosts[0], "no host").unwrap_err();
    assert_eq!(error.kind(), PgErrorKind::Config, "{error}");
}

/// Whatever is checked of it, the library reads the certificate before its signature.
#[test]
fn a_certificate_of_version_1_is_called_that() {
    let certificate = CertificateDer::from_pem_slice(VERSION_1.as_bytes()).unwrap();
    let refused = rustls::server::ParsedCertificate::try_from(&certificate)
        .err()
        .unwrap();
    let error = std::io::Error::new(std::io::ErrorKind::InvalidData, refused);
    let told = handshake_error("db.example".to_owned(), &error);
    assert_eq!(told.kind(), PgErrorKind::Operator, "{told}");
    let text = told.to_string();
    assert!(
        text.contains("X.509 version 1") && text.contains("subjectAltName"),
        "{text}"
    );

    let (_, key) = pair();
    let dir = tempfile::tempdir().unwrap();
    let (cert_file, key_file) = (dir.path().join("client.crt"), dir.path().join("client.key"));
    fs::write(&cert_file, VERSION_1).unwrap();
    fs::write(&key_file, key).unwrap();
    let text = format!(
        "host=db.example user=x sslmode=require sslcert={} sslkey={}",
        cert_file.display(),
        key_file.display()
    );
    let tls = ConnInfo::resolve_in(Some(&text), &Environment::empty())
        .unwrap()
        .tls;
    let told = client_config(&tls, "db.example").unwrap_err();
    assert!(told.to_string().contains("X.509 version 1"), "{told}");
}
