//! The table of what a base backup consists of, built while it streams.
//!
//! Owns: one [`Entry`] per archive member with the extents that hold its content, and the checksum of each
//! file's content for the comparison with the pg_manifest. Does not own: where bytes are placed (`packs`).

use highwater_format::manifest::{Entry, EntryKind, Extent};
use highwater_format::pg_manifest::Checksum;

use super::tar::{TarEntry, TarKind};

/// A manifest in the making.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    list: Vec<Entry>,
    /// One per entry; `None` for what is not a file and for files that the pg_manifest does not list.
    checksums: Vec<Option<Checksum>>,
    files: u64,
    bytes: u64,
}

impl Entries {
    /// Begins the next entry; `root` is where its archive belongs, relative to the data directory.
    pub(crate) fn begin(&mut self, root: &str, member: TarEntry) {
        let kind = match member.kind {
            TarKind::File => EntryKind::File,
            TarKind::Directory => EntryKind::Directory,
            TarKind::Symlink => EntryKind::Symlink,
        };
        let path = joined(root, &member.path);
        if path.is_empty() {
            return;
        }
        if kind == EntryKind::File {
            self.files += 1;
            self.bytes += member.size;
        }
        self.list.push(Entry {
            path,
            kind,
            mode: member.mode,
            mtime: member.mtime,
            size: member.size,
            link: member.link,
            extents: Vec::new(),
        });
        self.checksums.push(None);
    }

    /// The newest entry's next bytes lie in `extent`.
    pub(crate) fn extend(&mut self, extent: Extent) {
        let Some(entry) = self.list.last_mut() else { return };
        match entry.extents.last_mut() {
            Some(last) if last.pack == extent.pack && last.offset + last.len == extent.offset => {
                last.len += extent.len;
            }
            _ => entry.extents.push(extent),
        }
    }

    /// The newest entry's content is complete and has this checksum.
    pub(crate) fn checked(&mut self, checksum: Checksum) {
        if let Some(last) = self.checksums.last_mut() {
            *last = Some(checksum);
        }
    }

    /// The newest entry's size, for content whose length was not known when it began.
    pub(crate) fn resize(&mut self, size: u64) {
        if let Some(entry) = self.list.last_mut() {
            self.bytes = self.bytes - entry.size + size;
            entry.size = size;
        }
    }

    /// Regular files so far.
    pub(crate) fn files(&self) -> u64 {
        self.files
    }

    /// Their bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Every file with a checksum.
    pub(crate) fn checked_files(&self) -> impl Iterator<Item = (&Entry, &Checksum)> {
        self.list
            .iter()
            .zip(&self.checksums)
            .filter_map(|(entry, sum)| Some((entry, sum.as_ref()?)))
    }

    /// The finished table.
    pub(crate) fn into_list(self) -> Vec<Entry> {
        self.list
    }
}

fn joined(root: &str, path: &str) -> String {
    match (root, path) {
        ("", path) => path.to_owned(),
        (root, "") => root.to_owned(),
        (root, path) => format!("{root}/{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(path: &str, kind: TarKind, size: u64) -> TarEntry {
        TarEntry {
            path: path.into(),
            kind,
            mode: 0o600,
            mtime: 1,
            size,
            link: None,
        }
    }

    #[test]
    fn extents_that_touch_become_one_and_others_stay_apart() {
        let mut entries = Entries::default();
        entries.begin("", member("base/1/1259", TarKind::File, 40));
        for (pack, offset) in [(0, 100), (0, 110), (1, 0), (1, 20)] {
            entries.extend(Extent {
                pack,
                offset,
                len: 10,
            });
        }
        let list = entries.into_list();
        let extents: Vec<_> = list[0]
            .extents
            .iter()
            .map(|extent| (extent.pack, extent.offset, extent.len))
            .collect();
        assert_eq!(extents, [(0, 100, 20), (1, 0, 10), (1, 20, 10)]);
    }

    #[test]
    fn archives_have_their_place_and_only_files_count() {
        let mut entries = Entries::default();
        entries.begin("", member("", TarKind::Directory, 0));
        entries.begin(
            "pg_tblspc/16400",
            member("PG_15_202209061", TarKind::Directory, 0),
        );
        entries.begin(
            "pg_tblspc/16400",
            member("PG_15_202209061/5/16401", TarKind::File, 7),
        );
        entries.begin("", member("backup_manifest", TarKind::File, 0));
        entries.resize(30);
        entries.resize(35);
        assert_eq!((entries.files(), entries.bytes()), (2, 42));
        let paths: Vec<String> = entries.into_list().into_iter().map(|entry| entry.path).collect();
        assert_eq!(
            paths,
            [
                "pg_tblspc/16400/PG_15_202209061",
                "pg_tblspc/16400/PG_15_202209061/5/16401",
                "backup_manifest"
            ]
        );
    }
}
