//! State that all threads of a process share, and that a forked child may use at any time.
//!
//! A lock that another thread has while the process forks is never released in the child. The child then begins anew.

use std::mem;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use arc_swap::ArcSwapOption;

pub(crate) struct Shared<T> {
    current: ArcSwapOption<Held<T>>,
    new: fn() -> T,
}

struct Held<T> {
    /// The process that has used it last.
    pid: AtomicU32,
    value: Mutex<T>,
}

impl<T> Shared<T> {
    pub(crate) const fn new(new: fn() -> T) -> Self {
        Self { current: ArcSwapOption::const_empty(), new }
    }

    /// Calls a function with the value, one thread after the other.
    pub(crate) fn with<R>(&self, function: impl FnOnce(&mut T) -> R) -> R {
        function(&mut self.held().value.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn held(&self) -> Arc<Held<T>> {
        let pid = process::id();
        if let Some(held) = self.current.load_full() {
            let inherited = held.pid.load(Ordering::Relaxed) != pid;
            // At the first use in a child it is locked if a thread of the parent had it, or if another thread is quicker here.
            if !inherited || !matches!(held.value.try_lock(), Err(TryLockError::WouldBlock)) {
                held.pid.store(pid, Ordering::Relaxed);
                return held;
            }
        }
        let fresh = Arc::new(Held { pid: AtomicU32::new(pid), value: Mutex::new((self.new)()) });
        if let Some(before) = self.current.swap(Some(Arc::clone(&fresh)))
            && before.pid.load(Ordering::Relaxed) != pid
        {
            mem::forget(before); // it may have been in the middle of a change
        }
        fresh
    }
}

/// A line that is logged once in a process.
pub struct Notice(AtomicBool);

impl Notice {
    /// Makes one that was not logged.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Logs the line as information, unless it was logged.
    pub fn inform(&self, line: &str) {
        if !self.0.swap(true, Ordering::Relaxed) {
            log::info!("{line}");
        }
    }

    /// Logs the line as a warning, unless it was logged.
    pub fn warn(&self, line: &str) {
        if !self.0.swap(true, Ordering::Relaxed) {
            log::warn!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_kept_across_a_fork_unless_it_was_locked_then() {
        let shared = Shared::new(|| 0);
        shared.with(|value| *value = 7);
        let parents = shared.held();
        let fork = || parents.pid.store(1, Ordering::Relaxed);
        fork();
        assert_eq!(shared.with(|value| *value), 7);
        let locked = parents.value.lock().unwrap();
        fork();
        assert_eq!(shared.with(|value| *value), 0);
        drop(locked);
        shared.with(|value| *value = 8);
        assert_eq!(shared.with(|value| *value), 8);
    }
}
