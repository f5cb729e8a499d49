//! The time.

use std::fmt::Debug;
use std::time::{Instant, SystemTime};

/// A source of the time, which tests replace.
pub trait Clock: Debug + Send + Sync {
    /// Returns the time of day.
    fn now(&self) -> SystemTime;

    /// Returns the time of a clock that is never set.
    fn instant(&self) -> Instant;
}

/// The clocks of the system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn instant(&self) -> Instant {
        Instant::now()
    }
}

/// Returns the present, in Unix seconds.
pub(crate) fn unix_time() -> u64 {
    seconds(SystemTime::now())
}

/// Returns a time in Unix seconds.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
pub(crate) mod fake {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::envelope::from_microseconds;

    /// A clock that a test sets.
    #[derive(Debug)]
    pub(crate) struct FakeClock {
        microseconds: AtomicU64,
        /// By how much the wall clock was stepped.
        stepped: AtomicU64,
        zero: Instant,
    }

    impl FakeClock {
        /// Makes one that shows a time, in Unix seconds.
        pub(crate) fn at(seconds: u64) -> Self {
            Self { microseconds: AtomicU64::new(seconds * 1_000_000), stepped: AtomicU64::new(0), zero: Instant::now() }
        }

        /// Steps the wall clock forward, as an administrator does: the monotonic clock stays.
        pub(crate) fn step(&self, by: Duration) {
            self.stepped.fetch_add(u64::try_from(by.as_micros()).unwrap(), Ordering::Relaxed);
        }

        pub(crate) fn advance(&self, by: Duration) {
            self.microseconds.fetch_add(u64::try_from(by.as_micros()).unwrap(), Ordering::Relaxed);
        }

        /// Sets it to a time, in Unix seconds.
        pub(crate) fn set(&self, seconds: u64) {
            self.microseconds.store(seconds * 1_000_000, Ordering::Relaxed);
        }

        pub(crate) fn seconds(&self) -> u64 {
            super::seconds(self.now())
        }
    }

    impl Clock for FakeClock {
        fn now(&self) -> SystemTime {
            from_microseconds(self.microseconds.load(Ordering::Relaxed) + self.stepped.load(Ordering::Relaxed)).unwrap()
        }

        fn instant(&self) -> Instant {
            self.zero + Duration::from_micros(self.microseconds.load(Ordering::Relaxed))
        }
    }
}
