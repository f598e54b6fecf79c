//! The place where fetched segments wait for PostgreSQL: `highwater-prefetch/` in the data directory, on the file
//! system of `pg_wal`, so that a segment is moved into place and never copied (unless `pg_wal` was moved away).
//!
//! Owns: the names in it and what each of them means; the protocol between one `wal-fetch` per segment and the one
//! prefetcher:
//!
//! - `lock` is held by a running prefetcher. Only while it is held is anything here trusted: a segment is renamed to its
//!   name when it is verified and whole, but not yet synced, and after a crash of the machine it may be neither.
//! - `owner` is held by the prefetcher before it takes `lock`: what its predecessor left is removed in between, and so
//!   never trusted.
//! - `asked` holds the name that PostgreSQL asked for last: the prefetcher keeps the segments after it.
//! - `<segment>.part` is being fetched: worth waiting for.
//! - `<segment>.part.highwater-<process>-<n>` is what is being written; a prefetcher that was killed leaves it behind.
//! - `<segment>` is ready.
//! - `silent-<n>` notes that a region does not answer (see `watched`).
//!
//! PostgreSQL itself syncs a restored segment before it relies on it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use highwater_format::walname::WalName;
use nix::fcntl::{Flock, FlockArg};

use super::place::{self, TEMPORARY};

/// Its name in the data directory.
pub const DIRECTORY: &str = "highwater-prefetch";

const PART: &str = ".part";
const LOCK: &str = "lock";
const OWNER: &str = "owner";

/// The spool of one data directory.
#[derive(Debug, Clone)]
pub struct Spool {
    directory: PathBuf,
}

/// Where a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Ready to be moved.
    Ready,
    /// Being fetched.
    Coming,
    /// Neither.
    Absent,
}

impl Spool {
    /// The spool in the data directory `root`.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        Self {
            directory: root.join(DIRECTORY),
        }
    }

    /// Where it lies.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn segment(&self, name: WalName) -> PathBuf {
        self.directory.join(name.to_string())
    }

    fn part(&self, name: WalName) -> PathBuf {
        self.directory.join(format!("{name}{PART}"))
    }

    /// Whether a prefetcher runs.
    #[must_use]
    pub fn is_served(&self) -> bool {
        let Ok(file) = File::open(self.directory.join(LOCK)) else {
            return false;
        };
        matches!(
            Flock::lock(file, FlockArg::LockSharedNonblock),
            Err((_, nix::errno::Errno::EWOULDBLOCK))
        )
    }

    /// Notes what PostgreSQL asked for.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn note_asked(&self, name: WalName) -> io::Result<()> {
        fs::write(self.directory.join("asked"), name.to_string())
    }

    /// What PostgreSQL asked for last; `None` while the note is being rewritten.
    #[must_use]
    pub fn asked(&self) -> Option<WalName> {
        WalName::parse(&fs::read_to_string(self.directory.join("asked")).ok()?)
    }

    /// Moves a ready segment to `path`; `false` if it is not ready.
    ///
    /// # Errors
    /// It is there and cannot be moved.
    pub fn take(&self, name: WalName, path: &Path) -> io::Result<bool> {
        let ready = self.segment(name);
        match fs::rename(&ready, path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            // `pg_wal` was moved to another file system after the restore.
            Err(error) if error.kind() == ErrorKind::CrossesDevices => {
                place::copied(&ready, path)?;
                remove_if_there(&ready)?;
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    /// Where `name` is.
    #[must_use]
    pub fn standing(&self, name: WalName) -> Standing {
        // In this order: between the two looks a part may become a segment, but never the other way.
        let coming = self.part(name).exists();
        if self.segment(name).exists() {
            Standing::Ready
        } else if coming {
            Standing::Coming
        } else {
            Standing::Absent
        }
    }

    /// For the prefetcher: makes the spool its own and empties it. `None` if another prefetcher has it.
    ///
    /// # Errors
    /// The directory cannot be made or locked.
    pub fn claim(&self) -> io::Result<Option<Claim>> {
        match fs::create_dir(&self.directory) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let Some(owner) = self.lock(OWNER, FlockArg::LockExclusiveNonblock)? else {
            return Ok(None);
        };
        if self.is_served() {
            return Ok(None);
        }
        self.retain(|_| false)?;
        // Waits for those who just look whether it is served, and for nobody else: there is one owner.
        let Some(lock) = self.lock(LOCK, FlockArg::LockExclusive)? else {
            return Ok(None);
        };
        Ok(Some(Claim {
            spool: self.clone(),
            _lock: lock,
            _owner: owner,
        }))
    }

    /// Locks a file of the spool; `None` if somebody has it.
    fn lock(&self, name: &str, how: FlockArg) -> io::Result<Option<Flock<File>>> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.directory.join(name))?;
        match Flock::lock(file, how) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    fn retain(&self, wanted: impl Fn(WalName) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let segment = name.to_str().and_then(segment_of);
            if segment.is_some_and(|segment| !wanted(segment)) {
                remove_if_there(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes the whole spool, if no prefetcher has it. For after recovery.
    ///
    /// # Errors
    /// It is there and cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        match self.claim() {
            Ok(Some(claim)) => claim.leave(),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The prefetcher's hold on the spool.
#[derive(Debug)]
pub struct Claim {
    spool: Spool,
    // In this order: the spool is not served any more before another may own it.
    _lock: Flock<File>,
    _owner: Flock<File>,
}

impl Claim {
    /// The spool.
    #[must_use]
    pub fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Announces that `name` is being fetched, and opens the file for it.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn begin(&self, name: WalName) -> io::Result<PathBuf> {
        let part = self.spool.part(name);
        File::create(&part)?;
        Ok(part)
    }

    /// The segment is whole: gives it its name.
    ///
    /// # Errors
    /// It cannot be renamed.
    pub fn ready(&self, name: WalName) -> io::Result<()> {
        fs::rename(self.spool.part(name), self.spool.segment(name))
    }

    /// It will not come.
    pub fn give_up(&self, name: WalName) {
        let _ = fs::remove_file(self.spool.part(name));
    }

    /// Removes ready segments, and parts, that are not wanted.
    ///
    /// # Errors
    /// The directory cannot be read, or a file not removed.
    pub fn retain(&self, wanted: impl Fn(WalName) -> bool) -> io::Result<()> {
        self.spool.retain(wanted)
    }

    /// Empties and removes the spool, whatever is in it: the directory is nobody else's.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn leave(self) -> io::Result<()> {
        // The locks after the rest, so that nobody takes the spool over before it is empty.
        self.remove_all(|_| true)?;
        self.unlock()?;
        self.remove_directory()
    }

    fn unlock(&self) -> io::Result<()> {
        let locks = [LOCK, OWNER].map(|name| self.spool.directory.join(name));
        locks.iter().try_for_each(|lock| remove_if_there(lock))
    }

    /// For a spool without locks, which is anybody's. A `wal-fetch` may just have noted what it is asked for, and what it
    /// notes may go; a successor's locks and segments may not.
    fn remove_directory(&self) -> io::Result<()> {
        for _ in 0..2 {
            match fs::remove_dir(&self.spool.directory) {
                Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                other => return other,
            }
            self.remove_all(|name| segment_of(name).is_none())?;
        }
        Ok(())
    }

    /// Removes the files that are not locks and whose name is `unwanted`.
    fn remove_all(&self, unwanted: impl Fn(&str) -> bool) -> io::Result<()> {
        let entries = match fs::read_dir(&self.spool.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if ![LOCK, OWNER].contains(&name.as_ref()) && unwanted(&name) {
                remove_if_there(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// The segment that a file of the spool is, or was to become; `None` for the other files.
fn segment_of(name: &str) -> Option<WalName> {
    let name = name.split_once(TEMPORARY).map_or(name, |(name, _)| name);
    WalName::parse(name.strip_suffix(PART).unwrap_or(name))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> WalName {
        WalName::parse("000000010000000000000002").unwrap()
    }

    #[test]
    fn a_segment_goes_through_its_standings_and_is_moved() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::of(dir.path());
        assert!(!spool.is_served());
        let claim = spool.claim().unwrap().unwrap();
        assert!(spool.is_served());
        assert!(spool.claim().unwrap().is_none(), "two prefetchers");
        assert_eq!(spool.standing(name()), Standing::Absent);
        fs::write(claim.begin(name()).unwrap(), "wal").unwrap();
        assert_eq!(spool.standing(name()), Standing::Coming);
        claim.ready(name()).unwrap();
        assert_eq!(spool.standing(name()), Standing::Ready);
        let to = dir.path().join("RECOVERYXLOG");
        assert!(spool.take(name(), &to).unwrap());
        assert_eq!(fs::read(&to).unwrap(), b"wal");
        assert!(!spool.take(name(), &to).unwrap());
        spool.note_asked(name()).unwrap();
        assert_eq!(spool.asked(), Some(name()));
        claim.leave().unwrap();
        assert!(!spool.directory().exists() && !spool.is_served());
    }

    #[test]
    fn what_a_dead_prefetcher_left_is_cleared_and_never_served() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::of(dir.path());
        let claim = spool.claim().unwrap().unwrap();
        claim.begin(name()).unwrap();
        claim.ready(name()).unwrap();
        let half = spool
            .directory()
            .join(format!("{}{PART}{TEMPORARY}-77-0", name()));
        fs::write(&half, "wa").unwrap();
        drop(claim);
        assert!(!spool.is_served());
        let claim = spool.claim().unwrap().unwrap();
        assert_eq!(spool.standing(name()), Standing::Absent);
        assert!(!half.exists(), "half a segment stays behind");
        fs::write(&half, "wa").unwrap();
        claim.retain(|segment| segment == name()).unwrap();
        assert!(half.exists(), "it is being written");
    }

    /// Whoever sees the spool served takes what is ready in it at once.
    #[test]
    fn what_a_dead_prefetcher_left_is_gone_before_the_spool_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::of(dir.path());
        drop(spool.claim().unwrap().unwrap());
        let leftover = |number: u64| WalName::parse(&format!("0000000100000000{number:08X}")).unwrap();
        for number in 0..3_000 {
            fs::write(spool.segment(leftover(number)), "").unwrap();
        }
        let done = std::sync::atomic::AtomicBool::new(false);
        let trusted = std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    // In this order: nothing comes back once it is served.
                    if spool.is_served() && (0..3_000).any(|number| spool.segment(leftover(number)).exists())
                    {
                        return true;
                    }
                }
                false
            });
            let claim = spool.claim().unwrap().unwrap();
            assert!(spool.is_served());
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            let trusted = watcher.join().unwrap();
            claim.leave().unwrap();
            trusted
        });
        assert!(!trusted, "an old segment was there while the spool was served");
    }

    #[test]
    fn a_segment_gets_to_another_file_system() {
        use std::os::unix::fs::MetadataExt;
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm"));
        let Ok(other) = other else { return };
        let device = |path: &Path| fs::metadata(path).unwrap().dev();
        if device(dir.path()) == device(other.path()) {
            return;
        }
        let spool = Spool::of(dir.path());
        let claim = spool.claim().unwrap().unwrap();
        fs::write(claim.begin(name()).unwrap(), "wal").unwrap();
        claim.ready(name()).unwrap();
        let to = other.path().join("RECOVERYXLOG");
        assert!(spool.take(name(), &to).unwrap());
        assert_eq!(fs::read(&to).unwrap(), b"wal");
        assert_eq!(fs::read_dir(other.path()).unwrap().count(), 1);
        assert_eq!(spool.standing(name()), Standing::Absent);
        claim.leave().unwrap();
    }

    /// It may take over as soon as the locks are away.
    #[test]
    fn who_leaves_takes_nothing_from_a_successor() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::of(dir.path());
        let leaving = spool.claim().unwrap().unwrap();
        leaving.remove_all(|_| true).unwrap();
        leaving.unlock().unwrap();
        let successor = spool.claim().unwrap().unwrap();
        successor.begin(name()).unwrap();
        spool.note_asked(name()).unwrap();
        leaving.remove_directory().unwrap();
        assert!(spool.is_served(), "the successor's lock is gone");
        assert_eq!(spool.standing(name()), Standing::Coming);
        assert!(spool.claim().unwrap().is_none(), "a third one joins");
        successor.leave().unwrap();
        assert!(!spool.directory().exists());
    }

    #[test]
    fn nothing_stays_behind_whatever_was_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::of(dir.path());
        let claim = spool.claim().unwrap().unwrap();
        for name in ["RECOVERYXLOG.highwater", "silent-0", "anything"] {
            fs::write(spool.directory().join(name), "x").unwrap();
        }
        claim.leave().unwrap();
        assert!(!spool.directory().exists());
        spool.remove().unwrap();
    }
}
