//! The server of the restored cluster: finding the right program and starting it.
//!
//! Owns: which `postgres` is used (the major version of the backup, and no other), the account it runs under, what it is
//! told on its command line, and where it logs. Does not own: waiting for it (see [`super::watch`]).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{account, serverlog};
use crate::datadir::tree::Access;

/// The server's log while it recovers, in the data directory.
pub const LOG: &str = "highwater-recovery.log";

/// A `postgres` of the right major version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Postgres {
    /// The program.
    pub program: PathBuf,
    /// What it says about itself, such as `15.20`.
    pub version: String,
}

/// There is no program to start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPostgres {
    /// The directory given has another version, or none.
    #[error("--bin {directory}: {problem}; the backup needs PostgreSQL {major}")]
    Given {
        /// The directory.
        directory: PathBuf,
        /// What is wrong.
        problem: String,
        /// What is needed.
        major: u32,
    },
    /// Nothing suitable was found.
    #[error(
        "no PostgreSQL {major} found in PATH, /usr/lib/postgresql/{major}/bin or /usr/pgsql-{major}/bin{others}; \
         install it, name its directory with --bin, or restore without --start"
    )]
    NotFound {
        /// What is needed.
        major: u32,
        /// What was found instead.
        others: String,
    },
}

impl Postgres {
    /// Finds a `postgres` of `major`: in `given` only, if it is given.
    ///
    /// # Errors
    /// None, or the one given has another major version.
    pub fn find(major: u32, given: Option<&Path>) -> Result<Self, NoPostgres> {
        if let Some(directory) = given {
            return Self::in_directory(directory, major).map_err(|problem| NoPostgres::Given {
                directory: directory.to_owned(),
                problem,
                major,
            });
        }
        let mut others = Vec::new();
        for directory in usual_places(major) {
            if !directory.join("postgres").exists() {
                continue;
            }
            match Self::in_directory(&directory, major) {
                Ok(found) => return Ok(found),
                Err(problem) => others.push(format!("{}: {problem}", directory.display())),
            }
        }
        let others = if others.is_empty() {
            String::new()
        } else {
            format!(" ({})", others.join("; "))
        };
        Err(NoPostgres::NotFound { major, others })
    }

    fn in_directory(directory: &Path, major: u32) -> Result<Self, String> {
        let program = directory.join("postgres");
        let output = Command::new(&program)
            .arg("--version")
            .stdin(Stdio::null())
            .output();
        let output = output.map_err(|error| format!("cannot run {}: {error}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = version_in(&text).ok_or_else(|| format!("its postgres says {:?}", text.trim()))?;
        if major_of(&version) == Some(major) {
            Ok(Self { program, version })
        } else {
            Err(format!("its postgres is {version}"))
        }
    }
}

/// `PATH` first: it is what the operator chose.
fn usual_places(major: u32) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let fixed = [
        format!("/usr/lib/postgresql/{major}/bin"),
        format!("/usr/pgsql-{major}/bin"),
        format!("/opt/homebrew/opt/postgresql@{major}/bin"),
        "/usr/local/pgsql/bin".to_owned(),
        "/usr/local/bin".to_owned(),
    ];
    std::env::split_paths(&path)
        .chain(fixed.into_iter().map(PathBuf::from))
        .collect()
}

/// `15.20` out of `postgres (PostgreSQL) 15.20 (Debian 15.20-1)`.
fn version_in(text: &str) -> Option<String> {
    let version = text.split(") ").nth(1)?.split_whitespace().next()?;
    version
        .starts_with(|c: char| c.is_ascii_digit())
        .then(|| version.to_owned())
}

fn major_of(version: &str) -> Option<u32> {
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// How the server is started.
#[derive(Debug, Clone, Default)]
pub struct StartOptions {
    /// Where `postgres` is.
    pub bin: Option<PathBuf>,
    /// Another port than the configuration's.
    pub port: Option<u16>,
    /// Another directory for the Unix socket than the configuration's.
    pub socket_directory: Option<PathBuf>,
    /// Further settings.
    pub settings: Vec<(String, String)>,
}

/// Starts the server on `root`, with `pins` above its configuration and the operator's settings above them. It keeps running
/// when this program (`this`) ends.
///
/// # Errors
/// The log cannot be made or the program not started.
pub fn start(
    this: &Path,
    postgres: &Postgres,
    root: &Path,
    access: &Access,
    options: &StartOptions,
    pins: &[(String, String)],
) -> io::Result<Child> {
    let log = new_log(&root.join(LOG))?;
    access.apply(&log, 0o600)?;
    let owner = access.owner();
    let mut command = if owner.give {
        account::command(this, owner, &postgres.program)
    } else {
        Command::new(&postgres.program)
    };
    command.arg("-D").arg(root);
    for (name, value) in pins.iter().cloned().chain(settings(options)) {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    command
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // They name the original for a client, and would name the port and data directory for this server.
    for name in ["PGDATA", "PGPORT", "PGHOST"] {
        command.env_remove(name);
    }
    // A group of its own: an interrupt at the terminal ends this program's waiting and not the server.
    command.process_group(0);
    command.spawn()
}

/// How the operator starts the same server, on a port of their choice: words for a shell.
#[must_use]
pub fn by_hand(postgres: &Postgres, root: &Path, pins: &[(String, String)]) -> String {
    let mut words = vec![postgres.program.display().to_string(), "-D".to_owned()];
    words.push(root.display().to_string());
    for (name, value) in pins {
        words.push("-c".to_owned());
        words.push(format!("{name}={value}"));
    }
    words.extend(["-c".to_owned(), "port=5433".to_owned()]);
    let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.=:+,@".contains(c);
    let quoted = words.into_iter().map(|word| {
        if word.chars().all(plain) {
            word
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// An empty log: what another server said under this name must never be taken for this one's words.
fn new_log(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new()
        .create_new(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

/// What is told on the command line, above the configuration: a log that can be read here.
fn settings(options: &StartOptions) -> Vec<(String, String)> {
    let fixed = [
        ("logging_collector", "off"),
        ("log_destination", "stderr"),
        ("log_min_messages", "info"),
        ("log_line_prefix", serverlog::PREFIX),
        ("lc_messages", "C"),
    ];
    let mut settings: Vec<_> = fixed
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    if let Some(port) = options.port {
        settings.push(("port".to_owned(), port.to_string()));
    }
    if let Some(directory) = &options.socket_directory {
        settings.push((
            "unix_socket_directories".to_owned(),
            directory.to_string_lossy().into_owned(),
        ));
    }
    settings.extend(options.settings.iter().cloned());
    settings
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::datadir::owner::Owner;

    fn fake(directory: &Path, says: &str) {
        let program = directory.join("postgres");
        fs::write(&program, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn versions_are_read_from_all_the_ways_it_is_said() {
        for (text, major) in [
            ("postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)", 15),
            ("postgres (PostgreSQL) 18.4", 18),
            ("postgres (PostgreSQL) 19beta1", 19),
        ] {
            assert_eq!(
                version_in(text).as_deref().and_then(major_of),
                Some(major),
                "{text}"
            );
        }
        assert_eq!(version_in("rubbish"), None);
    }

    #[test]
    fn what_a_server_of_the_same_directory_said_before_is_not_in_the_log() {
        let dir = tempfile::tempdir().unwrap();
        fake(dir.path(), "the words of this server");
        let postgres = Postgres {
            program: dir.path().join("postgres"),
            version: "15.20".to_owned(),
        };
        fs::write(
            dir.path().join(LOG),
            "database system is ready to accept connections\n",
        )
        .unwrap();
        let access = Access::new(Owner {
            uid: 0,
            gid: 0,
            name: "whoever runs this".to_owned(),
            give: false,
        });
        let this = Path::new("not needed");
        let mut child = start(
            this,
            &postgres,
            dir.path(),
            &access,
            &StartOptions::default(),
            &[],
        )
        .unwrap();
        assert!(child.wait().unwrap().success());
        let log = fs::read_to_string(dir.path().join(LOG)).unwrap();
        assert_eq!(log, "the words of this server\n");
    }

    #[test]
    fn the_command_for_the_operator_can_be_pasted() {
        let postgres = Postgres {
            program: PathBuf::from("/usr/lib/postgresql/15/bin/postgres"),
            version: "15.20".to_owned(),
        };
        let pins = [
            ("data_directory".to_owned(), "/srv/it's here".to_owned()),
            ("external_pid_file".to_owned(), String::new()),
        ];
        assert_eq!(
            by_hand(&postgres, Path::new("/srv/it's here"), &pins),
            r"/usr/lib/postgresql/15/bin/postgres -D '/srv/it'\''s here' -c 'data_directory=/srv/it'\''s here' -c external_pid_file= -c port=5433"
        );
    }

    #[test]
    fn fault_70_another_major_version_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        fake(dir.path(), "postgres (PostgreSQL) 17.10");
        let error = Postgres::find(15, Some(dir.path())).unwrap_err().to_string();
        assert!(
            error.contains("17.10") && error.contains("PostgreSQL 15"),
            "{error}"
        );
        assert_eq!(Postgres::find(17, Some(dir.path())).unwrap().version, "17.10");
    }

    #[test]
    fn an_absent_version_names_where_it_was_looked_for() {
        let error = Postgres::find(99, None).unwrap_err().to_string();
        assert!(
            error.contains("/usr/lib/postgresql/99/bin") && error.contains("--bin"),
            "{error}"
        );
    }
}
