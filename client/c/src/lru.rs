//! A table of bounded size that drops the least recently used entry.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

pub(crate) struct Lru<K, V> {
    limit: usize,
    entries: HashMap<K, (V, u64)>,
    /// The key of each entry, by the time of its last use.
    order: BTreeMap<u64, K>,
    time: u64,
}

impl<K: Clone + Eq + Hash, V> Lru<K, V> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, entries: HashMap::new(), order: BTreeMap::new(), time: 0 }
    }

    /// Returns the value of a key, which counts as its use.
    pub(crate) fn get(&mut self, key: &K) -> Option<&V> {
        let (value, used) = self.entries.get_mut(key)?;
        self.time += 1;
        if let Some(key) = self.order.remove(used) {
            self.order.insert(self.time, key);
        }
        *used = self.time;
        Some(value)
    }

    /// Sets the value of a key, and returns the entries' values that went for it: they may be slow to drop.
    pub(crate) fn put(&mut self, key: K, value: V) -> Option<V> {
        self.time += 1;
        let replaced = self.entries.insert(key.clone(), (value, self.time));
        if let Some((_, used)) = &replaced {
            self.order.remove(used);
        }
        self.order.insert(self.time, key);
        let forgotten = (self.entries.len() > self.limit).then(|| self.order.pop_first()).flatten();
        forgotten.and_then(|(_, key)| self.entries.remove(&key)).or(replaced).map(|(value, _)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_that_was_not_used_for_longest_is_forgotten() {
        let mut table = Lru::new(2);
        assert_eq!((table.put("a", 1), table.put("b", 2), table.get(&"a").copied()), (None, None, Some(1)));
        assert_eq!(table.put("c", 3), Some(2));
        assert_eq!(["a", "b", "c"].map(|key| table.get(&key).copied()), [Some(1), None, Some(3)]);
        assert_eq!(table.put("a", 4), Some(1));
        assert_eq!(table.put("d", 5), Some(3));
        assert_eq!((table.entries.len(), table.order.len()), (2, 2));
    }
}
