//! The statistics of a frontend.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Why a session is removed, as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovalReason {
    /// A connection failed with a fatal alert (RFC 5246 section 7.2.2).
    FatalError,
    /// The application asked for it.
    Application,
}

impl RemovalReason {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::FatalError => "fatal-error",
            Self::Application => "application",
        }
    }
}

pub(crate) const HITS: [&str; 4] = ["mirror", "store", "retried", "coalesced"];
pub(crate) const MISSES: [&str; 21] = [
    "unknown",
    "foreign-id",
    "expired-id",
    "timeout",
    "unavailable",
    "rejected",
    "limited",
    "breaker-open",
    "too-many-lookups",
    "malformed",
    "unknown-key",
    "expired",
    "not-authentic",
    "undecodable",
    "server-name-mismatch",
    "internal-error",
    "context-mismatch",
    "context-unknown",
    "context-unstable",
    "other-cipher",
    "not-resumed",
];
pub(crate) const PUTS: [&str; 5] = ["stored", "refused", "dropped", "expired", "unresumable"];
pub(crate) const REMOVALS: [&str; 5] = ["fatal-error", "application", "dropped", "refused", "kept"];
pub(crate) const TERMINATIONS: [&str; 1] = ["context-mismatch"];

/// Statistics of this process, each a count by reason; the names are those of all clients.
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
    /// Calls by their time: one count for each of [`Stats::LOOKUP_BOUNDS`] and one for longer ones.
    pub lookups: [u64; Stats::LOOKUP_BOUNDS.len() + 1],
    /// The time of all look-ups together.
    pub lookup_time: Duration,
}

impl Stats {
    /// The upper bounds of the look-up times in [`Stats::lookups`].
    pub const LOOKUP_BOUNDS: [Duration; 10] = [
        Duration::from_micros(100),
        Duration::from_micros(250),
        Duration::from_micros(500),
        Duration::from_millis(1),
        Duration::from_micros(2_500),
        Duration::from_millis(5),
        Duration::from_millis(10),
        Duration::from_millis(25),
        Duration::from_millis(50),
        Duration::from_millis(100),
    ];
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
        let (counts, reasons) = match kind {
            Kind::Hits => (&mut stats.hits, &HITS[..]),
            Kind::Misses => (&mut stats.misses, &MISSES[..]),
            Kind::Puts => (&mut stats.puts, &PUTS[..]),
            Kind::Removals => (&mut stats.removals, &REMOVALS[..]),
            Kind::Terminations => (&mut stats.terminations, &TERMINATIONS[..]),
        };
        debug_assert!(reasons.contains(&reason), "{reason}");
        *counts.entry(reason).or_default() += 1;
    }

    pub(crate) fn observe(&self, took: Duration) {
        let stats = &mut *self.lock();
        let bucket = Stats::LOOKUP_BOUNDS.partition_point(|bound| *bound < took);
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
