//! From a region's settings to a store.

use std::sync::Arc;

use crate::config::MIN_TIMEOUT;
use crate::file::FileStore;
use crate::s3::S3Store;
use crate::{ErrorKind, Location, Operation, RegionConfig, Store, StoreError};

/// Opens a region by its URL, without a retry layer.
///
/// Checks the settings only: it asks nothing of the directory or the bucket, so that a region that is away keeps nobody
/// from the others. [`crate::probe`] is the check that the region works.
pub async fn open(config: &RegionConfig) -> Result<Arc<dyn Store>, StoreError> {
    check(config)?;
    let location = Location::parse(config.display_name(), &config.url)?;
    match location {
        Location::File(path) => Ok(Arc::new(FileStore::open(config, path))),
        Location::S3 { bucket, prefix } => Ok(Arc::new(S3Store::open(config, bucket, &prefix).await?)),
    }
}

fn check(config: &RegionConfig) -> Result<(), StoreError> {
    let timeouts = [
        ("connect_timeout", config.connect_timeout),
        ("attempt_timeout", config.attempt_timeout),
        ("operation_timeout", config.operation_timeout),
    ];
    for (name, value) in timeouts {
        if value < MIN_TIMEOUT {
            return Err(refuse(
                config,
                format!("{name} is {value:?}, below its minimum of {MIN_TIMEOUT:?}"),
            ));
        }
    }
    if config.access_key_id.is_some() != config.secret_access_key.is_some() {
        return Err(refuse(
            config,
            "access_key_id and secret_access_key must be given together".to_owned(),
        ));
    }
    Ok(())
}

fn refuse(config: &RegionConfig, message: String) -> StoreError {
    StoreError::new(
        ErrorKind::Config,
        config.display_name(),
        Operation::Open,
        "",
        message,
    )
}
