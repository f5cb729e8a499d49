//! libssl's contexts, connections and sessions, and the callbacks in its hands. No panic leaves a callback.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uchar, c_uint, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::OnceLock;

use store::ID_BYTES;

use crate::binding::Binding;

pub mod ffi;

/// `ERR_GET_REASON`.
const REASON_MASK: u64 = 0x7F_FFFF;

/// An `SSL_CTX`, while somebody else keeps it.
#[derive(Clone, Copy)]
pub struct Context<'a>(NonNull<ffi::SSL_CTX>, PhantomData<&'a ()>);

/// An `SSL`, while somebody else keeps it.
#[derive(Clone, Copy)]
pub struct Connection<'a>(NonNull<ffi::SSL>, PhantomData<&'a ()>);

/// An `SSL_SESSION`.
pub(crate) struct Session {
    pointer: NonNull<ffi::SSL_SESSION>,
    owned: bool,
}

/// What a context is to us; decided once.
type Slot = OnceLock<Option<Binding>>;

impl<'a> Context<'a> {
    /// Returns the context behind a pointer; None if it is NULL.
    ///
    /// # Safety
    ///
    /// It points to a context that lives for `'a`.
    #[must_use]
    pub unsafe fn new(pointer: *mut ffi::SSL_CTX) -> Option<Self> {
        NonNull::new(pointer).map(|pointer| Self(pointer, PhantomData))
    }

    /// Returns the context's binding, if it has one.
    #[must_use]
    pub fn binding(&self) -> Option<&'a Binding> {
        self.slot()?.get()?.as_ref()
    }

    /// Returns the context's binding, or what `decide` makes of it the first time that anybody asks.
    pub fn binding_or(&self, decide: impl FnOnce() -> Option<Binding>) -> Option<&'a Binding> {
        self.prepare();
        self.slot()?.get_or_init(decide).as_ref()
    }

    /// Makes room for a binding, while no other thread uses the context.
    pub fn prepare(&self) {
        if self.slot().is_none() {
            let slot = Box::into_raw(Box::new(Slot::new()));
            // SAFETY: the context lives, and takes the slot over unless it says that it could not.
            unsafe {
                if ffi::SSL_CTX_set_ex_data(self.0.as_ptr(), index(), slot.cast()) != 1 {
                    drop(Box::from_raw(slot));
                }
            }
        }
    }

    fn slot(&self) -> Option<&'a Slot> {
        // SAFETY: what is there is a slot of prepare(), which goes with the context.
        unsafe { ffi::SSL_CTX_get_ex_data(self.0.as_ptr(), index()).cast::<Slot>().as_ref() }
    }

    /// Returns how many bytes of early data the context accepts.
    #[must_use]
    pub fn max_early_data(&self) -> u32 {
        // SAFETY: the context lives.
        unsafe { ffi::SSL_CTX_get_max_early_data(self.0.as_ptr()) }
    }

    /// Returns whether the context asks clients for certificates.
    #[must_use]
    pub fn verifies_clients(&self) -> bool {
        // SAFETY: the context lives.
        unsafe { ffi::SSL_CTX_get_verify_mode(self.0.as_ptr()) & ffi::SSL_VERIFY_PEER != 0 }
    }

    /// Returns which certificates the context asks clients for, as bytes that are the same for the same: how it asks, and the names of
    /// the authorities, each behind its length.
    pub(crate) fn asked_certificates(&self) -> Vec<u8> {
        // SAFETY: the context lives; the names are its own, and what is written of one is as long as was said before.
        unsafe {
            let mut asked = ffi::SSL_CTX_get_verify_mode(self.0.as_ptr()).to_be_bytes().to_vec();
            let names = ffi::SSL_CTX_get_client_CA_list(self.0.as_ptr());
            for index in 0..ffi::OPENSSL_sk_num(names) {
                let name = ffi::OPENSSL_sk_value(names, index);
                let length = ffi::i2d_X509_NAME(name, ptr::null_mut());
                asked.extend(length.to_be_bytes());
                let mut encoded = vec![0; usize::try_from(length).unwrap_or(0)];
                let mut cursor = encoded.as_mut_ptr();
                ffi::i2d_X509_NAME(name, &raw mut cursor);
                asked.extend(encoded);
            }
            asked
        }
    }

    /// Sets the callbacks, and what they need.
    pub(crate) fn set_callbacks(&self, id_context: &[u8; 32], lifetime: u64) {
        let context = self.0.as_ptr();
        // No internal cache: in it a session would outlive its removal from the fleet, and its eviction would remove it there.
        let mode = ffi::SSL_SESS_CACHE_SERVER | ffi::SSL_SESS_CACHE_NO_INTERNAL;
        // SAFETY: the context lives, the callbacks always do, and the id context is copied.
        unsafe {
            ffi::SSL_CTX_ctrl(context, ffi::SSL_CTRL_SET_SESS_CACHE_MODE, mode, ptr::null_mut());
            ffi::SSL_CTX_set_options(context, ffi::SSL_OP_NO_TICKET);
            ffi::SSL_CTX_set_timeout(context, seconds(lifetime));
            ffi::SSL_CTX_set_session_id_context(context, id_context.as_ptr(), length_of(id_context));
            ffi::SSL_CTX_sess_set_new_cb(context, Some(on_new));
            ffi::SSL_CTX_sess_set_get_cb(context, Some(on_get));
            ffi::SSL_CTX_sess_set_remove_cb(context, Some(on_remove));
            ffi::SSL_CTX_set_generate_session_id(context, Some(on_id));
        }
    }
}

impl<'a> Connection<'a> {
    /// Returns the connection behind a pointer; None if it is NULL.
    ///
    /// # Safety
    ///
    /// It points to a connection that lives for `'a`, and that no other thread uses.
    #[must_use]
    pub unsafe fn new(pointer: *mut ffi::SSL) -> Option<Self> {
        NonNull::new(pointer).map(|pointer| Self(pointer, PhantomData))
    }

    /// Returns the context that it has at present.
    #[must_use]
    pub fn context(&self) -> Option<Context<'a>> {
        // SAFETY: the connection lives, and keeps its context.
        unsafe { Context::new(ffi::SSL_get_SSL_CTX(self.0.as_ptr())) }
    }

    /// Returns whether it is a server's.
    #[must_use]
    pub fn is_server(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_is_server(self.0.as_ptr()) == 1 }
    }

    /// Switches stateless tickets off: it was made before its context had its binding.
    pub fn set_no_ticket(&self) {
        if !self.has_no_ticket() {
            // SAFETY: the connection lives.
            unsafe { ffi::SSL_set_options(self.0.as_ptr(), ffi::SSL_OP_NO_TICKET) };
        }
    }

    /// Has the connection's peer count as not verified if it resumes a session that was negotiated for another context than the one
    /// that it has at present.
    pub fn distrust_others_sessions(&self) {
        // SAFETY: the connection lives, and keeps its session.
        let session = unsafe { Session::borrowed(ffi::SSL_get_session(self.0.as_ptr())) };
        let id_context = self.context().and_then(|context| context.binding()).map(Binding::id_context);
        if self.is_resumed() && session.map(|session| session.id_context()).as_deref() != id_context {
            // SAFETY: the connection lives.
            unsafe { ffi::SSL_set_verify_result(self.0.as_ptr(), ffi::X509_V_ERR_APPLICATION_VERIFICATION) };
        }
    }

    pub(crate) fn has_no_ticket(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_get_options(self.0.as_ptr()) & ffi::SSL_OP_NO_TICKET != 0 }
    }

    pub(crate) fn is_tls13(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_version(self.0.as_ptr()) == ffi::TLS1_3_VERSION }
    }

    pub(crate) fn is_resumed(&self) -> bool {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_session_reused(self.0.as_ptr()) == 1 }
    }

    pub(crate) fn tickets(&self) -> usize {
        // SAFETY: the connection lives.
        unsafe { ffi::SSL_get_num_tickets(self.0.as_ptr()) }
    }

    pub(crate) fn client_random(&self) -> [u8; 32] {
        let mut random = [0; 32];
        // SAFETY: the connection lives; as much is written as there is room for.
        unsafe { ffi::SSL_get_client_random(self.0.as_ptr(), random.as_mut_ptr(), random.len()) };
        random
    }

    pub(crate) fn server_name(&self) -> Option<Vec<u8>> {
        // SAFETY: the connection lives; the name is its own, and copied.
        unsafe { copied(ffi::SSL_get_servername(self.0.as_ptr(), ffi::TLSEXT_NAMETYPE_HOST_NAME)) }
    }

    /// Returns the client's `server_name` extension as it came; to be asked in the get callback only.
    pub(crate) fn server_name_extension(&self) -> Vec<u8> {
        let (mut data, mut length) = (ptr::null(), 0);
        // SAFETY: the connection lives; the extension is its own, and copied.
        unsafe {
            let kind = ffi::TLSEXT_TYPE_SERVER_NAME;
            if ffi::SSL_client_hello_get0_ext(self.0.as_ptr(), kind, &raw mut data, &raw mut length) == 1 {
                return bytes(data, length);
            }
        }
        Vec::new()
    }

    pub(crate) fn set_id_context(&self, id_context: &[u8; 32]) {
        // SAFETY: the connection lives, and copies the id context.
        unsafe { ffi::SSL_set_session_id_context(self.0.as_ptr(), id_context.as_ptr(), length_of(id_context)) };
    }
}

impl Session {
    /// Decodes a session, any bytes at all.
    pub(crate) fn decode(serialized: &[u8]) -> Option<Self> {
        let length = c_long::try_from(serialized.len()).ok()?;
        let mut cursor = serialized.as_ptr();
        // SAFETY: no more is read than there is. A failure must not stay in the thread's error queue, where the connection would
        // find it.
        let session = unsafe {
            ffi::ERR_set_mark();
            let session = ffi::d2i_SSL_SESSION(ptr::null_mut(), &raw mut cursor, length);
            ffi::ERR_pop_to_mark();
            Self { pointer: NonNull::new(session)?, owned: true }
        };
        (cursor == serialized.as_ptr_range().end).then_some(session)
    }

    /// Returns the session behind a pointer.
    ///
    /// # Safety
    ///
    /// It points to a session that outlives what is returned.
    unsafe fn borrowed(pointer: *mut ffi::SSL_SESSION) -> Option<Self> {
        NonNull::new(pointer).map(|pointer| Self { pointer, owned: false })
    }

    /// Gives the session away.
    fn into_raw(mut self) -> *mut ffi::SSL_SESSION {
        self.owned = false;
        self.raw()
    }

    pub(crate) fn id(&self) -> Vec<u8> {
        let mut length = 0;
        // SAFETY: the session lives; the id is its own, and copied.
        unsafe { bytes(ffi::SSL_SESSION_get_id(self.raw(), &raw mut length), length as usize) }
    }

    pub(crate) fn is_resumable(&self) -> bool {
        // SAFETY: the session lives.
        unsafe { ffi::SSL_SESSION_is_resumable(self.raw()) == 1 }
    }

    pub(crate) fn serialize(&self) -> Vec<u8> {
        // SAFETY: the session lives; what is written is as long as was said before.
        unsafe {
            let length = usize::try_from(ffi::i2d_SSL_SESSION(self.raw(), ptr::null_mut())).unwrap_or(0);
            let mut serialized = vec![0; length];
            let mut cursor = serialized.as_mut_ptr();
            ffi::i2d_SSL_SESSION(self.raw(), &raw mut cursor);
            serialized
        }
    }

    pub(crate) fn set_id_context(&self, id_context: &[u8; 32]) {
        // SAFETY: the session lives, and copies the id context.
        unsafe { ffi::SSL_SESSION_set1_id_context(self.raw(), id_context.as_ptr(), length_of(id_context)) };
    }

    pub(crate) fn id_context(&self) -> Vec<u8> {
        let mut length = 0;
        // SAFETY: the session lives; the id context is its own, and copied.
        unsafe { bytes(ffi::SSL_SESSION_get0_id_context(self.raw(), &raw mut length), length as usize) }
    }

    pub(crate) fn hostname(&self) -> Vec<u8> {
        // SAFETY: the session lives; the name is its own, and copied.
        unsafe { copied(ffi::SSL_SESSION_get0_hostname(self.raw())).unwrap_or_default() }
    }

    pub(crate) fn set_hostname(&self, name: &[u8]) {
        let name = CString::new(name).ok().filter(|name| !name.is_empty());
        // SAFETY: the session lives, and copies the name.
        unsafe { ffi::SSL_SESSION_set1_hostname(self.raw(), name.as_ref().map_or(ptr::null(), |name| name.as_ptr())) };
    }

    pub(crate) fn timeout(&self) -> u64 {
        // SAFETY: the session lives.
        unsafe { u64::try_from(ffi::SSL_SESSION_get_timeout(self.raw())).unwrap_or(0) }
    }

    pub(crate) fn set_life(&self, begin: u64, timeout: u64) {
        // SAFETY: the session lives.
        unsafe {
            ffi::SSL_SESSION_set_time(self.raw(), seconds(begin));
            ffi::SSL_SESSION_set_timeout(self.raw(), seconds(timeout));
        }
    }

    pub(crate) fn ticket_data(&self) -> Vec<u8> {
        let (mut data, mut length) = (ptr::null_mut(), 0);
        // SAFETY: the session lives; the data is its own, and copied.
        unsafe {
            if ffi::SSL_SESSION_get0_ticket_appdata(self.raw(), &raw mut data, &raw mut length) == 1 {
                return bytes(data.cast(), length);
            }
        }
        Vec::new()
    }

    pub(crate) fn set_ticket_data(&self, data: &[u8]) {
        // SAFETY: the session lives, and copies the data.
        unsafe { ffi::SSL_SESSION_set1_ticket_appdata(self.raw(), data.as_ptr().cast(), data.len()) };
    }

    fn raw(&self) -> *mut ffi::SSL_SESSION {
        self.pointer.as_ptr()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: the reference is ours.
            unsafe { ffi::SSL_SESSION_free(self.raw()) };
        }
    }
}

/// Returns the reason code of the last error in the thread's queue, 0 if there is none.
pub(crate) fn last_error_reason() -> u64 {
    // SAFETY: it may always be asked.
    unsafe { ffi::ERR_peek_last_error() & REASON_MASK }
}

/// The place of our slot in each context.
fn index() -> c_int {
    static INDEX: OnceLock<c_int> = OnceLock::new();
    // SAFETY: the function that frees a slot always lives.
    *INDEX.get_or_init(|| unsafe {
        let class = ffi::CRYPTO_EX_INDEX_SSL_CTX;
        ffi::CRYPTO_get_ex_new_index(class, 0, ptr::null_mut(), None, None, Some(free_slot))
    })
}

unsafe extern "C" fn free_slot(
    _: *mut c_void,
    slot: *mut c_void,
    _: *mut ffi::CRYPTO_EX_DATA,
    _: c_int,
    _: c_long,
    _: *mut c_void,
) {
    if !slot.is_null() {
        // SAFETY: it is a slot of prepare(), and nobody has it any more.
        let slot = unsafe { Box::from_raw(slot.cast::<Slot>()) };
        let _ = catch_unwind(AssertUnwindSafe(|| drop(slot)));
    }
}

/// Stores a session. Returns 0: no reference is kept, OpenSSL releases its own.
unsafe extern "C" fn on_new(ssl: *mut ffi::SSL, session: *mut ffi::SSL_SESSION) -> c_int {
    // SAFETY: both live while OpenSSL calls.
    unsafe {
        if let (Some((connection, binding)), Some(session)) = (bound(ssl), Session::borrowed(session)) {
            guarded(binding, || binding.negotiated(connection, &session));
        }
    }
    0
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
    let found = guarded(binding, || binding.look_up(connection, &id));
    found.flatten().map_or(ptr::null_mut(), Session::into_raw)
}

/// Tells of a connection that ended without our `close_notify`.
unsafe extern "C" fn on_remove(context: *mut ffi::SSL_CTX, session: *mut ffi::SSL_SESSION) {
    // SAFETY: both live while OpenSSL calls.
    unsafe {
        let binding = Context::new(context).and_then(|context| context.binding());
        if let (Some(binding), Some(session)) = (binding, Session::borrowed(session)) {
            guarded(binding, || binding.ended(&session));
        }
    }
}

/// Writes a session id. Returning 0 would end the handshake, so a defect here means a random id.
unsafe extern "C" fn on_id(ssl: *mut ffi::SSL, data: *mut c_uchar, length: *mut c_uint) -> c_int {
    // SAFETY: all of them live while OpenSSL calls; there is room for 32 bytes (SSL_CTX_set_generate_session_id(3)).
    unsafe {
        let issued = bound(ssl).and_then(|(_, binding)| guarded(binding, || binding.shim().issue_id()));
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

/// Returns a connection and the binding of its context, if that has one.
///
/// # Safety
///
/// The connection lives for `'a`.
unsafe fn bound<'a>(ssl: *mut ffi::SSL) -> Option<(Connection<'a>, &'a Binding)> {
    // SAFETY: the caller's.
    let connection = unsafe { Connection::new(ssl) }?;
    Some((connection, connection.context()?.binding()?))
}

/// Keeps a panic from C: a defect is a full handshake, and a count.
fn guarded<T>(binding: &Binding, callback: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(callback)).inspect_err(|_| binding.shim().internal_error()).ok()
}

/// # Safety
///
/// There are `length` bytes at `data`, or it is NULL.
unsafe fn bytes(data: *const u8, length: usize) -> Vec<u8> {
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: the caller's.
    unsafe { slice::from_raw_parts(data, length) }.to_vec()
}

/// # Safety
///
/// It points to a string with a NUL, or is NULL.
unsafe fn copied(text: *const c_char) -> Option<Vec<u8>> {
    // SAFETY: the caller's.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_bytes().to_vec())
}

fn length_of<const N: usize>(_: &[u8; N]) -> c_uint {
    c_uint::try_from(N).unwrap_or(0)
}

fn seconds(seconds: u64) -> c_long {
    c_long::try_from(seconds).unwrap_or(c_long::MAX)
}
