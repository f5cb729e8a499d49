//! The callbacks in libssl's hands. No panic leaves one.

use std::ffi::{c_int, c_uchar, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use store::ID_BYTES;

use crate::binding;
use crate::policy::Binding;
use crate::ssl::{Connection, Context, Session, SessionCallbacks, TicketCallbacks, TicketKeys, bytes, ffi};
use crate::tickets;

pub(crate) static SESSION_CALLBACKS: SessionCallbacks =
    SessionCallbacks { new: on_new, get: on_get, remove: on_remove, id: on_id };
pub(crate) static TICKET_CALLBACKS: TicketCallbacks =
    TicketCallbacks { key: on_ticket_key, generate: on_generate_ticket, decrypt: on_decrypt_ticket, identity: on_identity };

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
            getrandom::fill(&mut random).is_ok().then(|| random.to_vec())
        });
        let Some(id) = id else { return 0 };
        ptr::copy_nonoverlapping(id.as_ptr(), data, id.len());
        *length = c_uint::try_from(id.len()).unwrap_or(0);
    }
    1
}

/// Supplies the keys of a ticket. 0 is no resumption when a client offers one, and no ticket when one is to be issued.
unsafe extern "C" fn on_ticket_key(
    ssl: *mut ffi::SSL,
    name: *mut c_uchar,
    iv: *mut c_uchar,
    cipher: *mut ffi::EVP_CIPHER_CTX,
    mac: *mut ffi::EVP_MAC_CTX,
    encrypts: c_int,
) -> c_int {
    const AGAIN: c_int = 2;
    // SAFETY: all of them live while OpenSSL calls.
    let (bound, keys) = unsafe { (bound(ssl), TicketKeys::new(name, iv, cipher, mac)) };
    let Some((connection, binding)) = bound else { return 0 };
    if encrypts != 0 {
        return guarded(binding, || tickets::encrypt(connection, &keys)).map_or(0, c_int::from);
    }
    match guarded(binding, || binding.decrypt(connection, &keys)).flatten() {
        Some(true) => AGAIN,
        Some(false) => 1,
        None => 0,
    }
}

/// Completes the session of a ticket that is about to be issued. Returning 0 would end the handshake.
unsafe extern "C" fn on_generate_ticket(ssl: *mut ffi::SSL, _: *mut c_void) -> c_int {
    // SAFETY: the connection lives while OpenSSL calls.
    if let Some((connection, binding)) = unsafe { bound(ssl) } {
        guarded(binding, || binding.prepare_ticket(connection));
    }
    1
}

/// Decides about a ticket that a client offers.
unsafe extern "C" fn on_decrypt_ticket(
    ssl: *mut ffi::SSL,
    session: *mut ffi::SSL_SESSION,
    _: *const c_uchar,
    _: usize,
    status: c_int,
    _: *mut c_void,
) -> c_int {
    // SAFETY: all of them live while OpenSSL calls.
    let (bound, session) = unsafe { (bound(ssl), Session::borrowed(session)) };
    let Some((connection, binding)) = bound else { return ffi::SSL_TICKET_RETURN_IGNORE_RENEW };
    // Without a renewal OpenSSL would issue no ticket. Ignored, the ticket leaves the handshake to the stored sessions.
    let uses_tickets = guarded(binding, || binding.uses_tickets(connection)).unwrap_or(false);
    let refusal = if uses_tickets { ffi::SSL_TICKET_RETURN_IGNORE_RENEW } else { ffi::SSL_TICKET_RETURN_IGNORE };
    let usage = match status {
        ffi::SSL_TICKET_SUCCESS => ffi::SSL_TICKET_RETURN_USE,
        ffi::SSL_TICKET_SUCCESS_RENEW => ffi::SSL_TICKET_RETURN_USE_RENEW,
        ffi::SSL_TICKET_NO_DECRYPT => refusal,
        _ => return refusal,
    };
    let accepted = guarded(binding, || {
        let accepted = binding.accept(connection, session.as_ref());
        if accepted {
            connection.watch(on_info);
        }
        accepted
    });
    if accepted == Some(true) { usage } else { refusal }
}

/// Sees an identity that a client offers in TLS 1.3, before OpenSSL looks for its session: those of stored sessions have 32 bytes. Finds no
/// session itself.
unsafe extern "C" fn on_identity(ssl: *mut ffi::SSL, _: *const c_uchar, length: usize, _: *mut *mut ffi::SSL_SESSION) -> c_int {
    // SAFETY: the connection lives while OpenSSL calls.
    if let Some((connection, _)) = unsafe { bound(ssl) } {
        if length == ID_BYTES { connection.set_no_ticket() } else { connection.clear_no_ticket() }
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
