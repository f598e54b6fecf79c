//! Copying one object at a time from another region, verified on the way.
//!
//! Owns: where an object is had from when a region's copy cannot be used, and the checks before a byte is
//! written. Holds one object in memory, charged to the agent's budget, and begins only while there is room.
//! Nothing is ever replaced: what is there already with other content is a conflict.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use highwater_format::coverage::Piece;
use highwater_format::{
    Backup, BackupId, Document, Expect, FormatError, LsnRange, Manifest, Object as Container, PackInfo,
    TimelineId, decode,
};
use highwater_store::Object;

use super::listing::Base;
use crate::archived::{read_piece, verify};
use crate::backup::wal::WalOf;
use crate::blocking;
use crate::budget::Budget;
use crate::error::{AgentError, Result};
use crate::gap;
use crate::region::{Region, Written, damaged, get_optional, write_once};
use crate::salvage::{self, Damage, Rest};
use crate::uploader::Shared;

/// One object counts for at most this part of the budget.
const LARGEST_SHARE: u64 = 4;

/// Between two looks at the memory while an object is copied.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What was written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Copied {
    /// Objects.
    pub(crate) objects: u64,
    /// Their bytes as stored.
    pub(crate) bytes: u64,
}

/// What became of a piece of WAL.
#[derive(Debug, Default)]
pub(crate) struct CopiedWal {
    /// What was written.
    pub(crate) copied: Copied,
    /// What could not be, because it is damaged everywhere.
    pub(crate) damage: Vec<Damage>,
}

/// From the other regions into one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copier<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) region: &'a Region,
    pub(crate) peers: &'a [Arc<Region>],
}

impl Copier<'_> {
    /// The peers, beginning with number `first`.
    fn from(&self, first: usize) -> impl Iterator<Item = &Arc<Region>> {
        let preferred = self.peers.iter().skip(first).take(1);
        let others = self.peers.iter().enumerate();
        preferred.chain(
            others
                .filter(move |(index, _)| *index != first)
                .map(|(_, peer)| peer),
        )
    }

    /// Does `work`, which holds an object of `bytes`, when there is room for it. It is given up when new WAL needs
    /// the room: a region that hangs while it is being filled must not keep the stream from the others.
    async fn holding<T>(&self, bytes: u64, work: impl Future<Output = Result<T>>) -> Result<T> {
        let budget = &self.shared.budget;
        budget.room().await;
        // An object that is large beside the whole budget still has to get through.
        let _charge = budget.charge(bytes.min(budget.limit() / LARGEST_SHARE));
        tokio::select! {
            biased;
            done = work => done,
            () = crowded(budget) => Err(AgentError::Trouble {
                what: "the memory was needed for new WAL while an object was copied".into(),
                next: "It is copied later".into(),
            }),
        }
    }

    /// Whether another source may have what this one could not give.
    fn is_of_a_source(&self, error: &AgentError) -> bool {
        match error {
            AgentError::Object { region, .. } => *region != self.region.name,
            AgentError::Store(error) => error.region() != self.region.name,
            _ => false,
        }
    }

    async fn put(&self, key: &str, object: Object) -> Result<Copied> {
        let bytes = object.bytes.len() as u64;
        match write_once(&*self.region.quick, key, object).await? {
            Written::Created => {
                tracing::debug!(
                    region = self.region.name,
                    key,
                    bytes,
                    "copied from another region"
                );
                Ok(Copied { objects: 1, bytes })
            }
            Written::Same => Ok(Copied::default()),
        }
    }

    /// A piece of WAL. Where the peer's object cannot be used, the same bytes are looked for in all other regions, and
    /// in the chunks that a segment object made superfluous. What is damaged everywhere is left out and told.
    pub(crate) async fn wal(&self, timeline: TimelineId, piece: Piece, first: usize) -> Result<CopiedWal> {
        let Some(peer) = self.peers.get(first) else {
            return Err(AgentError::Bug(format!(
                "there is no region {first} to copy from"
            )));
        };
        let mut done = CopiedWal::default();
        match self.piece(timeline, piece, peer).await {
            Ok(copied) => {
                done.copied = copied;
                return Ok(done);
            }
            Err(error) if self.is_of_a_source(&error) => {}
            Err(error) => return Err(error),
        }
        let mut at = piece.range.start;
        while at < piece.range.end {
            let range = LsnRange::new(at, piece.range.end);
            let one =
                |peer: Arc<Region>, piece: Piece| async move { self.piece(timeline, piece, &peer).await };
            let filled = salvage::fill(self.shared, self.region, timeline, range, one).await?;
            filled.copied.into_iter().for_each(|one| done.copied.add(one));
            at = match filled.rest {
                None => break,
                Some(Rest::Unknown(error)) => return Err(error),
                Some(Rest::Missing(damage)) => return Err(damage.not_listed()),
                Some(Rest::Damaged(damage)) => {
                    let behind = damage.range.end;
                    done.damage.push(damage);
                    behind
                }
            };
        }
        Ok(done)
    }

    async fn piece(&self, timeline: TimelineId, piece: Piece, peer: &Region) -> Result<Copied> {
        let (archive, size) = (&self.shared.archive, self.shared.segment_size);
        let copying = async {
            let (key, bytes, object) = read_piece(archive, &*peer.quick, size, timeline, &piece).await?;
            let checked = blocking::run("checking an object", move || verify(&object)).await?;
            checked.map_err(|source| AgentError::Object {
                region: peer.name.clone(),
                key: key.clone(),
                source,
            })?;
            self.put(&key, Object::new(bytes)).await
        };
        self.holding(piece.size, copying).await
    }

    /// The record of a hole.
    pub(crate) async fn gap(&self, timeline: TimelineId, range: LsnRange, first: usize) -> Result<Copied> {
        let layout = &self.shared.archive.layout;
        let key = layout.gap(timeline, range);
        let mut trouble = None;
        for peer in self.from(first) {
            match gap::read(&*peer.quick, layout, &key).await {
                Ok(found) => {
                    let (key, record) = gap::encode(layout, &found)?;
                    let bytes = record.bytes.len() as u64;
                    gap::write(&*self.region.quick, layout, &key, record).await?;
                    return Ok(Copied { objects: 1, bytes });
                }
                Err(error) => trouble = Some(error),
            }
        }
        Err(trouble.unwrap_or_else(|| nowhere(&key)))
    }

    /// A document that is whole and `fits`, from the first peer that has one.
    async fn document<D: Document>(
        &self,
        key: &str,
        first: usize,
        fits: impl Fn(&D) -> bool,
    ) -> Result<(Bytes, D)> {
        let mut trouble = None;
        for peer in self.from(first) {
            let read = async {
                let Some(bytes) = get_optional(&*peer.quick, key).await? else {
                    return Ok(None);
                };
                let other = || FormatError::Damaged {
                    what: "the document",
                    problem: "it is about something else than its key says".into(),
                };
                let document = decode::<D>(&bytes)
                    .and_then(|document| fits(&document).then_some(document).ok_or_else(other));
                document
                    .map(|document| Some((bytes, document)))
                    .map_err(|source| AgentError::Object {
                        region: peer.name.clone(),
                        key: key.to_owned(),
                        source,
                    })
            };
            match read.await {
                Ok(Some(had)) => return Ok(had),
                Ok(None) => {}
                Err(error) => trouble = Some(error),
            }
        }
        Err(trouble.unwrap_or_else(|| nowhere(key)))
    }

    /// Completes a base backup: packs, manifest, and the commit mark when the region holds the WAL from its
    /// start to its stop. `held` is what the region lists of it.
    pub(crate) async fn backup(
        &self,
        id: &BackupId,
        held: &Base,
        mut done: impl FnMut(Copied),
    ) -> Result<()> {
        let layout = &self.shared.archive.layout;
        let system_id = self.shared.archive.identity.system_id;
        let of_this = |backup: &Backup| &backup.id == id && backup.system_id == system_id;
        let (record, backup) = self.document(&layout.backup(id), 0, of_this).await?;
        let (manifest_bytes, manifest) = self.manifest(&backup).await?;
        for pack in &manifest.packs {
            match held.packs.get(&pack.number) {
                Some(size) if *size == pack.stored_len => {}
                Some(size) => return Err(self.other_pack(id, pack, *size).await),
                None => done(self.holding(pack.stored_len, self.pack(id, pack)).await?),
            }
        }
        if !held.manifest {
            done(
                self.put(&layout.manifest(id), Object::new(manifest_bytes))
                    .await?,
            );
        }
        if held.visible {
            return Ok(());
        }
        self.confirm_wal(&backup).await?;
        done(self.put(&layout.backup(id), Object::new(record)).await?);
        tracing::info!(region = self.region.name, backup = %id, "the base backup was copied here and is visible");
        Ok(())
    }

    async fn manifest(&self, backup: &Backup) -> Result<(Bytes, Manifest)> {
        let key = self.shared.archive.layout.manifest(&backup.id);
        let fits = |manifest: &Manifest| manifest.backup == backup.id;
        let (bytes, manifest) = self.document(&key, 0, fits).await?;
        let object = Object::new(bytes);
        if format!("{:08x}", object.crc32) == backup.manifest_crc32 {
            return Ok((object.bytes, manifest));
        }
        Err(AgentError::Trouble {
            what: format!(
                "{key} is not the manifest that its backup.json names (CRC-32 {:08x}, not {})",
                object.crc32, backup.manifest_crc32
            ),
            next: "The base backup is not copied; run `highwater-restore verify`".into(),
        })
    }

    async fn pack(&self, id: &BackupId, pack: &PackInfo) -> Result<Copied> {
        let key = self.shared.archive.layout.pack(id, pack.number);
        let expect = Expect::pack(self.shared.archive.identity.system_id, id, pack.number);
        let mut trouble = None;
        for peer in self.peers {
            let bytes = match peer.quick.get(&key).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    trouble = Some(error.into());
                    continue;
                }
            };
            let (wanted, expect) = (pack.clone(), expect.clone());
            match blocking::run("checking a pack", move || checked(bytes, &wanted, &expect)).await? {
                Ok(object) => return self.put(&key, object).await,
                Err(source) => {
                    let error = AgentError::Object {
                        region: peer.name.clone(),
                        key: key.clone(),
                        source,
                    };
                    tracing::error!(region = self.region.name, %error, "a damaged object is not copied");
                    trouble = Some(error);
                }
            }
        }
        Err(trouble.unwrap_or_else(|| nowhere(&key)))
    }

    /// A base backup becomes visible only where its own WAL is.
    async fn confirm_wal(&self, backup: &Backup) -> Result<()> {
        let wal = WalOf {
            layout: &self.shared.archive.layout,
            segment_size: self.shared.segment_size,
            timeline: backup.timeline,
        };
        let needed = LsnRange::new(backup.start_lsn, backup.stop_lsn);
        let end = wal.stored_end(&*self.region.quick, needed).await?;
        if end >= backup.stop_lsn {
            return Ok(());
        }
        Err(AgentError::Trouble {
            what: format!(
                "region {}: base backup {} is complete but its WAL {} of timeline {} is not here",
                self.region.name,
                backup.id,
                LsnRange::new(end, backup.stop_lsn),
                backup.timeline
            ),
            next: "It becomes visible when the WAL is".into(),
        })
    }

    /// A pack of another size than the manifest says: another one, or what is left of it.
    async fn other_pack(&self, id: &BackupId, pack: &PackInfo, size: u64) -> AgentError {
        let key = self.shared.archive.layout.pack(id, pack.number);
        let read = async {
            let bytes = self.region.quick.get(&key).await?;
            let opened = move || Container::open(bytes).and_then(|object| verify(&object));
            blocking::run("checking a pack", opened).await
        };
        let read = self.holding(size, read).await;
        let says = format!("{} bytes as the manifest says", pack.stored_len);
        match read {
            Ok(Ok(())) => AgentError::Conflict {
                region: self.region.name.clone(),
                key,
                ours: says,
                theirs: format!("{size} bytes"),
            },
            Ok(Err(error)) => damaged(
                &self.region.name,
                &key,
                &format!("{size} bytes, not {says}: {error}"),
            ),
            Err(error) => error,
        }
    }
}

impl Copied {
    pub(crate) fn add(&mut self, other: Copied) {
        self.objects += other.objects;
        self.bytes += other.bytes;
    }
}

/// Returns when nothing more may be read from the server.
async fn crowded(budget: &Budget) {
    while budget.has_room() {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The pack, if it is the one that the manifest names.
fn checked(bytes: Bytes, pack: &PackInfo, expect: &Expect) -> Result<Object, FormatError> {
    let object = Object::new(bytes);
    if object.bytes.len() as u64 != pack.stored_len || format!("{:08x}", object.crc32) != pack.crc32 {
        return Err(FormatError::Damaged {
            what: "the pack",
            problem: format!(
                "{} bytes with CRC-32 {:08x}, the manifest says {} bytes with {}",
                object.bytes.len(),
                object.crc32,
                pack.stored_len,
                pack.crc32
            ),
        });
    }
    Container::open(object.bytes.clone())?.expect(expect)?;
    Ok(object)
}

fn nowhere(key: &str) -> AgentError {
    AgentError::Trouble {
        what: format!("{key} is in no other region any more"),
        next: "It is looked for again at the next comparison".into(),
    }
}

#[cfg(test)]
#[path = "copy_tests.rs"]
mod tests;
