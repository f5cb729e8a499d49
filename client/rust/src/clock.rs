//! The time of day.

use std::time::SystemTime;

/// Returns the present, in Unix seconds.
pub(crate) fn unix_time() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs())
}
