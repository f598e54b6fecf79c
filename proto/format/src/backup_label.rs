//! PostgreSQL's `backup_label`: from where a restored base backup must replay.
//!
//! Owns: reading its lines. Does not own: the file, which is kept and restored as it was written.
//!
//! Written by `build_backup_content` in PostgreSQL's `access/transam/xlogbackup.c`: one `NAME: value` per line.
//! Lines that are not known are passed over, as later versions may add some.

use crate::error::FormatError;
use crate::lsn::Lsn;
use crate::timeline::TimelineId;
use crate::walname::WalName;

const WHAT: &str = "backup_label";

/// What a `backup_label` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// `START WAL LOCATION`: the redo point, where replay begins.
    pub start_lsn: Lsn,
    /// The segment file that holds it, as named there.
    pub start_segment: WalName,
    /// `CHECKPOINT LOCATION`: the checkpoint record, behind the redo point.
    pub checkpoint_lsn: Lsn,
    /// `START TIMELINE`; by the segment's name where that line is missing.
    pub timeline: TimelineId,
    /// `BACKUP FROM`: a standby.
    pub from_standby: bool,
    /// `START TIME` as written: local time of the server with its zone's abbreviation.
    pub start_time: Option<String>,
    /// `LABEL`.
    pub label: String,
    /// `INCREMENTAL FROM LSN`: the backup holds only what changed since the one that started there.
    pub incremental_from: Option<Lsn>,
}

impl BackupLabel {
    /// Reads the file.
    ///
    /// # Errors
    /// [`FormatError::Document`] naming the line that is missing or not understood.
    pub fn parse(text: &[u8]) -> Result<Self, FormatError> {
        // The label is the operator's text, in any encoding.
        let text = String::from_utf8_lossy(text);
        let line = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .map(str::trim_end)
        };
        let needed = |name: &str| line(name).ok_or_else(|| damaged(format!("it has no line {name}")));

        let start = needed("START WAL LOCATION")?;
        let (start_lsn, start_segment) = start
            .split_once(" (file ")
            .and_then(|(lsn, file)| Some((lsn.parse().ok()?, WalName::parse(file.strip_suffix(')')?)?)))
            .ok_or_else(|| damaged(format!("START WAL LOCATION is {start:?}, no LSN and segment")))?;
        let timeline = match line("START TIMELINE") {
            Some(number) => number
                .parse()
                .map_err(|error| damaged(format!("START TIMELINE: {error}")))?,
            None => start_segment.timeline,
        };
        if timeline != start_segment.timeline {
            return Err(damaged(format!(
                "START TIMELINE is {timeline}, its segment is {start_segment}"
            )));
        }
        let lsn = |name: &str, text: &str| {
            text.parse::<Lsn>()
                .map_err(|error| damaged(format!("{name}: {error}")))
        };
        let incremental = "INCREMENTAL FROM LSN";
        Ok(Self {
            start_lsn,
            start_segment,
            checkpoint_lsn: lsn("CHECKPOINT LOCATION", needed("CHECKPOINT LOCATION")?)?,
            timeline,
            from_standby: line("BACKUP FROM") == Some("standby"),
            start_time: line("START TIME").map(str::to_owned),
            label: line("LABEL").unwrap_or_default().to_owned(),
            incremental_from: line(incremental).map(|text| lsn(incremental, text)).transpose()?,
        })
    }
}

fn damaged(problem: String) -> FormatError {
    FormatError::Document {
        what: WHAT.into(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITTEN: &str = include_str!("../testdata/pg/backup_label_15");

    #[test]
    fn postgresql_15_wrote_this() {
        let label = BackupLabel::parse(WRITTEN.as_bytes()).unwrap();
        assert_eq!(label.start_lsn, "0/9000D8".parse().unwrap());
        assert_eq!(label.start_segment.to_string(), "000000020000000000000009");
        assert_eq!(label.checkpoint_lsn, "0/900110".parse().unwrap());
        assert_eq!(label.timeline.get(), 2);
        assert!(!label.from_standby);
        assert_eq!(label.label, "a label with ü");
        assert_eq!(label.start_time.as_deref(), Some("2026-11-20 15:22:30 UTC"));
        assert_eq!(label.incremental_from, None);
    }

    #[test]
    fn a_standby_and_an_incremental_backup_say_so() {
        let text = WRITTEN.replace("primary", "standby") + "INCREMENTAL FROM LSN: 0/2000028\n";
        let label = BackupLabel::parse(text.as_bytes()).unwrap();
        assert!(label.from_standby);
        assert_eq!(label.incremental_from, Some(Lsn(0x200_0028)));
    }

    #[test]
    fn a_label_in_another_encoding_is_no_obstacle() {
        let mut bytes = WRITTEN.as_bytes().to_vec();
        let at = bytes.windows(2).position(|pair| pair == "ü".as_bytes()).unwrap();
        bytes.splice(at..at + 2, [0xFC]);
        assert_eq!(BackupLabel::parse(&bytes).unwrap().timeline.get(), 2);
    }

    #[test]
    fn what_replay_depends_on_must_be_there() {
        for (from, to) in [
            ("START WAL LOCATION", "START OF WAL"),
            ("0/9000D8", "0:9000D8"),
            ("000000020000000000000009", "2"),
            ("CHECKPOINT LOCATION: 0/", "CHECKPOINT LOCATION: "),
            ("START TIMELINE: 2", "START TIMELINE: 3"),
            ("START TIMELINE: 2", "START TIMELINE: none"),
        ] {
            let error = BackupLabel::parse(WRITTEN.replace(from, to).as_bytes()).unwrap_err();
            assert!(error.to_string().contains("backup_label"), "{error}");
        }
    }
}
