//! The SDK's client, and another one when the store refuses what the present one shows.
//!
//! The SDK reads shared credential files, profiles and authorities once. Who replaces them does what an error of the kind
//! [`ErrorKind::Operator`](crate::ErrorKind::Operator) asks for, and that works without a restart: after such an error about
//! access all of it is read again, at most once a minute.
//!
//! Keeps: a client is given up only for one that has credentials. Files that are caught in the middle of being replaced
//! change nothing; they are read once more after the next refusal. Does not own: what is read, and where (`client`).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_sdk_s3::Client;
use tokio::time::{Instant, timeout};

use super::client;
use crate::{RegionConfig, StoreError};

/// Between two renewals: each reads files, may ask a metadata service, and makes its connections anew.
const EVERY: Duration = Duration::from_secs(60);

/// A renewal takes no longer: a call waits for it.
const LIMIT: Duration = Duration::from_secs(10);

/// The present client.
#[derive(Debug)]
pub(super) struct Renewable {
    config: RegionConfig,
    present: Mutex<Present>,
}

#[derive(Debug)]
struct Present {
    client: Client,
    /// When everything was read, or was tried to be.
    read: Instant,
}

impl Renewable {
    pub(super) async fn open(config: &RegionConfig) -> Result<Self, StoreError> {
        let client = client::client(config).await?;
        Ok(Self {
            config: config.clone(),
            present: Mutex::new(Present {
                client,
                read: Instant::now(),
            }),
        })
    }

    pub(super) fn client(&self) -> Client {
        self.lock().client.clone()
    }

    /// Reads everything again, if that was not tried just now: the store refuses what the present client shows.
    pub(super) async fn refused(&self) {
        if !self.is_due() {
            return;
        }
        let region = self.config.display_name();
        match timeout(LIMIT, Box::pin(client::with_credentials(&self.config))).await {
            Ok(Ok(client)) => {
                self.lock().client = client;
                tracing::info!(region, "credentials and authorities were read again");
            }
            Ok(Err(error)) => tracing::warn!(region, %error, "credentials are not read again yet"),
            Err(_) => tracing::warn!(region, "credentials were not to be had within {LIMIT:?}"),
        }
    }

    fn is_due(&self) -> bool {
        let mut present = self.lock();
        let due = present.read.elapsed() >= EVERY;
        if due {
            present.read = Instant::now();
        }
        due
    }

    fn lock(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
