//! The text of settings. Pure.
//!
//! Owns: quoting for PostgreSQL and for the shell, the two blocks of ours in `postgresql.auto.conf`, and switching off
//! recovery settings that the backup brought along: those in this file are commented out, and those in `postgresql.conf`
//! and what it includes are overruled by the neutral values in our block.

use std::path::Path;

use super::limits::PREPARED;
use super::{Setup, inherited};
use crate::target::Action;

/// The first line of the block that only recovery needs.
pub const RECOVERY_BEGIN: &str = "# highwater-restore: recovery settings, begin";
/// Its last line.
pub const RECOVERY_END: &str = "# highwater-restore: recovery settings, end";
const PROTECT_BEGIN: &str = "# highwater-restore: settings that keep a restored copy to itself, begin; remove them when it is the primary";
const PROTECT_END: &str = "# highwater-restore: settings that keep a restored copy to itself, end";

/// What keeps a copy to itself: it must not archive into the original's archive, nor wait for the original's synchronous
/// standby, nor stream for its subscriptions. A subscription's slot on the publisher is known by its name alone, and whoever
/// streams from it takes the changes away from the original.
const PROTECT: [&str; 3] = [
    "archive_mode = off",
    "synchronous_standby_names = ''",
    "max_logical_replication_workers = 0",
];

/// A value as a quoted string of PostgreSQL's configuration files, in which backslashes escape.
#[must_use]
pub fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// A word for `/bin/sh`, with `%` doubled for PostgreSQL's own placeholders.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '+' | ':' | '@');
    let doubled = text.replace('%', "%%");
    if !text.is_empty() && text.chars().all(plain) {
        doubled
    } else {
        format!("'{}'", doubled.replace('\'', r"'\''"))
    }
}

/// The `restore_command`: absolute paths only, nothing from the environment.
#[must_use]
pub fn restore_command(program: &Path, facts: &Path) -> String {
    let word = |path: &Path| shell_word(&path.to_string_lossy());
    format!("{} wal-fetch --plan {} %f \"%p\"", word(program), word(facts))
}

/// Both blocks.
#[must_use]
pub fn blocks(root: &Path, setup: &Setup<'_>) -> String {
    let mut lines = vec![RECOVERY_BEGIN.to_owned()];
    let set = |(name, value): (&str, &str)| format!("{name} = {}", quote(value));
    lines.extend(
        neutral(setup)
            .map(set)
            .chain([set((
                "restore_command",
                &restore_command(setup.program, &super::facts_path(root)),
            ))])
            .chain(setup.target.iter().map(|(name, value)| set((name, value)))),
    );
    // Without readers, recovery needs but one of the primary's limits (max_connections and others raised after the
    // backup would stop it). Only a server that is to wait at its target must be readable.
    let hot_standby = if setup.action == Action::Pause {
        "on"
    } else {
        "off"
    };
    lines.push(set(("hot_standby", hot_standby)));
    let limit = |(name, value): &(&str, u32)| format!("{name} = {value}");
    let (lasting, limits): (Vec<_>, Vec<_>) = setup.limits.iter().partition(|(name, _)| *name == PREPARED);
    lines.extend(limits.into_iter().map(limit));
    lines.push(RECOVERY_END.to_owned());
    lines.push(PROTECT_BEGIN.to_owned());
    lines.extend(PROTECT.map(str::to_owned));
    // What was prepared at the target outlives recovery, and needs its place at every start.
    lines.extend(lasting.into_iter().filter(|(_, value)| *value > 0).map(limit));
    lines.push(PROTECT_END.to_owned());
    lines.join("\n") + "\n"
}

/// The recovery settings that are not set here, with their neutral values. Before ours: PostgreSQL takes them in the order
/// of the file, and a target that is emptied after another one was set is a second target to it.
fn neutral(setup: &Setup<'_>) -> impl Iterator<Item = (&'static str, &'static str)> {
    let ours = |name: &str| name == "restore_command" || setup.target.iter().any(|(set, _)| *set == name);
    inherited::RECOVERY
        .into_iter()
        .filter(move |(name, _)| !ours(name))
}

/// `existing` without older blocks of ours, with recovery settings commented out, and `blocks` behind it. Bytes, because
/// values may be in any encoding, and all that is not changed must stay as it is.
#[must_use]
pub fn with_blocks(existing: &[u8], blocks: &str) -> Vec<u8> {
    let rest = without(
        &without(existing, RECOVERY_BEGIN, RECOVERY_END),
        PROTECT_BEGIN,
        PROTECT_END,
    );
    let mut text = Vec::new();
    for line in lines(&rest) {
        if inherited::is_recovery(&String::from_utf8_lossy(line)) {
            text.extend(b"# highwater-restore: was ");
        }
        text.extend(line);
        text.push(b'\n');
    }
    text.extend(blocks.as_bytes());
    text
}

/// `existing` without the block that only recovery needs.
#[must_use]
pub fn without_recovery(existing: &[u8]) -> Vec<u8> {
    without(existing, RECOVERY_BEGIN, RECOVERY_END)
}

fn without(text: &[u8], begin: &str, end: &str) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut inside = false;
    for line in lines(text) {
        inside |= line == begin.as_bytes();
        if !inside {
            kept.extend(line);
            kept.push(b'\n');
        }
        inside &= line != end.as_bytes();
    }
    kept
}

/// As `str::lines` has them.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let whole = text.split_inclusive(|byte| *byte == b'\n');
    whole.map(|line| {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        line.strip_suffix(b"\r").unwrap_or(line)
    })
}

/// A configuration file for a backup that has none, because it lay outside the data directory (as Debian has it).
#[must_use]
pub fn generated(name: &str) -> String {
    let note = "# Written by highwater-restore: the backup has no such file, because it lay outside the data directory.\n";
    let content = match name {
        "postgresql.conf" => {
            "# Defaults only. Put the original's configuration here before this server takes over its work.\n\
             listen_addresses = 'localhost'\n"
        }
        "pg_hba.conf" => "local all all peer\nlocal replication all peer\n",
        _ => "",
    };
    format!("{note}{content}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::facts::Facts;

    #[test]
    fn values_survive_postgresqls_reading() {
        assert_eq!(quote(r"it's C:\x"), r"'it''s C:\\x'");
    }

    #[test]
    fn odd_paths_survive_the_shell_and_the_placeholders() {
        let command = restore_command(
            Path::new("/opt/high water/restore"),
            Path::new("/data/100%/it's/facts"),
        );
        assert_eq!(
            command,
            r#"'/opt/high water/restore' wal-fetch --plan '/data/100%%/it'\''s/facts' %f "%p""#
        );
        let plain = restore_command(
            Path::new("/usr/bin/highwater-restore"),
            Path::new("/srv/data/f.json"),
        );
        assert_eq!(
            plain,
            r#"/usr/bin/highwater-restore wal-fetch --plan /srv/data/f.json %f "%p""#
        );
    }

    #[test]
    fn recovery_settings_of_the_backup_are_switched_off_and_the_rest_is_kept() {
        let existing = "# comment\nwork_mem = '4MB'\nrecovery_target_time = 'x'\nrestore_command='cp'\nrecovery_prefetch = on\n";
        let text = String::from_utf8(with_blocks(existing.as_bytes(), "NEW\n")).unwrap();
        let was = "# highwater-restore: was ";
        let wanted = format!(
            "# comment\nwork_mem = '4MB'\n{was}recovery_target_time = 'x'\n{was}restore_command='cp'\nrecovery_prefetch = on\nNEW\n"
        );
        assert_eq!(text, wanted);
    }

    #[test]
    fn our_blocks_replace_older_ones_and_only_recovery_goes_after_it() {
        let blocks = format!(
            "{RECOVERY_BEGIN}\nx = 1\n{RECOVERY_END}\n{PROTECT_BEGIN}\narchive_mode = off\n{PROTECT_END}\n"
        );
        let once = with_blocks(b"a = 1\n", &blocks);
        assert_eq!(with_blocks(&once, &blocks), once);
        let left = String::from_utf8(without_recovery(&once)).unwrap();
        assert_eq!(
            left,
            format!("a = 1\n{PROTECT_BEGIN}\narchive_mode = off\n{PROTECT_END}\n")
        );
    }

    #[test]
    fn a_copy_keeps_to_itself_and_to_what_was_prepared() {
        let dir = tempfile::tempdir().unwrap();
        let facts: Facts = serde_json::from_str(
            r#"{"format": 1, "note": "", "cluster": "orders", "system_id": "7", "segment_size": 16777216, "regions": [],
                "timelines": [], "known_timelines": [], "prefetch_bytes": 0}"#,
        )
        .unwrap();
        let of = |limits: &[(&'static str, u32)]| {
            let setup = Setup {
                program: Path::new("/usr/bin/highwater-restore"),
                facts: &facts,
                target: &[],
                action: Action::Promote,
                limits,
                generate_configuration: false,
            };
            let text = blocks(dir.path(), &setup);
            String::from_utf8(without_recovery(text.as_bytes())).unwrap()
        };
        let protect = PROTECT.join("\n");
        assert!(protect.contains("max_logical_replication_workers = 0"));
        let none = format!("{PROTECT_BEGIN}\n{protect}\n{PROTECT_END}\n");
        assert_eq!(of(&[("max_connections", 7), (PREPARED, 0)]), none);
        let some = format!("{PROTECT_BEGIN}\n{protect}\n{PREPARED} = 3\n{PROTECT_END}\n");
        assert_eq!(of(&[("max_connections", 7), (PREPARED, 3)]), some);
    }

    #[test]
    fn values_in_any_encoding_stay_as_they_are() {
        let latin: &[u8] = b"application_name = 'caf\xe9'\n";
        let recovery: &[u8] = b"restore_command = '\xe9'";
        let text = with_blocks(&[latin, recovery].concat(), "NEW\n");
        let was = [latin, b"# highwater-restore: was ", recovery, b"\nNEW\n"].concat();
        assert_eq!(text, was);
        assert_eq!(without_recovery(latin), latin);
    }
}
