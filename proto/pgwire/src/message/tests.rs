use proptest::prelude::*;

use super::*;

#[test]
fn rows_with_nulls_and_empty_values() {
    let body = Bytes::from_static(b"\0\x03\0\0\0\x01a\xff\xff\xff\xff\0\0\0\0");
    assert_eq!(
        row(body),
        Some(vec![Some(Bytes::from_static(b"a")), None, Some(Bytes::new())])
    );
}

#[test]
fn rows_that_claim_too_much_are_refused() {
    assert_eq!(row(Bytes::from_static(b"\0\x01\0\0\0\x02a")), None);
    assert_eq!(row(Bytes::from_static(b"\0\x01\xff\xff\xff\xfe")), None);
    assert_eq!(row(Bytes::from_static(b"\xff\xff")), None);
    assert_eq!(row(Bytes::from_static(b"\0")), None);
}

#[test]
fn column_names() {
    let mut body = b"\0\x01name\0".to_vec();
    body.extend_from_slice(&[0; 18]);
    assert_eq!(columns(Bytes::from(body.clone())), Some(vec!["name".to_owned()]));
    body.pop();
    assert_eq!(columns(Bytes::from(body)), None);
}

#[test]
fn missing_and_unusable_columns_name_themselves() {
    let row: Row = vec![Some(Bytes::from_static(b"x")), None];
    let error = parsed::<u32>(&row, 0, "timeline", "TEST")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("timeline") && error.contains("\"x\"") && error.contains("TEST"),
        "{error}"
    );
    assert!(text(&row, 1, "a", "TEST").is_err());
    assert!(text(&row, 9, "b", "TEST").is_err());
    assert!(optional_text(&vec![Some(Bytes::from_static(b"\xff"))], 0, "TEST").is_err());
}

proptest! {
    #[test]
    fn any_body_gives_an_answer(body in proptest::collection::vec(any::<u8>(), 0..100)) {
        let body = Bytes::from(body);
        let _ = row(body.clone());
        let _ = columns(body.clone());
        let _ = parameter(body.clone());
        let _ = crate::error::Notice::parse(&body);
        let _ = crate::tls::tls_server_end_point(&body);
    }
}
