//! The functions of OpenSSL 3 that are needed, as `<openssl/ssl.h>` declares them.
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

#[repr(C)]
pub struct EVP_CIPHER {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct EVP_CIPHER_CTX {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct EVP_MAC_CTX {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct EVP_PKEY {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct OSSL_PARAM {
    pub key: *const c_char,
    pub data_type: c_uint,
    pub data: *mut c_void,
    pub data_size: usize,
    pub return_size: usize,
}

#[repr(C)]
pub struct X509 {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct X509_CRL {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct X509_STORE {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct X509_VERIFY_PARAM {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct ASN1_STRING {
    opaque: [u8; 0],
}

pub type NewCallback = unsafe extern "C" fn(*mut SSL, *mut SSL_SESSION) -> c_int;
pub type GetCallback = unsafe extern "C" fn(*mut SSL, *const c_uchar, c_int, *mut c_int) -> *mut SSL_SESSION;
pub type RemoveCallback = unsafe extern "C" fn(*mut SSL_CTX, *mut SSL_SESSION);
pub type IdCallback = unsafe extern "C" fn(*mut SSL, *mut c_uchar, *mut c_uint) -> c_int;
pub type InfoCallback = unsafe extern "C" fn(*const SSL, c_int, c_int);
pub type TicketKeyCallback =
    unsafe extern "C" fn(*mut SSL, *mut c_uchar, *mut c_uchar, *mut EVP_CIPHER_CTX, *mut EVP_MAC_CTX, c_int) -> c_int;
pub type GenerateTicketCallback = unsafe extern "C" fn(*mut SSL, *mut c_void) -> c_int;
pub type DecryptTicketCallback =
    unsafe extern "C" fn(*mut SSL, *mut SSL_SESSION, *const c_uchar, usize, c_int, *mut c_void) -> c_int;
pub type FindPskCallback = unsafe extern "C" fn(*mut SSL, *const c_uchar, usize, *mut *mut SSL_SESSION) -> c_int;
pub type ExDup =
    unsafe extern "C" fn(*mut CRYPTO_EX_DATA, *const CRYPTO_EX_DATA, *mut *mut c_void, c_int, c_long, *mut c_void) -> c_int;
pub type ExFree = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut CRYPTO_EX_DATA, c_int, c_long, *mut c_void);

pub const CRYPTO_EX_INDEX_SSL: c_int = 0;
pub const CRYPTO_EX_INDEX_SSL_CTX: c_int = 1;
pub const CRYPTO_EX_INDEX_SSL_SESSION: c_int = 2;
pub const SSL_CTRL_SET_SESS_CACHE_MODE: c_int = 44;
pub const SSL_CTRL_GET_SESS_CACHE_MODE: c_int = 45;
pub const SSL_SESS_CACHE_SERVER: c_long = 0x2;
pub const SSL_SESS_CACHE_NO_INTERNAL: c_long = 0x300;
pub const SSL_OP_NO_TICKET: u64 = 1 << 14;
pub const SSL_OP_CIPHER_SERVER_PREFERENCE: u64 = 1 << 22;
pub const SSL_VERIFY_PEER: c_int = 1;
pub const SSL_VERIFY_FAIL_IF_NO_PEER_CERT: c_int = 2;
pub const SSL_VERIFY_POST_HANDSHAKE: c_int = 8;
pub const SSL_CTRL_GET_TOTAL_RENEGOTIATIONS: c_int = 12;
pub const SSL_CTRL_SET_TLSEXT_SERVERNAME_CB: c_int = 53;
pub const SSL_CTRL_SET_TLSEXT_TICKET_KEY_CB: c_int = 72;
pub const SSL_CTRL_SELECT_CURRENT_CERT: c_int = 116;
pub const SSL_CTRL_SET_CURRENT_CERT: c_int = 117;
pub const SSL_CTRL_GET_VERIFY_CERT_STORE: c_int = 137;
pub const SSL_CERT_SET_FIRST: c_long = 1;
pub const SSL_CERT_SET_NEXT: c_long = 2;
pub const SSL_TICKET_EMPTY: c_int = 3;
pub const SSL_TICKET_NO_DECRYPT: c_int = 4;
pub const SSL_TICKET_SUCCESS: c_int = 5;
pub const SSL_TICKET_SUCCESS_RENEW: c_int = 6;
pub const SSL_TICKET_RETURN_IGNORE: c_int = 1;
pub const SSL_TICKET_RETURN_IGNORE_RENEW: c_int = 2;
pub const SSL_TICKET_RETURN_USE: c_int = 3;
pub const SSL_TICKET_RETURN_USE_RENEW: c_int = 4;
pub const OSSL_PARAM_UTF8_STRING: c_uint = 4;
pub const OSSL_PARAM_OCTET_STRING: c_uint = 5;
pub const SSL_CB_HANDSHAKE_DONE: c_int = 0x20;
pub const SSL_SENT_SHUTDOWN: c_int = 1;
pub const SSL_RECEIVED_SHUTDOWN: c_int = 2;
pub const X509_V_OK: c_long = 0;
pub const X509_V_FLAG_TRUSTED_FIRST: u64 = 0x8000;
pub const X509_LU_X509: c_int = 1;
pub const X509_LU_CRL: c_int = 2;
pub const NID_COMMON_NAME: c_int = 13;
pub const NID_SUBJECT_ALT_NAME: c_int = 85;
pub const GEN_DNS: c_int = 2;
pub const GEN_IPADD: c_int = 7;
pub const TLS1_3_VERSION: c_int = 0x304;
pub const TLSEXT_NAMETYPE_HOST_NAME: c_int = 0;
pub const TLSEXT_TYPE_SERVER_NAME: c_uint = 0;

unsafe extern "C" {
    pub fn CRYPTO_get_ex_new_index(
        class: c_int,
        argl: c_long,
        argp: *mut c_void,
        new: Option<ExFree>,
        dup: Option<ExDup>,
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
    pub fn SSL_CTX_get_cert_store(ctx: *const SSL_CTX) -> *mut X509_STORE;
    pub fn SSL_CTX_get_info_callback(ctx: *mut SSL_CTX) -> Option<InfoCallback>;
    pub fn SSL_CTX_get_options(ctx: *const SSL_CTX) -> u64;
    pub fn SSL_CTX_get_timeout(ctx: *const SSL_CTX) -> c_long;
    pub fn SSL_CTX_sess_get_new_cb(ctx: *mut SSL_CTX) -> Option<NewCallback>;
    pub fn SSL_CTX_sess_get_remove_cb(ctx: *mut SSL_CTX) -> Option<RemoveCallback>;
    pub fn SSL_CTX_sess_get_get_cb(ctx: *mut SSL_CTX) -> Option<GetCallback>;
    pub fn SSL_CTX_get_ciphers(ctx: *const SSL_CTX) -> *const STACK;
    pub fn SSL_CTX_set_options(ctx: *mut SSL_CTX, options: u64) -> u64;
    pub fn SSL_CTX_get0_privatekey(ctx: *const SSL_CTX) -> *mut EVP_PKEY;
    pub fn SSL_CTX_set_psk_find_session_callback(ctx: *mut SSL_CTX, callback: Option<FindPskCallback>);
    pub fn SSL_CTX_clear_options(ctx: *mut SSL_CTX, options: u64) -> u64;
    pub fn SSL_CTX_set_tlsext_ticket_key_evp_cb(ctx: *mut SSL_CTX, callback: Option<TicketKeyCallback>) -> c_int;
    pub fn SSL_CTX_set_session_ticket_cb(
        ctx: *mut SSL_CTX,
        generate: Option<GenerateTicketCallback>,
        decrypt: Option<DecryptTicketCallback>,
        argument: *mut c_void,
    ) -> c_int;
    pub fn SSL_CTX_set_timeout(ctx: *mut SSL_CTX, seconds: c_long) -> c_long;
    pub fn SSL_CTX_set_session_id_context(ctx: *mut SSL_CTX, id: *const c_uchar, length: c_uint) -> c_int;
    pub fn SSL_CTX_sess_set_new_cb(ctx: *mut SSL_CTX, callback: Option<NewCallback>);
    pub fn SSL_CTX_sess_set_get_cb(ctx: *mut SSL_CTX, callback: Option<GetCallback>);
    pub fn SSL_CTX_sess_set_remove_cb(ctx: *mut SSL_CTX, callback: Option<RemoveCallback>);
    pub fn SSL_CTX_set_generate_session_id(ctx: *mut SSL_CTX, callback: Option<IdCallback>) -> c_int;

    pub fn SSL_ctrl(ssl: *mut SSL, cmd: c_int, larg: c_long, parg: *mut c_void) -> c_long;
    pub fn SSL_get_ex_data(ssl: *const SSL, index: c_int) -> *mut c_void;
    pub fn SSL_set_ex_data(ssl: *mut SSL, index: c_int, data: *mut c_void) -> c_int;
    pub fn SSL_get_session(ssl: *const SSL) -> *mut SSL_SESSION;
    pub fn SSL_get_certificate(ssl: *const SSL) -> *mut X509;
    pub fn SSL_get_verify_mode(ssl: *const SSL) -> c_int;
    pub fn SSL_get_verify_depth(ssl: *const SSL) -> c_int;
    pub fn SSL_get_verify_result(ssl: *const SSL) -> c_long;
    pub fn SSL_get_security_level(ssl: *const SSL) -> c_int;
    pub fn SSL_get0_param(ssl: *mut SSL) -> *mut X509_VERIFY_PARAM;
    pub fn SSL_get_info_callback(ssl: *const SSL) -> Option<InfoCallback>;
    pub fn SSL_set_info_callback(ssl: *mut SSL, callback: Option<InfoCallback>);
    pub fn SSL_get_shutdown(ssl: *const SSL) -> c_int;
    pub fn SSL_set_shutdown(ssl: *mut SSL, mode: c_int);
    pub fn SSL_shutdown(ssl: *mut SSL) -> c_int;
    pub fn SSL_get_SSL_CTX(ssl: *const SSL) -> *mut SSL_CTX;
    pub fn SSL_in_init(ssl: *const SSL) -> c_int;
    pub fn SSL_is_server(ssl: *const SSL) -> c_int;
    pub fn SSL_version(ssl: *const SSL) -> c_int;
    pub fn SSL_get_options(ssl: *const SSL) -> u64;
    pub fn SSL_set_options(ssl: *mut SSL, options: u64) -> u64;
    pub fn SSL_clear_options(ssl: *mut SSL, options: u64) -> u64;
    pub fn SSL_get_max_early_data(ssl: *const SSL) -> u32;
    pub fn SSL_set_psk_find_session_callback(ssl: *mut SSL, callback: Option<FindPskCallback>);
    pub fn SSL_get_servername(ssl: *const SSL, kind: c_int) -> *const c_char;
    pub fn SSL_get_num_tickets(ssl: *const SSL) -> usize;
    pub fn SSL_get_finished(ssl: *const SSL, out: *mut c_void, length: usize) -> usize;
    pub fn SSL_get_pending_cipher(ssl: *const SSL) -> *const c_void;
    pub fn SSL_CIPHER_get_handshake_digest(cipher: *const c_void) -> *const c_void;
    pub fn SSL_CIPHER_get_name(cipher: *const c_void) -> *const c_char;
    pub fn SSL_CIPHER_get_protocol_id(cipher: *const c_void) -> u16;
    pub fn SSL_session_reused(ssl: *const SSL) -> c_int;
    pub fn SSL_get_client_random(ssl: *const SSL, out: *mut c_uchar, length: usize) -> usize;
    pub fn SSL_set_session_id_context(ssl: *mut SSL, id: *const c_uchar, length: c_uint) -> c_int;
    pub fn SSL_client_hello_get0_ext(ssl: *mut SSL, kind: c_uint, out: *mut *const c_uchar, length: *mut usize) -> c_int;

    pub fn SSL_SESSION_get_ex_data(session: *const SSL_SESSION, index: c_int) -> *mut c_void;
    pub fn SSL_SESSION_set_ex_data(session: *mut SSL_SESSION, index: c_int, data: *mut c_void) -> c_int;
    pub fn SSL_SESSION_up_ref(session: *mut SSL_SESSION) -> c_int;
    pub fn SSL_SESSION_get0_cipher(session: *const SSL_SESSION) -> *const c_void;
    pub fn SSL_SESSION_get0_peer(session: *mut SSL_SESSION) -> *mut X509;
    pub fn SSL_SESSION_free(session: *mut SSL_SESSION);
    pub fn SSL_SESSION_get_id(session: *const SSL_SESSION, length: *mut c_uint) -> *const c_uchar;
    pub fn SSL_SESSION_set1_id(session: *mut SSL_SESSION, id: *const c_uchar, length: c_uint) -> c_int;
    pub fn SSL_SESSION_is_resumable(session: *const SSL_SESSION) -> c_int;
    pub fn SSL_SESSION_get0_id_context(session: *const SSL_SESSION, length: *mut c_uint) -> *const c_uchar;
    pub fn SSL_SESSION_set1_id_context(session: *mut SSL_SESSION, id: *const c_uchar, length: c_uint) -> c_int;
    pub fn SSL_SESSION_get0_hostname(session: *const SSL_SESSION) -> *const c_char;
    pub fn SSL_SESSION_set1_hostname(session: *mut SSL_SESSION, name: *const c_char) -> c_int;
    pub fn SSL_SESSION_get_timeout(session: *const SSL_SESSION) -> c_long;
    pub fn SSL_SESSION_set_timeout(session: *mut SSL_SESSION, seconds: c_long) -> c_long;
    pub fn SSL_SESSION_get_time(session: *const SSL_SESSION) -> c_long;
    pub fn SSL_SESSION_set_time(session: *mut SSL_SESSION, time: c_long) -> c_long;
    pub fn SSL_SESSION_get0_ticket_appdata(session: *mut SSL_SESSION, data: *mut *mut c_void, length: *mut usize) -> c_int;
    pub fn SSL_SESSION_set1_ticket_appdata(session: *mut SSL_SESSION, data: *const c_void, length: usize) -> c_int;
    pub fn i2d_SSL_SESSION(session: *const SSL_SESSION, out: *mut *mut c_uchar) -> c_int;
    pub fn d2i_SSL_SESSION(session: *mut *mut SSL_SESSION, input: *mut *const c_uchar, length: c_long) -> *mut SSL_SESSION;

    pub fn X509_VERIFY_PARAM_get_flags(param: *const X509_VERIFY_PARAM) -> c_ulong;
    pub fn X509_VERIFY_PARAM_get0_host(param: *mut X509_VERIFY_PARAM, index: c_int) -> *const c_char;
    pub fn X509_STORE_up_ref(store: *mut X509_STORE) -> c_int;
    pub fn X509_STORE_free(store: *mut X509_STORE);
    pub fn X509_STORE_lock(store: *mut X509_STORE) -> c_int;
    pub fn X509_STORE_unlock(store: *mut X509_STORE) -> c_int;
    pub fn X509_STORE_get0_param(store: *const X509_STORE) -> *mut X509_VERIFY_PARAM;
    pub fn X509_STORE_get0_objects(store: *const X509_STORE) -> *mut STACK;
    pub fn X509_OBJECT_get_type(object: *const c_void) -> c_int;
    pub fn X509_OBJECT_get0_X509(object: *const c_void) -> *mut X509;
    pub fn X509_OBJECT_get0_X509_CRL(object: *const c_void) -> *mut X509_CRL;
    pub fn X509_up_ref(certificate: *mut X509) -> c_int;
    pub fn X509_free(certificate: *mut X509);
    pub fn X509_digest(certificate: *const X509, kind: *const c_void, out: *mut c_uchar, length: *mut c_uint) -> c_int;
    pub fn X509_CRL_digest(crl: *const X509_CRL, kind: *const c_void, out: *mut c_uchar, length: *mut c_uint) -> c_int;
    pub fn X509_get0_notAfter(certificate: *const X509) -> *const ASN1_STRING;
    pub fn X509_get_ext_d2i(certificate: *const X509, nid: c_int, critical: *mut c_int, index: *mut c_int) -> *mut c_void;
    pub fn X509_get_subject_name(certificate: *const X509) -> *const c_void;
    pub fn X509_NAME_get_index_by_NID(name: *const c_void, nid: c_int, after: c_int) -> c_int;
    pub fn X509_NAME_get_entry(name: *const c_void, index: c_int) -> *const c_void;
    pub fn X509_NAME_ENTRY_get_data(entry: *const c_void) -> *const ASN1_STRING;
    pub fn GENERAL_NAME_get0_value(name: *const c_void, kind: *mut c_int) -> *const ASN1_STRING;
    pub fn GENERAL_NAMES_free(names: *mut STACK);
    pub fn ASN1_STRING_get0_data(string: *const ASN1_STRING) -> *const c_uchar;
    pub fn ASN1_STRING_length(string: *const ASN1_STRING) -> c_int;
    pub fn ASN1_STRING_to_UTF8(out: *mut *mut c_uchar, string: *const ASN1_STRING) -> c_int;
    pub fn ASN1_TIME_diff(days: *mut c_int, seconds: *mut c_int, from: *const ASN1_STRING, to: *const ASN1_STRING) -> c_int;
    pub fn EVP_sha256() -> *const c_void;
    pub fn EVP_CIPHER_fetch(library: *mut c_void, name: *const c_char, properties: *const c_char) -> *mut EVP_CIPHER;
    pub fn EVP_EncryptInit_ex(
        ctx: *mut EVP_CIPHER_CTX,
        cipher: *const EVP_CIPHER,
        engine: *mut c_void,
        key: *const c_uchar,
        iv: *const c_uchar,
    ) -> c_int;
    pub fn EVP_DecryptInit_ex(
        ctx: *mut EVP_CIPHER_CTX,
        cipher: *const EVP_CIPHER,
        engine: *mut c_void,
        key: *const c_uchar,
        iv: *const c_uchar,
    ) -> c_int;
    pub fn EVP_MAC_CTX_set_params(ctx: *mut EVP_MAC_CTX, params: *const OSSL_PARAM) -> c_int;
    pub fn EVP_PKEY_is_a(key: *const EVP_PKEY, name: *const c_char) -> c_int;
    pub fn EVP_PKEY_get_group_name(key: *const EVP_PKEY, name: *mut c_char, size: usize, length: *mut usize) -> c_int;
    pub fn CRYPTO_free(pointer: *mut c_void, file: *const c_char, line: c_int);
    pub fn OPENSSL_sk_num(stack: *const STACK) -> c_int;
    pub fn OPENSSL_sk_value(stack: *const STACK, index: c_int) -> *mut c_void;
}
