//! The connection of a session.

use std::ffi::{c_int, c_long, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};

use super::ffi;

/// The connection that has negotiated or resumed a session, until it is freed: an application may keep the session for longer.
///
/// No lock guards it, since a process may fork at any time. Without a cache in the context, OpenSSL calls the remove callback only in the
/// thread that uses the connection.
#[derive(Default)]
pub(crate) struct Owner(AtomicPtr<ffi::SSL>);

impl Owner {
    /// Returns whether the connection lives and has failed: OpenSSL returns it to its handshake (`ossl_statem_fatal`).
    pub(super) fn has_failed(&self) -> bool {
        let connection = self.0.load(Ordering::Acquire);
        // SAFETY: the connection lives: it is NULL otherwise.
        !connection.is_null() && unsafe { ffi::SSL_in_init(connection) } == 1
    }
}

/// The connection's own part, which goes with it.
#[derive(Default)]
pub(crate) struct Ownership(Arc<Owner>);

impl Ownership {
    /// # Safety
    ///
    /// The connection outlives the result.
    pub(super) unsafe fn new(connection: *mut ffi::SSL) -> Self {
        Self(Arc::new(Owner(AtomicPtr::new(connection))))
    }

    pub(super) fn owner(&self) -> Arc<Owner> {
        Arc::clone(&self.0)
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        self.0.0.store(ptr::null_mut(), Ordering::Release);
    }
}

/// The first place for data of sessions: OpenSSL keeps place 0 for itself.
const FIRST: c_int = 1;

/// The place of a session's `Arc<Owner>`. Each further ticket of a connection is a copy of its session.
///
/// None in a program that has reserved a place before. With data in a later place, OpenSSL calls the program's function that copies its own
/// data for sessions without any as well, and that of stunnel crashes.
pub(super) fn index() -> Option<c_int> {
    static INDEX: OnceLock<c_int> = OnceLock::new();
    // SAFETY: the functions always live.
    let index = *INDEX.get_or_init(|| unsafe {
        let class = ffi::CRYPTO_EX_INDEX_SSL_SESSION;
        ffi::CRYPTO_get_ex_new_index(class, 0, ptr::null_mut(), None, Some(share), Some(free))
    });
    Some(index).filter(|index| *index == FIRST)
}

/// Returns whether this function frees the data that we attach to sessions.
#[must_use]
pub fn frees_our_session_data(function: *const c_void) -> bool {
    ptr::eq(function, free as *const c_void)
}

unsafe extern "C" fn share(
    _: *mut ffi::CRYPTO_EX_DATA,
    _: *const ffi::CRYPTO_EX_DATA,
    data: *mut *mut c_void,
    _: c_int,
    _: c_long,
    _: *mut c_void,
) -> c_int {
    // SAFETY: the data is NULL, or of an Arc<Owner> that the original has.
    unsafe {
        if !(*data).is_null() {
            Arc::increment_strong_count((*data).cast::<Owner>());
        }
    }
    1
}

unsafe extern "C" fn free(
    _: *mut c_void,
    owner: *mut c_void,
    _: *mut ffi::CRYPTO_EX_DATA,
    _: c_int,
    _: c_long,
    _: *mut c_void,
) {
    if !owner.is_null() {
        // SAFETY: it is an Arc<Owner>, and the session's own.
        drop(unsafe { Arc::from_raw(owner.cast::<Owner>()) });
    }
}
