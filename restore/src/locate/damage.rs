//! Planning although objects turn out to be damaged.
//!
//! Owns: what is learned when no region gives an object that an answer needs: it is taken out of the catalog, the chunks
//! that it may have been made of are looked for, and planning begins again with what is left. So a plan names what is
//! damaged as far as it had to be read, and never counts on it. Does not own: looking for damage (`verify`).

use crate::{
    catalog::{Catalog, Source, wal},
    error::RestoreError,
    fetch::source::Nowhere,
    regions::Region,
};

/// Why a question has no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// No region gives an object. What else holds the same WAL is not known yet.
    Spoilt(Box<Spoilt>),
    /// Anything else.
    Failed(RestoreError),
}

/// An object that no region gives.
#[derive(Debug)]
pub struct Spoilt {
    source: Source,
    nowhere: Nowhere,
}

impl Unanswered {
    pub(super) fn spoilt(source: &Source, nowhere: Nowhere) -> Self {
        Self::Spoilt(Box::new(Spoilt {
            source: *source,
            nowhere,
        }))
    }
}

impl From<RestoreError> for Unanswered {
    fn from(error: RestoreError) -> Self {
        Self::Failed(error)
    }
}

/// Takes note of why a question has no answer, so that it can be asked again of what is left.
///
/// # Errors
///
/// Asking again is of no use: another failure, or a region that does not answer may have the only good copy.
pub async fn learn(
    catalog: &mut Catalog,
    regions: &[Region],
    unanswered: Unanswered,
) -> Result<(), RestoreError> {
    let Spoilt { source, nowhere } = match unanswered {
        Unanswered::Spoilt(spoilt) => *spoilt,
        Unanswered::Failed(error) => return Err(error),
    };
    let (timeline, piece) = (source.timeline, source.piece);
    tracing::warn!(
        object = nowhere.key,
        "no region gives this object; looking for the same WAL in others"
    );
    catalog.spoil(timeline, &piece, nowhere.reasons());
    let mut unsure = nowhere.may_pass();
    for index in catalog.readable() {
        let Some(store) = regions.get(index).and_then(Region::store) else {
            continue;
        };
        match wal::chunks(store.as_ref(), &catalog.layout, timeline, piece.range).await {
            Ok(chunks) => catalog.uncover(index, timeline, chunks),
            Err(_) => unsure = true,
        }
    }
    let left = catalog.coverage(timeline, &catalog.readable());
    if unsure && left.cover(source.used).is_err() {
        return Err(nowhere.into());
    }
    Ok(())
}
