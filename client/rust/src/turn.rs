//! A lock that no fork leaves locked.

use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// Lets the threads of a process through one at a time. If the process forks while a thread has its turn, the child has no
/// such turn: a `Mutex` would stay locked there.
pub(crate) struct Turns(AtomicU32);

/// A thread's turn, until it is dropped.
pub(crate) struct Turn<'a>(&'a AtomicU32);

const FREE: u32 = 0;

impl Turns {
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(FREE))
    }

    /// Waits for a turn. Only for short and rare sections.
    pub(crate) fn take(&self) -> Turn<'_> {
        let pid = process::id();
        while self.0.swap(pid, Ordering::Acquire) == pid {
            thread::yield_now();
        }
        Turn(&self.0)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(FREE, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time_has_its_turn() {
        let (turns, inside) = (Turns::new(), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        let _turn = turns.take();
                        assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::Relaxed);
                    }
                });
            }
        });
    }

    #[test]
    fn the_turn_of_a_parents_thread_delays_no_thread_of_the_child() {
        let turns = Turns::new();
        std::mem::forget(turns.take());
        turns.0.store(1, Ordering::Relaxed); // as in a child: it was another process
        drop(turns.take());
    }
}
