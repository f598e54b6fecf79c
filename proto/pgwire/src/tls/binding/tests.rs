use super::*;

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match u8::try_from(content.len()) {
        Ok(len) if len < 0x80 => out.push(len),
        _ => out
            .extend_from_slice(&[&[0x82][..], &u16::try_from(content.len()).unwrap().to_be_bytes()].concat()),
    }
    out.extend_from_slice(content);
    out
}

fn certificate(oid: &[u8], parameters: &[u8]) -> Vec<u8> {
    let tbs = der(SEQUENCE, &[0x55; 300]);
    let identifier = der(SEQUENCE, &[der(OBJECT_ID, oid), parameters.to_vec()].concat());
    der(SEQUENCE, &[tbs, identifier, der(0x03, &[0; 64])].concat())
}

fn hash_len(oid: &[u8], last: u8, parameters: &[u8]) -> Option<usize> {
    tls_server_end_point(&certificate(&[oid, &[last]].concat(), parameters)).map(|hash| hash.len())
}

#[test]
fn the_hash_follows_the_signature() {
    assert_eq!(hash_len(RSA, 4, b""), Some(32));
    assert_eq!(hash_len(RSA, 5, b"\x05\0"), Some(32));
    assert_eq!(hash_len(RSA, 11, b"\x05\0"), Some(32));
    assert_eq!(hash_len(RSA, 12, b""), Some(48));
    assert_eq!(hash_len(RSA, 13, b""), Some(64));
    assert_eq!(hash_len(ECDSA_SHA2, 3, b""), Some(48));
    let ed25519 = [0x2b, 0x65];
    assert_eq!(hash_len(&ed25519, 0x70, b""), None);
}

#[test]
fn pss_names_its_hash_in_the_parameters() {
    let hash = |last: u8| {
        let identifier = der(SEQUENCE, &der(OBJECT_ID, &[NIST_HASH, &[last]].concat()));
        der(SEQUENCE, &der(CONTEXT_0, &identifier))
    };
    assert_eq!(hash_len(RSA, 10, &hash(1)), Some(32));
    assert_eq!(hash_len(RSA, 10, &hash(3)), Some(64));
    assert_eq!(hash_len(RSA, 10, &der(SEQUENCE, b"")), Some(32));
    assert_eq!(hash_len(RSA, 10, b""), None);
}

#[test]
fn cut_certificates_have_no_binding() {
    let whole = certificate(&[RSA, &[11]].concat(), b"");
    for len in 0..whole.len() {
        assert_eq!(tls_server_end_point(&whole[..len]), None, "{len}");
    }
}
