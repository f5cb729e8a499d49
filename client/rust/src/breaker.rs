//! Stops asking a store that keeps failing, so that an outage costs handshakes nothing, and for a moment one that is asked too often.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many failures in a row open a breaker.
const LIMIT: u32 = 3;
/// For how long nobody asks a store that has just refused because of a limit; twice as long each time in a row.
const FIRST_REST: Duration = Duration::from_millis(50);
const LONGEST_REST: Duration = Duration::from_millis(800);

/// How long after a refusal because of a limit operations count as scarce: each of many frontends sees few refusals.
const SCARCE: Duration = Duration::from_secs(5);

/// Somebody else than a handshake has to try whether the store is back; once closed by such a trial, a single failure opens
/// it again. Races between threads may miscount by one, which does no harm.
#[derive(Default)]
pub(crate) struct Breaker {
    failures: AtomicU32,
    open: AtomicBool,
    last_failure: Mutex<Option<Instant>>,
    /// Whether the last call was refused because of a limit.
    limited: AtomicBool,
    /// For how long nobody asks after that, and until when.
    rest: Mutex<Option<(Duration, Instant)>>,
    last_refusal: Mutex<Option<Instant>>,
}

impl Breaker {
    pub(crate) fn closed(&self) -> bool {
        !self.open.load(Ordering::Relaxed)
    }

    /// Returns whether the store refused a call a moment ago because of a limit.
    pub(crate) fn resting(&self, now: Instant) -> bool {
        let rest = || *self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        self.limited.load(Ordering::Relaxed) && rest().is_some_and(|(_, until)| now < until)
    }

    /// Returns whether the store refused a call because of a limit in the last seconds. What there is goes to sessions that are stored
    /// already: a Get of one that is not gains nothing.
    pub(crate) fn scarce(&self, now: Instant) -> bool {
        let last = *self.last_refusal.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|last| now.saturating_duration_since(last) < SCARCE)
    }

    /// Notes a call that was late now, and returns whether that is no failure: a server holds back what it refuses if it refuses much.
    pub(crate) fn held_back(&self, now: Instant) -> bool {
        let scarce = self.scarce(now);
        if scarce {
            self.rest_longer(now);
        }
        scarce
    }

    /// Notes a call that began then and has failed now, and returns whether that opened the breaker.
    ///
    /// Of calls under way together one counts: a moment in which a busy machine stands still fails them all, and is no outage.
    pub(crate) fn failed(&self, began: Instant, now: Instant) -> bool {
        let mut last = self.last_failure.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| began < last) {
            return false;
        }
        *last = Some(now);
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        failures >= LIMIT && !self.open.swap(true, Ordering::Relaxed)
    }

    /// Notes that a limit is why a call was refused: for a while none is made.
    pub(crate) fn limited(&self, now: Instant) {
        *self.last_refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        self.rest_longer(now);
    }

    fn rest_longer(&self, now: Instant) {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        let again = self.limited.swap(true, Ordering::Relaxed);
        let pause = rest.filter(|_| again).map_or(FIRST_REST, |(last, _)| (2 * last).min(LONGEST_REST));
        *rest = Some((pause, now + pause));
    }

    /// Notes a call that was carried out in time and returns whether it closed the breaker.
    pub(crate) fn succeeded(&self) -> bool {
        self.limited.store(false, Ordering::Relaxed);
        self.reached()
    }

    /// Notes a call that was answered in time, whatever the answer, and returns whether it closed the breaker.
    pub(crate) fn reached(&self) -> bool {
        let closed = self.open.swap(false, Ordering::Relaxed);
        self.failures.store(if closed { LIMIT - 1 } else { 0 }, Ordering::Relaxed);
        closed
    }

    /// Returns whether the last call was carried out, if there was any.
    pub(crate) fn answered(&self) -> bool {
        self.failures.load(Ordering::Relaxed) == 0 && !self.limited.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_failures_in_a_row_open_it_and_after_a_trial_one() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        let fails = || breaker.failed(now, now);
        assert!(!fails() && !fails());
        breaker.succeeded();
        assert!(!fails() && !fails() && breaker.closed());
        assert!(fails() && !breaker.closed());
        assert!(!fails(), "it opens once");
        assert!(breaker.succeeded() && breaker.closed());
        assert!(fails() && !breaker.closed());
    }

    #[test]
    fn of_calls_that_fail_together_one_counts() {
        let (breaker, began) = (Breaker::default(), Instant::now());
        let at = |milliseconds| began + Duration::from_millis(milliseconds);
        assert!((45..60).all(|end| !breaker.failed(began, at(end))));
        assert!(!breaker.failed(at(46), at(91)) && breaker.closed());
        assert!(breaker.failed(at(92), at(137)) && !breaker.closed());
    }

    #[test]
    fn a_limit_rests_longer_each_time_until_a_call_is_carried_out() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        assert!(!breaker.resting(now) && breaker.answered());
        let rests = |milliseconds| {
            let at = |milliseconds| now + Duration::from_millis(milliseconds);
            breaker.limited(now);
            breaker.resting(at(milliseconds - 1)) && !breaker.resting(at(milliseconds))
        };
        assert!([50, 100, 200, 400, 800, 800].into_iter().all(rests));
        assert!(breaker.closed() && !breaker.answered());
        breaker.succeeded();
        assert!(!breaker.resting(now) && breaker.answered());
        assert!(rests(50));
    }

    #[test]
    fn what_is_late_a_while_after_a_refusal_was_held_back() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        assert!(!breaker.scarce(now) && !breaker.held_back(now));
        breaker.limited(now);
        let soon = now + Duration::from_millis(4_999);
        assert!(breaker.held_back(soon) && breaker.resting(soon) && breaker.closed());
        assert!(!breaker.held_back(now + SCARCE));
    }
}
