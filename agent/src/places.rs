//! Two regions must be two places.
//!
//! Owns: noticing that two configured regions lead to the same objects, by another name of a host, a link, or a proxy in
//! front of one bucket. Such a pair would count as two under every durability policy and be lost as one. The same URL twice is
//! refused by the configuration already.
//!
//! Every region is marked when it is first read, with a text that no other process and no other region writes; whoever is
//! read after that and shows another region's mark is the same place. The order of marks does not matter: one of two
//! that share a place was marked last, and both show its mark from then on.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use highwater_store::{Object, PutMode, Store, StoreError};

use crate::error::AgentError;

/// How long a mark is waited for. Whoever takes longer cannot be where the region is that has answered just now.
const PATIENCE: Duration = Duration::from_secs(3);

/// A region, as far as it matters here: its name in the configuration, which no other has, and what it leads to.
pub(crate) type Place<'a> = (&'a str, &'a dyn Store);

/// Marks of one process below one prefix.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    key: Arc<str>,
    instance: Arc<str>,
}

impl Places {
    /// `instance` names the process: random, so that an earlier one's marks are not taken for its own.
    pub(crate) fn new(prefix: &str, instance: &str) -> Self {
        Self {
            key: format!("{prefix}probe/place").into(),
            instance: instance.into(),
        }
    }

    fn mark_of(&self, name: &str) -> String {
        format!("{} {name}: tells regions apart, may be deleted\n", self.instance)
    }

    /// Marks a region.
    pub(crate) async fn mark(&self, (name, store): Place<'_>) -> Result<(), StoreError> {
        let mark = Object::new(self.mark_of(name).into_bytes());
        store.put(&self.key, mark, PutMode::Overwrite).await.map(drop)
    }

    /// Refuses regions that are the same place. One that was not marked or does not answer now is left out.
    pub(crate) async fn tell_apart(&self, places: &[Place<'_>]) -> Result<(), AgentError> {
        let reads = places.iter().map(|(_, store)| async move {
            let read = tokio::time::timeout(PATIENCE, store.get(&self.key)).await;
            read.ok().and_then(Result::ok)
        });
        for (one, read) in places.iter().zip(join_all(reads).await) {
            let shows = |other: &&Place<'_>| {
                other.0 != one.0 && read.as_deref() == Some(self.mark_of(other.0).as_bytes())
            };
            if let Some(other) = places.iter().find(shows) {
                return Err(same_place(*one, *other));
            }
        }
        Ok(())
    }
}

fn same_place(one: Place<'_>, other: Place<'_>) -> AgentError {
    let shown = |(name, store): Place<'_>| format!("{name} ({})", store.describe());
    AgentError::refused(
        format!(
            "regions {} and {} are the same place: what is written to one is read from the other",
            shown(one),
            shown(other)
        ),
        "Give each region a bucket or directory of its own. One place counted twice would be lost at once",
    )
}

#[cfg(test)]
mod tests {
    use highwater_store::{FaultyStore, MemoryStore};

    use super::*;
    use crate::error::Kind;

    fn places(instance: &str) -> Places {
        Places::new("orders/7/", instance)
    }

    #[tokio::test]
    async fn two_names_of_one_place_are_refused_and_two_places_are_not() {
        let (one, other) = (MemoryStore::new("one"), MemoryStore::new("other"));
        let (north, alias, south): (Place, Place, Place) =
            (("north", &one), ("south", &one), ("south", &other));
        let places = places("1");
        for marked in [north, alias] {
            places.mark(marked).await.unwrap();
        }
        let error = places.tell_apart(&[north, alias]).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        assert!(error.to_string().contains("same place"), "{error}");
        for marked in [south, north] {
            places.mark(marked).await.unwrap();
        }
        places.tell_apart(&[north, south]).await.unwrap();
    }

    #[tokio::test]
    async fn regions_that_changed_their_names_are_no_aliases() {
        let (one, other) = (MemoryStore::new("one"), MemoryStore::new("other"));
        places("1").mark(("south", &one)).await.unwrap();
        places("1").mark(("north", &other)).await.unwrap();
        let now = places("2");
        let both: [Place; 2] = [("north", &one), ("south", &other)];
        now.mark(both[1]).await.unwrap();
        now.tell_apart(&both).await.unwrap();
        now.mark(both[0]).await.unwrap();
        now.tell_apart(&both).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_answer_is_left_out() {
        let (one, hangs) = (MemoryStore::new("one"), MemoryStore::new("other"));
        let hangs = FaultyStore::new(Arc::new(hangs));
        let places = places("1");
        places.mark(("north", &one)).await.unwrap();
        hangs.freeze();
        places
            .tell_apart(&[("north", &one), ("south", &hangs)])
            .await
            .unwrap();
    }
}
