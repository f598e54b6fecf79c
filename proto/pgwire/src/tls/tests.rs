use std::fs;

use super::*;
use crate::{ConnInfo, Environment};

/// A certificate and its key, as PEM.
fn pair() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["db.example".to_owned()]).unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

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
