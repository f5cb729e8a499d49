//! The end of the process.

use std::panic::catch_unwind;
use std::sync::OnceLock;

static LEAVE: OnceLock<fn()> = OnceLock::new();

/// Has a function called when the process ends; the first one only.
pub fn at_exit(leave: fn()) {
    extern "C" fn run() {
        let _ = catch_unwind(|| LEAVE.get().inspect(|leave| leave()));
    }
    if LEAVE.set(leave).is_ok() {
        // SAFETY: the function lives as long as the process: a preloaded library is never unloaded.
        unsafe { libc::atexit(run) };
    }
}
