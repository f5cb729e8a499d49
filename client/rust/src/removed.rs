//! The sessions that a process has removed lately: neither it nor a process forked from it finds them again, although the store may not
//! have received the Remove yet.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::sealing::StoreKey;

/// How many removals are remembered.
pub(crate) const REMEMBERED: usize = 4096;

#[derive(Default)]
pub(crate) struct Removed {
    keys: Mutex<Keys>,
    journal: Journal,
}

impl Removed {
    /// Returns the removals of the parent, for a forked child.
    pub(crate) fn inherited(parent: &Self) -> Self {
        let removed = Self::default();
        parent.journal.keys().for_each(|key| removed.add(key));
        removed
    }

    pub(crate) fn add(&self, key: StoreKey) {
        self.journal.add(&key);
        self.lock().add(key);
    }

    pub(crate) fn contains(&self, key: &StoreKey) -> bool {
        self.lock().set.contains(key)
    }

    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Keys {
    set: HashSet<StoreKey>,
    order: VecDeque<StoreKey>,
}

impl Keys {
    fn add(&mut self, key: StoreKey) {
        if self.set.insert(key) {
            self.order.push_back(key);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
    }
}

/// The last keys, without a lock: a forked child reads them although a thread of its parent may have held any mutex.
#[derive(Default)]
struct Journal {
    slots: OnceLock<Box<[[AtomicU64; 4]]>>,
    added: AtomicUsize,
}

impl Journal {
    fn add(&self, key: &StoreKey) {
        let slots = self.slots.get_or_init(|| (0..REMEMBERED).map(|_| Default::default()).collect());
        let slot = &slots[self.added.fetch_add(1, Ordering::Relaxed) % REMEMBERED];
        for (word, bytes) in slot.iter().zip(key.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
    }

    /// Returns the keys, the oldest first.
    fn keys(&self) -> impl Iterator<Item = StoreKey> {
        let slots = self.slots.get().map_or(&[][..], |slots| slots);
        let (newer, older) = slots.split_at(self.added.load(Ordering::Relaxed) % REMEMBERED.min(slots.len().max(1)));
        older.iter().chain(newer).filter_map(|slot| {
            let mut key = StoreKey::default();
            for (word, bytes) in slot.iter().zip(key.as_chunks_mut().0) {
                *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
            }
            (key != StoreKey::default()).then_some(key)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> StoreKey {
        let mut key = StoreKey::default();
        key[..8].copy_from_slice(&(number as u64 + 1).to_ne_bytes());
        key
    }

    #[test]
    fn the_last_removals_are_remembered() {
        let removed = Removed::default();
        (0..REMEMBERED + 10).for_each(|number| removed.add(key(number)));
        assert!(!removed.contains(&key(9)) && removed.contains(&key(10)) && removed.contains(&key(REMEMBERED + 9)));
    }

    #[test]
    fn a_child_inherits_the_removals_of_a_parent_that_had_them_locked() {
        let parent = Removed::default();
        assert!(!Removed::inherited(&parent).contains(&key(1)));
        for count in [2, REMEMBERED + 10] {
            (0..count).for_each(|number| parent.add(key(number)));
            let locked = parent.lock();
            let child = Removed::inherited(&parent);
            drop(locked);
            assert!(child.contains(&key(count - 1)) && child.contains(&key(count - 2)) && !child.contains(&key(count)));
        }
    }
}
