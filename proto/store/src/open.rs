//! From a region's settings to a store.

use std::sync::Arc;

use crate::config::MIN_TIMEOUT;
use crate::file::FileStore;
use crate::s3::{AsOf, S3Store};
use crate::{ErrorKind, Location, Operation, RegionConfig, Store, StoreError};

/// Opens a region by its URL, without a retry layer.
///
/// Checks the settings only: it asks nothing of the directory or the bucket, so that a region that is away keeps nobody
/// from the others. [`crate::probe`] is the check that the region works.
pub async fn open(config: &RegionConfig) -> Result<Arc<dyn Store>, StoreError> {
    check(config)?;
    let location = Location::parse(config.display_name(), &config.url)?;
    match location {
        // Refused here as well as by whoever asks for it: what is there now must not pass for what was.
        Location::File(_) if config.as_of.is_some() => Err(refuse(
            config,
            "a directory keeps no versions, so it cannot be read as of an earlier time".to_owned(),
        )),
        Location::File(path) => Ok(Arc::new(FileStore::open(config, path))),
        Location::S3 { bucket, prefix } => {
            let store = S3Store::open(config, bucket, &prefix).await?;
            Ok(match config.as_of {
                Some(time) => Arc::new(AsOf::new(store, time)),
                None => Arc::new(store),
            })
        }
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
