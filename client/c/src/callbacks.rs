//! The callbacks in libssl's hands. No panic leaves one.

use std::ffi::{c_int, c_uchar, c_uint};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use store::ID_BYTES;

use crate::binding;
use crate::policy::Binding;
use crate::ssl::{Connection, Context, Session, SessionCallbacks, bytes, ffi, length_of};

pub(crate) static SESSION_CALLBACKS: SessionCallbacks =
    SessionCallbacks { new: on_new, get: on_get, remove: on_remove, id: on_id };

/// Stores a session. Returns 0, since no reference is kept and OpenSSL releases its own; or the result of an observer.
unsafe extern "C" fn on_new(ssl: *mut ffi::SSL, session: *mut ffi::SSL_SESSION) -> c_int {
    // SAFETY: both live while OpenSSL calls, and the observer is called as OpenSSL would have.
    unsafe {
        let (Some((connection, binding)), Some(negotiated)) = (bound(ssl), Session::borrowed(session)) else { return 0 };
        guarded(binding, || binding.negotiated(connection, &negotiated));
        binding.observers.new.map_or(0, |observer| observer(ssl, session))
    }
}

/// Returns a session for the id that a client offers, or NULL. Its one reference goes to OpenSSL.
unsafe extern "C" fn on_get(
    ssl: *mut ffi::SSL,
    data: *const c_uchar,
    length: c_int,
    copy: *mut c_int,
) -> *mut ffi::SSL_SESSION {
    // SAFETY: all of them live while OpenSSL calls.
    let (bound, id) = unsafe {
        *copy = 0; // or OpenSSL would take a reference of its own
        (bound(ssl), bytes(data, usize::try_from(length).unwrap_or(0)))
    };
    let Some((connection, binding)) = bound else { return ptr::null_mut() };
    let found = guarded(binding, || binding.look_up(connection, &id).inspect(|_| connection.watch(on_info)));
    found.flatten().map_or(ptr::null_mut(), Session::into_raw)
}

/// Checks a resumed connection when its handshake is done, after the application's own callback.
unsafe extern "C" fn on_info(ssl: *const ffi::SSL, kind: c_int, value: c_int) {
    // SAFETY: the connection lives while OpenSSL calls, and the application's callback is called as OpenSSL would have.
    unsafe {
        let Some(connection) = Connection::new(ssl.cast_mut()) else { return };
        if let Some(callback) = connection.info_callback() {
            callback(ssl, kind, value);
        }
        if kind & ffi::SSL_CB_HANDSHAKE_DONE != 0 {
            // A defect of the check ends the connection, too.
            let passes = catch_unwind(AssertUnwindSafe(|| binding::check(connection)));
            if !matches!(passes, Ok(true)) {
                connection.terminate();
            }
        }
    }
}

/// Handles a connection that ended without our `close_notify`.
unsafe extern "C" fn on_remove(context: *mut ffi::SSL_CTX, session: *mut ffi::SSL_SESSION) {
    // SAFETY: both live while OpenSSL calls, and the observer is called as OpenSSL would have.
    unsafe {
        let binding = Context::new(context).and_then(|context| context.binding());
        if let (Some(binding), Some(ended)) = (binding, Session::borrowed(session)) {
            guarded(binding, || binding.ended(&ended));
            binding.observers.remove.inspect(|observer| observer(context, session));
        }
    }
}

/// Writes a session id. Returning 0 would end the handshake, so a defect here means a random id.
unsafe extern "C" fn on_id(ssl: *mut ffi::SSL, data: *mut c_uchar, length: *mut c_uint) -> c_int {
    // SAFETY: all of them live while OpenSSL calls; there is room for 32 bytes (SSL_CTX_set_generate_session_id(3)).
    unsafe {
        let issued = bound(ssl).and_then(|(connection, binding)| guarded(binding, || binding.issue_id(connection)));
        let id = issued.or_else(|| {
            let mut random = [0; ID_BYTES];
            getrandom::fill(&mut random).is_ok().then_some(random)
        });
        let Some(id) = id else { return 0 };
        ptr::copy_nonoverlapping(id.as_ptr(), data, id.len());
        *length = length_of(&id);
    }
    1
}

/// Returns a connection and the binding whose callbacks are called for it, if there is one.
///
/// # Safety
///
/// The connection lives for `'a`.
unsafe fn bound<'a>(ssl: *mut ffi::SSL) -> Option<(Connection<'a>, &'a Binding)> {
    // SAFETY: the caller's.
    let connection = unsafe { Connection::new(ssl) }?;
    Some((connection, connection.binding()?))
}

/// Keeps a panic from C: a defect is a full handshake, and a count.
fn guarded<T>(binding: &Binding, callback: impl FnOnce() -> T) -> Option<T> {
    let outcome = catch_unwind(AssertUnwindSafe(callback)).ok();
    if outcome.is_none() {
        let _ = catch_unwind(AssertUnwindSafe(|| binding.shim().internal_error()));
    }
    outcome
}
