//! Stops asking a store that keeps failing, so that an outage costs handshakes nothing.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// How many failures in a row open a breaker.
const LIMIT: u32 = 3;

/// Somebody else than a handshake has to try whether the store is back; once closed by such a trial, a single failure opens
/// it again. Races between threads may miscount by one, which does no harm.
#[derive(Default)]
pub(crate) struct Breaker {
    failures: AtomicU32,
    open: AtomicBool,
}

impl Breaker {
    pub(crate) fn closed(&self) -> bool {
        !self.open.load(Ordering::Relaxed)
    }

    /// Notes a failed call and returns whether it opened the breaker.
    pub(crate) fn failed(&self) -> bool {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        failures >= LIMIT && !self.open.swap(true, Ordering::Relaxed)
    }

    /// Notes a call that was answered in time and returns whether it closed the breaker.
    pub(crate) fn succeeded(&self) -> bool {
        let closed = self.open.swap(false, Ordering::Relaxed);
        self.failures.store(if closed { LIMIT - 1 } else { 0 }, Ordering::Relaxed);
        closed
    }

    /// Returns whether the last call was answered, if there was any.
    pub(crate) fn answered(&self) -> bool {
        self.failures.load(Ordering::Relaxed) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_failures_in_a_row_open_it_and_after_a_trial_one() {
        let breaker = Breaker::default();
        assert!(!breaker.failed() && !breaker.failed());
        breaker.succeeded();
        assert!(!breaker.failed() && !breaker.failed() && breaker.closed());
        assert!(breaker.failed() && !breaker.closed());
        assert!(!breaker.failed(), "it opens once");
        assert!(breaker.succeeded() && breaker.closed());
        assert!(breaker.failed() && !breaker.closed());
    }
}
