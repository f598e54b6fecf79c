//! A stand-alone S3 endpoint in memory, for the demo and the benchmarks. Not for keeping anything.

use std::io::Write;
use std::net::SocketAddr;

use anyhow::Context;
use clap::Parser;
use highwater_tests::s3::{KeyPair, Rights, S3Server, S3Snapshot};
use tokio::signal::unix::{SignalKind, signal};

/// Serves S3 from memory until it is told to stop; what it held is then gone.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where to listen; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Buckets to begin with
    #[arg(long = "bucket", default_value = "archive")]
    buckets: Vec<String>,
    /// Access key id
    #[arg(long, env = "AWS_ACCESS_KEY_ID", default_value = "highwater")]
    key: String,
    /// Secret access key
    #[arg(
        long,
        env = "AWS_SECRET_ACCESS_KEY",
        default_value = "highwater-secret",
        hide_env_values = true
    )]
    secret: String,
    /// Milliseconds that every request takes longer
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let pair = KeyPair {
        access_key: arguments.key,
        secret_key: arguments.secret,
        rights: Rights::All,
    };
    let server = S3Server::listen(arguments.listen, vec![pair], S3Snapshot::default())
        .await
        .with_context(|| format!("cannot listen at {}", arguments.listen))?;
    for bucket in &arguments.buckets {
        server.create_bucket(bucket);
    }
    if arguments.delay_ms > 0 {
        server
            .faults()
            .delay(Some(std::time::Duration::from_millis(arguments.delay_ms)));
    }
    let mut out = std::io::stdout();
    writeln!(out, "{}", server.endpoint())?;
    out.flush()?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    Ok(())
}
