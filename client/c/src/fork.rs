//! The handler of forks.

use std::sync::atomic::{AtomicBool, Ordering};

/// Has each forked child close its parent's sockets to the store. To be called whenever sessions are about to be kept.
pub(crate) fn watch() {
    extern "C" fn in_child() {
        store::close_inherited_sockets();
    }
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if !WATCHED.swap(true, Ordering::Relaxed) {
        // SAFETY: the function lives as long as this library is loaded; the C library forgets it when the library is unloaded.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    }
}
