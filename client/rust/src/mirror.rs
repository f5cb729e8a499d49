//! A copy of the namespace's sealed sessions in the frontend's memory: a look-up that finds its session here is no call.
//!
//! The store's Watch keeps it current, and the frontend's own look-ups add older sessions. It returns sessions only while the
//! stream is alive: a store that is silent for three seconds may have removed some, so the mirror returns none until the next
//! message. The same holds if messages arrive late, as a network that delays them could have it: a call each
//! second, on the connection of the stream, bounds their age. A stream that cannot go on where it ended begins with
//! an empty mirror, never with a wrong one.
//!
//! The stream begins at the second look-up of the process: a server that forks a process for each connection has no use for a copy.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;

use crate::sealing::StoreKey;
use crate::store::StoredSession;
use crate::v1;
use crate::v1::watch_event::Event;
use crate::watching::{STALE, Watcher};

/// The memory of an entry beside its value: key, expiry, issue, a table that is mostly too large, the order, the allocator.
const OVERHEAD_BYTES: usize = 216;
const FORGOTTEN: usize = 1024;
const RECENT_REMOVALS: usize = 1024;

/// A mirror of one namespace.
pub(crate) struct Mirror {
    sessions: Mutex<SessionCache>,
    heard: Mutex<Option<Instant>>,
    lookups: AtomicUsize,
    pays: Notify,
}

impl Mirror {
    /// Makes an empty mirror whose sessions may take `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        let sessions = Mutex::new(SessionCache::new(limit));
        Self { sessions, heard: Mutex::new(None), lookups: AtomicUsize::new(0), pays: Notify::new() }
    }

    /// Waits for the second look-up; then the namespace is to be followed.
    pub(crate) async fn wait(&self) {
        self.pays.notified().await;
    }

    /// Returns the sealed value of a live session, or None: then the store has to be called.
    pub(crate) fn get(&self, key: &StoreKey) -> Option<Vec<u8>> {
        if self.lookups.fetch_add(1, Ordering::Relaxed) == 1 {
            self.pays.notify_one();
        }
        if self.silence()? >= STALE {
            return None;
        }
        self.lock().get(key, Instant::now()).map(<[u8]>::to_vec)
    }

    /// Returns the number of removals so far: a look-up passes the number at its beginning to `found`.
    pub(crate) fn removals(&self) -> u64 {
        self.lock().removals
    }

    /// Keeps a session that a look-up found, unless it was removed since.
    pub(crate) fn found(&self, key: &StoreKey, session: &StoredSession, since: u64) {
        let mut sessions = self.lock();
        if !sessions.removed_since(key, since) {
            sessions.put(*key, session, Instant::now());
        }
    }

    /// Forgets a session, and refuses it from look-ups that are under way.
    pub(crate) fn remove(&self, key: &StoreKey) {
        self.lock().remove(key);
    }

    fn silence(&self) -> Option<Duration> {
        self.heard().map(|heard| heard.elapsed())
    }

    fn heard(&self) -> MutexGuard<'_, Option<Instant>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, SessionCache> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher for Mirror {
    const REMOVALS_ONLY: bool = false;
    const LOST: &str = "mirror disconnected; look-ups go to the store";

    fn begin(&self, first: &v1::WatchResponse, _follows: bool) -> Result<(), String> {
        if !first.continued {
            self.lock().clear();
        }
        Ok(())
    }

    fn take_in(&self, event: v1::WatchEvent) {
        match event.event {
            Some(Event::Stored(v1::SessionStored { key, session: Some(session), issue_time })) => {
                if let (Ok(key), Some(session)) = (StoreKey::try_from(key), StoredSession::of(session)) {
                    let session = StoredSession { issued: issue_time.and_then(time), ..session };
                    let mut sessions = self.lock();
                    // A late message: a session that this frontend has removed never comes back.
                    if !sessions.removed_lately(&key) {
                        sessions.put(key, &session, Instant::now());
                    }
                }
            }
            Some(Event::Removed(v1::SessionRemoved { key, .. })) => {
                if let Ok(key) = StoreKey::try_from(key) {
                    self.remove(&key);
                }
            }
            Some(Event::Purged(v1::NamespacePurged { issued_before_time: Some(before), .. })) => match time(before) {
                Some(before) => self.lock().purge(before),
                None => self.lock().clear(),
            },
            // A purge of everything, or an unknown event: look-ups find valid sessions again.
            _ => self.lock().clear(),
        }
    }

    fn record_live(&self, then: Instant) {
        *self.heard() = Some(then);
    }

    fn lose(&self) {
        *self.heard() = None;
    }
}

fn time(timestamp: prost_types::Timestamp) -> Option<SystemTime> {
    timestamp.try_into().ok()
}

struct Entry {
    expires: Instant,
    issued: Option<SystemTime>,
    value: Box<[u8]>,
}

/// Values by store key, bounded in bytes, until they expire. The oldest go first.
struct SessionCache {
    limit: usize,
    entries: HashMap<StoreKey, Entry>,
    order: VecDeque<StoreKey>,
    bytes: usize,
    removals: u64,
    /// The last removals, with their numbers.
    recent: VecDeque<(StoreKey, u64)>,
    /// Up to this removal anything may have been removed.
    unknown: u64,
}

impl SessionCache {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            entries: HashMap::new(),
            order: VecDeque::new(),
            bytes: 0,
            removals: 0,
            recent: VecDeque::new(),
            unknown: 0,
        }
    }

    fn clear(&mut self) {
        // A removal of everything: no look-up under way may put its session. Late messages may still store sessions that were removed.
        let (removals, recent) = (self.removals + 1, mem::take(&mut self.recent));
        *self = Self { removals, recent, unknown: removals, ..Self::new(self.limit) };
    }

    fn get(&self, key: &StoreKey, now: Instant) -> Option<&[u8]> {
        self.entries.get(key).filter(|entry| now < entry.expires).map(|entry| &*entry.value)
    }

    fn put(&mut self, key: StoreKey, session: &StoredSession, now: Instant) {
        if self.entries.contains_key(&key) {
            self.drop(&key);
        } else {
            self.order.push_back(key);
        }
        self.bytes += OVERHEAD_BYTES + session.value.len();
        let value = session.value.as_slice().into();
        self.entries.insert(key, Entry { expires: now + session.ttl, issued: session.issued, value });
        self.make_room(now);
    }

    fn remove(&mut self, key: &StoreKey) {
        self.removals += 1;
        if self.recent.len() == RECENT_REMOVALS {
            self.unknown = self.recent.pop_front().map_or(self.unknown, |(_, number)| self.unknown.max(number));
        }
        self.recent.push_back((*key, self.removals));
        self.drop(key);
        self.shorten_order();
    }

    /// Forgets the sessions that were issued before a time, or at an unknown one.
    fn purge(&mut self, before: SystemTime) {
        self.removals += 1;
        self.unknown = self.removals; // no look-up under way may put its session
        let bytes = &mut self.bytes;
        self.entries.retain(|_, entry| {
            let kept = entry.issued.is_some_and(|issued| issued >= before);
            if !kept {
                *bytes -= OVERHEAD_BYTES + entry.value.len();
            }
            kept
        });
        self.shorten_order();
    }

    /// Drops the keys that are gone, or they would take ever more memory.
    fn shorten_order(&mut self) {
        if self.order.len() > self.entries.len() / 4 * 5 + FORGOTTEN {
            let entries = &self.entries;
            self.order.retain(|key| entries.contains_key(key));
        }
    }

    fn removed_since(&self, key: &StoreKey, since: u64) -> bool {
        let missed = self.recent.iter().rev().take_while(|(_, number)| *number > since);
        self.unknown > since || missed.map(|(removed, _)| removed).any(|removed| removed == key)
    }

    /// Returns whether a session was removed a short time ago, so that the message about its Put may arrive yet.
    fn removed_lately(&self, key: &StoreKey) -> bool {
        self.recent.iter().any(|(removed, _)| removed == key)
    }

    fn drop(&mut self, key: &StoreKey) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= OVERHEAD_BYTES + entry.value.len();
        }
    }

    fn make_room(&mut self, now: Instant) {
        // Sessions live about equally long, so the oldest is the first to expire. Keys of removed sessions are still in the
        // order, and cost nothing to pass over.
        while let Some(oldest) = self.order.front().copied() {
            let live = self.entries.get(&oldest).is_some_and(|entry| now < entry.expires);
            if live && self.bytes <= self.limit {
                return;
            }
            self.order.pop_front();
            self.drop(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn session(value: &[u8], seconds: u64) -> StoredSession {
        StoredSession { value: value.to_vec(), ttl: Duration::from_secs(seconds), issued: None }
    }

    fn timestamp(seconds: i64) -> prost_types::Timestamp {
        prost_types::Timestamp { seconds, nanos: 0 }
    }

    /// Returns the event of a session of ten seconds that was issued at a Unix time.
    fn stored(key: StoreKey, value: &[u8], issued: Option<i64>) -> v1::WatchEvent {
        let session = v1::StoredSession { value: value.to_vec(), ttl: Some(prost_types::Duration { seconds: 10, nanos: 0 }) };
        let issue_time = issued.map(timestamp);
        let stored = v1::SessionStored { key: key.to_vec(), session: Some(session), issue_time };
        v1::WatchEvent { event: Some(Event::Stored(stored)) }
    }

    #[test]
    fn the_second_look_up_begins_the_stream() {
        let mirror = Mirror::new(1 << 20);
        let mut wait = pin!(mirror.wait());
        let mut begins = || wait.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
        assert_eq!(mirror.get(&[1; 32]), None);
        assert!(!begins());
        assert_eq!(mirror.get(&[1; 32]), None);
        assert!(begins());
    }

    #[test]
    fn a_session_is_there_until_it_expires_or_is_removed() {
        let (mut sessions, now) = (SessionCache::new(1 << 20), Instant::now());
        sessions.put([1; 32], &session(b"one", 10), now);
        sessions.put([2; 32], &session(b"two", 20), now);
        assert_eq!(sessions.get(&[1; 32], now), Some(&b"one"[..]));
        let later = now + Duration::from_secs(10);
        assert_eq!(sessions.get(&[1; 32], later), None);
        assert_eq!(sessions.get(&[2; 32], later), Some(&b"two"[..]));
        sessions.remove(&[2; 32]);
        assert_eq!(sessions.get(&[2; 32], later), None);
    }

    #[test]
    fn the_oldest_go_when_room_is_needed_and_all_bytes_are_accounted_for() {
        let (mut sessions, now) = (SessionCache::new(3 * (OVERHEAD_BYTES + 100)), Instant::now());
        for byte in 0..10 {
            sessions.put([byte; 32], &session(&[byte; 100], 10), now);
            sessions.put([byte; 32], &session(&[byte; 100], 10), now);
        }
        let kept: Vec<_> = (0..10).filter(|byte| sessions.get(&[*byte; 32], now).is_some()).collect();
        assert_eq!(kept, [7, 8, 9]);
        for byte in 0..10 {
            sessions.remove(&[byte; 32]);
        }
        assert_eq!((sessions.bytes, sessions.entries.len()), (0, 0));
    }

    #[test]
    fn a_removed_session_does_not_come_back_from_a_lookup() {
        let mirror = Mirror::new(1 << 20);
        *mirror.heard() = Some(Instant::now());
        let since = mirror.removals();
        mirror.remove(&[1; 32]);
        mirror.found(&[1; 32], &session(b"one", 10), since);
        mirror.found(&[2; 32], &session(b"two", 10), since);
        assert_eq!((mirror.get(&[1; 32]), mirror.get(&[2; 32])), (None, Some(b"two".to_vec())));
        let since = mirror.removals();
        mirror.lock().clear();
        mirror.found(&[3; 32], &session(b"three", 10), since);
        assert_eq!(mirror.get(&[3; 32]), None);
    }

    #[test]
    fn a_removed_session_does_not_come_back_from_the_stream() {
        let mirror = Mirror::new(1 << 20);
        *mirror.heard() = Some(Instant::now());
        mirror.remove(&[1; 32]);
        mirror.lock().clear();
        for key in [[1; 32], [2; 32]] {
            mirror.take_in(stored(key, b"late", None));
        }
        assert_eq!((mirror.get(&[1; 32]), mirror.get(&[2; 32])), (None, Some(b"late".to_vec())));
    }

    #[test]
    fn a_purge_of_everything_and_an_unknown_event_empty_it() {
        let mirror = Mirror::new(1 << 20);
        *mirror.heard() = Some(Instant::now());
        for event in [Some(Event::Purged(v1::NamespacePurged::default())), None] {
            mirror.lock().put([1; 32], &session(b"one", 10), Instant::now());
            let since = mirror.removals();
            mirror.take_in(v1::WatchEvent { event });
            mirror.found(&[2; 32], &session(b"two", 10), since);
            assert_eq!((mirror.get(&[1; 32]), mirror.get(&[2; 32])), (None, None));
        }
    }

    #[test]
    fn a_purge_ends_sessions_that_were_issued_before_it_or_at_an_unknown_time() {
        let mirror = Mirror::new(1 << 20);
        *mirror.heard() = Some(Instant::now());
        let since = mirror.removals();
        mirror.take_in(stored([1; 32], b"before", Some(999)));
        mirror.take_in(stored([2; 32], b"then", Some(1_000)));
        mirror.take_in(stored([3; 32], b"untimed", None));
        mirror.found(&[4; 32], &session(b"found", 10), since);
        let purged = |seconds| v1::NamespacePurged { issued_before_time: Some(timestamp(seconds)), purge_time: None };
        mirror.take_in(v1::WatchEvent { event: Some(Event::Purged(purged(1_000))) });
        mirror.found(&[5; 32], &session(b"late", 10), since);
        let kept: Vec<_> = (1..=5).filter(|byte| mirror.get(&[*byte; 32]).is_some()).collect();
        assert_eq!(kept, [2]);
        mirror.take_in(v1::WatchEvent { event: Some(Event::Purged(purged(1))) });
        assert_eq!(mirror.get(&[2; 32]), Some(b"then".to_vec()));
        mirror.take_in(v1::WatchEvent { event: Some(Event::Purged(purged(i64::MAX))) });
        assert_eq!(mirror.get(&[2; 32]), None);
        assert_eq!(mirror.lock().bytes, 0);
    }

    #[test]
    fn a_mirror_without_a_recent_message_returns_nothing() {
        let mirror = Mirror::new(1 << 20);
        mirror.found(&[1; 32], &session(b"one", 10), 0);
        assert_eq!(mirror.get(&[1; 32]), None);
        *mirror.heard() = Some(Instant::now());
        assert!(mirror.get(&[1; 32]).is_some());
        *mirror.heard() = Instant::now().checked_sub(STALE);
        assert_eq!(mirror.get(&[1; 32]), None);
    }

    #[test]
    fn a_removed_key_leaves_the_order_too() {
        let (mut sessions, now) = (SessionCache::new(1 << 30), Instant::now());
        for number in 0..10_000_u32 {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&number.to_be_bytes());
            sessions.put(key, &session(b"value", 10), now);
            sessions.remove(&key);
        }
        assert!(sessions.order.len() <= FORGOTTEN + 1);
    }
}
