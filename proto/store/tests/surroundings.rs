//! What the S3 store takes from the surroundings of its process. Each test runs itself once more, in a process whose
//! environment it chooses.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, also in the functions that its cases share"
)]

#[expect(dead_code, reason = "another test uses the rest")]
mod canned;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use canned::{Canned, http, s3_error};
use highwater_store::{ErrorKind, Object, Put, PutMode, RegionConfig, Store, open};

/// Set in the process that a test starts.
const ALONE: &str = "HIGHWATER_TEST_ALONE";

const CREDENTIALS: &str = "AWS_SHARED_CREDENTIALS_FILE";
const METADATA_DISABLED: &str = "AWS_EC2_METADATA_DISABLED";

fn is_alone() -> bool {
    std::env::var_os(ALONE).is_some()
}

/// Runs the test of this name with nothing of AWS in its surroundings but these.
fn run_alone(test: &str, surroundings: &[(&str, &str)]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    command.env(ALONE, "1").env("HOME", "/nonexistent");
    let output = command.envs(surroundings.iter().copied()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn keys(id: &str) -> String {
    format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = secret\n")
}

async fn put(store: &dyn Store) -> Result<Put, ErrorKind> {
    let put = store.put("key", Object::new("x"), PutMode::Create).await;
    put.map_err(|error| error.kind())
}

async fn a_minute_passes() {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(61)).await;
    tokio::time::resume();
}

#[tokio::test]
async fn credentials_that_were_replaced_are_read_without_a_restart() {
    if !is_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("credentials");
        fs::write(&file, keys("OLD")).unwrap();
        let surroundings = [(CREDENTIALS, file.to_str().unwrap()), (METADATA_DISABLED, "true")];
        return run_alone(
            "credentials_that_were_replaced_are_read_without_a_restart",
            &surroundings,
        );
    }
    let file = PathBuf::from(std::env::var_os(CREDENTIALS).unwrap());
    let server = Canned::start(|head| match head.contains("Credential=NEW/") {
        true => http("200 OK", "ETag: \"e\"\r\n", ""),
        false => s3_error("403 Forbidden", "", "InvalidAccessKeyId"),
    })
    .await;
    let mut config = RegionConfig::new("eu", "s3://bucket/prefix");
    config.endpoint = Some(server.endpoint.clone());
    let store = open(&config).await.unwrap();
    let refused = Err(ErrorKind::Operator);
    assert_eq!(put(store.as_ref()).await, refused);

    // Not with every call that is refused: each reading may ask other services.
    fs::write(&file, keys("NEW")).unwrap();
    for _ in 0..3 {
        assert_eq!(put(store.as_ref()).await, refused);
    }

    // What is only half there takes the place of nothing.
    fs::write(&file, "[default]\naws_access_key_id = NE").unwrap();
    a_minute_passes().await;
    for _ in 0..3 {
        assert_eq!(put(store.as_ref()).await, refused);
    }

    fs::write(&file, keys("NEW")).unwrap();
    a_minute_passes().await;
    assert_eq!(put(store.as_ref()).await, refused, "this answer was the reason");
    assert_eq!(put(store.as_ref()).await, Ok(Put::Created));
}

/// The machine's metadata service may be away for a moment; that nobody says which region it is may not pass.
#[tokio::test]
async fn a_metadata_service_that_is_away_is_no_wrong_configuration() {
    if !is_alone() {
        let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", gone.local_addr().unwrap());
        drop(gone);
        for disabled in ["false", "true"] {
            let surroundings = [
                ("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint.as_str()),
                (METADATA_DISABLED, disabled),
            ];
            run_alone(
                "a_metadata_service_that_is_away_is_no_wrong_configuration",
                &surroundings,
            );
        }
        return;
    }
    let kind = match std::env::var(METADATA_DISABLED).unwrap() == "true" {
        true => ErrorKind::Config,
        false => ErrorKind::Retry,
    };
    let error = open(&RegionConfig::new("eu", "s3://bucket/prefix"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.next_step().contains("AWS_REGION"), "{error}");
}
