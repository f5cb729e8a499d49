//! Files that are read again when they change, while a process runs.
//!
//! A change is used once two reads of the files were identical, so that no part of a change is used: a file that is being written, a
//! certificate that is copied before its key, a Kubernetes Secret that is being replaced. Files that cannot be used are reported once,
//! and the value of before stays.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::mem;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// The time between two checks.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_secs(1);
const LARGEST_FILE: u64 = 1 << 20;

/// A file as it was read.
pub(crate) struct Content {
    pub(crate) bytes: Zeroizing<Vec<u8>>,
    pub(crate) mode: u32,
    pub(crate) owner: u32,
}

/// Reads a file, or as much of it as a keyring or a certificate may have.
pub(crate) fn read(path: &Path) -> io::Result<Content> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    // Without room for all of it, growing would leave copies in memory.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(metadata.len().min(LARGEST_FILE)).unwrap_or(0) + 1));
    (&mut file).take(LARGEST_FILE).read_to_end(&mut bytes)?;
    Ok(Content { bytes, mode: metadata.mode() & 0o7777, owner: metadata.uid() })
}

/// What distinguishes two reads of files, without their content.
type Look = Vec<Result<([u8; 32], u32, u32), io::ErrorKind>>;

/// Files that belong together, and the reads of them that count.
#[derive(Clone)]
pub(crate) struct Followed {
    paths: Vec<PathBuf>,
    /// The last read.
    seen: Look,
    /// The read that was used, or that could not be used.
    judged: Look,
}

impl Followed {
    /// Reads files whose content is about to be used.
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        let look = look_at(&paths);
        Self { paths, seen: look.clone(), judged: look }
    }

    /// Reads the files, and returns the value that `parse` makes of them, if they have changed and the change is complete.
    ///
    /// A change that is older than the interval of checks is read twice at once, so one call suffices for it.
    pub(crate) fn follow<T, E>(&mut self, now: SystemTime, parse: impl FnOnce() -> Result<T, E>) -> Option<Result<T, E>> {
        let look = look_at(&self.paths);
        let before = mem::replace(&mut self.seen, look);
        if self.seen == self.judged || (self.seen != before && !(self.is_old(now) && self.looks_the_same())) {
            return None;
        }
        let value = parse();
        if !self.looks_the_same() {
            return None;
        }
        self.judged = self.seen.clone();
        Some(value)
    }

    /// Reads the files once more, and returns whether they are as before.
    fn looks_the_same(&mut self) -> bool {
        let look = look_at(&self.paths);
        let before = mem::replace(&mut self.seen, look);
        self.seen == before
    }

    /// Returns whether no file was changed within the last interval, by its own account.
    fn is_old(&self, now: SystemTime) -> bool {
        let changed = |file: &Metadata| {
            let (seconds, nanoseconds) = (u64::try_from(file.ctime()), u32::try_from(file.ctime_nsec()));
            SystemTime::UNIX_EPOCH + Duration::new(seconds.unwrap_or(0), nanoseconds.unwrap_or(0))
        };
        let is_old = |file: &Metadata| now.duration_since(changed(file)).is_ok_and(|age| age >= CHECK_INTERVAL);
        self.paths.iter().all(|path| path.metadata().is_ok_and(|file| is_old(&file)))
    }
}

fn look_at(paths: &[PathBuf]) -> Look {
    let digest = |content: Content| (Sha256::digest(&*content.bytes).into(), content.mode, content.owner);
    paths.iter().map(|path| read(path).map(digest).map_err(|error| error.kind())).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A present at which no change is old.
    const EARLY: SystemTime = SystemTime::UNIX_EPOCH;

    fn text(path: &Path) -> Result<String, io::Error> {
        fs::read_to_string(path)
    }

    #[test]
    fn a_change_is_used_after_two_identical_reads() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut followed = Followed::new(vec![file.path().to_owned()]);
        assert!(followed.follow(EARLY, || text(file.path())).is_none(), "it has not changed");
        for part in ["first line\n", "first line\nsecond line\n"] {
            fs::write(file.path(), part).unwrap();
            assert!(followed.follow(EARLY, || text(file.path())).is_none(), "more may follow");
        }
        assert_eq!(followed.follow(EARLY, || text(file.path())).unwrap().unwrap(), "first line\nsecond line\n");
        assert!(followed.follow(EARLY, || text(file.path())).is_none(), "it is used once");
    }

    #[test]
    fn one_call_suffices_for_a_change_that_is_old() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut followed = Followed::new(vec![file.path().to_owned()]);
        fs::write(file.path(), "content").unwrap();
        let late = SystemTime::now() + CHECK_INTERVAL * 10;
        assert_eq!(followed.follow(late, || text(file.path())).unwrap().unwrap(), "content");
    }

    #[test]
    fn a_change_while_it_is_parsed_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut followed = Followed::new(vec![file.path().to_owned()]);
        fs::write(file.path(), "one").unwrap();
        assert!(followed.follow(EARLY, || text(file.path())).is_none());
        let interrupted = || {
            fs::write(file.path(), "other")?;
            text(file.path())
        };
        assert!(followed.follow(EARLY, interrupted).is_none());
        assert_eq!(followed.follow(EARLY, || text(file.path())).unwrap().unwrap(), "other");
    }

    #[test]
    fn files_that_cannot_be_used_are_reported_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "content").unwrap();
        let mut followed = Followed::new(vec![path.clone()]);
        fs::remove_file(&path).unwrap();
        let reports: Vec<_> =
            (0..4).map(|_| followed.follow(EARLY, || text(&path)).is_some_and(|parsed| parsed.is_err())).collect();
        assert_eq!(reports, [false, true, false, false]);
        fs::write(&path, "content").unwrap();
        assert!(followed.follow(EARLY, || text(&path)).is_none());
        assert_eq!(followed.follow(EARLY, || text(&path)).unwrap().unwrap(), "content");
    }
}
