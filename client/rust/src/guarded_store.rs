//! The store behind its circuit breaker: the outcome of each call goes to the breaker, the statistics and the log.

use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::breaker::Breaker;
use crate::stats::{Kind, Recorder, Stats};
use crate::store::{Failure, Store};

pub(crate) struct GuardedStore {
    pub(crate) namespace: String,
    /// How long a handshake may wait for the store.
    pub(crate) deadline: Duration,
    pub(crate) calls: Store,
    pub(crate) breaker: Breaker,
    recorder: Recorder,
    opened: Notify,
}

impl GuardedStore {
    pub(crate) fn new(namespace: String, deadline: Duration, calls: Store) -> Self {
        Self { namespace, deadline, calls, breaker: Breaker::default(), recorder: Recorder::default(), opened: Notify::new() }
    }

    pub(crate) fn count(&self, (kind, reason): (Kind, &'static str)) {
        self.recorder.count(kind, reason);
    }

    /// Counts a look-up by its duration.
    pub(crate) fn observe(&self, took: Duration) {
        self.recorder.observe(took);
    }

    pub(crate) fn stats(&self) -> Stats {
        self.recorder.snapshot()
    }

    /// Records that a look-up, which began then, has failed.
    pub(crate) fn failed(&self, failure: Failure, began: Instant) {
        let opened = match failure {
            Failure::Limited => return self.limited(began),
            Failure::Late => self.breaker.timed_out(began, Instant::now()),
            Failure::Down | Failure::Refused => self.breaker.failed(began, Instant::now()),
        };
        if opened {
            log::warn!(
                "store {} unavailable ({}); resumption is disabled until it recovers",
                self.calls.target(),
                failure.reason()
            );
            self.opened.notify_one();
        }
    }

    /// Records a call, which began then, that was refused because of a limit; this is no outage.
    pub(crate) fn limited(&self, began: Instant) {
        self.closed(self.breaker.limited(began, Instant::now()));
    }

    /// Records a call that was carried out in time.
    pub(crate) fn succeeded(&self) {
        self.closed(self.breaker.succeeded());
    }

    /// Waits until the breaker opens.
    pub(crate) async fn opened(&self) {
        self.opened.notified().await;
    }

    fn closed(&self, now: bool) {
        if now {
            log::info!("store {} available again", self.calls.target());
        }
    }
}
