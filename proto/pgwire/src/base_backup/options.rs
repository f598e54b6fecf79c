//! What a base backup is asked to do, and the command text for each server version.

use crate::error::PgError;

/// `MAX_RATE` in kB/s, as basebackup.c bounds it (`MAX_RATE_LOWER`, `MAX_RATE_UPPER`).
const MAX_RATE: std::ops::RangeInclusive<u32> = 32..=1_048_576;
/// `MAXPGPATH`: longest label.
const LABEL_LIMIT: usize = 1024;

/// Whether the server makes a pg_manifest, and with which checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ManifestOption {
    /// No pg_manifest.
    None,
    /// File sizes only.
    NoChecksums,
    /// The server's default: the cheapest that finds damage.
    #[default]
    Crc32c,
    /// SHA-224.
    Sha224,
    /// SHA-256: costs noticeable CPU on the server.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl ManifestOption {
    fn algorithm(self) -> Option<&'static str> {
        match self {
            ManifestOption::None => None,
            ManifestOption::NoChecksums => Some("NONE"),
            ManifestOption::Crc32c => Some("CRC32C"),
            ManifestOption::Sha224 => Some("SHA224"),
            ManifestOption::Sha256 => Some("SHA256"),
            ManifestOption::Sha384 => Some("SHA384"),
            ManifestOption::Sha512 => Some("SHA512"),
        }
    }
}

/// What a base backup is asked to do. WAL is never included: the stream has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// Text that ends up in `backup_label`.
    pub label: String,
    /// Checkpoint at once instead of spreading it.
    pub fast_checkpoint: bool,
    /// Most kB per second the server sends: 32 to 1048576.
    pub max_rate_kb: Option<u32>,
    /// Whether and how a pg_manifest is made.
    pub manifest: ManifestOption,
    /// Check page checksums while reading, where the cluster has them.
    pub verify_checksums: bool,
    /// Put a `tablespace_map` file into the base archive.
    pub tablespace_map: bool,
    /// Send size estimates and, from 15 on, progress.
    pub progress: bool,
    /// Wait at the end until the WAL is archived by `archive_command`.
    pub wait_wal: bool,
}

impl Default for BaseBackupOptions {
    fn default() -> BaseBackupOptions {
        BaseBackupOptions {
            label: "highwater".to_owned(),
            fast_checkpoint: true,
            max_rate_kb: None,
            manifest: ManifestOption::default(),
            verify_checksums: true,
            tablespace_map: true,
            progress: true,
            wait_wal: false,
        }
    }
}

impl BaseBackupOptions {
    /// The command, parenthesised for 15 and newer and as a keyword list before.
    pub(super) fn command(&self, parenthesised: bool) -> Result<String, PgError> {
        self.check()?;
        let label = self.label.replace('\'', "''");
        Ok(match parenthesised {
            true => format!("BASE_BACKUP ({})", self.options(&label).join(", ")),
            false => format!("BASE_BACKUP {}", self.keywords(&label).join(" ")),
        })
    }

    fn check(&self) -> Result<(), PgError> {
        if self.label.len() > LABEL_LIMIT || self.label.contains(['\n', '\r', '\0']) {
            return Err(PgError::Argument {
                what: "backup label",
                value: self.label.chars().take(80).collect(),
                reason: "at most 1024 bytes on one line",
            });
        }
        match self.max_rate_kb {
            Some(rate) if !MAX_RATE.contains(&rate) => Err(PgError::Argument {
                what: "backup rate",
                value: format!("{rate} kB/s"),
                reason: "PostgreSQL takes 32 to 1048576 kB/s",
            }),
            _ => Ok(()),
        }
    }

    fn options(&self, label: &str) -> Vec<String> {
        let mut options = vec![
            format!("LABEL '{label}'"),
            format!("PROGRESS {}", self.progress),
            format!(
                "CHECKPOINT '{}'",
                if self.fast_checkpoint { "fast" } else { "spread" }
            ),
            "WAL false".to_owned(),
            format!("WAIT {}", self.wait_wal),
            format!("TABLESPACE_MAP {}", self.tablespace_map),
            format!("VERIFY_CHECKSUMS {}", self.verify_checksums),
        ];
        options.extend(self.max_rate_kb.map(|rate| format!("MAX_RATE {rate}")));
        match self.manifest.algorithm() {
            Some(algorithm) => {
                options.push("MANIFEST 'yes'".to_owned());
                options.push(format!("MANIFEST_CHECKSUMS '{algorithm}'"));
            }
            None => options.push("MANIFEST 'no'".to_owned()),
        }
        options
    }

    fn keywords(&self, label: &str) -> Vec<String> {
        let mut keywords = vec![format!("LABEL '{label}'")];
        let mut flag = |set: bool, word: &str| {
            if set {
                keywords.push(word.to_owned());
            }
        };
        flag(self.progress, "PROGRESS");
        flag(self.fast_checkpoint, "FAST");
        flag(!self.wait_wal, "NOWAIT");
        flag(self.tablespace_map, "TABLESPACE_MAP");
        flag(!self.verify_checksums, "NOVERIFY_CHECKSUMS");
        keywords.extend(self.max_rate_kb.map(|rate| format!("MAX_RATE {rate}")));
        match self.manifest.algorithm() {
            Some(algorithm) => {
                keywords.push("MANIFEST 'yes'".to_owned());
                keywords.push(format!("MANIFEST_CHECKSUMS '{algorithm}'"));
            }
            None => keywords.push("MANIFEST 'no'".to_owned()),
        }
        keywords
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_syntaxes() {
        let options = BaseBackupOptions {
            label: "it's".into(),
            max_rate_kb: Some(64),
            manifest: ManifestOption::Sha256,
            ..BaseBackupOptions::default()
        };
        assert_eq!(
            options.command(true).unwrap(),
            "BASE_BACKUP (LABEL 'it''s', PROGRESS true, CHECKPOINT 'fast', WAL false, WAIT false, \
             TABLESPACE_MAP true, VERIFY_CHECKSUMS true, MAX_RATE 64, MANIFEST 'yes', MANIFEST_CHECKSUMS 'SHA256')"
        );
        assert_eq!(
            options.command(false).unwrap(),
            "BASE_BACKUP LABEL 'it''s' PROGRESS FAST NOWAIT TABLESPACE_MAP MAX_RATE 64 MANIFEST 'yes' \
             MANIFEST_CHECKSUMS 'SHA256'"
        );
    }

    #[test]
    fn without_a_manifest_no_algorithm_is_named() {
        let options = BaseBackupOptions {
            manifest: ManifestOption::None,
            ..BaseBackupOptions::default()
        };
        assert!(options.command(true).unwrap().ends_with("MANIFEST 'no')"));
        assert!(options.command(false).unwrap().ends_with("MANIFEST 'no'"));
    }

    #[test]
    fn what_the_server_would_refuse_is_refused_here() {
        let bad = |change: fn(&mut BaseBackupOptions)| {
            let mut options = BaseBackupOptions::default();
            change(&mut options);
            options.command(true).is_err()
        };
        assert!(bad(|o| o.label = "two\nlines".into()));
        assert!(bad(|o| o.max_rate_kb = Some(31)));
        assert!(bad(|o| o.max_rate_kb = Some(2_000_000)));
    }
}
