//! Headers and verified plain bytes of WAL objects, from whichever region has a good copy.

use bytes::Bytes;
use highwater_config::Exit;
use highwater_format::{Expect, FormatError, Header, Object, SegmentName, coverage::PieceKind};

use super::{Locator, Unanswered};
use crate::{
    catalog::{Catalog, Source},
    error::RestoreError,
    fetch::source::{Attempt, Nowhere, ReadError, Reject},
};

/// What the object behind a source must say about itself.
pub(crate) fn expectation(catalog: &Catalog, source: &Source) -> Expect {
    let identity = &catalog.identity;
    match source.piece.kind {
        PieceKind::Segment => {
            let name = SegmentName::of(source.timeline, source.piece.range.start, identity.segment_size);
            Expect::segment(identity.system_id, name, identity.segment_size)
        }
        PieceKind::Tail => Expect::tail(identity.system_id, source.timeline, source.piece.range),
    }
}

/// The plain bytes of an object, if it is whole and the one that its key says.
pub(crate) fn open(bytes: Bytes, expect: &Expect) -> Result<Vec<u8>, FormatError> {
    let object = Object::open(bytes)?;
    object.expect(expect)?;
    object.plain()
}

impl Locator<'_> {
    /// The header of an object.
    pub(super) async fn header(&self, source: &Source) -> Result<Header, Unanswered> {
        let key = self.catalog.piece_key(source.timeline, &source.piece);
        let expect = expectation(self.catalog, source);
        let mut attempts = Vec::new();
        for store in self.sources(source).stores() {
            let (reason, kind) = match store.get_range(&key, 0..Header::LEN as u64).await {
                Ok(bytes) => {
                    match Header::decode(&bytes).and_then(|header| expect.check(&header).map(|()| header)) {
                        Ok(header) => return Ok(header),
                        Err(error) => (error.to_string(), None),
                    }
                }
                Err(error) => (error.to_string(), Some(error.kind())),
            };
            attempts.push(Attempt {
                region: store.region().to_owned(),
                reason,
                kind,
            });
        }
        Err(Unanswered::spoilt(source, Nowhere { key, attempts }))
    }

    /// The bytes that a source contributes, verified.
    pub(super) async fn plain(&self, source: &Source) -> Result<Bytes, Unanswered> {
        let key = self.catalog.piece_key(source.timeline, &source.piece);
        let expect = expectation(self.catalog, source);
        let had = self
            .sources(source)
            .read(&key, |bytes| {
                let expect = expect.clone();
                async move {
                    let opened = tokio::task::spawn_blocking(move || open(bytes, &expect)).await;
                    match opened {
                        Ok(Ok(plain)) => Ok(Bytes::from(plain)),
                        Ok(Err(error)) => Err(Reject::Copy(error.to_string())),
                        Err(error) => Err(Reject::Fatal(RestoreError::failed(
                            Exit::Trouble,
                            error.to_string(),
                        ))),
                    }
                }
            })
            .await
            .map_err(|error| match error {
                ReadError::Nowhere(nowhere) => Unanswered::spoilt(source, nowhere),
                ReadError::Fatal(error) => Unanswered::Failed(error),
            })?;
        let offset = |lsn: highwater_format::Lsn| {
            usize::try_from(lsn.distance_from(source.piece.range.start))
                .unwrap_or(usize::MAX)
                .min(had.value.len())
        };
        Ok(had
            .value
            .slice(offset(source.used.start)..offset(source.used.end)))
    }
}
