//! Tablespaces: where each one goes, and the `tablespace_map` that tells the server.
//!
//! Owns: `--tablespace OLD=NEW`, the checks on locations, the text of `tablespace_map` (a server that starts from a
//! backup makes its links from this file, so it must name the new places). Does not own: whether a location is
//! empty (see [`super::occupied`]) and creating it.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use highwater_format::records::Tablespace;

use super::error::DataDirError;

/// One `--tablespace OLD=NEW`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remap {
    /// The location in the backup, or the tablespace's number.
    pub old: String,
    /// The directory to restore it to.
    pub new: PathBuf,
}

impl std::str::FromStr for Remap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok(Self {
                old: old.to_owned(),
                new: PathBuf::from(new),
            }),
            _ => Err(format!(
                "{text:?} is not OLD=NEW, as in /srv/fast=/srv/restored/fast"
            )),
        }
    }
}

/// A tablespace and the directory it is restored to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Its number, which names its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it was on the server the backup was taken from.
    pub original: String,
    /// Where it is restored to; absolute, and without links on the way.
    pub directory: PathBuf,
    /// The same as it was asked for, by which the server will know it.
    pub named: PathBuf,
    /// Inside the data directory (`allow_in_place_tablespaces`): a plain directory, no link.
    pub in_place: bool,
}

/// All tablespaces of a backup, by number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tablespaces(BTreeMap<u32, Placed>);

impl FromIterator<Placed> for Tablespaces {
    fn from_iter<I: IntoIterator<Item = Placed>>(placed: I) -> Self {
        Self(placed.into_iter().map(|placed| (placed.oid, placed)).collect())
    }
}

impl Tablespaces {
    /// Decides where each tablespace goes.
    ///
    /// # Errors
    /// A remap that names no tablespace, or a location that cannot be one.
    pub fn place(root: &Path, spaces: &[Tablespace], remaps: &[Remap]) -> Result<Self, DataDirError> {
        for remap in remaps {
            if !spaces.iter().any(|space| names(remap, space)) {
                return Err(unknown(remap, spaces));
            }
        }
        let placed = spaces
            .iter()
            .map(|space| place_one(root, space, remaps))
            .collect::<Result<Self, _>>()?;
        placed.check_apart(root)?;
        Ok(placed)
    }

    /// The tablespace with this number.
    #[must_use]
    pub fn get(&self, oid: u32) -> Option<&Placed> {
        self.0.get(&oid)
    }

    /// Those that lie outside the data directory.
    pub fn outside(&self) -> impl Iterator<Item = &Placed> {
        self.0.values().filter(|placed| !placed.in_place)
    }

    /// No two in the same place, none inside another or around the data directory.
    fn check_apart(&self, root: &Path) -> Result<(), DataDirError> {
        let mut seen: Vec<&Path> = vec![root];
        for placed in self.outside() {
            let directory = placed.directory.as_path();
            if let Some(other) = seen
                .iter()
                .find(|other| directory.starts_with(other) || other.starts_with(directory))
            {
                return Err(DataDirError::Tablespace(format!(
                    "{} ({}) overlaps {}; give it a directory of its own with --tablespace {}=NEW",
                    placed.oid,
                    directory.display(),
                    other.display(),
                    placed.original,
                )));
            }
            seen.push(directory);
        }
        Ok(())
    }

    /// The `tablespace_map` for the restored server: one line per tablespace, number and place, with line ends and
    /// backslashes escaped as PostgreSQL writes them (`do_pg_backup_start`).
    #[must_use]
    pub fn map_text(&self) -> String {
        let mut text = String::new();
        for placed in self.outside() {
            text.push_str(&placed.oid.to_string());
            text.push(' ');
            for c in placed.named.to_string_lossy().chars() {
                if matches!(c, '\n' | '\r' | '\\') {
                    text.push('\\');
                }
                text.push(c);
            }
            text.push('\n');
        }
        text
    }
}

fn names(remap: &Remap, space: &Tablespace) -> bool {
    remap.old.trim_end_matches('/') == space.location.trim_end_matches('/')
        || remap.old == space.oid.to_string()
}

fn unknown(remap: &Remap, spaces: &[Tablespace]) -> DataDirError {
    let known: Vec<_> = spaces
        .iter()
        .map(|space| format!("{} ({})", space.location, space.oid))
        .collect();
    let known = if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    };
    DataDirError::Tablespace(format!(
        "the backup has no tablespace at {}; it has: {known}",
        remap.old
    ))
}

fn place_one(root: &Path, space: &Tablespace, remaps: &[Remap]) -> Result<Placed, DataDirError> {
    let remap = remaps.iter().find(|remap| names(remap, space));
    let in_place = remap.is_none() && !space.location.starts_with('/');
    let directory = match remap {
        _ if in_place => root.join("pg_tblspc").join(space.oid.to_string()),
        Some(remap) => remap.new.clone(),
        None => PathBuf::from(&space.location),
    };
    check_location(space, &directory)?;
    // As the data directory's: a link that stands for a tablespace is followed once, here, so that what is compared is
    // where files will lie.
    Ok(Placed {
        oid: space.oid,
        original: space.location.clone(),
        named: directory.clone(),
        directory: super::resolved(&directory)?,
        in_place,
    })
}

fn check_location(space: &Tablespace, directory: &Path) -> Result<(), DataDirError> {
    let problem = if !directory.is_absolute() {
        "is not an absolute path"
    } else if directory
        .components()
        .any(|part| matches!(part, Component::ParentDir))
    {
        "leads upwards with .."
    } else if directory.parent().is_none() {
        "is the root of the file system"
    } else if directory.to_str().is_none_or(|text| text.contains('\0')) {
        "is not a valid UTF-8 path"
    } else {
        return Ok(());
    };
    Err(DataDirError::Tablespace(format!(
        "{} would go to {}, which {problem}; name another place with --tablespace {}=NEW",
        space.oid,
        directory.display(),
        space.location
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(oid: u32, location: &str) -> Tablespace {
        Tablespace {
            oid,
            location: location.to_owned(),
        }
    }

    fn remap(text: &str) -> Remap {
        text.parse().unwrap()
    }

    fn place(spaces: &[Tablespace], remaps: &[Remap]) -> Result<Tablespaces, DataDirError> {
        Tablespaces::place(Path::new("/data"), spaces, remaps)
    }

    #[test]
    fn a_remap_by_location_or_number_moves_it() {
        for text in ["/fast=/new", "/fast/=/new", "16384=/new"] {
            let placed = place(&[space(16384, "/fast")], &[remap(text)]).unwrap();
            assert_eq!(placed.get(16384).unwrap().directory, Path::new("/new"), "{text}");
        }
    }

    #[test]
    fn a_remap_of_nothing_is_refused_and_says_what_there_is() {
        let error = place(&[space(16384, "/fast")], &[remap("/fats=/new")]).unwrap_err();
        assert!(error.to_string().contains("/fast (16384)"), "{error}");
    }

    #[test]
    fn places_that_cannot_be_tablespaces_are_refused() {
        for bad in ["relative/dir", "/a/../etc", "/", "/data", "/data/inside"] {
            assert!(
                place(&[space(1, "/fast")], &[remap(&format!("/fast={bad}"))]).is_err(),
                "{bad}"
            );
        }
        assert!(place(&[space(1, "/a"), space(2, "/a/b")], &[]).is_err());
    }

    #[test]
    fn a_tablespace_inside_the_data_directory_needs_no_link() {
        let placed = place(&[space(7, "pg_tblspc/7")], &[]).unwrap();
        assert_eq!(placed.get(7).unwrap().directory, Path::new("/data/pg_tblspc/7"));
        assert_eq!(placed.map_text(), "");
    }

    #[test]
    fn the_map_names_the_new_places_and_escapes() {
        let placed = place(&[space(5, "/a"), space(6, "/b")], &[remap("/a=/new\\dir")]).unwrap();
        assert_eq!(placed.map_text(), "5 /new\\\\dir\n6 /b\n");
    }
}
