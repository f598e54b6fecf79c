//! Checks the claims of writers in one region: a restore needs none, but an agent cannot begin behind one that it cannot read.

use futures::{StreamExt, stream};
use highwater_format::{Writer, decode};

use super::{Problem, Subject, Verified};

pub(super) async fn verify(subject: &Subject<'_>, parallel: usize, found: &mut Verified) {
    let Some(store) = subject.region.store() else {
        return;
    };
    let name = &subject.region.name;
    let fetched =
        stream::iter(&subject.writers).map(|(epoch, key)| async move { (*epoch, key, store.get(key).await) });
    let mut fetched = fetched.buffered(parallel.max(1));
    while let Some((epoch, key, bytes)) = fetched.next().await {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => {
                found.failed(name, key, &error);
                continue;
            }
        };
        match decode::<Writer>(&bytes) {
            Ok(writer) if writer.epoch == epoch => found.good(subject.index, bytes.len() as u64),
            Ok(writer) => {
                let problem = format!("it is the claim of epoch {}", writer.epoch);
                found.damage.push(Problem::new(name, key, problem));
            }
            Err(error) => found.damage.push(Problem::new(
                name,
                key,
                format!("{error}; a restore needs it not, and an agent may refuse to start"),
            )),
        }
    }
}
