//! Exponential backoff.

use std::time::Duration;

/// Pauses, each twice as long as the one before.
pub(crate) struct Pauses {
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
}

impl Pauses {
    /// Returns the pause that follows another one, or zero.
    pub(crate) fn after(&self, last: Duration) -> Duration {
        (2 * last).clamp(self.first, self.longest)
    }

    /// Returns the pause of a number, from 1 on.
    pub(crate) fn number(&self, number: u32) -> Duration {
        self.longest.min(self.first * 2_u32.saturating_pow(number - 1))
    }
}
