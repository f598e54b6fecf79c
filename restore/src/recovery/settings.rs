//! The text of settings. Pure.
//!
//! Owns: quoting for PostgreSQL and for the shell, the two blocks of ours in `postgresql.auto.conf`, and switching off
//! recovery settings that the backup brought along: those in this file are commented out, and those in `postgresql.conf`
//! and what it includes are overruled by the neutral values in our block.

use std::path::Path;

use super::{Setup, inherited};
use crate::target::Action;

/// The first line of the block that only recovery needs.
pub const RECOVERY_BEGIN: &str = "# highwater-restore: recovery settings, begin";
/// Its last line.
pub const RECOVERY_END: &str = "# highwater-restore: recovery settings, end";
const PROTECT_BEGIN: &str = "# highwater-restore: settings that keep a restored copy to itself, begin; remove them when it is the primary";
const PROTECT_END: &str = "# highwater-restore: settings that keep a restored copy to itself, end";

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
    // Without readers, recovery needs none of the primary's limits (max_connections and others raised after the
    // backup would stop it). Only a server that is to wait at its target must be readable.
    let hot_standby = if setup.action == Action::Pause {
        "on"
    } else {
        "off"
    };
    lines.push(set(("hot_standby", hot_standby)));
    lines.extend(
        setup
            .limits
            .iter()
            .map(|(name, value)| format!("{name} = {value}")),
    );
    lines.push(RECOVERY_END.to_owned());
    lines.push(PROTECT_BEGIN.to_owned());
    // A copy must not archive into the original's archive, nor wait for the original's synchronous standby.
    lines.push("archive_mode = off".to_owned());
    lines.push("synchronous_standby_names = ''".to_owned());
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

/// `existing` without older blocks of ours, with recovery settings commented out, and `blocks` behind it.
#[must_use]
pub fn with_blocks(existing: &str, blocks: &str) -> String {
    let rest = without(
        &without(existing, RECOVERY_BEGIN, RECOVERY_END),
        PROTECT_BEGIN,
        PROTECT_END,
    );
    let mut text = String::new();
    for line in rest.lines() {
        if inherited::is_recovery(line) {
            text.push_str("# highwater-restore: was ");
        }
        text.push_str(line);
        text.push('\n');
    }
    text + blocks
}

/// `existing` without the block that only recovery needs.
#[must_use]
pub fn without_recovery(existing: &str) -> String {
    without(existing, RECOVERY_BEGIN, RECOVERY_END)
}

fn without(text: &str, begin: &str, end: &str) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in text.lines() {
        inside |= line == begin;
        if !inside {
            kept.push_str(line);
            kept.push('\n');
        }
        inside &= line != end;
    }
    kept
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
        let text = with_blocks(existing, "NEW\n");
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
        let once = with_blocks("a = 1\n", &blocks);
        assert_eq!(with_blocks(&once, &blocks), once);
        let left = without_recovery(&once);
        assert_eq!(
            left,
            format!("a = 1\n{PROTECT_BEGIN}\narchive_mode = off\n{PROTECT_END}\n")
        );
    }
}
