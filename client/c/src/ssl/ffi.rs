//! The functions of OpenSSL 1.1.1 and later that are needed, as `<openssl/ssl.h>` declares them.
#![allow(missing_docs, non_camel_case_types)]

use std::ffi::{c_char, c_int, c_long, c_uchar, c_uint, c_ulong, c_void};

#[repr(C)]
pub struct SSL {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct SSL_CTX {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct SSL_SESSION {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct CRYPTO_EX_DATA {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct STACK {
    opaque: [u8; 0],
}

pub type NewCallback = unsafe extern "C" fn(*mut SSL, *mut SSL_SESSION) -> c_int;
pub type GetCallback = unsafe extern "C" fn(*mut SSL, *const c_uchar, c_int, *mut c_int) -> *mut SSL_SESSION;
pub type RemoveCallback = unsafe extern "C" fn(*mut SSL_CTX, *mut SSL_SESSION);
pub type IdCallback = unsafe extern "C" fn(*mut SSL, *mut c_uchar, *mut c_uint) -> c_int;
pub type ExFree = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut CRYPTO_EX_DATA, c_int, c_long, *mut c_void);

pub const CRYPTO_EX_INDEX_SSL_CTX: c_int = 1;
pub const SSL_CTRL_SET_SESS_CACHE_MODE: c_int = 44;
pub const SSL_SESS_CACHE_SERVER: c_long = 0x2;
pub const SSL_SESS_CACHE_NO_INTERNAL: c_long = 0x300;
pub const SSL_OP_NO_TICKET: u64 = 1 << 14;
pub const SSL_VERIFY_PEER: c_int = 1;
pub const X509_V_ERR_APPLICATION_VERIFICATION: c_long = 50;
pub const TLS1_3_VERSION: c_int = 0x304;
pub const TLSEXT_NAMETYPE_HOST_NAME: c_int = 0;
pub const TLSEXT_TYPE_SERVER_NAME: c_uint = 0;

unsafe extern "C" {
    pub fn CRYPTO_get_ex_new_index(
        class: c_int,
        argl: c_long,
        argp: *mut c_void,
        new: Option<ExFree>,
        dup: Option<unsafe extern "C" fn()>,
        free: Option<ExFree>,
    ) -> c_int;
    pub fn ERR_peek_last_error() -> c_ulong;
    pub fn ERR_set_mark() -> c_int;
    pub fn ERR_pop_to_mark() -> c_int;

    pub fn SSL_CTX_ctrl(ctx: *mut SSL_CTX, cmd: c_int, larg: c_long, parg: *mut c_void) -> c_long;
    pub fn SSL_CTX_get_ex_data(ctx: *const SSL_CTX, index: c_int) -> *mut c_void;
    pub fn SSL_CTX_set_ex_data(ctx: *mut SSL_CTX, index: c_int, data: *mut c_void) -> c_int;
    pub fn SSL_CTX_get_max_early_data(ctx: *const SSL_CTX) -> u32;
    pub fn SSL_CTX_get_verify_mode(ctx: *const SSL_CTX) -> c_int;
    pub fn SSL_CTX_get_client_CA_list(ctx: *const SSL_CTX) -> *const STACK;
    pub fn OPENSSL_sk_num(stack: *const STACK) -> c_int;
    pub fn OPENSSL_sk_value(stack: *const STACK, index: c_int) -> *mut c_void;
    pub fn i2d_X509_NAME(name: *const c_void, out: *mut *mut c_uchar) -> c_int;
    pub fn SSL_CTX_set_options(ctx: *mut SSL_CTX, options: u64) -> u64;
    pub fn SSL_CTX_set_timeout(ctx: *mut SSL_CTX, seconds: c_long) -> c_long;
    pub fn SSL_CTX_set_session_id_context(ctx: *mut SSL_CTX, id: *const c_uchar, length: c_uint) -> c_int;
    pub fn SSL_CTX_sess_set_new_cb(ctx: *mut SSL_CTX, callback: Option<NewCallback>);
    pub fn SSL_CTX_sess_set_get_cb(ctx: *mut SSL_CTX, callback: Option<GetCallback>);
    pub fn SSL_CTX_sess_set_remove_cb(ctx: *mut SSL_CTX, callback: Option<RemoveCallback>);
    pub fn SSL_CTX_set_generate_session_id(ctx: *mut SSL_CTX, callback: Option<IdCallback>) -> c_int;

    pub fn SSL_get_session(ssl: *const SSL) -> *mut SSL_SESSION;
    pub fn SSL_set_verify_result(ssl: *mut SSL, result: c_long);
    pub fn SSL_get_SSL_CTX(ssl: *const SSL) -> *mut SSL_CTX;
    pub fn SSL_is_server(ssl: *const SSL) -> c_int;
    pub fn SSL_version(ssl: *const SSL) -> c_int;
    pub fn SSL_get_options(ssl: *const SSL) -> u64;
    pub fn SSL_set_options(ssl: *mut SSL, options: u64) -> u64;
    pub fn SSL_get_servername(ssl: *const SSL, kind: c_int) -> *const c_char;
    pub fn SSL_get_num_tickets(ssl: *const SSL) -> usize;
    pub fn SSL_session_reused(ssl: *const SSL) -> c_int;
    pub fn SSL_get_client_random(ssl: *const SSL, out: *mut c_uchar, length: usize) -> usize;
    pub fn SSL_set_session_id_context(ssl: *mut SSL, id: *const c_uchar, length: c_uint) -> c_int;
    pub fn SSL_client_hello_get0_ext(ssl: *mut SSL, kind: c_uint, out: *mut *const c_uchar, length: *mut usize) -> c_int;

    pub fn SSL_SESSION_free(session: *mut SSL_SESSION);
    pub fn SSL_SESSION_get_id(session: *const SSL_SESSION, length: *mut c_uint) -> *const c_uchar;
    pub fn SSL_SESSION_is_resumable(session: *const SSL_SESSION) -> c_int;
    pub fn SSL_SESSION_get0_id_context(session: *const SSL_SESSION, length: *mut c_uint) -> *const c_uchar;
    pub fn SSL_SESSION_set1_id_context(session: *mut SSL_SESSION, id: *const c_uchar, length: c_uint) -> c_int;
    pub fn SSL_SESSION_get0_hostname(session: *const SSL_SESSION) -> *const c_char;
    pub fn SSL_SESSION_set1_hostname(session: *mut SSL_SESSION, name: *const c_char) -> c_int;
    pub fn SSL_SESSION_get_timeout(session: *const SSL_SESSION) -> c_long;
    pub fn SSL_SESSION_set_timeout(session: *mut SSL_SESSION, seconds: c_long) -> c_long;
    pub fn SSL_SESSION_set_time(session: *mut SSL_SESSION, time: c_long) -> c_long;
    pub fn SSL_SESSION_get0_ticket_appdata(session: *mut SSL_SESSION, data: *mut *mut c_void, length: *mut usize) -> c_int;
    pub fn SSL_SESSION_set1_ticket_appdata(session: *mut SSL_SESSION, data: *const c_void, length: usize) -> c_int;
    pub fn i2d_SSL_SESSION(session: *const SSL_SESSION, out: *mut *mut c_uchar) -> c_int;
    pub fn d2i_SSL_SESSION(session: *mut *mut SSL_SESSION, input: *mut *const c_uchar, length: c_long) -> *mut SSL_SESSION;
}
