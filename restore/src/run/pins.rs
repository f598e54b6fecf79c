//! Where the restored configuration points outside the restored directory.
//!
//! Owns: what a started server is told so that it works on the restored directory and on nothing of the original's, and
//! the notes about it. `data_directory` in `postgresql.conf` wins over `-D`: on the original's machine, the server would
//! run on the original's files. These settings are not taken from `postgresql.auto.conf`, so they go on the command line.

use std::path::Path;

use crate::datadir::DataDirError;
use crate::recovery::configured;

/// Access files that a server cannot start without.
const NEEDED: [(&str, &str); 2] = [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")];

/// What is told, and what the operator is told.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pins {
    /// For the command line.
    pub settings: Vec<(String, String)>,
    /// For the report.
    pub notes: Vec<String>,
}

/// Looks at the restored configuration.
///
/// # Errors
/// A configuration file cannot be read.
pub fn of(root: &Path) -> Result<Pins, DataDirError> {
    let mut pins = Pins::default();
    pins.set("data_directory", &root.to_string_lossy());
    // The file of the original's process id must stay the original's.
    pins.set("external_pid_file", "");
    if let Some(other) = configured(root, "data_directory")?
        && Path::new(&other) != root
    {
        pins.notes.push(format!(
            "postgresql.conf says data_directory = {other}, which wins over -D: change or remove that line before you \
             start the server yourself"
        ));
    }
    for (name, usual) in NEEDED {
        let ours = root.join(usual);
        if let Some(other) = configured(root, name)?
            && !root.join(&other).exists()
            && ours.exists()
        {
            pins.set(name, &ours.to_string_lossy());
            pins.notes.push(format!(
                "postgresql.conf says {name} = {other}, which is not here: a server started by --start uses {usual} of \
                 the restored directory; provide that file or change the line"
            ));
        }
    }
    Ok(pins)
}

impl Pins {
    fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_points_at_the_original_is_pinned_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let conf = "data_directory = '/srv/original'\nhba_file = '/etc/nowhere/pg_hba.conf'\nident_file = 'pg_ident.conf'\n";
        std::fs::write(dir.path().join("postgresql.conf"), conf).unwrap();
        std::fs::write(dir.path().join("pg_hba.conf"), "").unwrap();
        std::fs::write(dir.path().join("pg_ident.conf"), "").unwrap();
        let pins = of(dir.path()).unwrap();
        let value = |name| {
            pins.settings
                .iter()
                .find(|(set, _)| set == name)
                .map(|(_, value)| value.as_str())
        };
        assert_eq!(value("data_directory"), dir.path().to_str());
        assert_eq!(value("hba_file"), dir.path().join("pg_hba.conf").to_str());
        assert_eq!(value("ident_file"), None);
        assert!(
            pins.notes.len() == 2 && pins.notes[0].contains("/srv/original"),
            "{:?}",
            pins.notes
        );
    }
}
