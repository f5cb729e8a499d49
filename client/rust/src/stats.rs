//! What a frontend counts.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Upper bounds of the look-up time buckets, in microseconds; one more bucket holds what took longer.
pub const BUCKETS: [u128; 10] = [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000];

/// What happened in this process so far, each a count by reason; the names are those of all clients.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// `mirror` (no call); `store`; `retried` (a session just negotiated, found when asked for again); `coalesced` (another
    /// handshake had just asked).
    pub hits: BTreeMap<&'static str, u64>,
    /// `unknown`, `expired`: nothing to resume. `foreign-id`, `expired-id`: answered without a call. `timeout`, `unavailable`, `rejected`:
    /// the store failed. `limited`: a limit of the store is used up, and for a moment after that it is not asked. `breaker-open`: it kept failing,
    /// so it was not asked. `too-many-lookups`: too many look-ups under way.
    /// `malformed`, `unknown-key`, `not-authentic`, `undecodable`: the value was no session of this fleet. `server-name-mismatch`: it was
    /// negotiated for another server name. `context-mismatch`: the session's context proved something else than this one would;
    /// `context-unknown`: this process has not seen yet which context serves the name; `context-unstable`: different contexts
    /// serve it. `internal-error`: a defect, see the log.
    pub misses: BTreeMap<&'static str, u64>,
    /// `stored`, `refused`, `dropped` (the queue was full), `expired` (not sent in time), `unresumable` (nothing to store).
    pub puts: BTreeMap<&'static str, u64>,
    /// `fatal-error`, `application`, `dropped`, `refused`; `kept` counts connections that were cut, whose sessions stay.
    pub removals: BTreeMap<&'static str, u64>,
    /// Resumed connections that were ended after their handshake. `context-mismatch`: the connection's context turned out to be
    /// another one than the session's.
    pub terminations: BTreeMap<&'static str, u64>,
    /// Calls by their time: one count for each of [`BUCKETS`] and one for longer ones.
    pub lookups: [u64; BUCKETS.len() + 1],
    /// What all look-ups together took.
    pub lookup_time: Duration,
}

/// Which of the counts of [`Stats`].
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Hits,
    Misses,
    Puts,
    Removals,
    Terminations,
}

#[derive(Default)]
pub(crate) struct Recorder(Mutex<Stats>);

impl Recorder {
    pub(crate) fn count(&self, kind: Kind, reason: &'static str) {
        let stats = &mut *self.lock();
        let counts = match kind {
            Kind::Hits => &mut stats.hits,
            Kind::Misses => &mut stats.misses,
            Kind::Puts => &mut stats.puts,
            Kind::Removals => &mut stats.removals,
            Kind::Terminations => &mut stats.terminations,
        };
        *counts.entry(reason).or_default() += 1;
    }

    pub(crate) fn observe(&self, took: Duration) {
        let stats = &mut *self.lock();
        let bucket = BUCKETS.partition_point(|bound| *bound < took.as_micros());
        stats.lookups[bucket] += 1;
        stats.lookup_time += took;
    }

    pub(crate) fn snapshot(&self) -> Stats {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Stats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
