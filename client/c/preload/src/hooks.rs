//! The functions of libssl that come here first: they do ours, then what they are for.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use resumed::ffi::{SSL, SSL_CTX};
use resumed::{Connection, Context};

use crate::environment::Environment;

/// Runs when the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static ON_LOAD: extern "C" fn() = on_load;

extern "C" fn on_load() {
    let _ = catch_unwind(Environment::remembered);
}

/// Has the process send what is not sent yet when it ends.
pub fn at_exit() {
    extern "C" fn leave() {
        let _ = catch_unwind(|| {
            if let Some(fleet) = crate::fleet() {
                fleet.close();
            }
        });
    }
    // SAFETY: the function lives as long as the process: a preloaded library is never unloaded.
    unsafe { libc::atexit(leave) };
}

/// Returns the function of this name that would have been called without us.
fn next(name: &CStr) -> *mut c_void {
    // SAFETY: the name ends with a NUL.
    let address = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    if address.is_null() {
        log::error!("libssl has no {}: it is not the one that this library was made for", name.to_string_lossy());
        std::process::abort();
    }
    address
}

macro_rules! next {
    ($name:literal, $type:ty) => {{
        static NEXT: OnceLock<$type> = OnceLock::new();
        // SAFETY: it is the function of this name, which <openssl/ssl.h> declares so.
        *NEXT.get_or_init(|| unsafe { std::mem::transmute::<*mut c_void, $type>(next($name)) })
    }};
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_new(method: *const c_void) -> *mut SSL_CTX {
    let next = next!(c"SSL_CTX_new", unsafe extern "C" fn(*const c_void) -> *mut SSL_CTX);
    // SAFETY: the caller's.
    unsafe { made(next(method)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_CTX_new_ex(library: *mut c_void, query: *const c_char, method: *const c_void) -> *mut SSL_CTX {
    type New = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_void) -> *mut SSL_CTX;
    let next = next!(c"SSL_CTX_new_ex", New);
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
    let next = next!(c"SSL_accept", unsafe extern "C" fn(*mut SSL) -> c_int);
    // SAFETY: the caller's.
    unsafe {
        accepted(ssl);
        next(ssl)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn SSL_set_SSL_CTX(ssl: *mut SSL, context: *mut SSL_CTX) -> *mut SSL_CTX {
    let next = next!(c"SSL_set_SSL_CTX", unsafe extern "C" fn(*mut SSL, *mut SSL_CTX) -> *mut SSL_CTX);
    // SAFETY: the caller's.
    unsafe {
        let server = Connection::new(ssl).filter(Connection::is_server);
        let chosen = Context::new(context).filter(|_| server.is_some());
        if let Some(chosen) = chosen {
            let _ = catch_unwind(AssertUnwindSafe(|| crate::adopt_context(chosen)));
        }
        // What the server resumed by itself is its own affair.
        let ours = server.filter(|connection| connection.context().is_some_and(|first| first.binding().is_some()));
        let switched = next(ssl, context);
        if let (Some(connection), Some(chosen)) = (ours, chosen) {
            let _ = catch_unwind(AssertUnwindSafe(|| crate::switched(connection, chosen)));
        }
        switched
    }
}

unsafe fn made(context: *mut SSL_CTX) -> *mut SSL_CTX {
    // SAFETY: it was made a moment ago.
    if let Some(made) = unsafe { Context::new(context) } {
        let _ = catch_unwind(AssertUnwindSafe(|| crate::prepare(made)));
    }
    context
}

/// # Safety
///
/// It points to a connection that no other thread uses, or is NULL.
unsafe fn accepted(ssl: *mut SSL) {
    // SAFETY: the caller's.
    if let Some(connection) = unsafe { Connection::new(ssl) } {
        let _ = catch_unwind(AssertUnwindSafe(|| crate::adopt(connection)));
    }
}
