//! The functions of OpenSSL that this library interposes: they do our part, then call OpenSSL's.

use std::ffi::{CStr, c_char, c_int, c_long, c_uchar, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::slice;
use std::sync::OnceLock;

use resumed::ffi::{
    CRYPTO_EX_INDEX_SSL_SESSION, DecryptTicketCallback, FindPskCallback, GenerateTicketCallback, InfoCallback, SSL,
    SSL_CTRL_SET_TLSEXT_SERVERNAME_CB, SSL_CTRL_SET_TLSEXT_TICKET_KEY_CB, SSL_CTX, TicketKeyCallback,
};
use resumed::{Connection, Context};

use crate::environment::Environment;
use crate::fleet;

/// Runs when the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static ON_LOAD: extern "C" fn() = on_load;

extern "C" fn on_load() {
    let _ = catch_unwind(|| {
        if let Some(path) = Environment::remembered().log() {
            resumed::log_to_file(path);
        }
        resumed::start_logging();
    });
}

/// Returns the function of this name that would have been called without us.
fn next(name: &CStr) -> *mut c_void {
    // SAFETY: the names end with a NUL.
    let address = unsafe {
        let versioned = libc::dlvsym(libc::RTLD_NEXT, name.as_ptr(), c"OPENSSL_3.0.0".as_ptr());
        if versioned.is_null() { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) } else { versioned }
    };
    if address.is_null() {
        let _ = catch_unwind(|| {
            log::error!("OpenSSL has no {}: it is not the one that this library was made for", name.to_string_lossy());
        });
    }
    address
}

/// The next function of this name; `otherwise` is returned where there is none.
macro_rules! next {
    ($name:literal, $type:ty $(, $otherwise:expr)?) => {{
        static NEXT: OnceLock<Option<$type>> = OnceLock::new();
        // SAFETY: it is the function of this name, which OpenSSL's headers declare so; None if it is NULL.
        let next = *NEXT.get_or_init(|| unsafe { std::mem::transmute::<*mut c_void, Option<$type>>(next($name)) });
        let Some(next) = next else { return $($otherwise)? };
        next
    }};
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_new(method: *const c_void) -> *mut SSL_CTX {
    let next = next!(c"SSL_CTX_new", unsafe extern "C" fn(*const c_void) -> *mut SSL_CTX, ptr::null_mut());
    // SAFETY: the caller's.
    unsafe { made(next(method)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_new_ex(library: *mut c_void, query: *const c_char, method: *const c_void) -> *mut SSL_CTX {
    type New = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_void) -> *mut SSL_CTX;
    let next = next!(c"SSL_CTX_new_ex", New, ptr::null_mut());
    // SAFETY: the caller's.
    unsafe { made(next(library, query, method)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_set_accept_state(ssl: *mut SSL) {
    let next = next!(c"SSL_set_accept_state", unsafe extern "C" fn(*mut SSL));
    // SAFETY: the caller's.
    unsafe {
        accepted(ssl);
        next(ssl);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_accept(ssl: *mut SSL) -> c_int {
    let next = next!(c"SSL_accept", unsafe extern "C" fn(*mut SSL) -> c_int, -1);
    // SAFETY: the caller's.
    unsafe {
        accepted(ssl);
        next(ssl)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_new(context: *mut SSL_CTX) -> *mut SSL {
    let next = next!(c"SSL_new", unsafe extern "C" fn(*mut SSL_CTX) -> *mut SSL, ptr::null_mut());
    // SAFETY: the caller's.
    unsafe {
        let ssl = next(context);
        if let (Some(connection), Some(context)) = (Connection::new(ssl), Context::new(context)) {
            let _ = catch_unwind(AssertUnwindSafe(|| fleet::begin(connection, context)));
        }
        ssl
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_set_SSL_CTX(ssl: *mut SSL, context: *mut SSL_CTX) -> *mut SSL_CTX {
    type Set = unsafe extern "C" fn(*mut SSL, *mut SSL_CTX) -> *mut SSL_CTX;
    let next = next!(c"SSL_set_SSL_CTX", Set, ptr::null_mut());
    // SAFETY: the caller's.
    unsafe {
        let server = Connection::new(ssl).filter(Connection::is_server);
        if let Some(chosen) = Context::new(context).filter(|_| server.is_some()) {
            let _ = catch_unwind(AssertUnwindSafe(|| fleet::adopt_context(chosen)));
        }
        next(ssl, context)
    }
}

/// Records servername callbacks, and ignores callbacks for the keys of tickets.
#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_callback_ctrl(context: *mut SSL_CTX, command: c_int, callback: *mut c_void) -> c_long {
    type Control = unsafe extern "C" fn(*mut SSL_CTX, c_int, *mut c_void) -> c_long;
    let next = next!(c"SSL_CTX_callback_ctrl", Control, 0);
    // SAFETY: the caller's.
    unsafe {
        if command == SSL_CTRL_SET_TLSEXT_SERVERNAME_CB && !callback.is_null() {
            noted(context, Context::note_servername_callback);
        }
        if command == SSL_CTRL_SET_TLSEXT_TICKET_KEY_CB && has_tickets(context) {
            return 1;
        }
        next(context, command, callback)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_set_cert_cb(context: *mut SSL_CTX, callback: *mut c_void, argument: *mut c_void) {
    type Set = unsafe extern "C" fn(*mut SSL_CTX, *mut c_void, *mut c_void);
    let next = next!(c"SSL_CTX_set_cert_cb", Set);
    // SAFETY: the caller's.
    unsafe {
        if !callback.is_null() {
            noted(context, Context::note_certificate_callback);
        }
        next(context, callback, argument);
    }
}

/// Keeps our callbacks where a server sets its own ones in each handshake (Traffic Server).
#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_set_tlsext_ticket_key_evp_cb(context: *mut SSL_CTX, callback: Option<TicketKeyCallback>) -> c_int {
    type Set = unsafe extern "C" fn(*mut SSL_CTX, Option<TicketKeyCallback>) -> c_int;
    let next = next!(c"SSL_CTX_set_tlsext_ticket_key_evp_cb", Set, 0);
    // SAFETY: the caller's.
    unsafe { if has_tickets(context) { 1 } else { next(context, callback) } }
}

/// As above.
#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_set_session_ticket_cb(
    context: *mut SSL_CTX,
    generate: Option<GenerateTicketCallback>,
    decrypt: Option<DecryptTicketCallback>,
    argument: *mut c_void,
) -> c_int {
    type Set =
        unsafe extern "C" fn(*mut SSL_CTX, Option<GenerateTicketCallback>, Option<DecryptTicketCallback>, *mut c_void) -> c_int;
    let next = next!(c"SSL_CTX_set_session_ticket_cb", Set, 0);
    // SAFETY: the caller's.
    unsafe { if has_tickets(context) { 1 } else { next(context, generate, decrypt, argument) } }
}

/// Records pre-shared keys of the server's own.
#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_set_psk_find_session_callback(context: *mut SSL_CTX, callback: Option<FindPskCallback>) {
    let next = next!(c"SSL_CTX_set_psk_find_session_callback", unsafe extern "C" fn(*mut SSL_CTX, Option<FindPskCallback>));
    // SAFETY: the caller's.
    unsafe {
        if callback.is_some_and(|callback| !resumed::is_our_callback(callback)) {
            noted(context, Context::note_psk_callback);
        }
        next(context, callback);
    }
}

/// As above. Its context's connections count as having some.
#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_set_psk_find_session_callback(ssl: *mut SSL, callback: Option<FindPskCallback>) {
    let next = next!(c"SSL_set_psk_find_session_callback", unsafe extern "C" fn(*mut SSL, Option<FindPskCallback>));
    // SAFETY: the caller's.
    unsafe {
        let own = callback.is_some_and(|callback| !resumed::is_our_callback(callback));
        if let Some(context) = Connection::new(ssl).filter(|_| own).and_then(|connection| connection.context()) {
            let _ = catch_unwind(AssertUnwindSafe(|| context.note_psk_callback()));
        }
        next(ssl, callback);
    }
}

/// Records session id contexts, which OpenSSL has no getter for.
#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_set_session_id_context(context: *mut SSL_CTX, id: *const c_uchar, length: c_uint) -> c_int {
    type Set = unsafe extern "C" fn(*mut SSL_CTX, *const c_uchar, c_uint) -> c_int;
    let next = next!(c"SSL_CTX_set_session_id_context", Set, 0);
    // SAFETY: the caller's.
    unsafe {
        let done = next(context, id, length);
        if done == 1 {
            noted(context, |context| context.note_id_context(bytes(id, length)));
        }
        done
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_set_session_id_context(ssl: *mut SSL, id: *const c_uchar, length: c_uint) -> c_int {
    type Set = unsafe extern "C" fn(*mut SSL, *const c_uchar, c_uint) -> c_int;
    let next = next!(c"SSL_set_session_id_context", Set, 0);
    // SAFETY: the caller's.
    unsafe {
        let done = next(ssl, id, length);
        if let Some(connection) = Connection::new(ssl).filter(|_| done == 1) {
            let _ = catch_unwind(AssertUnwindSafe(|| fleet::identify(connection, bytes(id, length))));
        }
        done
    }
}

/// # Safety
///
/// There are `length` bytes at `data`, or none.
unsafe fn bytes<'a>(data: *const c_uchar, length: c_uint) -> &'a [u8] {
    // SAFETY: the caller's.
    if length == 0 { &[] } else { unsafe { slice::from_raw_parts(data, length as usize) } }
}

/// Keeps the check of a resumed connection's handshake where an application sets an info callback within the handshake.
#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_set_info_callback(ssl: *mut SSL, callback: Option<InfoCallback>) {
    let next = next!(c"SSL_set_info_callback", unsafe extern "C" fn(*mut SSL, Option<InfoCallback>));
    // SAFETY: the caller's.
    unsafe {
        if !Connection::new(ssl).is_some_and(|connection| connection.chain_info_callback(callback)) {
            next(ssl, callback);
        }
    }
}

/// Records programs that attach data of their own to sessions: it is lost when they are stored.
#[unsafe(no_mangle)]
unsafe extern "C" fn CRYPTO_get_ex_new_index(
    class: c_int,
    long: c_long,
    pointer: *mut c_void,
    new: *mut c_void,
    dup: *mut c_void,
    free: *mut c_void,
) -> c_int {
    type Index = unsafe extern "C" fn(c_int, c_long, *mut c_void, *mut c_void, *mut c_void, *mut c_void) -> c_int;
    let next = next!(c"CRYPTO_get_ex_new_index", Index, -1);
    if class == CRYPTO_EX_INDEX_SSL_SESSION && !resumed::frees_our_session_data(free) {
        fleet::note_session_data();
    }
    // SAFETY: the caller's.
    unsafe { next(class, long, pointer, new, dup, free) }
}

/// # Safety
///
/// It points to a context that lives, or is NULL.
unsafe fn noted<'a>(context: *mut SSL_CTX, note: impl FnOnce(&Context<'a>)) {
    // SAFETY: the caller's.
    if let Some(context) = unsafe { Context::new(context) } {
        let _ = catch_unwind(AssertUnwindSafe(|| note(&context)));
    }
}

/// # Safety
///
/// It points to a context that lives, or is NULL.
unsafe fn has_tickets(context: *mut SSL_CTX) -> bool {
    // SAFETY: the caller's.
    let context = unsafe { Context::new(context) };
    context.is_some_and(|context| catch_unwind(AssertUnwindSafe(|| fleet::has_tickets(context))).unwrap_or(false))
}

unsafe fn made(context: *mut SSL_CTX) -> *mut SSL_CTX {
    // SAFETY: it was made a moment ago.
    if let Some(made) = unsafe { Context::new(context) } {
        let _ = catch_unwind(AssertUnwindSafe(|| fleet::prepare(made)));
    }
    context
}

/// # Safety
///
/// It points to a connection that no other thread uses, or is NULL.
unsafe fn accepted(ssl: *mut SSL) {
    // SAFETY: the caller's.
    if let Some(connection) = unsafe { Connection::new(ssl) } {
        let _ = catch_unwind(AssertUnwindSafe(|| fleet::adopt(connection)));
    }
}
