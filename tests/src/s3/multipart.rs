//! Uploads in parts, as other backup tools make them of large files. Highwater makes none.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};

/// The uploads that have begun, by their ids.
#[derive(Debug, Default)]
pub(super) struct Uploads(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    begun: u64,
    parts: BTreeMap<String, BTreeMap<i32, Bytes>>,
}

impl Uploads {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A new upload's id.
    pub(super) fn begin(&self) -> String {
        self.with(|state| {
            state.begun += 1;
            let id = format!("upload-{}", state.begun);
            state.parts.insert(id.clone(), BTreeMap::new());
            id
        })
    }

    /// Keeps a part; `false` if there is no such upload.
    pub(super) fn part(&self, id: &str, number: i32, bytes: Bytes) -> bool {
        self.with(|state| {
            let upload = state.parts.get_mut(id);
            upload.map(|parts| parts.insert(number, bytes)).is_some()
        })
    }

    /// Ends an upload with the parts that are named, in their order; `None` if one of them, or the upload, is not there.
    pub(super) fn end(&self, id: &str, numbers: &[i32]) -> Option<Bytes> {
        let parts = self.with(|state| state.parts.remove(id))?;
        let mut whole = BytesMut::new();
        for number in numbers {
            whole.extend_from_slice(parts.get(number)?);
        }
        Some(whole.freeze())
    }
}
