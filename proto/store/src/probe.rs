//! Does the region do what the archive relies on?
//!
//! Writes a small object twice with different content and reads it back, instead of trusting the store's
//! name: some S3-compatible stores accept `If-None-Match` and ignore it.

use bytes::Bytes;

use crate::{ErrorKind, Object, Operation, Put, PutMode, Store, StoreError};

/// What a region was seen to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// A create never replaces what is there. Where this is false two writers can replace each other's
    /// objects, and the caller must say so loudly.
    pub conditional_create: bool,
}

const FIRST: &[u8] = b"highwater probe: this object may be deleted\n";
const SECOND: &[u8] = b"highwater probe: this content must never be stored\n";

/// Writes, conditionally rewrites and reads back `<key_prefix>probe/create`.
///
/// Needs the rights to write and to read; the object stays, so that no right to delete is needed, and the
/// next probe finds it. An object from an interrupted probe, or from a store that ignored the condition, does
/// no harm: the first write replaces it.
pub async fn probe(store: &dyn Store, key_prefix: &str) -> Result<Capabilities, StoreError> {
    let key = format!("{key_prefix}probe/create");
    let first = Object::new(Bytes::from_static(FIRST));
    let second = Object::new(Bytes::from_static(SECOND));
    store.put(&key, first, PutMode::Overwrite).await?;
    let refused = match store.put(&key, second, PutMode::Create).await {
        Ok(put) => put == Put::Exists,
        // A store that knows that it cannot do this says so; that is an answer.
        Err(error) if error.kind() == ErrorKind::Config => false,
        Err(error) => return Err(error),
    };
    let content = store.get(&key).await?;
    let kept = content == FIRST;
    if !kept && content != SECOND {
        return Err(StoreError::corrupt(
            store.region(),
            Operation::Get,
            &key,
            format!("{} bytes came back that were never written", content.len()),
        )
        .with_next_step(
            "check what stands between this machine and the store; another program may use the prefix",
        ));
    }
    Ok(Capabilities {
        conditional_create: refused && kept,
    })
}
