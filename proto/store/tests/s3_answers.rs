//! What the S3 store sends, and what it makes of answers that no S3 would give. The endpoint here is a
//! socket that answers every request with the same bytes.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, also in the functions that its cases share"
)]

mod canned;

use std::time::{Duration, SystemTime};

use aws_smithy_types::DateTime;
use aws_smithy_types::date_time::Format;
use canned::{Canned, header, http, s3_error};
use highwater_store::{ErrorKind, Object, Put, PutMode, RegionConfig, Store, StoreError, open, probe};

async fn all_calls(store: &dyn Store) -> Vec<StoreError> {
    vec![
        store
            .put("key", Object::new("content"), PutMode::Create)
            .await
            .unwrap_err(),
        store
            .put("key", Object::new("content"), PutMode::Overwrite)
            .await
            .unwrap_err(),
        store.get("key").await.unwrap_err(),
        store.get_range("key", 0..100).await.unwrap_err(),
        store.head("key").await.unwrap_err(),
        store.list("", None, 10).await.unwrap_err(),
    ]
}

#[tokio::test]
async fn an_upload_carries_our_checksum_and_no_hash_of_its_own() {
    let server = Canned::always("HTTP/1.1 200 OK\r\nETag: \"e\"\r\nContent-Length: 0\r\n\r\n").await;
    let mut config = server.config();
    config.storage_class = Some("STANDARD_IA".to_owned());
    let store = open(&config).await.unwrap();
    let put = store
        .put("a/key", Object::new("123456789"), PutMode::Create)
        .await
        .unwrap();
    assert_eq!(put, Put::Created);
    store
        .put("a/key", Object::new("123456789"), PutMode::Overwrite)
        .await
        .unwrap();
    let heads = server.heads.lock().unwrap().clone();
    let head = &heads[0];
    assert!(head.starts_with("PUT /bucket/prefix/a/key"), "{head}");
    assert_eq!(
        header(head, "x-amz-content-sha256"),
        Some("UNSIGNED-PAYLOAD"),
        "{head}"
    );
    assert_eq!(header(head, "x-amz-checksum-crc32"), Some("y/Q5Jg=="), "{head}");
    assert_eq!(header(head, "x-amz-storage-class"), Some("STANDARD_IA"), "{head}");
    assert_eq!(header(head, "if-none-match"), Some("*"), "{head}");
    assert_eq!(header(head, "content-encoding"), None, "{head}");
    assert_eq!(header(&heads[1], "if-none-match"), None, "{head}");
    let signed = header(head, "authorization").unwrap();
    assert!(
        signed.contains("x-amz-checksum-crc32") && signed.contains("if-none-match"),
        "{signed}"
    );
    assert!(
        header(head, "user-agent").unwrap().contains("app/highwater"),
        "{head}"
    );
}

#[tokio::test]
async fn a_web_page_is_no_answer() {
    for status in ["200 OK", "404 Not Found", "502 Bad Gateway", "302 Found"] {
        let server = Canned::start(move |head| {
            let body = if head.starts_with("HEAD") {
                ""
            } else {
                "<html><body>Please log in</body></html>"
            };
            http(status, "Content-Type: text/html\r\n", body)
        })
        .await;
        for error in all_calls(server.store().await.as_ref()).await {
            assert_eq!(error.kind(), ErrorKind::Retry, "{status}: {error}");
        }
    }
}

/// What is not S3's listing of versions says nothing of what was there.
#[tokio::test]
async fn a_listing_without_versions_is_no_past() {
    let listing = |inside: &str| {
        let begin = r#"<?xml version="1.0" encoding="UTF-8"?>"#;
        http(
            "200 OK",
            "Content-Type: application/xml\r\n",
            &format!("{begin}{inside}"),
        )
    };
    let endless = "<ListVersionsResult><IsTruncated>true</IsTruncated></ListVersionsResult>";
    let timeless = "<ListVersionsResult><Version><Key>prefix/key</Key></Version></ListVersionsResult>";
    let cases = [
        (
            http(
                "200 OK",
                "Content-Type: text/html\r\n",
                "<html>Please log in</html>",
            ),
            ErrorKind::Retry,
        ),
        (listing("<ListBucketResult></ListBucketResult>"), ErrorKind::Retry),
        (listing(endless), ErrorKind::Retry),
        (listing(timeless), ErrorKind::Retry),
        (
            s3_error("501 Not Implemented", "", "NotImplemented"),
            ErrorKind::Config,
        ),
        (s3_error("403 Forbidden", "", "AccessDenied"), ErrorKind::Operator),
        (
            listing("<ListVersionsResult></ListVersionsResult>"),
            ErrorKind::NotFound,
        ),
    ];
    for (answer, kind) in cases {
        let server = Canned::start({
            let answer = answer.clone();
            move |_| answer.clone()
        })
        .await;
        let mut config = server.config();
        config.as_of = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000));
        let store = open(&config).await.unwrap();
        for error in [
            store.get("key").await.unwrap_err(),
            store.get_range("key", 0..3).await.unwrap_err(),
            store.head("key").await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), kind, "{answer}: {error}");
        }
        let listed = store.list("", None, 10).await.map_err(|error| error.kind());
        match kind {
            ErrorKind::NotFound => assert!(listed.unwrap().entries.is_empty()),
            kind => assert_eq!(listed.unwrap_err(), kind, "{answer}"),
        }
    }
}

#[tokio::test]
async fn a_body_that_is_not_the_announced_one_is_refused() {
    // The CRC-32 of "123456789" announced for other bytes; a length that never comes; none at all.
    let cases = [
        (
            "HTTP/1.1 200 OK\r\nETag: \"e\"\r\nx-amz-checksum-crc32: y/Q5Jg==\r\nContent-Length: 9\r\n\r\n12345678X",
            ErrorKind::Corrupt,
        ),
        (
            "HTTP/1.1 200 OK\r\nETag: \"e\"\r\nConnection: close\r\n\r\n123456789",
            ErrorKind::Retry,
        ),
        (
            "HTTP/1.1 200 OK\r\nETag: \"e\"\r\nContent-Length: 9\r\n\r\n1234",
            ErrorKind::Retry,
        ),
    ];
    for (answer, kind) in cases {
        let server = Canned::always(answer).await;
        let mut config = server.config();
        config.operation_timeout = Duration::from_millis(700);
        let error = open(&config).await.unwrap().get("key").await.unwrap_err();
        assert_eq!(error.kind(), kind, "{answer}: {error}");
    }
    let right = "HTTP/1.1 200 OK\r\nETag: \"e\"\r\nx-amz-checksum-crc32: y/Q5Jg==\r\nContent-Length: 9\r\n\r\n123456789";
    assert_eq!(
        Canned::always(right)
            .await
            .store()
            .await
            .get("key")
            .await
            .unwrap(),
        "123456789"
    );
}

#[tokio::test]
async fn a_range_that_was_not_asked_for_is_refused() {
    let part = |range: &str, body: &str| {
        http(
            "206 Partial Content",
            &format!("ETag: \"e\"\r\nContent-Range: bytes {range}\r\n"),
            body,
        )
    };
    for (answer, expected) in [
        (part("2-4/10", "234"), Ok("234")),
        (part("2-3/4", "23"), Ok("23")),
        (part("2-3/10", "23"), Err(ErrorKind::Corrupt)),
        (part("0-2/10", "012"), Err(ErrorKind::Corrupt)),
        (http("200 OK", "ETag: \"e\"\r\n", "0123456789"), Ok("234")),
        (s3_error("416 Range Not Satisfiable", "", "InvalidRange"), Ok("")),
    ] {
        let shown = answer.clone();
        let server = Canned::start(move |_| answer.clone()).await;
        let got = server
            .store()
            .await
            .get_range("key", 2..5)
            .await
            .map_err(|error| error.kind());
        assert_eq!(got, expected.map(bytes::Bytes::from), "{shown}");
    }
}

#[tokio::test]
async fn a_bucket_elsewhere_is_named() {
    let answer = s3_error(
        "301 Moved Permanently",
        "x-amz-bucket-region: eu-central-1\r\n",
        "PermanentRedirect",
    );
    let server = Canned::start(move |_| answer.clone()).await;
    let error = server.store().await.get("key").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.next_step().contains("region = \"eu-central-1\""), "{error}");
}

#[tokio::test]
async fn codes_decide_over_the_wire() {
    for (status, code, kind) in [
        ("404 Not Found", "NoSuchKey", ErrorKind::NotFound),
        ("403 Forbidden", "AccessDenied", ErrorKind::Operator),
        ("403 Forbidden", "RequestTimeTooSkewed", ErrorKind::Retry),
        ("503 Slow Down", "SlowDown", ErrorKind::Retry),
        ("404 Not Found", "NoSuchBucket", ErrorKind::Config),
    ] {
        let answer = s3_error(status, "x-amz-request-id: REQ7\r\n", code);
        let server = Canned::start(move |_| answer.clone()).await;
        let error = server.store().await.get("key").await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(
            error.message().contains(code) && error.message().contains("REQ7"),
            "{error}"
        );
        assert_eq!(server.heads.lock().unwrap().len(), 1, "the SDK retried");
    }
}

/// The moment that a request was signed for, in seconds since 1970.
fn signed_for(head: &str) -> i64 {
    let date = header(head, "x-amz-date").unwrap();
    let [year, month, day] = [&date[..4], &date[4..6], &date[6..8]];
    let [hour, minute, second] = [&date[9..11], &date[11..13], &date[13..15]];
    let text = format!("{year}-{month}-{day}T{hour}:{minute}:{second}Z");
    DateTime::from_str(&text, Format::DateTime).unwrap().secs()
}

/// A store whose clock is `ahead` of ours by so many seconds, and that refuses what was not signed within a quarter of an
/// hour of it, as S3 does. `tells` whether its answers have a date.
async fn store_of_another_time(ahead: i64, tells: bool) -> Canned {
    #[expect(clippy::disallowed_methods, reason = "the SDK signs with the machine's clock")]
    let now = move || DateTime::from(SystemTime::now()).secs() + ahead;
    Canned::start(move |head| {
        let now = now();
        let date = DateTime::from_secs(now).fmt(Format::HttpDate).unwrap();
        let date = if tells {
            format!("Date: {date}\r\n")
        } else {
            String::new()
        };
        let accepted = (now - signed_for(head)).abs() <= 15 * 60;
        match (accepted, head.starts_with("HEAD")) {
            (true, true) => http("200 OK", &format!("{date}ETag: \"e\"\r\n"), ""),
            (true, false) => http("200 OK", &format!("{date}ETag: \"e\"\r\n"), "content"),
            (false, true) => http("403 Forbidden", &date, ""),
            (false, false) => s3_error("403 Forbidden", &date, "RequestTimeTooSkewed"),
        }
    })
    .await
}

/// An hour off in either direction: one request is refused, which says so, and its answer sets the clock that the next ones
/// are signed by. What has no body, and so cannot say why it was refused, is not taken for a question of rights.
#[tokio::test]
async fn fault_31_a_clock_that_s3_refuses_is_set_by_its_answer() {
    for ahead in [3600, -3600] {
        let server = store_of_another_time(ahead, true).await;
        let store = server.store().await;
        let error = store.get("key").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry, "{error}");
        assert!(error.message().contains("RequestTimeTooSkewed"), "{error}");
        assert!(error.next_step().contains("clocks differ"), "{error}");
        for _ in 0..2 {
            assert_eq!(store.get("key").await.unwrap(), "content");
        }
        let put = store.put("key", Object::new("content"), PutMode::Overwrite);
        assert_eq!(put.await.unwrap(), Put::Created);
        assert_eq!(server.heads.lock().unwrap().len(), 4, "the SDK retried");

        let store = server.store().await;
        let error = store.head("key").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry, "{error}");
        store.head("key").await.unwrap();
    }
    // Nothing tells how far off the clock is: it is said again and again, until somebody sets it.
    let store = store_of_another_time(3600, false).await.store().await;
    for _ in 0..2 {
        let error = store.get("key").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry, "{error}");
        assert!(error.next_step().contains("clocks differ"), "{error}");
    }
}

#[tokio::test]
async fn listings_that_cannot_be_trusted_are_refused() {
    let listing = |keys: &[&str]| {
        let contents: String = keys
            .iter()
            .map(|key| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>"))
            .collect();
        http(
            "200 OK",
            "",
            &format!("<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"),
        )
    };
    for (keys, kind) in [
        (vec!["prefix/b", "prefix/a"], ErrorKind::Config),
        (vec!["other/a"], ErrorKind::Corrupt),
        (vec!["prefix/a"], ErrorKind::Config),
    ] {
        let answer = listing(&keys);
        let server = Canned::start(move |_| answer.clone()).await;
        // The third one ignores where the listing was to begin.
        let error = server.store().await.list("", Some("a"), 10).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{keys:?}: {error}");
    }
    let answer = listing(&["prefix/a", "prefix/b"]);
    let server = Canned::start(move |_| answer.clone()).await;
    assert_eq!(
        server
            .store()
            .await
            .list("", None, 10)
            .await
            .unwrap()
            .entries
            .len(),
        2
    );
}

#[tokio::test]
async fn an_empty_page_that_claims_more_is_not_the_end() {
    let page = |rest: &str| {
        http(
            "200 OK",
            "",
            &format!("<ListBucketResult>{rest}</ListBucketResult>"),
        )
    };
    let server = Canned::start(move |head| {
        let token = |name: &str| head.contains(&format!("continuation-token={name}"));
        if token("second") {
            page("<IsTruncated>true</IsTruncated><Contents><Key>prefix/b</Key><Size>1</Size></Contents>")
        } else if token("first") {
            page("<IsTruncated>true</IsTruncated><NextContinuationToken>second</NextContinuationToken>")
        } else {
            page("<IsTruncated>true</IsTruncated><NextContinuationToken>first</NextContinuationToken>")
        }
    })
    .await;
    let found = server.store().await.list("", Some("a"), 1).await.unwrap();
    assert_eq!((found.entries.len(), found.more), (1, true));
    assert_eq!(found.entries[0].key, "b");

    for rest in [
        "<IsTruncated>true</IsTruncated>",
        "<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>",
    ] {
        let answer = page(rest);
        let server = Canned::start(move |_| answer.clone()).await;
        let error = server.store().await.list("", None, 1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry, "{error}");
    }
}

#[tokio::test]
async fn probe_finds_a_store_that_ignores_the_condition() {
    // Accepts every write and gives back the last one it should have had.
    let second = "highwater probe: this content must never be stored\n";
    let server = Canned::start(move |head| {
        if head.starts_with("PUT") {
            http("200 OK", "ETag: \"e\"\r\n", "")
        } else {
            http("200 OK", "ETag: \"e\"\r\n", second)
        }
    })
    .await;
    assert!(
        !probe(server.store().await.as_ref(), "")
            .await
            .unwrap()
            .conditional_create
    );
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused_at_once() {
    let good = Canned::always("").await.config();
    let broken: [fn(&mut RegionConfig); 5] = [
        |config| config.secret_access_key = None,
        |config| config.endpoint = Some("minio:9000".to_owned()),
        |config| config.attempt_timeout = Duration::from_millis(1),
        |config| config.ca_file = Some("/no/such/ca.pem".into()),
        |config| config.url = "s3://b".to_owned(),
    ];
    for spoil in broken {
        let mut config = good.clone();
        spoil(&mut config);
        let error = open(&config).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.region()),
            (ErrorKind::Config, "eu"),
            "{error}"
        );
    }
    assert!(!format!("{good:?}").contains("the secret"));
}
