//! The files of a base backup, from the regions into the data directory.
//!
//! Owns: reading packs in parallel within a bound of bytes, verification before a byte is written, per-pack fallback
//! to the next region, and the check of the result against PostgreSQL's own manifest. Does not own: where files go
//! (see [`crate::datadir`]) and the order at the end.
//!
//! Memory: at most [`Limits::bytes`] of stored packs, and one frame of plain bytes for each blocking thread, whatever
//! the size of the database. Nothing is staged: frames are decoded straight into the files.

mod checksums;
pub mod packs;
pub mod source;
pub mod spread;
mod unpack;
mod vouch;

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use highwater_config::Exit;
use highwater_format::container::{Expect, Object};
use highwater_format::layout::Layout;
use highwater_format::manifest::{Manifest, PackInfo};
use highwater_format::pg_manifest::PgManifest;
use highwater_format::records::{self, Backup};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::datadir::tree::Access;
use crate::datadir::{DataDir, FileToWrite};
use checksums::Part;
pub use source::{Nowhere, Sources};
use source::{ReadError, Reject};
use spread::{BadSpread, PackSlices};

/// The name under which PostgreSQL's own manifest lies in a backup and in the data directory.
pub const PG_MANIFEST: &str = "backup_manifest";

/// How much is read at once.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Packs in flight, at least one.
    pub packs: usize,
    /// Stored bytes in flight. A single larger pack is still read, alone.
    pub bytes: u64,
}

impl Default for Limits {
    /// Eight packs hide the latency of a store; 128 MiB hold eight packs of 32 MiB that compress by a half.
    fn default() -> Self {
        Self {
            packs: 8,
            bytes: 128 << 20,
        }
    }
}

/// How far the fetch has come; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Plain bytes written.
    pub written: AtomicU64,
    /// Stored bytes read.
    pub read: AtomicU64,
}

/// Why the files could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No region has a good copy of an object.
    #[error("{0}")]
    Nowhere(#[from] Nowhere),
    /// The manifest contradicts itself.
    #[error("{0}")]
    BadSpread(#[from] BadSpread),
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not whole.
    #[error("{name} was written up to byte {written} of {size}; run `highwater-restore verify`")]
    Incomplete {
        /// Its path in the backup.
        name: String,
        /// Bytes without a hole.
        written: u64,
        /// Its size.
        size: u64,
    },
    /// A file differs from what PostgreSQL sent when the backup was taken.
    #[error(
        "{name} is not as PostgreSQL sent it: {problem}; run `highwater-restore verify`, and restore another backup"
    )]
    NotAsSent {
        /// Its path in the backup.
        name: String,
        /// What differs.
        problem: String,
    },
    /// A blocking thread ended without a result.
    #[error("writing a pack was cut off: {0}")]
    CutOff(String),
}

impl FetchError {
    /// What the program ends with.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Nowhere(error) => error.exit(),
            Self::BadSpread(_) | Self::Incomplete { .. } | Self::NotAsSent { .. } => Exit::Damage,
            Self::Write { .. } | Self::CutOff(_) => Exit::Trouble,
        }
    }
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Fetched {
    /// Files with content.
    pub files: u64,
    /// Their bytes.
    pub plain_bytes: u64,
    /// Bytes read from the regions.
    pub stored_bytes: u64,
    /// Packs read.
    pub packs: u64,
    /// Packs that the preferred region did not deliver and another did.
    pub fell_back: u64,
    /// Files whose checksum PostgreSQL's own manifest confirmed.
    pub vouched: u64,
}

/// Reads and checks the manifest of `backup`.
///
/// # Errors
/// No region has a good copy.
pub async fn manifest(sources: &Sources, layout: &Layout, backup: &Backup) -> Result<Manifest, Nowhere> {
    let key = layout.manifest(&backup.id);
    let had = sources.read::<_, Infallible, _, _>(&key, |bytes| {
        std::future::ready(read_manifest(&bytes, backup).map_err(Reject::Copy))
    });
    match had.await {
        Ok(had) => Ok(had.value),
        Err(ReadError::Nowhere(nowhere)) => Err(nowhere),
        Err(ReadError::Fatal(never)) => match never {},
    }
}

fn read_manifest(bytes: &Bytes, backup: &Backup) -> Result<Manifest, String> {
    let crc32 = format!("{:08x}", crc32fast::hash(bytes));
    if crc32 != backup.manifest_crc32 {
        return Err(format!(
            "its CRC-32 is {crc32}, and the backup was finished with {}",
            backup.manifest_crc32
        ));
    }
    let manifest: Manifest = records::decode(bytes).map_err(|error| error.to_string())?;
    manifest.validate().map_err(|error| error.to_string())?;
    if manifest.backup != backup.id {
        return Err(format!("it belongs to backup {}", manifest.backup));
    }
    Ok(manifest)
}

/// What a fetch works on.
#[derive(Debug)]
pub struct Job<'a> {
    /// Where to read.
    pub sources: &'a Sources,
    /// The keys.
    pub layout: &'a Layout,
    /// The backup.
    pub backup: &'a Backup,
    /// Its packs, as the manifest lists them.
    pub packs: Vec<PackInfo>,
    /// Where to write.
    pub into: &'a DataDir,
    /// How much at once.
    pub limits: Limits,
    /// Told how far it is.
    pub progress: Arc<Progress>,
}

/// Fetches all files and checks them.
///
/// # Errors
/// The first pack that no region has, or the first file that cannot be written or is not as it was sent.
pub async fn fetch(job: Job<'_>) -> Result<Fetched, FetchError> {
    let files: Arc<[FileToWrite]> = job.into.files().into();
    let packs = spread::spread(&files, job.packs)?;
    let shared = Arc::new(Shared {
        files: files.clone(),
        access: job.into.access().clone(),
        memory: Arc::new(Semaphore::new(permits(job.limits.bytes))),
        most: permits(job.limits.bytes),
        progress: job.progress.clone(),
        writers: TaskTracker::new(),
    });
    let mut result = Fetched {
        files: files.len() as u64,
        packs: packs.len() as u64,
        ..Fetched::default()
    };
    result.stored_bytes = packs.iter().map(|pack| pack.info.stored_len).sum();
    let fetched = packs.into_iter().map(|pack| {
        let expect = Expect::pack(job.layout.system_id(), &job.backup.id, pack.info.number);
        let key = job.layout.pack(&job.backup.id, pack.info.number);
        one_pack(job.sources, key, expect, Arc::new(pack), shared.clone())
    });
    let fetched: Result<Vec<(Vec<Part>, bool)>, FetchError> = stream::iter(fetched)
        .buffer_unordered(job.limits.packs.max(1))
        .try_collect()
        .await;
    // A writer that has begun cannot be called back: who clears the directory after a failure must not meet one.
    shared.writers.close();
    shared.writers.wait().await;
    let mut parts = Vec::with_capacity(files.len());
    for (pack_parts, fell_back) in fetched? {
        parts.extend(pack_parts);
        result.fell_back += u64::from(fell_back);
    }
    result.plain_bytes = job.progress.written.load(Ordering::Relaxed);
    let manifest_path = job
        .into
        .has_pg_manifest()
        .then(|| job.into.root().join(PG_MANIFEST));
    let checked = tokio::task::spawn_blocking(move || check_files(&files, parts, manifest_path.as_deref()));
    result.vouched = checked
        .await
        .map_err(|error| FetchError::CutOff(error.to_string()))??;
    Ok(result)
}

fn check_files(
    files: &[FileToWrite],
    parts: Vec<Part>,
    pg_manifest: Option<&Path>,
) -> Result<u64, FetchError> {
    let written = checksums::join(files, parts)?;
    let Some(path) = pg_manifest else {
        return Ok(0);
    };
    let bytes = std::fs::read(path).map_err(|source| FetchError::Write {
        path: path.to_owned(),
        source,
    })?;
    let pg_manifest = PgManifest::parse(&bytes).map_err(|error| FetchError::NotAsSent {
        name: PG_MANIFEST.to_owned(),
        problem: error.to_string(),
    })?;
    vouch::check(files, &written, &pg_manifest)
}

/// What all packs share.
#[derive(Debug)]
struct Shared {
    files: Arc<[FileToWrite]>,
    access: Access,
    memory: Arc<Semaphore>,
    most: usize,
    progress: Arc<Progress>,
    /// Those who write files now.
    writers: TaskTracker,
}

/// Memory is counted in KiB, because a semaphore's permits may be fewer than bytes.
fn permits(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(1024))
        .unwrap_or(usize::MAX)
        .clamp(1, Semaphore::MAX_PERMITS)
}

async fn one_pack(
    sources: &Sources,
    key: String,
    expect: Expect,
    pack: Arc<PackSlices>,
    shared: Arc<Shared>,
) -> Result<(Vec<Part>, bool), FetchError> {
    let wanted = u32::try_from(permits(pack.info.stored_len).min(shared.most)).unwrap_or(u32::MAX);
    let held = shared.memory.clone().acquire_many_owned(wanted).await;
    let _held = held.map_err(|error| FetchError::CutOff(error.to_string()))?;
    let read = sources.read(&key, async |bytes: Bytes| {
        shared
            .progress
            .read
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let (expect, pack, shared) = (expect.clone(), pack.clone(), shared.clone());
        let writers = shared.writers.clone();
        let written = writers.spawn_blocking(move || open_and_write(bytes, &expect, &pack, &shared));
        written
            .await
            .map_err(|error| Reject::Fatal(FetchError::CutOff(error.to_string())))?
    });
    match read.await {
        Ok(had) => {
            let bytes: u64 = pack.slices.iter().map(|slice| slice.len).sum();
            shared.progress.written.fetch_add(bytes, Ordering::Relaxed);
            if had.fell_back {
                tracing::warn!(key, region = %had.region, "taken from another region");
            }
            Ok((had.value, had.fell_back))
        }
        Err(ReadError::Nowhere(nowhere)) => Err(nowhere.into()),
        Err(ReadError::Fatal(error)) => Err(error),
    }
}

fn open_and_write(
    bytes: Bytes,
    expect: &Expect,
    pack: &PackSlices,
    shared: &Shared,
) -> Result<Vec<Part>, Reject<FetchError>> {
    let bad = |error: String| Reject::Copy(error);
    let crc32 = format!("{:08x}", crc32fast::hash(&bytes));
    if crc32 != pack.info.crc32 {
        return Err(bad(format!(
            "its CRC-32 is {crc32}, and the manifest says {}",
            pack.info.crc32
        )));
    }
    let object = Object::open(bytes).map_err(|error| bad(error.to_string()))?;
    object.expect(expect).map_err(|error| bad(error.to_string()))?;
    if object.header().plain_len != pack.info.plain_len {
        let (found, wanted) = (object.header().plain_len, pack.info.plain_len);
        return Err(bad(format!(
            "it holds {found} bytes, and the manifest says {wanted}"
        )));
    }
    unpack::unpack(&object, &pack.slices, &shared.files, &shared.access)
}
