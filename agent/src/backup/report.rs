//! What a base backup says about itself when it is done.
//!
//! Owns: the report and how it reads. Does not own: what is stored (the record is in the archive).

use std::fmt;
use std::time::Duration;

use highwater_format::records::Backup;
use serde::Serialize;

/// A region that does not have the backup.
#[derive(Debug, Clone, Serialize)]
pub struct MissingRegion {
    /// Its name.
    pub region: String,
    /// Why it was given up.
    pub reason: String,
}

/// Where the time of a base backup went. Each part begins where the one before it ends.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Phases {
    /// Until the regions held the WAL up to where the server was.
    pub stream: Duration,
    /// Until PostgreSQL had made its checkpoint and said where the backup begins.
    pub checkpoint: Duration,
    /// Until everything was received, compressed and stored.
    pub content: Duration,
    /// Until the regions held the WAL up to the stop position and the commit mark was set.
    pub publish: Duration,
}

/// A base backup that is visible in at least as many regions as the policy asks for.
#[derive(Debug, Clone, Serialize)]
pub struct BackupReport {
    /// Its record.
    pub backup: Backup,
    /// Where it is visible.
    pub regions: Vec<String>,
    /// Where it is not.
    pub missing: Vec<MissingRegion>,
    /// From the first connection to the last commit mark.
    pub elapsed: Duration,
    /// Its parts.
    pub phases: Phases,
}

impl fmt::Display for BackupReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Backup {
            id,
            start_lsn,
            stop_lsn,
            files,
            plain_bytes,
            stored_bytes,
            packs,
            ..
        } = &self.backup;
        writeln!(f, "{id}")?;
        writeln!(
            f,
            "  WAL     {start_lsn} to {stop_lsn}, timeline {}",
            self.backup.timeline
        )?;
        writeln!(
            f,
            "  content {files} files, {plain_bytes} bytes; stored {stored_bytes} bytes in {packs} packs"
        )?;
        write!(
            f,
            "  regions {}, after {:.1} s",
            self.regions.join(", "),
            self.elapsed.as_secs_f64()
        )?;
        let Phases {
            stream,
            checkpoint,
            content,
            publish,
        } = &self.phases;
        write!(
            f,
            "\n  time    {:.1} s for the WAL stream, {:.1} s for the checkpoint, {:.1} s for the content, {:.1} s to publish",
            stream.as_secs_f64(),
            checkpoint.as_secs_f64(),
            content.as_secs_f64(),
            publish.as_secs_f64()
        )?;
        for MissingRegion { region, reason } in &self.missing {
            write!(f, "\n  MISSING {region}: {reason}")?;
        }
        Ok(())
    }
}
