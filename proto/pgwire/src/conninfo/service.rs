//! Connection service files: named sets of connection parameters.

use std::path::{Path, PathBuf};

use super::env::Environment;
use crate::error::PgError;

/// Where packages put the system-wide file when `PGSYSCONFDIR` is not set.
const SYSTEM_DIR: &str = "/etc/postgresql-common";

/// The parameters of a service: from the user's file, else from the system's.
pub(super) fn load(
    service: &str,
    file: Option<&str>,
    env: &Environment,
) -> Result<(Vec<(String, String)>, String), PgError> {
    let mut looked = Vec::new();
    for path in candidates(file, env) {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.is_none() => {
                looked.push(path.display().to_string());
                continue;
            }
            Err(e) => {
                return Err(PgError::config(
                    format!("service file {} cannot be read: {e}", path.display()),
                    "make it readable, or correct PGSERVICEFILE",
                ));
            }
        };
        if let Some(pairs) = parse(&text, service, &path)? {
            return Ok((pairs, format!("service file {}", path.display())));
        }
        looked.push(path.display().to_string());
    }
    Err(PgError::config(
        format!("service {service:?} is defined in none of: {}", looked.join(", ")),
        "define it, or correct the name",
    ))
}

fn candidates(file: Option<&str>, env: &Environment) -> Vec<PathBuf> {
    let user = file
        .map(PathBuf::from)
        .or_else(|| env.home_file(".pg_service.conf"));
    let system = Path::new(env.variable("PGSYSCONFDIR").unwrap_or(SYSTEM_DIR)).join("pg_service.conf");
    user.into_iter().chain([system]).collect()
}

/// The section `[service]`, or `None` if the file has none.
fn parse(text: &str, service: &str, path: &Path) -> Result<Option<Vec<(String, String)>>, PgError> {
    let mut found: Option<Vec<(String, String)>> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(section) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            if section.trim_end().strip_suffix(']') == Some(service) {
                found = Some(Vec::new());
            }
            continue;
        }
        let Some(pairs) = &mut found else { continue };
        match line.split_once('=') {
            Some((name, _)) if name == "service" || name.starts_with("ldap") => {
                return Err(bad_line(
                    path,
                    number,
                    "nested services and LDAP lookups are not supported",
                ));
            }
            Some((name, value)) => pairs.push((name.trim().to_owned(), value.trim().to_owned())),
            None => return Err(bad_line(path, number, "no \"=\" in it")),
        }
    }
    Ok(found)
}

fn bad_line(path: &Path, number: usize, why: &str) -> PgError {
    PgError::config(
        format!("{} line {}: {why}", path.display(), number + 1),
        "write keyword=value",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# c\n[one]\nhost=a\n\n[two]\nhost = b \nport=5433\n[three]\nnonsense\n";

    #[test]
    fn sections_end_at_the_next() {
        let parse = |name| parse(FILE, name, Path::new("f"));
        assert_eq!(parse("one").unwrap(), Some(vec![("host".into(), "a".into())]));
        assert_eq!(
            parse("two").unwrap(),
            Some(vec![("host".into(), "b".into()), ("port".into(), "5433".into())])
        );
        assert_eq!(parse("four").unwrap(), None);
        assert!(parse("three").unwrap_err().to_string().contains("line 9"));
    }
}
