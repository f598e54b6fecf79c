//! Claims as they lie in a region: finding, reading, creating and naming them.
//!
//! Owns the keys and documents of `writer/`, and asking several regions at once. Decides nothing.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use highwater_format::{History, Key, Layout, Pulse, Writer, records};
use highwater_store::{Object, Put, PutMode, Store, list_all};
use tokio::time::Instant;

use crate::error::{AgentError, Result};
use crate::inventory;
use crate::region::{Region, get_optional};

/// How long other regions are waited for once one has answered.
pub(super) const GRACE: Duration = Duration::from_secs(3);

/// Older claims that are read to find out whose pulse it is.
const OLDER: usize = 20;

/// Creates a claim. False: another process has that epoch.
pub(super) async fn create(store: &dyn Store, layout: &Layout, claim: &Writer) -> Result<bool> {
    let document = records::encode(claim).map_err(|source| AgentError::Encode {
        what: "a writer claim".into(),
        source,
    })?;
    let (key, object) = (layout.writer(claim.epoch), Object::new(document.clone()));
    let put = store.put(&key, object, PutMode::Create).await?;
    // An attempt whose answer was lost finds its own claim.
    Ok(put == Put::Created || store.get(&key).await? == document)
}

/// The claim with the highest epoch of all. Nothing but damage says nothing of who writes, and is an error.
pub async fn newest_of(store: &dyn Store, layout: &Layout) -> Result<Option<Writer>> {
    match newest_above(store, layout, 0).await? {
        (None, Some(damage)) => Err(damage),
        (newest, _) => Ok(newest),
    }
}

/// The claim with the highest epoch above `after`, and what was damaged on the way: that fences nobody, and hides no other.
pub(super) async fn newest_above(
    store: &dyn Store,
    layout: &Layout,
    after: u64,
) -> Result<(Option<Writer>, Option<AgentError>)> {
    newest_of_these(store, layout, epochs(store, layout, after).await?).await
}

/// The same of `epochs`, ascending.
pub(super) async fn newest_of_these(
    store: &dyn Store,
    layout: &Layout,
    epochs: Vec<u64>,
) -> Result<(Option<Writer>, Option<AgentError>)> {
    let mut damaged = None;
    for epoch in epochs.into_iter().rev() {
        match read_claim(store, layout, epoch).await {
            Err(error @ AgentError::Object { .. }) => {
                tracing::debug!(%error, "a writer claim is passed over");
                damaged.get_or_insert(error);
            }
            claim => return Ok((claim?, damaged)),
        }
    }
    Ok((None, damaged))
}

/// The newest claim of a process that may not be the newest of all.
pub(super) async fn older_claim(
    store: &dyn Store,
    layout: &Layout,
    instance: &str,
) -> Result<Option<Writer>> {
    for epoch in epochs(store, layout, 0).await?.into_iter().rev().take(OLDER) {
        let claim = read_sound(store, layout, epoch).await?;
        if claim.as_ref().is_some_and(|claim| claim.instance == instance) {
            return Ok(claim);
        }
    }
    Ok(None)
}

/// The claimed epochs above `after`, ascending.
pub(super) async fn epochs(store: &dyn Store, layout: &Layout, after: u64) -> Result<Vec<u64>> {
    let listed = list_all(store, &layout.writer_dir(), Some(&layout.writer(after))).await?;
    let epoch = |key: &str| match layout.parse(key) {
        Some(Key::Writer(epoch)) => Some(epoch),
        _ => None,
    };
    Ok(listed.iter().filter_map(|meta| epoch(&meta.key)).collect())
}

pub(super) async fn read_claim(store: &dyn Store, layout: &Layout, epoch: u64) -> Result<Option<Writer>> {
    let key = layout.writer(epoch);
    let Some(bytes) = get_optional(store, &key).await? else {
        return Ok(None);
    };
    let claim = records::decode(&bytes).map_err(|source| AgentError::Object {
        region: store.region().to_owned(),
        key,
        source,
    });
    claim.map(Some)
}

/// The same; none where it is damaged.
pub(super) async fn read_sound(store: &dyn Store, layout: &Layout, epoch: u64) -> Result<Option<Writer>> {
    none_if_damaged(read_claim(store, layout, epoch).await)
}

/// The pulse of a region; none where it is damaged: the next one replaces it.
pub(super) async fn pulse_of(store: &dyn Store, layout: &Layout) -> Result<Option<Pulse>> {
    none_if_damaged(inventory::pulse(store, layout).await)
}

fn none_if_damaged<T>(read: Result<Option<T>>) -> Result<Option<T>> {
    match read {
        Err(AgentError::Object { .. }) => Ok(None),
        read => read,
    }
}

/// Who a claim is of, for people.
pub(super) fn name(claim: &Writer) -> String {
    format!(
        "{} (pid {}, instance {}) writes timeline {} since {}, epoch {}",
        claim.host, claim.pid, claim.instance, claim.timeline, claim.claimed_at, claim.epoch
    )
}

/// Where a timeline comes from, for people.
pub(super) fn descent(history: &History) -> String {
    match history.parent() {
        Some(parent) => format!(
            "timeline {}, which left timeline {} at {} ({})",
            history.timeline, parent.timeline, parent.switch, parent.reason
        ),
        None => format!("timeline {} without a parent", history.timeline),
    }
}

/// Asks regions at the same time. Those that fail or are much slower than another one are left out, as long as one
/// answers.
pub(super) async fn ask<T, F>(
    regions: impl Iterator<Item = Arc<Region>>,
    question: impl Fn(Arc<Region>) -> F,
) -> Result<Vec<(Arc<Region>, T)>>
where
    F: Future<Output = Result<T>>,
{
    let mut asked: FuturesUnordered<_> = regions
        .map(|region| {
            let answer = question(region.clone());
            async move { (region, answer.await) }
        })
        .collect();
    let (mut told, mut failure, mut limit) = (Vec::new(), None, None);
    loop {
        tokio::select! {
            biased;
            answer = asked.next() => match answer {
                None => break,
                Some((region, Ok(answer))) => {
                    limit.get_or_insert_with(|| Instant::now() + GRACE);
                    told.push((region, answer));
                }
                Some((region, Err(error))) => {
                    tracing::debug!(region = region.name, %error, "its claims cannot be read");
                    failure = Some(error);
                }
            },
            () = tokio::time::sleep_until(limit.unwrap_or_else(Instant::now)), if limit.is_some() => break,
        }
    }
    told.sort_by_key(|(region, _)| region.index);
    match failure {
        Some(error) if told.is_empty() => Err(error),
        _ => Ok(told),
    }
}
