//! An endpoint that answers what a test tells it to.

use std::sync::{Arc, Mutex};

use highwater_store::{RegionConfig, Store, open};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Answers each request by `answer(head of the request)` and keeps the heads.
pub(crate) struct Canned {
    pub(crate) endpoint: String,
    pub(crate) heads: Arc<Mutex<Vec<String>>>,
}

impl Canned {
    pub(crate) async fn start(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (Arc::clone(&heads), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                tokio::spawn(async move { serve(socket, &seen, answer.as_ref()).await });
            }
        });
        Self { endpoint, heads }
    }

    pub(crate) async fn always(answer: &'static str) -> Self {
        Self::start(move |_| answer.to_owned()).await
    }

    pub(crate) fn config(&self) -> RegionConfig {
        let mut config = RegionConfig::new("eu", "s3://bucket/prefix");
        config.endpoint = Some(self.endpoint.clone());
        config.region = Some("eu-west-1".to_owned());
        config.access_key_id = Some("KEYID".to_owned());
        config.secret_access_key = Some("the secret".to_owned().into());
        config
    }

    pub(crate) async fn store(&self) -> Arc<dyn Store> {
        open(&self.config()).await.unwrap()
    }
}

async fn serve(
    mut socket: TcpStream,
    heads: &Mutex<Vec<String>>,
    answer: &(dyn Fn(&str) -> String + Send + Sync),
) {
    let mut pending = Vec::new();
    loop {
        let head_len = loop {
            if let Some(at) = pending.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if socket.read_buf(&mut pending).await.unwrap_or(0) == 0 {
                return;
            }
        };
        let head = String::from_utf8_lossy(&pending[..head_len]).into_owned();
        let body_len = header(&head, "content-length").map_or(0, |len| len.parse::<usize>().unwrap());
        while pending.len() < head_len + body_len {
            if socket.read_buf(&mut pending).await.unwrap_or(0) == 0 {
                return;
            }
        }
        pending.drain(..head_len + body_len);
        let reply = answer(&head);
        heads.lock().unwrap().push(head);
        if socket.write_all(reply.as_bytes()).await.is_err() {
            return;
        }
    }
}

pub(crate) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

pub(crate) fn http(status: &str, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub(crate) fn s3_error(status: &str, headers: &str, code: &str) -> String {
    http(
        status,
        headers,
        &format!("<Error><Code>{code}</Code><Message>told so</Message></Error>"),
    )
}
