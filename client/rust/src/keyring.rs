//! The fleet's keys, from a file that is read again when it changes.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use base64::prelude::{BASE64_STANDARD, Engine};
use nix::unistd::geteuid;
use zeroize::Zeroizing;

use crate::Error;
use crate::clock::{self, unix_time};
use crate::reload::{self, CHECK_INTERVAL, Content, Followed};
use crate::sealing::{self, FleetKey, ID_BYTES, KEY_BYTES, StoreKey};

/// `S_IRWXO` and `S_IWGRP`: the permissions that only the owner may have.
const FORBIDDEN_MODE: u32 = 0o027;

/// The fleet's keys: the first one seals sessions and issues ids, every one opens.
///
/// Shows the ids of its keys when printed, never the keys. Takes no locks, so a fork at any time does no harm.
///
/// ```no_run
/// let keyring = resumed::Keyring::load("fleet.keys")?;
/// # Ok::<(), resumed::Error>(())
/// ```
pub struct Keyring {
    keys: ArcSwap<Vec<FleetKey>>,
    file: Option<KeyringFile>,
}

struct KeyringFile {
    path: PathBuf,
    loaded: Instant,
    next_check: AtomicU64, // milliseconds after loaded
    followed: ArcSwap<Followed>,
    /// Whether the present content is in use.
    in_use: AtomicBool,
    /// When content that is in use was last read, in Unix seconds.
    read_at: AtomicU64,
}

impl Keyring {
    /// Reads a keyring file, as `resumed keygen` makes them: one key a line (base64 of 32 bytes), the first one seals, `#`
    /// begins a comment.
    ///
    /// The file is read again when it changes, so that keys can be rotated while serving: a change is used after two identical reads a second
    /// apart. A changed file that cannot be used is reported in the log, and the keys read before stay.
    ///
    /// # Errors
    ///
    /// The file is missing or malformed, others than its owner and group may read it, or another user than this one and root owns it;
    /// the message says what to do.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let followed = ArcSwap::from_pointee(Followed::new(vec![path.to_owned()]));
        Ok(Self {
            keys: ArcSwap::from_pointee(read(path)?),
            file: Some(KeyringFile {
                path: path.to_owned(),
                loaded: Instant::now(),
                next_check: AtomicU64::new(milliseconds(CHECK_INTERVAL)),
                followed,
                in_use: AtomicBool::new(true),
                read_at: AtomicU64::new(unix_time()),
            }),
        })
    }

    /// Makes a keyring of raw keys of 32 bytes, for callers that keep their secrets elsewhere than in files.
    ///
    /// # Errors
    ///
    /// There is no key.
    pub fn from_keys(keys: &[[u8; KEY_BYTES]]) -> Result<Self, Error> {
        if keys.is_empty() {
            return Err(Error::new("a keyring needs at least one key"));
        }
        let keys = keys.iter().map(|key| FleetKey::new(Zeroizing::new(*key))).collect();
        Ok(Self { keys: ArcSwap::from_pointee(keys), file: None })
    }

    /// Replaces the keys, as a changed file does.
    #[cfg(test)]
    pub(crate) fn replace(&self, keys: &[[u8; KEY_BYTES]]) {
        self.keys.store(Self::from_keys(keys).unwrap().keys.load_full());
    }

    pub(crate) fn seal(&self, key: &StoreKey, plaintext: &[u8], not_after: u64) -> Vec<u8> {
        self.current()[0].seal(key, plaintext, not_after, sealing::random())
    }

    pub(crate) fn open(&self, key: &StoreKey, sealed: &[u8], now: u64) -> Result<(Vec<u8>, u64), &'static str> {
        sealing::open(&self.current(), key, sealed, now)
    }

    pub(crate) fn issue_id(&self, namespace: &str, now: u64) -> [u8; ID_BYTES] {
        // Four bytes of seconds last until 2106.
        self.current()[0].issue_id(namespace, u32::try_from(now).unwrap_or(u32::MAX), sealing::random())
    }

    /// Returns when the fleet issued an id, any bytes at all, for a namespace, or None if it did not.
    pub(crate) fn open_id(&self, namespace: &str, id: &[u8]) -> Option<u64> {
        self.current().iter().find_map(|key| key.open_id(namespace, id)).map(u64::from)
    }

    /// Returns whether the present content of the file is in use, and when content that is in use was last read, in Unix seconds; None if the
    /// keys are not from a file.
    pub(crate) fn last_reload(&self) -> Option<(bool, u64)> {
        self.current();
        let file = self.file.as_ref()?;
        Some((file.in_use.load(Ordering::Relaxed), file.read_at.load(Ordering::Relaxed)))
    }

    /// Returns the present keys, the first of which seals.
    pub(crate) fn current(&self) -> Arc<Vec<FleetKey>> {
        if let Some(file) = &self.file {
            file.follow(&self.keys);
        }
        self.keys.load_full()
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Keyring({})", key_ids(&self.keys.load()))
    }
}

impl KeyringFile {
    fn follow(&self, keys: &ArcSwap<Vec<FleetKey>>) {
        let now = milliseconds(self.loaded.elapsed());
        let due = self.next_check.load(Ordering::Relaxed);
        let next = now + milliseconds(CHECK_INTERVAL);
        let mine = now >= due && self.next_check.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if mine {
            self.check(keys, SystemTime::now());
        }
    }

    fn check(&self, keys: &ArcSwap<Vec<FleetKey>>, now: SystemTime) {
        let mut followed = Followed::clone(&self.followed.load());
        match followed.follow(now, || read(&self.path)) {
            None => {}
            Some(Ok(read)) => {
                log::info!("keyring read again: {}", key_ids(&read));
                keys.store(Arc::new(read));
                self.read_at.store(clock::seconds(now), Ordering::Relaxed);
                self.in_use.store(true, Ordering::Relaxed);
            }
            Some(Err(error)) => {
                log::error!("keyring not read again, the keys read before stay: {error}");
                self.in_use.store(false, Ordering::Relaxed);
            }
        }
        self.followed.store(Arc::new(followed));
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn key_ids(keys: &[FleetKey]) -> String {
    let ids: Vec<_> = keys.iter().map(|key| format!("{:08x}", u32::from_be_bytes(key.id))).collect();
    ids.join(", ")
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    let hint = if error.kind() == io::ErrorKind::NotFound { "; make one with `resumed keygen`" } else { "" };
    Error::new(format!("keyring {}: {}{hint}", path.display(), error.kind()))
}

fn read(path: &Path) -> Result<Vec<FleetKey>, Error> {
    let shown = path.display();
    let Content { bytes, mode, owner } = reload::read(path).map_err(|error| unreadable(path, &error))?;
    if let Some(complaint) = exposure(mode, owner, geteuid().as_raw(), path) {
        return Err(Error::new(format!("keyring {shown}: {complaint}")));
    }
    let mut keys = Vec::new();
    for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let encoded = line.split(|byte| *byte == b'#').next().unwrap_or_default().trim_ascii();
        if encoded.is_empty() {
            continue;
        }
        let decoded = Zeroizing::new(BASE64_STANDARD.decode(encoded).unwrap_or_default());
        let Ok(secret) = <[u8; KEY_BYTES]>::try_from(decoded.as_slice()) else {
            // The line itself is not shown: it may be a key with one wrong character.
            let number = number + 1;
            return Err(Error::new(format!("keyring {shown}, line {number}: not a key (base64 of {KEY_BYTES} bytes)")));
        };
        keys.push(FleetKey::new(Zeroizing::new(secret)));
    }
    if keys.is_empty() {
        return Err(Error::new(format!("keyring {shown}: holds no key; make one with `resumed keygen`")));
    }
    Ok(keys)
}

/// Returns why others than `user`, root and a group may read or change a file, and what to do about it.
fn exposure(mode: u32, owner: u32, user: u32, path: &Path) -> Option<String> {
    let shown = path.display();
    if mode & FORBIDDEN_MODE != 0 {
        Some(format!(
            "others may read or change it (mode {mode:04o}); run `chmod 600 {shown}`, or give a Kubernetes Secret `defaultMode: 0400` (0440 \
             with an fsGroup)"
        ))
    } else if owner != user && owner != 0 && user != 0 {
        Some(format!("another user owns it, who may change it; run `chown {user} {shown}`"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    fn line(byte: u8) -> String {
        BASE64_STANDARD.encode([byte; KEY_BYTES])
    }

    #[test]
    fn a_file_has_a_key_in_each_line_that_is_no_comment() {
        let file = file(&format!("# fleet\n\n {} # new\n{}\n", line(1), line(2)), 0o640);
        let keyring = Keyring::load(file.path()).unwrap();
        let expected = Keyring::from_keys(&[[1; KEY_BYTES], [2; KEY_BYTES]]).unwrap();
        assert_eq!(format!("{keyring:?}"), format!("{expected:?}"));
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        for mode in [0o644, 0o620, 0o601] {
            let error = Keyring::load(file(&line(1), mode).path()).unwrap_err().to_string();
            assert!(error.contains("chmod 600") && error.contains("`defaultMode: 0400`"), "{error}");
        }
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        for (owner, user) in [(1000, 1000), (0, 1000), (1000, 0), (0, 0)] {
            assert_eq!(exposure(0o640, owner, user, Path::new("fleet.keys")), None);
        }
        let complaint = exposure(0o640, 1001, 1000, Path::new("fleet.keys")).unwrap();
        assert!(complaint.contains("`chown 1000 fleet.keys`"), "{complaint}");
    }

    #[test]
    fn a_malformed_line_is_named_and_not_shown() {
        let secret = &line(1)[1..];
        let error = Keyring::load(file(&format!("{}\n{secret}", line(2)), 0o600).path()).unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains(secret), "{error}");
        let error = Keyring::load(file("# nothing", 0o600).path()).unwrap_err().to_string();
        assert!(error.contains("holds no key"), "{error}");
        let error = Keyring::load("/nonexistent/fleet.keys").unwrap_err().to_string();
        assert!(error.contains("resumed keygen"), "{error}");
    }

    #[test]
    fn a_change_is_used_when_it_is_complete_and_an_unusable_file_is_not() {
        let file = file(&line(1), 0o600);
        let keyring = Keyring::load(file.path()).unwrap();
        let id = keyring.issue_id("shop", 1);
        let check = || keyring.file.as_ref().unwrap().check(&keyring.keys, SystemTime::UNIX_EPOCH);

        let (in_use, loaded) = keyring.last_reload().unwrap();
        assert!(in_use && loaded > 0);

        std::fs::write(file.path(), "no key").unwrap();
        (0..3).for_each(|_| check());
        assert_eq!(keyring.open_id("shop", &id), Some(1));
        assert_eq!(keyring.last_reload(), Some((false, loaded)));

        std::fs::write(file.path(), format!("{}\n", line(2))).unwrap();
        check();
        assert_eq!(keyring.open_id("shop", &id), Some(1), "only the first line is written yet");
        std::fs::write(file.path(), format!("{}\n{}\n", line(2), line(1))).unwrap();
        (0..2).for_each(|_| check());
        assert_eq!(keyring.open_id("shop", &id), Some(1));
        assert_eq!(keyring.last_reload(), Some((true, 0)), "the time that was passed to check()");
        let renewed = keyring.issue_id("shop", 2);
        assert_eq!(Keyring::from_keys(&[[1; KEY_BYTES]]).unwrap().open_id("shop", &renewed), None);
    }
}
