//! Whose archive it is: fixed at the first write, checked before every other one.

use highwater_format::{Beginning, ClusterName, Document, Identity, Layout, SystemId, records};
use highwater_store::{Object, Store, list_parts};

use crate::error::{AgentError, Kind, Result};
use crate::region::{Archive, get_optional, write_once};

/// Makes sure, before anything is stored, that the region belongs to this lineage and never replaces an
/// object on a conditional write. A store that ignores the condition is refused: two writers could then
/// overwrite each other's WAL unnoticed.
pub async fn admit(store: &dyn Store, archive: &Archive) -> Result<()> {
    ensure(store, archive).await?;
    refuse_succeeded(store, archive).await?;
    if highwater_store::probe(store, archive.layout.root())
        .await?
        .conditional_create
    {
        return Ok(());
    }
    Err(AgentError::refused(
        format!(
            "region {} ({}): the store replaces objects although asked not to (If-None-Match)",
            store.region(),
            store.describe()
        ),
        "Use a store that honours conditional writes; most S3-compatible servers do in a current version",
    ))
}

/// Makes sure that the region belongs to this lineage; writes the identity into an empty region.
///
/// Refuses a region in which the cluster name belongs to another system identifier, unless the archive
/// says that a new lineage may begin, and one whose fixed facts differ from the server's.
pub async fn ensure(store: &dyn Store, archive: &Archive) -> Result<()> {
    if let Some(theirs) = read(store, &archive.layout).await? {
        return compare(store, &archive.identity, &theirs);
    }
    let ours = archive.identity.system_id;
    let mut others = other_lineages(store, archive.layout.cluster()).await?;
    others.retain(|id| *id != ours);
    if let Some(theirs) = others.last().copied().filter(|_| !archive.new_lineage) {
        let region = store.region().to_owned();
        return Err(AgentError::OtherCluster { region, ours, theirs });
    }
    let beginning = Beginning {
        identity: archive.identity.clone(),
        succeeds: others,
    };
    let document = records::encode(&beginning).map_err(|source| AgentError::Encode {
        what: "the identity".into(),
        source,
    })?;
    write_once(store, &archive.layout.identity(), Object::new(document)).await?;
    Ok(())
}

/// Refuses to go on with a lineage in whose place another one was begun on purpose, unless that is asked for again: the old
/// server, started once more, must not become the newest sign of life of the cluster's name.
async fn refuse_succeeded(store: &dyn Store, archive: &Archive) -> Result<()> {
    if archive.new_lineage {
        return Ok(());
    }
    match successor(store, archive.layout.cluster(), archive.identity.system_id).await? {
        None => Ok(()),
        Some(theirs) => Err(AgentError::Succeeded {
            region: store.region().to_owned(),
            ours: archive.identity.system_id,
            theirs,
        }),
    }
}

/// The lineage that was begun in the place of `ours`. What lineages that were begun later say counts, and nothing else: no
/// clock, and not the order of the identifiers.
pub(crate) async fn successor(
    store: &dyn Store,
    cluster: &ClusterName,
    ours: SystemId,
) -> Result<Option<SystemId>> {
    for theirs in other_lineages(store, cluster).await? {
        let key = Layout::new(cluster.clone(), theirs).identity();
        match document::<Beginning>(store, &key).await {
            Ok(Some(beginning)) if beginning.succeeds.contains(&ours) => return Ok(Some(theirs)),
            Ok(_) => {}
            Err(error) if error.kind() == Kind::Retry => return Err(error),
            // Damaged, or in an archive tier, where an old lineage may lie.
            Err(error) => {
                tracing::warn!(region = store.region(), key, %error, "what came before that lineage is not known");
            }
        }
    }
    Ok(None)
}

/// The identity that a region holds for this lineage; none if the lineage has not begun there.
pub async fn read(store: &dyn Store, layout: &Layout) -> Result<Option<Identity>> {
    document(store, &layout.identity()).await
}

async fn document<T: Document>(store: &dyn Store, key: &str) -> Result<Option<T>> {
    let Some(bytes) = get_optional(store, key).await? else {
        return Ok(None);
    };
    let decoded = records::decode(&bytes);
    decoded.map(Some).map_err(|source| AgentError::Object {
        region: store.region().to_owned(),
        key: key.to_owned(),
        source,
    })
}

/// Whether the region holds this lineage. Fails where the cluster's name belongs to other ones alone.
pub(crate) async fn holds(store: &dyn Store, layout: &Layout) -> Result<bool> {
    if read(store, layout).await?.is_some() {
        return Ok(true);
    }
    let (ours, lineages) = (layout.system_id(), other_lineages(store, layout.cluster()).await?);
    // An agent may be beginning it just now.
    if lineages.contains(&ours) {
        return Ok(read(store, layout).await?.is_some());
    }
    match lineages.last().copied() {
        Some(theirs) => Err(AgentError::OtherCluster {
            region: store.region().to_owned(),
            ours,
            theirs,
        }),
        None => Ok(false),
    }
}

/// System identifiers under the cluster's name, ascending.
pub async fn other_lineages(store: &dyn Store, cluster: &ClusterName) -> Result<Vec<SystemId>> {
    let parts = list_parts(store, &Layout::cluster_dir(cluster)).await?;
    let ids = parts
        .iter()
        .filter_map(|(_, first)| Layout::parse_system_id(cluster, first));
    Ok(ids.collect())
}

fn compare(store: &dyn Store, ours: &Identity, theirs: &Identity) -> Result<()> {
    theirs.expect(ours).map_err(|error| {
        AgentError::refused(
            format!(
                "region {}: the archive of this lineage was begun for another server: {error}",
                store.region()
            ),
            "Nothing was written. Use another cluster name or prefix for this server",
        )
    })
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
