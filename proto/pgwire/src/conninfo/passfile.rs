//! The password file, `~/.pgpass`.
//!
//! Read at every connect, so that a changed password is picked up without a restart.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use secrecy::SecretString;

/// What a line must match. Empty fields of a line match nothing; `*` matches all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Login<'a> {
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    /// Names the connection goes by: streaming connections match `replication` as well.
    pub(crate) databases: &'a [&'a str],
    pub(crate) user: &'a str,
}

/// The password of the first line that matches. A file that others may read is not used.
pub(crate) async fn lookup(path: &Path, login: Login<'_>) -> Option<SecretString> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    if !metadata.is_file() {
        tracing::warn!(file = %path.display(), "password file is not a plain file: not used");
        return None;
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            file = %path.display(),
            "password file is readable by group or others: not used; chmod it to 0600"
        );
        return None;
    }
    match tokio::fs::read_to_string(path).await {
        Ok(text) => find(&text, login),
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "password file cannot be read");
            None
        }
    }
}

fn find(text: &str, login: Login<'_>) -> Option<SecretString> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .find_map(|line| match_line(line, login))
}

fn match_line(line: &str, login: Login<'_>) -> Option<SecretString> {
    let mut fields = split(line).into_iter();
    let mut matches = |wanted: &[&str]| {
        fields
            .next()
            .is_some_and(|field| field.wildcard || wanted.contains(&field.text.as_str()))
    };
    let port = login.port.to_string();
    let found =
        matches(&[login.host]) && matches(&[&port]) && matches(login.databases) && matches(&[login.user]);
    let password = fields.next().filter(|_| found)?;
    Some(SecretString::from(password.text))
}

#[derive(Debug, Default)]
struct Field {
    text: String,
    /// An unescaped `*` on its own.
    wildcard: bool,
}

/// Splits at colons that no backslash precedes; the password is the fifth field.
fn split(line: &str) -> Vec<Field> {
    let mut fields = vec![Field::default()];
    let mut escaped_any = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let Some(field) = fields.last_mut() else { break };
        match c {
            ':' => {
                escaped_any = false;
                fields.push(Field::default());
                continue;
            }
            '\\' => {
                escaped_any = true;
                field.text.extend(chars.next());
            }
            c => field.text.push(c),
        }
        field.wildcard = field.text == "*" && !escaped_any;
    }
    fields
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    fn lookup_text(text: &str, databases: &[&str]) -> Option<String> {
        let login = Login {
            host: "db",
            port: 5432,
            databases,
            user: "hw",
        };
        find(text, login).map(|password| password.expose_secret().to_owned())
    }

    #[test]
    fn first_matching_line_wins() {
        let text = "#db:*:*:*:comment\nother:*:*:*:no\ndb:5433:*:*:no\ndb:5432:*:hw:yes\n*:*:*:*:late\n";
        assert_eq!(lookup_text(text, &["hw"]).as_deref(), Some("yes"));
    }

    #[test]
    fn streaming_matches_replication() {
        let text = "db:5432:replication:hw:stream\ndb:5432:orders:hw:sql\n";
        assert_eq!(lookup_text(text, &["orders"]).as_deref(), Some("sql"));
        assert_eq!(
            lookup_text(text, &["replication", "orders"]).as_deref(),
            Some("stream")
        );
    }

    #[test]
    fn escapes_and_short_lines() {
        assert_eq!(
            lookup_text("db:5432:*:hw:a\\:b\\\\c", &["x"]).as_deref(),
            Some("a:b\\c")
        );
        assert_eq!(lookup_text("db:5432:*:hw", &["x"]), None);
        assert_eq!(lookup_text("db:5432:\\*:hw:p", &["x"]), None);
        assert_eq!(lookup_text("", &["x"]), None);
    }

    #[tokio::test]
    async fn a_file_others_can_read_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pgpass");
        std::fs::write(&path, "*:*:*:*:secret").unwrap();
        let login = Login {
            host: "db",
            port: 5432,
            databases: &["x"],
            user: "hw",
        };
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(lookup(&path, login).await.is_none());
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert!(lookup(&path, login).await.is_some());
    }
}
