//! Base backups: one `BASE_BACKUP`, read once, stored in every region.
//!
//! Owns the order of a base backup: confirm the stream, start, receive, verify, publish. The parts:
//! `tar` takes the archives apart, `entries` keeps the table of files, `packs` compresses and stores content,
//! `regions` decides which regions are still in, `wal` proves that WAL is stored, `course` that it is this server's, `verify` compares with the
//! pg_manifest, `publish` sets the commit mark.
//! Keeps: a base backup is visible in a region only when every pack, the manifest and all WAL from its start
//! to its stop are stored there, and PostgreSQL has confirmed it to the last message. Any failure before
//! leaves objects that no reader looks at.
//! Does not own: streaming WAL, deleting what a failed attempt left behind (retention).

pub mod command;
mod compressors;
pub(crate) mod course;
mod entries;
pub(crate) mod list;
mod packs;
pub(crate) mod prepare;
mod progress;
mod publish;
mod regions;
mod report;
mod stream;
mod tar;
mod verify;
pub(crate) mod wal;

use std::sync::Arc;
use std::time::Duration;

use highwater_config::Config;
use highwater_format::backup_label::BackupLabel;
use highwater_format::codec::Codec;
use highwater_format::container::Header;
use highwater_format::manifest::Manifest;
use highwater_format::records::{Backup, Tablespace, encode};
use highwater_format::{BackupId, Lsn, LsnRange, Time, TimelineId};
use highwater_pgwire::{BaseBackup, BaseBackupOptions, ConnInfo, Connection, ManifestOption, Mode};
use highwater_store::Object;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use progress::Progress;
pub use report::{BackupReport, MissingRegion, Phases};

use self::course::Served;
use self::packs::{PackSettings, Packs};
use self::publish::Publication;
use self::regions::Targets;
use self::stream::{Position, Received};
use self::wal::WalOf;
use crate::error::{AgentError, Result};
use crate::region::Archive;
use crate::server;

/// Packs' worth of bytes that one base backup may hold in memory.
const PACKS_IN_FLIGHT: u64 = 4;
/// How long the stream may take to reach the server's position before a base backup is refused. A healthy
/// one needs the flush interval and one PUT.
const STREAM_WAIT: Duration = Duration::from_secs(30);
/// How often the server's present position is asked for, while it removes WAL faster than it is read.
const POSITIONS: usize = 3;

/// How a base backup is taken.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// Text for PostgreSQL's backup_label.
    pub label: String,
    /// Compression of packs.
    pub codec: Codec,
    /// Plain bytes per pack.
    pub pack_size: u64,
    /// Bytes per second that PostgreSQL may send.
    pub max_rate: Option<u64>,
    /// Ask for an immediate checkpoint.
    pub checkpoint_fast: bool,
    /// Frames compressed at the same time.
    pub threads: usize,
    /// In how many regions the backup must succeed.
    pub needed: usize,
    /// How long the regions may take to confirm the WAL stream before the backup begins.
    pub stream_wait: Duration,
    /// How long one region may take over one object, or without new WAL at the end, before it is given up.
    pub region_patience: Duration,
}

impl BackupOptions {
    /// What the configuration says.
    pub fn from_config(config: &Config) -> BackupOptions {
        BackupOptions {
            label: format!("highwater {}", config.cluster.name),
            codec: config.backup.compression,
            pack_size: config.backup.pack_size,
            max_rate: config.backup.max_rate,
            checkpoint_fast: config.backup.checkpoint_fast,
            threads: config.backup.threads,
            needed: config.durability.policy.needed(config.regions.len()),
            stream_wait: STREAM_WAIT,
            region_patience: regions::PATIENCE,
        }
    }
}

/// What a base backup works with.
#[derive(Debug, Clone)]
pub struct BackupContext {
    /// The server.
    pub conn: ConnInfo,
    /// Where it goes.
    pub archive: Arc<Archive>,
    /// How.
    pub options: BackupOptions,
    /// Ends it early; nothing becomes visible.
    pub cancel: CancellationToken,
    /// Where it counts.
    pub progress: Progress,
}

/// Takes one base backup.
pub async fn run_backup(ctx: BackupContext) -> Result<BackupReport> {
    let cancel = ctx.cancel.clone();
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(AgentError::Cancelled),
        result = BackupRun::new(&ctx).run() => result,
    }
}

/// A base backup whose start PostgreSQL has reported.
struct Begun {
    id: BackupId,
    start: Position,
    /// The server's time, at or after the start.
    started_at: Time,
    /// The same moment here.
    at: Instant,
}

struct BackupRun<'a> {
    ctx: &'a BackupContext,
    targets: Arc<Targets>,
    began: Instant,
}

impl<'a> BackupRun<'a> {
    fn new(ctx: &'a BackupContext) -> Self {
        let options = &ctx.options;
        let targets = Targets::new(&ctx.archive.regions, options.needed, options.region_patience);
        BackupRun {
            ctx,
            targets: Arc::new(targets),
            began: Instant::now(),
        }
    }

    async fn run(self) -> Result<BackupReport> {
        let archive = &self.ctx.archive;
        let mut conn = Connection::connect(&self.ctx.conn, Mode::Replication).await?;
        let system = conn.identify_system().await?;
        if system.system_id != archive.identity.system_id {
            return Err(AgentError::OtherCluster {
                region: archive
                    .regions
                    .first()
                    .map(|region| region.name.clone())
                    .unwrap_or_default(),
                ours: system.system_id,
                theirs: archive.identity.system_id,
            });
        }
        let server_version = conn.server_version();
        let wal = WalOf {
            layout: &archive.layout,
            segment_size: archive.identity.segment_size,
            timeline: system.timeline,
        };
        let mut phases = Phases::default();
        let mut since = self.began;
        prepare::confirm_stream(&self.targets, &wal, system.xlogpos, self.ctx.options.stream_wait).await?;
        let served = self.served(system.timeline, system.xlogpos).await?;
        served.is_held_by_all(archive, &self.targets).await?;
        phases.stream = lap(&mut since);
        let mut stream = conn.base_backup(self.request()).await?;
        let start = stream::start(&mut stream, &self.ctx.cancel).await?;
        self.check_start(&wal, &system, start).await?;
        let begun = self.begin(start).await?;
        phases.checkpoint = lap(&mut since);
        let id = &begun.id;
        tracing::info!(backup = %id, start = %start.lsn, timeline = %start.timeline, "base backup begins");
        let received = self.receive(&mut stream, &begun).await;
        for warning in stream.warnings() {
            tracing::warn!(backup = %id, "PostgreSQL during the base backup: {warning}");
        }
        let received = received.map_err(|error| self.voided(id, error))?;
        let publication = self.record(&begun, server_version, received)?;
        let served = self.served(start.timeline, publication.backup.stop_lsn).await?;
        phases.content = lap(&mut since);
        publish::publish(&self.targets, archive, &wal, &publication, &served).await?;
        phases.publish = lap(&mut since);
        Ok(self.report(publication.backup, phases))
    }

    /// The server's WAL right before `end`; right before its present position where it has removed that already. What it
    /// has written since is of the same course.
    async fn served(&self, timeline: TimelineId, mut end: Lsn) -> Result<Served> {
        let (conn, archive) = (&self.ctx.conn, &self.ctx.archive);
        for _ in 0..POSITIONS {
            match Served::before(conn, archive, timeline, end).await {
                Err(AgentError::Postgres(error)) if error.is_segment_removed() => {}
                served => return served,
            }
            let mut connection = server::connect(conn).await?;
            end = end.max(connection.identify_system().await?.xlogpos);
            connection.close().await;
        }
        Served::before(conn, archive, timeline, end).await
    }

    fn request(&self) -> BaseBackupOptions {
        let options = &self.ctx.options;
        BaseBackupOptions {
            label: options.label.clone(),
            fast_checkpoint: options.checkpoint_fast,
            max_rate_kb: options
                .max_rate
                .map(|rate| u32::try_from(rate / 1024).unwrap_or(u32::MAX)),
            manifest: ManifestOption::Crc32c,
            verify_checksums: true,
            tablespace_map: true,
            progress: true,
            wait_wal: false,
        }
    }

    /// Names the backup by the server's time, which is asked for only now: see [`prepare::server_time`].
    async fn begin(&self, start: Position) -> Result<Begun> {
        let (ctx, options) = (self.ctx, &self.ctx.options);
        let started_at = prepare::server_time(&ctx.conn, &ctx.archive, start, options.stream_wait).await?;
        Ok(Begun {
            id: BackupId::new(start.timeline, start.lsn, started_at),
            start,
            started_at,
            at: Instant::now(),
        })
    }

    /// A standby may begin at a restart point that lies before what was confirmed: that WAL must be there too.
    async fn check_start(
        &self,
        wal: &WalOf<'_>,
        system: &highwater_pgwire::IdentifySystem,
        start: Position,
    ) -> Result<()> {
        if start.timeline != system.timeline {
            return Err(AgentError::Trouble {
                what: format!(
                    "the server went from timeline {} to {}",
                    system.timeline, start.timeline
                ),
                next: "It was promoted just now; back up again".into(),
            });
        }
        let range = LsnRange::new(start.lsn, system.xlogpos);
        let checks = self.targets.live().map(|target| async move {
            (
                target,
                wal.wait_for(&*target.region.quick, range, Duration::ZERO).await,
            )
        });
        self.targets.settle(futures::future::join_all(checks).await)
    }

    async fn receive(&self, stream: &mut BaseBackup, begun: &Begun) -> Result<Received> {
        let (start, started_at) = (begun.start, begun.started_at);
        let (archive, options) = (&self.ctx.archive, &self.ctx.options);
        let system_id = archive.identity.system_id;
        let mut header = Header::pack(options.codec, system_id, start.timeline, 0);
        header.sealed_at = started_at;
        header.server_end = start.lsn;
        let settings = PackSettings {
            backup: begun.id.clone(),
            layout: archive.layout.clone(),
            header,
            pack_size: options.pack_size,
            threads: options.threads,
            memory: PACKS_IN_FLIGHT * options.pack_size,
        };
        let packs = Packs::new(settings, self.targets.clone(), self.ctx.progress.clone())?;
        let seconds = started_at.unix_micros().div_euclid(1_000_000);
        let received = stream::receive(stream, packs, seconds, &self.ctx.progress, &self.ctx.cancel).await?;
        verify::against_pg_manifest(&received.pg_manifest, &received.entries, system_id)?;
        if received.stop.timeline != start.timeline {
            return Err(AgentError::Trouble {
                what: format!(
                    "the server went from timeline {} to {} during the base backup",
                    start.timeline, received.stop.timeline
                ),
                next: "It was promoted; back up again".into(),
            });
        }
        Ok(received)
    }

    fn record(&self, begun: &Begun, server_version: u32, received: Received) -> Result<Publication> {
        let (id, start, started_at) = (&begun.id, begun.start, begun.started_at);
        let label =
            BackupLabel::parse(received.backup_label.as_bytes()).map_err(|source| AgentError::Encode {
                what: "backup_label".into(),
                source,
            })?;
        if label.start_lsn != start.lsn {
            return Err(AgentError::Trouble {
                what: format!(
                    "backup_label says the base backup starts at {}, PostgreSQL said {}",
                    label.start_lsn, start.lsn
                ),
                next: "Nothing was published; back up again".into(),
            });
        }
        let stop_lsn = received.stop.lsn;
        let tablespaces = received.tablespaces.iter().filter_map(|space| {
            Some(Tablespace {
                oid: space.oid?,
                location: space.location.clone().unwrap_or_default(),
            })
        });
        let tablespaces = tablespaces.collect();
        let (files, plain_bytes) = (received.entries.files(), received.entries.bytes());
        let backup_label = received.backup_label.clone();
        let (packs, entries) = received.into_manifest_parts();
        let stored_bytes = packs.iter().map(|pack| pack.stored_len).sum();
        let count = u32::try_from(packs.len()).unwrap_or(u32::MAX);
        let manifest = Manifest {
            backup: id.clone(),
            packs,
            entries,
        };
        let invalid = |what: &str| {
            let what = what.to_owned();
            move |source| AgentError::Encode { what, source }
        };
        let manifest = Object::new(encode(&manifest).map_err(invalid("the manifest"))?);
        let backup = Backup {
            id: id.clone(),
            system_id: self.ctx.archive.identity.system_id,
            server_version,
            timeline: start.timeline,
            start_lsn: start.lsn,
            stop_lsn,
            stop_timeline: start.timeline,
            started_at,
            finished_at: started_at.saturating_add(begun.at.elapsed()),
            label: backup_label,
            tablespaces,
            from_standby: label.from_standby,
            files,
            plain_bytes,
            stored_bytes,
            packs: count,
            manifest_crc32: format!("{:08x}", manifest.crc32),
            pg_manifest: true,
            codec: self.ctx.options.codec,
        };
        let record = Object::new(encode(&backup).map_err(invalid("backup.json"))?);
        Ok(Publication {
            backup,
            manifest,
            record,
        })
    }

    fn voided(&self, id: &BackupId, error: AgentError) -> AgentError {
        let prefix = self.ctx.archive.layout.backup_dir(id);
        tracing::warn!(backup = %id, prefix, "the base backup was given up; what lies under its prefix is not visible");
        match error {
            AgentError::Postgres(error) if error.sqlstate() == Some("XX001") => AgentError::Trouble {
                what: format!(
                    "PostgreSQL found damaged pages while it sent the base backup, which was therefore discarded: {error}"
                ),
                next: "The log names file and block. Older base backups are untouched and remain usable. Mend or drop \
                       the damaged relation, then back up again"
                    .into(),
            },
            other => other,
        }
    }

    fn report(&self, backup: Backup, phases: Phases) -> BackupReport {
        let missing = |(region, reason)| MissingRegion { region, reason };
        BackupReport {
            backup,
            regions: self
                .targets
                .live()
                .map(|target| target.region.name.clone())
                .collect(),
            missing: self.targets.lost().into_iter().map(missing).collect(),
            elapsed: self.began.elapsed(),
            phases,
        }
    }
}

/// The time since `since`, which becomes now.
fn lap(since: &mut Instant) -> Duration {
    let now = Instant::now();
    now - std::mem::replace(since, now)
}
