//! Settings that the backup brought along: which ones must not stay in force, and reading one out of a file.
//!
//! Owns: the neutral value of every recovery setting, and a reader for the lines of a configuration file. Pure. Included
//! files are not followed: what is written into `postgresql.auto.conf` wins over them, and what must hold beyond that
//! goes on the server's command line.

/// Every recovery setting with its neutral value. Some of them act without being a target: an old delay stops
/// replay for hours, an old `archive_cleanup_command` deletes from another archive, and PostgreSQL refuses two targets.
pub(super) const RECOVERY: [(&str, &str); 12] = [
    ("restore_command", ""),
    ("archive_cleanup_command", ""),
    ("recovery_end_command", ""),
    ("recovery_target", ""),
    ("recovery_target_time", ""),
    ("recovery_target_xid", ""),
    ("recovery_target_name", ""),
    ("recovery_target_lsn", ""),
    ("recovery_target_inclusive", "on"),
    ("recovery_target_timeline", "latest"),
    ("recovery_target_action", "pause"),
    ("recovery_min_apply_delay", "0"),
];

/// Whether `line` of a configuration file sets a recovery setting.
pub(super) fn is_recovery(line: &str) -> bool {
    let name = name_of(line);
    RECOVERY.iter().any(|(known, _)| name.eq_ignore_ascii_case(known))
}

/// What the last line of `text` that sets `name` sets it to, without its quotes.
#[must_use]
pub fn value_of(text: &str, name: &str) -> Option<String> {
    let mut lines = text.lines().rev();
    lines
        .find(|line| name_of(line).eq_ignore_ascii_case(name))
        .map(value)
}

/// The setting that a line sets; names are of any case.
fn name_of(line: &str) -> &str {
    let line = line.trim_start();
    line.split(|c: char| c == '=' || c.is_whitespace())
        .next()
        .unwrap_or_default()
}

/// Behind the name: an optional equals sign, then a word or a quoted string (`guc-file.l`), then perhaps a comment.
fn value(line: &str) -> String {
    let rest = line.trim_start();
    let rest = rest.get(name_of(rest).len()..).unwrap_or_default().trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    match rest.strip_prefix('\'') {
        Some(quoted) => unquoted(quoted),
        None => {
            let end = |c: char| c == '#' || c.is_whitespace();
            rest.split(end).next().unwrap_or_default().to_owned()
        }
    }
}

fn unquoted(text: &str) -> String {
    let (mut value, mut chars) = (String::new(), text.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '\'' if chars.peek() != Some(&'\'') => break,
            '\'' | '\\' => value.extend(chars.next()),
            _ => value.push(c),
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_counts_however_it_is_written() {
        let text = "Data_Directory '/old'\n data_directory = '/srv/it''s' # moved\n#data_directory = '/no'\nport=5433#x\n";
        assert_eq!(value_of(text, "data_directory").as_deref(), Some("/srv/it's"));
        assert_eq!(value_of(text, "port").as_deref(), Some("5433"));
        assert_eq!(value_of(text, "hba_file"), None);
    }

    #[test]
    fn recovery_settings_are_known_in_any_case() {
        assert!(is_recovery(" Recovery_Target_Time='x'") && is_recovery("restore_command 'cp'"));
        assert!(!is_recovery("recovery_prefetch = on") && !is_recovery("# restore_command = ''"));
    }
}
