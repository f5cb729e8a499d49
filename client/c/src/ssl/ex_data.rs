//! The places of our data in connections.

use std::ffi::{c_int, c_long, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::OnceLock;

use super::handshake::Handshake;
use super::{ffi, owner};

/// Reserves the places. To be called when a context is set up, not in a handshake: a process that forks then would leave them locked in
/// its child.
pub(super) fn prepare() {
    first_context();
    handshake();
    owner::index();
}

/// The place of a connection's first context.
pub(super) fn first_context() -> c_int {
    static INDEX: OnceLock<c_int> = OnceLock::new();
    *INDEX.get_or_init(|| new_index(None))
}

/// The place of the state of a connection's handshake, a `Box<Handshake>`.
pub(super) fn handshake() -> c_int {
    static INDEX: OnceLock<c_int> = OnceLock::new();
    *INDEX.get_or_init(|| new_index(Some(free_handshake)))
}

fn new_index(free: Option<ffi::ExFree>) -> c_int {
    // SAFETY: the functions always live.
    unsafe { ffi::CRYPTO_get_ex_new_index(ffi::CRYPTO_EX_INDEX_SSL, 0, ptr::null_mut(), None, Some(copy_nothing), free) }
}

/// `SSL_dup` must not give one connection's data to another one.
unsafe extern "C" fn copy_nothing(
    _: *mut ffi::CRYPTO_EX_DATA,
    _: *const ffi::CRYPTO_EX_DATA,
    data: *mut *mut c_void,
    _: c_int,
    _: c_long,
    _: *mut c_void,
) -> c_int {
    // SAFETY: OpenSSL's copy of the pointer is there while it calls.
    unsafe { *data = ptr::null_mut() };
    1
}

unsafe extern "C" fn free_handshake(
    _: *mut c_void,
    handshake: *mut c_void,
    _: *mut ffi::CRYPTO_EX_DATA,
    _: c_int,
    _: c_long,
    _: *mut c_void,
) {
    if !handshake.is_null() {
        // SAFETY: it is a state of handshake(), and nothing else has it any more.
        let handshake = unsafe { Box::from_raw(handshake.cast::<Handshake>()) };
        let _ = catch_unwind(AssertUnwindSafe(|| drop(handshake)));
    }
}
