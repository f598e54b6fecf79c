//! A stand-alone S3 endpoint in memory, for the demo and the benchmarks. Not for keeping anything.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

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
    /// The buckets keep older versions, and a DELETE leaves a delete marker
    #[arg(long)]
    versions: bool,
    /// Milliseconds that every request takes longer
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Speak TLS with a certificate for 127.0.0.1 and localhost made for this run, and write the PEM of the authority
    /// to trust to this file
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let pair = KeyPair {
        access_key: arguments.key,
        secret_key: arguments.secret,
        rights: Rights::All,
    };
    let (address, snapshot) = (arguments.listen, S3Snapshot::default());
    let server = match arguments.tls_ca {
        None => S3Server::listen(address, vec![pair], snapshot).await,
        Some(_) => S3Server::listen_tls(address, vec![pair], snapshot).await,
    };
    let server = server.with_context(|| format!("cannot listen at {address}"))?;
    if let Some((file, authority)) = arguments.tls_ca.as_ref().zip(server.authority()) {
        std::fs::write(file, authority).with_context(|| format!("cannot write {}", file.display()))?;
    }
    for bucket in &arguments.buckets {
        server.create_bucket(bucket);
        if arguments.versions {
            server.keep_versions(bucket);
        }
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
