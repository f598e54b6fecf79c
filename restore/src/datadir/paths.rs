//! From a path in the manifest to the file that is written.
//!
//! Owns: the rule that nothing is written outside the target and its tablespaces. A path is taken apart and checked
//! before it is used, and a file of a tablespace is written into the tablespace's own directory, never through the
//! link in `pg_tblspc`: no link in the target is ever followed. Does not own: whether those directories may be used.

use std::path::{Path, PathBuf};

use super::tablespace::Tablespaces;

/// The directory that holds the links to tablespaces.
const TABLESPACE_DIR: &str = "pg_tblspc";

/// Where the control file waits until everything else is on disk. Under this name no server finds it.
pub(crate) const CONTROL_PENDING: &str = "global/pg_control.highwater";
/// The control file: without it a directory is not a data directory.
pub(crate) const CONTROL: &str = "global/pg_control";

/// Files of the backup that would mislead the restored server or this program: signal files of the server the
/// backup was taken from (a standby has one), its process file, and what an earlier restore left.
const LEFT_OUT: [&str; 7] = [
    "standby.signal",
    "recovery.signal",
    "postmaster.pid",
    "postmaster.opts",
    super::marker::NAME,
    crate::recovery::facts::NAME,
    crate::run::server::LOG,
];

/// What becomes of one path of the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Written here.
    At(PathBuf),
    /// The link `pg_tblspc/<oid>`, which is made from the tablespaces and not from the manifest.
    Link(u32),
    /// Not restored on purpose.
    LeftOut,
}

/// Maps the paths of one backup.
#[derive(Debug, Clone)]
pub struct Paths {
    root: PathBuf,
    tablespaces: Tablespaces,
}

impl Paths {
    pub(crate) fn new(root: PathBuf, tablespaces: Tablespaces) -> Self {
        Self { root, tablespaces }
    }

    /// The data directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The tablespaces with the directories they are restored to.
    #[must_use]
    pub fn tablespaces(&self) -> &Tablespaces {
        &self.tablespaces
    }

    /// Where `path` goes.
    ///
    /// # Errors
    /// Why the path is refused: it would leave the target.
    pub fn place(&self, path: &str) -> Result<Place, String> {
        let parts = split(path)?;
        if LEFT_OUT.contains(&path) || parts.first() == Some(&crate::walfeed::spool::DIRECTORY) {
            return Ok(Place::LeftOut);
        }
        match parts.as_slice() {
            [] => Ok(Place::At(self.root.clone())),
            [TABLESPACE_DIR, oid] => self.link(oid),
            [TABLESPACE_DIR, oid, rest @ ..] => self.inside_tablespace(oid, rest),
            _ if path == CONTROL => Ok(Place::At(self.root.join(CONTROL_PENDING))),
            _ => Ok(Place::At(
                parts.iter().fold(self.root.clone(), |at, part| at.join(part)),
            )),
        }
    }

    fn link(&self, oid: &str) -> Result<Place, String> {
        let (oid, space) = self.tablespace(oid)?;
        Ok(if space.in_place {
            Place::At(space.directory.clone())
        } else {
            Place::Link(oid)
        })
    }

    fn inside_tablespace(&self, oid: &str, rest: &[&str]) -> Result<Place, String> {
        let (_, space) = self.tablespace(oid)?;
        Ok(Place::At(
            rest.iter()
                .fold(space.directory.clone(), |at, part| at.join(part)),
        ))
    }

    fn tablespace(&self, oid: &str) -> Result<(u32, &super::tablespace::Placed), String> {
        let number = oid.parse::<u32>().ok().filter(|number| number.to_string() == oid);
        let number = number.ok_or("only tablespaces, named by number, may lie in pg_tblspc")?;
        let placed = self.tablespaces.get(number);
        placed
            .map(|placed| (number, placed))
            .ok_or_else(|| format!("the backup has no tablespace {number}"))
    }
}

/// The parts of a relative path; empty for the data directory itself.
fn split(path: &str) -> Result<Vec<&str>, String> {
    if path.is_empty() || path == "." {
        return Ok(Vec::new());
    }
    if path.starts_with('/') {
        return Err("an absolute path".to_owned());
    }
    if path.contains('\0') {
        return Err("a NUL byte in a path".to_owned());
    }
    let parts: Vec<&str> = path.trim_end_matches('/').split('/').collect();
    match parts.iter().find(|part| matches!(**part, "" | "." | "..")) {
        Some(part) => Err(format!("{part:?} as a part of a path leads elsewhere")),
        None => Ok(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datadir::tablespace::Placed;

    fn paths() -> Paths {
        let placed = |oid, directory: &str, in_place| Placed {
            oid,
            original: "/was/here".to_owned(),
            directory: PathBuf::from(directory),
            named: PathBuf::from(directory),
            in_place,
        };
        let spaces = Tablespaces::from_iter([
            placed(16384, "/ts/one", false),
            placed(16385, "/data/pg_tblspc/16385", true),
        ]);
        Paths::new(PathBuf::from("/data"), spaces)
    }

    #[test]
    fn ordinary_files_lie_under_the_root() {
        assert_eq!(
            paths().place("base/1/112"),
            Ok(Place::At(PathBuf::from("/data/base/1/112")))
        );
        assert_eq!(paths().place(""), Ok(Place::At(PathBuf::from("/data"))));
    }

    #[test]
    fn the_control_file_waits_under_another_name() {
        let place = paths().place("global/pg_control");
        assert_eq!(
            place,
            Ok(Place::At(PathBuf::from("/data/global/pg_control.highwater")))
        );
    }

    #[test]
    fn tablespace_files_never_go_through_the_link() {
        let place = paths().place("pg_tblspc/16384/PG_15_202209061/5/16390");
        assert_eq!(
            place,
            Ok(Place::At(PathBuf::from("/ts/one/PG_15_202209061/5/16390")))
        );
        assert_eq!(paths().place("pg_tblspc/16384"), Ok(Place::Link(16384)));
        assert_eq!(
            paths().place("pg_tblspc/16385"),
            Ok(Place::At(PathBuf::from("/data/pg_tblspc/16385")))
        );
    }

    #[test]
    fn fault_94_paths_that_lead_out_are_refused() {
        let hostile = [
            "../etc/passwd",
            "/etc/passwd",
            "base/../../etc/passwd",
            "base/./1",
            "base//1",
            "base/1\0",
            "pg_tblspc/../x",
            "pg_tblspc/99/x",
            "pg_tblspc/016384/x",
            "pg_tblspc/name",
            "pg_tblspc/16384/../../x",
        ];
        for path in hostile {
            assert!(paths().place(path).is_err(), "{path:?} was accepted");
        }
    }

    #[test]
    fn signal_files_of_the_source_are_left_out() {
        for path in [
            "standby.signal",
            "recovery.signal",
            "postmaster.pid",
            "highwater-prefetch/x",
            "highwater-recovery.log",
        ] {
            assert_eq!(paths().place(path), Ok(Place::LeftOut), "{path}");
        }
    }
}
