//! The circuit breaker of the store: an outage costs handshakes nothing, and a rate limit of the store costs them no calls for a moment.
//! `protos/vectors/policy.json` has its rules for all clients.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::pauses::Pauses;

/// Consecutive failures that open the breaker.
pub(crate) const MAX_FAILURES: u32 = 3;
/// The pauses after calls that the store refused because of a limit, with exponential backoff.
pub(crate) const BACKOFF: Pauses = Pauses { first: Duration::from_millis(50), longest: Duration::from_millis(800) };
/// How long after such a refusal operations count as scarce: each of many frontends sees few refusals.
pub(crate) const SCARCITY: Duration = Duration::from_secs(5);
/// The pauses before probes while the breaker is open, with exponential backoff.
pub(crate) const PROBE_PAUSES: Pauses = Pauses { first: Duration::from_millis(50), longest: Duration::from_millis(500) };
/// After such a time without an opening, probes begin with the first pause again.
pub(crate) const PROBE_RESET: Duration = Duration::from_secs(10);

/// The prober, not a handshake, tries whether the store is back; once a probe has closed the breaker, a single failure opens it again.
#[derive(Default)]
pub(crate) struct Breaker(Mutex<State>);

#[derive(Default)]
struct State {
    open: bool,
    failures: u32,
    last_failure: Option<Instant>,
    last_opening: Option<Instant>,
    probe_pause: Duration,
    last_refusal: Option<Instant>,
    /// The pause after the last refusals, and when it began; zero after a call that was carried out.
    backoff: (Duration, Option<Instant>),
    last_call_failed: bool,
}

impl State {
    fn is_scarce(&self, now: Instant) -> bool {
        self.last_refusal.is_some_and(|last| now.saturating_duration_since(last) < SCARCITY)
    }

    /// Records a call that was answered in time, also with a refusal, and returns whether it closed the breaker.
    fn reached(&mut self) -> bool {
        self.failures = if self.open { MAX_FAILURES - 1 } else { 0 };
        std::mem::take(&mut self.open)
    }

    /// Lengthens the pause, once for calls that were under way together.
    fn back_off(&mut self, began: Instant, now: Instant) {
        let (pause, since) = self.backoff;
        if since.is_none_or(|since| began >= since) {
            self.backoff = (BACKOFF.after(pause), Some(now));
        }
    }
}

impl Breaker {
    pub(crate) fn closed(&self) -> bool {
        !self.lock().open
    }

    /// Returns whether the store refused a call a moment ago because of a limit, so that handshakes do not call it.
    pub(crate) fn rate_limited(&self, now: Instant) -> bool {
        let (pause, since) = self.lock().backoff;
        since.is_some_and(|since| now.saturating_duration_since(since) < pause)
    }

    /// Returns whether the store refused a call because of a limit in the last seconds. Sessions that are stored already then have
    /// precedence: a Get of one that is not gains nothing.
    pub(crate) fn scarce(&self, now: Instant) -> bool {
        self.lock().is_scarce(now)
    }

    /// Returns whether the last call was carried out, if there was any.
    pub(crate) fn last_call_succeeded(&self) -> bool {
        !self.lock().last_call_failed
    }

    /// Records a call that began then and timed out now. Returns whether that opened the breaker.
    ///
    /// While operations are scarce it is no failure: a server delays its refusals if it refuses many calls.
    pub(crate) fn timed_out(&self, began: Instant, now: Instant) -> bool {
        let mut state = self.lock();
        if !state.is_scarce(now) {
            drop(state);
            return self.failed(began, now);
        }
        state.last_call_failed = true;
        state.back_off(began, now);
        false
    }

    /// Records a call that began then and has failed now. Returns whether that opened the breaker.
    ///
    /// Calls that were under way together count as one failure: a busy machine that stands still for a moment fails them all.
    pub(crate) fn failed(&self, began: Instant, now: Instant) -> bool {
        let state = &mut *self.lock();
        state.last_call_failed = true;
        if state.last_failure.is_some_and(|last| began < last) {
            return false;
        }
        state.last_failure = Some(now);
        state.failures += 1;
        if state.open || state.failures < MAX_FAILURES {
            return false;
        }
        state.open = true;
        if state.last_opening.replace(now).is_none_or(|last| now.saturating_duration_since(last) > PROBE_RESET) {
            state.probe_pause = Duration::ZERO;
        }
        true
    }

    /// Records a call that began then and was refused now because of a limit. Returns whether it closed the breaker.
    pub(crate) fn limited(&self, began: Instant, now: Instant) -> bool {
        let state = &mut *self.lock();
        state.last_call_failed = true;
        state.last_refusal = Some(now);
        state.back_off(began, now);
        state.reached()
    }

    /// Records a call that was carried out in time. Returns whether it closed the breaker.
    pub(crate) fn succeeded(&self) -> bool {
        let state = &mut *self.lock();
        state.last_call_failed = false;
        state.backoff = (Duration::ZERO, None);
        state.reached()
    }

    /// Returns the pause before the next probe.
    pub(crate) fn next_probe_pause(&self) -> Duration {
        let state = &mut *self.lock();
        state.probe_pause = PROBE_PAUSES.after(state.probe_pause);
        state.probe_pause
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
